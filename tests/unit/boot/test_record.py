"""The committed set: round trip, what damage leaves of it, and what roots reach."""

from __future__ import annotations

import json

import pytest

from calve.boot.record import Record, dump_sequences, parse_sequences, reachable
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath


def made(letter, *references, deriver=None):
    path = StorePath(letter * 32, f"name-{letter}")
    return PathInfo(
        path,
        Hash.sha256(letter.encode()),
        100 + ord(letter),
        tuple(sorted(StorePath(one * 32, f"name-{one}") for one in references)),
        deriver,
    )


A, B, C = made("a"), made("b", "a", "b"), made("c", "b", deriver=StorePath("d" * 32, "c.drv"))
RECORD = Record({A.path: A, B.path: B}, {C.path: C})


def test_round_trip():
    assert Record.parse(RECORD.dump()) == RECORD
    assert Record.parse(Record({}, {}).dump()) == Record({}, {})


def test_the_same_set_gives_the_same_bytes():
    assert Record({B.path: B, A.path: A}, {C.path: C}).dump() == RECORD.dump()


def changed(**fields):
    return json.dumps(json.loads(RECORD.dump()) | fields).encode()


def test_unknown_fields_are_ignored():
    assert Record.parse(changed(later=1)) == RECORD


ROW = json.loads(RECORD.dump())["fetched"][0]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xff",
        b"\0" * 4096,
        b"[]",
        b"7",
        b"null",
        b"[" * 100_000,
        RECORD.dump()[:-1],
        RECORD.dump()[: len(RECORD.dump()) // 2],
        changed(version=2),
        changed(version=None),
        changed(version="1"),
        changed(committed=None),
        changed(fetched={"a": 1}),
        changed(fetched=[7]),
        changed(fetched=[{}]),
        changed(fetched=[ROW | {"path": "../../etc"}]),
        changed(fetched=[ROW | {"narHash": "sha256-AAAA"}]),
        changed(fetched=[ROW | {"narSize": "many"}]),
        changed(fetched=[ROW | {"narSize": None}]),
        changed(fetched=[ROW | {"narSize": float("inf")}]),
        changed(fetched=[ROW | {"references": 7}]),
        changed(fetched=[ROW | {"references": ["x"]}]),
        changed(fetched=[ROW | {"deriver": 3}]),
    ],
)
def test_damage_or_a_newer_version_is_an_empty_record(data):
    assert Record.parse(data) == Record({}, {})


def test_reachable():
    infos = {info.path: info for info in (A, B, C)}
    assert reachable(infos, [C.path]) == infos
    assert reachable(infos, [B.path]) == {A.path: A, B.path: B}
    assert reachable(infos, []) == {}
    assert reachable(infos, [StorePath("x" * 32, "gone")]) == {}
    # A path that is not there is passed over; whether that matters is `BootStore.whole`'s to say.
    assert reachable({C.path: C}, [C.path]) == {C.path: C}


def test_sequences_of_keyrings_are_kept():
    assert parse_sequences(dump_sequences({"s3://b": 7, "s3://a": 1 << 62})) == {
        "s3://a": 1 << 62,
        "s3://b": 7,
    }
    assert dump_sequences({"s3://a": 1}) == b'{"version":1,"sequences":{"s3://a":1}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"[]",
        b'{"version":2,"sequences":{}}',
        b'{"version":1}',
        b'{"version":1,"sequences":{"a":"x"}}',
    ],
)
def test_of_damaged_ones_nothing_is_known(data):
    assert parse_sequences(data) == {}
