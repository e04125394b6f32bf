"""What adoption and rehearsals ask: whose role an instance profile has, and how a group's health is checked.

Source: IAM API reference, GetInstanceProfile; IAM User Guide, "IAM identifiers" (unique ids); Amazon EC2 Auto Scaling
API reference, UpdateAutoScalingGroup and AutoScalingGroup; Elastic Load Balancing API reference, TargetGroup.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calve.aws.session import needs
from calve.errors import NotFoundError

if TYPE_CHECKING:
    from calve.aws.session import Session

__all__ = ["Check", "GroupHealth", "Profiles", "Role"]


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


@dataclass(frozen=True, slots=True)
class Check:
    """How a balancer checks its targets.

    Attributes:
        interval_s: between two checks of one.
        healthy: so many good checks make it healthy; a new target needs one.
        unhealthy: so many bad ones make it unhealthy.
    """

    interval_s: int = 30
    healthy: int = 5
    unhealthy: int = 2


class Profiles:
    """Instance profiles for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("iam")

    @needs("iam:GetInstanceProfile")
    def role(self, name: str) -> Role | None:
        """Return the role of an instance profile; None where there is no such profile, or it has no role."""
        try:
            answer = self._client.get_instance_profile(InstanceProfileName=name)
        except self._client.exceptions.NoSuchEntityException:
            return None
        roles = answer["InstanceProfile"]["Roles"]
        if not roles:
            return None
        return Role(roles[0]["RoleId"], roles[0]["RoleName"], roles[0]["Arn"])


class GroupHealth:
    """How the health of Auto Scaling groups is checked, for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("autoscaling")
        self._balancers = functools.partial(session.client, "elbv2")

    @needs("elasticloadbalancing:DescribeTargetGroups")
    def check(self, target_group: str) -> Check:
        """Return how a target group, named by its ARN, checks; NotFoundError where there is none."""
        answer = self._balancers().describe_target_groups(TargetGroupArns=[target_group])
        found = answer["TargetGroups"][0]
        return Check(
            found["HealthCheckIntervalSeconds"],
            found["HealthyThresholdCount"],
            found["UnhealthyThresholdCount"],
        )

    @needs("autoscaling:DescribeAutoScalingGroups")
    def has_warm_pool(self, group: str) -> bool:
        """Say whether a group has a warm pool; NotFoundError where there is no such group."""
        answer = self._client.describe_auto_scaling_groups(AutoScalingGroupNames=[group])
        if not answer["AutoScalingGroups"]:
            raise NotFoundError("there is no such Auto Scaling group", place=group)
        return bool(answer["AutoScalingGroups"][0].get("WarmPoolConfiguration"))

    @needs("autoscaling:UpdateAutoScalingGroup")
    def set_grace(self, group: str, seconds: int) -> None:
        """Set how long after an instance is in service its failing health checks do not count: 0 to 7200."""
        self._client.update_auto_scaling_group(
            AutoScalingGroupName=group, HealthCheckGracePeriod=seconds
        )

    @needs("autoscaling:UpdateAutoScalingGroup")
    def set_checks(self, group: str, kinds: str) -> None:
        """Set which health checks count beside EC2's: `ELB`, or several with commas between them."""
        self._client.update_auto_scaling_group(AutoScalingGroupName=group, HealthCheckType=kinds)
