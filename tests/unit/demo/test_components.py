"""The graph of packages: relations, alternatives, circles, order, names."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from calve.demo.components import Package, components, relation
from calve.demo.packages import Deb
from calve.errors import DamagedError, UsageError


def package(name, depends="", provides="", version="1"):
    fields = {"Package": name, "Version": version, "Depends": depends, "Provides": provides}
    return Package.of(Deb(name, version, "0", Path("x.deb")), fields)


def groups(*packages):
    return {
        it.name: [member.name for member in it.packages] for it in components(packages).components
    }


def references(*packages):
    return {it.name: it.references for it in components(packages).components}


def test_relations():
    text = "a (>= 1:2~x), b:any (<< 3) | c,\n d ,"
    assert relation(text, "t") == (("a",), ("b", "c"), ("d",))
    assert relation("", "t") == ()


@pytest.mark.parametrize("text", ["A b", "a (b", "a |", "<x>", "a [i386]"])
def test_damaged_relations(text):
    with pytest.raises(DamagedError, match="no relation"):
        relation(text, "t")


def test_the_control_file_is_the_packages_own():
    with pytest.raises(DamagedError, match="not that of a"):
        Package.of(Deb("a", "1", "0", Path("x.deb")), {"Package": "a", "Version": "2"})


def test_pre_depends_count():
    fields = {"Package": "a", "Version": "1", "Pre-Depends": "b", "Depends": "c"}
    found = Package.of(Deb("a", "1", "0", Path("x")), fields)
    assert found.depends == (("b",), ("c",))


def test_alternatives_by_name_by_provides_or_not_at_all():
    found = components(
        [
            package("a", "gone | c | b, virtual, nobody | nothing"),
            package("b"),
            package("c"),
            package("v2", provides="virtual (= 1)"),
            package("v1", provides="virtual"),
        ]
    )
    assert {it.name: it.references for it in found.components}["a"] == ("c", "v1")
    assert found.unmet == (("a", "nobody | nothing"),)


def test_a_real_package_wins_over_providers():
    found = references(package("a", "x"), package("x"), package("w", provides="x"))
    assert found["a"] == ("x",)


def test_circles_become_one():
    parts = (
        package("libc6", "libgcc-s1"),
        package("libgcc-s1", "libc6, gcc-base"),
        package("gcc-base"),
        package("tool", "libgcc-s1"),
        package("itself", "itself"),
    )
    assert groups(*parts) == {
        "gcc-base": ["gcc-base"],
        "itself": ["itself"],
        "libc6": ["libc6", "libgcc-s1"],
        "tool": ["tool"],
    }
    assert references(*parts)["tool"] == ("libc6",)
    assert references(*parts)["libc6"] == ("gcc-base",)
    assert references(*parts)["itself"] == ()


@pytest.mark.parametrize("seed", range(40))
def test_order_and_components_against_reachability(seed):
    rng = random.Random(seed)
    names = [f"p{i}" for i in range(rng.randint(1, 14))]
    edges = {
        name: set(rng.sample(names, min(len(names), rng.choice([0, 1, 1, 2])))) for name in names
    }
    parts = [package(name, ", ".join(sorted(edges[name]))) for name in names]
    reach = {name: {name} for name in names}
    for _ in names:
        for name in names:
            reach[name] |= {far for near in edges[name] for far in reach[near]}
    rng.shuffle(parts)
    found = components(parts)
    assert found == components(sorted(parts, key=lambda it: it.name))
    of = {member.name: it for it in found.components for member in it.packages}
    for a in names:
        for b in names:
            assert (of[a] is of[b]) == (b in reach[a] and a in reach[b])
    done = set()
    for it in found.components:
        inside = {member.name for member in it.packages}
        want = {of[to].name for name in inside for to in edges[name]} - {it.name}
        assert set(it.references) == want
        assert want <= done
        done.add(it.name)


def test_a_long_chain_needs_no_recursion():
    parts = [package(f"p{i}", f"p{i + 1}") for i in range(3000)] + [package("p3000")]
    assert [it.name for it in components(parts).components][:2] == ["p3000", "p2999"]


def test_twice_in_the_list():
    with pytest.raises(UsageError, match="twice"):
        components([package("a"), package("a")])


@pytest.mark.parametrize(
    ("version", "want"),
    [
        ("1:2.3-4", "a1-2.3-4"),
        ("252.39-1~deb12u2", "a1-252.39-1-deb12u2"),
        ("1.35.0-4+deb12u1+b1", "a1-1.35.0-4+deb12u1+b1"),
    ],
)
def test_names_that_nix_takes(version, want):
    assert components([package("a1", version=version)]).components[0].store_name == want
