"""A NAR's events become files, by directory descriptors only, with the metadata that every store path has.

Files 0444 or 0555, directories 0555, modification time 1 s after the epoch everywhere, symlinks too.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from calve.errors import CalveError, DamagedError, SpaceError
from calve.nix.nar import Directory, End, Event, File, Symlink, check_name
from calve.nix.narformat import check_target
from calve.nix.tree import OPEN_DIRECTORY

__all__ = ["Unpacked", "canonical", "storage_error", "unpack"]

_TIMES_NS = (1_000_000_000, 1_000_000_000)
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What was written: regular files, and the bytes of their contents."""

    files: int
    bytes: int


def storage_error(error: OSError, place: object) -> CalveError:
    """Say what a failed write means: SpaceError where the disk is full."""
    if error.errno in _NO_SPACE:
        return SpaceError(
            f"cannot write: {error.strerror}",
            place=place,
            hint="the file system has no bytes or inodes left: give it more, or collect garbage",
        )
    return CalveError(f"cannot write: {error.strerror}", place=place)


def canonical(parent_fd: int, name: str) -> bool:
    """Say whether a tree has the metadata that `unpack` gives one, and is this user's.

    Raises:
        OSError: it cannot be read.
    """
    status = os.lstat(name, dir_fd=parent_fd)
    if status.st_mtime_ns != _TIMES_NS[1] or status.st_uid != os.geteuid():
        return False
    if stat.S_ISLNK(status.st_mode):
        return True
    if not stat.S_ISDIR(status.st_mode):
        return stat.S_IMODE(status.st_mode) in {0o444, 0o555}
    if stat.S_IMODE(status.st_mode) != 0o555:
        return False
    fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent_fd)
    try:
        with os.scandir(fd) as entries:
            return all(canonical(fd, entry.name) for entry in entries)
    finally:
        os.close(fd)


def unpack(events: Iterable[Event], parent_fd: int, name: str) -> Unpacked:
    """Write a tree as the entry `name` of a directory.

    The entry must not exist. What a failure leaves behind is the caller's to remove.

    Args:
        events: of `nar.read`.
        parent_fd: the directory, open.
        name: of the entry; one component.

    Raises:
        DamagedError: from the events; or they would leave the directory, or make no tree.
        SpaceError: the file system is full.
        CalveError: it cannot be written to.
    """
    tree = _Tree(parent_fd, os.fsencode(name))
    try:
        for event in events:
            if isinstance(event, bytes):
                tree.content(event)
            else:
                tree.node(event)
        if not tree.complete:
            raise DamagedError("the events of a NAR end too early", place=name)
    except OSError as error:
        raise storage_error(error, name) from error
    finally:
        tree.close()
    return Unpacked(tree.files, tree.bytes)


class _Tree:
    """The tree being written: the open directories, the open file, and what is still to come."""

    def __init__(self, parent_fd: int, name: bytes) -> None:
        self.name = name
        self.fds = [parent_fd]  # the parent, then every directory that has not ended
        self.file_fd = -1
        self.left = 0
        self.complete = False
        self.files = 0
        self.bytes = 0
        self.exact: set[int] = set()  # modes that open(2) sets as it is told

    def node(self, event: Directory | File | Symlink | End) -> None:
        """Begin a node, or end a directory."""
        if self.complete or self.file_fd >= 0:
            raise DamagedError("the events of a NAR are out of place")
        if isinstance(event, End):
            self._end()
            return
        top = len(self.fds) == 1
        name = self.name if top else event.name
        if not check_name(name):
            raise DamagedError(f"a NAR with the name {name!r}")
        at = self.fds[-1]
        if isinstance(event, File):
            mode = 0o555 if event.executable else 0o444
            self.file_fd = os.open(name, _CREATE, mode, dir_fd=at)
            if mode not in self.exact:
                self._set_mode(mode)
            self.left = event.size
            self.files += 1
            self.bytes += event.size
            if not event.size:
                self._file_end()
        elif isinstance(event, Directory):
            os.mkdir(name, 0o700, dir_fd=at)
            self.fds.append(os.open(name, OPEN_DIRECTORY, dir_fd=at))
        elif not check_target(event.target):
            raise DamagedError(f"a NAR with a symlink to {event.target[:100]!r}")
        else:
            os.symlink(event.target, name, dir_fd=at)
            os.utime(name, ns=_TIMES_NS, dir_fd=at, follow_symlinks=False)
            self.complete = top

    def _set_mode(self, mode: int) -> None:
        """Set the mode of the open file where creating it did not: by umask, or an ACL that the directory hands down.

        What holds for the first file of a mode holds for all of the tree: 20,000 system calls less in a pull.
        """
        if stat.S_IMODE(os.fstat(self.file_fd).st_mode) == mode:
            self.exact.add(mode)
        else:
            os.fchmod(self.file_fd, mode)

    def content(self, data: bytes) -> None:
        """Write bytes of the open file."""
        self.left -= len(data)
        if self.file_fd < 0 or self.left < 0:
            raise DamagedError("a NAR's file has more content than its size")
        written = os.write(self.file_fd, data)
        while written < len(data):  # a signal, or a disk that fills up
            written += os.write(self.file_fd, data[written:])
        if not self.left:
            self._file_end()

    def _file_end(self) -> None:
        os.utime(self.file_fd, ns=_TIMES_NS)
        fd, self.file_fd = self.file_fd, -1
        os.close(fd)
        self.complete = len(self.fds) == 1

    def _end(self) -> None:
        if len(self.fds) == 1:
            raise DamagedError("the events of a NAR are out of place")
        fd = self.fds[-1]
        os.fchmod(fd, 0o555)
        os.utime(fd, ns=_TIMES_NS)
        self.fds.pop()
        os.close(fd)
        self.complete = len(self.fds) == 1

    def close(self) -> None:
        """Close what a failure left open."""
        if self.file_fd >= 0:
            os.close(self.file_fd)
        for fd in self.fds[1:]:
            os.close(fd)
