"""S3's XML: errors, listings and the small documents that clients send.

Source: S3 API Reference: "REST error responses", ListObjectsV2, CreateBucket, CompleteMultipartUpload.
"""

from __future__ import annotations

import base64
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from calve.region.message import Response
from calve.region.signature import Refusal

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Sequence

    from calve.region.objects_store import Object

__all__ = [
    "INTERNAL_ERROR",
    "SLOW_DOWN",
    "Element",
    "Listing",
    "document",
    "error_response",
    "iso",
    "malformed",
    "parse",
    "text_of",
]

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
Element = tuple[str, "str | Sequence[Element]"]


def document(name: str, elements: Iterable[Element]) -> bytes:
    """Render a document of S3's namespace out of (name, text or elements) pairs."""
    return f'{_HEAD}<{name} xmlns="{NAMESPACE}">{_render(elements)}</{name}>'.encode()


def _render(elements: Iterable[Element]) -> str:
    return "".join(
        f"<{name}>{_text(content) if isinstance(content, str) else _render(content)}</{name}>"
        for name, content in elements
    )


def _text(text: str) -> str:
    return "".join(f"&#{ord(c)};" if ord(c) < 0x20 and c not in "\t\n" else c for c in escape(text))


def error_response(
    refusal: Refusal, resource: str = "", request_id: str = "", host_id: str = ""
) -> Response:
    """Answer with S3's error document, which has no namespace."""
    elements = [
        ("Code", refusal.code),
        ("Message", refusal.message),
        *refusal.details,
        ("Resource", resource),
        ("RequestId", request_id),
        ("HostId", host_id),
    ]
    headers = {
        "Content-Type": "application/xml",
        "x-amz-request-id": request_id,
        "x-amz-id-2": host_id,
        **refusal.headers,
    }
    body = f"{_HEAD}<Error>{_render(elements)}</Error>".encode()
    return Response(refusal.status, headers, body)


SLOW_DOWN = error_response(Refusal(503, "SlowDown", "Please reduce your request rate."))
INTERNAL_ERROR = error_response(
    Refusal(500, "InternalError", "We encountered an internal error. Please try again.")
)


def malformed() -> Refusal:
    """Return the refusal of a document that is not what it should be."""
    return Refusal(
        400,
        "MalformedXML",
        "The XML you provided was not well-formed or did not validate against our published schema",
    )


def parse(data: bytes, name: str) -> ET.Element:
    """Parse a document that a client sent, namespaces removed; MalformedXML where it is not a `name`."""
    if b"<!" in data:  # no document type, hence no entities to expand
        raise malformed()
    try:
        root = ET.fromstring(data)  # noqa: S314
    except (ET.ParseError, LookupError, ValueError):  # the latter of its encoding
        raise malformed() from None
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    if root.tag != name:
        raise malformed()
    return root


def text_of(element: ET.Element, name: str) -> str:
    """Return the text of a child; "" where there is none."""
    return (element.findtext(name) or "").strip()


def iso(moment: dt.datetime) -> str:
    """Write a moment as S3 does in XML."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True, slots=True)
class Listing:
    """The parameters of one ListObjectsV2.

    Attributes:
        after: What the listing goes on from: out of the token, else `start-after`.
        token: The continuation token as the client sent it.
    """

    prefix: str
    delimiter: str
    limit: int
    start_after: str
    token: str
    url_encoded: bool

    @classmethod
    def parse(cls, parameters: dict[str, str]) -> Listing:
        """Check a request's parameters; InvalidArgument where they are wrong."""
        limit = parameters.get("max-keys", "1000")
        encoding = parameters.get("encoding-type", "url")
        if not (limit.isascii() and limit.isdigit()):
            raise _invalid(
                "max-keys", limit, "Provided max-keys not an integer or within integer range"
            )
        if encoding != "url":
            raise _invalid(
                "encoding-type", encoding, "Invalid Encoding Method specified in Request"
            )
        listing = cls(
            parameters.get("prefix", ""),
            parameters.get("delimiter", ""),
            min(int(limit), 1000),
            parameters.get("start-after", ""),
            parameters.get("continuation-token", ""),
            "encoding-type" in parameters,
        )
        if "continuation-token" in parameters and not listing.after:
            raise _invalid(
                "continuation-token", listing.token, "The continuation token provided is incorrect"
            )
        return listing

    @property
    def after(self) -> str:
        """Return the key or common prefix behind which to go on."""
        if not self.token:
            return self.start_after
        try:
            return base64.urlsafe_b64decode(self.token.encode()).decode()
        except ValueError:
            return ""

    def render(self, bucket: str, found: Sequence[Object | str], last: str | None) -> bytes:
        """Render the result."""
        elements: list[Element] = [
            ("Name", bucket),
            ("Prefix", self._key(self.prefix)),
            ("MaxKeys", str(self.limit)),
            ("KeyCount", str(len(found))),
            ("IsTruncated", "false" if last is None else "true"),
        ]
        if self.delimiter:
            elements.append(("Delimiter", self._key(self.delimiter)))
        if self.start_after:
            elements.append(("StartAfter", self._key(self.start_after)))
        if self.url_encoded:
            elements.append(("EncodingType", "url"))
        if self.token:
            elements.append(("ContinuationToken", self.token))
        if last is not None:
            token = base64.urlsafe_b64encode(last.encode()).decode()
            elements.append(("NextContinuationToken", token))
        for entry in found:
            if isinstance(entry, str):
                elements.append(("CommonPrefixes", [("Prefix", self._key(entry))]))
            else:
                elements.append(("Contents", self._contents(entry)))
        return document("ListBucketResult", elements)

    def _contents(self, entry: Object) -> list[Element]:
        return [
            ("Key", self._key(entry.key)),
            ("LastModified", iso(entry.modified)),
            ("ETag", f'"{entry.etag}"'),
            ("Size", str(entry.size)),
            ("StorageClass", "STANDARD"),
        ]

    def _key(self, text: str) -> str:
        return urllib.parse.quote(text, safe="/-_.~*") if self.url_encoded else text


def _invalid(name: str, value: str, message: str) -> Refusal:
    return Refusal(
        400, "InvalidArgument", message, [("ArgumentName", name), ("ArgumentValue", value)]
    )
