"""What an interrupted run left in a store, and whether it can be trusted.

A run's directory has the file `lock`, locked while the run lives, and the file `boot`, which names the boot it was made
in: data that was not synced outlives a `kill -9`, but no power cut, which may leave empty files under good names.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from calve.errors import CalveError
from calve.nix import narwriter
from calve.nix.narinfo import PathInfo
from calve.nix.tree import OPEN_DIRECTORY, remove_tree
from calve.nix.unpack import canonical

__all__ = ["BOOT", "LOCK", "Leftover", "lock", "whole", "write_boot"]

LOCK = "lock"
BOOT = "boot"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BOOT_ID_BYTES = 64
_NO_FILE = frozenset({errno.EISDIR, errno.ELOOP})
_OPEN_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE_BOOT = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_BOOT = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Leftover:
    """The directory of an interrupted run, locked; removed where its block is left without an error.

    Attributes:
        fd: of the directory.
        ours: it belongs to this user, and nobody else could write to it.
        same_boot: what it holds was written in this boot.
    """

    fd: int
    ours: bool
    same_boot: bool
    _parent_fd: int
    _name: str
    _lock_fd: int

    @classmethod
    def find(cls, parent_fd: int, name: str) -> Leftover | None:
        """Lock a run's directory; None where the run lives, or the directory is not ours to look at."""
        try:
            fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent_fd)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None  # gone since, no directory, or another user's
        try:
            lock_fd = lock(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in _NO_FILE:
                return None  # not one of ours
            raise
        if lock_fd is None:
            os.close(fd)
            return None
        status = os.fstat(fd)
        ours = status.st_uid == os.geteuid() and not status.st_mode & 0o077
        boot = _boot()
        return cls(fd, ours, boot != b"" and boot == _read_boot(fd), parent_fd, name, lock_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                remove_tree(self._parent_fd, self._name)
        finally:
            os.close(self._lock_fd)
            os.close(self.fd)


def lock(directory_fd: int) -> int | None:
    """Take a run's lock; None where its owner lives, or the directory is gone."""
    try:
        fd = os.open(LOCK, _OPEN_LOCK, 0o600, dir_fd=directory_fd)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def write_boot(directory_fd: int) -> None:
    """Write down in which boot a run's directory is filled."""
    fd = os.open(BOOT, _CREATE_BOOT, 0o600, dir_fd=directory_fd)
    try:
        os.write(fd, _boot())
    finally:
        os.close(fd)


def _boot() -> bytes:
    """Return what names this boot; nothing where there is no /proc."""
    try:
        return _BOOT_ID.read_bytes()
    except OSError:
        return b""


def _read_boot(directory_fd: int) -> bytes:
    try:
        fd = os.open(BOOT, _READ_BOOT, dir_fd=directory_fd)
    except OSError:
        return b""
    try:
        return os.read(fd, _BOOT_ID_BYTES)
    finally:
        os.close(fd)


def whole(directory_fd: int, place: Path, info: PathInfo) -> bool:
    """Say whether a tree is what its path's NAR hash promises, with the metadata that every store path has.

    Args:
        directory_fd: where it lies, under the path's base name.
        place: where that is.
        info: of the path.
    """
    digest = hashlib.sha256()
    try:
        size = narwriter.dump(place, digest.update)
    except CalveError:
        return False
    return (
        size == info.nar_size
        and digest.digest() == info.nar_hash.digest
        and canonical(directory_fd, info.path.basename)
    )
