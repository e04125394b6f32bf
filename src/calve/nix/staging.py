"""Store paths on their way in: unpacked out of sight on the store's file system, then renamed into place.

A run has a directory of its own, `<store>/.calve-<random>`, and holds the lock on the file `lock` in it while it
lives: that tells what an interrupted run left from what another is doing. A tree is unpacked there under its base
name and, once it is verified, renamed to `verified.<digest of the path>.<NAR hash>`: what bears such a name the next
run adopts. The file `boot` says in which boot that was: data that was not synced outlives a `kill -9`, but no power
cut, so that trees of another boot are hashed again first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from calve.errors import (
    CalveError,
    CancelledError,
    ConflictError,
    DeadlineError,
    TransientError,
)
from calve.nix.hashes import encode32
from calve.nix.leftover import BOOT, LOCK, Leftover, lock, whole, write_boot
from calve.nix.nar import Event
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath
from calve.nix.tree import OPEN_DIRECTORY, remove_tree
from calve.nix.unpack import Unpacked, storage_error, unpack

__all__ = ["Staging", "passes", "sync"]

_PREFIX = ".calve-"


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
        self._names: dict[StorePath, str] = {}  # of what is staged here
        self._in_place: dict[StorePath, tuple[int, int]] = {}  # staged where it belongs
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
                fd = os.open(name, OPEN_DIRECTORY, dir_fd=self._store_fd)
            except (FileExistsError, FileNotFoundError):
                continue
            lock_fd = None
            try:
                lock_fd = lock(fd)
                if lock_fd is not None and _same(fd, self._store_fd, name):
                    write_boot(fd)
                    return name, fd, lock_fd
            except OSError:  # no inode left for the files in it
                remove_tree(self._store_fd, name)
                _close(fd, lock_fd)
                raise
            _close(fd, lock_fd)

    def stage(self, info: PathInfo, events: Iterable[Event]) -> Unpacked:
        """Unpack a path's tree here; what fails is removed, and can be staged again.

        Threads may stage different paths at the same time. Where the events end without an error, the tree is taken
        for what the path's NAR hash promises: a later run may adopt it.

        Raises:
            DamagedError, SpaceError, CalveError: those of the events and of `unpack`.
        """
        name = info.path.basename
        try:
            unpacked = unpack(events, self._fd, name)
            self._verified(info)
        except BaseException:
            self.discard(info.path)
            raise
        return unpacked

    def _verified(self, info: PathInfo) -> None:
        """Give a tree the name that says what it is."""
        name = _verified_name(info)
        try:
            os.rename(info.path.basename, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError as error:
            raise storage_error(error, info.path) from error
        self._names[info.path] = name

    def discard(self, path: StorePath) -> None:
        """Remove a staged path; nothing happens where it was not staged."""
        self._in_place.pop(path, None)
        try:
            remove_tree(self._fd, self._names.pop(path, path.basename))
        except OSError as error:
            raise storage_error(error, path) from error

    def staged(self, path: StorePath) -> bool:
        """Say whether a path was staged or adopted, and not yet published."""
        return path in self._names or path in self._in_place

    def publish(self, path: StorePath) -> None:
        """Move a staged path to its place in the store, over whatever is there.

        The caller knows that what is there is not valid: what an interrupted run left.

        Raises:
            CalveError: it was not staged, or the store cannot be written to.
            ConflictError: it was found in its place, and somebody else has replaced it.
        """
        if not self.staged(path):
            raise CalveError("published without being staged", place=path)
        try:
            if path in self._in_place:
                if _identity(self._store_fd, path.basename) != self._in_place.pop(path):
                    raise ConflictError("somebody else writes this path", place=path)
                return
            remove_tree(self._store_fd, path.basename)
            _move(self._fd, self._names[path], self._store_fd, path.basename)
        except OSError as error:
            raise storage_error(error, path) from error
        del self._names[path]

    def sync(self) -> None:
        """Write everything on the store's file system to its disk."""
        try:
            sync(self._store_fd)
        except OSError as error:
            raise storage_error(error, self.store_dir) from error

    # What interrupted runs left

    def adopt(self, infos: Iterable[PathInfo], *, rehash: bool = False) -> set[StorePath]:
        """Stage what is there already of invalid paths, and remove what else interrupted runs left.

        What they verified in this boot is taken as it is; what they verified in another, or published and did not
        register, only if its hash says that it is whole. What lies in its place stays there until `publish`.

        Args:
            infos: of the paths.
            rehash: trust no run, whatever the boot.

        Returns:
            Those of the paths that are staged now.

        Raises:
            SpaceError, CalveError: the store cannot be written to.
        """
        found = set()
        try:
            with contextlib.ExitStack() as owner:
                left = [owner.enter_context(run) for run in self._leftovers()]
                for info in infos:
                    taken = any(self._take(run, info, rehash=rehash) for run in left)
                    if taken or self._recognise(info):
                        found.add(info.path)
        except OSError as error:
            raise storage_error(error, self.store_dir) from error
        return found

    def _take(self, run: Leftover, info: PathInfo, *, rehash: bool) -> bool:
        """Adopt a path from an interrupted run."""
        source, name = _verified_name(info), info.path.basename
        if not run.ours or _identity(run.fd, source) is None:
            return False
        _move(run.fd, source, self._fd, name)
        trusted = run.same_boot and not rehash
        if trusted or whole(self._fd, self.store_dir / self.name / name, info):
            self._verified(info)
            return True
        remove_tree(self._fd, name)
        return False

    def _recognise(self, info: PathInfo) -> bool:
        """Adopt a path that is in its place already, but not valid: a run ended between the two."""
        name = info.path.basename
        identity = _identity(self._store_fd, name)
        if identity is None or not whole(self._store_fd, self.store_dir / name, info):
            return False
        self._in_place[info.path] = identity
        return True

    def clean(self) -> int:
        """Remove what interrupted runs left, and nothing of runs that live; return how many they were."""
        try:
            with contextlib.ExitStack() as owner:
                return len([owner.enter_context(run) for run in self._leftovers()])
        except OSError as error:
            raise storage_error(error, self.store_dir) from error

    def _leftovers(self) -> Iterator[Leftover]:
        """Find what interrupted runs left; each is locked."""
        with os.scandir(self._store_fd) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(_PREFIX)]
        for name in names:
            left = None if name == self.name else Leftover.find(self._store_fd, name)
            if left is not None:
                yield left

    def close(self, *, keep: bool = False) -> None:
        """Remove the directory with all that was staged and not published; idempotent.

        Args:
            keep: leave what is verified to the next run.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if keep and self._names:
                self._remove_unverified()
            else:
                remove_tree(self._store_fd, self.name)
        except OSError as error:
            raise storage_error(error, self.store_dir) from error
        finally:
            os.close(self._lock_fd)
            os.close(self._fd)
            os.close(self._store_fd)

    def _remove_unverified(self) -> None:
        kept = {LOCK, BOOT, *self._names.values()}
        for name in os.listdir(self._fd):  # noqa: PTH208  (Path knows no descriptors)
            if name not in kept:
                remove_tree(self._fd, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(keep=passes(error))


def _close(*descriptors: int | None) -> None:
    for fd in descriptors:
        if fd is not None:
            os.close(fd)


def _verified_name(info: PathInfo) -> str:
    """Return the name of a verified tree; no store path has one like it."""
    return f"verified.{info.path.digest}.{encode32(info.nar_hash.digest)}"


def passes(error: BaseException | None) -> bool:
    """Say whether an error is one after which the same is likely to be done again: what is verified is kept for it."""
    return isinstance(error, CancelledError | TransientError | DeadlineError | KeyboardInterrupt)


def _identity(directory_fd: int, name: str) -> tuple[int, int] | None:
    """Return what tells a tree from another under its name; None where there is none."""
    try:
        status = os.lstat(name, dir_fd=directory_fd)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def _move(from_fd: int, old: str, to_fd: int, new: str) -> None:
    """Rename a tree from one directory to another."""
    try:
        os.rename(old, new, src_dir_fd=from_fd, dst_dir_fd=to_fd)
    except PermissionError:
        _move_writable(from_fd, old, to_fd, new)


def _move_writable(from_fd: int, old: str, to_fd: int, new: str) -> None:
    """Rename a directory as a normal user, who must be able to write to it: its `..` changes."""
    fd = os.open(old, OPEN_DIRECTORY, dir_fd=from_fd)
    try:
        os.fchmod(fd, 0o755)
        os.rename(old, new, src_dir_fd=from_fd, dst_dir_fd=to_fd)
        os.fchmod(fd, 0o555)
    finally:
        os.close(fd)


def _same(fd: int, parent_fd: int, name: str) -> bool:
    """Say whether an open directory still has its name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(name, dir_fd=parent_fd))
    except FileNotFoundError:
        return False
