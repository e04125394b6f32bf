"""A directory that several demos share, and that killed ones leave things in: turns, runs, sealed files.

Whoever makes a part holds the directory's lock; so what looks half-made to the holder was left by one that was killed.
A run has a folder of its own, `run-<random>`, and holds the lock on the file `lock` in it while it lives. Locks are
flock's: the kernel lets go of them however their owner ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from calve.errors import CalveError, CancelledError
from calve.nix.tree import remove_tree
from calve.progress import Note, Progress
from calve.tasks import Cancel

__all__ = ["Turn", "remove", "run_folder", "seal", "sealed", "whole"]

_RUN: Final = "run-"
_LOCK: Final = "lock"
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_POLL_S: Final = 0.1


class Turn:
    """Lets one at a time make things in a directory, among threads and processes; a holder may enter again.

    Args:
        directory: it exists; the lock is its file `lock`.
        progress: told where one has to wait.
        cancel: ends the wait.
    """

    def __init__(self, directory: Path, progress: Progress, cancel: Cancel) -> None:
        self._path = directory / _LOCK
        self._progress = progress
        self._cancel = cancel
        self._mine = threading.RLock()
        self._depth = 0
        self._fd = -1

    def __enter__(self) -> Self:
        self._mine.acquire()
        try:
            if self._depth == 0:
                self._fd = self._lock()
            self._depth += 1
        except BaseException:
            self._mine.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            os.close(self._fd)
        self._mine.release()

    def _lock(self) -> int:
        fd = os.open(self._path, _FLAGS, 0o600)
        told = False
        try:
            while not _try(fd):
                if not told:
                    self._progress(Note("waiting for another calve demo, which makes its parts"))
                    told = True
                self._cancel.wait(_POLL_S)
        except CancelledError:
            os.close(fd)
            raise
        return fd


@contextlib.contextmanager
def run_folder(directory: Path, turn: Turn) -> Iterator[Path]:
    """Make the folder of one run, and remove it in the end; remove those of runs that were killed, too.

    Args:
        directory: where runs are.
        turn: of that directory.
    """
    with turn:
        for old in directory.glob(f"{_RUN}*"):
            _sweep(old)
        folder = Path(tempfile.mkdtemp(prefix=_RUN, dir=directory))
        fd = os.open(folder / _LOCK, _FLAGS, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield folder
    finally:
        remove(folder)
        os.close(fd)


def _sweep(old: Path) -> None:
    """Remove a run's folder unless its owner lives; another user's is left."""
    try:
        fd = os.open(old / _LOCK, _FLAGS, 0o600)
    except OSError:
        return
    try:
        if _try(fd):
            remove(old)
    finally:
        os.close(fd)


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove(path: Path) -> None:
    """Remove a file or a tree, read-only folders too; what is another user's, or gone, is left."""
    with contextlib.suppress(OSError):
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_tree(fd, path.name)
        finally:
            os.close(fd)


def seal(path: Path) -> None:
    """Write a file's sha256 beside it."""
    place = _seal(path)
    temporary = place.with_name(f".{place.name}.new")
    temporary.write_text(_sha256(path) + "\n", encoding="ascii")
    temporary.replace(place)


def sealed(path: Path) -> bool:
    """Say whether a file is there, and is what was sealed."""
    try:
        return _seal(path).read_bytes().strip() == _sha256(path).encode()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CalveError(f"cannot read: {error.strerror}", place=path) from error


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole(final: Path) -> Iterator[Path]:
    """Give a directory beside `final` that becomes it: a directory of that name is complete. It is removed on an error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield work
        work.chmod(0o755)
        work.replace(final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
