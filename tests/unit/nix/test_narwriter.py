"""NARs written into buffers of the caller's: the same bytes as `dump` gives, in buffers of any size."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest

from calve.errors import ConflictError, NotFoundError
from calve.nix import narwriter


def dumped(path: Path) -> bytes:
    parts: list[bytes] = []
    assert narwriter.dump(path, parts.append) == sum(map(len, parts))
    return b"".join(parts)


class Buffers:
    """Gives buffers of some sizes in turn, and keeps what they held."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.turn = 0
        self.full: list[bytes] = []
        self.buffer = bytearray()

    def swap(self, filled: int) -> memoryview:
        assert filled == len(self.buffer)
        self.full.append(bytes(self.buffer))
        self.buffer = bytearray(self.sizes[self.turn % len(self.sizes)])
        self.turn += 1
        return memoryview(self.buffer)

    def dump(self, path: Path) -> bytes:
        size = narwriter.dump_into(path, self.swap)
        before = b"".join(self.full)
        left = size - len(before)
        assert 0 < left <= len(self.buffer)
        return before + self.buffer[:left]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "top"
    (top / "d/empty").mkdir(parents=True)
    (top / "link").symlink_to("d")
    for number, size in enumerate([0, 1, 8, 65535, 65536, 65537, 262144, 700_001]):
        (top / f"d/{number}").write_bytes(os.urandom(size))
    return top


@pytest.mark.parametrize("sizes", [(1,), (8,), (1000, 70_000, 3), (65536,), (1 << 20,), (4 << 20,)])
def test_buffers_of_any_size_hold_the_nar(tree: Path, sizes: tuple[int, ...]) -> None:
    if sizes == (1,):
        tree /= "d/4"
    assert Buffers(*sizes).dump(tree) == dumped(tree)


def test_a_nar_that_fills_its_last_buffer_asks_for_no_other(tree: Path) -> None:
    nar = dumped(tree)
    buffers = Buffers(len(nar))
    assert buffers.dump(tree) == nar
    assert buffers.turn == 1


def test_no_buffer_is_kept(tree: Path) -> None:
    """Not even by a cycle of references, for the collector to find: buffers are large."""

    class Buffer(bytearray):
        __slots__ = ("__weakref__",)

    made: list[weakref.ref[Buffer]] = []

    def swap(_filled: int) -> memoryview:
        assert sum(each() is not None for each in made) == 0
        buffer = Buffer(100_000)
        made.append(weakref.ref(buffer))
        return memoryview(buffer)

    gc.collect()
    gc.disable()
    try:
        narwriter.dump_into(tree, swap)
        assert len(made) > 5
        assert not any(each() for each in made)
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [0, 300_000, 2_000_000])
def test_a_file_that_changes_is_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1_000_000))
    turns = 0

    def swap(_filled: int) -> memoryview:
        nonlocal turns
        turns += 1
        if turns == 2:
            os.truncate(file, size)
        return memoryview(bytearray(100_000))

    with pytest.raises(ConflictError) as caught:
        narwriter.dump_into(file, swap)
    assert caught.value.place == str(file)


@pytest.mark.parametrize("size", [10, 1_000_000])
@pytest.mark.parametrize("turn", [1, 2])
def test_the_owners_errors_are_passed_on(tmp_path: Path, size: int, turn: int) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    turns = 0

    def swap(_filled: int) -> memoryview:
        nonlocal turns
        turns += 1
        if turns == turn:
            raise BrokenPipeError
        return memoryview(bytearray(50))

    with pytest.raises(BrokenPipeError):
        narwriter.dump_into(tmp_path, swap)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        narwriter.dump_into(tmp_path / "no", Buffers(100).swap)
