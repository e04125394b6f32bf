"""Lifecycle hooks: what holds an instance that launches or terminates, for how long, and how the wait ends.

Source: Amazon EC2 Auto Scaling User Guide, "Amazon EC2 Auto Scaling lifecycle hooks" and "How lifecycle hooks work";
API reference, PutLifecycleHook, RecordLifecycleActionHeartbeat, DeleteLifecycleHook. The texts of what was abandoned:
User Guide, "Tutorial: Use data script and instance metadata to retrieve lifecycle state" (a result), CodeDeploy User
Guide, "Troubleshoot Amazon EC2 Auto Scaling issues" (a timeout). No clock: `groups` asks at every instant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Hook", "Outcome", "Result", "Transition", "Wait", "begin", "drop", "outcome"]

MOST_S = 48 * 3600
MOST_HEARTBEATS = 100


class Transition(StrEnum):
    """When a hook holds an instance: once it runs, or once it has left its target groups."""

    LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
    TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"


class Result(StrEnum):
    """How a lifecycle action ends."""

    CONTINUE = "CONTINUE"
    ABANDON = "ABANDON"


@dataclass(frozen=True, slots=True)
class Hook:
    """A lifecycle hook of a group.

    Attributes:
        heartbeat_s: So long without a heartbeat, and the default result is taken.
        default: The result of an action that timed out.
        metadata: The client's own text; kept and shown, as no notifications are simulated.
    """

    name: str
    transition: Transition
    heartbeat_s: int = 3600
    default: Result = Result.ABANDON
    metadata: str | None = None

    @property
    def most_s(self) -> int:
        """Return the longest wait, whatever the heartbeats."""
        return min(MOST_S, MOST_HEARTBEATS * self.heartbeat_s)


@dataclass(frozen=True, slots=True)
class Wait:
    """One lifecycle action: an instance is held by a hook, which counts as it was when the wait began.

    Attributes:
        beat_at: When it began, or the last heartbeat.
        result: What a client said.
    """

    hook: Hook
    token: str
    began_at: float
    beat_at: float
    result: Result | None = None

    @property
    def ends_at(self) -> float:
        """Return when it times out."""
        return min(self.beat_at + self.hook.heartbeat_s, self.began_at + self.hook.most_s)

    def active(self, now: float) -> bool:
        """Say whether a heartbeat or a result is still to be had of it."""
        return self.result is None and now < self.ends_at

    def ended(self, now: float) -> Result | None:
        """Return its result: the client's, or the default where it timed out; None while it holds."""
        if self.result is not None:
            return self.result
        return self.hook.default if now >= self.ends_at else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the waits of a transition ended; `reason` is AWS's status message where one was abandoned."""

    result: Result
    reason: str | None = None


def begin(
    hooks: Iterable[Hook], transition: Transition, token: Callable[[], str], now: float
) -> tuple[Wait, ...]:
    """Begin the waits of all hooks of a transition, at the same time; () where there are none."""
    return tuple(Wait(one, token(), now, now) for one in hooks if one.transition is transition)


def outcome(waits: Iterable[Wait], now: float) -> Outcome | None:
    """Say how the waits ended, None while one holds.

    One ABANDON ends them all; CONTINUE has to come of every one. No waits at all are a CONTINUE.
    """
    holds = False
    for wait in waits:
        result = wait.ended(now)
        if result is Result.ABANDON:
            said = (
                "Heartbeat Timeout"
                if wait.result is None
                else "Lifecycle Action Completed with ABANDON Result"
            )
            reason = (
                "Instance failed to complete user's Lifecycle Action: Lifecycle Action with token "
                f"{wait.token} was abandoned: {said}"
            )
            return Outcome(result, reason)
        holds = holds or result is None
    return None if holds else Outcome(Result.CONTINUE)


def drop(waits: Iterable[Wait], hook: str, now: float) -> tuple[Wait, ...]:
    """End the waits of a hook that is deleted: ABANDON for what launches, CONTINUE for what terminates."""
    return tuple(
        replace(
            one,
            result=Result.ABANDON
            if one.hook.transition is Transition.LAUNCHING
            else Result.CONTINUE,
        )
        if one.hook.name == hook and one.active(now)
        else one
        for one in waits
    )
