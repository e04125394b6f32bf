from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from calve.disk.arch import X86_64
from calve.disk.disk import BLOCK_BYTES, ZERO_BLOCK, Block, Disk
from calve.errors import UsageError
from calve.image.plan import BlockPlan, Parent, plan

GIB = 1 << 30


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def disk(contents, *, gib=2, **fields):
    """Make a disk out of indices and texts; None stands for zeros."""
    blocks = tuple(
        Block(index, ZERO_BLOCK if text is None else digest(text))
        for index, text in sorted(contents.items())
    )
    return Disk(X86_64, gib * GIB, (), blocks, **fields)


def indices(found):
    return [block.index for block in found.blocks]


def test_without_a_parent_all_that_is_listed_is_written_zeros_too():
    one = disk({0: "a", 1: None, 7: "b", 4095: None})
    found = plan(one)
    assert found == BlockPlan(one.digest, 2, one.blocks)
    assert found.parent is None
    assert found.size_bytes == 4 * BLOCK_BYTES


def test_onto_a_parent_only_what_differs_is_written():
    parent = Parent("snap-1", disk({0: "a", 1: "b", 2: "c", 3: None, 9: "gone"}))
    child = disk({0: "a", 1: "B", 2: None, 3: None, 4: None, 5: "new"})
    found = plan(child, parent)
    assert indices(found) == [1, 2, 4, 5]  # 2 became zero, 4 was never written: both are data
    assert found.parent == "snap-1"
    assert found.disk == child.digest


def test_the_same_disk_onto_itself_is_nothing_to_write():
    one = disk({0: "a", 1: None})
    found = plan(one, Parent("snap-1", one))
    assert (found.blocks, found.size_bytes, found.parent) == ((), 0, "snap-1")
    assert found.linear_sha256 == hashlib.sha256(b"").digest()


def test_a_parent_may_be_smaller_and_not_larger():
    parent = Parent("snap-1", disk({0: "a"}, gib=2))
    assert indices(plan(disk({0: "a", 4096: "b"}, gib=3), parent)) == [4096]
    assert plan(disk({0: "a"}, gib=3), parent).size_gib == 3
    with pytest.raises(UsageError, match="the parent has 2 GiB, the disk 1") as caught:
        plan(disk({0: "a"}, gib=1), parent)
    assert caught.value.place == "snap-1"
    assert caught.value.hint


def test_what_an_overlay_has_not_cannot_be_written():
    old = disk({0: "a", 1: "b", 2: "c"})
    new = disk({0: "a", 1: "B", 2: "c"}, parent=old.digest, changed=(1,))
    assert indices(plan(new, Parent("snap-1", old))) == [1]
    with pytest.raises(UsageError, match="block 0 differs from the parent's"):
        plan(new)  # the file has only block 1
    other = disk({0: "x", 1: "b", 2: "y"})
    with pytest.raises(UsageError, match=r"block 0 differs .* built upon another disk") as caught:
        plan(new, Parent("snap-2", other))
    assert caught.value.hint


def test_an_overlay_needs_not_write_all_that_it_has():
    old, newer = disk({0: "a", 1: "b"}), disk({0: "a", 1: "B"})
    child = disk({0: "a", 1: "B"}, parent=old.digest, changed=(1,))
    assert indices(plan(child, Parent("snap-1", newer))) == []


def test_the_linear_checksum_is_of_the_raw_digests_in_order():
    found = plan(disk({5: "b", 2: "a"}))
    raw = hashlib.sha256(b"a").digest() + hashlib.sha256(b"b").digest()
    assert found.linear_sha256 == hashlib.sha256(raw).digest()


def test_the_digest_and_the_token_are_these():
    found = plan(disk({0: "a", 3: None}))
    text = f"calve-plan-1;2;\n0 {digest('a')}\n3 {ZERO_BLOCK}\n"
    assert found.digest == digest(text)
    assert found.token("eu-central-1", 3) == digest(f"{found.digest};eu-central-1;3")
    assert len(found.token("eu-central-1", 3)) <= 255


@pytest.mark.parametrize(
    "other",
    [
        {"size_gib": 3},
        {"parent": "snap-1"},
        {"blocks": (Block(0, digest("a")),)},
        {"blocks": (Block(0, digest("a")), Block(3, digest("b")))},
        {"blocks": (Block(0, digest("a")), Block(4, ZERO_BLOCK))},
        {"blocks": (Block(0, ZERO_BLOCK), Block(3, digest("a")))},
    ],
)
def test_another_plan_has_another_token(other):
    found = plan(disk({0: "a", 3: None}))
    changed = replace(found, **other)
    assert changed.digest != found.digest
    assert changed.token("r", 0) != found.token("r", 0)


def test_the_token_is_of_region_and_attempt():
    found = plan(disk({0: "a"}))
    assert len({found.token(region, n) for region in ("a", "b") for n in range(3)}) == 6
    assert found.token("a", 0) == found.token("a", 0)
