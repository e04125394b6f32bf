"""Store paths on their way in: unpacked out of sight on the store's file system, then renamed into place.

A run has a directory of its own, `<store>/.calve-<random>`, and holds the lock on the file `lock` in it while it
lives: that tells what an interrupted run left from what another is doing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from calve.errors import CalveError
from calve.nix.nar import Event
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath
from calve.nix.tree import remove_tree
from calve.nix.unpack import Unpacked, storage_error, unpack

__all__ = ["Staging", "sync"]

_PREFIX = ".calve-"
_LOCK = "lock"
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


def sync(fd: int) -> None:
    """Flush the file system that an open file is on: by syncfs, or where there is no ctypes all of them.

    Raises:
        OSError: something could not be written.
    """
    try:
        import ctypes

        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except (ImportError, AttributeError):
        os.sync()
        return
    if syncfs(fd):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Staging:
    """A run's staging directory in a store; use it as a context manager, or `close` it.

    Args:
        store_dir: the store, which must exist.
        random: gives random bytes.

    Raises:
        SpaceError, CalveError: the store cannot be written to.
    """

    def __init__(self, store_dir: Path, random: Callable[[int], bytes] = os.urandom) -> None:
        self.store_dir = store_dir
        self._random = random
        try:
            self._store_fd = os.open(store_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error(error, store_dir) from error
        try:
            self.name, self._fd, self._lock_fd = self._create()
        except OSError as error:
            os.close(self._store_fd)
            raise storage_error(error, store_dir) from error
        self._closed = False

    def _create(self) -> tuple[str, int, int]:
        """Make the directory and lock it; again where somebody's `clean` came between the two."""
        while True:
            name = _PREFIX + self._random(8).hex()
            try:
                os.mkdir(name, 0o700, dir_fd=self._store_fd)
                fd = os.open(name, _OPEN_DIRECTORY, dir_fd=self._store_fd)
            except (FileExistsError, FileNotFoundError):
                continue
            lock_fd = _lock(fd)
            if lock_fd is not None and _same(fd, self._store_fd, name):
                return name, fd, lock_fd
            os.close(fd)
            if lock_fd is not None:
                os.close(lock_fd)

    def stage(self, info: PathInfo, events: Iterable[Event]) -> Unpacked:
        """Unpack a path's tree here; what fails is removed, and can be staged again.

        Threads may stage different paths at the same time.

        Raises:
            DamagedError, SpaceError, CalveError: those of the events and of `unpack`.
        """
        name = info.path.basename
        try:
            return unpack(events, self._fd, name)
        except BaseException:
            self.discard(info.path)
            raise

    def discard(self, path: StorePath) -> None:
        """Remove a staged path; nothing happens where it was not staged."""
        try:
            remove_tree(self._fd, path.basename)
        except OSError as error:
            raise storage_error(error, path) from error

    def staged(self, path: StorePath) -> bool:
        """Say whether a path was staged and not yet published."""
        try:
            os.lstat(path.basename, dir_fd=self._fd)
        except FileNotFoundError:
            return False
        return True

    def publish(self, path: StorePath) -> None:
        """Move a staged path to its place in the store, over whatever is there.

        The caller knows that what is there is not valid: what an interrupted run left.

        Raises:
            CalveError: it was not staged, or the store cannot be written to.
        """
        if not self.staged(path):
            raise CalveError("published without being staged", place=path)
        name = path.basename
        try:
            remove_tree(self._store_fd, name)
            try:
                os.rename(name, name, src_dir_fd=self._fd, dst_dir_fd=self._store_fd)
            except PermissionError:
                self._rename_writable(name)
        except OSError as error:
            raise storage_error(error, path) from error

    def _rename_writable(self, name: str) -> None:
        """Rename a directory as a normal user, who must be able to write to it: its `..` changes."""
        fd = os.open(name, _OPEN_DIRECTORY, dir_fd=self._fd)
        try:
            os.fchmod(fd, 0o755)
            os.rename(name, name, src_dir_fd=self._fd, dst_dir_fd=self._store_fd)
            os.fchmod(fd, 0o555)
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Write everything on the store's file system to its disk."""
        try:
            sync(self._store_fd)
        except OSError as error:
            raise storage_error(error, self.store_dir) from error

    def clean(self) -> int:
        """Remove what interrupted runs left, and nothing of runs that live; return how many they were."""
        try:
            with os.scandir(self._store_fd) as entries:
                names = [entry.name for entry in entries if entry.name.startswith(_PREFIX)]
            return sum(self._clean(name) for name in names if name != self.name)
        except OSError as error:
            raise storage_error(error, self.store_dir) from error

    def _clean(self, name: str) -> bool:
        try:
            fd = os.open(name, _OPEN_DIRECTORY, dir_fd=self._store_fd)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False  # gone since, not ours, or another user's
        try:
            lock_fd = _lock(fd)
            if lock_fd is None:
                return False
            try:
                remove_tree(self._store_fd, name)
            finally:
                os.close(lock_fd)
        finally:
            os.close(fd)
        return True

    def close(self) -> None:
        """Remove the directory with all that was staged and not published; idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            remove_tree(self._store_fd, self.name)
        except OSError as error:
            raise storage_error(error, self.store_dir) from error
        finally:
            os.close(self._lock_fd)
            os.close(self._fd)
            os.close(self._store_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock(directory_fd: int) -> int | None:
    """Take a run's lock; None where its owner lives, or the directory is gone."""
    try:
        fd = os.open(_LOCK, _OPEN_LOCK, 0o600, dir_fd=directory_fd)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _same(fd: int, parent_fd: int, name: str) -> bool:
    """Say whether an open directory still has its name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(name, dir_fd=parent_fd))
    except FileNotFoundError:
        return False
