"""Elastic Load Balancing v2: target groups and the health of their targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.aws.session import needs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calve.aws.session import Session

__all__ = ["Check", "Elb", "TargetGroup", "TargetHealth"]


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


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """A target group of instances that are asked by HTTP; `balancers` are the ARNs of the load balancers before it."""

    arn: str
    name: str
    path: str
    balancers: tuple[str, ...] = ()
    check: Check = Check()


@dataclass(frozen=True, slots=True)
class TargetHealth:
    """A target's health in AWS's words: `initial`, `healthy`, `unhealthy`, `draining`, `unused`."""

    id: str
    state: str
    reason: str | None
    description: str | None


class Elb:
    """Elastic Load Balancing for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("elbv2")

    @needs(
        "elasticloadbalancing:CreateTargetGroup",
        "elasticloadbalancing:ModifyTargetGroupAttributes",
    )
    def create_target_group(
        self,
        name: str,
        *,
        path: str,
        check: Check = Check(),
        delay_s: int = 300,
        vpc_id: str | None = None,
    ) -> TargetGroup:
        """Create a target group.

        Args:
            name: At most 32 characters.
            path: What is asked; 200 is healthy.
            check: Its interval at least 5 s.
            delay_s: How long a target that leaves may finish what is under way.
            vpc_id: Where the instances are; AWS demands it.

        Raises:
            ConflictError: The name is taken by one with other settings.
        """
        answer = self._client.create_target_group(
            Name=name,
            Protocol="HTTP",
            Port=80,
            TargetType="instance",
            HealthCheckPath=path,
            HealthCheckIntervalSeconds=check.interval_s,
            HealthCheckTimeoutSeconds=max(2, min(5, check.interval_s - 1)),
            HealthyThresholdCount=check.healthy,
            UnhealthyThresholdCount=check.unhealthy,
            Matcher={"HttpCode": "200"},
            **({"VpcId": vpc_id} if vpc_id else {}),
        )
        made = _target_group(answer["TargetGroups"][0])
        attribute = {"Key": "deregistration_delay.timeout_seconds", "Value": str(delay_s)}
        self._client.modify_target_group_attributes(TargetGroupArn=made.arn, Attributes=[attribute])
        return made

    @needs("elasticloadbalancing:DescribeTargetGroups")
    def target_group(self, name: str) -> TargetGroup:
        """Find a target group by its name; NotFoundError where there is none."""
        answer = self._client.describe_target_groups(Names=[name])
        return _target_group(answer["TargetGroups"][0])

    @needs("elasticloadbalancing:DescribeTargetGroups")
    def target_groups(self, arns: Iterable[str]) -> tuple[TargetGroup, ...]:
        """Describe target groups by their ARNs; NotFoundError where one is missing."""
        wanted = list(arns)
        if not wanted:
            return ()
        answer = self._client.describe_target_groups(TargetGroupArns=wanted)
        return tuple(map(_target_group, answer["TargetGroups"]))

    @needs("elasticloadbalancing:DescribeTargetHealth")
    def health(self, arn: str) -> tuple[TargetHealth, ...]:
        """Return the health of all targets of a target group."""
        answer = self._client.describe_target_health(TargetGroupArn=arn)
        return tuple(
            TargetHealth(
                item["Target"]["Id"],
                item["TargetHealth"]["State"],
                item["TargetHealth"].get("Reason"),
                item["TargetHealth"].get("Description"),
            )
            for item in answer["TargetHealthDescriptions"]
        )


def _target_group(item: dict[str, Any]) -> TargetGroup:
    return TargetGroup(
        item["TargetGroupArn"],
        item["TargetGroupName"],
        item.get("HealthCheckPath", ""),
        tuple(item.get("LoadBalancerArns", ())),
        Check(
            item.get("HealthCheckIntervalSeconds", 30),
            item.get("HealthyThresholdCount", 5),
            item.get("UnhealthyThresholdCount", 2),
        ),
    )
