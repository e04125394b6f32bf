"""The HTTP server: messages, malformed ones, faults, and an end that leaves nothing."""

from __future__ import annotations

import http.client
import os
import socket
import threading
from dataclasses import replace

import pytest

from calve.errors import CalveError
from calve.region import objects_xml
from calve.region.faults import (
    Answer,
    Delay,
    FaultPlan,
    Flip,
    Lost,
    Reset,
    Silent,
    Stall,
    Trickle,
    Truncate,
)
from calve.region.message import FileRange, Response
from calve.region.server import Server
from calve.region.signature import Allow

CONTENT = bytes(range(256)) * 1200


def echo(request):
    """Answer with the request's body, or the content where there is none."""
    body = request.body.read_all(1 << 22)
    headers = {"X-Method": request.method, "X-Path": request.path, "X-Query": request.query}
    return Response(200, headers, body or CONTENT)


@pytest.fixture
def plan():
    return FaultPlan()


@pytest.fixture
def served(plan):
    with Server(echo, faults=plan) as server:
        yield server


@pytest.fixture
def connection(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    yield connection
    connection.close()


def get(connection, path="/k", method="GET", **options):
    connection.request(method, path, **options)
    return connection.getresponse()


# Messages


def test_connections_are_kept(served, connection):
    for number in range(3):
        response = get(connection, f"/a%2Fb?x={number}&y")
        assert response.read() == CONTENT
        assert response.headers["X-Path"] == "/a%2Fb"
        assert response.headers["X-Query"] == f"x={number}&y"
    assert (served.connections, served.requests, served.open_connections) == (1, 3, 1)


def test_head_counts_and_sends_nothing(connection):
    response = get(connection, method="HEAD")
    assert response.headers["Content-Length"] == str(len(CONTENT))
    assert response.read() == b""
    assert get(connection).read() == CONTENT


def test_bodies_of_known_and_unknown_length(connection):
    data = os.urandom(300_000)
    assert get(connection, method="PUT", body=data).read() == data
    chunks = iter([b"one", b"", b"two", data])
    response = get(connection, method="PUT", body=chunks, encode_chunked=True)
    assert response.read() == b"one" + b"two" + data


def test_a_body_that_was_not_read_is_drained(served, connection):
    served.handle = lambda _request: Response(403, {}, b"no")
    for _ in range(2):
        response = get(connection, method="PUT", body=bytes(1_000_000))
        assert (response.status, response.read()) == (403, b"no")
    assert served.connections == 1


def test_parameters(served, connection):
    seen = []

    def handle(request):
        seen.append((request.parameters, request.parameter("b"), request.parameter("z")))
        return Response(204)

    served.handle = handle
    get(connection, "/?a=1&b=x+y%2F&b=2&c").read()
    assert seen == [([("a", "1"), ("b", "x y/"), ("b", "2"), ("c", "")], "x y/", None)]


def test_continue_is_sent_when_the_body_is_wanted(served):
    head = b"PUT /k HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as sock:
        sock.sendall(head)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"body")
        assert b"200 OK" in sock.recv(1000)
    served.handle = lambda _request: Response(412, {}, b"")
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as sock:
        sock.sendall(head)
        answer = b""
        while more := sock.recv(1000):
            answer += more
        assert answer.startswith(b"HTTP/1.1 412 ")
        assert b"Connection: close" in answer


def test_a_piece_of_a_file_is_sent_and_the_file_closed(served, connection, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    opened, sent = [], []

    def handle(_request):
        opened.append((tmp_path / "f").open("rb"))
        return Response(206, {}, FileRange(opened[-1], 1000, 200_000), sent.append)

    served.handle = handle
    assert get(connection).read() == CONTENT[1000:201_000]
    get(connection, method="HEAD").read()
    assert get(connection).read() == CONTENT[1000:201_000]
    get(connection).read()  # the connection's thread is done with what came before
    assert sent[:3] == [200_000, 0, 200_000]
    assert all(file.closed for file in opened[:3])


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET http://other/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (
            b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: a\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", 400),
    ],
)
def test_malformed_requests_are_answered_and_the_connection_closed(served, raw, data, status):
    assert raw(data, served.port).startswith(b"HTTP/1.1 %d " % status)
    assert served.requests == 0


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 5\r\n\r\n1234",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 200,
    ],
)
def test_a_broken_body_gets_no_answer(served, raw, body):
    assert raw(b"PUT / HTTP/1.1\r\nHost: x\r\n" + body, served.port) == b""


