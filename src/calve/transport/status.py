"""What an answer's status and error body mean: errors of ours.

Sources: "Error responses" in the S3 API reference, "Common errors" in the EBS direct API reference. An error body
is foreign text: what is shown of it is bounded and has no control characters; a signature, a token or what was
signed never is.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from calve.errors import (
    AccessError,
    CalveError,
    ConflictError,
    DamagedError,
    NotFoundError,
    RefusedError,
    TransientError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.transport.http import Response

__all__ = ["ERROR_BYTES", "Problem", "error_from", "parse_error", "raise_for_status", "read_error"]

ERROR_BYTES = 16384
_TEXT_CHARS = 300
_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",  # garbled on its way, as the two below
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "InternalError",
        "InternalFailure",
        "InternalServerException",
        "IncompleteBody",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "XAmzContentSHA256Mismatch",
    }
)
_SKEW_CODES = frozenset({"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"})
_EXPIRED_CODES = frozenset({"ExpiredToken", "ExpiredTokenException", "InvalidToken"})
_ACCESS_CODES = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "InvalidAccessKeyId",
        "InvalidSignatureException",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_ACCESS_HINTS = {
    "AccessDenied": "the policy lacks the action; without s3:ListBucket a missing object is denied too",
    "InvalidAccessKeyId": "the access key does not exist, or not yet",
    "SignatureDoesNotMatch": "the secret key is not the access key's own",
}
_WRONG_REGION_CODES = frozenset(
    {"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect"}
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What an error body says; empty strings where it says nothing.

    Attributes:
        code: the service's name of the error.
        message: its sentence.
        request_id: what AWS's support asks for.
        region: where the bucket is, if the error is that it is elsewhere.
        expired: new credentials may help.
        skewed: a corrected clock may help.
    """

    code: str = ""
    message: str = ""
    request_id: str = ""
    region: str = ""

    @property
    def expired(self) -> bool:
        """Say whether new credentials may help."""
        return self.code in _EXPIRED_CODES

    @property
    def skewed(self) -> bool:
        """Say whether a corrected clock may help."""
        return self.code in _SKEW_CODES


def parse_error(body: bytes, headers: Mapping[str, str]) -> Problem:
    """Read an error out of a body of S3's XML or of JSON, and out of the headers; never fails.

    Args:
        body: at most ERROR_BYTES of it are looked at.
        headers: with lower-case names.
    """
    text = body[:ERROR_BYTES].decode("utf-8", "replace")
    kind = headers.get("x-amzn-errortype", "")
    if text.lstrip().startswith("{"):
        code, message = _json(text)
    else:
        code, message = _element(text, "Code"), _element(text, "Message")
    request_id = (
        headers.get("x-amz-request-id")
        or headers.get("x-amzn-requestid")
        or _element(text, "RequestId")
    )
    return Problem(
        code=_clean(code or kind).partition(":")[0].rpartition("#")[2],
        message=_clean(message),
        request_id=_clean(request_id),
        region=_clean(headers.get("x-amz-bucket-region") or _element(text, "Region")),
    )


def error_from(
    status: int, problem: Problem, headers: Mapping[str, str], *, place: object = None
) -> CalveError:
    """Return the error for a status of 300 and more (or for an error inside a 200 answer).

    Args:
        status: of the answer.
        problem: what its body says.
        headers: with lower-case names; of them `retry-after` counts.
        place: the URL without its query.
    """
    error = _error(status, problem, headers, place)
    error.service_code = problem.code
    return error


def _error(status: int, problem: Problem, headers: Mapping[str, str], place: object) -> CalveError:
    message = _sentence(status, problem)
    code = problem.code
    if code in _TRANSIENT_CODES or status in {408, 429} or status in {500, 502, 503, 504}:
        return TransientError(message, place=place, retry_after_s=_retry_after_s(headers))
    if problem.skewed:
        return AccessError(message, place=place, hint="set the machine's clock")
    if problem.expired:
        return AccessError(message, place=place, hint="renew the credentials")
    if code in _WRONG_REGION_CODES or (300 <= status < 400 and problem.region):
        where = f"the bucket is in {problem.region}" if problem.region else "the region is wrong"
        return UsageError(message, place=place, hint=where)
    if code in _ACCESS_CODES or status in {401, 403}:
        hint = _ACCESS_HINTS.get(code or "AccessDenied")
        return AccessError(message, place=place, hint=hint)
    if status in {404, 410}:
        return NotFoundError(message, place=place)
    if status in {409, 412}:
        return ConflictError(message, place=place)
    if status == 416:
        return DamagedError(message, place=place, hint="it is shorter than it should be")
    return RefusedError(message, place=place)


def read_error(response: Response) -> Problem:
    """Read the error in an answer's body, and close the answer."""
    with response:
        pieces: list[bytes] = []
        while sum(map(len, pieces)) < ERROR_BYTES and (data := response.read()):
            pieces.append(data)
        return parse_error(b"".join(pieces), response.headers)


def raise_for_status(response: Response) -> None:
    """Close the answer and raise its error, unless its status is below 300.

    Raises:
        TransientError: 408, 429, 5xx, and codes like SlowDown, InternalError, RequestTimeout.
        AccessError: 401, 403, and codes like AccessDenied, ExpiredToken, RequestTimeTooSkewed.
        NotFoundError: 404, 410.
        ConflictError: 409, 412.
        DamagedError: 416, a range beyond the end.
        UsageError: the bucket is in another region, which the hint names.
        RefusedError: any other.
    """
    if response.status < 300:
        return
    problem = read_error(response)
    raise error_from(response.status, problem, response.headers, place=response.place)


def _element(text: str, name: str) -> str:
    found = re.search(rf"<{name}>([^<]{{0,2000}})</{name}>", text)
    if found is None:
        return ""
    plain = found[1]
    for entity, char in (("lt", "<"), ("gt", ">"), ("quot", '"'), ("apos", "'"), ("amp", "&")):
        plain = plain.replace(f"&{entity};", char)
    return plain


def _json(text: str) -> tuple[str, str]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return "", ""
    message = str(fields.get("message") or fields.get("Message") or "")
    reason = str(fields.get("Reason") or "")  # EBS direct's, finer than its code
    return (
        str(fields.get("__type") or fields.get("code") or ""),
        f"{message} ({reason})" if reason else message,
    )


def _clean(text: str) -> str:
    shown = "".join(char if char.isprintable() else " " for char in text[: 2 * _TEXT_CHARS])
    return " ".join(shown.split())[:_TEXT_CHARS]


def _sentence(status: int, problem: Problem) -> str:
    parts = [f"the server answered {status}"]
    if problem.code:
        parts.append(f" {problem.code}")
    if problem.message:
        parts.append(f": {problem.message}")
    if problem.request_id:
        parts.append(f" (request {problem.request_id})")
    return "".join(parts)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After: seconds, or a date that is compared with the answer's own Date."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        when = parsedate_to_datetime(text)
        now = parsedate_to_datetime(headers.get("date", ""))
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None or now.tzinfo is None:
        when, now = when.replace(tzinfo=dt.UTC), now.replace(tzinfo=dt.UTC)
    return max(0.0, (when - now).total_seconds())
