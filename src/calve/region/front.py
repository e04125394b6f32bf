"""What a request of the query APIs says, and the refusals that no service has a part in.

Source: "Common errors" of the Amazon EC2 Auto Scaling API reference; Signature Version 4, the credential scope.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.region import awsjson
from calve.region.query import parse
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.region.message import Request

__all__ = ["Asked", "check_dry_run", "check_scope", "read", "unknown"]

BODY_BYTES = 1024 * 1024
_CREDENTIAL = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^/\s,]+/[0-9]{8}/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request,"
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's form, apart from the version and the action that it names; "" where it names none."""

    version: str
    action: str
    form: Mapping[str, Any]
    body: bytes


def read(request: Request) -> Asked:
    """Read a request's body; Refusal for what is no form, or is too long."""
    if request.method != "POST":
        raise Refusal(405, "MethodNotAllowed", "Only POST is simulated")
    try:
        body = request.body.read_all(BODY_BYTES)
    except ValueError as error:
        raise Refusal(413, "RequestEntityTooLarge", str(error)) from None
    form = awsjson.read(request, body) if awsjson.speaks(request) else parse(body)
    version, action = (form.pop(name, "") for name in ("Version", "Action"))
    return Asked(version if isinstance(version, str) else "", str(action), form, body)


def check_scope(request: Request, region: str, service: str) -> None:
    """Refuse what is signed for nobody, for another region or for another service."""
    found = _CREDENTIAL.match(request.headers.get("authorization", ""))
    if found is None:
        raise Refusal(403, "MissingAuthenticationToken", "Request is missing Authentication Token")
    if found.groups() != (region, service):
        raise Refusal(
            403,
            "SignatureDoesNotMatch",
            f"Credential should be scoped to {region}/{service}, not {'/'.join(found.groups())}.",
        )


def check_dry_run(*, asked: bool | None) -> None:
    """Refuse what was asked to do nothing, as what would have succeeded."""
    if asked:
        raise Refusal(
            412, "DryRunOperation", "Request would have succeeded, but DryRun flag is set."
        )


def unknown(action: str, version: str) -> Refusal:
    """Make the refusal of what nobody here performs."""
    return Refusal(
        400,
        "InvalidAction",
        f"Could not find operation {action} for version {version} (or it is not simulated)",
    )