def test_an_object_whose_upload_breaks_off_is_not_stored(service, principals, raw):
    principals.set_policy("", [Allow("*")])  # everybody
    head = b"PUT /nix/k HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
    assert raw(head + b"half") == b""
    assert list(service.bucket("nix").root.iterdir()) == []
    assert raw(head + b"the whole").startswith(b"HTTP/1.1 200 ")
    assert service.bucket("nix").keys() == ["k"]


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"PUT /nix/k\xff HTTP/1.1\r\n\r\n", 400, b""),
        (b"PUT /nix/%FF HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 400, b"InvalidURI"),
        (b"PUT /nix/k HTTP/1.1\r\nHost: x\r\n\r\n", 411, b"MissingContentLength"),
        (
            b"PUT /nix/k HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            411,
            b"MissingContentLength",
        ),
        (
            b"PUT /nix/k HTTP/1.1\r\nHost: x\r\nContent-Length: 6000000000\r\n\r\n",
            400,
            b"EntityTooLarge",
        ),
        (b"PATCH /nix/k HTTP/1.1\r\nHost: x\r\n\r\n", 405, b"MethodNotAllowed"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 501, b"NotImplemented"),
    ],
)
def test_requests_that_no_sdk_sends(principals, raw, head, status, code):
    principals.set_policy("", [Allow("*")])
    answer = raw(head)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert not code or b"<Code>%s</Code>" % code in answer


CHUNKED = (
    b"PUT /nix/k HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nContent-Encoding: aws-chunked\r\n"
    b"x-amz-content-sha256: STREAMING-UNSIGNED-PAYLOAD-TRAILER\r\n"
    b"x-amz-trailer: x-amz-checksum-crc32\r\nx-amz-decoded-content-length: 5\r\n\r\n"
)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", b""),
        (b"2\r\nhe\r\n3\r\nllo\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", b""),
        (b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:AAAAAA==\r\n\r\n", b"BadDigest"),
        (b"5\r\nhello\r\n0\r\n\r\n", b"MalformedTrailerError"),
        (b"5\r\nhello\r\n0\r\nx-amz-checksum-crc32:?\r\n\r\n", b"InvalidRequest"),
        (b"4\r\nhell\r\n0\r\nx-amz-checksum-crc32:NhCmhg==\r\n\r\n", b"IncompleteBody"),
        (b"6\r\nhello!\r\n0\r\n\r\n", b"IncompleteBody"),
        (b"5\r\nhello\r\n", b"IncompleteBody"),
        (b"5\r\nhel", b"IncompleteBody"),
        (b"5\r\nhellooo\r\n", b"IncompleteBody"),
        (b"zz\r\n", b"IncompleteBody"),
        (b"", b"IncompleteBody"),
    ],
)
def test_chunks_with_a_trailing_checksum(service, principals, raw, body, code):
    principals.set_policy("", [Allow("*")])
    answer = raw(CHUNKED % len(body) + body)
    if code:
        assert b"<Code>%s</Code>" % code in answer
        assert list(service.bucket("nix").root.iterdir()) == []
    else:
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert service.bucket("nix").get("k").size == 5


@pytest.mark.parametrize(
    "document",
    [
        b"<no",
        b"<Other/>",
        (
            b'<!DOCTYPE x [<!ENTITY a "1">]><CompleteMultipartUpload><Part>'
            b"<PartNumber>&a;</PartNumber><ETag>e</ETag></Part></CompleteMultipartUpload>"
        ),
        b"<CompleteMultipartUpload><Part/></CompleteMultipartUpload>",
        b"\xff\xfe",
    ],
)
def test_malformed_documents(service, principals, raw, document):
    principals.set_policy("", [Allow("*")])
    upload = service.uploads.create(service.bucket("nix"), "k", {})
    head = b"POST /nix/k?uploadId=%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    answer = raw(head % (upload.id.encode(), len(document)) + document)
    assert b"<Code>MalformedXML</Code>" in answer


# Faults


def test_lost_answers(plan, served, connection):
    plan.add(Lost(performed=True)).add(Lost(performed=False))
    for requests in (1, 2):
        with pytest.raises(ConnectionResetError):
            get(connection)
        connection.close()
        assert served.requests == requests
    assert get(connection).read() == CONTENT


def test_lost_after_and_before_it_was_performed(plan, served, connection):
    done = []
    served.handle = lambda request: done.append(request.path) or Response(204)
    plan.add(Lost(performed=True), path="/a").add(Lost(performed=False), path="/b")
    for path in ("/a", "/b"):
        with pytest.raises(ConnectionResetError):
            get(connection, path)
        connection.close()
    assert done == ["/a"]


def test_reset_in_the_middle(plan, connection):
    plan.add(Reset(after_bytes=1000))
    with pytest.raises(ConnectionResetError):
        get(connection).read()


def test_truncated(plan, connection):
    plan.add(Truncate(after_bytes=1000))
    response = get(connection)
    assert response.headers["Content-Length"] == str(len(CONTENT))
    with pytest.raises(http.client.IncompleteRead) as caught:
        response.read()
    assert caught.value.partial == CONTENT[:1000]


