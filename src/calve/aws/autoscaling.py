"""Auto Scaling: groups, their instances and activities, lifecycle hooks. `refreshes` has instance refresh."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calve.aws.session import needs
from calve.errors import NotFoundError

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterable, Mapping

    from calve.aws.session import Session

__all__ = [
    "Activity",
    "AutoScaling",
    "Group",
    "GroupInstance",
    "Hook",
]

_LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
_TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"


@dataclass(frozen=True, slots=True)
class GroupInstance:
    """An instance in its group; `version` is the number it was launched from, of the launch template `template_id`.

    Attributes:
        lifecycle: AWS's word: `Pending:Wait`, `InService`, `Terminating`, `Standby` and so on.
        healthy: As the group's health checks have it.
    """

    id: str
    lifecycle: str
    healthy: bool
    version: str | None
    zone: str = ""
    template_id: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """An Auto Scaling group.

    Attributes:
        version: As it is configured, which may be `$Latest` or `$Default`.
        mixed: It has a mixed instances policy, whose launch template these are.
        warm_pool: It has one.
        attributes: Its instance types are chosen by requirements, which rules out a desired configuration.
        subnets: Ids of those it launches into; none where it names availability zones alone.
        warmup_s: Its default instance warm-up; None where it is not set.
    """

    name: str
    template_id: str | None
    version: str | None
    min_size: int
    max_size: int
    desired: int
    health_check: str
    target_groups: tuple[str, ...]
    suspended: tuple[str, ...]
    instances: tuple[GroupInstance, ...]
    arn: str = ""
    grace_s: int = 0
    warmup_s: int | None = None
    subnets: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    mixed: bool = False
    attributes: bool = False
    warm_pool: bool = False


@dataclass(frozen=True, slots=True)
class Hook:
    """A lifecycle hook: it holds an instance until a result is given, or so long without a heartbeat.

    Attributes:
        launching: It holds instances that launch; else such that terminate.
        heartbeat_s: 30 to 7200.
        abandons: What a timeout means: ABANDON, else CONTINUE.
    """

    name: str
    launching: bool = True
    heartbeat_s: int = 180
    abandons: bool = True


@dataclass(frozen=True, slots=True)
class Activity:
    """A scaling activity, in AWS's words."""

    id: str
    description: str
    cause: str
    status: str
    message: str | None
    started_at: datetime.datetime


class AutoScaling:
    """Auto Scaling for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("autoscaling")

    @needs("autoscaling:CreateAutoScalingGroup", "ec2:RunInstances", "iam:PassRole")
    def create_group(
        self,
        name: str,
        *,
        template_id: str,
        version: int,
        size: tuple[int, int, int],
        target_groups: Iterable[str] = (),
        grace_s: int = 300,
        zones: Iterable[str] = (),
        hooks: Iterable[Hook] = (),
    ) -> None:
        """Create a group on a numbered launch template version.

        Args:
            name: Its name.
            template_id: The launch template.
            version: The number; refreshes can be rolled back only from a number.
            size: Minimum, desired, maximum.
            target_groups: ARNs; where there are any, their health checks count.
            grace_s: How long after an instance is in service its health checks do not count.
            zones: Availability zones, where no subnets are configured.
            hooks: Its lifecycle hooks; one that is put later does not hold the first instances.

        Raises:
            ConflictError: The name is taken.
        """
        minimum, desired, maximum = size
        arns = list(target_groups)
        more: dict[str, Any] = {"AvailabilityZones": list(zones)} if zones else {}
        if arns:
            more |= {"TargetGroupARNs": arns, "HealthCheckType": "ELB"}
        specifications = list(map(_specification, hooks))
        if specifications:
            more["LifecycleHookSpecificationList"] = specifications
        self._client.create_auto_scaling_group(
            AutoScalingGroupName=name,
            LaunchTemplate={"LaunchTemplateId": template_id, "Version": str(version)},
            MinSize=minimum,
            DesiredCapacity=desired,
            MaxSize=maximum,
            HealthCheckGracePeriod=grace_s,
            **more,
        )

    @needs("autoscaling:DescribeAutoScalingGroups")
    def group(self, name: str) -> Group:
        """Describe a group; NotFoundError where there is none."""
        answer = self._client.describe_auto_scaling_groups(AutoScalingGroupNames=[name])
        if not answer["AutoScalingGroups"]:
            raise NotFoundError("there is no such Auto Scaling group", place=name)
        return _group(answer["AutoScalingGroups"][0])

    @needs("autoscaling:DescribeAutoScalingGroups")
    def tagged(self, key: str, value: str) -> tuple[str, ...]:
        """Return the names of the groups that have a tag with this value."""
        pages = self._client.get_paginator("describe_auto_scaling_groups").paginate(
            Filters=[{"Name": f"tag:{key}", "Values": [value]}]
        )
        return tuple(
            item["AutoScalingGroupName"] for page in pages for item in page["AutoScalingGroups"]
        )

    @needs("autoscaling:DeleteAutoScalingGroup")
    def delete_group(self, name: str, *, force: bool = False) -> None:
        """Delete a group; `force` terminates its instances, without it ConflictError where there are any."""
        self._client.delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=force)

    @needs("autoscaling:PutLifecycleHook")
    def put_hook(self, name: str, hook: Hook) -> None:
        """Give a group a lifecycle hook, or change the one of that name; what waits already, waits as it did."""
        self._client.put_lifecycle_hook(AutoScalingGroupName=name, **_specification(hook))

    @needs("autoscaling:DescribeLifecycleHooks")
    def hooks(self, name: str) -> tuple[Hook, ...]:
        """Return a group's lifecycle hooks."""
        answer = self._client.describe_lifecycle_hooks(AutoScalingGroupName=name)
        return tuple(map(_hook, answer["LifecycleHooks"]))

    @needs("autoscaling:DescribeScalingActivities")
    def activities(
        self, name: str, *, most: int = 100, since: datetime.datetime | None = None
    ) -> tuple[Activity, ...]:
        """Return the newest activities of a group, newest first.

        Args:
            name: The group.
            most: At most so many.
            since: Only such that began then or later.
        """
        found: list[Activity] = []
        pages = self._client.get_paginator("describe_scaling_activities").paginate(
            AutoScalingGroupName=name, PaginationConfig={"MaxItems": most, "PageSize": 100}
        )
        for page in pages:
            for one in map(_activity, page["Activities"]):
                if since is not None and one.started_at < since:
                    return tuple(found)
                found.append(one)
        return tuple(found)

    @needs("autoscaling:UpdateAutoScalingGroup", "ec2:RunInstances", "iam:PassRole")
    def set_version(self, name: str, template_id: str, version: int) -> None:
        """Have a group launch from a numbered version of a launch template; running instances stay as they are.

        Raises:
            CalveError: an instance refresh with a desired configuration is active.
        """
        self._client.update_auto_scaling_group(
            AutoScalingGroupName=name,
            LaunchTemplate={"LaunchTemplateId": template_id, "Version": str(version)},
        )

    @needs("autoscaling:UpdateAutoScalingGroup")
    def set_grace(self, name: str, seconds: int) -> None:
        """Set how long after an instance is in service its failing health checks do not count: 0 to 7200."""
        self._client.update_auto_scaling_group(
            AutoScalingGroupName=name, HealthCheckGracePeriod=seconds
        )

    @needs("autoscaling:UpdateAutoScalingGroup")
    def set_checks(self, name: str, kinds: str) -> None:
        """Set which health checks count beside EC2's: `ELB`, or several with commas between them."""
        self._client.update_auto_scaling_group(AutoScalingGroupName=name, HealthCheckType=kinds)

    @needs("autoscaling:CreateOrUpdateTags")
    def tag(self, name: str, tags: Mapping[str, str]) -> None:
        """Give a group tags, or other values to those that it has; its instances do not get them."""
        self._client.create_or_update_tags(
            Tags=[
                {
                    "ResourceId": name,
                    "ResourceType": "auto-scaling-group",
                    "Key": key,
                    "Value": value,
                    "PropagateAtLaunch": False,
                }
                for key, value in tags.items()
            ]
        )


