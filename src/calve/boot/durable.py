"""Small files and links of the root disk, changed so that a power cut leaves the old one or the new one, whole.

What a name leads to is on the disk before the name is; whether the name itself is, `sync` says, or a syncfs after it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["replace", "symlink", "sync"]


def replace(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file in place of the one that is there."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def symlink(target: str, link: Path) -> None:
    """Make a link in place of the one that is there."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def sync(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
