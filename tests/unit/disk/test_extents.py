"""Extents: arithmetic held against sets of blocks, and where new objects go."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calve.disk.extents import Extent, allocate, groups, merged, without

EXTENTS = st.lists(st.builds(Extent, st.integers(0, 60), st.integers(1, 20)), max_size=8)


def blocks(extents):
    return {block for extent in extents for block in range(extent.address, extent.end)}


@given(one=EXTENTS, two=EXTENTS)
def test_arithmetic(one, two):
    assert blocks(merged(one)) == blocks(one)
    assert blocks(without(one, two)) == blocks(one) - blocks(two)
    for result in (merged(one), without(one, two)):
        assert result == sorted(result)
        assert all(left.end < right.address for left, right in pairwise(result))


@given(extents=EXTENTS)
def test_groups(extents):
    assert groups(extents) == {block // 128 for block in blocks(extents)}


@given(
    taken=st.lists(st.builds(Extent, st.integers(128, 1000), st.integers(1, 200)), max_size=6),
    runs=st.lists(st.lists(st.integers(1, 300), max_size=5), max_size=5),
    size=st.integers(128, 1400),
)
def test_new_objects_overlap_nothing(taken, runs, size):
    found = allocate(runs, taken, begin=128, size=size)
    sizes = [size for run in runs for size in run]
    new = [Extent(address, count) for address, count in zip(found, sizes, strict=True)]
    assert all(extent.address >= 128 for extent in new)
    assert len(blocks(new)) == sum(sizes)
    assert not blocks(new) & blocks(taken)
    assert found == allocate(runs, list(reversed(taken)), begin=128, size=size)
    # The image grows by no more than what is new.
    end = max([128, *(extent.end for extent in taken)])
    assert max([end, size, *(extent.end for extent in new)]) <= max(end, size) + sum(sizes)


def test_a_first_image_is_laid_in_order():
    assert allocate([[3, 1], [], [5]], [Extent(0, 128)], begin=128, size=128) == [128, 131, 132]
    assert allocate([], [], begin=128, size=128) == []


def test_what_replaces_a_path_takes_its_place():
    taken = [Extent(0, 300), Extent(400, 600)]
    assert allocate([[90, 10]], taken, begin=128, size=1024) == [300, 390]


def test_all_lie_together_where_they_touch_the_fewest_groups():
    # At 130 they would touch two groups, at 384 (in the larger hole) one.
    taken = [Extent(0, 230), Extent(280, 100), Extent(600, 424)]
    assert allocate([[20], [20]], taken, begin=128, size=1024) == [384, 404]


def test_each_path_has_a_place_of_its_own_where_none_has_room_for_all():
    taken = [Extent(0, 256), Extent(356, 300), Extent(856, 168)]
    assert allocate([[100], [150, 50]], taken, begin=128, size=1024) == [256, 656, 806]


def test_what_fits_nowhere_fills_large_holes_and_then_the_end():
    taken = [Extent(0, 256), Extent(512, 512)]
    assert allocate([[300, 200, 50]], taken, begin=128, size=1024) == [1024, 256, 456]
    # No hole has room for a group's worth: nothing is scattered.
    taken = [Extent(0, 256), Extent(356, 644)]
    assert allocate([[300, 20, 20]], taken, begin=128, size=1024) == [1000, 1300, 1320]


@pytest.mark.parametrize("seed", range(3))
def test_equal_replacements_for_ever_need_little_room(seed):
    source = random.Random(seed)
    place = {}
    at = 128
    for number in range(40):
        place[number] = Extent(at, source.randrange(1, 2000))
        at = place[number].end
    size = -(-at // 128) * 128
    for _ in range(200):
        changed = source.sample(range(40), source.randint(1, 3))
        runs = [[place.pop(number).blocks] for number in changed]
        found = allocate(runs, [Extent(0, 128), *place.values()], begin=128, size=size)
        for number, (count,), address in zip(changed, runs, found, strict=True):
            place[number] = Extent(address, count)
        size = max([size, *(extent.end for extent in place.values())])
    assert size <= 1.08 * at


def test_what_is_small_shares_the_groups_of_what_lies_at_the_end():
    taken = [Extent(0, 256), Extent(276, 748)]
    assert allocate([[300], [20]], taken, begin=128, size=1024) == [1024, 1324]
    # What is large does not: it would grow the image for nothing.
    taken = [Extent(0, 256), Extent(406, 618)]
    assert allocate([[300], [150]], taken, begin=128, size=1024) == [1024, 256]


def test_the_header_s_group_is_written_anyway():
    taken = [Extent(0, 100), Extent(120, 200), Extent(335, 689)]
    assert allocate([[10]], taken, begin=100, size=1024) == [100]
    # Of two others, the smaller hole.
    taken = [Extent(0, 200), Extent(220, 100), Extent(335, 689)]
    assert allocate([[10]], taken, begin=100, size=1024) == [320]
