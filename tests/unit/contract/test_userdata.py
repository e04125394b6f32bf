"""User data: round trip, and each way of not being usable told apart."""

import dataclasses
import json
from pathlib import Path

import pytest

from calve.contract.codes import Code
from calve.contract.health import Health, Http
from calve.contract.userdata import Hook, UserData, UserDataError

DATA = Path(__file__).parent / "data"

GOOD = UserData(
    system="/nix/store/" + "a" * 32 + "-system",
    caches=("s3://bucket?region=eu-central-1",),
    manifest="0" * 64,
    keys=("acme-1",),
    fleet="web",
    release=7,
)


def changed(**fields):
    document = json.loads(GOOD.dump())
    document["calve"].update(fields)
    return json.dumps(document).encode()


def test_round_trip():
    assert UserData.parse(GOOD.dump()) == GOOD


def test_round_trip_of_what_may_be_missing():
    full = dataclasses.replace(
        GOOD,
        health=Health(http=(Http("/healthz", 8080),), tcp=(22,), within_s=30),
        hook=Hook("web servers", "calve/launch-1", "http://169.254.169.249"),
        reports="boot-reports/AROAEXAMPLE",
    )
    assert UserData.parse(full.dump()) == full


@pytest.mark.parametrize("name", ["userdata-1-first.json", "userdata-1-hook.json"])
def test_every_document_that_was_ever_written_is_read(name):
    data = (DATA / name).read_bytes()
    found = UserData.parse(data)
    assert (found.fleet, found.release, found.deadline_s) == ("web", 7, 600)
    assert (found.hook is not None) == ("hook" in name)
    assert json.loads(found.dump()) == json.loads(data)


def test_unknown_fields_and_another_reader_s_members_are_ignored():
    document = json.loads(changed(colour="blue"))
    document["systemd.credentials"] = [{"name": "x", "text": "y"}]
    assert UserData.parse(json.dumps(document).encode()) == GOOD


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (None, Code.USERDATA_ABSENT),
        (b"", Code.USERDATA_ABSENT),
        (b"#!/bin/sh\necho hello", Code.USERDATA_FOREIGN),
        (b"\xff\xfe", Code.USERDATA_FOREIGN),
        (b"[1]", Code.USERDATA_FOREIGN),
        (b"[" * 10_000, Code.USERDATA_FOREIGN),
        (b'{"other": 1}', Code.USERDATA_FOREIGN),
        (b'{"calve": 3}', Code.USERDATA_MALFORMED),
        (b'{"calve": {}}', Code.USERDATA_MALFORMED),
        (changed(version=2), Code.USERDATA_VERSION),
        (changed(system="/etc/passwd"), Code.USERDATA_MALFORMED),
        (changed(system="/nix/store/" + "a" * 32 + "-../../x"), Code.USERDATA_MALFORMED),
        (changed(manifest="0" * 63), Code.USERDATA_MALFORMED),
        (changed(caches=[]), Code.USERDATA_MALFORMED),
        (changed(caches="s3://x"), Code.USERDATA_MALFORMED),
        (changed(keys=[1]), Code.USERDATA_MALFORMED),
        (changed(release="7"), Code.USERDATA_MALFORMED),
        (changed(deadline_s=0), Code.USERDATA_MALFORMED),
        (changed(deadline_s=True), Code.USERDATA_MALFORMED),
        (changed(health=[]), Code.USERDATA_MALFORMED),
        (changed(health={"tcp": ["80"]}), Code.USERDATA_MALFORMED),
        (changed(hook="calve"), Code.USERDATA_MALFORMED),
        (changed(hook={"group": "web"}), Code.USERDATA_MALFORMED),
        (changed(hook={"group": "a:b", "name": "x"}), Code.USERDATA_MALFORMED),
        (changed(hook={"group": "web", "name": "a b"}), Code.USERDATA_MALFORMED),
        (
            changed(hook={"group": "web", "name": "x", "endpoint": "ftp://x"}),
            Code.USERDATA_MALFORMED,
        ),
        (changed(reports="../elsewhere"), Code.USERDATA_MALFORMED),
        (changed(reports="/boot-reports"), Code.USERDATA_MALFORMED),
        (changed(reports=7), Code.USERDATA_MALFORMED),
    ],
)
def test_what_cannot_be_used_has_its_code(data, code):
    with pytest.raises(UserDataError) as caught:
        UserData.parse(data)
    assert caught.value.code is code


def test_more_than_ec2_takes_is_refused_when_written():
    with pytest.raises(UserDataError, match="16 KiB"):
        UserData(
            **{**{f: getattr(GOOD, f) for f in GOOD.__slots__}, "caches": ("x" * 17000,)}
        ).dump()
