from __future__ import annotations

import pytest

from calve.disk.arch import X86_64
from calve.disk.disk import ZERO_BLOCK, Block, Disk
from calve.errors import VerificationError
from calve.image.plan import BlockPlan
from calve.image.verify import CHECKS, Finding, Verified, listed


def disk(*indices):
    return Disk(X86_64, 1 << 30, (), tuple(Block(index, ZERO_BLOCK) for index in indices))


def places(found):
    return [(one.check, one.place) for one in found]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([0, 1, 9], []),
        ([9, 1, 0, 0], []),
        ([0, 9], [("block-missing", "block 1")]),
        ([0, 1], [("block-missing", "block 9")]),
        ([0, 1, 9, 10], [("block-unplanned", "block 10")]),
        (
            [10, 2, 0, 1],
            [("block-missing", "block 9"), *[("block-unplanned", f"block {n}") for n in (2, 10)]],
        ),
    ],
)
def test_what_is_listed_without_a_parent(found, expected):
    whole = disk(0, 1, 9)
    assert places(listed(found, BlockPlan(whole.digest, 1, whole.blocks), whole)) == expected


def test_with_a_parent_all_of_the_disk_is_wanted_and_its_own_blocks_do_not_count():
    whole = disk(0, 1, 9)
    plan = BlockPlan(whole.digest, 1, whole.blocks[:1], "snap-1")
    assert places(listed([0, 1, 9, 700], plan, whole)) == []
    assert places(listed([0, 700], plan, whole)) == [
        ("block-missing", "block 1"),
        ("block-missing", "block 9"),
    ]


def test_nothing_found_is_no_error():
    Verified(3, 3).check("snap-1")


@pytest.mark.parametrize(("count", "more"), [(1, ""), (3, ", and 2 more")])
def test_the_error_names_the_first(count, more):
    findings = tuple(
        Finding("block-differs", f"block {n}", CHECKS["block-differs"]) for n in range(count)
    )
    with pytest.raises(VerificationError) as caught:
        Verified(9, 9, findings).check("snap-1")
    assert caught.value.message == f"block-differs: block 0: {CHECKS['block-differs']}{more}"
    assert (caught.value.place, caught.value.exit_code) == ("snap-1", 7)
    assert caught.value.hint == "delete the snapshot and write it again"