def test_flipped(plan, connection):
    plan.add(Flip(offset=300_000))
    data = get(connection).read()
    wrong = [n for n, (a, b) in enumerate(zip(data, CONTENT, strict=True)) if a != b]
    assert wrong == [300_000]
    assert get(connection).read() == CONTENT


def test_flipped_in_a_file(plan, served, connection, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    served.handle = lambda _request: Response(
        200, {}, FileRange((tmp_path / "f").open("rb"), 10, 100)
    )
    plan.add(Flip(offset=7))
    data = get(connection).read()
    assert data[:7] == CONTENT[10:17]
    assert data[7] == CONTENT[17] ^ 0xFF


def test_stalled_until_the_client_gives_up(plan, served):
    plan.add(Stall(after_bytes=10))
    with socket.create_connection(("127.0.0.1", served.port), timeout=0.2) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        with pytest.raises(TimeoutError):
            while True:
                received += sock.recv(4096)
        assert received.endswith(b"\r\n\r\n" + CONTENT[:10])


def test_a_stall_ends_with_the_server(plan):
    plan.add(Stall(after_bytes=10))
    with Server(echo, faults=plan) as server:
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(10)
    sock.close()


def test_trickled(plan, served, connection):
    served.handle = lambda _request: Response(200, {}, b"0123456789")
    plan.add(Trickle(after_bytes=5, every_s=0.001))
    assert get(connection).read() == b"0123456789"


def test_delayed(served, connection):
    class Waits:
        def __init__(self):
            self.waited = []

        def wait(self, event, seconds):
            self.waited.append(seconds)
            return event.is_set()

    plan = FaultPlan().add(Delay(30.0))
    served.faults = plan
    real, served.clock = served.clock, Waits()
    served.clock.now = real.now
    assert get(connection).read() == CONTENT
    assert served.clock.waited == [30.0]


def test_answers_instead(plan, connection):
    plan.add(Answer(objects_xml.SLOW_DOWN), times=2).add(Answer(objects_xml.INTERNAL_ERROR))
    answers = []
    for _ in range(4):
        response = get(connection, method="PUT", body=b"x")
        answers.append((response.status, response.read()))
    assert [status for status, _ in answers] == [503, 503, 500, 200]
    assert b"<Code>SlowDown</Code>" in answers[0][1]
    assert b"<Code>InternalError</Code>" in answers[2][1]


def test_a_plan_is_met_in_order_by_what_matches(plan, connection):
    other = replace(objects_xml.SLOW_DOWN, status=599)
    plan.add(Answer(other), method="PUT", path="/nar/*", skip=1, times=1)
    plan.add(Answer(objects_xml.SLOW_DOWN), path="/k", times=None)
    statuses = []
    for method, path in [
        ("PUT", "/nar/a"),
        ("GET", "/nar/a"),
        ("PUT", "/nar/b"),
        ("PUT", "/nar/c"),
        ("GET", "/k"),
        ("GET", "/k"),
    ]:
        response = get(connection, path, method)
        response.read()
        statuses.append(response.status)
    assert statuses == [200, 200, 599, 200, 503, 503]
    assert plan.injected == 3
    plan.clear()
    assert get(connection).status == 200


# The end


def test_nothing_is_left_after_the_end():
    files = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    with Server(echo) as server:
        kept = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(5)]
        for connection in kept:
            assert get(connection).read() == CONTENT
        idle = socket.create_connection(("127.0.0.1", server.port))
        port = server.port
    assert threading.active_count() == threads
    for connection in kept:
        connection.close()
    idle.close()
    assert len(os.listdir("/proc/self/fd")) == files
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_bug_in_a_handler_is_told_to_both_sides():
    def handle(_request):
        raise KeyError("bug")

    with pytest.raises(KeyError), Server(handle) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        assert get(connection).status == 500
        connection.close()
    assert server.open_connections == 0


def test_an_error_of_the_disk_is_a_bug_too():
    def handle(_request):
        raise FileNotFoundError("gone")

    with pytest.raises(CalveError, match="gone") as caught, Server(handle) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        assert get(connection).status == 500
        connection.close()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("performed", [True, False])
def test_silence_lasts_until_the_client_goes(served, plan, performed):
    seen = []
    handle = served.handle
    served.handle = lambda request: seen.append(request.path) or handle(request)
    plan.add(Silent(performed=performed))
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=0.2)
    with pytest.raises(TimeoutError):
        get(connection, "/k", "PUT", body=bytes(500_000))
    connection.close()
    assert seen == ["/k"] * performed
    assert get(connection).read() == CONTENT
    connection.close()


def test_silence_that_is_over_closes(plan, connection):
    plan.add(Silent(seconds=0.05))
    with pytest.raises(http.client.RemoteDisconnected):
        get(connection)
