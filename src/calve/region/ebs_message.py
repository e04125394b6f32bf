"""EBS direct's requests and answers on the wire: headers and JSON, by the REST-JSON protocol.

Source: EBS direct API reference (2019-11-02), "Common errors" of the same, and "AWS REST JSON 1.1 protocol" of the
Smithy specification.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from calve.region.message import Request, Response
from calve.region.signature import Refusal
from calve.region.snapshot import BLOCK_BYTES, Start, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.region.ebs_faults import EbsFault

__all__ = ["Call", "answer", "error_response", "parse_start"]

_NUMBER = re.compile(r"[0-9]{1,10}")
_MEMBERS = frozenset(
    {
        "VolumeSize",
        "ParentSnapshotId",
        "Tags",
        "Description",
        "ClientToken",
        "Encrypted",
        "KmsKeyArn",
        "Timeout",
    }
)
_CODES = {
    "AccessDenied": "InvalidSignatureException",
    "AuthorizationHeaderMalformed": "IncompleteSignatureException",
    "ExpiredToken": "ExpiredTokenException",
    "InvalidAccessKeyId": "UnrecognizedClientException",
    "InvalidRequest": "IncompleteSignatureException",
    "InvalidToken": "UnrecognizedClientException",
    "RequestTimeTooSkewed": "InvalidSignatureException",
    "SignatureDoesNotMatch": "InvalidSignatureException",
    "XAmzContentSHA256Mismatch": "InvalidSignatureException",
}
"""S3's codes of a signature that does not hold, as other services call them; all are 403 here."""


class Call:
    """One request to EBS direct.

    Attributes:
        request: As received.
        operation: AWS's name.
        fault: What goes wrong with it.
        snapshot_id: Out of the path; "" where it has none.
    """

    def __init__(
        self, request: Request, operation: str, found: re.Match[str], fault: EbsFault | None
    ) -> None:
        self.request = request
        self.operation = operation
        self.fault = fault
        self._parts = found.groupdict()
        self.snapshot_id = self._parts.get("id", "")

    @property
    def index(self) -> int:
        """Return the block's index; Refusal where it is no number."""
        return _number(self._parts["index"], "BlockIndex")

    @functools.cached_property
    def body(self) -> bytes:
        """Return the body, a block's bytes at the most; Refusal beyond."""
        body = self.request.body
        if body.length is not None and body.length <= BLOCK_BYTES:
            return body.read(BLOCK_BYTES)  # in one piece: nothing is copied
        try:
            return body.read_all(BLOCK_BYTES)
        except ValueError:
            raise invalid(f"The body is longer than {BLOCK_BYTES} bytes.") from None

    @functools.cached_property
    def digest(self) -> bytes:
        """Return the body's SHA-256."""
        return hashlib.sha256(self.body).digest()

    def header(self, name: str) -> str:
        """Return a header; "" where it is missing."""
        return self.request.headers.get(name, "")

    def number(self, name: str, most: int = 2**31 - 1) -> int:
        """Return a header that is a number and must be there."""
        return _number(self.header(name), name, most=most)

    def parameter(self, name: str, least: int, most: int, default: int) -> int:
        """Return a number out of the query."""
        text = self.request.parameter(name)
        return default if text is None else _number(text, name, least, most)


def _number(text: str, name: str, least: int = 0, most: int = 2**31 - 1) -> int:
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise invalid(f"{name} must be a number from {least} to {most}, not '{text}'.")
    return int(text)


def parse_start(body: bytes) -> tuple[Start, str]:
    """Read StartSnapshot's document; return it with the client's token, "" where there is none."""
    try:
        members = json.loads(body)
    except (ValueError, RecursionError):
        members = None
    if not isinstance(members, dict):
        raise Refusal(400, "SerializationException", "The body is no JSON object.")
    unknown = members.keys() - _MEMBERS
    if unknown:
        raise invalid(f"There is no member {min(unknown)}.")
    if "VolumeSize" not in members:
        raise invalid("VolumeSize is missing.")
    ask = Start(
        gib=_member(members, "VolumeSize", int, 0),
        parent_id=_member(members, "ParentSnapshotId", str, "") or None,
        description=_text(members, "Description", 255),
        tags=_tags(members),
        encrypted=_member(members, "Encrypted", bool, default=False)
        if "Encrypted" in members
        else None,
        key_arn=_text(members, "KmsKeyArn", 2048) or None,
        timeout_minutes=_member(members, "Timeout", int, 60),
    )
    token = _text(members, "ClientToken", 255)
    if re.search(r"\s", token):
        raise invalid("ClientToken must not hold white space.")
    return ask, token


def _member(members: Mapping[str, Any], name: str, kind: type[Any], default: Any) -> Any:
    value = members.get(name, default)
    if type(value) is not kind:
        raise Refusal(400, "SerializationException", f"{name} has the wrong type.")
    return value


def _text(members: Mapping[str, Any], name: str, most: int) -> str:
    text = _member(members, name, str, "")
    if len(text) > most:
        raise invalid(f"{name} must have at most {most} characters.")
    return str(text)


def _tags(members: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    tags = _member(members, "Tags", list, [])
    if not all(isinstance(tag, dict) and tag.keys() <= {"Key", "Value"} for tag in tags):
        raise Refusal(400, "SerializationException", "Tags must be a list of Key and Value.")
    pairs = tuple((_text(tag, "Key", 127), _text(tag, "Value", 255)) for tag in tags)
    if not all(key and not key.lower().startswith("aws:") for key, _ in pairs):
        raise invalid("A tag's key is empty, or begins with 'aws:'.", "INVALID_TAG")
    return pairs


def answer(status: int, document: Mapping[str, Any]) -> Response:
    """Write an answer; members that are None are left out."""
    known = {name: value for name, value in document.items() if value is not None}
    return Response(status, {"Content-Type": "application/json"}, json.dumps(known).encode())


def error_response(refusal: Refusal) -> Response:
    """Write an error: its name in a header and in the document, with message and reason."""
    status, code = refusal.status, refusal.code
    if code in _CODES:
        status, code = 403, _CODES[code]
    details = {name: text for name, text in refusal.details if name == "Reason"}
    document = {"__type": code, "Message": refusal.message, **details}
    headers = {"Content-Type": "application/json", "x-amzn-errortype": code}
    return Response(status, headers, json.dumps(document).encode())
