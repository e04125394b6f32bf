"""Objects under keys: what a directory, a web server and an S3 bucket have in common.

A key is relative, without `.` and `..`; a narinfo's `URL:` is one, and foreign: `check_key` judges it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from calve.cache import url as urls
from calve.errors import AccessError, CalveError, DamagedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.transport.credentials import Provider
    from calve.transport.http import Client

__all__ = [
    "Listed",
    "MissingCacheError",
    "Objects",
    "Readable",
    "check_key",
    "content_type",
    "is_missing",
    "open_objects",
]

_KEY = re.compile(r"[!-~]{1,1024}")  # S3's bound
_ESCAPES = (("%2e", "."), ("%2E", "."), ("%2f", "/"), ("%2F", "/"), ("%5c", "\\"), ("%5C", "\\"))


class MissingCacheError(NotFoundError):
    """Not an object is missing, but the bucket or the directory that would hold it."""


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing says of an object; `tag` is that of its version, `modified_s` when it was written (epoch)."""

    key: str
    size_bytes: int
    tag: str
    modified_s: float


class Readable(Protocol):
    """One object's bytes, in order."""

    def read(self, size: int, /) -> bytes:
        """Return at least one and at most `size` bytes, none at the end."""

    def __enter__(self) -> Self:
        """Return itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        """Let go of it."""


class Objects(Protocol):
    """A cache's objects. Every method may be called by any thread.

    Methods that read raise NotFoundError where there is no such object, MissingCacheError where the cache itself is
    missing, AccessError where it is denied, and TransientError once retries are used up.
    """

    @property
    def url(self) -> str:
        """Return where they are, for messages; without a slash at its end."""

    def get(self, key: str, limit: int) -> bytes:
        """Return a small object; DamagedError where it has more than `limit` bytes."""

    def get_tagged(self, key: str, limit: int) -> tuple[bytes, str]:
        """Return a small object and a tag of its present version, for `put(match=…)`."""

    def open(
        self, key: str, size: int | None = None, *, start: int = 0, end: int | None = None
    ) -> Readable:
        """Open an object, or its bytes from `start` to before `end`; `size` is how long it is said to be."""

    def head(self, key: str) -> int | None:
        """Return an object's size in bytes; None where there is none."""

    def put(
        self,
        key: str,
        data: bytes,
        *,
        only_new: bool = False,
        match: str | None = None,
        content_type: str | None = None,
    ) -> bool:
        """Write a small object, whole or not at all.

        Args:
            key: where.
            data: its bytes.
            only_new: write only where there is none.
            match: write only in place of the version with this tag.
            content_type: by default that of the key's ending.

        Returns:
            Whether it was written; False only where a condition did not hold.
        """

    def put_stream(
        self,
        key: str,
        chunks: Iterator[bytes],
        *,
        only_new: bool = False,
        content_type: str | None = None,
    ) -> bool:
        """Write an object of unknown size, whole or not at all: an error of `chunks` leaves nothing behind."""

    def delete(self, key: str, *, match: str | None = None) -> bool:
        """Remove an object; nothing happens where there is none.

        Args:
            key: which.
            match: only the version with this tag.

        Returns:
            False only where there is another version.
        """

    def delete_many(self, listed: Iterable[Listed]) -> list[Listed]:
        """Remove objects unless they changed since they were listed; return those that changed and stay."""

    def list(self, prefix: str) -> Iterator[Listed]:
        """Return the objects whose keys begin so, sorted by the bytes of their keys."""


def is_missing(error: CalveError) -> bool:
    """Say whether an error of reading an object says that it is not there.

    To who may not list S3 says "denied" of a missing object, with a reason for a GET and without one for a HEAD.
    """
    if isinstance(error, AccessError):
        return error.service_code in {"", "AccessDenied"} and not isinstance(
            error.__cause__, OSError
        )
    return isinstance(error, NotFoundError) and not isinstance(error, MissingCacheError)


def check_key(key: str, place: object = None) -> str:
    """Return a key; DamagedError unless it stays below the cache's own address."""
    path = key.partition("?")[0]
    for escape, letter in _ESCAPES:  # a web server takes them for what they stand for
        path = path.replace(escape, letter)
    if (
        not _KEY.fullmatch(key)
        or "://" in path
        or "#" in key
        or "\\" in f"{key}{path}"
        or any(part in {"", ".", ".."} for part in path.split("/"))
        or any(part in {".", ".."} for part in key.split("/"))  # a directory knows of no query
    ):
        raise DamagedError(f"{key[:200]!r} is not the key of an object in this cache", place=place)
    return key


def content_type(key: str) -> str:
    """Return the media type of an object, as Nix gives it."""
    if key.endswith(".narinfo"):
        return "text/x-nix-narinfo"
    if key == "nix-cache-info":
        return "text/x-nix-cache-info"
    if key.startswith("nar/"):
        return "application/x-nix-nar"
    return "application/json" if key.endswith(".json") else "application/octet-stream"


def open_objects(
    location: str | urls.Location, client: Client, provider: Provider | None = None
) -> Objects:
    """Open a cache.

    Args:
        location: its URL.
        client: for those that are behind HTTP; the caller closes it.
        provider: of AWS credentials, for S3; without one, requests are not signed.

    Raises:
        UsageError: the URL is not one.
    """
    where = urls.parse(location) if isinstance(location, str) else location
    match where:
        case urls.Directory():
            from calve.cache.directory import DirectoryObjects

            return DirectoryObjects(where.path)
        case urls.Web():
            from calve.cache.web import WebObjects

            return WebObjects(where.base, client)
        case urls.S3():
            from calve.cache.s3 import S3Objects

            return S3Objects(where, client, provider)
    raise UsageError("this cache cannot be opened", place=where)
