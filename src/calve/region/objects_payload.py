"""The bytes of an upload: decoded, counted, hashed and compared with what the client promised.

Source: "Checking object integrity" (S3 User Guide) and "Signature calculations: transferring payload in multiple
chunks, with trailing headers" (S3 API Reference). Known checksums: CRC-32, SHA-1, SHA-256; MD5 always.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Protocol

from calve.region.message import BUFFER_BYTES, LINE_BYTES, Body, BrokenBodyError
from calve.region.signature import UNSIGNED_PAYLOAD, UNSIGNED_TRAILER, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calve.region.message import Request

__all__ = [
    "DOCUMENT_BYTES",
    "MAXIMUM_BYTES",
    "Received",
    "read_checked_document",
    "read_document",
    "receive",
]

DOCUMENT_BYTES = 4 * 1024 * 1024
"""What a document in XML may have."""
MAXIMUM_BYTES = 5 * 1024**3
"""What one PUT may carry."""
_CHECKSUM = "x-amz-checksum-"
_NO_VALUE = {f"{_CHECKSUM}algorithm", f"{_CHECKSUM}mode", f"{_CHECKSUM}type"}
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})(;[^\r\n]*)?")


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


_ALGORITHMS: dict[str, tuple[Callable[[], _Hash], int]] = {
    "crc32": (_Crc32, 4),
    "sha1": (lambda: hashlib.sha1(usedforsecurity=False), 20),
    "sha256": (hashlib.sha256, 32),
}


@dataclass(frozen=True, slots=True)
class Received:
    """A body that kept its promises.

    Attributes:
        size: Bytes, decoded.
        md5: Its digest.
        checksums: Base64 by algorithm, of what the client gave and was compared.
    """

    size: int
    md5: bytes
    checksums: dict[str, str]


class _AwsChunked:
    """Decodes `aws-chunked`: sized chunks, then trailing headers."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._buffer = b""
        self._left = 0
        self._done = False
        self.trailers: dict[str, str] = {}

    def read(self, size: int = BUFFER_BYTES) -> bytes:
        """Read 1 to `size` bytes of content; b"" is the end."""
        if self._done:
            return b""
        if self._left == 0 and not self._next_chunk():
            return b""
        data = self._take(min(size, self._left))
        self._left -= len(data)
        if self._left == 0 and self._line():
            raise _incomplete("a chunk is longer than its size")
        return data

    def _take(self, size: int) -> bytes:
        if not self._buffer:
            self._buffer = self._body.read()
            if not self._buffer:
                raise _incomplete("the last chunk is missing")
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        return data

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            more = self._body.read(LINE_BYTES)
            if not more or len(self._buffer) > LINE_BYTES:
                raise _incomplete("a chunk's line is not ended")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def _next_chunk(self) -> bool:
        match = _CHUNK.fullmatch(self._line())
        if match is None:
            raise _incomplete("a chunk's size is not hexadecimal")
        self._left = int(match[1], 16)
        if self._left:
            return True
        self._done = True
        while line := self._line():
            name, _, value = line.decode("latin-1").partition(":")
            self.trailers[name.strip().lower()] = value.strip()
            if len(self.trailers) > 16:
                raise _incomplete("too many trailers")
        return False


def receive(request: Request, file: IO[bytes]) -> Received:
    """Stream a request's body into a file, and hold it against every length and hash that was given.

    Raises:
        Refusal: MissingContentLength, EntityTooLarge, IncompleteBody, InvalidDigest, InvalidRequest, BadDigest,
            XAmzContentSHA256Mismatch.
        BrokenBodyError: The client went away.
    """
    headers = request.headers
    promised = headers.get("x-amz-content-sha256", UNSIGNED_PAYLOAD)
    chunked = _AwsChunked(request.body) if promised == UNSIGNED_TRAILER else None
    length = _length(request, chunked is not None)
    trailer = headers.get("x-amz-trailer", "").lower() if chunked else ""
    expected = _expected(headers)
    names = set(expected) | ({trailer.removeprefix(_CHECKSUM)} if trailer else set())
    hashes = {name: _algorithm(name)[0]() for name in names}
    payload = None if promised in {UNSIGNED_PAYLOAD, UNSIGNED_TRAILER} else hashlib.sha256()
    md5 = hashlib.md5(usedforsecurity=False)
    size = 0
    source: Body | _AwsChunked = chunked or request.body
    while data := source.read(BUFFER_BYTES):
        size += len(data)
        if size > length:
            raise _incomplete("the body is longer than its decoded length")
        file.write(data)
        md5.update(data)
        for each in (*hashes.values(), *([payload] if payload else ())):
            each.update(data)
    if size != length:
        raise _incomplete("the body is shorter than its decoded length")
    if payload is not None and payload.hexdigest() != promised:
        raise Refusal(
            400,
            "XAmzContentSHA256Mismatch",
            "The provided 'x-amz-content-sha256' header does not match what was computed.",
            [
                ("ClientComputedContentSHA256", promised),
                ("S3ComputedContentSHA256", payload.hexdigest()),
            ],
        )
    if chunked and trailer:
        expected |= _expected(chunked.trailers)
        if trailer.removeprefix(_CHECKSUM) not in expected:
            raise Refusal(
                400,
                "MalformedTrailerError",
                "The request contained trailing data that was not well-formed",
            )
    for name, value in expected.items():
        _compare(name, value, hashes[name].digest())
    _check_md5(headers, md5.digest())
    return Received(size, md5.digest(), expected)


