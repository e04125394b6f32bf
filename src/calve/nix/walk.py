"""A tree of the file system as a NAR's events: what `nar.read` would yield of its NAR, without a NAR."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator

from calve.errors import ConflictError, DamagedError
from calve.nix.narformat import END, MAX_DATA_BYTES, Directory, Event, File, Symlink
from calve.nix.narinfo import PathInfo
from calve.nix.narwriter import (
    OPEN_FILE,
    Emitter,
    printable,
    unreadable,
    unsupported,
)
from calve.nix.tree import OPEN_DIRECTORY

__all__ = ["checked", "walk"]


def walk(path: str | os.PathLike[str]) -> Iterator[Event]:
    """Yield the events of a tree's NAR.

    Raises:
        UsageError: something that is no file, directory or symlink.
        ConflictError: a file changed while it was read.
        NotFoundError: the path does not exist.
        CalveError: it cannot be read.
    """
    top = os.fspath(path)
    yield from _node(b"", top, None, top)


def _node(name: bytes, path: str, parent_fd: int | None, place: str) -> Iterator[Event]:
    """Yield a node's events: `path` is its name in the directory; the root has no directory, and no name."""
    try:
        mode = os.lstat(path, dir_fd=parent_fd).st_mode
        if stat.S_ISLNK(mode):
            yield Symlink(name, os.fsencode(os.readlink(path, dir_fd=parent_fd)))
        elif stat.S_ISDIR(mode):
            yield from _directory(name, os.open(path, OPEN_DIRECTORY, dir_fd=parent_fd), place)
        elif stat.S_ISREG(mode):
            yield from _file(name, os.open(path, OPEN_FILE, dir_fd=parent_fd), place)
        else:
            raise unsupported(place)
    except OSError as error:
        raise unreadable(error, place) from error


def _directory(name: bytes, fd: int, place: str) -> Iterator[Event]:
    """Yield the events of an open directory, and close it."""
    try:
        with os.scandir(fd) as entries:
            names = sorted((entry.name for entry in entries), key=os.fsencode)
        yield Directory(name)
        for child in names:
            yield from _node(os.fsencode(child), child, fd, f"{place}/{child}")
        yield END
    finally:
        os.close(fd)


def _file(name: bytes, fd: int, place: str) -> Iterator[Event]:
    """Yield the events of an open file, and close it."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):  # since its directory was read
            raise unsupported(place)
        left = status.st_size
        yield File(name, left, bool(status.st_mode & stat.S_IXUSR))
        while left:
            data = os.read(fd, min(left, MAX_DATA_BYTES))
            if not data:
                break
            left -= len(data)
            yield data
        if left or os.read(fd, 1):
            raise ConflictError("the file changed while it was read", place=printable(place))
    finally:
        os.close(fd)


def checked(events: Iterable[Event], info: PathInfo) -> Iterator[Event]:
    """Yield events as they are, and fail at their end unless they make the NAR of a path.

    Raises:
        DamagedError: the NAR has another hash or size.
    """
    digest = hashlib.sha256()
    emitter = Emitter(digest.update)
    for event in events:
        emitter.add(event)
        yield event
    if emitter.finish() != info.nar_size or digest.digest() != info.nar_hash.digest:
        raise DamagedError("the tree is not the one that was registered", place=info.path)
