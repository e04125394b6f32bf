"""What a GET or HEAD of an object answers: conditions, one range, headers.

Source: GetObject in the S3 API Reference; RFC 9110, 13 and 14. S3 serves one range and ignores a header that names
several or is malformed.
"""

from __future__ import annotations

import re
from email.utils import format_datetime, parsedate_to_datetime
from typing import TYPE_CHECKING

from calve.region.message import FileRange
from calve.region.signature import Refusal

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Mapping

    from calve.region.objects_store import Object

__all__ = ["select"]

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


def select(
    request: Mapping[str, str], entry: Object, whole: FileRange
) -> tuple[int, dict[str, str], FileRange]:
    """Choose status, headers and bytes by the request's headers.

    Raises:
        Refusal: PreconditionFailed, InvalidRange.
    """
    headers = {
        "ETag": f'"{entry.etag}"',
        "Last-Modified": format_datetime(entry.modified, usegmt=True),
        "Accept-Ranges": "bytes",
        "Server": "AmazonS3",
        **entry.headers,
    }
    if _unmodified(request, entry):
        return 304, headers, FileRange(whole.file, 0, 0)
    span = _span(request.get("range", ""), entry.size)
    if span is None:
        if request.get("x-amz-checksum-mode", "").upper() == "ENABLED":
            headers |= {f"x-amz-checksum-{name}": text for name, text in entry.checksums.items()}
        return 200, headers, whole
    start, size = span
    headers["Content-Range"] = f"bytes {start}-{start + size - 1}/{entry.size}"
    return 206, headers, FileRange(whole.file, start, size)


def _unmodified(request: Mapping[str, str], entry: Object) -> bool:
    """Judge the conditions: raise where they fail, say whether 304 is the answer."""
    match, none_match = request.get("if-match"), request.get("if-none-match")
    if match is not None:
        if not _names(match, entry.etag):
            raise _failed("If-Match")
    elif (since := _date(request, "if-unmodified-since")) and entry.modified > since:
        raise _failed("If-Unmodified-Since")
    if none_match is not None:
        return _names(none_match, entry.etag)
    since = _date(request, "if-modified-since")
    return since is not None and entry.modified <= since


def _names(header: str, etag: str) -> bool:
    names = {part.strip().removeprefix("W/").strip('"') for part in header.split(",")}
    return "*" in names or etag in names


def _date(request: Mapping[str, str], name: str) -> dt.datetime | None:
    try:
        date = parsedate_to_datetime(request.get(name, ""))
    except ValueError:
        return None
    return date if date.tzinfo else None


def _span(header: str, size: int) -> tuple[int, int] | None:
    """Return start and size of the range; None for the whole object."""
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        return None
    if match[1]:
        start, last = int(match[1]), int(match[2] or size - 1)
        if match[2] and last < start:
            return None
        last = min(last, size - 1)
    else:
        start, last = max(0, size - int(match[2])), size - 1
    if start > last or start >= size:
        raise Refusal(
            416,
            "InvalidRange",
            "The requested range is not satisfiable",
            [("RangeRequested", header), ("ActualObjectSize", str(size))],
            {"Content-Range": f"bytes */{size}"},
        )
    return start, last - start + 1


def _failed(header: str) -> Refusal:
    return Refusal(
        412,
        "PreconditionFailed",
        "At least one of the pre-conditions you specified did not hold",
        [("Condition", header)],
    )