def read_document(request: Request, limit: int) -> bytes:
    """Read a small body (an XML document) whole, holding it against its hashes; Refusal as in `receive`."""
    try:
        data = request.body.read_all(limit)
    except BrokenBodyError:
        raise
    except ValueError:
        raise Refusal(400, "EntityTooLarge", "The document is too long.") from None
    promised = request.headers.get("x-amz-content-sha256", UNSIGNED_PAYLOAD)
    if promised != UNSIGNED_PAYLOAD and hashlib.sha256(data).hexdigest() != promised:
        raise Refusal(
            400,
            "XAmzContentSHA256Mismatch",
            "The provided 'x-amz-content-sha256' header does not match what was computed.",
        )
    _check_md5(request.headers, hashlib.md5(data, usedforsecurity=False).digest())
    return data


def read_checked_document(request: Request, limit: int) -> bytes:
    """Read a small body that must come with an MD5 or a checksum of its own; Refusal as in `receive`."""
    expected = _expected(request.headers)
    if not expected and "content-md5" not in request.headers:
        raise _invalid("Missing required header for this request: Content-MD5")
    data = read_document(request, limit)
    for name, value in expected.items():
        calculated = _algorithm(name)[0]()
        calculated.update(data)
        _compare(name, value, calculated.digest())
    return data


def _length(request: Request, chunked: bool) -> int:  # noqa: FBT001
    text = request.headers.get("x-amz-decoded-content-length" if chunked else "content-length", "")
    if not (text.isascii() and text.isdigit()):
        raise Refusal(
            411, "MissingContentLength", "You must provide the Content-Length HTTP header."
        )
    if int(text) > MAXIMUM_BYTES:
        raise Refusal(
            400,
            "EntityTooLarge",
            "Your proposed upload exceeds the maximum allowed size",
            [("ProposedSize", text), ("MaxSizeAllowed", str(MAXIMUM_BYTES))],
        )
    return int(text)


def _expected(headers: Mapping[str, str]) -> dict[str, str]:
    found = {
        name.removeprefix(_CHECKSUM): value
        for name, value in headers.items()
        if name.startswith(_CHECKSUM) and name not in _NO_VALUE
    }
    if len(found) > 1:
        raise _invalid(
            "Expecting a single x-amz-checksum- header. Multiple checksum Types are not allowed."
        )
    for name, value in found.items():
        _, size = _algorithm(name)
        if len(_base64(value) or b"") != size:
            raise _invalid(f"Value for {_CHECKSUM}{name} header is invalid.")
    sdk = headers.get("x-amz-sdk-checksum-algorithm")
    if sdk is not None and not found and "x-amz-trailer" not in headers:
        raise _invalid(
            "x-amz-sdk-checksum-algorithm specified, but no corresponding x-amz-checksum-* or "
            "x-amz-trailer headers were found."
        )
    return found


def _algorithm(name: str) -> tuple[Callable[[], _Hash], int]:
    if name in {"crc32c", "crc64nvme"}:
        raise Refusal(501, "NotImplemented", f"The checksum {name} is not simulated.")
    if name not in _ALGORITHMS:
        raise _invalid("The algorithm type you specified in x-amz-checksum- header is invalid.")
    return _ALGORITHMS[name]


def _compare(name: str, value: str, digest: bytes) -> None:
    if _base64(value) != digest:
        raise Refusal(
            400,
            "BadDigest",
            f"The {name.upper()} you specified did not match the calculated checksum.",
        )


def _check_md5(headers: Mapping[str, str], digest: bytes) -> None:
    given = headers.get("content-md5")
    if given is None:
        return
    value = _base64(given)
    if value is None or len(value) != 16:
        raise Refusal(400, "InvalidDigest", "The Content-MD5 you specified was invalid.")
    if value != digest:
        raise Refusal(
            400, "BadDigest", "The Content-MD5 you specified did not match what we received."
        )


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _invalid(message: str) -> Refusal:
    return Refusal(400, "InvalidRequest", message)


def _incomplete(what: str) -> Refusal:
    return Refusal(
        400,
        "IncompleteBody",
        f"You did not provide the number of bytes specified by the Content-Length HTTP header: {what}",
    )
