"""Instance refresh as a pure machine: from what a group looks like to how many to launch and which to retire.

Source: Amazon EC2 Auto Scaling User Guide, "How an instance refresh works" (healthy percentages, the one-hour timeout),
"Add checkpoints to an instance refresh", "Undo changes with a rollback" (alarms), "Understand the default values". Of
the reasons, warming up and insufficient data are seen in AWS's answers; the others are ours. No clock or network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from calve.region.refresh import Preferences, Refresh, Reserved, Status, bounds, fail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["Decision", "Member", "decide"]

_NO_ALARMS: Mapping[str, str] = MappingProxyType({})
_AVAILABLE = "Waiting for remaining instances to be available. For example: "


class Member(NamedTuple):
    """An instance of the group that is not being terminated.

    Attributes:
        matches: Launched from the very template version that is wanted.
        pending: Not yet in service.
        healthy: In service, checks passed, warmed up.
        booting: Pending, or in service with checks that do not pass.
        warming: In service, checks passed, not yet warmed up.
        standby: In standby, and so no part of the capacity.
        protected: Protected from scale-in.
    """

    id: str
    launched_at: float
    matches: bool
    pending: bool
    healthy: bool
    booting: bool
    warming: bool = False
    standby: bool = False
    protected: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What a refresh wants now: so many launches, these ones retired."""

    refresh: Refresh
    launch: int = 0
    retire: tuple[str, ...] = ()


class _Scene(NamedTuple):
    """What there is to see; see `decide`."""

    members: Sequence[Member]
    desired: int
    leaving: frozenset[str]
    now: float
    parallelism: int | None
    give_up_s: float
    alarms: Mapping[str, str]
    ends: bool


class _Sides(NamedTuple):
    """The instances that are to go, in standby or not, and those of the capacity that stay."""

    bad: list[Member]
    good: list[Member]


