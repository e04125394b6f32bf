"""Who asks and what they may: SigV4 as a service verifies it, and the table of keys and policies.

Source: "AWS Signature Version 4 for API requests" (IAM User Guide) and "Authenticating Requests: Using the
Authorization Header" (S3 API Reference). Only the Authorization header is understood, no presigned URLs.
Refusals carry S3's codes and statuses; a service with other names for them maps `Refusal.code`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import re
import secrets
import threading
import urllib.parse
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from calve.region.message import Request

__all__ = [
    "ANONYMOUS",
    "EMPTY_SHA256",
    "UNSIGNED_PAYLOAD",
    "UNSIGNED_TRAILER",
    "Allow",
    "Identity",
    "Key",
    "Principals",
    "Refusal",
    "verify",
]

SKEW_S = 900
EMPTY_SHA256 = hashlib.sha256().hexdigest()
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
_ALGORITHM = "AWS4-HMAC-SHA256"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DATE = re.compile(r"\d{8}T\d{6}Z")


class Refusal(Exception):  # noqa: N818  (an answer of the service, not a failure of the simulation)
    """A request is answered with an error.

    Attributes:
        status: HTTP status.
        code: AWS's code, such as `AccessDenied`.
        message: AWS's sentence.
        details: Further elements of the error document, in order.
        headers: Further headers.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        details: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.details = tuple(details)
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Allow:
    """A statement of a policy: globs (`*`, `?`) of an action and of a resource.

    `${aws:userid}` in the resource stands for the identity's own.
    """

    action: str
    resource: str = "*"

    def matches(self, action: str, resource: str, user_id: str) -> bool:
        """Say whether the statement allows it; actions ignore case, as in IAM."""
        own = self.resource.replace("${aws:userid}", user_id)
        return _glob(self.action.lower(), action.lower()) and _glob(own, resource)


