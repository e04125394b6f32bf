"""AWS's Signature Version 4, in headers.

Source: "Signature Version 4 signing process" in AWS's IAM user guide, and S3's exceptions from it: the path is
encoded once and not normalised, the hash of the payload is a header. botocore's signers are the oracle of the tests.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import threading
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes, urlsplit

from calve.clock import SYSTEM, Clock
from calve.transport.connection import Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from calve.transport.credentials import Credentials, Provider

__all__ = ["UNSIGNED_PAYLOAD", "Signer", "encode", "query", "sign"]

UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
_ALGORITHM = "AWS4-HMAC-SHA256"
_CONTENT_SHA256 = "x-amz-content-sha256"
# What a client or a proxy may add or change on the way.
_UNSIGNED_HEADERS = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-length",
        "expect",
        "keep-alive",
        "te",
        "transfer-encoding",
        "upgrade",
        "user-agent",
    }
)


_YEARS = range(2020, 2200)  # of a server's time that is believed: sums with it must be dates


def encode(key: str, *, safe: str = "/") -> str:
    """Percent-encode a key for the path of a URL as AWS wants it: all but letters, digits, `-_.~` and `/`."""
    return quote(key, safe=f"{safe}~")


def query(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a query string of names and values, percent-encoded as AWS wants it."""
    return "&".join(f"{encode(name, safe='')}={encode(value, safe='')}" for name, value in pairs)


def sign(
    method: str,
    url: str,
    headers: Mapping[str, str],
    *,
    credentials: Credentials,
    region: str,
    service: str,
    now: dt.datetime,
    payload_hash: str,
) -> dict[str, str]:
    """Return the headers with the signature's own added, all names in lower case.

    Args:
        method: in capitals.
        url: percent-encoded; its host is signed as the Host header.
        headers: all are signed but those that change on the way.
        credentials: a token becomes a header.
        region: of the endpoint.
        service: its signing name; `s3` has rules of its own.
        now: in UTC.
        payload_hash: SHA-256 of the body in hexadecimal, or UNSIGNED_PAYLOAD.
    """
    stamp = now.strftime("%Y%m%dT%H%M%SZ")
    sent = {name.lower(): value for name, value in headers.items()}
    sent.pop("authorization", None)
    sent["x-amz-date"] = stamp
    if credentials.token is not None:
        sent["x-amz-security-token"] = credentials.token
    if service == "s3" or payload_hash == UNSIGNED_PAYLOAD:
        sent[_CONTENT_SHA256] = payload_hash
    signed = {name: value for name, value in sent.items() if name not in _UNSIGNED_HEADERS}
    signed["host"] = Target.parse(url).endpoint.authority
    names = sorted(signed)
    canonical = "\n".join(
        (
            method,
            _path(url, service),
            _query(url),
            *(f"{name}:{' '.join(signed[name].split())}" for name in names),
            "",
            ";".join(names),
            payload_hash,
        )
    )
    scope = f"{stamp[:8]}/{region}/{service}/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{credentials.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = f"{_ALGORITHM}\n{stamp}\n{scope}\n{digest}"
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    sent["authorization"] = (
        f"{_ALGORITHM} Credential={credentials.access_key}/{scope}, "
        f"SignedHeaders={';'.join(names)}, Signature={signature}"
    )
    return sent


def _encoded(text: str, safe: str) -> str:
    """Encode as AWS does, whatever the caller left unencoded."""
    return quote(unquote_to_bytes(text), safe=f"{safe}~")


def _path(url: str, service: str) -> str:
    path = urlsplit(url).path or "/"
    if service == "s3":
        return _encoded(path, "/")
    segments: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in {"", "."}:
            segments.append(segment)
    last = "/" if path.endswith("/") and segments else ""
    return quote("/" + "/".join(segments) + last, safe="/~")


def _query(url: str) -> str:
    text = urlsplit(url).query
    if not text:
        return ""
    pairs = (pair.partition("=") for pair in text.split("&"))
    return "&".join(
        f"{name}={value}"
        for name, value in sorted(
            (_encoded(name, ""), _encoded(value, "")) for name, _, value in pairs
        )
    )


class Signer:
    """Signs requests to one service in one region; used by many threads.

    It holds no credentials: the provider is asked for every request. It keeps the server's time as an offset from
    the clock once an answer showed that the clock is wrong.
    """

    def __init__(
        self, service: str, region: str, provider: Provider, *, clock: Clock = SYSTEM
    ) -> None:
        self.service = service
        self.region = region
        self.generation = 0
        self._provider = provider
        self._clock = clock
        self._offset = dt.timedelta()
        self._lock = threading.Lock()

    def sign(
        self, method: str, url: str, headers: Mapping[str, str], payload_hash: str
    ) -> dict[str, str]:
        """Return the headers with the signature's own added; AccessError where there are no credentials."""
        return sign(
            method,
            url,
            headers,
            credentials=self._provider.credentials(),
            region=self.region,
            service=self.service,
            now=self._now(),
            payload_hash=payload_hash,
        )

    def payload_hash(
        self, url: str, headers: Mapping[str, str], body: bytes | Iterable[bytes] | None
    ) -> str:
        """Return what to sign of a body: the caller's own header, nothing for S3 over TLS, else the SHA-256.

        A body that comes in pieces is not signed: it would have to be read twice.
        """
        given = headers.get(_CONTENT_SHA256)
        if given is not None:
            return given
        data = b"" if body is None else body
        if not isinstance(data, bytes) or (self.service == "s3" and url.startswith("https:")):
            return UNSIGNED_PAYLOAD
        return hashlib.sha256(data).hexdigest()

    def adjust(self, date: str | None) -> bool:
        """Take the server's time from its Date header; False where it is that of the clock, within 4 minutes."""
        try:
            theirs = parsedate_to_datetime(date or "")
        except (ValueError, OverflowError):  # a zone or a year of twenty digits
            return False
        if theirs.tzinfo is None:
            theirs = theirs.replace(tzinfo=dt.UTC)
        if theirs.year not in _YEARS:
            return False
        if abs(theirs - self._now()) < dt.timedelta(minutes=4):
            return False
        self._offset = theirs - self._clock.now()
        return True

    def refresh(self, generation: int) -> None:
        """Have the provider fetch new credentials, once for all threads that failed with the old ones.

        Args:
            generation: the value of `self.generation` when the request that failed was signed.
        """
        with self._lock:
            if self.generation == generation:
                self._provider.credentials(refresh=True)
                self.generation += 1

    def _now(self) -> dt.datetime:
        return self._clock.now() + self._offset
