"""What differs between two closures, by their manifests."""

from __future__ import annotations

import hashlib
import sys

import pytest

from calve.cache.manifest import Manifest, boot_order
from calve.fleet.difference import Kind, difference, fetched
from calve.fleet.versions import divide, version_key
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.storepath import StorePath


def digest(text):
    return encode32(hashlib.sha256(text.encode()).digest()[:20])


def entry(name, size=1000, references=(), *, build="", deriver=None, file_size=500, content=""):
    """Make a path; `build` gives another path, `content` another NAR in the same path."""
    path = StorePath(digest(name + build), name)
    made_by = None if deriver is None else StorePath(digest(deriver), deriver)
    nar_hash = Hash.sha256(f"{path}{content}".encode())
    info = PathInfo(path, nar_hash, size, tuple(sorted(references)), deriver=made_by)
    return NarInfo(info, f"nar/{path.digest}.nar.zst", "zstd", None, file_size)


def system(*entries, number=1, first=()):
    paths = [one.info.path for one in entries]
    top = entry(f"nixos-system-web-{number}", 100, paths)
    return Manifest(top.info.path, boot_order([top, *entries], top.info.path, first))


def packages(before, after):
    found = difference(system(*before), system(*after))
    return {one.name: one for one in found.packages}


def kinds(before, after):
    return {name: one.kind for name, one in packages(before, after).items()}


# Names and versions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nginx-1.26.2", ("nginx", "1.26.2")),
        ("linux-6.12.58", ("linux", "6.12.58")),
        ("linux-6.1.0-28-cloud-amd64", ("linux", "6.1.0-28-cloud-amd64")),
        ("gtk+-3.24", ("gtk+", "3.24")),
        ("python3.12-requests-2.32", ("python3.12-requests", "2.32")),
        ("etc", ("etc", "")),
        ("nss-cacert-3.98", ("nss-cacert", "3.98")),
        ("x-", ("x-", "")),
        ("x--y", ("x", "-y")),
        ("0-1", ("0", "1")),
        ("a-_b", ("a", "_b")),
    ],
)
def test_a_name_is_divided_as_nix_does(name, expected):
    assert divide(name) == expected


def test_versions_are_ordered_as_nix_does():
    # The manual's examples of builtins.compareVersions, and those of Nix's own tests.
    ascending = ["2.3pre1", "2.3pre3", "2.3pre12", "2.3", "2.3a", "2.3c", "2.3.1"]
    assert sorted(set(ascending), key=version_key) == ascending
    assert version_key("2.3.1") < version_key("2.3.10")
    assert version_key("1.0") == version_key("1-0")
    assert version_key("2.3pre1") < version_key("2.3q")
    assert version_key("") < version_key("0")


def test_an_outputs_name_is_taken_off_by_the_deriver_or_as_usual():
    before = [
        entry("openssl-3.0-bin"),
        entry("openssl-3.0", deriver="openssl-3.0.drv"),
        entry("odd-1.0-strange", deriver="odd-1.0.drv"),
        entry("tool-2026-01-01-unstable"),
    ]
    found = packages(before, [])
    assert {name: (one.before, one.before_paths) for name, one in found.items()} == {
        "openssl": (("3.0",), 2),
        "odd": (("1.0",), 1),
        "tool": (("2026-01-01-unstable",), 1),
    }


# Packages


def test_how_packages_differ():
    before = [
        entry("nginx-1.26"),
        entry("curl-8.9"),
        entry("gone-1"),
        entry("icu-73"),
        entry("icu-76"),
        entry("glibc-2.40", 7_000_000),
        entry("bash-5.2"),
    ]
    after = [
        entry("nginx-1.27"),
        entry("curl-8.8"),
        entry("come"),
        entry("icu-76"),
        entry("icu-74"),
        entry("glibc-2.40", 7_000_000, build="again"),
        entry("bash-5.2"),
    ]
    assert kinds(before, after) == {
        "nginx": Kind.UPGRADED,
        "curl": Kind.DOWNGRADED,
        "gone": Kind.REMOVED,
        "come": Kind.ADDED,
        "icu": Kind.UPGRADED,
        "glibc": Kind.REBUILT,
    }
    found = packages(before, after)
    assert found["icu"].before == ("73", "76")
    assert found["icu"].after == ("74", "76")
    assert found["come"].after == ("",)
    assert found["come"].before == ()


