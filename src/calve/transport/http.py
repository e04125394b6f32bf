"""The HTTP client: requests on kept connections.

`http.client` hardened by what was measured to go wrong with it: bodies that end early are an error, a peer that
trickles or stalls is an error, a connection is reused only where its last answer was read to the end, redirects and
proxies are not followed, and a cancel wakes whoever waits.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from calve import __version__
from calve.clock import SYSTEM, Clock
from calve.errors import CalveError, NotFoundError, UsageError
from calve.tasks import Cancel
from calve.transport.connection import Connection, Endpoint, Target, Timing, translate
from calve.transport.response import CHUNK_BYTES, FAILURES, Response
from calve.transport.retry import DEFAULT, Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import TracebackType

    from calve.transport.sigv4 import Signer

__all__ = ["CHUNK_BYTES", "Client", "Response", "tls_context"]

_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


def tls_context(ca_file: str | None = None) -> ssl.SSLContext:
    """Return a context that checks certificate and host name, against `ca_file` or the machine's authorities.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it holds no certificate.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise UsageError("holds no certificate", place=ca_file) from error
    except OSError as error:
        raise NotFoundError(
            f"cannot read the certificate authorities ({error.strerror})", place=ca_file
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context


class Client:
    """An HTTP client for many threads; close it, or use it as a context manager.

    A connection belongs to one request at a time and is kept, by endpoint, for the next one of any thread: there
    are as many as requests are under way at once.

    Args:
        context: for https; by default the machine's own authorities, loaded at the first need.
        cancel: once cancelled, every wait in any thread ends at once with CancelledError.
        clock: measures the rate.
        connect_s: for one address to answer, and for the TLS handshake.
        read_s: for the peer to take or send anything; under 1 KiB/s over so long is a stall too.
        retries: how long whoever sends by it tries again; it tries nothing again itself.
    """

    def __init__(
        self,
        *,
        context: ssl.SSLContext | None = None,
        cancel: Cancel | None = None,
        clock: Clock = SYSTEM,
        connect_s: float = 5.0,
        read_s: float = 10.0,
        retries: Policy = DEFAULT,
    ) -> None:
        self.retries = retries
        self.cancel = Cancel() if cancel is None else cancel
        self.clock = clock
        self._context = context
        self._timing = Timing(connect_s, read_s)
        self._lock = threading.Lock()
        self._idle: dict[Endpoint, list[Connection]] = {}
        self._open: set[Connection] = set()
        self._closed = False
        self._unhook = self.cancel.on_cancel(self._shutdown)

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        signer: Signer | None = None,
        read_s: float | None = None,
    ) -> Response:
        """Send one request and return its answer, whatever the status; redirects are not followed.

        On a kept connection that the server closes before it answers, a GET, HEAD, PUT or DELETE with no body or
        one of bytes is sent once more, on a fresh connection.

        Args:
            method: in capitals.
            url: http or https, percent-encoded; sent byte for byte.
            headers: beside Host, User-Agent, Accept-Encoding, Connection and Content-Length.
            body: bytes, or pieces; pieces go out chunked unless the headers give a Content-Length.
            signer: signs the request. The hash of the payload is that of the header `x-amz-content-sha256` if
                given, else the signer's choice.
            read_s: in place of the client's, for answers that a server works on for long.

        Raises:
            TransientError: no connection, or it broke, stalled or trickled.
            VerificationError: the server's certificate is refused.
            DamagedError: the answer is not HTTP.
            UsageError: the URL or a header cannot be sent.
        """
        self.cancel.check()
        target = Target.parse(url)
        plain = {name.lower(): value for name, value in (headers or {}).items()}
        if signer is not None:
            plain = signer.sign(method, url, plain, signer.payload_hash(url, plain, body))
        sent = _headers(method, target, plain, body)
        feed = _Feed(body, sent)
        request = _Request(method, url, target, sent, feed, read_s)
        again = method in _IDEMPOTENT and (body is None or isinstance(body, bytes))
        kept = self._take(target.endpoint)
        try:
            if kept is not None:
                try:
                    return self._exchange(kept, request)
                except (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                    if kept.received or not again or self.cancel.cancelled:
                        raise
            return self._exchange(self._dial(target.endpoint), request)
        except FAILURES as error:
            if error is feed.error:
                raise
            raise translate(error, target.place, self.cancel) from error

    def heir(self, *, connect_s: float, read_s: float) -> Client:
        """Return a client of its own that trusts the same authorities and that this one's cancel does not end.

        For the last request of a run that was interrupted: it undoes what the run began, and must be short.
        """
        return Client(context=self._context, clock=self.clock, connect_s=connect_s, read_s=read_s)

    def close(self) -> None:
        """Close every connection; a request that another thread has under way fails."""
        with self._lock:
            self._closed = True
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
            self._open.difference_update(idle)
        for connection in idle:
            connection.close()
        self._shutdown()
        self._unhook()

    def give_back(self, connection: Connection, *, reuse: bool) -> None:
        """Take a connection back from an answer: keep it, or close it."""
        with self._lock:
            keep = reuse and not self._closed and not self.cancel.cancelled
            if keep:
                self._idle.setdefault(connection.endpoint, []).append(connection)
            else:
                self._open.discard(connection)
        if not keep:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, endpoint: Endpoint) -> Connection | None:
        """Return the connection that was used last, closing those that their servers closed."""
        while True:
            with self._lock:
                kept = self._idle.get(endpoint)
                if not kept:
                    return None
                connection = kept.pop()
            if connection.usable():
                return connection
            self.give_back(connection, reuse=False)

    def _dial(self, endpoint: Endpoint) -> Connection:
        connection = Connection(endpoint, self._timing, self.cancel, self.clock)
        with self._lock:
            if self._closed:
                raise CalveError("the HTTP client is closed")
            self._open.add(connection)
        try:
            connection.dial(self._tls)
        except BaseException:
            self.give_back(connection, reuse=False)
            raise
        return connection

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                self._context = tls_context()
            return self._context

    def _exchange(self, connection: Connection, request: _Request) -> Response:
        """Send and read the answer's head; where that fails the connection is closed."""
        try:
            connection.begin(request.method, request.target.path, request.headers, request.read_s)
            whole = _send(connection, request.feed)
            message = connection.answer()
            message.will_close = message.will_close or not whole
            try:
                return Response(self, connection, message, request.method, request.url)
            except BaseException:
                message.close()
                raise
        except BaseException:
            self.give_back(connection, reuse=False)
            raise

    def _shutdown(self) -> None:
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            connection.shutdown()


