"""What the headers of an upload say: its condition, its key, and what is stored beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calve.region.objects_store import Condition
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["check_key", "check_utf8", "checksum_headers", "condition", "kept_headers"]

_KEPT_HEADERS = frozenset(
    {"content-type", "cache-control", "content-disposition", "content-language", "expires"}
)


def condition(headers: Mapping[str, str]) -> Condition:
    """Read the condition of a write; S3 knows `*` alone for If-None-Match."""
    none_match, match = headers.get("if-none-match"), headers.get("if-match")
    if (none_match is not None and none_match != "*") or (none_match and match):
        raise Refusal(
            501,
            "NotImplemented",
            "A header you provided implies functionality that is not implemented",
            [("Header", "If-None-Match")],
        )
    return Condition(none_match is not None, None if match is None else match.strip('"'))


def kept_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Choose the headers that are stored with an object; MetadataTooLarge beyond 2 KB."""
    kept = {
        name: value
        for name, value in headers.items()
        if name in _KEPT_HEADERS or name.startswith("x-amz-meta-")
    }
    kept.setdefault("content-type", "binary/octet-stream")
    codings = [part.strip() for part in headers.get("content-encoding", "").split(",")]
    if rest := ",".join(coding for coding in codings if coding not in {"", "aws-chunked"}):
        kept["content-encoding"] = rest
    if sum(len(k) - 11 + len(v) for k, v in kept.items() if k.startswith("x-amz-meta-")) > 2048:
        raise Refusal(
            400,
            "MetadataTooLarge",
            "Your metadata headers exceed the maximum allowed metadata size",
            [("MaxSizeAllowed", "2048")],
        )
    return kept


def checksum_headers(checksums: Mapping[str, str]) -> dict[str, str]:
    """Name checksums as headers."""
    return {f"x-amz-checksum-{name}": value for name, value in checksums.items()}


def check_utf8(key: str) -> None:
    """Refuse a key that is no UTF-8."""
    try:
        key.encode()
    except UnicodeEncodeError:
        raise Refusal(400, "InvalidURI", "Couldn't parse the specified URI.") from None


def check_key(key: str) -> None:
    """Refuse a key that is longer than 1024 bytes."""
    if len(key.encode()) > 1024:
        raise Refusal(
            400,
            "KeyTooLongError",
            "Your key is too long",
            [("Size", str(len(key.encode()))), ("MaxSizeAllowed", "1024")],
        )
