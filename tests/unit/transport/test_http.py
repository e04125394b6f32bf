from __future__ import annotations

import socket
import threading

import pytest

import calve
from calve.errors import (
    CalveError,
    CancelledError,
    DamagedError,
    TransientError,
    UsageError,
)
from calve.tasks import Cancel
from calve.transport.connection import Target
from calve.transport.http import CHUNK_BYTES, Client

BODY = bytes(range(256)) * 1024  # 256 KiB


def fetch(client, url, **kwargs):
    with client.request("GET", url, **kwargs) as response:
        return response.read_all(1 << 20)


def test_get(serve, client):
    server = serve(lambda wire, _: wire.answer(BODY, ETag='"x"', X_One="a"))
    with client.request("GET", f"{server.url}/a%20b?x=1&y", headers={"X-Mine": "yes"}) as response:
        assert response.status == 200
        assert response.headers["etag"] == '"x"'
        assert response.length_bytes == len(BODY)
        first = response.read()
        assert 0 < len(first) <= CHUNK_BYTES
        assert first + response.read_all(1 << 20) == BODY
        assert response.read() == b""
    (request,) = server.requests
    assert (request.method, request.path) == ("GET", "/a%20b?x=1&y")
    assert request.headers == {
        "host": f"127.0.0.1:{server.port}",
        "user-agent": f"calve/{calve.__version__}",
        "accept-encoding": "identity",
        "connection": "keep-alive",
        "x-mine": "yes",
    }


def test_a_hundred_requests_use_one_connection(serve, client):
    def handler(wire, request):
        match request.number % 5:
            case 0:
                wire.answer(b"x" * 100)
            case 1:
                wire.answer(status="204 No Content")
            case 2:
                wire.answer(b"gone", status="404 Not Found")
            case 3:
                wire.send(
                    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
                )
            case 4:
                wire.answer(b"busy", status="503 Slow Down")

    server = serve(handler)
    for _ in range(50):
        fetch(client, server.url)
        with client.request("PUT", server.url, body=b"data"):
            pass
    assert len(server.requests) == 100
    assert server.connections == 1


@pytest.mark.parametrize("status", [200, 304, 404])
def test_head_has_no_body(serve, client, status):
    server = serve(lambda wire, _: wire.answer(b"x" * 99, status=f"{status} Hm", head=True))
    for _ in range(3):
        with client.request("HEAD", server.url) as response:
            assert response.status == status
            assert response.headers["content-length"] == "99"
            assert response.read() == b""
    assert server.connections == 1


def test_304_to_a_get_has_no_body(serve, client):
    server = serve(lambda wire, _: wire.answer(b"x" * 99, status="304 Not Modified", head=True))
    assert fetch(client, server.url) == b""
    assert fetch(client, server.url) == b""
    assert server.connections == 1


def test_chunked(serve, client):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n")
        wire.send(b"5;name=value\r\nhello\r\n1\r\n \r\n")
        wire.send(b"%X\r\n" % len(BODY) + BODY + b"\r\n")
        wire.send(b"0\r\nX-Trailer: 1\r\n\r\n")

    server = serve(handler)
    assert fetch(client, server.url) == b"hello " + BODY
    assert fetch(client, server.url) == b"hello " + BODY
    assert server.connections == 1


@pytest.mark.parametrize("garbage", [b"", b";x", b"-5", b"0x5", b"5 5", b"g", b"1" * 16])
def test_a_chunk_without_a_size(serve, client, garbage):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + garbage + b"\r\nhello")
        wire.hang_up()

    with pytest.raises(DamagedError, match="chunk"):
        fetch(client, serve(handler).url)


@pytest.mark.parametrize(
    "tail", [b"", b"5\r\nhe", b"5\r\nhello", b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n"]
)
def test_chunked_ends_early(serve, client, tail):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + tail)
        wire.hang_up()

    with pytest.raises(TransientError, match="before the last chunk"):
        fetch(client, serve(handler).url)


def test_a_chunk_longer_than_its_size(serve, client):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n")

    with pytest.raises(DamagedError, match="longer"):
        fetch(client, serve(handler).url)


