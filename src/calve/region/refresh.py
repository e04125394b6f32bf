"""Instance refresh as data: its ten statuses, its preferences, and what a request or a failure makes of one.

Source: Amazon EC2 Auto Scaling API reference, InstanceRefresh, RefreshPreferences, RollbackDetails; User Guide, "How an
instance refresh works", "Cancel an instance refresh", "Undo changes with a rollback". `refresh_steps` brings one on.
No clock, thread or network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calve.region.templates import TemplateSpec

__all__ = [
    "Preferences",
    "Refresh",
    "Reserved",
    "Rollback",
    "Status",
    "bounds",
    "cancel",
    "fail",
    "rollback",
]

BY_USER = "Cancelled due to user request."
AT_ONCE = (
    "Cancelled without waiting for ongoing instance launches and terminations due to user request."
)


class Status(StrEnum):
    """A refresh's status."""

    PENDING = "Pending"
    IN_PROGRESS = "InProgress"
    BAKING = "Baking"
    SUCCESSFUL = "Successful"
    FAILED = "Failed"
    CANCELLING = "Cancelling"
    CANCELLED = "Cancelled"
    ROLLBACK_IN_PROGRESS = "RollbackInProgress"
    ROLLBACK_SUCCESSFUL = "RollbackSuccessful"
    ROLLBACK_FAILED = "RollbackFailed"

    @property
    def active(self) -> bool:
        """Say whether a refresh of this status stands in the way of another."""
        return self in _ACTIVE


_ACTIVE = {
    Status.PENDING,
    Status.IN_PROGRESS,
    Status.BAKING,
    Status.CANCELLING,
    Status.ROLLBACK_IN_PROGRESS,
}


class Reserved(StrEnum):
    """What a refresh does of instances in standby, or protected from scale-in: AWS's Refresh and Terminate are one."""

    REPLACE = "Replace"
    IGNORE = "Ignore"
    WAIT = "Wait"


@dataclass(frozen=True, slots=True)
class Preferences:
    """How a refresh goes about it; percentages of health are of the desired capacity.

    Attributes:
        max_healthy: None where the client gave none: then the old are terminated first.
        warmup_s: None for the group's default.
        auto_rollback: A failure becomes a rollback.
        checkpoints: Ascending percentages of the instances to replace; the last one says how many at all.
        checkpoint_delay_s: How long it pauses at each of them but the last.
        bake_s: How long it waits after the last replacement.
        alarms: Names of alarms that make it fail.
        protected: What it does of instances that are protected from scale-in.
        standby: What it does of instances in standby.
    """

    min_healthy: int = 90
    max_healthy: int | None = None
    warmup_s: float | None = None
    skip_matching: bool = False
    auto_rollback: bool = False
    checkpoints: tuple[int, ...] = ()
    checkpoint_delay_s: float = 3600.0
    bake_s: float = 0.0
    alarms: tuple[str, ...] = ()
    protected: Reserved = Reserved.WAIT
    standby: Reserved = Reserved.WAIT


@dataclass(frozen=True, slots=True)
class Rollback:
    """A rollback: why and when it began, and how far the refresh was then."""

    reason: str
    started_at: float
    percent: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Refresh:
    """One instance refresh.

    Attributes:
        spec: What the instances are to be launched from; None for the group's own template.
        began: It has looked at the group; until then it can only end.
        old: The instances to replace, fixed when it begins.
        kept: The others that were there then: skipped or ignored, and no business of a rollback either.
        total: How many were to be replaced.
        remaining: How many still are; in a rollback, how many are as they were.
        healthy: The most instances of the wanted version that were ever seen healthy.
        progress_at: When it last came on.
        checkpoint: Which of the checkpoints it works towards, or stands at.
        until: The end of a pause at a checkpoint, or of baking.
        rollback: None where it was never rolled back.
    """

    id: str
    spec: TemplateSpec | None
    preferences: Preferences
    started_at: float
    status: Status = Status.PENDING
    reason: str | None = None
    ended_at: float | None = None
    began: bool = False
    old: frozenset[str] = field(default_factory=frozenset)
    kept: frozenset[str] = field(default_factory=frozenset)
    total: int = 0
    remaining: int = 0
    healthy: int = 0
    progress_at: float = 0.0
    checkpoint: int = 0
    until: float | None = None
    rollback: Rollback | None = None

    @property
    def percent(self) -> int:
        """Return the percentage that is replaced, rounded down; it goes back to 0 in a rollback."""
        if not self.total:
            return 100 if self.status is Status.SUCCESSFUL else 0
        return 100 * (self.total - self.remaining) // self.total

    @property
    def rolls_back(self) -> bool:
        """Say whether it launches the group's own version."""
        return self.status is Status.ROLLBACK_IN_PROGRESS


def bounds(preferences: Preferences, desired: int) -> tuple[int, int]:
    """Return the fewest healthy and the most instances, of a group of `desired`.

    The minimum is rounded up, the maximum down, but one at a time is always replaced: first launched where the
    maximum is above 100, otherwise first terminated.
    """
    low = math.ceil(desired * preferences.min_healthy / 100)
    if preferences.max_healthy is not None and preferences.max_healthy > 100:
        high = max(desired + 1, desired * preferences.max_healthy // 100)
    else:
        high = desired
        low = min(low, max(desired - 1, 0))
    return low, high


def cancel(refresh: Refresh, now: float | None = None) -> Refresh:
    """Let what is under way come to its end, and begin nothing more; given a `now`, end without waiting for it."""
    if now is None:
        return replace(refresh, status=Status.CANCELLING, reason=BY_USER, until=None)
    return replace(refresh, status=Status.CANCELLED, reason=AT_ONCE, ended_at=now, until=None)


def rollback(refresh: Refresh, reason: str, now: float) -> Refresh:
    """Begin to replace what was deployed by the group's own version."""
    return replace(
        refresh,
        status=Status.ROLLBACK_IN_PROGRESS,
        reason=None,
        until=None,
        healthy=0,
        progress_at=now,
        rollback=Rollback(reason, now, refresh.percent, refresh.remaining),
    )


def fail(refresh: Refresh, reason: str, now: float) -> Refresh:
    """Let it fail: by a rollback where it is to roll back by itself, has begun, and does not already."""
    if refresh.rolls_back:
        return replace(refresh, status=Status.ROLLBACK_FAILED, reason=reason, ended_at=now)
    if refresh.preferences.auto_rollback and refresh.began:
        return rollback(refresh, reason, now)
    return replace(refresh, status=Status.FAILED, reason=reason, ended_at=now, until=None)
