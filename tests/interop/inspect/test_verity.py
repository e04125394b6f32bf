"""dm-verity: trees that veritysetup made, and what a changed bit does."""

from __future__ import annotations

import random
import struct

import pytest

from calve.disk.inspect import verity

OPTIONS = [
    (4096 * 1000, []),
    (4096 * 1000, ["--salt=-"]),
    (4096 * 1000, ["--data-block-size=1024", "--hash-block-size=512"]),
    (4096 * 128, ["--salt=ff"]),
    (4096 * 129, ["--salt=ff"]),
    (4096 * 2, ["--salt=ff"]),
    (4096, ["--salt=ff"]),
    (512 * 7, ["--data-block-size=512"]),
]


def checks(findings):
    return [finding.check for finding in findings]


@pytest.fixture
def made(tools, tmp_path):
    def make(size, options):
        data = random.Random(4).randbytes(size)
        place = tmp_path / "data"
        place.write_bytes(data)
        made = tools.verity(place, *options)
        tree = made.image.read_bytes()
        return tools.memory(data), tools.memory(tree), made.root_hash

    return make


@pytest.mark.parametrize(("size", "options"), OPTIONS)
def test_what_veritysetup_made(made, findings, size, options):
    data, tree, root_hash = made(size, options)
    superblock = verity.verify(data, tree, root_hash, findings)
    assert not list(findings)
    assert superblock.data_blocks * superblock.data_block_bytes == size
    assert verity.Superblock.read(tree) == superblock


@pytest.mark.parametrize(("size", "options"), OPTIONS)
def test_a_changed_bit_of_the_data(made, findings, size, options):
    data, tree, root_hash = made(size, options)
    data.data[size // 2] ^= 1
    verity.verify(data, tree, root_hash, findings)
    names = checks(findings)
    assert names[-1] == "verity-root-differs"
    levels = len(verity.Superblock.read(tree).levels)
    assert names[:-1] == ["verity-tree-differs"] * levels


def test_a_changed_bit_of_the_tree(made, findings):
    data, tree, root_hash = made(4096 * 1000, [])
    tree.data[4096 * 2 + 5] ^= 1
    verity.verify(data, tree, root_hash, findings)
    (found,) = findings
    assert (found.check, found.place) == ("verity-tree-differs", "block 2")


def test_padding_of_the_tree_counts(made, findings):
    data, tree, root_hash = made(4096 * 129, ["--salt=ff"])
    tree.data[4096 * 4 - 1] ^= 1
    verity.verify(data, tree, root_hash, findings)
    assert [(one.check, one.place) for one in findings] == [("verity-tree-differs", "block 3")]


def test_another_root_hash(made, findings):
    data, tree, _ = made(4096 * 10, [])
    verity.verify(data, tree, bytes(32), findings)
    assert checks(findings) == ["verity-root-differs"]


@pytest.mark.parametrize(
    ("form", "at", "value"),
    [
        ("<I", 0, 0),
        ("<I", 8, 2),
        ("<I", 12, 0),
        ("<I", 32, 0),
        ("<I", 64, 1000),
        ("<I", 64, 256),
        ("<I", 68, 1 << 20),
        ("<Q", 72, 0),
        ("<Q", 72, 11),
        ("<Q", 72, 1 << 63),
        ("<H", 80, 257),
    ],
)
def test_superblocks_that_cannot_be(made, findings, form, at, value):
    data, tree, root_hash = made(4096 * 10, [])
    struct.pack_into(form, tree.data, at, value)
    assert verity.verify(data, tree, root_hash, findings) is None
    assert checks(findings) == ["verity-damaged"]
    assert data.reads == 0


@pytest.mark.parametrize("size", [0, 511, 512, 4096, 8191])
def test_a_tree_that_is_cut(made, findings, size):
    data, tree, root_hash = made(4096 * 10, [])
    del tree.data[size:]
    verity.verify(data, tree, root_hash, findings)
    assert checks(findings) == ["verity-damaged"]
    assert data.reads == 0
