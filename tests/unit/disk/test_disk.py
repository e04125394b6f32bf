"""The description of a disk: what was written is read, and what cannot be is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid

import pytest

from calve.disk import disk as room
from calve.disk.arch import AARCH64
from calve.disk.disk import BLOCK_BYTES, ZERO_BLOCK, Block, Content, Disk
from calve.errors import DamagedError, NotFoundError, UsageError

ONE, TWO = ("1" * 64, "2" * 64)
DISK = Disk(
    AARCH64,
    1 << 30,
    (Content("root", uuid.UUID(int=1), 2 * BLOCK_BYTES, 5 * BLOCK_BYTES, BLOCK_BYTES + 1),),
    (Block(0, ONE), Block(1, ZERO_BLOCK), Block(2, TWO), Block(3, ONE), Block(2047, TWO)),
)
OVERLAY = dataclasses.replace(DISK, parent="a" * 64, changed=(2, 2047))


@pytest.mark.parametrize("disk", [DISK, OVERLAY], ids=["whole", "overlay"])
def test_what_was_written_is_read(disk):
    data = disk.dump()
    assert Disk.parse(data, "x") == disk
    assert data.isascii()
    body = json.loads(data)
    assert (body["version"], body["blockSize"], body["arch"]) == (1, 524288, "aarch64")
    assert [run["first"] for run in body["blocks"]] == [0, 2047]


def test_fields_that_are_not_known_are_ignored():
    body = json.loads(DISK.dump()) | {"later": [1]}
    assert Disk.parse(json.dumps(body).encode(), "x") == DISK


def test_zero_is_a_block_like_others():
    assert hashlib.sha256(bytes(BLOCK_BYTES)).hexdigest() == ZERO_BLOCK
    assert [block.index for block in DISK.blocks if block.zero] == [1]


def test_what_the_file_has():
    assert DISK.present == DISK.blocks
    assert [block.index for block in OVERLAY.present] == [2, 2047]


def test_the_digest_is_of_what_is_where():
    assert OVERLAY.digest == DISK.digest
    moved = (*DISK.blocks[:-1], Block(2046, TWO))
    for other in (
        dataclasses.replace(DISK, size_bytes=2 << 30),
        dataclasses.replace(DISK, blocks=moved),
        dataclasses.replace(DISK, blocks=DISK.blocks[:-1]),
    ):
        assert other.digest != DISK.digest


def changed(**fields):
    return json.dumps(json.loads(OVERLAY.dump()) | fields).encode()


def listed(*runs):
    """Return the document of a whole disk with other blocks."""
    body = json.loads(DISK.dump())
    return json.dumps(body | {"blocks": [{"first": n, "sha256": one} for n, one in runs]}).encode()


PARTITION = json.loads(DISK.dump())["partitions"][0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b"\xff",
        changed(size=0),
        changed(size=(1 << 30) + 512),
        changed(size="1"),
        changed(size=True),
        changed(size=1e9),
        changed(size=1 << 60),
        changed(blockSize=512),
        changed(arch="mips"),
        changed(arch=None),
        changed(blocks=None),
        changed(blocks=[1]),
        changed(blocks=[{"first": 0}]),
        listed((-1, [ONE])),
        listed((2048, [ONE])),
        listed((2047, [ONE, ONE])),
        listed((5, [ONE]), (5, [ONE])),
        listed((5, [ONE]), (2, [ONE])),
        listed((False, [ONE])),
        listed((0, ["1" * 63])),
        listed((0, ["A" * 64])),
        listed((0, [1])),
        changed(partitions={}),
        changed(partitions=[PARTITION] * 129),
        changed(partitions=[PARTITION | {"start": 5}]),
        changed(partitions=[PARTITION | {"size": 1 << 30}]),
        changed(partitions=[PARTITION | {"content": 6 * BLOCK_BYTES}]),
        changed(partitions=[PARTITION | {"type": "x"}]),
        changed(partitions=[PARTITION | {"name": 7}]),
        changed(parent=None),
        changed(changed=None),
        changed(parent="x"),
        changed(changed=[4]),
        changed(changed=[2047, 2]),
        changed(changed=[2, 2]),
        changed(changed=[[]]),
        changed(changed=[True]),
        b" " * (16 << 20) + DISK.dump(),
    ],
)
def test_damage(data):
    with pytest.raises(DamagedError) as caught:
        Disk.parse(data, "disk.json")
    assert caught.value.place == "disk.json"


def test_any_order_of_runs_that_is_one():
    assert [one.index for one in Disk.parse(listed((5, [ONE]), (6, [TWO])), "x").blocks] == [5, 6]


def test_a_missing_field():
    for name in json.loads(DISK.dump()).keys() - {"parent", "changed"}:
        body = json.loads(DISK.dump())
        del body[name]
        with pytest.raises(DamagedError):
            Disk.parse(json.dumps(body).encode(), "x")


def test_another_version():
    with pytest.raises(UsageError, match="version 2") as caught:
        Disk.parse(changed(version=2), "disk.json")
    assert caught.value.place == "disk.json"
    assert "another Calve" in caught.value.hint


def test_more_blocks_than_a_disk_may_have(monkeypatch):
    monkeypatch.setattr(room, "MAX_BLOCKS", 4)
    with pytest.raises(UsageError, match="5 blocks"):
        DISK.dump()
    monkeypatch.setattr(room, "MAX_BLOCKS", 5)
    data = DISK.dump()
    monkeypatch.setattr(room, "MAX_BLOCKS", 4)
    with pytest.raises(DamagedError, match="more blocks"):
        Disk.parse(data, "x")


def test_beside_the_disk(tmp_path):
    with pytest.raises(NotFoundError) as caught:
        room.read(tmp_path / "web.raw")
    assert caught.value.place == str(tmp_path / "web.json")
    (tmp_path / "web.json").write_bytes(DISK.dump())
    assert room.read(tmp_path / "web.raw") == DISK
