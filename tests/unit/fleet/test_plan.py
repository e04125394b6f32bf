"""The plan of a release: arithmetic and what follows from the delivery."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calve.cache.manifest import Manifest
from calve.fleet.config import Delivery, Fleet, Rollout, Strategy
from calve.fleet.plan import Live, plan, sized, surge
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.storepath import StorePath

LIB = StorePath("0" * 32, "lib-1")
ONE = StorePath("1" * 32, "nixos-system-web-1")
TWO = StorePath("2" * 32, "nixos-system-web-2")
RULES = Rollout(min_healthy_percent=100, max_healthy_percent=200, bake_s=120, warmup_s=20)
WEB = Fleet("web", ".#web", Delivery.INITRD, "web", None, RULES)


def entry(path, size, file_size, *references):
    info = PathInfo(path, Hash.sha256(path.basename.encode()), size, references)
    return NarInfo(info, "nar/x", "zstd", None, file_size)


FIRST = Manifest(ONE, (entry(ONE, 100, 50, LIB), entry(LIB, 9000, 3000)))
SECOND = Manifest(TWO, (entry(TWO, 200, 60, LIB), entry(LIB, 9000, 3000)))
LIVE = Live(4, ONE, FIRST)


def rules(lowest, highest, **more):
    return replace(RULES, min_healthy_percent=lowest, max_healthy_percent=highest, **more)


# How machines are replaced


@pytest.mark.parametrize(
    ("machines", "lowest", "highest", "expected"),
    [
        # machines, fewest healthy, most, at once, batches
        (2, 100, 200, (2, 4, 2, 1)),
        (20, 100, 110, (20, 22, 2, 10)),
        (20, 90, 110, (18, 22, 4, 5)),
        (20, 90, 100, (18, 20, 2, 10)),
        (7, 90, 110, (7, 8, 1, 7)),  # 6.3 up, 7.7 down; one more all the same
        (3, 100, 110, (3, 4, 1, 3)),
        (1, 100, 200, (1, 2, 1, 1)),
        (1, 90, 100, (0, 1, 1, 1)),  # first terminated
        (4, 100, 100, (3, 4, 1, 4)),
        (10, 0, 100, (0, 10, 10, 1)),
        (5, 50, 150, (3, 7, 4, 2)),
        (0, 100, 200, (0, 1, 0, 0)),
    ],
)
def test_the_fewest_are_rounded_up_the_most_down_and_one_is_always_replaced(
    machines, lowest, highest, expected
):
    found = surge(machines, rules(lowest, highest))
    assert (found.fewest, found.most, found.at_once, found.batches) == expected


@pytest.mark.parametrize("lowest", range(0, 101, 7))
@pytest.mark.parametrize("highest", range(100, 201, 9))
def test_no_rules_leave_a_group_without_an_end(lowest, highest):
    if highest - lowest > 100:
        return
    for machines in range(1, 60):
        found = surge(machines, rules(lowest, highest))
        assert 1 <= found.at_once <= machines
        assert (found.batches - 1) * found.at_once < machines <= found.batches * found.at_once


def test_a_canary_comes_first_and_the_others_wait():
    canary = {"strategy": Strategy.CANARY, "canary_s": 300}
    found = surge(6, rules(100, 150, **canary))
    assert (found.canary, found.pause_s, found.at_once, found.batches) == (1, 300, 3, 1 + 2)
    assert surge(250, rules(100, 200, **canary)).canary == 3
    assert {surge(size, rules(100, 200, **canary)).canary for size in range(2, 101)} == {1}
    alone = surge(1, rules(100, 200, **canary))
    assert (alone.canary, alone.pause_s, alone.batches) == (0, 0, 1)


# The plan


def test_the_first_release_has_no_difference_and_all_is_fetched():
    found = plan(WEB, FIRST, number=1)
    assert (found.number, found.live, found.changes, found.difference) == (1, None, True, None)
    assert (found.fetch.paths, found.fetch.file_bytes) == (2, 3050)
    assert (found.fetch_seeded, found.surge, found.predicted_s) == (None, None, None)


@pytest.mark.parametrize(
    ("image", "before", "changes"),
    [
        (None, None, False),
        (None, "ami-1", False),
        ("ami-1", "ami-1", False),
        ("ami-2", "ami-1", True),
        ("ami-1", None, True),
    ],
)
def test_another_image_is_a_change(image, before, changes):
    live = replace(LIVE, system=FIRST.toplevel, manifest=FIRST, image=before)
    found = plan(WEB, FIRST, number=5, live=live, image=image)
    assert (found.changes, found.document()["image"]) == (changes, image)


def test_a_seeded_machine_fetches_only_what_is_new():
    found = plan(WEB, SECOND, number=5, live=LIVE, machines=4)
    assert (found.live, found.changes) == (4, True)
    assert (found.fetch.file_bytes, found.fetch_seeded.file_bytes) == (3060, 60)
    assert found.difference.new_paths == 1
    assert found.predicted_s is None


def test_seconds_are_batches_pause_and_bake():
    fleet = replace(WEB, rollout=rules(100, 150, strategy=Strategy.CANARY, canary_s=60))
    found = plan(fleet, SECOND, number=5, live=LIVE, machines=6, boot_s=40.0)
    assert found.predicted_s == 3 * (40 + 20) + 60 + 120
    assert found.document()["predicted_s"] == 360


def test_the_same_system_changes_nothing_and_takes_no_time():
    found = plan(WEB, FIRST, number=5, live=LIVE, machines=6, boot_s=40.0)
    assert (found.changes, found.predicted_s) == (False, 0.0)
    assert found.difference.same


def test_a_lost_manifest_leaves_the_names_to_compare():
    lost = Live(4, ONE, None)
    assert not plan(WEB, FIRST, number=5, live=lost).changes
    found = plan(WEB, SECOND, number=5, live=lost)
    assert (found.changes, found.live, found.difference, found.fetch_seeded) == (
        True,
        4,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("delivery", "fetch", "seeded", "replaced"),
    [
        (Delivery.INITRD, 3060, 60, True),
        (Delivery.USER_DATA_PULL, 3060, 60, True),
        (Delivery.IMAGE, None, None, True),
        (Delivery.USER_DATA_BUILD, None, None, True),
        (Delivery.SSH, 60, None, False),
    ],
)
def test_what_is_fetched_and_replaced_follows_from_the_delivery(delivery, fetch, seeded, replaced):
    found = plan(replace(WEB, delivery=delivery), SECOND, number=5, live=LIVE, machines=2)
    assert (None if found.fetch is None else found.fetch.file_bytes) == fetch
    assert (None if found.fetch_seeded is None else found.fetch_seeded.file_bytes) == seeded
    assert (found.surge is not None) == replaced


def test_sizes_are_taken_from_what_another_manifest_knows():
    bare = Manifest(TWO, tuple(replace(one, file_size=None) for one in SECOND.paths))
    found = {one.info.path: one.file_size for one in sized(bare, FIRST).paths}
    assert found == {TWO: None, LIB: 3000}
    assert sized(SECOND, FIRST) == SECOND
    assert not plan(WEB, sized(bare, FIRST), number=5, live=LIVE).fetch.exact
