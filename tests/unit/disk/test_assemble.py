"""Disks put together: the bytes of their parts, each block known, and with a parent no more work than the change is."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import uuid

import pytest

from calve.disk import assemble
from calve.disk import disk as room
from calve.disk.arch import X86_64
from calve.disk.assemble import Part
from calve.disk.disk import BLOCK_BYTES, ZERO_BLOCK
from calve.disk.gpt import Kind
from calve.errors import CalveError, UsageError
from calve.process import which
from calve.tasks import Cancel

MIB = 1 << 20
SEED = uuid.UUID(int=11)
ESP_AT, ROOT_AT = 2, 2 + 128  # blocks


@pytest.fixture(name="esp")
def _esp(tmp_path):
    path = tmp_path / "esp"
    path.write_bytes(os.urandom(3 * BLOCK_BYTES))
    return path


@pytest.fixture(name="root")
def _root(tmp_path):
    """Six blocks: the second one zeros, the last one in part."""
    path = tmp_path / "root"
    block = os.urandom(BLOCK_BYTES)
    path.write_bytes(block + bytes(BLOCK_BYTES) + os.urandom(3 * BLOCK_BYTES) + b"end")
    return path


def parts(esp, root, **more):
    return [
        Part("esp", Kind.ESP, esp, room_bytes=64 * MIB),
        Part("root", Kind.ROOT, root, fill=True, **more),
    ]


def build(out, esp, root, parent=None, **more):
    return assemble.build(parts(esp, root, **more), out, arch=X86_64, seed=SEED, parent=parent)


def alter(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(os.urandom(16))


def overlay(path, whole, numbers):
    """Make a file of the same size that has only some blocks; every other one is wrong in it."""
    data = whole.read_bytes()
    with path.open("xb") as file:
        for at in range(0, len(data), BLOCK_BYTES):
            block = data[at : at + BLOCK_BYTES]
            file.write(block if at // BLOCK_BYTES in numbers else b"\xee" * len(block))
    return path


def indices(disk):
    return [block.index for block in disk.blocks]


def pread(path, index, count=1):
    with path.open("rb") as file:
        file.seek(index * BLOCK_BYTES)
        return file.read(count * BLOCK_BYTES)


def allocated(path):
    """Return which blocks of a file have data; the rest are holes."""
    found = set()
    at, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole to the end
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            found |= set(range(at // BLOCK_BYTES, -(-end // BLOCK_BYTES)))
            at = end
    return found


def test_a_whole_disk(tmp_path, esp, root):
    out = tmp_path / "disk.raw"
    disk = build(out, esp, root)
    assert disk.size_bytes == out.stat().st_size == 1 << 30
    assert pread(out, ESP_AT, 3) == esp.read_bytes()
    assert pread(out, ROOT_AT, 6) == root.read_bytes().ljust(6 * BLOCK_BYTES, b"\0")
    # All that has content is listed, in order, and nothing else.
    assert indices(disk) == [0, 1, *range(2, 5), *range(ROOT_AT, ROOT_AT + 6), 2047]
    for block in disk.blocks:
        content = pread(out, block.index)
        assert hashlib.sha256(content).hexdigest() == block.sha256
        assert block.zero == (not any(content))
    zeros = {block.index for block in disk.blocks if block.zero}
    assert zeros == {1, ROOT_AT + 1}
    assert allocated(out) == set(indices(disk)) - zeros
    assert (disk.parent, disk.changed, disk.arch) == (None, None, X86_64)
    assert [(one.name, one.start_bytes, one.content_bytes) for one in disk.partitions] == [
        ("esp", MIB, 3 * BLOCK_BYTES),
        ("root", 65 * MIB, 5 * BLOCK_BYTES + 3),
    ]
    assert room.read(out) == disk


def test_sfdisk_verifies_it(tmp_path, esp, root):
    build(tmp_path / "disk.raw", esp, root)
    sfdisk = which("sfdisk", package="fdisk")
    argv = [sfdisk, "--verify", tmp_path / "disk.raw"]
    assert "No errors" in subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_the_same_parts_make_the_same_disk(tmp_path, esp, root):
    one, two = (build(tmp_path / f"{name}.raw", esp, root) for name in ("one", "two"))
    assert (one, one.digest) == (two, two.digest)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_with_a_parent_only_what_differs_is_written(tmp_path, esp, root):
    before = build(tmp_path / "before.raw", esp, root)
    alter(esp, BLOCK_BYTES + 7)
    alter(root, 2 * BLOCK_BYTES)
    with root.open("r+b") as file:
        file.write(bytes(BLOCK_BYTES))  # a block that becomes zero differs, too
    after = build(tmp_path / "after.raw", esp, root, before)
    assert after.changed == (ESP_AT + 1, ROOT_AT, ROOT_AT + 2)
    assert after.parent == before.digest
    assert after.blocks[5].sha256 == ZERO_BLOCK
    assert allocated(tmp_path / "after.raw") == {ESP_AT + 1, ROOT_AT + 2}
    whole = build(tmp_path / "whole.raw", esp, root)
    assert (after.blocks, after.digest) == (whole.blocks, whole.digest)
    for block in whole.blocks:
        source = "after.raw" if block.index in after.changed else "before.raw"
        assert pread(tmp_path / source, block.index) == pread(tmp_path / "whole.raw", block.index)


def test_nothing_but_dirty_blocks_is_read(tmp_path, esp, root):
    before = build(tmp_path / "before.raw", esp, root)
    alter(root, 4 * BLOCK_BYTES)
    only = overlay(tmp_path / "overlay", root, [1, 4])
    # Block 1 is dirty and as it was; block 99 is none.
    after = build(tmp_path / "after.raw", esp, only, before, dirty=[4, 1, 99])
    assert after.changed == (ROOT_AT + 4,)
    assert after.digest == build(tmp_path / "whole.raw", esp, root).digest


def test_a_partition_that_grew_and_one_that_shrank(tmp_path, esp, root):
    before = build(tmp_path / "before.raw", esp, root)
    with root.open("ab") as file:
        file.write(os.urandom(BLOCK_BYTES))
    os.truncate(esp, BLOCK_BYTES)
    only = overlay(tmp_path / "overlay", root, [5, 6])
    after = build(tmp_path / "after.raw", esp, only, before, dirty={5, 6})
    assert after.changed == (ROOT_AT + 5, ROOT_AT + 6)
    assert indices(after) == [0, 1, 2, *range(ROOT_AT, ROOT_AT + 7), 2047]


@pytest.mark.parametrize("case", ["no parent", "not there before", "moved", "another", "new block"])
def test_blocks_that_the_parent_does_not_have(tmp_path, esp, root, case):
    parent = None
    if case != "no parent":
        long = tmp_path / "long"
        long.write_bytes(os.urandom(9 * BLOCK_BYTES))
        # Where the parent has blocks at these places of the disk, they are not this partition's.
        first = [Part("esp", Kind.ESP, esp, room_bytes=(63 if case == "moved" else 64) * MIB)]
        if case in {"moved", "another"}:
            first.append(Part("data" if case == "another" else "root", Kind.ROOT, long))
        elif case == "new block":
            first.append(Part("root", Kind.ROOT, root))
        parent = assemble.build(first, tmp_path / "before.raw", arch=X86_64, seed=SEED)
    if case == "new block":
        with root.open("ab") as file:
            file.write(bytes(BLOCK_BYTES))
    with pytest.raises(UsageError, match=r"does not have block \d of the partition root") as caught:
        build(tmp_path / "after.raw", esp, root, parent, dirty=[0])
    assert caught.value.place == str(root)
    assert "without a parent" in caught.value.hint
    assert not (tmp_path / "after.raw").exists()
    assert not (tmp_path / "after.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_all_blocks_dirty_need_no_parent(tmp_path, esp, root):
    disk = build(tmp_path / "one.raw", esp, root, dirty=range(6))
    assert disk == build(tmp_path / "two.raw", esp, root)


def test_a_disk_never_becomes_smaller_than_its_parent(tmp_path, esp, root):
    before = assemble.build(
        [Part("esp", Kind.ESP, esp), Part("root", Kind.ROOT, root, room_bytes=1 << 30)],
        tmp_path / "before.raw",
        arch=X86_64,
        seed=SEED,
    )
    after = build(tmp_path / "after.raw", esp, root, before)
    assert before.size_bytes == after.size_bytes == 2 << 30
    assert indices(after)[-1] == 4095


def test_what_cannot_be_built(tmp_path, esp, root, monkeypatch):
    out = tmp_path / "disk.raw"
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        build(out, esp, root)
    assert out.read_text() == "precious"
    with pytest.raises(UsageError, match="json"):
        build(tmp_path / "disk.json", esp, root)
    with pytest.raises(UsageError, match="No such file"):
        build(tmp_path / "new.raw", esp, tmp_path / "gone")
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="empty"):
        build(tmp_path / "new.raw", esp, tmp_path / "empty")
    monkeypatch.setattr(assemble, "MAX_BLOCKS", 11)
    with pytest.raises(UsageError, match="content"):
        build(tmp_path / "new.raw", esp, root)
    assert not (tmp_path / "new.raw").exists()


def test_a_part_that_becomes_shorter(tmp_path, esp, root, monkeypatch):
    real = assemble.os.pread

    def pread(fd, size, offset):
        if os.readlink(f"/proc/self/fd/{fd}") == str(root):
            os.truncate(root, BLOCK_BYTES)
        return real(fd, size, offset)

    monkeypatch.setattr(assemble.os, "pread", pread)
    with pytest.raises(CalveError, match="shorter") as caught:
        build(tmp_path / "disk.raw", esp, root)
    assert caught.value.place == str(root)
    assert not (tmp_path / "disk.raw").exists()


def test_it_can_be_cancelled(tmp_path, esp, root):
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CalveError, match="interrupted"):
        assemble.build(
            parts(esp, root), tmp_path / "disk.raw", arch=X86_64, seed=SEED, cancel=cancel
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["esp", "root"]


def test_its_description_is_json_beside_it(tmp_path, esp, root):
    build(tmp_path / "web.raw", esp, root)
    body = json.loads((tmp_path / "web.json").read_bytes())
    assert [run["first"] for run in body["blocks"]] == [0, ROOT_AT, 2047]
