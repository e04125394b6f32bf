"""An answer whose body is read in small pieces.

A body that ends early is an error, and its connection is kept only where it was read to the end.
"""

from __future__ import annotations

import http.client
import re
from typing import TYPE_CHECKING, Self, cast

from calve.errors import CalveError, DamagedError, TransientError
from calve.transport.body import Body, Chunked, Fixed, Source, UntilClose
from calve.transport.connection import Connection, translate

if TYPE_CHECKING:
    from types import TracebackType

    from calve.transport.http import Client

__all__ = ["CHUNK_BYTES", "FAILURES", "Response"]

CHUNK_BYTES = 65536
FAILURES = (OSError, http.client.HTTPException, ValueError)  # what `translate` takes
_FOLDED = re.compile(r"[\r\n]+[ \t]*")


class Response:
    """An answer, whatever its status; read it or close it, best as a context manager.

    Attributes:
        method: of the request.
        url: of the request; the last one where redirects were followed.
        status: from 200 to 599.
        headers: with lower-case names; repeated ones joined by ", ".
        length_bytes: of the body, None where the server does not say (or there is no body: a HEAD's is in headers).
        place: the URL without its query, for messages.
    """

    def __init__(
        self,
        client: Client,
        connection: Connection,
        message: http.client.HTTPResponse,
        method: str,
        url: str,
    ) -> None:
        self.method = method
        self.url = url
        self.place = url.partition("?")[0]
        if message.status < 200:
            raise TransientError(f"the server answered {message.status}", place=self.place)
        self.status = message.status
        self.headers: dict[str, str] = {}
        for name, value in message.getheaders():
            key, text = name.lower(), _FOLDED.sub(" ", value).strip()
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text
        self.length_bytes: int | None = None
        self._client = client
        self._connection: Connection | None = connection
        self._message = message
        self._kept = not message.will_close
        self._body = self._frame(cast("Source", message.fp))
        self._settle()

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        """Return 1 to `size` bytes (at most 64 KiB) as soon as there are any; b"" at the end.

        Raises:
            TransientError: the body ended early, stalled, or came at less than 1 KiB/s.
            DamagedError: the body's framing is not HTTP.
        """
        if self._connection is None:
            return b""
        try:
            data = self._body.read(min(size, CHUNK_BYTES))
        except BaseException as error:
            self._leave(reuse=False)
            self._client.cancel.check()
            if isinstance(error, FAILURES):
                raise translate(error, self.place, self._client.cancel) from error
            raise
        self._settle()
        return data

    def read_all(self, limit: int) -> bytes:
        """Return the whole body; DamagedError where it is longer than `limit` bytes."""
        pieces: list[bytes] = []
        total = 0
        while total <= limit and (data := self.read()):
            pieces.append(data)
            total += len(data)
        if total > limit:
            self._leave(reuse=False)
            raise DamagedError(f"the answer is longer than {limit} bytes", place=self.place)
        return b"".join(pieces)

    def close(self) -> None:
        """Give the connection back: the rest of a short body is read first, for a long one it is closed."""
        left = CHUNK_BYTES
        try:
            short = self._kept and (self.length_bytes is None or self.length_bytes <= left)
            while short and left > 0 and (data := self.read(left)):
                left -= len(data)
        except CalveError:
            return  # read() has closed the connection; nobody wants the rest
        finally:
            self._leave(reuse=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._leave(reuse=False)

    def _frame(self, source: Source) -> Body:
        """Find out how the body ends (RFC 9112, section 6.3)."""
        if self.method == "HEAD" or self.status in {204, 304}:
            return Fixed(source, 0, self.place)
        coding = self.headers.get("transfer-encoding")
        if coding is not None:
            if coding.lower() != "chunked":
                raise DamagedError("an unknown transfer coding", place=self.place)
            return Chunked(source, self.place)
        lengths = {part.strip() for part in self.headers.get("content-length", "").split(",")}
        if lengths == {""}:
            self._kept = False
            return UntilClose(source)
        length = lengths.pop()
        if lengths or not (length.isascii() and length.isdigit() and len(length) < 19):
            raise DamagedError("a malformed Content-Length", place=self.place)
        self.length_bytes = int(length)
        return Fixed(source, self.length_bytes, self.place)

    def _settle(self) -> None:
        """Give the connection back as soon as nothing is left of the body."""
        if self._connection is not None and self._body.ended:
            self._leave(reuse=self._kept and not self._connection.leftover(self._message))

    def _leave(self, *, reuse: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._message.close()
            self._client.give_back(connection, reuse=reuse)