def decide(
    refresh: Refresh,
    members: Sequence[Member],
    *,
    desired: int,
    leaving: frozenset[str],
    now: float,
    parallelism: int | None,
    give_up_s: float,
    alarms: Mapping[str, str] = _NO_ALARMS,
    ends: bool = True,
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
        alarms: The state of every alarm by name; one that is missing has no data.
        ends: Whether instances are terminated, which a suspended process stops.
    """
    scene = _Scene(members, desired, leaving, now, parallelism, give_up_s, alarms, ends)
    if refresh.status is Status.CANCELLING:
        return _cancelling(refresh, scene)
    if refresh.rolls_back:
        return _backward(refresh, scene)
    alarm = next((one for one in refresh.preferences.alarms if alarms.get(one) == "ALARM"), None)
    if alarm is not None:
        return Decision(fail(refresh, f"CloudWatch alarm {alarm} is in the ALARM state.", now))
    if refresh.status is Status.BAKING:
        return _baking(refresh, now)
    return _forward(refresh, scene)


def _cancelling(refresh: Refresh, scene: _Scene) -> Decision:
    if scene.leaving or any(one.pending for one in scene.members):
        return Decision(refresh)
    return Decision(replace(refresh, status=Status.CANCELLED, ended_at=scene.now))


def _baking(refresh: Refresh, now: float) -> Decision:
    return Decision(refresh if _pauses(refresh, now) else _ended(refresh, Status.SUCCESSFUL, now))


# Forward


def _forward(refresh: Refresh, scene: _Scene) -> Decision:
    if not refresh.began:
        refresh = _begin(refresh, scene)
    sides = _split(refresh, scene.members, lambda one: one.id in refresh.old)
    left, before = _left(sides, scene.desired), refresh.reason
    refresh = _measured(refresh, sides, min(left, refresh.remaining), scene)
    going = bool(scene.leaving & refresh.old)
    final = refresh.total - _quota(refresh, -1)
    if left <= final or not refresh.total:
        if not going:
            return Decision(_complete(refresh, scene.now))
    elif _stalls(refresh, sides, scene):
        return Decision(
            fail(refresh, _gave_up(refresh.reason or before, scene.give_up_s), scene.now)
        )
    elif not going:
        refresh = _paused(refresh, refresh.total - left, scene.now)
    if any(scene.alarms.get(one) != "OK" for one in refresh.preferences.alarms):
        return Decision(replace(refresh, reason="Waiting for CloudWatch alarms to have data."))
    return _replaced(refresh, sides, refresh.total - _quota(refresh, refresh.checkpoint), scene)


def _begin(refresh: Refresh, scene: _Scene) -> Refresh:
    preferences = refresh.preferences
    old = frozenset(
        one.id
        for one in scene.members
        if not (preferences.skip_matching and one.matches) and not _ignored(one, preferences)
    )
    return replace(
        refresh,
        status=Status.IN_PROGRESS,
        began=True,
        old=old,
        kept=frozenset(one.id for one in scene.members) - old,
        total=len(old),
        remaining=len(old),
        progress_at=scene.now,
    )


def _complete(refresh: Refresh, now: float) -> Refresh:
    if refresh.preferences.bake_s and refresh.total:
        until = now + refresh.preferences.bake_s
        reason = "Waiting for the bake time to pass before completing."
        return replace(refresh, status=Status.BAKING, reason=reason, until=until)
    return _ended(refresh, Status.SUCCESSFUL, now)


def _quota(refresh: Refresh, checkpoint: int) -> int:
    """Return how many are to be replaced at a checkpoint, rounded up; all where there are none."""
    checkpoints = refresh.preferences.checkpoints
    return math.ceil(refresh.total * (checkpoints[checkpoint] if checkpoints else 100) / 100)


def _paused(refresh: Refresh, replaced: int, now: float) -> Refresh:
    """Stop at the furthest checkpoint that is reached, but for the last; go on when the delay is over."""
    if refresh.until is not None:
        if _pauses(refresh, now):
            return refresh
        return replace(refresh, checkpoint=refresh.checkpoint + 1, until=None, progress_at=now)
    last = len(refresh.preferences.checkpoints) - 1
    reached = [one for one in range(refresh.checkpoint, last) if replaced >= _quota(refresh, one)]
    if not reached:
        return refresh
    percentage = refresh.preferences.checkpoints[reached[-1]]
    return replace(
        refresh,
        checkpoint=reached[-1],
        until=now + refresh.preferences.checkpoint_delay_s,
        reason=f"Checkpoint of {percentage} percent reached. Waiting before continuing.",
    )


# Backward


def _backward(refresh: Refresh, scene: _Scene) -> Decision:
    """Undo: what was launched since it began and is not of the group's own version goes."""
    there = refresh.old | refresh.kept
    sides = _split(refresh, scene.members, lambda one: not one.matches and one.id not in there)
    left, before = _left(sides, scene.desired), refresh.reason
    undone = refresh.total - min(left, refresh.total - refresh.remaining)
    refresh = _measured(refresh, sides, undone, scene)
    if not refresh.began or (left <= 0 and not scene.leaving - there):
        done = replace(refresh, remaining=refresh.total)
        return Decision(_ended(done, Status.ROLLBACK_SUCCESSFUL, scene.now))
    if left > 0 and _stalls(refresh, sides, scene):
        return Decision(
            fail(refresh, _gave_up(refresh.reason or before, scene.give_up_s), scene.now)
        )
    return _replaced(refresh, sides, 0, scene)


# Both ways


def _split(refresh: Refresh, members: Sequence[Member], goes: Callable[[Member], bool]) -> _Sides:
    bad, good = [], []
    for one in members:
        if goes(one) and not _ignored(one, refresh.preferences):
            bad.append(one)
        elif not one.standby:
            good.append(one)
    return _Sides(bad, good)


def _ignored(one: Member, preferences: Preferences) -> bool:
    return (one.standby and preferences.standby is Reserved.IGNORE) or (
        one.protected and preferences.protected is Reserved.IGNORE
    )


def _waits(one: Member, preferences: Preferences) -> bool:
    return (one.standby and preferences.standby is Reserved.WAIT) or (
        one.protected and preferences.protected is Reserved.WAIT
    )


def _left(sides: _Sides, desired: int) -> int:
    """Return how many replacements are still to come true."""
    return max(len(sides.bad), desired - sum(one.healthy for one in sides.good))


def _measured(refresh: Refresh, sides: _Sides, remaining: int, scene: _Scene) -> Refresh:
    healthy = sum(one.healthy for one in sides.good)
    came_on = remaining != refresh.remaining or healthy > refresh.healthy
    reason = refresh.reason
    if refresh.until is None:
        reason = _reason(sides, refresh.preferences)
    return replace(
        refresh,
        remaining=remaining,
        healthy=max(healthy, refresh.healthy),
        progress_at=scene.now if came_on else refresh.progress_at,
        reason=reason,
    )


def _reason(sides: _Sides, preferences: Preferences) -> str | None:
    """Say what is waited for, by one example."""
    for one in sides.good:
        if one.warming:
            return f"Waiting for instances to warm up before continuing. For example: {one.id} is warming up."
        if one.pending:
            return f"{_AVAILABLE}{one.id} has insufficient data to evaluate its health with Amazon EC2."
        if not one.healthy:
            return f"{_AVAILABLE}{one.id} does not pass its health checks."
    for one in sides.bad:
        if _waits(one, preferences):
            what = (
                "in Standby. Return it to service"
                if one.standby
                else ("protected. Remove instance scale-in protection")
            )
            return f"{_AVAILABLE}{one.id} is {what} to continue."
    return None


def _stalls(refresh: Refresh, sides: _Sides, scene: _Scene) -> bool:
    """Say whether nothing came on for too long; a pause and a warm-up are no standstill."""
    return (
        scene.now - refresh.progress_at >= scene.give_up_s
        and refresh.until is None
        and not any(one.warming for one in sides.good)
    )


def _gave_up(reason: str | None, give_up_s: float) -> str:
    return (
        f"No replacement instance became healthy within {give_up_s:.0f} seconds. "
        f"{reason or ''}".strip()
    )


def _pauses(refresh: Refresh, now: float) -> bool:
    return refresh.until is not None and now < refresh.until


def _ended(refresh: Refresh, status: Status, now: float) -> Refresh:
    return replace(refresh, status=status, reason=None, ended_at=now, until=None)


def _replaced(refresh: Refresh, sides: _Sides, keep: int, scene: _Scene) -> Decision:
    """Launch and retire within the bounds, until `keep` of those that are to go are left."""
    low, high = bounds(refresh.preferences, scene.desired)
    capacity = [one for one in (*sides.bad, *sides.good) if not one.standby]
    waiting = [one for one in sides.bad if _waits(one, refresh.preferences)]
    may_go = [one for one in sides.bad if scene.ends and not _waits(one, refresh.preferences)]
    retire = _retired(may_go, len(sides.bad) - keep, sum(one.healthy for one in capacity), low)
    standing = sum(not one.standby for one in sides.bad)
    staying = max(min(standing, keep), sum(not one.standby for one in waiting))
    after = len(capacity) - sum(not one.standby for one in retire)
    launch = min(scene.desired - staying - len(sides.good), high - after)
    if scene.parallelism is not None:
        launch = min(launch, scene.parallelism - sum(one.booting for one in sides.good))
    return Decision(refresh, max(0, launch), tuple(one.id for one in retire))


def _retired(may_go: Iterable[Member], most: int, healthy: int, low: int) -> list[Member]:
    """Choose those that can go: such as do not serve anyway, then as many as the minimum allows."""
    gone: list[Member] = []
    for one in sorted(may_go, key=lambda member: (member.healthy, member.launched_at, member.id)):
        if len(gone) >= most:
            break
        if one.healthy:
            if healthy - 1 < low:
                break
            healthy -= 1
        gone.append(one)
    return gone