@dataclass(frozen=True, slots=True)
class _Request:
    """What is sent, once or twice."""

    method: str
    url: str
    target: Target
    headers: dict[str, str]
    feed: _Feed
    read_s: float | None


class _Feed:
    """A request's body, cut into what one timeout covers, and framed as its headers say.

    `error` is what reading the caller's body raised: that is not the network's failure.
    """

    def __init__(self, body: bytes | Iterable[bytes] | None, headers: dict[str, str]) -> None:
        self.error: BaseException | None = None
        self._body = body
        self._chunked = "transfer-encoding" in headers
        self._announced = headers.get("content-length", "0")

    def __iter__(self) -> Iterator[bytes | memoryview]:
        try:
            yield from self._pieces()
        except Exception as error:
            self.error = error
            raise

    def _pieces(self) -> Iterator[bytes | memoryview]:
        total, announced = 0, int(self._announced)
        body = b"" if self._body is None else self._body
        for part in (body,) if isinstance(body, bytes) else body:
            total += len(part)
            if not self._chunked and total > announced:
                raise CalveError(f"the body is longer than the {announced} bytes announced")
            if self._chunked and part:
                yield b"%X\r\n" % len(part)
            view = memoryview(part)
            for start in range(0, len(view), CHUNK_BYTES):
                yield view[start : start + CHUNK_BYTES]
            if self._chunked and part:
                yield b"\r\n"
        if self._chunked:
            yield b"0\r\n\r\n"
        elif total < announced:
            raise CalveError(f"the body has {total} bytes, {announced} were announced")


def _headers(
    method: str, target: Target, plain: dict[str, str], body: bytes | Iterable[bytes] | None
) -> dict[str, str]:
    """Add to the caller's headers, signed or not, those that every request has."""
    sent = {
        "host": target.endpoint.authority,
        "user-agent": f"calve/{__version__}",
        "accept-encoding": "identity",
        "connection": "keep-alive",
    } | plain
    if isinstance(body, bytes):
        sent["content-length"] = str(len(body))
    elif body is None:
        if method in _WITH_BODY:
            sent["content-length"] = "0"
    elif "content-length" not in sent:
        sent["transfer-encoding"] = "chunked"
    return sent


def _send(connection: Connection, feed: _Feed) -> bool:
    """Send a body; False where the server stopped reading, which it does when it has answered already."""
    for piece in feed:
        try:
            connection.send(piece)
        except (BrokenPipeError, ConnectionResetError):
            return False
    return True