def _group(item: dict[str, Any]) -> Group:
    policy = item.get("MixedInstancesPolicy")
    inside = (policy or {}).get("LaunchTemplate", {})
    template = inside.get("LaunchTemplateSpecification") or item.get("LaunchTemplate", {})
    return Group(
        item["AutoScalingGroupName"],
        template.get("LaunchTemplateId"),
        template.get("Version", "$Default") if template else None,
        item["MinSize"],
        item["MaxSize"],
        item["DesiredCapacity"],
        item["HealthCheckType"],
        tuple(item.get("TargetGroupARNs", ())),
        tuple(one["ProcessName"] for one in item.get("SuspendedProcesses", ())),
        tuple(map(_member, item.get("Instances", ()))),
        item.get("AutoScalingGroupARN", ""),
        item.get("HealthCheckGracePeriod", 0),
        item.get("DefaultInstanceWarmup"),
        tuple(filter(None, map(str.strip, (item.get("VPCZoneIdentifier") or "").split(",")))),
        {one["Key"]: one.get("Value", "") for one in item.get("Tags", ())},
        policy is not None,
        any("InstanceRequirements" in one for one in inside.get("Overrides", ())),
        bool(item.get("WarmPoolConfiguration")),
    )


def _member(item: dict[str, Any]) -> GroupInstance:
    template = item.get("LaunchTemplate", {})
    return GroupInstance(
        item["InstanceId"],
        item["LifecycleState"],
        item["HealthStatus"].lower() == "healthy",
        template.get("Version"),
        item.get("AvailabilityZone", ""),
        template.get("LaunchTemplateId"),
    )


def _specification(hook: Hook) -> dict[str, Any]:
    return {
        "LifecycleHookName": hook.name,
        "LifecycleTransition": _LAUNCHING if hook.launching else _TERMINATING,
        "HeartbeatTimeout": hook.heartbeat_s,
        "DefaultResult": "ABANDON" if hook.abandons else "CONTINUE",
    }


def _hook(item: dict[str, Any]) -> Hook:
    return Hook(
        item["LifecycleHookName"],
        item["LifecycleTransition"] == _LAUNCHING,
        item["HeartbeatTimeout"],
        item["DefaultResult"] == "ABANDON",
    )


def _activity(item: dict[str, Any]) -> Activity:
    return Activity(
        item["ActivityId"],
        item.get("Description", ""),
        item["Cause"],
        item["StatusCode"],
        item.get("StatusMessage"),
        item["StartTime"],
    )
