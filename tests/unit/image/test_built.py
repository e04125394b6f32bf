"""What stands beside a disk: what was written is read, and what is not so is refused by name."""

from __future__ import annotations

import dataclasses
import json
import uuid

import pytest

from calve.disk.arch import X86_64
from calve.disk.disk import Block, Content, Disk, sidecar
from calve.errors import CalveError, DamagedError, NotFoundError, UsageError
from calve.image.built import TREE_PARTITION, Built, Loader, is_built, keep, load
from calve.nix.hashes import Hash
from calve.nix.storepath import StorePath

DISK = Disk(X86_64, 1 << 30, (), (Block(3, "1" * 64),))
LOADER = Loader(b"\1" * 32, b"\2" * 32, "root=LABEL=nixos init=/x")
SEEDED = {
    StorePath("a" * 32, "one"): Hash.parse(f"sha256:{'1' * 52}"),
    StorePath("b" * 32, "two"): Hash.parse(f"sha256:{'0' * 52}"),
}


@pytest.fixture
def built(tmp_path):
    made = Built(tmp_path, DISK, "web", StorePath("c" * 32, "system"), loader=LOADER, seeded=SEEDED)
    sidecar(made.raw).write_bytes(DISK.dump())
    return keep(made)


def rewrite(built, **changes):
    place = built.directory / "image.json"
    body = json.loads(place.read_bytes()) | changes
    place.write_text(json.dumps({key: value for key, value in body.items() if value != "gone"}))


def test_what_was_kept_is_loaded(built):
    assert load(built.directory) == built
    assert is_built(built.directory)


def test_of_an_overlay_its_parent_too(built):
    disk = dataclasses.replace(DISK, parent="3" * 64, changed=(3,))
    overlay = dataclasses.replace(built, disk=disk, parent=DISK, loader=None, seeded={})
    sidecar(overlay.raw).write_bytes(disk.dump())
    assert load(keep(overlay).directory) == overlay
    sidecar(built.raw).write_bytes(DISK.dump())
    assert load(keep(built).directory) == built
    assert not (built.directory / "parent.json").exists()


def test_what_an_older_calve_did_not_write_is_not_known(built):
    rewrite(built, loader="gone", seeded="gone")
    found = load(built.directory)
    assert (found.loader, found.seeded) == (None, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"disk": "4" * 64}, "of another disk"),
        ({"disk": None}, "disk is not a text"),
        ({"line": 5}, "line is not a text"),
        ({"closure": "/etc"}, "closure"),
        ({"seeded": {}}, "seeded is not a list"),
        ({"seeded": [1]}, "not a JSON object"),
        ({"seeded": [{"path": "x", "narHash": "y"}]}, "path"),
        ({"loader": []}, "loader is not an object"),
        ({"loader": {}}, "kernel is not a text"),
        ({"loader": {"kernel": "1" * 63, "initrd": "1" * 64, "commandLine": ""}}, "no SHA-256"),
        ({"loader": {"kernel": "1" * 64, "initrd": "1" * 64}}, "commandLine"),
    ],
)
def test_damage_is_named(built, changes, message):
    rewrite(built, **changes)
    with pytest.raises(DamagedError, match=message) as caught:
        load(built.directory)
    assert caught.value.place == str(built.directory / "image.json")


def test_no_json(built):
    (built.directory / "image.json").write_bytes(b"[" * 100_000)
    with pytest.raises(CalveError, match="not JSON"):
        load(built.directory)


def test_another_version(built):
    rewrite(built, version=2)
    with pytest.raises(UsageError, match="version 2"):
        load(built.directory)


def test_nothing_is_there(built):
    (built.directory / "image.json").unlink()
    assert not is_built(built.directory)
    with pytest.raises(NotFoundError, match="no image"):
        load(built.directory)


def test_dm_verity_is_a_partition():
    part = Content(TREE_PARTITION, uuid.UUID(int=1), 1 << 20, 1 << 20, 1 << 20)
    plain = Built(None, DISK, "web")
    assert not plain.has_verity
    assert dataclasses.replace(plain, disk=dataclasses.replace(DISK, partitions=(part,))).has_verity
