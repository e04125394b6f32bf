"""Target groups as pure machines: registered, initial, healthy, unhealthy, draining, gone.

Source: Elastic Load Balancing, "Target health status", "Reason codes" and "Deregistration delay" of Application Load
Balancers; API reference, DescribeTargetHealth. The order in which a target meets the balancer is the whole point:
it enters without traffic while checks run, gets traffic only after its own check has passed, loses new requests
first, and leaves when nothing is under way. No clock, thread or network.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "Add",
    "Check",
    "Drain",
    "Effect",
    "HealthCheck",
    "Ready",
    "Remove",
    "Seen",
    "Step",
    "Target",
    "TargetGroup",
    "TargetState",
    "advance",
    "deregister",
    "register",
    "worst",
]

QUIET_LOOKS = 2
"""How many looks in a row must find a draining target without connections."""


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How a target is checked: by HTTP, 200 is healthy."""

    path: str = "/"
    interval_s: int = 30
    timeout_s: int = 5
    healthy: int = 5
    unhealthy: int = 2


class TargetState(StrEnum):
    """A target's state."""

    INITIAL = "initial"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Check:
    """What the balancer says of a target that it was given.

    Attributes:
        known: A check has ended since the target was added.
        passing: The threshold of good checks is met, and the last one was no lie of an earlier machine's.
        code: The HTTP status of the last check, None where there was none.
        timed_out: It ended by time.
        connections: Requests under way.
    """

    known: bool = False
    passing: bool = False
    code: int | None = None
    timed_out: bool = False
    connections: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of a target: where it is reached (None: not yet), and its check (None: not added)."""

    address: tuple[str, int] | None = None
    check: Check | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A registered target."""

    id: str
    registered_at: float
    state: TargetState = TargetState.INITIAL
    reason: str | None = "Elb.RegistrationInProgress"
    description: str | None = "Target registration is in progress"
    added: bool = False
    ready: bool = False
    drained_at: float | None = None
    quiet: int = 0


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """A target group and what is registered in it."""

    arn: str
    name: str
    check: HealthCheck
    delay_s: float = 300.0
    targets: Mapping[str, Target] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Add:
    """Give the balancer a target, without traffic, with checks running."""

    target_id: str
    address: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Ready:
    """Let it have traffic."""

    target_id: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Give it no new request."""

    target_id: str


@dataclass(frozen=True, slots=True)
class Remove:
    """Take it away; requests still under way are cut."""

    target_id: str


Effect = Add | Ready | Drain | Remove


@dataclass(frozen=True, slots=True)
class Step:
    """A target group after `advance`, what is to be done, and when to look again if nothing is seen before."""

    group: TargetGroup
    effects: tuple[Effect, ...]
    wake_at: float | None


def register(group: TargetGroup, target_id: str, now: float) -> TargetGroup:
    """Register a target; one that drains comes back as a new one only when it is gone."""
    if target_id in group.targets:
        return group
    return replace(group, targets={**group.targets, target_id: Target(target_id, now)})


def deregister(group: TargetGroup, target_id: str, now: float) -> TargetGroup:
    """Begin to drain a target; nothing happens where it is not registered or drains already."""
    target = group.targets.get(target_id)
    if target is None or target.state is TargetState.DRAINING:
        return group
    draining = replace(
        target,
        state=TargetState.DRAINING,
        reason="Target.DeregistrationInProgress",
        description="Target deregistration is in progress",
        drained_at=now,
        ready=False,
    )
    return replace(group, targets={**group.targets, target_id: draining})


def advance(
    group: TargetGroup, seen: Mapping[str, Seen], now: float, *, draining: bool = True
) -> Step:
    """Bring a target group on; after effects, look again at once.

    Args:
        group: What is.
        seen: By target; what is missing was not seen.
        now: Seconds.
        draining: False cuts a deregistered target off at once, to show what draining is for.
    """
    targets: dict[str, Target] = {}
    effects: list[Effect] = []
    wake: list[float] = []
    nothing, same = Seen(), True
    for target in group.targets.values():
        look = seen.get(target.id, nothing)
        if target.state is TargetState.DRAINING:
            left, doing = _leave(target, look, now, group.delay_s if draining else 0.0)
            if left is not None and left.drained_at is not None:
                wake.append(left.drained_at + group.delay_s)
        else:
            left, doing = _check(target, look, now, group.check)
            if target.state is TargetState.INITIAL:
                wake.append(_known_bad_at(target, group.check))
        effects += doing
        if left is not None:
            targets[target.id] = left
        same = same and (left is target or left == target)
    if same and not effects:
        return Step(group, (), min((time for time in wake if time > now), default=None))
    return Step(replace(group, targets=targets), tuple(effects), now)


def worst(states: list[TargetState]) -> TargetState | None:
    """Return the state that counts for an instance in several target groups; None for none."""
    order = [
        TargetState.DRAINING,
        TargetState.UNHEALTHY,
        TargetState.INITIAL,
        TargetState.HEALTHY,
    ]
    return min(states, key=order.index, default=None)


def _known_bad_at(target: Target, check: HealthCheck) -> float:
    """Return from when on a target that never passed is unhealthy instead of initial."""
    return target.registered_at + check.interval_s * check.unhealthy


def _check(
    target: Target, look: Seen, now: float, check: HealthCheck
) -> tuple[Target, list[Effect]]:
    if not target.added:
        if look.address is None:
            return target, []
        entered = replace(
            target,
            added=True,
            reason="Elb.InitialHealthChecking",
            description="Initial health checks in progress",
        )
        return entered, [Add(target.id, look.address)]
    if look.check is None or not look.check.known:
        return target, []
    if look.check.passing and target.ready and target.state is TargetState.HEALTHY:
        return target, []
    if look.check.passing:
        up = replace(target, state=TargetState.HEALTHY, reason=None, description=None, ready=True)
        return up, [] if target.ready else [Ready(target.id)]
    if target.state is TargetState.INITIAL and now < _known_bad_at(target, check):
        return target, []
    reason, description = _why(look.check)
    return replace(target, state=TargetState.UNHEALTHY, reason=reason, description=description), []


def _why(check: Check) -> tuple[str, str]:
    if check.timed_out:
        return "Target.Timeout", "Request timed out"
    if check.code is not None:
        return (
            "Target.ResponseCodeMismatch",
            f"Health checks failed with these codes: [{check.code}]",
        )
    return "Target.FailedHealthChecks", "Health checks failed"


def _leave(
    target: Target, look: Seen, now: float, delay_s: float
) -> tuple[Target | None, list[Effect]]:
    if not target.added:
        return None, []
    if target.drained_at is not None and now >= target.drained_at + delay_s:
        return None, [Remove(target.id)]
    if target.quiet == 0:  # the first look after this one comes after the balancer was told
        return replace(target, quiet=1), [Drain(target.id)]
    if look.check is None or look.check.connections > 0:
        return replace(target, quiet=1), []
    if target.quiet < QUIET_LOOKS:
        return replace(target, quiet=target.quiet + 1), []
    return None, [Remove(target.id)]
