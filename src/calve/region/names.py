"""What things are called in the simulated region: identifiers, ARNs, the account, the zone.

Identifiers are made from what they name and a serial number, not drawn: the same story told twice has the same
names, on a real clock and on a virtual one.
"""

from __future__ import annotations

import datetime
import hashlib
import uuid

__all__ = ["ACCOUNT", "activity_uuid", "arn", "identifier", "stamp"]

ACCOUNT = "123456789012"


def identifier(prefix: str, *parts: object) -> str:
    """Make an identifier as EC2 makes them: `i-` and 17 hexadecimal digits."""
    return f"{prefix}-{_digest(parts).hex()[:17]}"


def activity_uuid(*parts: object) -> str:
    """Make an identifier as Auto Scaling makes them for activities and refreshes."""
    return str(uuid.UUID(bytes=_digest(parts)[:16]))


def arn(service: str, region: str, resource: str) -> str:
    """Make an Amazon Resource Name."""
    return f"arn:aws:{service}:{region}:{ACCOUNT}:{resource}"


def stamp(seconds: float) -> str:
    """Write an instant (seconds since 1970) as Auto Scaling's causes do: `2026-01-02T03:04:05Z`."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _digest(parts: tuple[object, ...]) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
