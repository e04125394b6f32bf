from __future__ import annotations

import re

import pytest

from calve.errors import (
    AccessError,
    CancelledError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    TransientError,
)
from calve.tasks import Cancel
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client
from calve.transport.resume import ResumingReader
from calve.transport.retry import Policy
from calve.transport.sigv4 import Signer

BODY = bytes(range(256)) * 512  # 128 KiB
STEP = 30_000


class Breaking:
    """An object whose every answer breaks after `step` bytes."""

    def __init__(self, body=BODY, step=STEP, etag='"1"', how="reset"):
        self.body, self.step, self.etag, self.how = body, step, etag, how

    def __call__(self, wire, request):
        if request.headers.get("if-match", self.etag) != self.etag:
            wire.answer(status="412 Precondition Failed")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        start = int(found[1]) if found else 0
        total = len(self.body)
        stop = min(int(found[2]) + 1, total) if found and found[2] else total
        head = f"HTTP/1.1 206 x\r\nContent-Range: bytes {start}-{stop - 1}/{total}\r\n"
        if not found:
            head = "HTTP/1.1 200 OK\r\n"
        tag = f"ETag: {self.etag}\r\n" if self.etag else ""
        rest = self.body[start:stop]
        wire.send(f"{head}{tag}Content-Length: {len(rest)}\r\n\r\n".encode() + rest[: self.step])
        if len(rest) > self.step:
            if self.how == "reset":
                wire.hang_up()
            getattr(wire, self.how)()


def drain(reader, size=65536):
    pieces = []
    while data := reader.read(size):
        pieces.append(data)
    return b"".join(pieces)


@pytest.fixture
def reader(client, clock):
    def make(server, **kwargs):
        return ResumingReader(client, f"{server.url}/k", clock=clock, **kwargs)

    return make


def test_a_whole_object(serve, reader):
    server = serve(Breaking(step=1 << 20))
    with reader(server) as source:
        assert source.size_bytes is None
        assert drain(source) == BODY
        assert (source.size_bytes, source.offset_bytes) == (len(BODY), len(BODY))
        assert source.read() == b""
    assert len(server.requests) == 1


@pytest.mark.parametrize("etag", ['"1"', 'W/"1"', ""])
def test_a_body_that_breaks_goes_on(serve, reader, clock, etag):
    server = serve(Breaking(etag=etag))
    with reader(server) as source:
        assert drain(source) == BODY
    assert [request.headers.get("range") for request in server.requests] == [
        None,
        "bytes=30000-",
        "bytes=60000-",
        "bytes=90000-",
        "bytes=120000-",
    ]
    matches = {request.headers.get("if-match") for request in server.requests[1:]}
    assert matches == ({'"1"'} if etag == '"1"' else {None})
    assert len(clock.waits) == 4


def test_a_stall_goes_on(serve, hasty, clock):
    server = serve(Breaking(step=100_000, how="stall"))
    with ResumingReader(hasty, server.url, clock=clock) as source:
        assert drain(source) == BODY
    assert len(server.requests) == 2


def test_503_then_ok(serve, reader, clock):
    whole = Breaking(step=1 << 20)

    def handler(wire, request):
        if request.number < 3:
            wire.answer(status="503 Busy", Retry_After="5")
        else:
            whole(wire, request)

    server = serve(handler)
    with reader(server) as source:
        assert drain(source) == BODY
    assert clock.waits == [5, 5]


def test_from_an_offset(serve, reader):
    server = serve(Breaking())
    with reader(server, offset_bytes=100_000, size_bytes=len(BODY)) as source:
        assert drain(source, 1000) == BODY[100_000:]
    assert server.requests[0].headers["range"] == "bytes=100000-"


def test_from_the_very_end(serve, reader):
    server = serve(Breaking())
    with reader(server, offset_bytes=len(BODY), size_bytes=len(BODY)) as source:
        assert source.read() == b""
    assert not server.requests


