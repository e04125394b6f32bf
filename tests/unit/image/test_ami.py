from __future__ import annotations

import pytest

from calve.aws.images import Ami, SnapshotRow
from calve.contract import evidence, userdata
from calve.disk.arch import AARCH64, X86_64
from calve.disk.disk import ZERO_BLOCK, Block, Disk
from calve.errors import UsageError
from calve.image import ami
from calve.image.plan import BlockPlan

DISK = Disk(X86_64, 1 << 30, (), (Block(0, ZERO_BLOCK),))
CLOSURE = "/nix/store/00000000000000000000000000000000-web"


def image(number, *, line="web", state="available", arch="x86_64", closure="", day=None):
    tags = {ami.LINE: line} if line else {}
    return Ami(
        f"ami-{number}",
        f"calve-web-{number}",
        state,
        arch,
        (f"snap-{number}",),
        f"2026-11-{day or number:02d}T00:00:00.000Z",
        tags=tags | ({ami.CLOSURE: closure} if closure else {}),
    )


def kept(found):
    return {one.image.id: one.why for one in found}


# Names and tags


@pytest.mark.parametrize("line", ["web", "w", "0", "web-2-x", "a" * 63])
def test_a_name_is_of_the_line_the_processor_and_the_bytes(line):
    assert ami.image_name(line, DISK) == f"calve-{line}-x86-64-{DISK.digest[:12]}"
    assert 3 <= len(ami.image_name(line, DISK)) <= 128


def test_other_bytes_or_another_processor_are_another_name():
    other = Disk(X86_64, 2 << 30, (), DISK.blocks)
    arm = Disk(AARCH64, 1 << 30, (), DISK.blocks)
    names = {ami.image_name("web", one) for one in (DISK, other, arm)}
    assert len(names) == 3
    assert f"calve-web-aarch64-{arm.digest[:12]}" in names


@pytest.mark.parametrize("line", ["", "-web", "Web", "web_1", "web/1", "wéb", "a" * 64, "web\n"])
def test_what_cannot_stand_in_a_name(line):
    with pytest.raises(UsageError, match="is no name for a line of images") as caught:
        ami.image_name(line, DISK)
    assert caught.value.hint


def test_tags_say_what_it_was_made_of():
    plan = BlockPlan(DISK.digest, 1, DISK.blocks, "snap-1")
    assert ami.tags("web", DISK, plan, closure=CLOSURE, revision="abc") == {
        "Name": ami.image_name("web", DISK),
        "calve:line": "web",
        "calve:disk": DISK.digest,
        "calve:plan": plan.digest,
        "calve:closure": CLOSURE,
        "calve:parent": "snap-1",
        "calve:contract": f"{userdata.VERSION}.{evidence.VERSION}",
        "calve:revision": "abc",
    }


def test_what_is_not_known_has_no_tag():
    found = ami.tags("web", DISK, BlockPlan(DISK.digest, 1, DISK.blocks))
    assert set(found) == {"Name", ami.LINE, ami.DISK, ami.PLAN, "calve:contract"}


# Pruning


def test_the_newest_of_each_line_and_processor_stays():
    images = [
        image(1),
        image(2),
        image(3, line="db"),
        image(4, arch="arm64"),
        image(5, arch="arm64"),
    ]
    found = ami.prune(images, {}, set())
    assert [one.image.id for one in found] == [f"ami-{n}" for n in (5, 4, 3, 2, 1)]
    newest = "it is the newest of its line"
    assert kept(found) == {
        "ami-5": newest,
        "ami-4": "",
        "ami-3": newest,
        "ami-2": newest,
        "ami-1": "",
    }


def test_what_is_used_or_wanted_stays():
    images = [image(n, closure=f"{CLOSURE}-{n}") for n in range(1, 6)]
    found = ami.prune(images, {"ami-1": "web version 7"}, {"ami-2", f"{CLOSURE}-3"})
    assert kept(found) == {
        "ami-5": "it is the newest of its line",
        "ami-4": "",
        "ami-3": "a release or a pin keeps it",
        "ami-2": "a release or a pin keeps it",
        "ami-1": "web version 7 uses it",
    }


def test_the_newest_in_use_is_the_newest_too():
    found = ami.prune([image(1), image(2)], {"ami-2": "i-1"}, set())
    assert kept(found) == {"ami-2": "i-1 uses it", "ami-1": ""}


@pytest.mark.parametrize("state", ["pending", "failed", "disabled"])
def test_the_newest_is_one_that_can_be_launched(state):
    found = ami.prune([image(1), image(2, state=state)], {}, set())
    assert kept(found) == {"ami-2": "", "ami-1": "it is the newest of its line"}


def test_what_is_not_ours_stays_and_is_no_newest():
    found = ami.prune([image(1), image(2, line="")], {"ami-2": "i-1"}, {"ami-2"})
    assert kept(found) == {"ami-2": "it is not Calve's", "ami-1": "it is the newest of its line"}


def test_an_image_without_a_closure_is_kept_by_no_pin():
    found = ami.prune([image(1), image(2)], {}, {""})
    assert kept(found)["ami-1"] == ""


def test_of_two_of_one_instant_one_is_the_newest():
    found = ami.prune([image(1, day=3), image(2, day=3)], {}, set())
    assert sorted(kept(found).values()) == ["", "it is the newest of its line"]


# Snapshots


def row(number, state="completed", started="2026-11-01T00:00:00+00:00"):
    return SnapshotRow(f"snap-{number}", state, "", started)


BEFORE = "2026-11-10T00:00:00+00:00"
YOUNG = "2026-11-10T00:00:01+00:00"


@pytest.mark.parametrize(
    ("one", "goes"),
    [
        (row(1), False),  # its image stays
        (row(1, "error"), False),
        (row(2), True),  # its image goes
        (row(2, started=YOUNG), True),
        (row(9), True),  # without an image for long
        (row(9, "pending"), True),  # abandoned
        (row(9, started=YOUNG), False),  # about to be registered
        (row(9, "pending", YOUNG), False),  # under way
        (row(9, "error", YOUNG), True),
        (row(9, started=BEFORE), False),
    ],
)
def test_which_snapshots_go(one, goes):
    found = ami.sweep([one], [image(1), image(2)], before=BEFORE, going={"ami-2"})
    assert found == ([one] if goes else [])


def test_a_snapshot_of_two_images_stays_with_either():
    copy = Ami("ami-3", "n", "available", "x86_64", ("snap-2",), "2026-11-01T00:00:00.000Z")
    assert ami.sweep([row(2)], [image(2), copy], before=BEFORE, going={"ami-2"}) == []
    going = {"ami-2", "ami-3"}
    assert ami.sweep([row(2)], [image(2), copy], before=BEFORE, going=going) == [row(2)]
