"""Sources: files, slices, and blocks that are fetched once and forgotten in time."""

from __future__ import annotations

import os
import random

import pytest

from calve.disk.inspect.source import BLOCK_BYTES, BlockSource, FileSource, Slice, chunks
from calve.errors import CalveError, DamagedError, NotFoundError, TransientError

DATA = random.Random(0).randbytes(3 * BLOCK_BYTES + 1000)


@pytest.fixture
def path(tmp_path):
    place = tmp_path / "file"
    place.write_bytes(DATA)
    return place


class Blocks:
    def __init__(self):
        self.fetched = []

    def __call__(self, index):
        self.fetched.append(index)
        return DATA[index * BLOCK_BYTES :][:BLOCK_BYTES]


RANGES = [
    (0, 0),
    (0, len(DATA)),
    (len(DATA), 0),
    (BLOCK_BYTES - 1, 2),
    (BLOCK_BYTES, BLOCK_BYTES),
    (len(DATA) - 7, 7),
    (5, 2 * BLOCK_BYTES),
]


@pytest.mark.parametrize(("at", "count"), RANGES)
def test_what_is_read_is_what_is_there(path, at, count):
    with FileSource(path) as file:
        sources = [file, BlockSource(len(DATA), Blocks()), Slice(file, 0, len(DATA))]
        for source in sources:
            assert source.size == len(DATA)
            assert source.read(at, count) == DATA[at : at + count]
            assert b"".join(chunks(source, at, count)) == DATA[at : at + count]


@pytest.mark.parametrize(("at", "count"), [(0, len(DATA) + 1), (-1, 2), (1, -1), (len(DATA), 1)])
def test_what_is_outside_is_damage(path, at, count):
    with FileSource(path) as file:
        for source in (file, BlockSource(len(DATA), Blocks()), Slice(file, 0, len(DATA))):
            with pytest.raises(DamagedError, match="outside"):
                source.read(at, count)


def test_a_slice_ends_where_it_ends(path):
    with FileSource(path) as file:
        part = Slice(file, 100, 50)
        assert part.read(10, 40) == DATA[110:150]
        with pytest.raises(DamagedError):
            part.read(10, 41)


def test_chunks_are_small():
    source = BlockSource(len(DATA), Blocks())
    assert [len(chunk) for chunk in chunks(source, 1, 600_000)] == [262_144, 262_144, 75_712]


def test_a_block_is_fetched_once_while_it_is_kept():
    fetch = Blocks()
    source = BlockSource(len(DATA), fetch, kept=2)
    for at in (0, 10, BLOCK_BYTES, 20):
        source.read(at, 5)
    assert fetch.fetched == [0, 1]
    source.read(2 * BLOCK_BYTES, 1)  # block 1 was used longer ago than block 0
    source.read(0, 1)
    assert fetch.fetched == [0, 1, 2]
    source.read(BLOCK_BYTES, 1)
    assert fetch.fetched == [0, 1, 2, 1]
    assert len(source._blocks) == 2


def test_a_fetched_block_of_the_wrong_length_is_damage():
    source = BlockSource(len(DATA), lambda _: bytes(BLOCK_BYTES))
    assert source.read(0, 1) == b"\0"
    with pytest.raises(DamagedError, match="524288 bytes instead of 1000") as raised:
        source.read(len(DATA) - 1, 1)
    assert raised.value.place == "block 3"


def test_the_fetcher_s_errors_pass():
    def fail(index):
        raise TransientError("a stall")

    with pytest.raises(TransientError):
        BlockSource(BLOCK_BYTES, fail).read(0, 1)


def test_files_that_cannot_be_read(tmp_path, path):
    with pytest.raises(NotFoundError):
        FileSource(tmp_path / "gone")
    with pytest.raises(CalveError, match="cannot read"), FileSource(tmp_path) as file:
        file.read(0, 1)
    with FileSource(path) as file:
        os.truncate(path, 10)
        with pytest.raises(DamagedError, match="shorter"):
            file.read(0, 20)
        file.close()
    file.close()