def test_an_empty_object(serve, reader):
    server = serve(Breaking(body=b""))
    with reader(server, size_bytes=0) as source:
        assert source.read() == b""
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("before", "after"), [('"1"', '"2"'), ('"1"', ""), ('W/"1"', 'W/"2"'), ('W/"1"', "")]
)
def test_it_changed_while_it_was_read(serve, reader, before, after):
    first, second = Breaking(etag=before), Breaking(etag=after)
    server = serve(lambda wire, request: (first if request.number == 1 else second)(wire, request))
    with reader(server) as source, pytest.raises(DamagedError, match="changed"):
        drain(source)
    assert len(server.requests) == 2


def test_it_changed_before_a_byte_was_read(serve, reader):
    first, second = Breaking(step=0), Breaking(BODY[:10], etag='"2"')
    server = serve(lambda wire, request: (first if request.number == 1 else second)(wire, request))
    with reader(server) as source:
        assert drain(source) == BODY[:10]
        assert source.size_bytes == 10


@pytest.mark.parametrize(
    ("status", "content_range"),
    [
        ("206 x", "bytes 0-131071/131072"),
        ("206 x", "bytes 30001-131071/131072"),
        ("206 x", "bytes 30000-40000/131072"),
        ("206 x", "bytes 30000-131071/131073"),
        ("206 x", "bytes 30000-131072/131073"),
        ("206 x", "lines 1-2/3"),
        ("206 x", ""),
        ("200 OK", ""),
        ("204 No", ""),
    ],
)
def test_another_part_than_was_asked(serve, reader, status, content_range):
    first = Breaking()

    def handler(wire, request):
        if request.number == 1:
            first(wire, request)
        else:
            wire.answer(b"x", status=status, Content_Range=content_range, ETag='"1"')

    server = serve(handler)
    with reader(server) as source, pytest.raises(DamagedError):
        drain(source)
    assert len(server.requests) == 2


def test_another_size_than_expected(serve, reader):
    server = serve(Breaking())
    with reader(server, size_bytes=5) as source, pytest.raises(DamagedError, match="not 5"):
        source.read()


def test_a_chunked_body_of_another_size(serve, reader, clock):
    def handler(wire, request):
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")

    server = serve(handler)
    with reader(server) as source:
        assert drain(source) == b"ab"
    with reader(server, size_bytes=5) as source, pytest.raises(DamagedError):
        drain(source)


def test_no_progress_is_bounded(serve, reader):
    first = Breaking()

    def handler(wire, request):
        if request.number > 1:
            wire.hang_up()
        first(wire, request)

    server = serve(handler)
    with reader(server, policy=Policy(attempts=4)) as source:
        assert source.read() != b""
        with pytest.raises(TransientError, match="after 4 attempts"):
            drain(source)
    assert len(server.requests) == 5 - 1  # the break itself is the first attempt


def test_no_progress_until_the_deadline(serve, reader):
    server = serve(lambda wire, _: wire.hang_up())
    with (
        reader(server, policy=Policy(attempts=None, deadline_s=30), rng=lambda: 1.0) as source,
        pytest.raises(DeadlineError),
    ):
        source.read()


@pytest.mark.parametrize(
    ("status", "kind"),
    [("404 x", NotFoundError), ("403 x", AccessError), ("416 x", DamagedError)],
)
def test_permanent_errors_stop_at_once(serve, reader, status, kind):
    first = Breaking()

    def handler(wire, request):
        if request.number == 1:
            first(wire, request)
        else:
            wire.answer(status=status)

    server = serve(handler)
    with reader(server) as source, pytest.raises(kind):
        drain(source)
    assert len(server.requests) == 2


def test_every_part_is_signed(serve, client, clock):
    server = serve(Breaking())
    signer = Signer("s3", "r", Static(Credentials("A", "s")), clock=clock)
    url = f"{server.url}/k"
    with ResumingReader(client, url, signer=signer, headers={"X-A": "b"}, clock=clock) as source:
        assert drain(source) == BODY
    assert len({request.headers["authorization"] for request in server.requests}) == 5
    assert all("host;if-match;range;x-a" in r.headers["authorization"] for r in server.requests[1:])


def test_cancel(serve, clock):
    server = serve(Breaking())
    cancel = Cancel()
    with (
        Client(cancel=cancel) as client,
        ResumingReader(
            client, server.url, clock=clock, on_retry=lambda *_: cancel.cancel()
        ) as source,
        pytest.raises(CancelledError),
    ):
        drain(source)


