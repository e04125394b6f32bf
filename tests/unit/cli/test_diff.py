"""How differences and plans are written for people."""

from __future__ import annotations

import io

import pytest

from calve.cli import diff, plan
from calve.cli.session import Session
from calve.fleet.config import Delivery
from calve.fleet.difference import Difference, Fetch, Kind, Package, Part, Unit
from calve.fleet.plan import Plan, Surge
from calve.nix.storepath import StorePath


def path(name, digit="1"):
    return StorePath(digit * 32, name)


def part(before=None, after=None, digit="2"):
    return Part(before and path(before), after and path(after, digit))


def package(name, before, after, before_bytes, after_bytes):
    return Package(name, before, after, before_bytes, after_bytes, len(before), len(after))


def difference(**fields):
    values = {
        "before": path("nixos-system-web-1"),
        "after": path("nixos-system-web-2"),
        "kernel": part("linux-6.12.57", "linux-6.12.58"),
        "initrd": part("initrd-linux-6.12.57", "initrd-linux-6.12.57"),
        "units": (),
        "packages": (),
        "before_paths": 10,
        "after_paths": 11,
        "before_bytes": 5_000_000,
        "after_bytes": 7_500_000,
        "new_paths": 2,
        "new_bytes": 3_000_000,
        "gone_paths": 1,
    }
    return Difference(**{**values, **fields})


def shown(**fields):
    out = io.StringIO()
    diff.show(difference(**fields), out)
    return out.getvalue().splitlines()


def test_kernel_and_units_stand_first_and_sums_last():
    units = (Unit("a.service", Kind.ADDED), Unit("n.service", Kind.CHANGED))
    lines = shown(
        units=(*units, Unit("r.service", Kind.REBUILT), Unit("s.timer", Kind.REBUILT)),
        packages=(
            package("linux", ("6.12.57",), ("6.12.58",), 9_000_000, 11_500_000),
            package("icu", ("73", "76"), ("74", "76"), 500, 400),
            package("gone", ("1",), (), 2000, 0),
            package("come", (), ("",), 0, 3000),
            package("glibc", ("2.40",), ("2.40",), 10_000, 30_000),
            package("small", ("1",), ("1",), 100, 101),
        ),
    )
    assert lines == [
        "kernel   6.12.57 -> 6.12.58",
        "initrd   6.12.57 rebuilt",
        "units    added: a.service",
        "units    changed: n.service",
        "units    2 rebuilt, the same but for the paths in them",
        "",
        "CHANGE    PACKAGE  BEFORE   AFTER           SIZE",
        "upgraded  linux    6.12.57  6.12.58      +2.5 MB",
        "upgraded  icu      73       74            -100 B",
        "removed   gone     1                     -2.0 kB",
        "added     come              -            +3.0 kB",
        "rebuilt   glibc    2.40     2.40        +20.0 kB",
        "",
        "rebuilt  1 package of the same version (+1 B)",
        "new      2 paths, 3.0 MB; 1 path gone",
        "closure  10 -> 11 paths, 5.0 MB -> 7.5 MB (+2.5 MB)",
    ]


@pytest.mark.parametrize(
    ("kernel", "line"),
    [
        (part("linux-6.6", "linux-6.6", "1"), "kernel   6.6 unchanged"),
        (part("linux-6.6", "linux-6.6"), "kernel   6.6 rebuilt"),
        (part(None, "linux-6.6"), "kernel   none -> 6.6"),
        (part("linux-6.6", None), "kernel   6.6 -> none"),
    ],
)
def test_what_became_of_the_kernel(kernel, line):
    assert shown(kernel=kernel)[0] == line


def test_a_closure_without_a_kernel_says_nothing_of_one():
    assert shown(kernel=part(), initrd=part())[0] == "units    unchanged"


def test_many_units_are_cut():
    units = tuple(Unit(f"u{at:02}.service", Kind.ADDED) for at in range(45))
    (line,) = [line for line in shown(units=units) if line.startswith("units")]
    assert line.endswith("u39.service and 5 more")


def test_the_same_is_one_line():
    one = path("nixos-system-web-1")
    assert shown(before=one, after=one, new_paths=0, gone_paths=0) == ["nothing differs"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "+0 B"),
        (-999, "-999 B"),
        (1000, "+1.0 kB"),
        (-999_999, "-1,000.0 kB"),
        (1_234_567_890, "+1,234.6 MB"),
    ],
)
def test_a_change_of_size_has_its_sign(count, text):
    assert diff.grew(count) == text


# Plans


def planned(**fields):
    values = {
        "fleet": "web",
        "number": 5,
        "resumes": False,
        "system": path("nixos-system-web-2"),
        "delivery": Delivery.INITRD,
        "image": None,
        "live": 4,
        "changes": True,
        "difference": difference(),
        "surge": None,
        "fetch": Fetch(11, 7_500_000, 2_500_000),
        "fetch_seeded": Fetch(2, 3_000_000, 1_000_000, exact=False),
        "bake_s": 120,
        "warm_up_s": 20,
        "boot_s": None,
    }
    return Plan(**{**values, **fields})


def lines(**fields):
    return [f"{label:<8} {text}" for label, text in plan.lines(planned(**fields))]


def test_a_plan_says_what_is_fetched_and_what_it_does_not_know():
    assert lines() == [
        "release  5, after release 4, by initrd",
        "fetch    2.5 MB a machine (11 paths, 7.5 MB unpacked)",
        "         about 1.0 MB a machine where its image has release 4 (2 paths, 3.0 MB unpacked)",
        "machines how many is not known: --machines N says how they are replaced",
    ]


def test_a_plan_of_known_machines_says_how_and_how_long():
    found = lines(surge=Surge(6, 6, 9, 3, 3, 1, 60), boot_s=40.0)
    assert found[-3:] == [
        "canary   1 first, then a pause of 60 s",
        "machines 6 replaced, 3 at once in 3 batches; at least 6 healthy, at most 9 in all",
        "time     about 6 min 00 s, 120 s of it baking",
    ]


def test_a_plan_without_a_live_release_or_without_its_manifest():
    first = lines(live=None, difference=None, fetch_seeded=None)
    assert first[0] == "release  5, no other is live, by initrd"
    assert "manifest the cache has lost" in lines(difference=None)[0]
    assert "5, which is under way already" in lines(resumes=True)[0]


def test_a_plan_without_changes_is_three_lines_wherever_they_go():
    out, err = io.StringIO(), io.StringIO()
    plan.show(Session(out, err), planned(changes=False))
    assert out.getvalue().splitlines()[-1] == ("release  4 has this system: nothing is to be done")
    assert len(out.getvalue().splitlines()) == 3
    plan.show(Session(io.StringIO(), err), planned(), err)
    assert "kernel   6.12.57 -> 6.12.58" in err.getvalue()
