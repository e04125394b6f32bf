"""The farm: directories real, files linked, symbolic links as they were, the first one wins."""

from __future__ import annotations

import pytest

from calve.demo.farm import Farm
from calve.errors import UsageError
from calve.nix.storepath import StorePath

A = StorePath("a" * 32, "a")
B = StorePath("b" * 32, "b")


def put(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif content.startswith("->"):
            path.symlink_to(content[2:])
        else:
            path.write_text(content)
    return root


def links_of(tree):
    return {
        str(path.relative_to(tree)): str(path.readlink())
        for path in tree.rglob("*")
        if path.is_symlink()
    }


@pytest.fixture
def farm(tmp_path):
    (tmp_path / "farm").mkdir()
    return Farm(tmp_path / "farm")


def test_packages_are_merged(farm, tmp_path):
    a = put(tmp_path / "a", {"usr/bin/a": "1", "usr/lib/x/a.so": "2", "etc/a": "3"})
    b = put(
        tmp_path / "b", {"usr/lib/x/b.so": "1", "usr/lib/x/link.so": "->b.so", "usr/none": None}
    )
    assert farm.add(a, A, "usr") == 2
    assert farm.add(b, B, "usr") == 1
    assert links_of(farm.tree) == {
        "bin/a": f"{A}/usr/bin/a",
        "lib/x/a.so": f"{A}/usr/lib/x/a.so",
        "lib/x/b.so": f"{B}/usr/lib/x/b.so",
        "lib/x/link.so": "b.so",
    }
    assert (farm.tree / "none").is_dir()


def test_units_that_want_each_other_resolve_in_the_farm(farm, tmp_path):
    a = put(
        tmp_path / "a",
        {"usr/system/x.service": "u", "usr/system/m.target.wants/x.service": "->../x.service"},
    )
    farm.add(a, A, "usr")
    assert links_of(farm.tree)["system/m.target.wants/x.service"] == "../x.service"


def test_the_first_one_wins(farm, tmp_path):
    put(farm.tree, {"os-release": "own"})
    a = put(tmp_path / "a", {"etc/os-release": "1", "etc/x": "1"})
    b = put(tmp_path / "b", {"etc/x": "->y"})
    assert farm.add(a, A, "etc") == 1
    assert farm.add(b, B, "etc") == 0
    assert (farm.tree / "os-release").read_text() == "own"
    assert links_of(farm.tree) == {"x": f"{A}/etc/x"}


def test_without_the_part_nothing_is_added(farm, tmp_path):
    a = put(tmp_path / "a", {"etc": "a file"})
    assert farm.add(a, A, "usr") == 0
    assert farm.add(a, A, "etc") == 0
    assert list(farm.tree.iterdir()) == []


@pytest.mark.parametrize("other", ["a file", "->elsewhere"])
@pytest.mark.parametrize("directory_first", [True, False])
def test_a_directory_and_something_else(other, directory_first, farm, tmp_path):
    a = put(tmp_path / "a", {"usr/x/y": "1"})
    b = put(tmp_path / "b", {"usr/x": other})
    parts = [(a, A), (b, B)] if directory_first else [(b, B), (a, A)]
    farm.add(*parts[0], "usr")
    with pytest.raises(UsageError, match="a directory in one package"):
        farm.add(*parts[1], "usr")
