"""AWS's RPC v2 protocol: CBOR in, CBOR out; of CloudWatch, because boto3 speaks nothing else to it.

Source: Smithy specification, "Smithy RPC v2 CBOR protocol" and "AWS query compatible"; RFC 8949. A request becomes the
same nested form that `query.parse` makes of its own; an `Instant` in an answer becomes a timestamp (tag 1).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from calve.region.message import Response
from calve.region.query import Dialect
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from calve.region.message import Request

__all__ = ["CLOUDWATCH", "CborDialect", "Instant", "decode", "encode", "read", "speaks"]

DEPTH = 32
ITEMS = 100_000
_PATH = re.compile(r"/service/([A-Za-z0-9_.]{1,80})/operation/([A-Za-z0-9_]{1,80})")
_FLOATS = {25: ">e", 26: ">f", 27: ">d"}
_SIMPLE = {20: False, 21: True, 22: None, 23: None}


class Instant(NamedTuple):
    """A time in an answer, in seconds since 1970."""

    seconds: float


@dataclass(frozen=True, slots=True)
class CborDialect(Dialect):
    """How a service answers in CBOR; `version` is its name in the path."""

    def answer(
        self,
        action: str,  # noqa: ARG002  (an answer in CBOR does not name it)
        result: Mapping[str, Any],
        request_id: str,
    ) -> Response:
        """Write the answer to an action."""
        return _response(200, result, {"x-amzn-RequestId": request_id})

    def error(self, refusal: Refusal, request_id: str) -> Response:
        """Write an error."""
        kind = "Sender" if refusal.status < 500 else "Receiver"
        headers = {
            "x-amzn-RequestId": request_id,
            "x-amzn-query-error": f"{refusal.code};{kind}",
        }
        body = {"__type": f"{self.namespace}#{refusal.code}", "message": refusal.message}
        return _response(refusal.status, body, headers)


CLOUDWATCH = CborDialect(
    "monitoring",
    "GraniteServiceVersion20100801",
    "com.amazonaws.cloudwatch.v2010_08_01",
    "",
    "ValidationError",
)


def speaks(request: Request) -> bool:
    """Say whether a request is of this protocol."""
    return request.headers.get("smithy-protocol") == "rpc-v2-cbor"


def read(request: Request, body: bytes) -> dict[str, Any]:
    """Decode a request into its parameters, all as text, with its service as `Version` and its `Action`.

    Raises:
        Refusal: SerializationException, where it is no such request.
    """
    found = _PATH.fullmatch(request.path)
    try:
        form = decode(body) if body else {}
    except ValueError as error:
        raise Refusal(400, "SerializationException", str(error)) from None
    if found is None or not isinstance(form, dict):
        raise Refusal(400, "SerializationException", "this is no operation with parameters")
    return {**_text(form), "Version": found[1], "Action": found[2]}


def _text(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _text(value) for name, value in node.items() if value is not None}
    if isinstance(node, list):
        return [_text(value) for value in node]
    return str(node).lower() if isinstance(node, bool) else str(node)


def _response(status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
    fixed = {"Content-Type": "application/cbor", "smithy-protocol": "rpc-v2-cbor"}
    return Response(status, {**fixed, **headers}, encode(body))


def encode(value: Any) -> bytes:
    """Encode what JSON could say, and instants; None in a map is left out."""
    match value:
        case Instant(seconds):
            return b"\xc1\xfb" + struct.pack(">d", seconds)
        case None:
            return b"\xf6"
        case bool():
            return b"\xf5" if value else b"\xf4"
        case int():
            return _head(0, value) if value >= 0 else _head(1, -1 - value)
        case float():
            return b"\xfb" + struct.pack(">d", value)
        case str():
            data = value.encode()
            return _head(3, len(data)) + data
        case Mapping():
            there = [(name, item) for name, item in value.items() if item is not None]
            return _head(5, len(there)) + b"".join(encode(x) for pair in there for x in pair)
        case list() | tuple():
            return _head(4, len(value)) + b"".join(map(encode, value))
    raise TypeError(f"CBOR of a {type(value).__name__} is not needed here")


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major << 5 | number])
    for extra, code in enumerate((24, 25, 26, 27)):
        size = 1 << extra
        if number < 1 << 8 * size:
            return bytes([major << 5 | code]) + number.to_bytes(size, "big")
    raise ValueError(f"{number} is too large for CBOR")


def decode(data: bytes) -> Any:
    """Decode one item; tags are dropped.

    Raises:
        ValueError: It is no CBOR, is cut off, nests too deep, or more follows.
    """
    reader = _Reader(data)
    value = reader.item(0)
    if reader.at != len(data):
        raise ValueError("more bytes follow the CBOR item")
    return value


_BREAK = object()


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._items = 0
        self.at = 0

    def item(self, depth: int) -> Any:
        """Read one item, or the break that ends an indefinite one."""
        self._items += 1
        if depth > DEPTH or self._items > ITEMS:
            raise ValueError("the CBOR item nests too deep or is too long")
        first = self._take(1)[0]
        major, low = first >> 5, first & 31
        if major == 7:
            return self._simple(low)
        count = self._count(low)
        match major:
            case 0:
                return self._definite(count)
            case 1:
                return -1 - self._definite(count)
            case 2 | 3:
                return self._string(major, count, depth)
            case 4:
                return list(self._series(count, depth))
            case 5:
                return self._map(count, depth)
        return self.item(depth + 1)  # a tag's content

    def _take(self, size: int) -> bytes:
        part = self._data[self.at : self.at + size]
        if len(part) < size:
            raise ValueError("the CBOR item is cut off")
        self.at += size
        return part

    def _count(self, low: int) -> int | None:
        """Read the number behind a first byte; None for an indefinite length."""
        if low < 24:
            return low
        if low == 31:
            return None
        if low > 27:
            raise ValueError("a CBOR length is malformed")
        return int.from_bytes(self._take(1 << low - 24), "big")

    @staticmethod
    def _definite(count: int | None) -> int:
        if count is None:
            raise ValueError("a CBOR number has no value")
        return count

    def _simple(self, low: int) -> Any:
        if low == 31:
            return _BREAK
        if low in _FLOATS:
            return struct.unpack(_FLOATS[low], self._take(1 << low - 24))[0]
        if low not in _SIMPLE:
            raise ValueError("a CBOR simple value is unknown")
        return _SIMPLE[low]

    def _string(self, major: int, count: int | None, depth: int) -> str | bytes:
        if count is None:
            parts = list(self._series(None, depth))
            if not all(isinstance(part, str if major == 3 else bytes) for part in parts):
                raise ValueError("a CBOR string has a part that is none")
            return "".join(parts) if major == 3 else b"".join(parts)
        data = self._take(count)
        return data.decode() if major == 3 else data

    def _series(self, count: int | None, depth: int) -> Any:
        """Yield as many items, or all up to a break."""
        while count is None or count > 0:
            value = self.item(depth + 1)
            if value is _BREAK:
                if count is None:
                    return
                raise ValueError("a CBOR break stands in the wrong place")
            yield value
            count = None if count is None else count - 1

    def _map(self, count: int | None, depth: int) -> dict[str, Any]:
        flat = list(self._series(None if count is None else 2 * count, depth))
        names, values = flat[::2], flat[1::2]
        if len(names) != len(values) or not all(isinstance(name, str) for name in names):
            raise ValueError("a CBOR map is malformed")
        return dict(zip(names, values, strict=True))
