"""What is to be deleted: the condition of one DELETE, and the document of DeleteObjects.

Source: DeleteObject and DeleteObjects in the S3 API Reference; "How to perform conditional deletes" in the user
guide. A condition on an object that is not there is NoSuchKey. What directory buckets alone know is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calve.region import objects_xml as xml
from calve.region.objects_store import Condition
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from xml.etree import ElementTree as ET

__all__ = ["MAXIMUM_KEYS", "condition", "failed", "named_objects"]

MAXIMUM_KEYS = 1000
"""Of one DeleteObjects."""
_UNKNOWN_HEADERS = ("if-none-match", "x-amz-if-match-last-modified-time", "x-amz-if-match-size")
_UNSIMULATED = frozenset({"VersionId", "LastModifiedTime", "Size"})


def condition(headers: Mapping[str, str]) -> Condition:
    """Read the condition of a DELETE: If-Match alone."""
    for name in _UNKNOWN_HEADERS:
        if name in headers:
            raise _unsimulated(name)
    return Condition(etag=_etag(headers.get("if-match")))


def named_objects(root: ET.Element) -> tuple[list[tuple[str, Condition]], bool]:
    """Read the keys and conditions of a Delete document, and whether the answer is to be quiet.

    Raises:
        Refusal: MalformedXML, also where there is no key or more than 1,000; NotImplemented.
    """
    named: list[tuple[str, Condition]] = []
    quiet: list[str] = []
    for child in root:
        if child.tag == "Object":
            named.append(_named(child))
        elif child.tag == "Quiet":
            quiet.append((child.text or "").strip())
        else:
            raise xml.malformed()
    if not 0 < len(named) <= MAXIMUM_KEYS or quiet not in ([], ["true"], ["false"]):
        raise xml.malformed()
    return named, quiet == ["true"]


def failed(key: str, refusal: Refusal) -> xml.Element:
    """Render what became of an object that stays."""
    return ("Error", [("Key", key), ("Code", refusal.code), ("Message", refusal.message)])


def _named(element: ET.Element) -> tuple[str, Condition]:
    fields: dict[str, str] = {}
    for child in element:
        if child.tag in _UNSIMULATED:
            raise _unsimulated(child.tag)
        if child.tag not in {"Key", "ETag"} or child.tag in fields:
            raise xml.malformed()
        fields[child.tag] = child.text or ""
    if not fields.get("Key"):
        raise xml.malformed()
    return fields["Key"], Condition(etag=_etag(fields.get("ETag")))


def _etag(text: str | None) -> str | None:
    return None if text is None else text.strip().strip('"')


def _unsimulated(name: str) -> Refusal:
    return Refusal(
        501,
        "NotImplemented",
        "A header you provided implies functionality that is not implemented",
        [("Header", name)],
    )
