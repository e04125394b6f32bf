"""A file that appears when it is whole: written under a temporary name beside its place, then renamed over it.

One run at a time writes it; what a killed one left, the next takes over. Nothing is synced: after a power cut it is to
be made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from calve.disk.scratch import storage
from calve.errors import ConflictError

__all__ = ["replacing"]

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def replacing(path: Path, size: int) -> Iterator[int]:
    """Give a file of so many zeros to write to; it becomes `path` when the block is left without an error.

    Raises:
        ConflictError: another run writes it.
        SpaceError, CalveError: it cannot be written, here or in the block.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        fd = _lock(temporary, path)
        try:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            yield fd
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise storage(error, path) from error


def _lock(temporary: Path, path: Path) -> int:
    """Open the temporary file and lock it; again where its owner renamed or removed it between the two."""
    while True:
        fd = os.open(temporary, _OPEN, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(temporary)):
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(fd)
            raise ConflictError("another run writes this image", place=path) from error
        os.close(fd)
