"""Where a cache is, in Nix's own URL grammar.

`/dir` and `file:///dir`, `http(s)://host[:port]/prefix`, `s3://bucket[/prefix]?region=…&endpoint=…`.
Source: https://nix.dev/manual/nix/latest/store/types/s3-binary-cache-store and the pages beside it. What Nix lets a
URL say about a store and Calve decides otherwise (compression, keys, priorities) is read and ignored, so that the
same URL serves both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import quote, unquote

from calve.errors import UsageError

__all__ = ["S3", "Directory", "Location", "Web", "parse"]

DEFAULT_REGION = "us-east-1"  # Nix's default, and the region of S3's global endpoint

_IGNORED = frozenset(
    {
        "compression",
        "compression-level",
        "index-debug-info",
        "local-nar-cache",
        "parallel-compression",
        "path-info-cache-size",
        "priority",
        "secret-key",
        "secret-keys",
        "store",
        "system-features",
        "trusted",
        "want-mass-query",
        "write-nar-listing",
    }
)
_IGNORED_S3 = _IGNORED | {
    "buffer-size",
    "log-compression",
    "ls-compression",
    "multipart-chunk-size",
    "multipart-threshold",
    "multipart-upload",
    "narinfo-compression",
}
_S3 = frozenset({"addressing-style", "endpoint", "profile", "region", "scheme"})

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[a-z0-9\-]{1,40}")
_AUTHORITY = re.compile(r"(?:[A-Za-z0-9.\-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_PRINTABLE = re.compile(r"[!-~]*")


@dataclass(frozen=True, slots=True)
class Directory:
    """A cache in a directory of this machine."""

    path: str

    def __str__(self) -> str:
        """Return the URL, without parameters."""
        return f"file://{quote(self.path)}"


@dataclass(frozen=True, slots=True)
class Web:
    """A cache behind a web server; `base` has no slash at its end and no query."""

    base: str

    def __str__(self) -> str:
        """Return the URL, without parameters."""
        return self.base


@dataclass(frozen=True, slots=True)
class S3:
    """A cache in an S3 bucket.

    `prefix` stands before every key: empty, or it ends in a slash. `endpoint` is `scheme://host[:port]`, or None for
    AWS's own. `virtual` says that the bucket's name is part of the host's.
    """

    bucket: str
    prefix: str
    region: str
    scheme: str
    endpoint: str | None
    profile: str | None
    virtual: bool

    def __str__(self) -> str:
        """Return the URL, with the region and the endpoint."""
        end = "" if self.endpoint is None else f"&endpoint={self.endpoint}"
        prefix = f"/{self.prefix.rstrip('/')}" if self.prefix else ""
        return f"s3://{self.bucket}{prefix}?region={self.region}{end}"

    @property
    def base(self) -> str:
        """Return the URL of the bucket itself, without a slash at its end."""
        if self.endpoint is None:
            china = ".cn" if self.region.startswith("cn-") else ""
            scheme, host = self.scheme, f"s3.{self.region}.amazonaws.com{china}"
        else:
            scheme, _, host = self.endpoint.partition("://")
        return (
            f"{scheme}://{self.bucket}.{host}"
            if self.virtual
            else f"{scheme}://{host}/{self.bucket}"
        )


Location: TypeAlias = Directory | Web | S3


def parse(text: str) -> Location:
    """Read a cache's URL.

    Raises:
        UsageError: it is not one, or has a parameter that neither Nix nor Calve knows; the place is the URL.
    """
    if not _PRINTABLE.fullmatch(text):
        raise UsageError("a cache's URL has a blank or a letter outside of ASCII", place=text)
    if text.startswith("/"):
        return Directory(_directory(text, text))
    scheme, found, rest = text.partition("://")
    body, _, query = rest.partition("?")
    if "#" in text:
        raise UsageError("a cache's URL has no fragment", place=text)
    if found and scheme == "file":
        _parameters(query, _IGNORED, text)
        return Directory(_directory(unquote(body), text))
    if found and scheme in {"http", "https"}:
        _parameters(query, _IGNORED, text)
        return Web(f"{scheme}://{_web(body, text)}")
    if found and scheme == "s3":
        return _s3(body, _parameters(query, _IGNORED_S3 | _S3, text), text)
    raise UsageError(
        "this is not the URL of a binary cache",
        place=text,
        hint="give s3://bucket?region=…, https://host, file:///directory or /directory",
    )


def _parameters(query: str, known: frozenset[str], text: str) -> Mapping[str, str]:
    """Read `name=value&…`; a name twice, or one that is not known, is an error."""
    values: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name not in known:
            raise UsageError(f"the parameter {name!r} is not known", place=text)
        if name in values:
            raise UsageError(f"the parameter {name!r} is given twice", place=text)
        values[name] = unquote(value)
    return values


def _directory(path: str, text: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise UsageError("a cache's directory is an absolute path", place=text)
    return path.rstrip("/") or "/"


def _web(body: str, text: str) -> str:
    host, slash, path = body.partition("/")
    if not _AUTHORITY.fullmatch(host):
        raise UsageError(f"{host!r} is not a host", place=text)
    return (host + slash + path).rstrip("/")


def _s3(body: str, values: Mapping[str, str], text: str) -> S3:
    bucket, _, prefix = body.partition("/")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise UsageError(f"{bucket!r} is not the name of an S3 bucket", place=text)
    prefix = unquote(prefix).strip("/")
    if any(part in {"", ".", ".."} for part in prefix.split("/")) and prefix:
        raise UsageError(f"{prefix!r} is not a prefix of keys", place=text)
    region = values.get("region", DEFAULT_REGION)
    if not _REGION.fullmatch(region):
        raise UsageError(f"{region!r} is not a region", place=text)
    scheme = values.get("scheme", "https")
    if scheme not in {"http", "https"}:
        raise UsageError(f"{scheme!r} is not a scheme of S3: http or https", place=text)
    endpoint = _endpoint(values.get("endpoint", ""), scheme, text)
    style = values.get("addressing-style", "auto")
    if style not in {"auto", "path", "virtual"}:
        raise UsageError(f"{style!r} is not an addressing style: path, virtual or auto", place=text)
    return S3(
        bucket=bucket,
        prefix=f"{prefix}/" if prefix else "",
        region=region,
        scheme=scheme,
        endpoint=endpoint,
        profile=values.get("profile") or None,
        # A dot in the bucket's name would be one more level than AWS's wildcard certificate covers.
        virtual=style == "virtual" or (style == "auto" and endpoint is None and "." not in bucket),
    )


def _endpoint(value: str, scheme: str, text: str) -> str | None:
    """Read `host[:port]` or a URL without a path."""
    if not value:
        return None
    given, found, host = value.partition("://")
    if not found:
        given, host = scheme, value
    host = host.rstrip("/")
    if given not in {"http", "https"} or not _AUTHORITY.fullmatch(host):
        raise UsageError(
            f"{value!r} is not an endpoint: host[:port] or http(s)://host[:port]", place=text
        )
    return f"{given}://{host}"