def test_versions_that_only_come_or_go_are_neither_newer_nor_older():
    both, one = [entry("icu-73"), entry("icu-76")], [entry("icu-76")]
    assert kinds(both, one)["icu"] is Kind.CHANGED
    assert kinds(one, both)["icu"] is Kind.CHANGED


def test_the_largest_change_stands_first():
    before = [entry("a-1", 1000), entry("b-1", 900_000), entry("c-1", 10_000)]
    after = [entry("a-2", 2000), entry("b-2", 100_000), entry("c-2", 20_000)]
    found = difference(system(*before), system(*after, number=2))
    assert [(one.name, one.change_bytes) for one in found.packages] == [
        ("b", -800_000),
        ("c", 10_000),
        ("a", 1000),
        ("nixos-system-web", 0),
    ]


def test_what_is_merely_rebuilt_is_worth_a_line_from_8_kib_on():
    before = [entry("a-1", 1000), entry("b-1", 1000)]
    after = [entry("a-1", 9191, build="x"), entry("b-1", 9192, build="x")]
    found = difference(system(*before), system(*after))
    assert [one.name for one in found.rebuilt if one.name in "ab"] == ["a"]


def test_another_nar_in_the_same_path_is_a_rebuild():
    found = difference(system(entry("a-1")), system(entry("a-1", content="other")))
    assert (found.new_paths, found.gone_paths, found.same) == (1, 1, False)
    assert {one.name: one.kind for one in found.packages} == {"a": Kind.REBUILT}


def test_sums_and_the_same():
    first = system(entry("a-1", 10), entry("b-1", 20))
    second = system(entry("a-1", 10), entry("b-2", 50), entry("c", 5), number=2)
    found = difference(first, second)
    assert (found.before_paths, found.after_paths) == (3, 4)
    assert (found.before_bytes, found.after_bytes) == (130, 165)
    assert (found.new_paths, found.new_bytes, found.gone_paths) == (3, 155, 2)
    same = difference(first, first)
    assert same.same
    assert (same.packages, same.units) == ((), ())
    assert same.document()["packages"] == []
    assert found.document()["packages"][0] == {
        "name": "b",
        "kind": "upgraded",
        "before": ["1"],
        "after": ["2"],
        "before_bytes": 20,
        "after_bytes": 50,
        "before_paths": 1,
        "after_paths": 1,
    }


# Units


def units(before, after):
    found = difference(system(*before), system(*after))
    assert not any(one.name.startswith("unit-") for one in found.packages)
    return {one.name: one.kind for one in found.units}


def test_units_come_go_change_and_are_rebuilt():
    one, two = entry("nginx-1.26"), entry("nginx-1.27")
    again = entry("nginx-1.26", build="again")
    before = [
        one,
        entry("unit-a.service"),
        entry("unit-b.timer"),
        entry("unit-nginx.service", 700, [one.info.path]),
        entry("unit-c.socket", 500),
        entry("unit-same.mount"),
    ]
    after = [
        two,
        again,
        entry("unit-d.target"),
        entry("unit-nginx.service", 700, [two.info.path], build="x"),
        entry("unit-c.socket", 501, build="x"),
        entry("unit-same.mount"),
    ]
    assert units(before, after) == {
        "a.service": Kind.REMOVED,
        "b.timer": Kind.REMOVED,
        "c.socket": Kind.CHANGED,
        "d.target": Kind.ADDED,
        "nginx.service": Kind.CHANGED,
    }
    moved = [again, entry("unit-nginx.service", 700, [again.info.path], build="x")]
    assert units(before[:1] + before[3:4], moved) == {"nginx.service": Kind.REBUILT}


