"""IAM: whose role an instance profile has.

Source: IAM API reference, GetInstanceProfile; IAM User Guide, "IAM identifiers" (unique ids).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calve.aws.session import needs
from calve.errors import NotFoundError

if TYPE_CHECKING:
    from calve.aws.session import Session

__all__ = ["Profiles", "Role"]


@dataclass(frozen=True, slots=True)
class Role:
    """A role of IAM.

    Attributes:
        id: its unique id, `AROA…`: what `aws:userid` of its sessions begins with.
        name: its name.
        arn: its ARN.
    """

    id: str
    name: str
    arn: str


class Profiles:
    """Instance profiles for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("iam")

    @needs("iam:GetInstanceProfile")
    def role(self, name: str) -> Role:
        """Return the role of an instance profile; NotFoundError where there is no such profile, or it has no role."""
        answer = self._client.get_instance_profile(InstanceProfileName=name)
        roles = answer["InstanceProfile"]["Roles"]
        if not roles:
            raise NotFoundError("the instance profile has no role", place=name)
        return Role(roles[0]["RoleId"], roles[0]["RoleName"], roles[0]["Arn"])
