"""A server that misbehaves on command: threads and plain sockets, a handler per request."""

from __future__ import annotations

import datetime as dt
import socket
import ssl
import threading
from dataclasses import dataclass, field

import pytest

from calve.transport.http import Client


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int  # the number of the connection, from 1
    number: int  # the number of the request, from 1


class Hangup(Exception):  # noqa: N818
    """Close the connection now."""


@dataclass
class Wire:
    """What a handler answers with."""

    sock: socket.socket
    released: threading.Event
    server: Server = field(repr=False)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, body: bytes = b"", *, status: str = "200 OK", head: bool = False, **fields):
        headers = {"Content-Length": str(len(body))}
        headers |= {name.replace("_", "-"): value for name, value in fields.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.send(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1") + (b"" if head else body))

    def reset(self) -> None:
        """Close with a RST."""
        linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise Hangup

    def hang_up(self) -> None:
        raise Hangup

    def stall(self) -> None:
        """Say nothing until the test is over."""
        self.released.wait(30)
        raise Hangup


class Server:
    """Calls `handler(wire, request)` for every request, in one thread per connection."""

    def __init__(self, handler, context: ssl.SSLContext | None = None) -> None:
        self.handler = handler
        self.requests: list[Request] = []
        self.connections = 0
        self.errors: list[BaseException] = []
        self.closed = threading.Semaphore(0)
        self._context = context
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._socks: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._start(self._accept)

    def _start(self, function, *args) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._released.is_set():
                    sock.close()
                    return
                self.connections += 1
                self._socks.add(sock)
                number = self.connections
            self._start(self._serve, sock, number)

    def _serve(self, sock: socket.socket, connection: int) -> None:
        try:
            if self._context is not None:
                plain = sock
                sock = self._context.wrap_socket(sock, server_side=True)
                with self._lock:
                    self._socks.discard(plain)
                    self._socks.add(sock)
            with sock.makefile("rb") as stream:
                while (request := self._read(stream, connection)) is not None:
                    self.handler(Wire(sock, self._released, self), request)
        except (Hangup, OSError):
            pass
        except BaseException as error:  # noqa: BLE001
            self.errors.append(error)
        finally:
            with self._lock:
                self._socks.discard(sock)
            sock.close()
            self.closed.release()

    def _read(self, stream, connection: int) -> Request | None:
        line = stream.readline().decode("latin-1").split()
        if len(line) != 3:
            return None
        headers: dict[str, str] = {}
        while (text := stream.readline().decode("latin-1").rstrip("\r\n")) != "":
            name, _, value = text.partition(":")
            assert name.lower() not in headers, f"{name} was sent twice"
            headers[name.lower()] = value.strip()
        request = Request(line[0], line[1], headers, b"", connection, 0)
        with self._lock:
            self.requests.append(request)
            request.number = len(self.requests)
        if getattr(self.handler, "before_body", False):
            return request
        if headers.get("transfer-encoding") == "chunked":
            while (size := int(stream.readline() or b"0", 16)) > 0:
                request.body += stream.read(size)
                stream.readline()
            stream.readline()
        else:
            request.body = stream.read(int(headers.get("content-length", "0")))
        return request

    def close(self) -> None:
        self._released.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            socks = list(self._socks)
        for sock in socks:
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in list(self._threads):
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def serve():
    """Start a server for a handler; all are closed, and none had an error of its own."""
    servers: list[Server] = []

    def start(handler, context: ssl.SSLContext | None = None) -> Server:
        servers.append(Server(handler, context))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
    for server in servers:
        assert not server.errors


@pytest.fixture
def client():
    """A client with timeouts that a busy machine keeps."""
    with Client() as client:
        yield client


@pytest.fixture
def hasty():
    """A client with short timeouts, for peers that are silent."""
    with Client(read_s=0.2) as client:
        yield client


class FakeClock:
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waits: list[float] = []
        self.start = dt.datetime(2026, 3, 1, 12, 0, tzinfo=dt.UTC)

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> dt.datetime:
        return self.start + dt.timedelta(seconds=self.seconds)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        self.seconds += seconds
        return event.is_set()


@pytest.fixture
def clock():
    return FakeClock()