def test_a_unit_of_two_managers_is_one_name_and_one_that_is_disabled_is_still_it():
    both = [entry("unit-dbus.service"), entry("unit-dbus.service", build="user")]
    assert units(both[:1], both) == {"dbus.service": Kind.CHANGED}
    assert units(both, both[1:]) == {"dbus.service": Kind.CHANGED}
    disabled = [entry("unit-dbus.service-disabled")]
    assert units(both[:1], disabled) == {"dbus.service": Kind.CHANGED}


def test_scripts_of_units_are_packages():
    found = packages([], [entry("unit-script-nginx-start")])
    assert "unit-script-nginx-start" in found


# Kernel and initrd


def booting(kernel, initrd, *more, number=1):
    paths = [one.info.path for one in (kernel, initrd)]
    return system(kernel, initrd, *more, number=number, first=paths)


def test_the_kernel_is_the_systems_own_and_no_other():
    headers = entry("linux-headers-6.9", 5_000_000)
    gcc = entry("gcc-14", 6_000_000, [headers.info.path])
    modules = entry("linux-6.12.57-modules", 9_000_000)

    def made(version):
        kernel, initrd = entry(f"linux-{version}"), entry(f"initrd-linux-{version}")
        whole = system(kernel, initrd, modules, gcc)  # in no boot order: the largest first
        return Manifest(whole.toplevel, (headers, *whole.paths))

    found = difference(made("6.12.57"), made("6.12.58"))
    assert found.kernel.changed
    assert found.kernel.versions == ("6.12.57", "6.12.58")
    assert found.kernel.before.name == "linux-6.12.57"
    assert found.initrd.versions == ("6.12.57", "6.12.58")
    assert found.document()["kernel"]["after_version"] == "6.12.58"


def test_a_kernel_of_another_flavour_and_a_rebuilt_one():
    before = booting(entry("linux-hardened-6.6"), entry("initrd-linux-hardened-6.6"))
    after = booting(entry("linux-hardened-6.6", build="x"), entry("initrd-linux-hardened-6.6"))
    found = difference(before, after)
    assert found.kernel.changed
    assert found.kernel.versions == ("6.6", "6.6")
    assert not found.initrd.changed


def test_a_closure_without_a_kernel_has_none():
    found = difference(system(entry("a-1")), system(entry("a-2"), number=2))
    assert (found.kernel.before, found.kernel.after, found.kernel.changed) == (None, None, False)
    assert found.initrd.document()["before_version"] == ""


# Fetching


def test_what_is_fetched_is_what_is_not_there():
    manifest = system(entry("a-1", 4000, file_size=1000), entry("b-1", 2000, file_size=700))
    (have,) = [one.info.path for one in manifest.paths if one.info.path.name == "a-1"]
    whole, rest = fetched(manifest, frozenset()), fetched(manifest, frozenset([have]))
    assert (whole.paths, whole.nar_bytes, whole.file_bytes, whole.exact) == (3, 6100, 2200, True)
    assert (rest.paths, rest.nar_bytes, rest.file_bytes, rest.exact) == (2, 2100, 1200, True)


def test_unknown_sizes_are_estimated_by_the_others_and_said_to_be():
    top = entry("top", 1000, file_size=250)
    rest = entry("rest", 4000, file_size=None)
    manifest = Manifest(top.info.path, (top, rest))
    found = fetched(manifest, frozenset())
    assert (found.file_bytes, found.exact) == (1250, False)
    assert fetched(manifest, frozenset([rest.info.path])).exact
    nothing = Manifest(top.info.path, (entry("top", 1000, file_size=None),))
    assert fetched(nothing, frozenset()).file_bytes == 1000


# Size


def test_the_work_grows_with_the_paths_and_no_faster():
    def calls(count):
        before = system(*(entry(f"p{at}-1") for at in range(count)))
        after = system(*(entry(f"p{at}-2") for at in range(count)), number=2)
        seen = 0

        def count_calls(_frame, event, _argument):
            nonlocal seen
            seen += event == "call"

        sys.setprofile(count_calls)
        try:
            difference(before, after)
        finally:
            sys.setprofile(None)
        return seen

    assert calls(2000) < 2.2 * calls(1000)
