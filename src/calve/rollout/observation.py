"""What is seen of a rollout at one instant: the refresh, the machines of the new release, launches that were refused.

Pure data, and the reading of scaling activities' texts, which is where AWS says how a machine left its group.
Source: Amazon EC2 Auto Scaling User Guide, "Verify a scaling activity"; Elastic Load Balancing, "Reason codes".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from calve.contract.evidence import Evidence

if TYPE_CHECKING:
    from calve.aws.autoscaling import Activity
    from calve.aws.refreshes import Refresh

__all__ = [
    "End",
    "Machine",
    "Observation",
    "Refused",
    "Target",
    "ends",
    "failure_of",
    "launched",
    "refused",
]


class End(StrEnum):
    """How a group ended a machine by itself."""

    ABANDONED = "abandoned"
    TIMED_OUT = "timed-out"
    EC2 = "ec2"
    ELB = "elb"


@dataclass(frozen=True, slots=True)
class Target:
    """A machine's health in its target group, in AWS's words, and since when it has been so, epoch seconds."""

    state: str
    reason: str
    since_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that was launched for the release.

    Attributes:
        lifecycle: its state in the group; "" once it has left it.
        first_s: when it was launched, or first seen where its group does not say, epoch seconds.
        target: None where it is registered nowhere.
        unhealthy: the reason of its target when it was last unhealthy, in AWS's word; "" where it was not seen so.
        events: its evidence, of its report or its console.
        lines: the last lines of either, foreign text.
        end: how its group ended it; None where it did not, or for another reason.
    """

    id: str
    lifecycle: str
    first_s: float
    target: Target | None = None
    events: tuple[Evidence, ...] = ()
    lines: tuple[str, ...] = ()
    end: End | None = None
    unhealthy: str = ""

    @property
    def serves(self) -> bool:
        """Say whether it is in service, and no balancer says otherwise."""
        return self.lifecycle == "InService" and (
            self.target is None or self.target.state == "healthy"
        )

    @property
    def failure(self) -> Evidence | None:
        """Return its last word, where that is of a failure."""
        return failure_of(self.events)

    @property
    def phase(self) -> str:
        """Return the last phase of its boot that it named."""
        named = (event for event in reversed(self.events) if event.kind == "phase")
        return str(next((event.fields.get("n", "") for event in named), ""))


@dataclass(frozen=True, slots=True)
class Refused:
    """A launch that EC2 refused: the activity's id and what EC2 said."""

    activity: str
    message: str


@dataclass(frozen=True, slots=True)
class Observation:
    """What is seen, at `at_s` (epoch seconds); `refresh` is the release's, None before it has one."""

    at_s: float
    refresh: Refresh | None
    machines: tuple[Machine, ...] = ()
    refused: tuple[Refused, ...] = ()

    @property
    def serving(self) -> int:
        """Return how many machines of the release serve."""
        return sum(one.serves for one in self.machines)


_INSTANCE = re.compile(r"\bi-[0-9a-f]{8,17}\b")


def failure_of(events: Sequence[Evidence]) -> Evidence | None:
    """Return a machine's last word of how it went, where that is of a failure: it may have started once more."""
    words = (event for event in reversed(events) if event.kind in {"fail", "healthy"})
    last = next(words, None)
    return last if last is not None and last.kind == "fail" else None


def launched(activities: Iterable[Activity]) -> dict[str, float]:
    """Return when a group launched its machines, epoch seconds, by their ids, of its activities."""
    return {
        match[0]: one.started_at.timestamp()
        for one in activities
        if one.description.startswith("Launching") and (match := _INSTANCE.search(one.description))
    }


def ends(activities: Iterable[Activity]) -> dict[str, End]:
    """Return how machines were ended, by their ids, of a group's activities.

    One that stopped after it had come into service was terminated by somebody, or its host failed: that says nothing.
    """
    found: dict[str, End] = {}
    every = tuple(activities)
    served = launched(one for one in every if one.status == "Successful")
    for one in every:
        instance = _INSTANCE.search(one.description)
        if instance is None:
            continue
        said = f"{one.description} {one.message or ''}"
        if "was abandoned" in said:
            timed_out = "Heartbeat Timeout" in said
            found[instance[0]] = End.TIMED_OUT if timed_out else End.ABANDONED
        elif "ELB system health check" in one.cause:
            found.setdefault(instance[0], End.ELB)
        elif instance[0] not in served and (
            "EC2 health check" in one.cause or "EC2 instance status check" in one.cause
        ):
            found.setdefault(instance[0], End.EC2)
    return found


def refused(activities: Iterable[Activity]) -> tuple[Refused, ...]:
    """Return the launches that EC2 refused, oldest first."""
    return tuple(
        Refused(one.id, one.message or one.description)
        for one in sorted(activities, key=lambda each: each.started_at)
        if one.status == "Failed"
        and one.description.startswith("Launching")
        and "was abandoned" not in f"{one.description} {one.message or ''}"
    )