def allowed(document: Mapping[str, Any]) -> tuple[Allow, ...]:
    """Return the statements of a policy document that allows; conditions are not looked at: none is simulated."""
    return tuple(
        Allow(action, resource)
        for statement in document["Statement"]
        for action in statement["Action"]
        for resource in statement["Resource"]
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """Who signed a request.

    Attributes:
        principal: The user or role, by which policies are looked up; "" is nobody.
        session: The role session's name, for a machine its instance id; "" for a user.
        user_id: What `aws:userid` is: `AROA…:session` for a role, `AIDA…` for a user.
    """

    principal: str
    session: str = ""
    user_id: str = ""

    @property
    def name(self) -> str:
        """Return `principal` or `principal/session`, for logs and counts."""
        return f"{self.principal}/{self.session}" if self.session else self.principal


ANONYMOUS = Identity("")


@dataclass(frozen=True, slots=True)
class Key:
    """An access key: long-lived, or temporary with a token and an expiry."""

    access_key: str
    secret_key: str = field(repr=False)
    identity: Identity
    token: str | None = field(default=None, repr=False)
    expires: dt.datetime | None = None


class Principals:
    """Keys and policies, thread-safe. What no statement allows is denied."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._policies: dict[str, tuple[Allow, ...]] = {}
        self._keys: dict[str, Key] = {}
        self._role_ids: dict[str, str] = {}

    def set_policy(self, principal: str, policy: Sequence[Allow]) -> None:
        """Give a user or role its policy, replacing what it had."""
        with self._lock:
            self._policies[principal] = tuple(policy)

    def add_user(self, name: str, policy: Sequence[Allow] = (Allow("*"),)) -> Key:
        """Make a user with a long-lived key."""
        self.set_policy(name, policy)
        return self.add_key(
            Key(_identifier("AKIA"), secrets.token_hex(20), Identity(name, "", _identifier("AIDA")))
        )

    def role_id(self, role: str) -> str:
        """Return a role's unique id, `AROA…`: what `aws:userid` of its sessions begins with."""
        with self._lock:
            return self._role_ids.setdefault(role, _identifier("AROA"))

    def add_session(self, role: str, session: str, expires: dt.datetime) -> Key:
        """Issue temporary credentials of a role, as IMDS hands them out for an instance."""
        identity = Identity(role, session, f"{self.role_id(role)}:{session}")
        key = Key(_identifier("ASIA"), secrets.token_hex(20), identity, secrets.token_hex(64))
        return self.add_key(replace(key, expires=expires))

    def add_key(self, key: Key) -> Key:
        """Enter a key; return it."""
        with self._lock:
            self._keys[key.access_key] = key
        return key

    def remove_key(self, access_key: str) -> None:
        """Forget a key."""
        with self._lock:
            self._keys.pop(access_key, None)

    def find(self, access_key: str) -> Key | None:
        """Return a key by its id."""
        with self._lock:
            return self._keys.get(access_key)

    def allows(self, identity: Identity, action: str, resource: str) -> bool:
        """Say whether a statement of the identity's policy allows the action."""
        with self._lock:
            policy = self._policies.get(identity.principal, ())
        return any(allow.matches(action, resource, identity.user_id) for allow in policy)


@dataclass(frozen=True, slots=True)
class _Authorization:
    access_key: str
    scope: tuple[str, str, str]
    signed: tuple[str, ...]
    signature: str

    @classmethod
    def parse(cls, header: str) -> _Authorization:
        algorithm, _, rest = header.partition(" ")
        if algorithm != _ALGORITHM:
            raise Refusal(400, "InvalidRequest", f"Please use {_ALGORITHM}.")
        fields = dict(part.strip().partition("=")[::2] for part in rest.split(","))
        scope = fields.get("Credential", "").rsplit("/", 4)
        signed = tuple(fields.get("SignedHeaders", "").split(";"))
        signature = fields.get("Signature", "")
        if len(scope) != 5 or scope[4] != "aws4_request" or not _SHA256.fullmatch(signature):
            raise _malformed("it needs a Credential, SignedHeaders and a Signature.")
        if list(signed) != sorted(set(signed)) or "host" not in signed:
            raise _malformed("SignedHeaders must be sorted and contain the host.")
        return cls(scope[0], (scope[1], scope[2], scope[3]), signed, signature)


def verify(
    request: Request,
    principals: Principals,
    *,
    service: str,
    region: str,
    now: dt.datetime,
    payload_sha256: str | None = None,
) -> Identity:
    """Verify a request's signature.

    Args:
        request: As received; its body is not read.
        principals: Whose keys count.
        service: `s3` signs the path encoded once, as sent; every other service encodes it twice, normalised.
        region: Which region the scope must name.
        now: The service's time of day.
        payload_sha256: The hash of the body where the client sends no x-amz-content-sha256; S3 insists on the
            header, and whoever reads the body must compare it (see `Request.headers`).

    Returns:
        Who signed; ANONYMOUS where there is no Authorization header.

    Raises:
        Refusal: With S3's code.
    """
    header = request.headers.get("authorization")
    if header is None:
        return ANONYMOUS
    authorization = _Authorization.parse(header)
    stamp = _check_time(request, authorization, now)
    _check_scope(authorization, service, region)
    key = _find_key(request, authorization, principals, now)
    payload = _payload_hash(request, service, payload_sha256)
    _check_signed_headers(request, authorization)
    canonical = _canonical_request(request, authorization, service, payload)
    expected = _sign(key.secret_key, stamp, authorization.scope, canonical)
    if not hmac.compare_digest(expected, authorization.signature):
        raise Refusal(
            403,
            "SignatureDoesNotMatch",
            "The request signature we calculated does not match the signature you provided. "
            "Check your key and signing method.",
            [("AWSAccessKeyId", key.access_key), ("CanonicalRequest", canonical)],
        )
    return key.identity


def _check_time(request: Request, authorization: _Authorization, now: dt.datetime) -> str:
    stamp = request.headers.get("x-amz-date", "")
    if not _DATE.fullmatch(stamp):
        raise Refusal(
            403, "AccessDenied", "AWS authentication requires a valid Date or x-amz-date header"
        )
    try:
        sent = dt.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC)
    except ValueError:
        raise Refusal(403, "AccessDenied", "the x-amz-date header is no date") from None
    if abs((now - sent).total_seconds()) > SKEW_S:
        raise Refusal(
            403,
            "RequestTimeTooSkewed",
            "The difference between the request time and the current time is too large.",
            [
                ("RequestTime", stamp),
                ("ServerTime", now.strftime("%Y-%m-%dT%H:%M:%SZ")),
                ("MaxAllowedSkewMilliseconds", str(SKEW_S * 1000)),
            ],
        )
    if authorization.scope[0] != stamp[:8]:
        raise _malformed(f'Invalid credential date "{authorization.scope[0]}".')
    return stamp


def _check_scope(authorization: _Authorization, service: str, region: str) -> None:
    _, scope_region, scope_service = authorization.scope
    if scope_region != region:
        raise Refusal(
            400,
            "AuthorizationHeaderMalformed",
            f"The authorization header is malformed; the region '{scope_region}' is wrong; "
            f"expecting '{region}'",
            [("Region", region)],
        )
    if scope_service != service:
        raise _malformed(
            f'incorrect service "{scope_service}". This endpoint belongs to "{service}".'
        )


