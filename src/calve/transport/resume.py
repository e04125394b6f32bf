"""Reading an object to its end over connections that break.

Source: RFC 9110, sections 13 and 14. A broken body goes on where it broke, by `Range` and `If-Match`; the total
size and the ETag of every part must be those of the first. What the bytes are worth is for the reader to verify. A
range of an object is read the same way: a server that sends more or less than the range is refused.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING, Self

from calve.clock import SYSTEM, Clock
from calve.errors import ConflictError, DamagedError, TransientError
from calve.transport.call import signed_request
from calve.transport.http import CHUNK_BYTES
from calve.transport.retry import DEFAULT, Policy, retry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from calve.transport.http import Client, Response
    from calve.transport.sigv4 import Signer

__all__ = ["ResumingReader"]

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)


class ResumingReader:
    """An object's bytes from an offset to its end, or to before another; close it, or use it as a context manager.

    The request is sent by the first read. The policy holds for every read anew: it bounds how often the object is
    asked for without a byte of progress.

    Args:
        client: its cancel ends every wait.
        url: percent-encoded.
        headers: sent with every request.
        signer: signs every request; without one redirects are followed.
        policy: when to give up.
        offset_bytes: where to begin.
        end_bytes: where to stop, itself excluded; DamagedError where the object is shorter.
        size_bytes: of the whole object, where known; DamagedError where the server says otherwise.
        clock: for waits.
        rng: gives numbers from 0 to 1.
        on_retry: told the number of failed attempts, the wait in seconds and the error.

    Attributes:
        size_bytes: of the whole object; None until known.
        offset_bytes: of the next byte.
    """

    def __init__(
        self,
        client: Client,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        signer: Signer | None = None,
        policy: Policy = DEFAULT,
        offset_bytes: int = 0,
        end_bytes: int | None = None,
        size_bytes: int | None = None,
        clock: Clock = SYSTEM,
        rng: Callable[[], float] = random.random,
        on_retry: Callable[[int, float, TransientError], object] = lambda *_: None,
    ) -> None:
        self.offset_bytes = offset_bytes
        self.size_bytes = size_bytes
        self._end_bytes = end_bytes
        self._client = client
        self._url = url
        self._place = url.partition("?")[0]
        self._headers = dict(headers or {})
        self._signer = signer
        self._policy = policy
        self._clock = clock
        self._rng = rng
        self._on_retry = on_retry
        self._known_bytes = size_bytes
        self._began = False
        self._etag: str | None = None
        self._response: Response | None = None
        self._ended = end_bytes is not None and end_bytes <= offset_bytes

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        """Return 1 to `size` bytes (at most 64 KiB); b"" at the end.

        Raises:
            TransientError: attempts without progress are used up.
            DeadlineError: the policy's time without progress is.
            DamagedError: the object changed while it was read, has another size, or cannot be resumed.
            NotFoundError: it does not exist.
            AccessError: it may not be read.
        """
        if self._ended:
            return b""
        return retry(
            lambda: self._read(size),
            self._policy,
            cancel=self._client.cancel,
            clock=self._clock,
            rng=self._rng,
            on_retry=self._on_retry,
        )

    def close(self) -> None:
        """Give the connection back, or close it where the rest is long."""
        self._ended = True
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        if self._response is None and 0 < self.offset_bytes == self._stop():
            return b""
        response = self._response
        if response is None:
            response = self._response = self._open()
        try:
            data = response.read(size)
        except TransientError:
            self._response = None
            raise
        self.offset_bytes += len(data)
        stop = self._stop()
        if self._end_bytes is not None and self.offset_bytes > self._end_bytes:
            self.close()
            raise DamagedError("the server sends more than was asked", place=self._place)
        if data:
            self._began = True
            return data
        if stop is not None and self.offset_bytes != stop:
            self._response = None
            raise TransientError(
                f"the body ended at {self.offset_bytes} of {stop} bytes", place=self._place
            )
        self.close()
        return b""

    def _stop(self) -> int | None:
        """Return where the bytes that are wanted end; None until that is known."""
        return self.size_bytes if self._end_bytes is None else self._end_bytes

    def _open(self) -> Response:
        headers = dict(self._headers)
        if not self._began:  # nothing was read yet: another version is as good
            self._etag, self.size_bytes = None, self._known_bytes
        if self._end_bytes is not None:
            headers["range"] = f"bytes={self.offset_bytes}-{self._end_bytes - 1}"
        elif self.offset_bytes:
            headers["range"] = f"bytes={self.offset_bytes}-"
        if self._etag is not None and not self._etag.startswith("W/"):
            headers["if-match"] = self._etag
        try:
            response = signed_request(self._client, self._signer, "GET", self._url, headers=headers)
        except ConflictError as error:
            raise self._changed() from error
        try:
            self._check(response)
        except DamagedError:
            response.close()
            raise
        return response

    def _check(self, response: Response) -> None:
        """Hold the answer's head against what was asked, and against the first answer."""
        if response.status == 206:
            size = self._range(response)
        elif response.status == 200 and self.offset_bytes == 0 and self._whole(response):
            size = response.length_bytes
        else:
            raise DamagedError(
                f"the server answered {response.status} to a range; it cannot be read on",
                place=self._place,
            )
        etag = response.headers.get("etag")
        if self._etag is not None and etag != self._etag:
            raise self._changed()
        if self.size_bytes is not None and size is not None and size != self.size_bytes:
            raise DamagedError(
                f"the object has {size} bytes, not {self.size_bytes}", place=self._place
            )
        self._etag = etag
        if self.size_bytes is None:
            self.size_bytes = size

    def _whole(self, response: Response) -> bool:
        """Say whether the whole object is what was asked for: a server may ignore a range."""
        if self._end_bytes is None:
            return True
        return self._end_bytes in {response.length_bytes, self.size_bytes}

    def _range(self, response: Response) -> int | None:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if found is None:
            raise DamagedError("a malformed Content-Range", place=self._place)
        size = None if found[3] == "*" else int(found[3])
        stop = int(found[2]) + 1
        if self._end_bytes is None:
            ends = size is None or stop == size
        else:
            ends = stop == self._end_bytes and (size is None or stop <= size)
        if int(found[1]) != self.offset_bytes or not ends:
            raise DamagedError("the answer has another range than was asked", place=self._place)
        return size

    def _changed(self) -> DamagedError:
        return DamagedError("the object changed while it was read", place=self._place)