def test_a_line_between_chunks_without_end(serve, client):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 5000)

    with pytest.raises(DamagedError, match="too long"):
        fetch(client, serve(handler).url)


def test_endless_trailers(serve, client):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a: b\r\n" * 200)

    with pytest.raises(DamagedError, match="trailers"):
        fetch(client, serve(handler).url)


def test_body_until_close(serve, client):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        wire.hang_up()

    server = serve(handler)
    assert fetch(client, server.url) == b"hello"
    assert fetch(client, server.url) == b"hello"
    assert server.connections == 2


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_connection_close_is_not_kept(serve, client, version):
    def handler(wire, _):
        extra = "Connection: close\r\n" if version == "1.1" else ""
        wire.send(f"HTTP/{version} 200 OK\r\nContent-Length: 5\r\n{extra}\r\nhello".encode())

    server = serve(handler)
    assert fetch(client, server.url) == b"hello"
    assert fetch(client, server.url) == b"hello"
    assert server.connections == 2


def test_fin_before_the_end_is_no_short_body(serve, client):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        wire.hang_up()

    server = serve(handler)
    with client.request("GET", server.url) as response:
        assert response.read() == b"hello"
        with pytest.raises(TransientError, match="5 bytes before the end") as error:
            response.read()
    assert error.value.place == server.url


def test_reset_in_the_body(serve, client):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
        wire.reset()

    with pytest.raises(TransientError):
        fetch(client, serve(handler).url)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"])
def test_stall(serve, hasty, sent):
    def handler(wire, _):
        wire.send(sent)
        wire.stall()

    server = serve(handler)
    with pytest.raises(TransientError, match="timed out"):
        fetch(hasty, server.url)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("head", "drip"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X"),
    ],
)
def test_trickle(serve, hasty, head, drip):
    def handler(wire, _):
        wire.send(head)
        while not wire.released.wait(0.02):
            wire.send(drip)

    with pytest.raises(TransientError, match="1024 bytes/s"):
        fetch(hasty, serve(handler).url)


def test_a_slow_reader_is_no_trickle(serve, hasty):
    def handler(wire, _):
        for part in range(0, len(BODY), 8192):
            wire.send(b"" if part else b"HTTP/1.1 200 OK\r\nContent-Length: 262144\r\n\r\n")
            wire.send(BODY[part : part + 8192])

    with hasty.request("GET", serve(handler).url) as response:
        got = b""
        for _ in range(10):
            got += response.read(100)
            threading.Event().wait(0.05)
        assert got + response.read_all(1 << 20) == BODY


def test_a_request_may_wait_longer(serve, hasty):
    def handler(wire, _):
        wire.released.wait(0.5)
        wire.answer(b"done")

    server = serve(handler)
    with pytest.raises(TransientError):
        fetch(hasty, server.url)
    assert fetch(hasty, server.url, read_s=20) == b"done"


def test_an_idle_connection_that_was_closed(serve, client):
    def handler(wire, _):
        wire.answer(b"x")
        wire.hang_up()

    server = serve(handler)
    for number in range(1, 4):
        assert fetch(client, server.url) == b"x"
        server.closed.acquire()
        assert (server.connections, len(server.requests)) == (number, number)


@pytest.mark.parametrize("end", ["hang_up", "reset"])
def test_closed_while_the_second_request_was_under_way(serve, client, end):
    def handler(wire, request):
        if request.number == 2:
            getattr(wire, end)()
        wire.answer(request.body)

    server = serve(handler)
    assert fetch(client, server.url) == b""
    with client.request("PUT", server.url, body=b"mine") as response:
        assert response.read_all(100) == b"mine"
    assert [request.connection for request in server.requests] == [1, 1, 2]


@pytest.mark.parametrize(("method", "body"), [("POST", b"x"), ("PUT", [b"x"])])
def test_what_cannot_be_sent_twice_is_not(serve, client, method, body):
    def handler(wire, request):
        if request.number == 2:
            wire.hang_up()
        wire.answer()

    server = serve(handler)
    fetch(client, server.url)
    with pytest.raises(TransientError, match="closed the connection"):
        client.request(method, server.url, body=body)
    assert len(server.requests) == 2


