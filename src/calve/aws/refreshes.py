"""Instance refresh: starting, watching, rolling back, cancelling.

Source: Amazon EC2 Auto Scaling API reference, StartInstanceRefresh, InstanceRefresh, RefreshPreferences,
RollbackInstanceRefresh, CancelInstanceRefresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.aws.session import needs

if TYPE_CHECKING:
    import datetime

    from calve.aws.session import Session

__all__ = ["ACTIVE", "ROLLING", "Preferences", "Refresh", "Refreshes", "Rollback"]

ACTIVE = frozenset({"Pending", "InProgress", "Baking", "Cancelling", "RollbackInProgress"})
"""Statuses of a refresh that has not ended."""
ROLLING = frozenset({"Pending", "InProgress", "Baking"})
"""Statuses from which a refresh can be rolled back."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """How an instance refresh goes about it; always sent in full, never left to AWS's defaults.

    Attributes:
        checkpoints: Percentages, ascending, the last 100; at each the refresh waits `checkpoint_delay_s`.
        bake_s: How long all must stay well after the last replacement.
        alarms: Names of CloudWatch alarms, at most 10; one that goes off rolls back.
    """

    min_healthy_percent: int = 100
    max_healthy_percent: int = 200
    warmup_s: int = 0
    skip_matching: bool = True
    auto_rollback: bool = True
    checkpoints: tuple[int, ...] = ()
    checkpoint_delay_s: int = 0
    bake_s: int = 0
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rollback:
    """What is said of a refresh that is, or was, rolled back."""

    reason: str
    started_at: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class Refresh:
    """An instance refresh.

    Attributes:
        reason: AWS's status reason.
        percent: It goes down during a rollback.
        remaining: How many instances are still to be replaced.
        template_id: Of its desired configuration; None where it has none.
        version: Likewise, as it was given.
        rollback: None unless it is being, or was, rolled back.
    """

    id: str
    status: str
    reason: str | None
    percent: int
    remaining: int
    started_at: datetime.datetime | None
    ended_at: datetime.datetime | None
    template_id: str | None = None
    version: str | None = None
    rollback: Rollback | None = None

    @property
    def active(self) -> bool:
        """Say whether it has not ended."""
        return self.status in ACTIVE

    def goes_to(self, template_id: str, version: int) -> bool:
        """Say whether a version of a launch template is what it brings."""
        return self.version == str(version) and self.template_id in {None, template_id}

    @property
    def can_roll_back(self) -> bool:
        """Say whether it can still be rolled back."""
        return self.status in ROLLING


class Refreshes:
    """Instance refreshes for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("autoscaling")

    @needs("autoscaling:StartInstanceRefresh", "ec2:RunInstances", "iam:PassRole", "ec2:CreateTags")
    def start(self, group: str, *, template_id: str, version: int, preferences: Preferences) -> str:
        """Start to replace a group's instances by those of a numbered version; return the refresh's id.

        Raises:
            ConflictError: One is under way.
        """
        answer = self._client.start_instance_refresh(
            AutoScalingGroupName=group,
            Strategy="Rolling",
            DesiredConfiguration={
                "LaunchTemplate": {"LaunchTemplateId": template_id, "Version": str(version)}
            },
            Preferences=_preferences(preferences),
        )
        return str(answer["InstanceRefreshId"])

    @needs("autoscaling:DescribeInstanceRefreshes")
    def newest(self, group: str, most: int = 1) -> tuple[Refresh, ...]:
        """Return the newest refreshes of a group, newest first; AWS keeps them for six weeks."""
        answer = self._client.describe_instance_refreshes(
            AutoScalingGroupName=group, MaxRecords=most
        )
        return tuple(map(_refresh, answer["InstanceRefreshes"]))

    @needs("autoscaling:RollbackInstanceRefresh")
    def rollback(self, group: str) -> str:
        """Roll the active refresh back and return its id.

        Raises:
            ConflictError: It cannot be rolled back, or another change of the group is under way.
            NotFoundError: None is active.
        """
        answer = self._client.rollback_instance_refresh(AutoScalingGroupName=group)
        return str(answer["InstanceRefreshId"])

    @needs("autoscaling:CancelInstanceRefresh")
    def cancel(self, group: str) -> str:
        """Cancel the active refresh, which leaves what is replaced replaced; return its id.

        Raises:
            NotFoundError: None is active.
        """
        answer = self._client.cancel_instance_refresh(AutoScalingGroupName=group)
        return str(answer["InstanceRefreshId"])


def _preferences(given: Preferences) -> dict[str, Any]:
    body: dict[str, Any] = {
        "MinHealthyPercentage": given.min_healthy_percent,
        "MaxHealthyPercentage": given.max_healthy_percent,
        "InstanceWarmup": given.warmup_s,
        "SkipMatching": given.skip_matching,
        "AutoRollback": given.auto_rollback,
        "ScaleInProtectedInstances": "Refresh",
        "StandbyInstances": "Terminate",
    }
    if given.checkpoints:
        body["CheckpointPercentages"] = list(given.checkpoints)
        body["CheckpointDelay"] = given.checkpoint_delay_s
    if given.bake_s:
        body["BakeTime"] = given.bake_s
    if given.alarms:
        body["AlarmSpecification"] = {"Alarms": list(given.alarms)}
    return body


def _refresh(item: dict[str, Any]) -> Refresh:
    template = item.get("DesiredConfiguration", {}).get("LaunchTemplate", {})
    details = item.get("RollbackDetails")
    return Refresh(
        item["InstanceRefreshId"],
        item["Status"],
        item.get("StatusReason"),
        item.get("PercentageComplete", 0),
        item.get("InstancesToUpdate", 0),
        item.get("StartTime"),
        item.get("EndTime"),
        template.get("LaunchTemplateId"),
        template.get("Version"),
        None
        if details is None
        else Rollback(
            details.get("RollbackReason", ""),
            details.get("RollbackStartTime"),
        ),
    )
