"""Auto Scaling: groups, their instances and activities, lifecycle hooks, instance refresh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.aws.session import needs
from calve.errors import NotFoundError

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterable

    from calve.aws.session import Session

__all__ = [
    "ACTIVE",
    "Activity",
    "AutoScaling",
    "Group",
    "GroupInstance",
    "Hook",
    "Preferences",
    "Refresh",
]

ACTIVE = frozenset({"Pending", "InProgress", "Baking", "Cancelling", "RollbackInProgress"})
"""Statuses of a refresh that has not ended."""
_LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
_TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"


@dataclass(frozen=True, slots=True)
class GroupInstance:
    """An instance in its group; `version` is the number it was launched from."""

    id: str
    lifecycle: str
    healthy: bool
    version: str | None


@dataclass(frozen=True, slots=True)
class Group:
    """An Auto Scaling group; `version` as it is configured, which may be `$Latest` or `$Default`."""

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
class Preferences:
    """How an instance refresh goes about it; always sent in full, never left to AWS's defaults."""

    min_healthy_percent: int = 100
    max_healthy_percent: int = 200
    warmup_s: int = 0
    skip_matching: bool = True
    auto_rollback: bool = True


@dataclass(frozen=True, slots=True)
class Refresh:
    """An instance refresh; `remaining` is how many instances are still to be replaced."""

    id: str
    status: str
    reason: str | None
    percent: int
    remaining: int
    started_at: datetime.datetime | None
    ended_at: datetime.datetime | None

    @property
    def active(self) -> bool:
        """Say whether it has not ended."""
        return self.status in ACTIVE


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

    @needs("autoscaling:DeleteLifecycleHook")
    def delete_hook(self, name: str, hook: str) -> None:
        """Delete a group's lifecycle hook by its name; what it holds goes on, or is terminated if it launches.

        Raises:
            NotFoundError: The group has no such hook.
        """
        self._client.delete_lifecycle_hook(AutoScalingGroupName=name, LifecycleHookName=hook)

    @needs("autoscaling:DescribeScalingActivities")
    def activities(self, name: str, *, most: int = 100) -> tuple[Activity, ...]:
        """Return the newest activities of a group, newest first."""
        answer = self._client.describe_scaling_activities(
            AutoScalingGroupName=name, MaxRecords=most
        )
        return tuple(map(_activity, answer["Activities"]))

    @needs("autoscaling:StartInstanceRefresh", "ec2:RunInstances", "iam:PassRole", "ec2:CreateTags")
    def start_refresh(
        self, name: str, *, template_id: str, version: int, preferences: Preferences
    ) -> str:
        """Start to replace a group's instances by those of a numbered version; return the refresh's id.

        Raises:
            ConflictError: One is under way.
        """
        answer = self._client.start_instance_refresh(
            AutoScalingGroupName=name,
            Strategy="Rolling",
            DesiredConfiguration={
                "LaunchTemplate": {"LaunchTemplateId": template_id, "Version": str(version)}
            },
            Preferences={
                "MinHealthyPercentage": preferences.min_healthy_percent,
                "MaxHealthyPercentage": preferences.max_healthy_percent,
                "InstanceWarmup": preferences.warmup_s,
                "SkipMatching": preferences.skip_matching,
                "AutoRollback": preferences.auto_rollback,
            },
        )
        return str(answer["InstanceRefreshId"])

    @needs("autoscaling:DescribeInstanceRefreshes")
    def refresh(self, name: str, refresh_id: str | None = None) -> Refresh | None:
        """Return a refresh of a group by its id, else the newest; None where there is none."""
        wanted = {"InstanceRefreshIds": [refresh_id]} if refresh_id else {"MaxRecords": 1}
        answer = self._client.describe_instance_refreshes(AutoScalingGroupName=name, **wanted)
        found = answer["InstanceRefreshes"]
        return _refresh(found[0]) if found else None

    @needs("autoscaling:CancelInstanceRefresh")
    def cancel_refresh(self, name: str) -> str:
        """Cancel the refresh under way and return its id; NotFoundError where there is none."""
        answer = self._client.cancel_instance_refresh(AutoScalingGroupName=name)
        return str(answer["InstanceRefreshId"])


def _group(item: dict[str, Any]) -> Group:
    template = item.get("LaunchTemplate", {})
    return Group(
        item["AutoScalingGroupName"],
        template.get("LaunchTemplateId"),
        template.get("Version"),
        item["MinSize"],
        item["MaxSize"],
        item["DesiredCapacity"],
        item["HealthCheckType"],
        tuple(item.get("TargetGroupARNs", ())),
        tuple(one["ProcessName"] for one in item.get("SuspendedProcesses", ())),
        tuple(map(_member, item.get("Instances", ()))),
    )


def _member(item: dict[str, Any]) -> GroupInstance:
    return GroupInstance(
        item["InstanceId"],
        item["LifecycleState"],
        item["HealthStatus"].lower() == "healthy",
        item.get("LaunchTemplate", {}).get("Version"),
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


def _refresh(item: dict[str, Any]) -> Refresh:
    return Refresh(
        item["InstanceRefreshId"],
        item["Status"],
        item.get("StatusReason"),
        item.get("PercentageComplete", 0),
        item.get("InstancesToUpdate", 0),
        item.get("StartTime"),
        item.get("EndTime"),
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
