"""The image's policy: round trip, defaults, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calve.boot.policy import Policy
from calve.errors import UsageError

POLICY = Policy(
    keys=("a-1:AAAA", "b-1:BBBB"),
    root=Path("/mnt"),
    imds="http://127.0.0.1:8",
    ca_file="/etc/calve/ca.pem",
    hold_s=1.5,
    memory_mb=64,
)


def test_round_trip():
    assert Policy.parse(POLICY.dump(), "x") == POLICY


def test_defaults():
    assert Policy.parse(b'{"version": 1, "keys": ["k:AA"], "later": {}}', "x") == Policy(("k:AA",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"version": 2}',
        b'{"version": 1, "keys": "a"}',
        b'{"version": 1, "root": 1}',
        b'{"version": 1, "memory_mb": "48"}',
        b'{"version": 1, "hold_s": null}',
    ],
)
def test_what_is_no_policy_is_refused_with_its_place(data):
    with pytest.raises(UsageError) as caught:
        Policy.parse(data, "/etc/calve/agent.json")
    assert caught.value.place == "/etc/calve/agent.json"


@pytest.mark.parametrize(
    ("line", "hold_s"),
    [
        ("console=ttyS0 calve.hold=5 quiet\n", 5.0),
        ("calve.hold=0", 0.0),
        ("calve.hold=5 calve.hold=7", 7.0),
        ("calve.hold=-1", 1.5),
        ("calve.hold=abc", 1.5),
        ("calve.hold=", 1.5),
        ("calve.hold=\u00b2", 1.5),
        ("xcalve.hold=9 calve.keys=evil calve.root=/", 1.5),
        ("", 1.5),
    ],
)
def test_the_command_line_sets_the_hold_and_nothing_else(line, hold_s):
    made = POLICY.with_command_line(line)
    assert made.hold_s == hold_s
    assert Policy.parse(made.dump(), "x").keys == POLICY.keys
    assert json.loads(made.dump()) | {"hold_s": 0} == json.loads(POLICY.dump()) | {"hold_s": 0}
