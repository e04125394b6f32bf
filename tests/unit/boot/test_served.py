"""What stage 2 remembers of the systems on a disk."""

from __future__ import annotations

import json
import os

import pytest

from calve.boot import served
from calve.boot.served import Served
from calve.nix.storepath import StorePath

ONE, TWO = (StorePath.parse(f"/nix/store/{letter * 32}-system") for letter in "ab")


def test_a_new_disk_says_nothing(tmp_path):
    assert served.read(tmp_path) == Served()


def test_good_is_remembered_and_rooted(tmp_path):
    served.confirm(tmp_path, ONE)
    assert served.read(tmp_path) == Served(good=ONE)
    assert os.readlink(tmp_path / served.LAST_GOOD) == str(ONE)
    served.confirm(tmp_path, TWO)
    assert served.read(tmp_path) == Served(good=TWO)
    assert os.readlink(tmp_path / served.LAST_GOOD) == str(TWO)


def test_bad_is_remembered_beside_the_good_one_until_another_is_good(tmp_path):
    served.confirm(tmp_path, ONE)
    assert served.reject(tmp_path, TWO) == Served(ONE, TWO)
    assert served.read(tmp_path) == Served(ONE, TWO)
    assert os.readlink(tmp_path / served.LAST_GOOD) == str(ONE)
    served.confirm(tmp_path, ONE)
    assert served.read(tmp_path) == Served(ONE)


def test_nothing_but_the_files_is_left(tmp_path):
    served.confirm(tmp_path, ONE)
    served.reject(tmp_path, TWO)
    names = [path.name for path in tmp_path.rglob("*") if not path.is_dir() or path.is_symlink()]
    assert sorted(names) == ["health.json", "last-good"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"version": 2, "good": "x"}',
        json.dumps({"version": 1, "good": "/etc/passwd"}).encode(),
        json.dumps({"version": 1, "good": ["x"]}).encode(),
    ],
)
def test_a_damaged_or_newer_file_makes_a_new_machine(tmp_path, data):
    served.confirm(tmp_path, ONE)
    (tmp_path / "nix/var/calve/health.json").write_bytes(data)
    assert served.read(tmp_path) == Served()
