"""dm-verity: veritysetup's bytes, and of a parent's tree all that did not change."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid

import pytest

from calve.disk import verity
from calve.errors import CalveError, DamagedError, UsageError
from calve.process import which
from calve.tasks import Cancel

SEED = uuid.UUID(int=9)
BLOCK = 4096
GROUP = 512 << 10

needs_veritysetup = pytest.mark.skipif(
    shutil.which("veritysetup", path="/usr/sbin:/sbin") is None,
    reason="cryptsetup-bin is not installed",
)


@pytest.fixture(name="data")
def _data(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(5 * GROUP + 3 * BLOCK))
    return path


def veritysetup(*arguments):
    return subprocess.run(
        [which("veritysetup", package="cryptsetup-bin"), *arguments], capture_output=True, text=True
    )


def alter(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def overlay(path, whole, groups):
    """Make a file of the same size that has only some groups of blocks."""
    with path.open("xb") as file, whole.open("rb") as source:
        for group in groups:
            source.seek(group * GROUP)
            file.seek(group * GROUP)
            file.write(source.read(GROUP))
        file.truncate(whole.stat().st_size)
    return path


@needs_veritysetup
@pytest.mark.parametrize("count", [2, 127, 128, 129, 128 * 128, 128 * 128 + 1])
def test_it_is_veritysetup_s(tmp_path, count):
    data = tmp_path / "data"
    data.write_bytes(os.urandom(GROUP))
    os.truncate(data, count * BLOCK)
    tree = verity.write(data, tmp_path / "tree", seed=SEED)
    own = str(uuid.UUID(bytes=tree.path.read_bytes()[16:32]))
    done = veritysetup("format", "--uuid", own, "--salt", tree.salt, data, tmp_path / "theirs")
    assert tree.root_hash in done.stdout
    assert tree.path.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert veritysetup("verify", data, tree.path, tree.root_hash).returncode == 0
    alter(data, count * BLOCK - 1)
    assert veritysetup("verify", data, tree.path, tree.root_hash).returncode != 0


def test_the_same_inputs_give_the_same_bytes(tmp_path, data):
    one, two = (verity.write(data, tmp_path / name, seed=SEED) for name in ("one", "two"))
    assert one.path.read_bytes() == two.path.read_bytes()
    other = verity.write(data, tmp_path / "three", seed=uuid.UUID(int=1))
    assert (other.salt != one.salt, other.root_hash != one.root_hash) == (True, True)
    assert len(bytes.fromhex(one.salt)) == 32


def test_what_was_written_is_read(tmp_path, data):
    tree = verity.write(data, tmp_path / "tree", seed=SEED)
    assert verity.read(tree.path) == tree


def test_only_changed_blocks_are_read(tmp_path, data):
    parent = verity.write(data, tmp_path / "parent", seed=SEED)
    alter(data, 2 * GROUP + 77)
    alter(data, 5 * GROUP)
    only = overlay(tmp_path / "overlay", data, [2, 5])
    child = verity.write(only, tmp_path / "child", seed=SEED, parent=parent, dirty=[2, 5, 900])
    whole = verity.write(data, tmp_path / "whole", seed=SEED)
    assert child.root_hash == whole.root_hash != parent.root_hash
    assert child.path.read_bytes() == whole.path.read_bytes()
    assert (child.changed, whole.changed) == ((0,), None)


def test_nothing_changed(tmp_path, data):
    parent = verity.write(data, tmp_path / "parent", seed=SEED)
    child = verity.write(
        overlay(tmp_path / "none", data, []), tmp_path / "child", seed=SEED, parent=parent
    )
    assert (child.root_hash, child.changed) == (parent.root_hash, ())


@pytest.mark.parametrize("blocks", [128 * 129, 128 * 127, 128 * 128 - 60])
def test_data_of_another_size(tmp_path, blocks):
    """The tree's levels move, or the last hash block has fewer hashes; what did not change is still not read."""
    data = tmp_path / "data"
    data.write_bytes(os.urandom(3 * GROUP))
    os.truncate(data, 128 * 128 * BLOCK)
    parent = verity.write(data, tmp_path / "parent", seed=SEED)
    os.truncate(data, blocks * BLOCK)
    alter(data, GROUP)
    only = overlay(tmp_path / "overlay", data, [1, 128])
    child = verity.write(only, tmp_path / "child", seed=SEED, parent=parent, dirty=[1, 128])
    whole = verity.write(data, tmp_path / "whole", seed=SEED)
    assert child.path.read_bytes() == whole.path.read_bytes()
    files = [path.read_bytes() for path in (parent.path, child.path)]
    assert child.changed == tuple(
        number
        for number in range(-(-len(files[1]) // GROUP))
        if files[0][number * GROUP :][:GROUP] != files[1][number * GROUP :][:GROUP]
    )


def test_a_block_that_is_new_and_not_named(tmp_path, data):
    parent = verity.write(data, tmp_path / "parent", seed=SEED)
    os.truncate(data, 6 * GROUP)
    with pytest.raises(UsageError, match="block 5 is new") as caught:
        verity.write(data, tmp_path / "child", seed=SEED, parent=parent, dirty=[0])
    assert caught.value.place == str(data)
    assert not (tmp_path / "child").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_parent_of_another_seed(tmp_path, data):
    parent = verity.write(data, tmp_path / "parent", seed=SEED)
    with pytest.raises(UsageError, match="salt"):
        verity.write(data, tmp_path / "child", seed=uuid.UUID(int=1), parent=parent)


@pytest.mark.parametrize("size", [0, BLOCK, 3 * BLOCK + 512])
def test_what_has_no_tree(tmp_path, size):
    data = tmp_path / "data"
    data.write_bytes(bytes(size))
    with pytest.raises(UsageError, match=f"{size} bytes"):
        verity.write(data, tmp_path / "tree", seed=SEED)
    with pytest.raises(UsageError, match="No such file"):
        verity.write(tmp_path / "gone", tmp_path / "tree", seed=SEED)


def test_it_can_be_cancelled(tmp_path, data):
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CalveError, match="interrupted"):
        verity.write(data, tmp_path / "tree", seed=SEED, cancel=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"X", "no tree"),
        (8, struct.pack("<I", 2), "kind"),
        (12, struct.pack("<I", 0), "kind"),
        (32, b"sha512", "kind"),
        (64, struct.pack("<I", 512), "kind"),
        (68, struct.pack("<I", 512), "kind"),
        (72, struct.pack("<Q", 0), "kind"),
        (72, struct.pack("<Q", 1 << 60), "size"),
        (80, struct.pack("<H", 257), "kind"),
        (2 * BLOCK, b"\xff\xff\xff", "tree knows"),
        (3 * BLOCK, b"\xff\xff\xff", "tree knows"),
    ],
)
def test_a_damaged_tree(tmp_path, data, at, new, message):
    tree = verity.write(data, tmp_path / "tree", seed=SEED)
    with tree.path.open("r+b") as file:
        file.seek(at)
        file.write(new)
    with pytest.raises(DamagedError, match=message) as caught:
        verity.read(tree.path)
    assert caught.value.place == str(tree.path)


def test_a_tree_that_is_cut_short_or_gone(tmp_path, data):
    tree = verity.write(data, tmp_path / "tree", seed=SEED)
    os.truncate(tree.path, 3 * BLOCK)
    with pytest.raises(DamagedError, match="size"):
        verity.read(tree.path)
    os.truncate(tree.path, 100)
    with pytest.raises(DamagedError, match="no tree"):
        verity.read(tree.path)
    tree.path.unlink()
    with pytest.raises(UsageError, match="No such file"):
        verity.read(tree.path)
