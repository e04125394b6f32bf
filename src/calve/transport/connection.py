"""One TCP or TLS connection that speaks HTTP/1.1, and the meter on what it receives.

`http.client` writes the request and parses the answer's head. This module adds what it lacks: a dial that can be
cancelled, a guard against a peer that trickles, and errors of ours in place of the standard library's.
"""

from __future__ import annotations

import http.client
import io
import re
import select
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from calve.errors import (
    CalveError,
    CancelledError,
    DamagedError,
    TransientError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from calve.clock import Clock
    from calve.tasks import Cancel

__all__ = [
    "MIN_BYTES_PER_S",
    "CertificateError",
    "Connection",
    "Endpoint",
    "Target",
    "Timing",
    "translate",
]

MIN_BYTES_PER_S = 1024
_PORTS = {"http": 80, "https": 443}
_BUFFER_BYTES = 8192
_UNENCODED = re.compile(r"[\x00-\x20\x7f]")


class CertificateError(VerificationError):
    """The server is not who its name says, or no authority that we trust says so."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to connect; what connections are kept by."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """Return the Host header: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """A URL in the parts that a request needs.

    `path` is path and query as they are sent, byte for byte; `place` is the URL without its query, which may hold
    a signature.
    """

    endpoint: Endpoint
    path: str
    place: str

    @classmethod
    def parse(cls, url: str) -> Target:
        """Split an http or https URL that is already percent-encoded; UsageError where it is not one."""
        place = url.partition("?")[0]
        if "@" in place.partition("://")[2].partition("/")[0]:
            raise UsageError("a URL with a user name in it is not supported")
        if not url.isascii() or _UNENCODED.search(url):
            raise UsageError("the URL is not percent-encoded", place=ascii(place))
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"not a URL ({error})", place=place) from None
        if parts.scheme not in _PORTS or not host:
            raise UsageError("not an http or https URL", place=place)
        labels = host.removesuffix(".").split(".")
        if ":" not in host and not all(0 < len(label) < 64 for label in labels):
            raise UsageError("not a host name", place=place)
        endpoint = Endpoint(parts.scheme, host, port or _PORTS[parts.scheme])
        path = parts.path or "/"
        return cls(endpoint, f"{path}?{parts.query}" if parts.query else path, place)


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a dial may take, and how long a peer may be silent or nearly so."""

    connect_s: float
    read_s: float


class _Meter(io.RawIOBase):
    """The receiving half of a socket: counts, and raises TimeoutError on less than 1 KiB/s over `read_s`.

    Only time spent waiting for the peer counts (a consumer may be slow), and the wait for the first byte does not:
    the socket's own timeout bounds that one.
    """

    def __init__(self, inner: io.RawIOBase, read_s: float, cancel: Cancel, clock: Clock) -> None:
        super().__init__()
        self.received = 0
        self.muted = False
        self._inner = inner
        self._read_s = read_s
        self._cancel = cancel
        self._clock = clock
        self._waited_s = 0.0
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.muted:
            return None
        began = self._clock.monotonic()
        count = self._inner.readinto(buffer)
        self._cancel.check()
        if not count:
            return count
        if self.received:
            self._waited_s += self._clock.monotonic() - began
            self._count += count
        self.received += count
        if self._waited_s >= self._read_s:
            if self._count < MIN_BYTES_PER_S * self._waited_s:
                raise TimeoutError(f"less than {MIN_BYTES_PER_S} bytes/s for {self._read_s:g} s")
            self._waited_s, self._count = 0.0, 0
        return count

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


class Connection:
    """A connection to one endpoint; used by one thread at a time, shut down by any.

    Every method raises what the socket and `http.client` raise; `translate` makes errors of ours of them.
    """

    def __init__(self, endpoint: Endpoint, timing: Timing, cancel: Cancel, clock: Clock) -> None:
        self.endpoint = endpoint
        self._timing = timing
        self._cancel = cancel
        self._clock = clock
        self._socket: socket.socket | None = None
        self._meter: _Meter | None = None
        self._http = http.client.HTTPConnection(endpoint.host, endpoint.port)
        self._http.auto_open = 0
        self._http.response_class = cast("type[http.client.HTTPResponse]", self._message)
        self._read_s = timing.read_s

    @property
    def received(self) -> int:
        """Return how many bytes of the present answer have come."""
        return 0 if self._meter is None else self._meter.received

    def dial(self, context: Callable[[], ssl.SSLContext]) -> None:
        """Connect to the first address that answers, and shake hands where the scheme is https."""
        host, port = self.endpoint.host, self.endpoint.port
        failure: OSError = socket.gaierror(socket.EAI_NONAME, "no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            self._cancel.check()
            self._socket = socket.socket(family, kind, protocol)
            self._cancel.check()  # whoever cancelled before this line did not see the socket
            try:
                self._socket.settimeout(self._timing.connect_s)
                self._socket.connect(address)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError as error:
                failure = error
                self._socket.close()
                continue
            if self.endpoint.scheme == "https":
                secure = context().wrap_socket(
                    self._socket, server_hostname=host, do_handshake_on_connect=False
                )
                self._socket = secure
                self._cancel.check()
                secure.do_handshake()
            self._cancel.check()
            self._http.sock = self._socket
            return
        raise failure

    def usable(self) -> bool:
        """Say whether a kept connection still stands: an idle one that can be read was closed by the peer."""
        sock = self._http.sock
        if sock is None:
            return False
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if poll.poll(0):
            return False
        return not (isinstance(sock, ssl.SSLSocket) and sock.pending())

    def begin(self, method: str, path: str, headers: dict[str, str], read_s: float | None) -> None:
        """Send a request's head."""
        self._meter = None
        self._read_s = self._timing.read_s if read_s is None else read_s
        if self._socket is not None:
            self._socket.settimeout(self._read_s)
        self._http.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            self._http.putheader(name, value)
        self._http.endheaders()

    def send(self, data: bytes | memoryview) -> None:
        """Send a piece of the body; one timeout covers the piece, so pieces are to be small."""
        self._http.send(data)

    def answer(self) -> http.client.HTTPResponse:
        """Read the head of the answer."""
        return self._http.getresponse()

    def leftover(self, message: http.client.HTTPResponse) -> bool:
        """Say whether more than the answer was received: then the two sides disagree on where it ends."""
        if self._meter is None:
            return True
        self._meter.muted = True
        return bool(message.fp.peek(1))

    def shutdown(self) -> None:
        """Wake whoever waits on the socket; the owner closes it.

        Not SSLSocket.shutdown: that one drops the TLS layer, and a reader would be handed ciphertext.
        """
        if self._socket is not None:
            try:
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            except OSError:
                return  # not connected yet, or no more

    def close(self) -> None:
        """Close the socket; an answer that still reads from it keeps it until it is closed too."""
        self._http.close()
        if self._socket is not None:
            self._socket.close()

    def _message(self, sock: socket.socket, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        message = http.client.HTTPResponse(sock, *args, **kwargs)
        self._meter = _Meter(message.fp.detach(), self._read_s, self._cancel, self._clock)
        message.fp = io.BufferedReader(self._meter, _BUFFER_BYTES)
        return message


def translate(
    error: OSError | http.client.HTTPException | ValueError, place: str, cancel: Cancel
) -> CalveError:
    """Return the error of ours for one of the socket, of TLS or of `http.client`."""
    if cancel.cancelled:
        return CancelledError()
    match error:
        case ssl.SSLCertVerificationError():
            return CertificateError(
                f"the server's certificate is refused: {error.verify_message}",
                place=place,
                hint="check the host name, the CA file and the machine's clock",
            )
        case socket.gaierror():
            hint = "check the spelling and the region in the URL, and the machine's DNS"
            return TransientError(
                f"the host name does not resolve ({error.strerror})", place=place, hint=hint
            )
        case TimeoutError():
            what = str(error)
            return TransientError(what if "bytes/s" in what else "timed out", place=place)
        case ConnectionRefusedError():
            hint = "check the port, the security groups and that the server runs"
            return TransientError("connection refused", place=place, hint=hint)
        case ConnectionError() | ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return TransientError("the server closed the connection", place=place)
        case ssl.SSLError():
            return TransientError(f"TLS failed ({error.reason or error})", place=place)
        case OSError():
            return TransientError(f"no connection ({error.strerror or error})", place=place)
        case http.client.BadStatusLine() | http.client.IncompleteRead():
            return TransientError("the answer is not HTTP", place=place)
        case http.client.HTTPException():
            return DamagedError(f"the answer is not HTTP ({error})", place=place)
        case _:
            return UsageError("a header or the path cannot be sent as it is", place=place)
