"""NARs written: from events, or from a file system tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from calve.errors import CalveError, ConflictError, NotFoundError, UsageError
from calve.nix.narformat import (
    CHUNK_BYTES,
    CLOSE,
    CLOSE_ENTRY,
    CONTENTS,
    DIRECTORY,
    ENTRY,
    EXECUTABLE,
    MAGIC,
    MAX_DATA_BYTES,
    MAX_DEPTH,
    NODE,
    NODE_OF_ENTRY,
    REGULAR,
    SYMLINK,
    TARGET,
    U64,
    ZEROS,
    Directory,
    Event,
    File,
    Symlink,
    Write,
    check_name,
    check_target,
    string,
)

__all__ = ["dump", "emit"]

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Not to block where a pipe has taken the file's place since its directory was read.
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Output:
    """Writes a NAR node by node, small pieces gathered; knows which directories are open."""

    __slots__ = ("last", "parts", "pending", "size", "write", "writing")

    def __init__(self, write: Write) -> None:
        self.write = write
        self.last: list[bytes] = []  # of each open directory the name that came last
        self.parts: list[bytes] = []
        self.pending = 0
        self.size = 0
        self.writing = False  # whose an OSError is: the reader's of files, or the writer's
        self.add(MAGIC + NODE)

    def add(self, data: bytes) -> None:
        self.parts.append(data)
        self.pending += len(data)
        if self.pending >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand over what was gathered."""
        if self.pending:
            self.writing = True
            self.write(b"".join(self.parts) if len(self.parts) > 1 else self.parts[0])
            self.writing = False
            self.size += self.pending
            self.parts.clear()
            self.pending = 0

    def begin(self, name: bytes) -> None:
        """Begin a node: the root's name is empty."""
        if self.last:
            if not check_name(name) or name <= self.last[-1] or len(self.last) > MAX_DEPTH:
                raise UsageError(f"{name!r} cannot stand here in a NAR: a bad name, order or depth")
            self.last[-1] = name
            self.add(ENTRY + string(name) + NODE_OF_ENTRY)
        elif name:
            raise UsageError("the root of a NAR has no name")

    def close(self) -> None:
        """End a node."""
        self.add(CLOSE_ENTRY if self.last else CLOSE)

    def directory(self, name: bytes) -> None:
        self.begin(name)
        self.add(DIRECTORY)
        self.last.append(b"")

    def end(self) -> None:
        """End the directory that is open."""
        if not self.last:
            raise UsageError("the end of a directory that did not begin")
        self.last.pop()
        self.close()

    def file(self, name: bytes, size: int, *, executable: bool) -> None:
        """Begin a file; its bytes, its padding and `close` follow."""
        self.begin(name)
        head = REGULAR + EXECUTABLE + CONTENTS if executable else REGULAR + CONTENTS
        self.add(head + U64.pack(size))

    def file_end(self, size: int) -> None:
        if size % 8:
            self.add(ZEROS[: -size % 8])
        self.close()

    def symlink(self, name: bytes, target: bytes) -> None:
        if not check_target(target):
            raise UsageError(f"{name!r} cannot stand in a NAR: the target of the symlink is bad")
        self.begin(name)
        self.add(SYMLINK + TARGET + string(target))
        self.close()


def emit(events: Iterable[Event], write: Write) -> int:
    """Write a NAR from events; return its size in bytes.

    Raises:
        UsageError: they do not make up one tree in canonical order.
    """
    out = _Output(write)
    size = left = 0  # of the file that is open
    complete = False
    for event in events:
        if complete or (left > 0) != isinstance(event, bytes):
            raise UsageError("events that make no tree: content and nodes out of place")
        if isinstance(event, bytes):
            left -= len(event)
            if left < 0:
                raise UsageError("a file has more content than its size")
            out.add(event)
            if left == 0:
                out.file_end(size)
        elif isinstance(event, File):
            size = left = event.size
            out.file(event.name, size, executable=event.executable)
            if not size:
                out.close()
        elif isinstance(event, Directory):
            out.directory(event.name)
        elif isinstance(event, Symlink):
            out.symlink(event.name, event.target)
        else:
            out.end()
        complete = not out.last and not left
    if not complete:
        raise UsageError("events that make no tree: they end too early")
    out.flush()
    return out.size


def dump(path: str | os.PathLike[str], write: Write) -> int:
    """Write the NAR of a file system tree; return its size in bytes.

    A file is executable where its owner may execute it. Symlinks are not followed.

    Raises:
        UsageError: something that is no file, directory or symlink, or a tree too deep.
        ConflictError: a file changed while it was read.
        NotFoundError: the path does not exist.
        CalveError: it cannot be read.
    """
    out = _Output(write)
    top = os.fspath(path)
    try:
        kind = stat.S_IFMT(os.lstat(top).st_mode)
    except OSError as error:
        raise _unreadable(error, top) from error
    _dump_node(out, kind, top, None, top)
    out.flush()
    return out.size


def _printable(path: str) -> str:
    """Return a path for a message: whoever named the file must not write lines of their own into it."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _unreadable(error: OSError, place: str) -> CalveError:
    kind = NotFoundError if isinstance(error, FileNotFoundError) else CalveError
    return kind(f"cannot read: {error.strerror}", place=_printable(place))


def _unsupported(place: str) -> UsageError:
    return UsageError("neither a file, nor a directory, nor a symlink", place=_printable(place))


def _kind(entry: os.DirEntry[str]) -> int:
    """Return the type bits of a mode; 0 for what a NAR cannot hold. Usually costs no system call."""
    if entry.is_file(follow_symlinks=False):
        return stat.S_IFREG
    if entry.is_symlink():
        return stat.S_IFLNK
    return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else 0


def _dump_node(out: _Output, kind: int, path: str, parent_fd: int | None, place: str) -> None:
    """Dump a node: `path` is its name in the directory; the root has no directory, and no name."""
    name = b"" if parent_fd is None else os.fsencode(path)
    try:
        if kind == stat.S_IFREG:
            _dump_file(out, name, os.open(path, _OPEN_FILE, dir_fd=parent_fd), place)
        elif kind == stat.S_IFDIR:
            _dump_directory(out, name, os.open(path, _OPEN_DIRECTORY, dir_fd=parent_fd), place)
        elif kind == stat.S_IFLNK:
            out.symlink(name, os.fsencode(os.readlink(path, dir_fd=parent_fd)))
        else:
            raise _unsupported(place)
    except OSError as error:
        if out.writing:
            raise
        raise _unreadable(error, place) from error


def _dump_directory(out: _Output, name: bytes, fd: int, place: str) -> None:
    """Dump an open directory, and close it."""
    try:
        with os.scandir(fd) as entries:
            children = [(entry.name, _kind(entry)) for entry in entries]
        children.sort(key=lambda child: os.fsencode(child[0]))
        out.directory(name)
        for child, kind in children:
            _dump_node(out, kind, child, fd, f"{place}/{child}")
        out.end()
    finally:
        os.close(fd)


def _dump_file(out: _Output, name: bytes, fd: int, place: str) -> None:
    """Dump an open file, and close it."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _unsupported(place)
        size = left = status.st_size
        out.file(name, size, executable=bool(status.st_mode & stat.S_IXUSR))
        while chunk := os.read(fd, min(left + 1, MAX_DATA_BYTES)):
            left -= len(chunk)
            if left < 0:
                break
            out.add(chunk)
        if left:
            raise ConflictError("the file changed while it was read", place=_printable(place))
        out.file_end(size)
    finally:
        os.close(fd)
