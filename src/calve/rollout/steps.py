"""What is to be done next for a release: `next_step(situation)`.

Pure. Every situation that AWS can be found in has its step, whoever brought it there: a run that was killed, another
host, a person at the console.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calve.fleet.verdict import Outcome, Reason, Verdict

if TYPE_CHECKING:
    from calve.aws.refreshes import Refresh

__all__ = [
    "Conclude",
    "CreateVersion",
    "Done",
    "Refuse",
    "RollBack",
    "Situation",
    "StartRefresh",
    "Step",
    "Watch",
    "next_step",
]


@dataclass(frozen=True, slots=True)
class Situation:
    """Where a release stands.

    Attributes:
        release: its number.
        version: of the launch template that carries it; None before there is one.
        live: the version that the group is configured with, as AWS gives it.
        refresh: the newest refresh to `version`; None where there was none.
        other: a refresh to something else that is active.
        reason: why it must be given up.
        verdict: how it ended.
        may_start: this host may begin what has not begun; a guard may not.
    """

    release: int
    version: int | None
    live: str
    refresh: Refresh | None
    other: Refresh | None
    reason: Reason | None
    verdict: Verdict | None
    may_start: bool


@dataclass(frozen=True, slots=True)
class CreateVersion:
    """Make the launch template version, from the live one's number."""

    source: int


@dataclass(frozen=True, slots=True)
class StartRefresh:
    """Start the instance refresh."""

    version: int


@dataclass(frozen=True, slots=True)
class Watch:
    """Look again after a while."""


@dataclass(frozen=True, slots=True)
class RollBack:
    """Keep the evidence and the reason, then call the rollback."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Conclude:
    """Write the verdict."""

    outcome: Outcome
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class Done:
    """It has ended."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Refuse:
    """It cannot go on, and nothing was changed."""

    message: str
    hint: str


Step = CreateVersion | StartRefresh | Watch | RollBack | Conclude | Done | Refuse

_ENDED = {
    "Successful": Outcome.RELEASED,
    "RollbackSuccessful": Outcome.ROLLED_BACK,
    "RollbackFailed": Outcome.ROLLBACK_FAILED,
    "Cancelled": Outcome.CANCELLED,
    "Failed": Outcome.FAILED,
}


def next_step(now: Situation) -> Step:
    """Return what is to be done."""
    if now.verdict is not None:
        return Done(now.verdict)
    refresh = now.refresh
    if refresh is None:
        return _begin(now)
    if refresh.status in _ENDED:
        outcome = _ENDED[refresh.status]
        return Conclude(outcome, None if outcome is Outcome.RELEASED else now.reason)
    if now.reason is not None and refresh.can_roll_back:
        return RollBack(now.reason)
    return Watch()


def _begin(now: Situation) -> Step:
    if now.other is not None:
        return Refuse(
            f"another instance refresh of the group is {now.other.status} ({now.other.percent} %)",
            "wait for it (calve watch), or end it: calve cancel, calve rollback",
        )
    if not now.may_start:
        return Refuse(
            f"release {now.release} was never started", "calve deploy starts it, or a newer one"
        )
    if now.version is None:
        if not now.live.isdecimal():
            return Refuse(
                f"the group launches from {now.live}, not from a numbered version",
                "calve adopt puts it on a number: from $Latest and $Default nothing can be rolled back",
            )
        return CreateVersion(int(now.live))
    return StartRefresh(now.version)