def test_a_fresh_connection_that_is_closed_is_not_tried_again(serve, client):
    server = serve(lambda wire, _: wire.hang_up())
    with pytest.raises(TransientError, match="closed the connection"):
        fetch(client, server.url)
    assert len(server.requests) == 1


def test_half_an_answer_is_not_tried_again(serve, client):
    def handler(wire, request):
        if request.number == 2:
            wire.send(b"HTTP/1.1 200 OK\r\nContent-")
            wire.reset()
        wire.answer()

    server = serve(handler)
    fetch(client, server.url)
    with pytest.raises(TransientError):
        fetch(client, server.url)
    assert len(server.requests) == 2


def test_more_than_the_answer_closes_the_connection(serve, client):
    server = serve(lambda wire, _: wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxEVIL"))
    for _ in range(3):
        assert fetch(client, server.url) == b"x"
    assert server.connections == 3


def test_bytes_on_an_idle_connection_close_it(serve, client):
    sent = threading.Event()

    def handler(wire, _):
        wire.answer(b"x")
        threading.Event().wait(0.05)
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL")
        sent.set()

    server = serve(handler)
    assert fetch(client, server.url) == b"x"
    assert sent.wait(10)
    assert fetch(client, server.url) == b"x"
    assert server.connections == 2


def test_an_unread_short_body_keeps_the_connection(serve, client):
    server = serve(lambda wire, _: wire.answer(b"x" * 10_000, status="503 Busy"))
    for _ in range(3):
        with client.request("GET", server.url) as response:
            assert response.status == 503
    assert server.connections == 1


def test_an_unread_long_body_closes_it(serve, client):
    server = serve(lambda wire, _: wire.answer(b"x" * 10_000_000))
    for _ in range(3):
        with client.request("GET", server.url) as response:
            assert response.read(10) == b"x" * 10
    assert server.connections == 3


def test_an_unread_chunked_body_is_bounded(serve, client):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            wire.send(b"400\r\n" + b"x" * 1024 + b"\r\n")

    server = serve(handler)
    for _ in range(2):
        with client.request("GET", server.url):
            pass
    assert server.connections == 2


def test_an_error_in_the_block_closes_at_once(serve, client):
    left, seen = threading.Event(), []

    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        seen.append(left.wait(5))
        wire.hang_up()

    server = serve(handler)
    with pytest.raises(KeyError), client.request("GET", server.url):
        raise KeyError
    left.set()
    assert server.closed.acquire(timeout=10)
    assert seen == [True]


@pytest.mark.parametrize("length", ["x", "-1", "1, 2", "+5", "5 5", "9" * 30, "\xb2"])
def test_a_malformed_length(serve, client, length):
    def handler(wire, _):
        wire.send(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nhello".encode("latin-1"))
        wire.hang_up()

    with pytest.raises(DamagedError, match="Content-Length"):
        fetch(client, serve(handler).url)


def test_two_different_lengths(serve, client):
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 3\r\n\r\n"

    def handler(wire, _):
        wire.send(head + b"hello")

    with pytest.raises(DamagedError, match="Content-Length"):
        fetch(client, serve(handler).url)


def test_an_unknown_transfer_coding(serve, client):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"
    with pytest.raises(DamagedError, match="coding"):
        fetch(client, serve(lambda wire, _: wire.send(head)).url)


def test_odd_headers(serve, client):
    head = (
        b"HTTP/1.1 200 \r\nX-Twice: a\r\nx-twice:  b \r\nFolded: one\r\n  two\r\nEmpty:\r\n"
        b"Latin: \xe9\r\nCONTENT-LENGTH:0\r\n\r\n"
    )
    with client.request("GET", serve(lambda wire, _: wire.send(head)).url) as response:
        assert response.headers == {
            "x-twice": "a, b",
            "folded": "one two",
            "empty": "",
            "latin": "\xe9",
            "content-length": "0",
        }


@pytest.mark.parametrize(
    "head", [b"X: " + b"y" * 70_000 + b"\r\n\r\n", b"X: y\r\n" * 200 + b"\r\n", b"X" * 70_000]
)
def test_huge_headers(serve, client, head):
    def handler(wire, _):
        wire.send(b"HTTP/1.1 200 OK\r\n" + head)

    with pytest.raises(DamagedError, match="not HTTP"):
        fetch(client, serve(handler).url)


@pytest.mark.parametrize("line", [b"SSH-2.0-x\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"\r\n\r\n"])
def test_not_http(serve, client, line):
    def handler(wire, _):
        wire.send(line)
        wire.hang_up()

    with pytest.raises(TransientError, match="not HTTP"):
        fetch(client, serve(handler).url)


def test_100_continue_and_101(serve, client):
    def handler(wire, request):
        if request.number == 1:
            wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            wire.answer(b"ok")
        else:
            wire.send(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")

    server = serve(handler)
    assert fetch(client, server.url) == b"ok"
    with pytest.raises(TransientError, match="101"):
        fetch(client, server.url)


def test_redirects_are_answers(serve, client):
    server = serve(lambda wire, _: wire.answer(status="302 Found", Location="/elsewhere"))
    with client.request("GET", server.url) as response:
        assert (response.status, response.headers["location"]) == (302, "/elsewhere")
    assert len(server.requests) == 1


def test_bodies(serve, client):
    server = serve(lambda wire, _: wire.answer())
    for body, headers in (
        (BODY, {}),
        (None, {}),
        ([b"a", b"", BODY], {}),
        (iter([b"a", b"b"]), {"Content-Length": "2"}),
    ):
        with client.request("PUT", server.url, body=body, headers=headers) as response:
            assert response.status == 200
    bodies = [request.body for request in server.requests]
    assert bodies == [BODY, b"", b"a" + BODY, b"ab"]
    lengths = [request.headers.get("content-length") for request in server.requests]
    assert lengths == [str(len(BODY)), "0", None, "2"]
    assert server.connections == 1


@pytest.mark.parametrize(("length", "word"), [("3", "announced"), ("1", "longer")])
def test_a_body_of_another_length(serve, client, length, word):
    server = serve(lambda wire, _: wire.answer())
    with pytest.raises(CalveError, match=word):
        client.request("PUT", server.url, body=[b"a", b"b"], headers={"Content-Length": length})


@pytest.mark.parametrize("error", [OSError("disk"), ValueError("bad"), KeyError("x")])
def test_an_error_of_the_body_is_its_own(serve, client, error):
    def body():
        yield b"a"
        raise error

    server = serve(lambda wire, _: wire.answer())
    with pytest.raises(type(error)) as caught:
        client.request("PUT", server.url, body=body())
    assert caught.value is error


@pytest.mark.parametrize("reads", [True, False])
def test_an_answer_before_the_body_was_taken(serve, client, reads):
    class Early:
        before_body = True

        def __call__(self, wire, request):
            wire.answer(b"busy", status="503 Slow Down")
            if reads:
                wire.sock.shutdown(socket.SHUT_WR)
                while wire.sock.recv(1 << 20):
                    pass
            wire.hang_up()  # with unread bytes: the kernel sends a reset

    server = serve(Early())
    for number in (1, 2):
        with client.request("PUT", server.url, body=b"x" * 3_000_000) as response:
            assert response.status == 503
            assert response.read_all(100) == b"busy"
        assert len(server.requests) == number


def test_an_answer_larger_than_the_limit(serve, client):
    server = serve(lambda wire, _: wire.answer(b"x" * 101))
    with (
        pytest.raises(DamagedError, match="longer than 100 bytes"),
        client.request("GET", server.url) as response,
    ):
        response.read_all(100)
    with client.request("GET", server.url) as response:
        assert len(response.read_all(101)) == 101


def test_connection_refused(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TransientError, match="refused") as error:
        client.request("GET", f"http://127.0.0.1:{port}/x?secret=1")
    assert error.value.hint
    assert error.value.place == f"http://127.0.0.1:{port}/x"


def test_a_name_that_does_not_resolve(client, monkeypatch):
    def fail(*_args, **_kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(TransientError, match="does not resolve") as error:
        client.request("GET", "http://nowhere.invalid/")
    assert "spelling" in error.value.hint


def test_the_second_address_is_tried(serve, client, monkeypatch):
    server = serve(lambda wire, _: wire.answer(b"ok"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = listener.getsockname()
    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*stream, dead), (*stream, ("127.0.0.1", server.port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found)
    assert fetch(client, "http://cache.example/") == b"ok"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/",
        "host/path",
        "http://",
        "http://host:port/",
        "http://host:99999/",
        "http://user:secret@host/",
        "http://host/a b",
        "http://host/\r\nX: y",
        "http://host/\t",
        "http://host/é",
        "http://[::1/",
    ],
)
def test_what_is_not_a_url(client, url):
    with pytest.raises(UsageError) as error:
        client.request("GET", url)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("http://Host", "host", "/"),
        ("https://host:443/a//b/../c?d", "host", "/a//b/../c?d"),
        ("http://host:443/", "host:443", "/"),
        ("http://[::1]:80/", "[::1]", "/"),
        ("http://host?a=b", "host", "/?a=b"),
        ("http://host/a@b", "host", "/a@b"),
    ],
)
def test_targets(url, authority, path):
    target = Target.parse(url)
    assert (target.endpoint.authority, target.path) == (authority, path)


@pytest.mark.parametrize("value", ["a\r\nX: y", "\u20ac"])
def test_a_header_that_cannot_be_sent(serve, client, value):
    server = serve(lambda wire, _: wire.answer())
    with pytest.raises(UsageError):
        client.request("GET", server.url, headers={"X": value})
    assert not server.requests


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"])
def test_cancel_wakes_a_blocked_read(serve, sent):
    cancel = Cancel()
    stalled = threading.Event()

    def handler(wire, _):
        wire.send(sent)
        stalled.set()
        wire.stall()

    server = serve(handler)
    errors = []
    with Client(cancel=cancel, read_s=60) as client:

        def work():
            try:
                fetch(client, server.url)
            except CalveError as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert stalled.wait(10)
        cancel.cancel()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert [type(error) for error in errors] == [CancelledError] * 3
        with pytest.raises(CancelledError):
            client.request("GET", server.url)


def test_cancel_wakes_a_blocked_send(serve):
    cancel = Cancel()
    begun = threading.Event()

    class Deaf:
        before_body = True

        def __call__(self, wire, request):
            begun.set()
            wire.stall()

    server = serve(Deaf())
    with Client(cancel=cancel, read_s=60) as client:
        timer = threading.Thread(target=lambda: (begun.wait(10), cancel.cancel()))
        timer.start()
        with pytest.raises(CancelledError):
            client.request("PUT", server.url, body=b"x" * 50_000_000)
        timer.join()


def test_close_fails_what_is_under_way(serve):
    begun = threading.Event()

    def handler(wire, _):
        begun.set()
        wire.stall()

    server = serve(handler)
    client = Client(read_s=60)
    timer = threading.Thread(target=lambda: (begun.wait(10), client.close()))
    timer.start()
    with pytest.raises(TransientError, match="closed the connection"):
        client.request("GET", server.url)
    timer.join()
    with pytest.raises(CalveError, match="client is closed"):
        client.request("GET", server.url)


def test_threads_share_what_is_kept(serve, client):
    server = serve(lambda wire, _: wire.answer(b"x"))
    for _ in range(5):
        thread = threading.Thread(target=fetch, args=(client, server.url))
        thread.start()
        thread.join()
    assert server.connections == 1


def test_parallel_requests_have_connections_of_their_own(serve):
    barrier = threading.Barrier(4)

    def handler(wire, _):
        barrier.wait(10)
        wire.answer(b"x")

    server = serve(handler)
    with Client(read_s=20) as client:
        threads = [threading.Thread(target=fetch, args=(client, server.url)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (server.connections, len(server.requests)) == (4, 4)
