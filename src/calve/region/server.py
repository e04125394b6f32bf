"""A small threaded HTTP/1.1 server (RFC 9112): kept connections, streamed bodies, faults, and an end that leaves nothing.

    with Server(service.handle) as server:
        use(server.url)

`handle` gets a `Request` whose body it may stream, and returns a `Response` of bytes or a piece of an open file.
Every connection has a thread; leaving the block shuts all connections down, joins all threads, closes the port and
raises what a handler raised (a bug of the simulation: the client was answered 500).
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from email.utils import format_datetime
from http import HTTPStatus
from types import MappingProxyType, TracebackType
from typing import IO, Self

from calve.clock import SYSTEM, Clock
from calve.errors import CalveError, CancelledError
from calve.region.faults import (
    Answer,
    Delay,
    Fault,
    FaultHook,
    Flip,
    Lost,
    Reset,
    Silent,
    Stall,
    Trickle,
    Truncate,
)
from calve.region.listener import Listener, shut
from calve.region.message import (
    BUFFER_BYTES,
    LINE_BYTES,
    Body,
    BrokenBodyError,
    FileRange,
    MalformedError,
    Request,
    Response,
    body_length,
    parse_request_line,
    read_headers,
)

__all__ = ["Body", "BrokenBodyError", "FileRange", "Handler", "Request", "Response", "Server"]

DRAIN_BYTES = 16 * 1024 * 1024
"""What is read of a body that the handler left, to keep the connection; beyond it the connection is closed."""

Handler = Callable[[Request], Response]


class Server:
    """Answers HTTP on a port of 127.0.0.1.

    Args:
        handle: Answers a request; called from many threads.
        name: Of the threads.
        context: TLS, where given.
        faults: Asked before each request what shall go wrong.
        clock: Stamps answers, and waits in delays.
        idle_s: A connection that is silent for so long is closed.
        port: 0 for a free one.
    """

    def __init__(
        self,
        handle: Handler,
        *,
        name: str = "region",
        context: ssl.SSLContext | None = None,
        faults: FaultHook | None = None,
        clock: Clock = SYSTEM,
        idle_s: float = 60.0,
        port: int = 0,
    ) -> None:
        self.handle = handle
        self.faults = faults
        self.clock = clock
        self._context = context
        self._requests = 0
        self._lock = threading.Lock()
        wrap = None
        if context is not None:
            wrap = functools.partial(
                context.wrap_socket, server_side=True, do_handshake_on_connect=False
            )
        self._listener = Listener(self._serve, name=name, idle_s=idle_s, port=port, wrap=wrap)
        self.closing = self._listener.closing

    @property
    def port(self) -> int:
        """Return the port, while it is served."""
        return self._listener.port

    @property
    def url(self) -> str:
        """Return the address: scheme, host and port, without a slash at the end."""
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """Return how many connections were accepted so far."""
        return self._listener.connections

    @property
    def requests(self) -> int:
        """Return how many requests were read so far."""
        return self._requests

    @property
    def open_connections(self) -> int:
        """Return how many connections are open now."""
        return self._listener.open_connections

    def count_request(self) -> None:
        """Add one to the requests."""
        with self._lock:
            self._requests += 1

    def __enter__(self) -> Self:
        self._listener.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listener.__exit__(kind, error, trace)

    def _serve(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        if isinstance(connection, ssl.SSLSocket):
            connection.do_handshake()
        _Connection(self, connection, peer).run()


class _Connection:
    """One client's connection, request after request."""

    def __init__(self, server: Server, sock: socket.socket, peer: tuple[str, int]) -> None:
        self._server = server
        self._socket = sock
        self._peer = peer
        self._keep = True

    def run(self) -> None:
        with self._socket.makefile("rb") as source:
            while self._keep:
                try:
                    request = self._read_request(source)
                except MalformedError as error:
                    self._keep = False
                    text = f"{error}\n".encode()
                    self._send(Response(error.status, {"Content-Type": "text/plain"}, text), "GET")
                    self._linger(source)
                    return
                if request is None:
                    return
                self._server.count_request()
                self._answer(request)
                self._drain(request.body)
            self._linger(source)

    # Requests

    def _read_request(self, source: IO[bytes]) -> Request | None:
        line = source.readline(LINE_BYTES)
        if line == b"\r\n":  # RFC 9112, 2.2: one empty line before a request is forgiven
            line = source.readline(LINE_BYTES)
        if not line:
            return None
        method, target, version = parse_request_line(line)
        headers = read_headers(source)
        if version == "HTTP/1.1" and "host" not in headers:
            raise MalformedError(400, "a request without a host")
        tokens = {token.strip().lower() for token in headers.get("connection", "").split(",")}
        self._keep = "close" not in tokens if version == "HTTP/1.1" else "keep-alive" in tokens
        announce = self._continue if headers.get("expect", "").lower() == "100-continue" else None
        path, _, query = target.partition("?")
        return Request(
            method,
            path,
            query,
            MappingProxyType(headers),
            Body(source, body_length(headers), announce=announce),
            self._peer,
            isinstance(self._socket, ssl.SSLSocket),
        )

    def _continue(self) -> None:
        self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _drain(self, body: Body) -> None:
        """Read what the handler left; a long rest costs the connection."""
        if not self._keep or not body.left:
            return
        for _ in range(DRAIN_BYTES // BUFFER_BYTES):
            if not body.read():
                return
        self._keep = False

    def _linger(self, source: IO[bytes]) -> None:
        """Close politely: data that was sent and not read would turn the close into a reset."""
        self._socket.settimeout(2.0)
        shut(self._socket, socket.SHUT_WR)
        for _ in range(DRAIN_BYTES // BUFFER_BYTES):
            if not source.read(BUFFER_BYTES):
                return

    # Responses

    def _answer(self, request: Request) -> None:
        server = self._server
        fault = server.faults(request) if server.faults is not None else None
        if isinstance(fault, Delay):
            server.closing.wait(fault.seconds, server.clock)
        if fault == Lost(performed=False):
            self._reset()
        if isinstance(fault, Silent) and not fault.performed:
            self._silence(fault.seconds)
            return
        response = fault.response if isinstance(fault, Answer) else self._handle(request)
        if request.body.awaited:
            self._keep = False
        try:
            if isinstance(fault, Lost):
                self._reset()
            if isinstance(fault, Silent):
                self._silence(fault.seconds)
                return
            self._send(response, request.method, fault)
        finally:
            response.close()

    def _handle(self, request: Request) -> Response:
        try:
            return self._server.handle(request)
        except (OSError, CancelledError) as error:
            if isinstance(error, BrokenBodyError | ConnectionError | CancelledError | TimeoutError):
                raise
            self._fail(request)
            raise CalveError(f"a handler failed: {error}", place=request.path) from error
        except Exception:
            self._fail(request)
            raise

    def _fail(self, request: Request) -> None:
        """Tell the client of a bug in a handler, which the server's owner will be shown."""
        self._keep = False
        with contextlib.suppress(OSError):
            self._send(Response(500, {"Content-Type": "text/plain"}, b"bug\n"), request.method)

    def _reset(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionResetError("reset on purpose")

    def _send(self, response: Response, method: str, fault: Fault | None = None) -> None:
        self._socket.sendall(self._head(response))
        size = 0 if method == "HEAD" or response.status in {204, 304} else response.size
        stop = size
        if isinstance(fault, Reset | Truncate | Stall | Trickle):
            stop = min(size, fault.after_bytes)
        sent = 0
        try:
            for count in self._send_body(response.body, 0, stop, fault):
                sent += count
            self._misbehave(fault)
            if isinstance(fault, Trickle):
                for position in range(stop, size):
                    self._server.closing.wait(fault.every_s, self._server.clock)
                    for count in self._send_body(response.body, position, position + 1):
                        sent += count
        finally:
            if response.on_sent is not None:
                response.on_sent(sent)

    def _head(self, response: Response) -> bytes:
        status = response.status
        reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Status"
        lines = [f"HTTP/1.1 {status} {reason}"]
        lines.append(f"Date: {format_datetime(self._server.clock.now(), usegmt=True)}")
        lines.extend(f"{name}: {value}" for name, value in response.headers.items())
        if status not in {204, 304}:
            lines.append(f"Content-Length: {response.size}")
        if not self._keep:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")

    def _misbehave(self, fault: Fault | None) -> None:
        match fault:
            case Reset():
                self._reset()
            case Truncate():
                self._keep = False
            case Stall():
                self._silence(fault.seconds)
            case _:
                pass

    def _silence(self, seconds: float) -> None:
        """Say nothing until the client closes, the server does, or the time is over."""
        self._keep = False
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.poll(seconds * 1000)

    def _send_body(
        self, body: bytes | FileRange, start: int, stop: int, fault: Fault | None = None
    ) -> Iterator[int]:
        """Send the bytes from `start` to `stop`; yield the counts."""
        if start >= stop:
            return
        plain = not isinstance(self._socket, ssl.SSLSocket) and not isinstance(fault, Flip)
        if isinstance(body, FileRange) and plain:
            yield self._socket.sendfile(body.file, body.offset + start, stop - start)
            return
        for position in range(start, stop, BUFFER_BYTES):
            data = _piece(body, position, min(BUFFER_BYTES, stop - position))
            if isinstance(fault, Flip) and position <= fault.offset < position + len(data):
                at = fault.offset - position
                data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
            self._socket.sendall(data)
            yield len(data)


def _piece(body: bytes | FileRange, position: int, size: int) -> bytes:
    if isinstance(body, FileRange):
        return os.pread(body.file.fileno(), size, body.offset + position)
    return body[position : position + size]
