"""The verifier over HTTP: each fault that corrupts is found by a check that has a name, and none is invented."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import uploading

from calve.aws import ebs
from calve.errors import CancelledError, NotFoundError, VerificationError
from calve.image.plan import Parent, plan
from calve.image.verify import verify
from calve.region.ebs_faults import Fewer, Forget, Rot, Throttle
from calve.region.faults import Delay, Flip, Lost
from calve.region.snapshot import Entry, Start
from calve.tasks import Cancel

SEEDS = {index: index for index in range(6)} | {100: None, 2047: "last"}
CHANGES = {2: "new", 4: None, 300: "more"}
CHILD = SEEDS | CHANGES


def forge(place, seeds, parent=None):
    """Make a completed snapshot of these blocks, past the uploader."""
    made = place.snapshots.start(Start(1, parent_id=parent))
    for index, seed in seeds.items():
        data = uploading.content(seed)
        digest = hashlib.sha256(data).digest()
        entry = Entry(digest, place.snapshots.blobs.put(digest, data), made.id)
        place.snapshots.write(made.id, index, digest, entry)
    place.snapshots._complete_s = 0.0
    place.snapshots.complete(made.id, len(seeds))
    assert place.state(made.id) == "completed"
    return made.id


@pytest.fixture
def child(place):
    """A parent, and the disk that is to be written onto it."""
    parent = place.parent(SEEDS)
    return parent, place.disk(CHILD)


def puts(place, index):
    return {"method": "PUT", "path": f"*/blocks/{index}"}


# Nothing is wrong


def test_a_good_snapshot_has_no_findings(place):
    disk = place.disk(SEEDS)
    made = place.run(disk).id
    found = verify(place.ebs, made, plan(disk), disk, cancel=Cancel())
    assert (found.listed, found.read, found.findings) == (8, 8, ())
    found.check(made)


@pytest.mark.parametrize(("deep", "read"), [(False, 5), (True, 9)])
def test_a_good_child_has_none(place, child, deep, read):
    parent, disk = child
    made = place.run(disk, parent).id
    found = verify(place.ebs, made, plan(disk, parent), disk, deep=deep, cancel=Cancel())
    assert (found.listed, found.read, found.findings) == (9, read, ())
    assert place.service.counts["GetSnapshotBlock"] == read


def test_what_it_reads_is_told(place):
    disk, told = place.disk(SEEDS), []
    made = place.run(disk).id
    verify(place.ebs, made, plan(disk), disk, cancel=Cancel(), progress=told.append)
    assert sorted(step.done for step in told) == [n << 19 for n in range(1, 9)]
    assert {(step.name, step.total) for step in told} == {("verify", 8 << 19)}


def test_blocks_that_nobody_reads_any_more_may_stay_in_the_parent(place):
    parent = place.parent(SEEDS | {700: "old"})
    disk = place.disk(SEEDS)
    made = place.run(disk, parent).id
    assert place.findings(made, disk, parent, deep=True) == []


# Blocks that are not there


def test_a_block_that_was_forgotten(place):
    disk = place.disk(SEEDS)
    place.service.faults.add(Forget(), **puts(place, 3))
    made = place.run(disk).id
    assert place.findings(made, disk) == [("block-missing", "block 3")]


def test_the_last_block_was_forgotten(place):
    disk = place.disk(SEEDS)
    place.service.faults.add(Forget(), **puts(place, 2047))
    made = place.run(disk).id
    assert place.findings(made, disk) == [("block-missing", "block 2047")]


def test_zeros_were_forgotten(place):
    disk = place.disk(SEEDS)
    place.service.faults.add(Forget(), **puts(place, 100))
    assert place.findings(place.run(disk).id, disk) == [("block-missing", "block 100")]


@pytest.mark.parametrize("index", [2, 4])
def test_a_block_over_its_parents_was_forgotten(place, child, index):
    parent, disk = child
    place.service.faults.add(Forget(), **puts(place, index))
    made = place.run(disk, parent).id
    assert place.findings(made, disk, parent) == [
        ("block-missing", f"block {index}"),  # it is as in the parent
        ("block-differs", f"block {index}"),
    ]


def test_a_new_block_over_a_parent_was_forgotten(place, child):
    parent, disk = child
    place.service.faults.add(Forget(), **puts(place, 300))
    made = place.run(disk, parent).id
    assert set(place.findings(made, disk, parent)) == {("block-missing", "block 300")}


def test_a_block_that_the_parent_should_have(place):
    without = {index: seed for index, seed in SEEDS.items() if index != 100}
    parent = forge(place, without)
    disk = place.disk(CHILD)
    believed = Parent(parent, place.disk(SEEDS))
    place.disk(CHILD)
    made = place.run(disk, believed).id
    assert place.findings(made, disk, believed) == [("block-missing", "block 100")]


# Blocks that are other ones


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("bit", [0, (1 << 22) - 1])
def test_a_block_that_rotted(place, hidden, bit):
    disk = place.disk(SEEDS)
    place.service.faults.add(Rot(bit, hidden=hidden), **puts(place, 3))
    made = place.run(disk).id
    assert place.findings(made, disk) == [("block-differs", "block 3")]


@pytest.mark.parametrize("hidden", [True, False])
def test_a_block_that_rotted_over_its_parents(place, child, hidden):
    parent, disk = child
    place.service.faults.add(Rot(77, hidden=hidden), **puts(place, 2))
    made = place.run(disk, parent).id
    assert place.findings(made, disk, parent) == [("block-differs", "block 2")]


@pytest.mark.parametrize("hidden", [True, False])
def test_only_deep_sees_a_parents_block_that_rotted(place, hidden):
    place.service.faults.add(Rot(hidden=hidden), **puts(place, 1))
    parent = place.parent(SEEDS)
    disk = place.disk(CHILD)
    made = place.run(disk, parent).id
    assert place.findings(made, disk, parent) == []
    assert place.findings(made, disk, parent, deep=True) == [("parent-differs", "block 1")]


@pytest.mark.parametrize("index", [0, 2047])
def test_the_ends_of_the_disk_are_read_of_the_parent_too(place, index):
    place.service.faults.add(Rot(), **puts(place, index))
    parent = place.parent(SEEDS)
    disk = place.disk(CHILD)
    made = place.run(disk, parent).id
    assert place.findings(made, disk, parent) == [("parent-differs", f"block {index}")]


def test_a_block_of_another_snapshot(place):
    disk = place.disk(SEEDS)
    made = forge(place, SEEDS | {3: "of another"})
    assert place.findings(made, disk) == [("block-differs", "block 3")]


def test_two_blocks_are_swapped(place):
    disk = place.disk(SEEDS)
    made = forge(place, SEEDS | {1: 5, 5: 1})
    assert place.findings(made, disk) == [
        ("block-differs", "block 1"),
        ("block-differs", "block 5"),
    ]


def test_two_blocks_are_swapped_over_a_parent(place, child):
    parent, disk = child
    made = forge(place, CHANGES | {2: CHANGES[300], 300: CHANGES[2]}, parent.snapshot)
    assert place.findings(made, disk, parent) == [
        ("block-differs", "block 2"),
        ("block-differs", "block 300"),
    ]


def test_findings_stand_in_the_order_of_the_disk(place):
    disk = place.disk(SEEDS)
    made = forge(place, SEEDS | {2: "x", 100: "y", 2047: "z"})
    assert [where for _, where in place.findings(made, disk)] == [
        "block 2",
        "block 100",
        "block 2047",
    ]


def test_a_parent_that_holds_another_disk(place):
    parent = forge(place, SEEDS | {1: "not what was believed"})
    disk = place.disk(CHILD)
    believed = Parent(parent, disk_without_file(place, SEEDS))
    made = place.run(disk, believed).id
    assert place.findings(made, disk, believed) == []
    assert place.findings(made, disk, believed, deep=True) == [("parent-differs", "block 1")]


def disk_without_file(place, seeds):
    return uploading.disk_of(place.directory / "other.raw", seeds)


# Blocks that nobody planned


def test_a_block_that_nobody_planned(place):
    disk = place.disk(SEEDS)
    made = forge(place, SEEDS | {900: "?"})
    assert place.findings(made, disk) == [("block-unplanned", "block 900")]


def test_a_block_that_nobody_planned_over_a_parent(place, child):
    parent, disk = child
    made = forge(place, CHANGES | {900: "?"}, parent.snapshot)
    assert place.findings(made, disk, parent) == [("block-unplanned", "block 900")]


def test_a_parents_block_was_overwritten(place, child):
    parent, disk = child
    made = forge(place, CHANGES | {1: "overwritten"}, parent.snapshot)
    assert place.findings(made, disk, parent) == [("block-unplanned", "block 1")]
    deep = place.findings(made, disk, parent, deep=True)
    assert deep == [("block-unplanned", "block 1"), ("parent-differs", "block 1")]


def test_a_snapshot_that_is_not_the_parents_child(place, child):
    parent, disk = child
    made = forge(place, CHILD)  # all blocks are right
    assert place.findings(made, disk, parent) == [("parent-unrelated", parent.snapshot)]


def test_a_snapshot_of_nothing(place):
    disk = place.disk(SEEDS)
    made = forge(place, {})
    assert place.findings(made, disk) == [("block-missing", f"block {n}") for n in SEEDS]


def test_at_most_20_findings(place):
    disk = place.disk(dict.fromkeys(range(30)))
    made = forge(place, {})
    found = verify(place.ebs, made, plan(disk), disk, cancel=Cancel())
    assert len(found.findings) == 20
    with pytest.raises(VerificationError) as caught:
        found.check(made)
    assert caught.value.message.startswith("block-missing: block 0: ")
    assert (caught.value.place, bool(caught.value.hint)) == (made, True)


# The way to them


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pages_that_have_fewer_blocks_are_followed(place, child, count):
    parent, disk = child
    place.service.faults.add(Rot(), **puts(place, 300))
    made = place.run(disk, parent).id
    place.service.faults.add(Fewer(count), method="GET", path="*blocks", times=4)
    assert place.findings(made, disk, parent) == [("block-differs", "block 300")]


def test_a_list_that_goes_nowhere_is_an_error(place, monkeypatch):
    monkeypatch.setattr(ebs, "_EMPTY_PAGES", 20)
    disk = place.disk(SEEDS)
    made = place.run(disk).id
    place.service.faults.add(Fewer(0), method="GET", path="*blocks", times=None)
    with pytest.raises(VerificationError, match="pages without a block"):
        place.findings(made, disk)


@pytest.mark.parametrize(
    "what", ["*/blocks", "*/changedblocks", "*/blocks/2"], ids=["list", "changes", "block"]
)
def test_faults_that_pass(place, child, what):
    parent, disk = child
    made = place.run(disk, parent).id
    place.faults.add(Lost(performed=True), method="GET", path=what)
    place.service.faults.add(Throttle(), method="GET", path=what, skip=1)
    assert place.findings(made, disk, parent) == []


def test_a_block_that_is_garbled_on_its_way_differs(place):
    disk = place.disk(SEEDS)
    made = place.run(disk).id
    place.faults.add(Flip(1000), method="GET", path="*/blocks/3")
    assert place.findings(made, disk) == [("block-differs", "block 3")]


def test_a_snapshot_that_is_not_there(place):
    disk = place.disk(SEEDS)
    with pytest.raises(NotFoundError):
        place.findings("snap-0123456789abcdef0", disk)


def test_a_cancel_ends_it(place):
    disk, cancel = place.disk(SEEDS), Cancel()
    made = place.run(disk).id
    place.faults.add(Delay(0.05), method="GET", times=None)
    with pytest.raises(CancelledError):
        verify(
            place.ebs,
            made,
            plan(disk),
            disk,
            cancel=cancel,
            progress=lambda _step: cancel.cancel(),
        )


def test_a_disk_of_nothing(place):
    disk = replace(place.disk(SEEDS), blocks=())
    made = forge(place, {})
    found = verify(place.ebs, made, plan(disk), disk, deep=True, cancel=Cancel())
    assert (found.listed, found.read, found.findings) == (0, 0, ())
