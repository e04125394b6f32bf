"""Health v1: what is read, what is refused, and how closure and user data add up."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calve.contract.health import Health, Http
from calve.errors import DamagedError

WHOLE = Health((Http("/healthz"), Http("/ready", 8080)), (22, 443), ("nginx.service",), "true", 30)


def test_the_file_comes_back_as_it_was_written():
    assert Health.parse_file(WHOLE.dump_file(), "x") == WHOLE


def test_a_command_may_have_several_lines():
    health = Health(command="set -e\ntest -e /run/ready\n")
    assert Health.parse_file(health.dump_file(), "x") == health
    with pytest.raises(DamagedError, match="command must be a shell command"):
        Health.parse_file(Health(command="a\0b").dump_file(), "x")


def test_user_data_brings_no_program():
    body = {**WHOLE.dump(), "command": "rm -rf /", "units": ["evil.service"]}
    assert Health.parse(body, "x") == Health(WHOLE.http, WHOLE.tcp, within_s=30)


def test_both_must_hold_within_the_first_one_s_time():
    said = Health((Http("/healthz"), Http("/other")), (443,), within_s=10)
    assert said.with_more(WHOLE) == Health(
        (Http("/healthz"), Http("/other"), Http("/ready", 8080)),
        (443, 22),
        ("nginx.service",),
        "true",
        10,
    )


def test_what_is_left_out_has_defaults_and_what_is_unknown_is_passed_over():
    assert Health.parse_file(b'{"version": 1, "later": []}', "x") == Health()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"http": "/healthz"}, "http"),
        ({"http": ["/healthz"]}, "http"),
        ({"http": [{"port": 80}]}, "http.path"),
        ({"http": [{"path": "healthz"}]}, "http.path"),
        ({"http": [{"path": "/a b"}]}, "http.path"),
        ({"http": [{"path": "/a\r\nHost: x"}]}, "http.path"),
        ({"http": [{"path": "/ü"}]}, "http.path"),
        ({"http": [{"path": "/", "port": 0}]}, "http.port"),
        ({"http": [{"path": "/", "port": True}]}, "http.port"),
        ({"tcp": [65536]}, "tcp"),
        ({"tcp": [22] * 65}, "tcp"),
        ({"units": [7]}, "units"),
        ({"command": ["true"]}, "command"),
        ({"within_s": 0}, "within_s"),
        ({"within_s": 3601}, "within_s"),
        ({"within_s": 2.5}, "within_s"),
        ({"version": 2}, "version"),
    ],
)
def test_what_is_wrong_is_named(change, word):
    data = json.dumps({"version": 1, **change}).encode()
    with pytest.raises(DamagedError, match=word) as caught:
        Health.parse_file(data, "/etc/calve/health.json")
    assert caught.value.place == "/etc/calve/health.json"


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"[" * 100_000, b" " * 70_000, b"\xff"])
def test_what_is_no_such_file(data):
    with pytest.raises(DamagedError):
        Health.parse_file(data, "x")


NAMES = st.sampled_from(["http", "tcp", "within_s", "path", "port"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
)


@given(VALUES)
def test_anything_is_read_or_refused(body):
    try:
        found = Health.parse(body, "x")
    except DamagedError:
        return
    assert Health.parse(found.dump(), "x") == found
