"""Removing trees that are read-only, by directory descriptors: nothing outside is touched."""

from __future__ import annotations

import os
import stat
from itertools import islice

__all__ = ["OPEN_DIRECTORY", "remove_tree"]

# Read at a time: a directory that a hostile NAR filled may have millions of entries.
_BATCH = 1024
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(parent_fd: int, name: str) -> None:
    """Remove an entry of a directory with all that is in it; nothing happens where it does not exist.

    Raises:
        OSError: it cannot be removed.
    """
    try:
        status = os.lstat(name, dir_fd=parent_fd)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=parent_fd)
        return
    _empty(parent_fd, name)
    os.rmdir(name, dir_fd=parent_fd)


def _empty(parent_fd: int, name: str) -> None:
    fd = os.open(name, OPEN_DIRECTORY, dir_fd=parent_fd)
    try:
        os.fchmod(fd, 0o700)
        while found := _some(fd):
            for child, is_directory in found:
                if is_directory:
                    _empty(fd, child)
                    os.rmdir(child, dir_fd=fd)
                else:
                    os.unlink(child, dir_fd=fd)
    finally:
        os.close(fd)


def _some(fd: int) -> list[tuple[str, bool]]:
    """Return the first entries of a directory, and whether each is a directory itself."""
    with os.scandir(fd) as entries:
        return [
            (entry.name, entry.is_dir(follow_symlinks=False)) for entry in islice(entries, _BATCH)
        ]
