"""HTTP/1.1 messages (RFC 9112) as the simulated region reads and writes them: requests, bodies, responses."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = [
    "BUFFER_BYTES",
    "LINE_BYTES",
    "Body",
    "BrokenBodyError",
    "FileRange",
    "MalformedError",
    "Request",
    "Response",
    "body_length",
    "parse_request_line",
    "read_headers",
]

BUFFER_BYTES = 256 * 1024
LINE_BYTES = 16 * 1024
"""The longest request line or header line."""
HEADERS = 100
"""The most header lines."""
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


class BrokenBodyError(ConnectionError):
    """The client closed or garbled a request's body: nothing can be answered, nothing may be committed."""


class MalformedError(Exception):
    """A request that is no HTTP/1.1; answered by a status and the end of the connection."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Body:
    """A request's body, read once from the connection.

    Attributes:
        length: Bytes announced by Content-Length; None where the body is chunked.
        left: True until its end was read.
    """

    def __init__(
        self,
        source: IO[bytes],
        length: int | None = 0,
        *,
        announce: Callable[[], object] | None = None,
    ) -> None:
        self.length = length
        self.left = length != 0
        self._source = source
        self._announce = announce
        self._remaining = length or 0
        self._chunked = length is None

    @property
    def awaited(self) -> bool:
        """Say whether the client still waits for `100 Continue`."""
        return self.left and self._announce is not None

    def read(self, size: int = BUFFER_BYTES) -> bytes:
        """Read 1 to `size` bytes; b"" is the end.

        Raises:
            BrokenBodyError: The connection ended before the body, or a chunk is malformed.
        """
        if not self.left or size <= 0:
            return b""
        if self._announce is not None:
            self._announce()
            self._announce = None
        if self._chunked and self._remaining == 0 and not self._next_chunk():
            return b""
        data = self._source.read(min(size, self._remaining))
        if not data:
            raise BrokenBodyError("the connection ended within a body")
        self._remaining -= len(data)
        if self._remaining == 0:
            if self._chunked:
                self._end_chunk()
            else:
                self.left = False
        return data

    def read_all(self, limit: int) -> bytes:
        """Read the whole body; ValueError beyond `limit` bytes."""
        parts = []
        total = 0
        while data := self.read():
            total += len(data)
            if total > limit:
                raise ValueError(f"the body is longer than {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    def _line(self) -> bytes:
        line = self._source.readline(LINE_BYTES)
        if not line.endswith(b"\r\n"):
            raise BrokenBodyError("a chunk's line is not ended")
        return line[:-2]

    def _next_chunk(self) -> bool:
        size = self._line().split(b";", 1)[0].strip()
        if not _CHUNK_SIZE.fullmatch(size):
            raise BrokenBodyError("a chunk's size is not hexadecimal")
        self._remaining = int(size, 16)
        if self._remaining == 0:
            for _ in range(HEADERS):
                if not self._line():
                    self.left = False
                    return False
            raise BrokenBodyError("too many trailers")
        return True

    def _end_chunk(self) -> None:
        if self._line():
            raise BrokenBodyError("a chunk is longer than its size")


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it was sent.

    Attributes:
        method: As sent, upper case for every method there is.
        path: Raw, percent-encoded, without the query.
        query: Raw, without the question mark.
        headers: By lower-case name; repeated ones joined by a comma; Latin-1.
        body: To be streamed.
        peer: The client's address and port.
        secure: Sent over TLS.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: Body
    peer: tuple[str, int] = ("", 0)
    secure: bool = False

    @property
    def host(self) -> str:
        """Return the Host header, port included."""
        return self.headers.get("host", "")

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """Parse the query: decoded pairs in their order; a name without `=` has the value ""."""
        return urllib.parse.parse_qsl(self.query, keep_blank_values=True, errors="replace")

    def parameter(self, name: str) -> str | None:
        """Return the first parameter of that name."""
        return next((value for key, value in self.parameters if key == name), None)


@dataclass(frozen=True, slots=True)
class FileRange:
    """`size` bytes from `offset` of an open file; whoever sends it closes the file."""

    file: IO[bytes]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Response:
    """An answer. Content-Length and Date are added; on HEAD the body is counted and not sent.

    Attributes:
        on_sent: Called once, with the number of body bytes that went out.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    body: bytes | FileRange = b""
    on_sent: Callable[[int], object] | None = None

    @property
    def size(self) -> int:
        """Return the bytes of the body."""
        return self.body.size if isinstance(self.body, FileRange) else len(self.body)

    def close(self) -> None:
        """Close the body's file."""
        if isinstance(self.body, FileRange):
            self.body.file.close()


def parse_request_line(line: bytes) -> tuple[str, str, str]:
    """Split a request line into method, target and version; MalformedError where it is none."""
    if not line.endswith(b"\n"):
        raise MalformedError(414, "the request line is too long or not ended")
    parts = line.rstrip(b"\r\n").split(b" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]):
        raise MalformedError(400, "this is no request line")
    method, target, version = (part.decode("latin-1") for part in parts)
    if version not in {"HTTP/1.1", "HTTP/1.0"}:
        raise MalformedError(505, "only HTTP/1.1 is spoken")
    if not target.startswith("/") or not target.isascii() or not target.isprintable():
        raise MalformedError(400, "the target is no path in ASCII")
    return method, target, version


def read_headers(source: IO[bytes]) -> dict[str, str]:
    """Read header lines up to the empty one; MalformedError where they are none or too many."""
    headers: dict[str, str] = {}
    for _ in range(HEADERS + 1):
        line = source.readline(LINE_BYTES)
        if not line.endswith(b"\n"):
            raise MalformedError(431 if line else 400, "a header is too long or not ended")
        line = line.rstrip(b"\r\n")
        if not line:
            return headers
        raw_name, colon, raw_value = line.partition(b":")
        if not colon or not _TOKEN.fullmatch(raw_name):
            raise MalformedError(400, "this is no header")
        name, value = raw_name.decode().lower(), raw_value.strip(b" \t").decode("latin-1")
        if name in headers:
            if name in {"host", "content-length", "authorization", "transfer-encoding"}:
                raise MalformedError(400, f"{name} stands twice")
            value = f"{headers[name]},{value}"
        headers[name] = value
    raise MalformedError(431, "too many headers")


def body_length(headers: Mapping[str, str]) -> int | None:
    """Return the bytes of the body that the headers announce; None where it is chunked."""
    length = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise MalformedError(400, "a body is either chunked or of known length")
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise MalformedError(400, "the content length is no number")
    return int(length)
