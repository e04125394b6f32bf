"""Names over TCP and UDP."""

from __future__ import annotations

import contextlib
import socket
import struct

import pytest

from calve.region.resolver import Resolver

A, AAAA, MX = 1, 28, 15
NO_ERROR, FORMAT_ERROR, NO_NAME, NOT_IMPLEMENTED = 0, 1, 3, 4


@pytest.fixture
def resolver():
    table = {
        "*.s3.test-region.calve.test": "10.0.2.100",
        "s3.test-region.calve.test": "10.0.2.101",
        "One.s3.test-region.calve.test.": "10.0.2.102",
    }
    with Resolver(table) as resolver:
        yield resolver


def query(name, kind=A, *, flags=0x0100, count=1, tail=b""):
    question = b"".join(bytes([len(x)]) + x.encode() for x in name.split(".")) + b"\0"
    return (
        struct.pack(">HHHHHH", 0x1234, flags, count, 0, 0, bool(tail))
        + question
        + struct.pack(">HH", kind, 1)
        + tail
    )


def over_tcp(resolver, *messages):
    """Send all messages, then read all replies until the other side closes."""
    with socket.create_connection(("127.0.0.1", resolver.port), timeout=5) as sock:
        for message in messages:
            sock.sendall(len(message).to_bytes(2, "big") + message)
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while more := sock.recv(4096):
            data += more
    replies = []
    while data:
        size = int.from_bytes(data[:2], "big")
        replies.append(data[2 : 2 + size])
        data = data[2 + size :]
    return replies


def over_udp(resolver, message):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(message, ("127.0.0.1", resolver.port))
        return sock.recv(512)


def meaning(reply):
    """Return code and addresses of a reply."""
    identifier, flags, _, answers, *_ = struct.unpack_from(">HHHHHH", reply)
    assert identifier == 0x1234
    assert flags & 0x8000
    found = [socket.inet_ntoa(reply[-4:])] if answers else []
    return flags & 15, found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nix.s3.test-region.calve.test", (NO_ERROR, ["10.0.2.100"])),
        ("a.b.s3.test-region.calve.test", (NO_ERROR, ["10.0.2.100"])),
        ("NIX.S3.Test-Region.Calve.Test", (NO_ERROR, ["10.0.2.100"])),
        ("s3.test-region.calve.test", (NO_ERROR, ["10.0.2.101"])),
        ("one.s3.test-region.calve.test", (NO_ERROR, ["10.0.2.102"])),
        ("test-region.calve.test", (NO_NAME, [])),
        ("example.org", (NO_NAME, [])),
    ],
)
def test_names(resolver, name, expected):
    assert meaning(over_udp(resolver, query(name))) == expected
    assert [meaning(reply) for reply in over_tcp(resolver, query(name))] == [expected]


def test_the_question_is_repeated_as_it_was(resolver):
    asked = query("NIX.s3.test-region.calve.test")
    (reply,) = over_tcp(resolver, asked)
    assert reply[12 : len(asked)] == asked[12:]
    assert reply[len(asked) :][:2] == b"\xc0\x0c"


def test_other_types_are_empty(resolver):
    for kind in (AAAA, MX):
        assert meaning(over_udp(resolver, query("s3.test-region.calve.test", kind))) == (
            NO_ERROR,
            [],
        )
    assert meaning(over_udp(resolver, query("none.test", AAAA))) == (NO_NAME, [])


def test_many_on_one_connection(resolver):
    names = ["s3.test-region.calve.test", "none.test"] * 2
    kinds = [A, AAAA, A, A]
    replies = over_tcp(resolver, *(query(n, k) for n, k in zip(names, kinds, strict=True)))
    assert [meaning(reply)[0] for reply in replies] == [NO_ERROR, NO_NAME, NO_ERROR, NO_NAME]
    assert resolver.queries == names


def test_edns_is_ignored(resolver):
    tail = b"\0" + struct.pack(">HHIH", 41, 1232, 0, 0)
    assert meaning(over_udp(resolver, query("s3.test-region.calve.test", tail=tail)))[1]


def test_names_can_be_added(resolver):
    resolver.add("new.test", "10.0.2.9")
    assert meaning(over_udp(resolver, query("new.test"))) == (NO_ERROR, ["10.0.2.9"])


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (query("a.test", flags=0x2800), NOT_IMPLEMENTED),
        (query("a.test", count=0), FORMAT_ERROR),
        (query("a.test", count=2), FORMAT_ERROR),
        (query("a.test")[:-3], FORMAT_ERROR),
        (query("a.test")[:14], FORMAT_ERROR),
        (query("a.test")[:12], FORMAT_ERROR),
        (query("a.test")[:12] + b"\xc0\x0c" + bytes(4), FORMAT_ERROR),
        (query("a.test")[:12] + b"\x40" + b"a" * 64 + bytes(5), FORMAT_ERROR),
        (query("a.test")[:12] + (b"\x3f" + b"a" * 63) * 5 + bytes(5), FORMAT_ERROR),
    ],
)
def test_malformed_questions(resolver, message, code):
    assert meaning(over_udp(resolver, message)) == (code, [])
    assert [meaning(reply) for reply in over_tcp(resolver, message)] == [(code, [])]


@pytest.mark.parametrize("message", [b"", b"x" * 11, query("a.test", flags=0x8100)])
def test_what_is_no_query_is_ignored(resolver, message):
    (reply,) = over_tcp(resolver, message, query("s3.test-region.calve.test"))
    assert meaning(reply)[0] == NO_ERROR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(message, ("127.0.0.1", resolver.port))
    assert meaning(over_udp(resolver, query("s3.test-region.calve.test")))[0] == NO_ERROR


def test_a_message_that_breaks_off(resolver):
    with socket.create_connection(("127.0.0.1", resolver.port), timeout=5) as sock:
        sock.sendall(b"\x00\xff\x12")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""


def test_the_end_waits_for_nobody():
    with Resolver({"a.test": "10.0.0.1"}) as resolver:
        sock = socket.create_connection(("127.0.0.1", resolver.port), timeout=5)
        port = resolver.port
    with sock, contextlib.suppress(ConnectionResetError):  # it may not have been accepted yet
        assert sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