def test_closed_early(serve, reader):
    server = serve(Breaking())
    with reader(server) as source:
        source.read(10)
    assert source.read() == b""


# Ranges


def test_a_range(serve, reader):
    server = serve(Breaking(step=1 << 20))
    with reader(server, offset_bytes=1000, end_bytes=90_000) as source:
        assert drain(source, 777) == BODY[1000:90_000]
        assert (source.offset_bytes, source.size_bytes) == (90_000, len(BODY))
    assert [request.headers["range"] for request in server.requests] == ["bytes=1000-89999"]


@pytest.mark.parametrize("etag", ['"1"', ""])
def test_a_range_that_breaks_goes_on_within_itself(serve, reader, etag):
    server = serve(Breaking(etag=etag))
    with reader(server, end_bytes=75_000) as source:
        assert drain(source) == BODY[:75_000]
    assert [request.headers["range"] for request in server.requests] == [
        "bytes=0-74999",
        "bytes=30000-74999",
        "bytes=60000-74999",
    ]


def test_a_range_that_breaks_at_its_very_end(serve, reader):
    server = serve(Breaking(step=30_000))
    with reader(server, offset_bytes=5, end_bytes=30_005) as source:
        assert drain(source) == BODY[5:30_005]
    assert len(server.requests) == 1


def test_an_empty_range_is_not_asked_for(serve, reader):
    server = serve(Breaking())
    for at in (0, 100):
        with reader(server, offset_bytes=at, end_bytes=at) as source:
            assert source.read() == b""
    assert not server.requests


def test_the_whole_as_a_range(serve, reader):
    """A server that knows no ranges gives what was asked for all the same."""
    server = serve(lambda wire, _: wire.answer(BODY))
    with reader(server, end_bytes=len(BODY)) as source:
        assert drain(source) == BODY


@pytest.mark.parametrize(("start", "end"), [(0, 100), (0, len(BODY) + 1), (5, 100), (5, len(BODY))])
def test_the_whole_instead_of_a_range(serve, reader, start, end):
    server = serve(lambda wire, _: wire.answer(BODY))
    with (
        reader(server, offset_bytes=start, end_bytes=end) as source,
        pytest.raises(DamagedError, match="answered 200 to a range"),
    ):
        source.read()


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 10-98/1000",  # less
        "bytes 10-100/1000",  # more
        "bytes 11-99/1000",
        "bytes 10-99/99",  # beyond the end
        "bytes 10-49/50",  # what there is of it
        "bytes 10-98/*",
        "bytes */1000",
    ],
)
def test_another_range_than_was_asked(serve, reader, content_range):
    server = serve(
        lambda wire, _: wire.answer(b"x" * 90, status="206 x", Content_Range=content_range)
    )
    with reader(server, offset_bytes=10, end_bytes=100) as source, pytest.raises(DamagedError):
        drain(source)
    assert len(server.requests) == 1


def test_more_bytes_than_the_range_has(serve, reader):
    server = serve(
        lambda wire, _: wire.answer(b"x" * 91, status="206 x", Content_Range="bytes 10-99/1000")
    )
    with (
        reader(server, offset_bytes=10, end_bytes=100) as source,
        pytest.raises(DamagedError, match="more than was asked"),
    ):
        drain(source, 50)


def test_fewer_bytes_than_the_range_has_are_read_on(serve, reader):
    def handler(wire, request):
        start = int(re.match(r"bytes=(\d+)", request.headers["range"])[1])
        body = b"x" * min(40, 100 - start)
        wire.answer(body, status="206 x", Content_Range=f"bytes {start}-99/1000")

    server = serve(handler)
    with reader(server, offset_bytes=10, end_bytes=100) as source:
        assert drain(source) == b"x" * 90
    assert len(server.requests) == 3


def test_the_total_size_may_not_change_between_parts(serve, reader):
    first, second = Breaking(etag=""), Breaking(BODY + b"!", etag="")
    server = serve(lambda wire, request: (first if request.number == 1 else second)(wire, request))
    with (
        reader(server, end_bytes=60_000) as source,
        pytest.raises(DamagedError, match="not 131072"),
    ):
        drain(source)
