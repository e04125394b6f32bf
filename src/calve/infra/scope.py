"""What a policy is narrowed to: names in an account, and a word in capitals where one is unknown.

A group that is not named is told by its tag `calve:fleet`.
Source: IAM User Guide, "Amazon Resource Names"; Service Authorization Reference, "Amazon EC2 Auto
Scaling".
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from calve.errors import UsageError
from calve.fleet.config import FLEET_NAME

if TYPE_CHECKING:
    from calve.fleet.config import Cache, Fleet, KeySource

__all__ = ["PLACEHOLDERS", "Scope"]

PLACEHOLDERS: Final = {
    "account": ("ACCOUNT", "--account"),
    "region": ("REGION", "the cache's URL in the fleet file"),
    "bucket": ("BUCKET", "the cache's URL in the fleet file"),
    "fleet": ("FLEET", "--fleet"),
    "machine_role": ("MACHINE-ROLE", "--role-arn"),
}
"""By field: the word that stands where it is not known, and what says it."""

_ACCOUNT = re.compile(r"[0-9]{12}")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::[0-9]{12}:role/[!-~]{1,512}")
_GROUP = re.compile(r"[!-9;-~][ -9;-~]{0,254}")  # Auto Scaling's: no colon
_GLOBS = re.compile(r"[*?$]")


@dataclass(frozen=True, slots=True)
class Scope:
    """The names in an account; None is not known.

    Attributes:
        account: 12 digits.
        region: of the fleet and of the bucket.
        bucket: of the cache.
        prefix: of the cache's keys in it: empty, or it ends in a slash.
        fleet: its name.
        group: the Auto Scaling group's name; None is whatever group has the fleet's tag.
        machine_role: ARN of the role that machines have.
        key: where the signing key is, for who signs.
    """

    account: str | None = None
    region: str | None = None
    bucket: str | None = None
    prefix: str = ""
    fleet: str | None = None
    group: str | None = None
    machine_role: str | None = None
    key: KeySource | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot stand in a policy.

        Raises:
            UsageError: it names what.
        """
        for name, pattern, what in (
            ("account", _ACCOUNT, "an account's id, 12 digits"),
            ("machine_role", _ROLE, "a role's ARN, arn:aws:iam::123456789012:role/NAME"),
            ("fleet", FLEET_NAME, "a fleet's name"),
            ("group", _GROUP, "an Auto Scaling group's name"),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise UsageError(f"{value!r} is not {what}")
        for value in (self.group, self.machine_role, self.prefix):
            if value and _GLOBS.search(value):
                raise UsageError(f"{value!r} would match others too", hint="policies read * ? $")

    @classmethod
    def of(
        cls,
        cache: Cache | None,
        fleet: Fleet | None,
        *,
        name: str | None = None,
        group: str | None = None,
        account: str | None = None,
        machine_role: str | None = None,
    ) -> Scope:
        """Return the scope of a fleet file's cache and fleet, and of what is said beside it.

        Args:
            cache: None where the file has none. One that is no bucket says nothing.
            fleet: None where the file has none, or several.
            name: of the fleet, where the file does not have it.
            group: goes before the file's.
            account: 12 digits; else that of the machines' role.
            machine_role: its ARN.

        Raises:
            UsageError: one of them cannot stand in a policy.
        """
        from calve.cache import url as urls

        place = None if cache is None else urls.parse(cache.url)
        if account is None and machine_role is not None and _ROLE.fullmatch(machine_role):
            account = machine_role.split(":")[4]
        return cls(
            account=account,
            region=place.region if isinstance(place, urls.S3) else None,
            bucket=place.bucket if isinstance(place, urls.S3) else None,
            prefix=place.prefix if isinstance(place, urls.S3) else "",
            fleet=name if fleet is None else fleet.name,
            group=group or (None if fleet is None else fleet.group),
            machine_role=machine_role,
            key=None if cache is None else cache.key,
        )

    def said(self, name: str) -> str:
        """Return a field's value, or the word that stands for it."""
        value: str | None = getattr(self, name)
        return PLACEHOLDERS[name][0] if value is None else value

    def unknown(self, text: str) -> tuple[str, ...]:
        """Return the fields whose placeholders stand in a text."""
        names = (one.name for one in fields(self) if one.name in PLACEHOLDERS)
        return tuple(
            name
            for name in names
            if getattr(self, name) is None
            and re.search(rf"(?<![A-Z-]){PLACEHOLDERS[name][0]}(?![A-Z-])", text)
        )

    @property
    def partition(self) -> str:
        """Return the region's partition."""
        region = self.region or ""
        for start, partition in (("cn-", "aws-cn"), ("us-gov-", "aws-us-gov")):
            if region.startswith(start):
                return partition
        return "aws"

    @property
    def services(self) -> str:
        """Return the domain in the names of services."""
        return "amazonaws.com.cn" if self.partition == "aws-cn" else "amazonaws.com"

    def arn(self, service: str, resource: str) -> str:
        """Return the ARN of a resource of this region and account."""
        place = f"{self.said('region')}:{self.said('account')}"
        return f"arn:{self.partition}:{service}:{place}:{resource}"

    @property
    def bucket_arn(self) -> str:
        """Return the bucket's ARN."""
        return f"arn:{self.partition}:s3:::{self.said('bucket')}"

    def object_arn(self, key: str) -> str:
        """Return the ARN of an object of the cache, or of a pattern of them."""
        return f"{self.bucket_arn}/{self.prefix}{key}"

    @property
    def group_arn(self) -> str:
        """Return the group's ARN; all groups' where it is not named."""
        name = "*" if self.group is None else self.group
        return self.arn("autoscaling", f"autoScalingGroup:*:autoScalingGroupName/{name}")

    @property
    def role_arn(self) -> str:
        """Return the ARN of the machines' role."""
        if self.machine_role is not None:
            return self.machine_role
        return f"arn:{self.partition}:iam::{self.said('account')}:role/{self.said('machine_role')}"
