"""A root out of packages: what is in it, made once, and never half."""

from __future__ import annotations

import pytest

from calve.demo import root as module
from calve.demo.packages import Packages
from calve.demo.system import text
from calve.errors import DamagedError

NAMES = [line for line in text("initrd/packages.txt").splitlines() if not line.startswith("#")]


@pytest.fixture
def packages(apt, make, tmp_path):
    for name in NAMES:
        make(name, [(f"./lib/{name}/file", name)])
    make("systemd", [("./lib/systemd/systemd", "PID 1"), ("./usr/bin/systemctl", "control")])
    apt.publish()
    return Packages(tmp_path / "cache")


def test_it_is_merged_below_usr(packages, tmp_path):
    root = module.root(packages, tmp_path / "out")
    assert (root / "usr/lib/systemd/systemd").read_text() == "PID 1"
    assert (root / "lib/systemd/systemd").read_text() == "PID 1"
    assert (root / "lib").readlink().as_posix() == "usr/lib"
    for name in set(NAMES) - {"systemd"}:
        assert (root / f"usr/lib/{name}/file").read_text() == name


def test_it_is_made_once_for_the_same_packages(packages, tmp_path, apt, make):
    out = tmp_path / "out"
    root = module.root(packages, out)
    before = (root / "usr").stat().st_mtime_ns
    assert module.root(packages, out) == root
    assert (root / "usr").stat().st_mtime_ns == before
    assert len(apt.downloads) == len(NAMES)
    make("udev", [("./lib/udev/other", "")], version="2.0-1")
    apt.publish()
    assert module.root(packages, out) != root


def test_a_root_that_is_not_whole_is_none(packages, tmp_path, apt, make):
    make("udev", [("./lib/systemd/systemd", "another's path")])
    apt.publish()
    with pytest.raises(DamagedError, match="exists already"):
        module.root(packages, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
