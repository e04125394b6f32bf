"""A tiny IAM: instance profiles that the simulation adds, each with a role or none, and GetInstanceProfile.

    cloud.profiles.add("web", role="web-machine")

Source: IAM API reference (2010-05-08), GetInstanceProfile; IAM User Guide, "IAM identifiers" (unique ids).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.region.names import ACCOUNT
from calve.region.query import Dialect, time_of
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calve.region.query import Action, Params

__all__ = ["Profiles"]

IAM = Dialect(
    "iam", "2010-05-08", "https://iam.amazonaws.com/doc/2010-05-08/", "member", "ValidationError"
)


@dataclass(frozen=True, slots=True)
class _Profile:
    name: str
    role: str | None
    made_at: float


class Profiles:
    """Instance profiles by name, and IAM's action.

    Args:
        now: The time of day in seconds.
    """

    dialect = IAM

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._profiles: dict[str, _Profile] = {}
        self.actions: Mapping[str, Action] = {"GetInstanceProfile": self._get}

    def add(self, name: str, role: str | None = None) -> None:
        """Make an instance profile, in the place of one of that name; without a role, it has none yet."""
        self._profiles[name] = _Profile(name, role, self._now())

    def role_id(self, role: str) -> str:
        """Return a role's unique id."""
        return _unique("AROA", role)

    def _get(self, params: Params, _now: float) -> Mapping[str, Any]:
        name = params.need("InstanceProfileName")
        params.done()
        found = self._profiles.get(name)
        if found is None:
            raise Refusal(404, "NoSuchEntity", f"Instance Profile {name} cannot be found.")
        row = {
            "Path": "/",
            "InstanceProfileName": name,
            "InstanceProfileId": _unique("AIPA", name),
            "Arn": f"arn:aws:iam::{ACCOUNT}:instance-profile/{name}",
            "CreateDate": time_of(found.made_at),
            "Roles": [] if found.role is None else [self._role(found.role, found.made_at)],
        }
        return {"InstanceProfile": row}

    def _role(self, name: str, made_at: float) -> dict[str, Any]:
        return {
            "Path": "/",
            "RoleName": name,
            "RoleId": self.role_id(name),
            "Arn": f"arn:aws:iam::{ACCOUNT}:role/{name}",
            "CreateDate": time_of(made_at),
        }


def _unique(prefix: str, name: str) -> str:
    """Make a unique id as IAM makes them: a prefix, and 17 capitals or digits."""
    return prefix + hashlib.sha256(name.encode()).hexdigest()[:17].upper()
