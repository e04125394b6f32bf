"""Who may call the query APIs: the signature is verified, the signer's policy asked, and each service says no its way.

    Cloud(machines, balancer, authenticate=Access(principals, region="eu-central-1").check)

Source: "Common errors" of the Auto Scaling API reference; "Error codes for the Amazon EC2 API"; IAM User Guide,
"Troubleshoot access denied error messages". EC2 answers AuthFailure and UnauthorizedOperation where the others have
codes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calve.clock import SYSTEM, Clock
from calve.region.names import ACCOUNT
from calve.region.signature import Identity, Principals, Refusal, verify

if TYPE_CHECKING:
    from calve.region.message import Request

__all__ = ["Access", "Call", "denial"]


_IN_POLICIES = {"monitoring": "cloudwatch"}


@dataclass(frozen=True, slots=True)
class Call:
    """What a request asks for.

    Attributes:
        service: As in a credential's scope; policies name most services the same way.
        resource: The ARN that a policy has to allow; `*` for an action that is about none.
        payload_sha256: Of the body, in hexadecimal.
    """

    service: str
    action: str
    resource: str
    payload_sha256: str


class Access:
    """Checks requests against keys and policies; thread-safe.

    Args:
        principals: The keys and policies.
        region: What signatures must name.
        clock: For signatures and expiry.
    """

    def __init__(self, principals: Principals, *, region: str, clock: Clock = SYSTEM) -> None:
        self._principals = principals
        self._region = region
        self._clock = clock

    def check(self, request: Request, call: Call) -> Identity:
        """Return who signed a request that may be performed.

        Raises:
            Refusal: It is not signed as it should be, or no statement of the signer's policy allows it.
        """
        try:
            identity = verify(
                request,
                self._principals,
                service=call.service,
                region=self._region,
                now=self._clock.now(),
                payload_sha256=call.payload_sha256,
            )
        except Refusal as refusal:
            raise _unverified(refusal, call.service) from None
        action = f"{_IN_POLICIES.get(call.service, call.service)}:{call.action}"
        if not self._principals.allows(identity, action, call.resource):
            raise _denied(identity, action, call)
        return identity


def _unverified(refusal: Refusal, service: str) -> Refusal:
    """Name what S3 would answer as this service does."""
    late = refusal.code in {"ExpiredToken", "RequestTimeTooSkewed"}
    if service == "ec2":
        if late:
            return Refusal(400, "RequestExpired", "Request has expired.")
        return Refusal(
            401, "AuthFailure", "AWS was not able to validate the provided access credentials"
        )
    match refusal.code:
        case "InvalidAccessKeyId" | "InvalidToken":
            code, message = (
                "InvalidClientTokenId",
                "The security token included in the request is invalid.",
            )
        case "ExpiredToken":
            code, message = refusal.code, "The security token included in the request is expired"
        case "RequestTimeTooSkewed":
            code, message = "SignatureDoesNotMatch", _skewed(dict(refusal.details))
        case "SignatureDoesNotMatch":
            code, message = refusal.code, refusal.message
        case _:
            return Refusal(400, "IncompleteSignature", refusal.message)
    return Refusal(403, code, message)


def _skewed(details: dict[str, str]) -> str:
    """Say how a request's time is off; both times in the shape of x-amz-date."""
    sent = details["RequestTime"]
    now = details["ServerTime"].replace("-", "").replace(":", "")
    if sent < now:
        return f"Signature expired: {sent} is more than 15 min. earlier than {now}"
    return f"Signature not yet current: {sent} is more than 15 min. later than {now}"


def _denied(identity: Identity, action: str, call: Call) -> Refusal:
    message = denial(identity, action, call.resource)
    if call.service == "ec2":
        message = f"You are not authorized to perform this operation. {message}"
        return Refusal(403, "UnauthorizedOperation", message)
    return Refusal(403, "AccessDenied", message)


def denial(identity: Identity, action: str, resource: str) -> str:
    """Return what AWS says to who may not do something to a resource; `*` is none in particular."""
    where = "" if resource == "*" else f" on resource: {resource}"
    reason = f"because no identity-based policy allows the {action} action"
    return f"User: {_arn(identity)} is not authorized to perform: {action}{where} {reason}"


def _arn(identity: Identity) -> str:
    if identity.session:
        return f"arn:aws:sts::{ACCOUNT}:assumed-role/{identity.name}"
    return f"arn:aws:iam::{ACCOUNT}:user/{identity.principal}"