def _find_key(
    request: Request,
    authorization: _Authorization,
    principals: Principals,
    now: dt.datetime,
) -> Key:
    key = principals.find(authorization.access_key)
    token = request.headers.get("x-amz-security-token")
    if key is None or (key.token is not None and token is None):
        raise Refusal(
            403,
            "InvalidAccessKeyId",
            "The AWS Access Key Id you provided does not exist in our records.",
            [("AWSAccessKeyId", authorization.access_key)],
        )
    if token is not None and not hmac.compare_digest(token, key.token or ""):
        raise Refusal(400, "InvalidToken", "The provided token is malformed or otherwise invalid.")
    if key.expires is not None and now >= key.expires:
        raise Refusal(400, "ExpiredToken", "The provided token has expired.")
    return key


def _payload_hash(request: Request, service: str, payload_sha256: str | None) -> str:
    value = request.headers.get("x-amz-content-sha256")
    if value is None:
        if service != "s3" and payload_sha256 is not None:
            return payload_sha256
        raise Refusal(
            400, "InvalidRequest", "Missing required header for this request: x-amz-content-sha256"
        )
    if _SHA256.fullmatch(value) or value in {UNSIGNED_PAYLOAD, UNSIGNED_TRAILER}:
        if service != "s3" and payload_sha256 is not None and value != payload_sha256:
            raise Refusal(
                400,
                "XAmzContentSHA256Mismatch",
                "The provided 'x-amz-content-sha256' header does not match what was computed.",
            )
        return value
    if value.startswith("STREAMING-"):
        raise Refusal(
            501, "NotImplemented", "Chunks with signatures of their own are not simulated."
        )
    raise Refusal(
        400,
        "InvalidArgument",
        f"x-amz-content-sha256 must be {UNSIGNED_PAYLOAD}, {UNSIGNED_TRAILER} or a valid sha256 value.",
    )


def _check_signed_headers(request: Request, authorization: _Authorization) -> None:
    unsigned = [
        name
        for name in request.headers
        if name.startswith("x-amz-") and name not in authorization.signed
    ]
    if unsigned:
        raise Refusal(
            403,
            "AccessDenied",
            "There were headers present in the request which were not signed",
            [("HeadersNotSigned", ", ".join(unsigned))],
        )


def _canonical_request(
    request: Request, authorization: _Authorization, service: str, payload: str
) -> str:
    lines = [
        request.method,
        _canonical_path(request.path, service),
        _canonical_query(request.query),
    ]
    for name in authorization.signed:
        value = " ".join(request.headers.get(name, "").split())
        lines.append(f"{name}:{value}")
    lines += ["", ";".join(authorization.signed), payload]
    return "\n".join(lines)


def _canonical_path(path: str, service: str) -> str:
    once = _encode(urllib.parse.unquote_to_bytes(path), "/")
    if service == "s3":
        return once
    parts: list[str] = []
    for part in once.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in {"", "."}:
            parts.append(part)
    tail = "/" if parts and once.endswith("/") else ""
    return _encode(("/" + "/".join(parts) + tail).encode(), "/")


def _canonical_query(query: str) -> str:
    pairs = []
    for part in query.split("&") if query else []:
        name, _, value = part.replace("+", " ").partition("=")
        pairs.append(
            (
                _encode(urllib.parse.unquote_to_bytes(name)),
                _encode(urllib.parse.unquote_to_bytes(value)),
            )
        )
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


def _sign(secret: str, stamp: str, scope: tuple[str, str, str], canonical: str) -> str:
    key = f"AWS4{secret}".encode()
    for part in (*scope, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    digest = hashlib.sha256(canonical.encode("latin-1", "replace")).hexdigest()
    text = "\n".join([_ALGORITHM, stamp, "/".join((*scope, "aws4_request")), digest])
    return hmac.digest(key, text.encode(), "sha256").hex()


def _encode(data: bytes, safe: str = "") -> str:
    return urllib.parse.quote(data, safe=f"-_.~{safe}")


def _malformed(what: str) -> Refusal:
    return Refusal(
        400,
        "AuthorizationHeaderMalformed",
        f"The authorization header is malformed; {what}",
    )


def _glob(pattern: str, text: str) -> bool:
    parts = (".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


def _identifier(prefix: str) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
    return prefix + "".join(secrets.choice(alphabet) for _ in range(16))
