"""Pre-flight: what fits, and each way of not fitting."""

from __future__ import annotations

import os

import pytest

from calve.boot.preflight import MemoryShortError, Room, check, measure
from calve.errors import SpaceError

MB = 1_000_000
ROOM = Room(disk_bytes=120 * MB, inodes=1000, memory_bytes=300 * MB)


def fits(room=ROOM, *, nar_bytes=100 * MB, paths=100, budget_bytes=48 * MB):
    check(room, nar_bytes=nar_bytes, paths=paths, budget_bytes=budget_bytes)


def test_what_fits():
    fits()
    fits(nar_bytes=0, paths=0)
    # 1.1 of the NARs and a block for every path.
    fits(Room(110 * MB + 100 * 4096, 100, 48 * MB))


def test_too_little_disk():
    with pytest.raises(SpaceError, match=r"needs 110 MB of disk, 110 MB are free") as caught:
        fits(Room(110 * MB + 100 * 4096 - 1, 1000, 300 * MB))
    assert not isinstance(caught.value, MemoryShortError)
    assert caught.value.hint


def test_too_few_inodes():
    with pytest.raises(SpaceError, match="100 paths need more inodes than the 99"):
        fits(Room(120 * MB, 99, 300 * MB))


def test_too_little_memory():
    with pytest.raises(MemoryShortError, match="48 MB of memory, 47 MB are available"):
        fits(Room(120 * MB, 1000, 47 * MB))


def test_measure(tmp_path, monkeypatch):
    room = measure(tmp_path, 7)
    assert room.memory_bytes == 7
    assert room.disk_bytes > 0
    assert room.inodes > 0
    real = os.statvfs(tmp_path)

    class Btrfs:
        f_bavail, f_frsize, f_files, f_favail = real.f_bavail, real.f_frsize, 0, 0

    monkeypatch.setattr(os, "statvfs", lambda _path: Btrfs)
    assert measure(tmp_path, 7).inodes > 1 << 60
