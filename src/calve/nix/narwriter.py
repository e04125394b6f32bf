"""NARs written: from events, or from a file system tree."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from typing import TypeAlias

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
from calve.nix.tree import OPEN_DIRECTORY

__all__ = [
    "OPEN_FILE",
    "Emitter",
    "Swap",
    "dump",
    "dump_into",
    "emit",
    "printable",
    "unreadable",
    "unsupported",
]

Swap: TypeAlias = Callable[[int], memoryview]
"""Is told how many bytes of the buffer are filled, 0 at first; returns the next to fill, at least one byte long."""

# Not to block where a pipe has taken the file's place since its directory was read.
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# From this size on a file is worth a system call that reads it to where it is wanted.
_STRAIGHT_BYTES = 64 * 1024


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
            self.deliver(b"".join(self.parts) if len(self.parts) > 1 else self.parts[0])
            self.writing = False
            self.size += self.pending
            self.parts.clear()
            self.pending = 0

    def deliver(self, data: bytes) -> None:
        self.write(data)

    def content(self, fd: int, size: int) -> bool:
        """Add the content of a file; say whether it was of that size."""
        left = size
        while True:
            asked = min(left + 1, MAX_DATA_BYTES)
            chunk = os.read(fd, asked)
            left -= len(chunk)
            if left < 0:
                return False
            if chunk:
                self.add(chunk)
            if not chunk or (len(chunk) < asked and not left):
                return not left

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


def _nowhere(_data: bytes) -> None:
    """Take the bytes of a NAR that goes into buffers: none."""


class _Filler(_Output):
    """Writes a NAR into its owner's buffers; large files are read straight into them."""

    __slots__ = ("buffer", "filled", "swap")

    def __init__(self, swap: Swap) -> None:
        super().__init__(_nowhere)
        self.swap = swap
        self.buffer = memoryview(b"")
        self.filled = 0

    def deliver(self, data: bytes) -> None:
        source = memoryview(data)
        while source:
            room = self.room()
            count = min(len(room), len(source))
            room[:count] = source[:count]
            self.filled += count
            source = source[count:]

    def room(self) -> memoryview:
        """Return what of the buffer is free; of the next where nothing is."""
        if self.filled == len(self.buffer):
            writing, self.writing = self.writing, True
            self.buffer = memoryview(b"")  # to hold one buffer at most
            self.buffer = self.swap(self.filled)
            self.writing = writing
            self.filled = 0
        return self.buffer[self.filled :]

    def content(self, fd: int, size: int) -> bool:
        if size < _STRAIGHT_BYTES:
            return super().content(fd, size)
        self.flush()
        left = size
        while left:
            count = os.readv(fd, [self.room()[:left]])
            if not count:
                return False
            left -= count
            self.filled += count
            self.size += count
        return not os.read(fd, 1)


class Emitter:
    """Writes a NAR, an event at a time."""

    def __init__(self, write: Write) -> None:
        self._out = _Output(write)
        self._size = self._left = 0  # of the file that is open
        self._complete = False

    def add(self, event: Event) -> None:
        """Write an event; UsageError where it does not go on the tree in canonical order."""
        out = self._out
        if self._complete or (self._left > 0) != isinstance(event, bytes):
            raise UsageError("events that make no tree: content and nodes out of place")
        if isinstance(event, bytes):
            self._left -= len(event)
            if self._left < 0:
                raise UsageError("a file has more content than its size")
            out.add(event)
            if self._left == 0:
                out.file_end(self._size)
        elif isinstance(event, File):
            self._size = self._left = event.size
            out.file(event.name, event.size, executable=event.executable)
            if not event.size:
                out.close()
        elif isinstance(event, Directory):
            out.directory(event.name)
        elif isinstance(event, Symlink):
            out.symlink(event.name, event.target)
        else:
            out.end()
        self._complete = not out.last and not self._left

    def finish(self) -> int:
        """Write what was gathered; return the NAR's size in bytes. UsageError unless the tree is complete."""
        if not self._complete:
            raise UsageError("events that make no tree: they end too early")
        self._out.flush()
        return self._out.size


def emit(events: Iterable[Event], write: Write) -> int:
    """Write a NAR from events; return its size in bytes.

    Raises:
        UsageError: they do not make up one tree in canonical order.
    """
    emitter = Emitter(write)
    for event in events:
        emitter.add(event)
    return emitter.finish()


def dump(path: str | os.PathLike[str], write: Write) -> int:
    """Write the NAR of a file system tree; return its size in bytes.

    A file is executable where its owner may execute it. Symlinks are not followed.

    Raises:
        UsageError: something that is no file, directory or symlink, or a tree too deep.
        ConflictError: a file changed while it was read.
        NotFoundError: the path does not exist.
        CalveError: it cannot be read.
    """
    return _dump(path, _Output(write))


def dump_into(path: str | os.PathLike[str], swap: Swap) -> int:
    """Write the NAR of a file system tree as `dump` does, into buffers that the caller owns; return its size in bytes.

    The last buffer is not swapped: what it holds, at least one byte, is the size less what was swapped.
    """
    return _dump(path, _Filler(swap))


def _dump(path: str | os.PathLike[str], out: _Output) -> int:
    top = os.fspath(path)
    try:
        kind = stat.S_IFMT(os.lstat(top).st_mode)
    except OSError as error:
        raise unreadable(error, top) from error
    _dump_node(out, kind, top, None, top)
    out.flush()
    return out.size


def printable(path: str) -> str:
    """Return a path for a message: whoever named the file must not write lines of their own into it."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def unreadable(error: OSError, place: str) -> CalveError:
    """Say that a node cannot be read."""
    kind = NotFoundError if isinstance(error, FileNotFoundError) else CalveError
    return kind(f"cannot read: {error.strerror}", place=printable(place))


def unsupported(place: str) -> UsageError:
    """Say that a node is none that a NAR can have."""
    return UsageError("neither a file, nor a directory, nor a symlink", place=printable(place))


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
            _dump_file(out, name, os.open(path, OPEN_FILE, dir_fd=parent_fd), place)
        elif kind == stat.S_IFDIR:
            _dump_directory(out, name, os.open(path, OPEN_DIRECTORY, dir_fd=parent_fd), place)
        elif kind == stat.S_IFLNK:
            out.symlink(name, os.fsencode(os.readlink(path, dir_fd=parent_fd)))
        else:
            raise unsupported(place)
    except OSError as error:
        if out.writing:
            raise
        raise unreadable(error, place) from error


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
            raise unsupported(place)
        size = status.st_size
        out.file(name, size, executable=bool(status.st_mode & stat.S_IXUSR))
        if not out.content(fd, size):
            raise ConflictError("the file changed while it was read", place=printable(place))
        out.file_end(size)
    finally:
        os.close(fd)
