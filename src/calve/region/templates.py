"""Launch templates: numbered versions, each a shallow merge onto the version it was made from.

Source: EC2 API reference, CreateLaunchTemplateVersion; "Create a launch template" (16 KiB of raw user data,
descriptions of at most 255 characters).
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LaunchTemplate", "TemplateSpec", "Version", "check_data", "user_data"]

USER_DATA_BYTES = 16 * 1024
DESCRIPTION_CHARACTERS = 255


@dataclass(frozen=True, slots=True)
class TemplateSpec:
    """A launch template as a group or a refresh names it; `version` is a number, `$Latest` or `$Default`."""

    id: str
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Version:
    """One version; `data` as it was sent, user data in base64."""

    number: int
    description: str | None
    created_at: float
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LaunchTemplate:
    """A launch template with all its versions, by number."""

    id: str
    name: str
    created_at: float
    versions: Mapping[int, Version]
    default: int = 1
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def latest(self) -> int:
        """Return the highest version's number."""
        return max(self.versions)

    def resolve(self, version: str | None) -> Version:
        """Find a version by number, `$Latest` or `$Default`; None is the default.

        Raises:
            Refusal: InvalidLaunchTemplateId.VersionNotFound, InvalidLaunchTemplateVersion.
        """
        number = {"$Latest": self.latest, "$Default": self.default, None: self.default}.get(version)
        if number is None:
            if version is None or not re.fullmatch(r"[0-9]{1,9}", version):
                raise Refusal(
                    400,
                    "InvalidParameterValue",
                    f"Invalid launch template version: {version}. Versions are numbers, $Latest or $Default.",
                )
            number = int(version)
        if number not in self.versions:
            raise Refusal(
                400,
                "InvalidLaunchTemplateId.VersionNotFound",
                f"Could not find the specified version {number} for the launch template with ID {self.id}.",
            )
        return self.versions[number]

    def add(
        self, data: Mapping[str, Any], source: str | None, description: str | None, now: float
    ) -> LaunchTemplate:
        """Add a version: the source's data, each top-level parameter that `data` names replaced whole."""
        base = {} if source is None else self.resolve(source).data
        number = self.latest + 1
        version = Version(number, description, now, {**base, **data})
        return replace(self, versions={**self.versions, number: version})


def check_data(data: Mapping[str, Any], description: str | None) -> None:
    """Refuse a version whose description or user data is too long, or no base64."""
    if description is not None and len(description) > DESCRIPTION_CHARACTERS:
        raise Refusal(
            400,
            "InvalidParameterValue",
            f"Version description must not be longer than {DESCRIPTION_CHARACTERS} characters.",
        )
    if len(user_data(data)) > USER_DATA_BYTES:
        raise Refusal(
            400, "InvalidParameterValue", f"User data is limited to {USER_DATA_BYTES} bytes"
        )


def user_data(data: Mapping[str, Any]) -> bytes:
    """Decode a version's user data; b"" where it has none."""
    text = data.get("UserData", "")
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise Refusal(
            400, "InvalidUserData.Malformed", "Invalid BASE64 encoding of user data."
        ) from None
