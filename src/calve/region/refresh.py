"""Instance refresh as a pure machine: from what a group looks like to how many to launch and which to retire.

Source: Amazon EC2 Auto Scaling User Guide, "How an instance refresh works" (minimum and maximum healthy
percentage, launch before terminate, skip matching, the one-hour rule); API reference, InstanceRefresh.
No clock, thread or network: `groups` calls `decide` with what it sees, every time something may have changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calve.region.templates import TemplateSpec

__all__ = ["Decision", "Member", "Preferences", "Refresh", "Status", "bounds", "cancel", "decide"]


class Status(StrEnum):
    """A refresh's status; rollback and baking are not simulated yet."""

    PENDING = "Pending"
    IN_PROGRESS = "InProgress"
    SUCCESSFUL = "Successful"
    FAILED = "Failed"
    CANCELLING = "Cancelling"
    CANCELLED = "Cancelled"

    @property
    def active(self) -> bool:
        """Say whether a refresh of this status stands in the way of another."""
        return self in {Status.PENDING, Status.IN_PROGRESS, Status.CANCELLING}


@dataclass(frozen=True, slots=True)
class Preferences:
    """How a refresh goes about it; percentages are of the desired capacity.

    Attributes:
        max_healthy: None where the client gave none: then the old are terminated first.
        warmup_s: None for the group's default.
        auto_rollback: Accepted and shown; not simulated yet.
    """

    min_healthy: int = 90
    max_healthy: int | None = None
    warmup_s: float | None = None
    skip_matching: bool = False
    auto_rollback: bool = False


@dataclass(frozen=True, slots=True)
class Refresh:
    """One instance refresh.

    Attributes:
        spec: What the instances are to be launched from; None for the group's own template.
        old: The instances to replace, fixed when it begins.
        total: How many these were.
        remaining: How many are still to be replaced.
        healthy_new: The most new instances that were ever seen healthy.
        progress_at: When it last came on.
    """

    id: str
    spec: TemplateSpec | None
    preferences: Preferences
    started_at: float
    status: Status = Status.PENDING
    reason: str | None = None
    ended_at: float | None = None
    old: frozenset[str] = field(default_factory=frozenset)
    total: int = 0
    remaining: int = 0
    healthy_new: int = 0
    progress_at: float = 0.0

    @property
    def percent(self) -> int:
        """Return the percentage that is replaced, rounded down."""
        if self.status is Status.SUCCESSFUL:
            return 100
        return 100 * (self.total - self.remaining) // self.total if self.total else 0


class Member(NamedTuple):
    """An instance of the group that is not being terminated.

    Attributes:
        matches: Launched from the very template version that the refresh wants.
        pending: Not yet in service.
        healthy: In service, checks passed, warmed up.
        booting: Pending, or in service with checks that do not pass.
    """

    id: str
    launched_at: float
    matches: bool
    pending: bool
    healthy: bool
    booting: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What a refresh wants now: so many launches, these ones retired."""

    refresh: Refresh
    launch: int = 0
    retire: tuple[str, ...] = ()


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


def decide(
    refresh: Refresh,
    members: Sequence[Member],
    *,
    desired: int,
    leaving: frozenset[str],
    now: float,
    parallelism: int | None,
    give_up_s: float,
) -> Decision:
    """Bring a refresh on.

    Args:
        refresh: An active one.
        members: The group's instances that are not being terminated.
        desired: The group's desired capacity.
        leaving: The instances that are being terminated.
        now: Seconds.
        parallelism: At most so many of its machines boot at once; None for no limit. This is the simulated host's
            limit, not AWS's.
        give_up_s: How long without progress until it fails: 3600 on AWS.
    """
    if refresh.status is Status.CANCELLING:
        return _cancelling(refresh, members, leaving, now)
    if refresh.status is Status.PENDING:
        refresh = _begin(refresh, members, now)
    new = [one for one in members if one.id not in refresh.old]
    old = [one for one in members if one.id in refresh.old]
    refresh = _measure(refresh, new, len(old), desired, now)
    replaced = not old and len(new) >= desired and all(one.healthy for one in new)
    if replaced or not refresh.total:
        if not leaving & refresh.old:
            done = replace(refresh, status=Status.SUCCESSFUL, reason=None, ended_at=now)
            return Decision(replace(done, remaining=0))
    elif now - refresh.progress_at >= give_up_s:
        reason = (
            f"No replacement instance became healthy within {give_up_s:.0f} seconds. "
            f"{refresh.reason or ''}".strip()
        )
        return Decision(replace(refresh, status=Status.FAILED, reason=reason, ended_at=now))
    low, high = bounds(refresh.preferences, desired)
    retire = _retired(old, sum(one.healthy for one in members), low)
    launch = min(desired - len(new), high - (len(members) - len(retire)))
    if parallelism is not None:
        launch = min(launch, parallelism - sum(one.booting for one in new))
    return Decision(refresh, max(0, launch), retire)


def cancel(refresh: Refresh) -> Refresh:
    """Let what is under way come to its end, and begin nothing more."""
    return replace(refresh, status=Status.CANCELLING, reason="Cancelled due to user request.")


def _begin(refresh: Refresh, members: Sequence[Member], now: float) -> Refresh:
    skip = refresh.preferences.skip_matching
    old = frozenset(one.id for one in members if not (skip and one.matches))
    return replace(
        refresh,
        status=Status.IN_PROGRESS,
        old=old,
        total=len(old),
        remaining=len(old),
        progress_at=now,
    )


def _measure(
    refresh: Refresh, new: Sequence[Member], old: int, desired: int, now: float
) -> Refresh:
    healthy = sum(one.healthy for one in new)
    remaining = min(refresh.total, max(old, desired - healthy))
    came_on = remaining < refresh.remaining or healthy > refresh.healthy_new
    waiting = next((one.id for one in new if not one.healthy), None)
    reason = (
        None
        if waiting is None
        else f"Waiting for instances to warm up before continuing. For example: {waiting} is warming up."
    )
    return replace(
        refresh,
        remaining=min(remaining, refresh.remaining),
        healthy_new=max(healthy, refresh.healthy_new),
        progress_at=now if came_on else refresh.progress_at,
        reason=reason,
    )


def _retired(old: Sequence[Member], healthy: int, low: int) -> tuple[str, ...]:
    """Choose the old ones that can go: those that do not serve anyway, then as many as the minimum allows."""
    gone = []
    for one in sorted(old, key=lambda member: (member.healthy, member.launched_at, member.id)):
        if one.healthy:
            if healthy - 1 < low:
                break
            healthy -= 1
        gone.append(one.id)
    return tuple(gone)


def _cancelling(
    refresh: Refresh, members: Sequence[Member], leaving: frozenset[str], now: float
) -> Decision:
    if leaving or any(one.pending for one in members):
        return Decision(refresh)
    return Decision(replace(refresh, status=Status.CANCELLED, ended_at=now))
