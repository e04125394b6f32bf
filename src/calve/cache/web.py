"""Objects behind HTTP: reading, with retries and resumption, for any web server; a plain one cannot be written to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn, Self

from calve.cache.objects import Listed, check_key
from calve.errors import AccessError, CalveError, DamagedError, NotFoundError, UsageError
from calve.transport.call import signed_request
from calve.transport.http import Client, Response
from calve.transport.resume import ResumingReader
from calve.transport.retry import retry
from calve.transport.sigv4 import Signer

__all__ = ["Remote", "WebObjects"]

_DENIED = re.compile(r"the server answered 403( AccessDenied\b.*)?", re.DOTALL)


class _Reader:
    """An object's bytes; errors name the object as the cache does."""

    def __init__(self, owner: Remote, key: str, inner: ResumingReader) -> None:
        self._owner = owner
        self._key = key
        self._inner = inner

    def read(self, size: int) -> bytes:
        """Return at least one and at most `size` bytes, none at the end."""
        try:
            return self._inner.read(size)
        except CalveError as error:
            raise self._owner.explain(error, self._key) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.close()


class Remote:
    """What a web server and S3 have in common: reading.

    Args:
        url: of the cache, for messages.
        base: http(s) URL that keys are put behind, without a slash at its end.
        client: sends requests; its cancel ends every wait.
        signer: signs them; None where they go unsigned.
    """

    def __init__(self, url: str, base: str, client: Client, signer: Signer | None) -> None:
        self._url = url
        self._base = base
        self._client = client
        self._signer = signer

    @property
    def url(self) -> str:
        """Return where they are, for messages."""
        return self._url

    def address(self, key: str) -> str:
        """Return the http(s) URL of an object."""
        return f"{self._base}/{check_key(key, self._url)}"

    def explain(self, error: CalveError, key: str) -> CalveError:
        """Return the error to raise for one of the transport's."""
        place = f"{self._url}/{key}"
        if isinstance(error, NotFoundError):
            return NotFoundError("there is no such object", place=place)
        if isinstance(error, AccessError):
            # Whoever may not list a bucket is not told that an object is missing.
            vague = _DENIED.fullmatch(error.message) is not None
            message = f"denied or missing: {error.message}" if vague else error.message
            made = AccessError(message, place=place, hint=error.hint)
            made.service_code = error.service_code
            return made
        return error

    def send(
        self,
        method: str,
        key: str,
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        limit: int = 0,
        read_s: float | None = None,
    ) -> tuple[Response, bytes]:
        """Send a request until it is answered; return the answer, closed, and its body of at most `limit` bytes.

        Raises:
            CalveError: those of the transport, with the object as their place.
        """
        try:
            return retry(
                lambda: self.send_once(
                    method,
                    key,
                    query=query,
                    headers=headers,
                    body=body,
                    limit=limit,
                    read_s=read_s,
                ),
                self._client.retries,
                cancel=self._client.cancel,
                clock=self._client.clock,
            )
        except CalveError as error:
            raise self.explain(error, key) from error

    def send_once(
        self,
        method: str,
        key: str,
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        limit: int = 0,
        read_s: float | None = None,
    ) -> tuple[Response, bytes]:
        """Send a request one time, as `send` does; errors are the transport's own."""
        with signed_request(
            self._client,
            self._signer,
            method,
            self.address(key) + query,
            headers=headers,
            body=body,
            read_s=read_s,
        ) as response:
            return response, response.read_all(limit) if method != "HEAD" else b""

    def get(self, key: str, limit: int) -> bytes:
        """Return a small object."""
        return self.send("GET", key, limit=limit)[1]

    def get_tagged(self, key: str, limit: int) -> tuple[bytes, str]:
        """Return a small object and its ETag."""
        response, data = self.send("GET", key, limit=limit)
        tag = response.headers.get("etag")
        if tag is None:
            raise DamagedError("the server gives no ETag", place=f"{self._url}/{key}")
        return data, tag

    def open(
        self,
        key: str,
        size: int | None = None,  # noqa: ARG002
        *,
        start: int = 0,
        end: int | None = None,
    ) -> _Reader:
        """Open an object for reading, or its bytes from `start` to before `end`; broken connections are resumed.

        `size` is not held against the server's: it is a hint out of a narinfo, and the NAR's hash decides.
        """
        return _Reader(
            self,
            key,
            ResumingReader(
                self._client,
                self.address(key),
                signer=self._signer,
                offset_bytes=start,
                end_bytes=end,
                policy=self._client.retries,
                clock=self._client.clock,
            ),
        )

    def head(self, key: str) -> int | None:
        """Return an object's size in bytes; None where there is none."""
        try:
            response, _ = self.send("HEAD", key)
        except NotFoundError:
            return None
        length = response.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 19):
            raise DamagedError("the server gives no size", place=f"{self._url}/{key}")
        return int(length)


class WebObjects(Remote):
    """A cache behind a plain web server: for reading only."""

    def __init__(self, base: str, client: Client) -> None:
        super().__init__(base, base, client, None)

    def put(
        self,
        key: str,
        data: bytes,  # noqa: ARG002
        *,
        only_new: bool = False,  # noqa: ARG002
        match: str | None = None,  # noqa: ARG002
        content_type: str | None = None,  # noqa: ARG002
    ) -> bool:
        """Refuse."""
        self._refuse(key)

    def put_stream(
        self,
        key: str,
        chunks: Iterator[bytes],  # noqa: ARG002
        *,
        only_new: bool = False,  # noqa: ARG002
        content_type: str | None = None,  # noqa: ARG002
    ) -> bool:
        """Refuse."""
        self._refuse(key)

    def delete(self, key: str, *, match: str | None = None) -> bool:  # noqa: ARG002
        """Refuse."""
        self._refuse(key)

    def delete_many(self, listed: Iterable[Listed]) -> list[Listed]:
        """Refuse, unless there is nothing to remove."""
        for one in listed:
            self._refuse(one.key)
        return []

    def list(self, prefix: str) -> Iterator[Listed]:
        """Refuse."""
        raise UsageError(
            "a cache behind a web server cannot be listed",
            place=f"{self._url}/{prefix}",
            hint="name the bucket or the directory behind it: s3://… or file:///…",
        )

    def _refuse(self, key: str) -> NoReturn:
        raise UsageError(
            "a cache behind a web server can only be read",
            place=f"{self._url}/{key}",
            hint="push to s3://… or to a directory",
        )
