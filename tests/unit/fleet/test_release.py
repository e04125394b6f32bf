from __future__ import annotations

import datetime as dt
import json
import threading
from dataclasses import replace

import pytest

from calve.cache.directory import DirectoryObjects
from calve.errors import ConflictError, DamagedError, NotFoundError, UsageError
from calve.fleet import release as module
from calve.fleet.release import Content, Listed, Release, create, listed, read

NOW = dt.datetime(2026, 3, 1, 12, 0, tzinfo=dt.UTC)
SYSTEM = f"/nix/store/{'a' * 32}-nixos-system"
FIRST = Release("web", 1, SYSTEM, "0" * 64, ("ops-1", "ops-2"), NOW)


@pytest.fixture
def objects(tmp_path):
    return DirectoryObjects(tmp_path / "cache")


def make(objects, fleet="web", now=NOW, manifest="0" * 64):
    return create(objects, fleet, Content(SYSTEM, manifest, ("ops-1",)), now=now)


def changed(**fields):
    """Return the record with fields changed; None takes one out."""
    body = {**json.loads(FIRST.dump()), **fields}
    return json.dumps({name: value for name, value in body.items() if value is not None}).encode()


# The record


def test_there_and_back():
    assert Release.parse(FIRST.dump(), "p") == FIRST
    assert FIRST.dump().endswith(b"\n")
    assert FIRST.key == "fleets/web/releases/00000001.json"
    assert replace(FIRST, number=12345678).key == "fleets/web/releases/12345678.json"


def test_fields_of_a_later_calve_are_ignored():
    assert Release.parse(changed(note={"by": "me"}), "p") == FIRST


def test_what_a_machine_is_told():
    told = FIRST.user_data(("s3://nix?region=eu-west-1",), deadline_s=90)
    assert (told.system, told.manifest, told.keys) == (SYSTEM, "0" * 64, ("ops-1", "ops-2"))
    assert (told.fleet, told.release, told.deadline_s) == ("web", 1, 90)
    assert told.caches == ("s3://nix?region=eu-west-1",)


@pytest.mark.parametrize("version", [2, 0, 10**18])
def test_another_version_is_refused_with_advice(version):
    with pytest.raises(UsageError, match=f"version {version}") as caught:
        Release.parse(changed(version=version), "s3://nix/x")
    assert caught.value.hint
    assert caught.value.place == "s3://nix/x"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"[" * 100_000,
        FIRST.dump()[:-10],
        FIRST.dump() + bytes(70_000),
        changed(version=None),
        changed(version="1"),
        changed(version=True),
        changed(version=-1),
        changed(fleet=None),
        changed(fleet="Web"),
        changed(fleet="../web"),
        changed(number=None),
        changed(number=0),
        changed(number=-1),
        changed(number=True),
        changed(number=1.5),
        changed(number="1"),
        changed(number=100_000_000),
        FIRST.dump().replace(b'"number": 1', b'"number": 1e400'),
        FIRST.dump().replace(b'"number": 1', b'"number": NaN'),
        FIRST.dump().replace(b'"number": 1', b'"number": ' + b"9" * 5000),
        changed(system=None),
        changed(system="/etc/passwd"),
        changed(system=f"{SYSTEM}/bin"),
        changed(manifest="0" * 63),
        changed(manifest="../../x"),
        changed(keys="ops-1"),
        changed(keys=[1]),
        changed(created=None),
        changed(created=5),
        changed(created="yesterday"),
        changed(created="2026-13-01T00:00:00+00:00"),
        changed(created="2026-03-01T12:00:00"),
    ],
)
def test_damage(data):
    with pytest.raises(DamagedError) as caught:
        Release.parse(data, "s3://nix/x")
    assert (caught.value.place or "").startswith("s3://nix/x")


# Names


@pytest.mark.parametrize("fleet", ["web", "0", "a-b-c", "a" * 63])
def test_names_that_a_fleet_can_have(objects, fleet):
    assert make(objects, fleet).key == f"fleets/{fleet}/releases/00000001.json"


@pytest.mark.parametrize(
    "fleet", ["", "-a", "Web", "a_b", "a/b", "..", "a\n", "\u0663", "a" * 64, "*"]
)
def test_names_that_no_fleet_has(objects, fleet):
    for act in (make, listed, lambda objects, fleet: read(objects, fleet, 1)):
        with pytest.raises(UsageError, match="no fleet's name") as caught:
            act(objects, fleet)
        assert caught.value.hint


# Numbers


def test_numbers_go_up_by_one_in_each_fleet(objects):
    assert listed(objects, "web").latest == 0
    assert [make(objects).number for _ in range(3)] == [1, 2, 3]
    assert make(objects, "web-2").number == 1
    assert listed(objects, "web").latest == 3
    assert listed(objects, "web-2").latest == 1
    assert read(objects, "web", 2).number == 2
    for number in (0, 4):
        with pytest.raises(NotFoundError):
            read(objects, "web", number)


def test_other_objects_beside_them_do_not_count(objects):
    make(objects)
    for name in ("00000009.json.bak", "9.json", "000000009.json", "latest.json", "00000008/x.json"):
        objects.put(f"fleets/web/releases/{name}", b"")
    objects.put("fleets/web/rollouts/00000007.json", b"")
    assert listed(objects, "web").latest == 1
    assert make(objects).number == 2


def test_a_number_that_another_took_meanwhile_is_left_to_them(objects, monkeypatch):
    theirs = make(objects, manifest="1" * 64)
    monkeypatch.setattr(
        module, "listed", lambda *_: Listed((), {})
    )  # asked before theirs was there
    ours = make(objects)
    assert (theirs.number, ours.number) == (1, 2)
    assert read(objects, "web", 1) == theirs
    assert read(objects, "web", 2) == ours


def test_many_at_once_get_a_number_each(objects):
    gate = threading.Barrier(8)
    made = []

    def one(number):
        gate.wait()
        made.append(make(objects, manifest=str(number) * 64))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.number for each in made) == list(range(1, 9))
    for each in made:
        assert read(objects, "web", each.number) == each


def test_who_gets_none_is_told_to_try_again(objects, monkeypatch):
    for _ in range(module._TRIES):
        make(objects)
    monkeypatch.setattr(module, "listed", lambda *_: Listed((), {}))
    with pytest.raises(ConflictError, match="web") as caught:
        make(objects)
    assert caught.value.hint


def test_no_number_has_more_than_eight_digits(objects):
    objects.put("fleets/web/releases/99999998.json", b"")
    assert make(objects).number == 99_999_999
    with pytest.raises(ConflictError):
        make(objects)
    assert len(list(objects.list("fleets/web/releases/"))) == 2


def test_a_record_under_another_s_key_is_damage(objects):
    for fleet, number in (("web", 2), ("api", 1)):
        objects.put(f"fleets/{fleet}/releases/{number:08d}.json", FIRST.dump())
        with pytest.raises(DamagedError, match="release 1 of web"):
            read(objects, fleet, number)


def test_a_record_that_is_too_long_is_not_read(objects):
    objects.put(FIRST.key, FIRST.dump() + b" " * (1 << 17))
    with pytest.raises(DamagedError):
        read(objects, "web", 1)


def test_the_number_of_a_record_that_was_removed_is_not_used_again(objects):
    make(objects)
    objects.put("fleets/web/releases/00000002/verdict.json", b"")
    assert listed(objects, "web").latest == 1
    assert make(objects).number == 3
