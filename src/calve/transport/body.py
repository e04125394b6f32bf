"""Where an answer's body ends: by its length, by its chunks, or with the connection.

Source: RFC 9112, section 6. The framing is done here, not by `http.client`, whose reads take an early end of the
stream for the end of the body.
"""

from __future__ import annotations

from typing import Protocol

from calve.errors import DamagedError, TransientError

__all__ = ["Body", "Chunked", "Fixed", "Source", "UntilClose"]

_LINE_BYTES = 4096
_TRAILER_LINES = 100


class Source(Protocol):
    """What is read from: an `io.BufferedReader`."""

    def read1(self, size: int, /) -> bytes:
        """Return what one receive gives, at most `size` bytes; b"" at the end."""

    def readline(self, size: int, /) -> bytes:
        """Return a line, at most `size` bytes of it."""


class Body(Protocol):
    """A body that is read piece by piece; `ended` once nothing is left of it."""

    @property
    def ended(self) -> bool:
        """Say whether all of it was read."""

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end; TransientError where the peer stopped early."""


class Fixed:
    """A body of Content-Length bytes."""

    def __init__(self, source: Source, length: int, place: str) -> None:
        self._source = source
        self._left = length
        self._place = place

    @property
    def ended(self) -> bool:
        """Say whether all of it was read."""
        return self._left == 0

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end; TransientError where the peer stopped early."""
        if self._left == 0:
            return b""
        data = self._source.read1(min(size, self._left))
        if not data:
            raise TransientError(
                f"the connection ended {self._left} bytes before the end of the body",
                place=self._place,
            )
        self._left -= len(data)
        return data


class Chunked:
    """A body in chunks, each with its size in hexadecimal."""

    def __init__(self, source: Source, place: str) -> None:
        self._source = source
        self._left = 0
        self._ended = False
        self._place = place

    @property
    def ended(self) -> bool:
        """Say whether all of it was read."""
        return self._ended

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end; TransientError where the peer stopped early."""
        if self._ended:
            return b""
        if self._left == 0:
            self._left = self._size()
            if self._left == 0:
                self._trailers()
                self._ended = True
                return b""
        data = self._source.read1(min(size, self._left))
        if not data:
            raise self._early()
        self._left -= len(data)
        if self._left == 0 and self._line() != b"":
            raise DamagedError("a chunk is longer than its size", place=self._place)
        return data

    def _size(self) -> int:
        digits = self._line().partition(b";")[0].strip()
        if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
            raise DamagedError("a chunk has no size", place=self._place)
        return int(digits, 16)

    def _trailers(self) -> None:
        for _ in range(_TRAILER_LINES):
            if self._line() == b"":
                return
        raise DamagedError("too many trailers", place=self._place)

    def _line(self) -> bytes:
        line = self._source.readline(_LINE_BYTES)
        if not line.endswith(b"\n"):
            if len(line) == _LINE_BYTES:
                raise DamagedError("a line between chunks is too long", place=self._place)
            raise self._early()
        return line.rstrip(b"\r\n")

    def _early(self) -> TransientError:
        return TransientError("the connection ended before the last chunk", place=self._place)


class UntilClose:
    """A body that ends with the connection: an early end cannot be told from the end."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._ended = False

    @property
    def ended(self) -> bool:
        """Say whether all of it was read."""
        return self._ended

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, b"" at the end."""
        data = b"" if self._ended else self._source.read1(size)
        self._ended = not data
        return data
