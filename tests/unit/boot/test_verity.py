"""dm-verity in the initrd: what the kernel is told, and what is refused."""

from __future__ import annotations

import os
import uuid

import pytest

from calve.boot import verity
from calve.disk import verity as writer
from calve.errors import DamagedError

BLOCKS = 300


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "data").write_bytes(os.urandom(BLOCKS * 4096))
    return writer.write(tmp_path / "data", tmp_path / "tree", seed=uuid.UUID(int=1))


@pytest.fixture
def superblock(tree):
    return bytearray(tree.path.read_bytes()[:512])


def test_the_target_is_what_the_writer_wrote(tree, superblock):
    text = verity.table(superblock, tree.root_hash, "259:3", "259:2", BLOCKS * 4096)
    assert text == (
        f"1 259:3 259:2 4096 4096 {BLOCKS} 1 sha256 {tree.root_hash} {tree.salt} "
        "1 panic_on_corruption"
    )


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"x", "no tree"),
        (8, b"\2", "of a kind"),
        (12, b"\0", "of a kind"),
        (32, b"sha1\0\0", "of a kind"),
        (64, b"\0\2", "of a kind"),
        (68, b"\0\2", "of a kind"),
        (72, (BLOCKS + 1).to_bytes(8, "little"), "301 blocks, and there are 300"),
        (72, bytes(8), "0 blocks"),
        (80, b"\xff\xff", "of a kind"),
    ],
)
def test_superblocks_that_are_none(tree, superblock, at, data, message):
    superblock[at : at + len(data)] = data
    with pytest.raises(DamagedError, match=message):
        verity.table(superblock, tree.root_hash, "259:3", "259:2", BLOCKS * 4096)


@pytest.mark.parametrize("root_hash", ["", "a" * 63, "A" * 64, "a" * 63 + " "])
def test_root_hashes_that_are_none(superblock, root_hash):
    with pytest.raises(DamagedError, match="no SHA-256"):
        verity.table(superblock, root_hash, "259:3", "259:2", BLOCKS * 4096)


def test_a_superblock_that_is_cut(tree, superblock):
    with pytest.raises(DamagedError, match="no tree"):
        verity.table(superblock[:511], tree.root_hash, "259:3", "259:2", BLOCKS * 4096)


def machine(base, contents):
    """Make /sys and /dev of a disk with partitions."""
    disk = base / "sys/devices/nvme0n1"
    (disk / "queue").mkdir(parents=True)
    (base / "sys/class/block").mkdir(parents=True)
    (base / "dev").mkdir()
    for number, content in enumerate(contents, 1):
        name = f"nvme0n1p{number}"
        (disk / name).mkdir()
        (disk / name / "partition").write_text(f"{number}\n")
        (base / "sys/class/block" / name).symlink_to(disk / name)
        (base / "dev" / name).write_bytes(content)


def test_the_tree_is_the_partition_that_looks_like_one(tmp_path, superblock):
    machine(tmp_path, [bytes(4096), bytes(superblock), b"data"])
    assert verity.find_tree("nvme0n1p3", tmp_path) == "nvme0n1p2"


def test_a_disk_without_one(tmp_path):
    machine(tmp_path, [bytes(4096), b"data"])
    with pytest.raises(DamagedError, match="no partition of its disk"):
        verity.find_tree("nvme0n1p2", tmp_path)


def test_what_is_wrong_is_one_line(capsys):
    assert verity.main(["/dev/null", "a" * 64]) == 1
    assert capsys.readouterr().err.startswith("dm-verity: ")
