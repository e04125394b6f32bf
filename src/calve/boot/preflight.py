"""Pre-flight: refuse before the first byte what would fail half-way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from calve.errors import SpaceError

__all__ = ["MemoryShortError", "Room", "check", "measure"]

_MARGIN = (
    1.1  # file system overhead: the last block of each file, directories, the journal's turn-over
)
_BLOCK = 4096


class MemoryShortError(SpaceError):
    """Not the disk is too small, but the memory."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the machine has: bytes and inodes free on the root file system, available memory in bytes."""

    disk_bytes: int
    inodes: int
    memory_bytes: int


def measure(root: Path, memory_bytes: int) -> Room:
    """Look at the mounted root file system."""
    stat = os.statvfs(root)
    # Some file systems (btrfs) have no fixed number of inodes and say 0.
    inodes = stat.f_favail if stat.f_files else 1 << 62
    return Room(stat.f_bavail * stat.f_frsize, inodes, memory_bytes)


def check(room: Room, *, nar_bytes: int, paths: int, budget_bytes: int) -> None:
    """Raise SpaceError where the closure does not fit, MemoryShortError where the agent does not.

    Args:
        room: what there is.
        nar_bytes: sum of the NarSizes to fetch.
        paths: how many paths those are.
        budget_bytes: memory that the agent may use.
    """
    need = int(nar_bytes * _MARGIN) + paths * _BLOCK
    if need > room.disk_bytes:
        raise SpaceError(
            f"the closure needs {_mb(need)} of disk, {_mb(room.disk_bytes)} are free",
            hint="give the image a larger root volume",
        )
    if paths > room.inodes:
        raise SpaceError(f"{paths} paths need more inodes than the {room.inodes} that are free")
    if budget_bytes > room.memory_bytes:
        raise MemoryShortError(
            f"the agent needs {_mb(budget_bytes)} of memory, {_mb(room.memory_bytes)} are available"
        )


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
