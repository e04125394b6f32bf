"""The load balancer of scripted machines: when a check would have passed is computed, no request is made.

Source: Elastic Load Balancing, "Health checks for your target groups": one good check makes a new target healthy, then
the thresholds count. The first check comes an interval after the registration, the next ones in its rhythm.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from calve.errors import ConflictError
from calve.region.targets import Check, HealthCheck

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.region.scripted import ScriptedMachines
    from calve.region.virtual import VirtualClock

__all__ = ["ScriptedBalancer"]


@dataclass(slots=True)
class _Target:
    """A target; `since` is the first check that sees the status that its machine answers with now."""

    added_at: float
    since: float
    code: int | None
    before: Check = field(default_factory=Check)
    drained_at: float | None = None


class ScriptedBalancer:
    """See `balancer.Balancer`.

    Args:
        clock: Drives it, from now on until `close`.
        machines: What it balances.
        drain_s: Requests of a target in drain are under way for so long.
    """

    def __init__(
        self, clock: VirtualClock, machines: ScriptedMachines, *, drain_s: float = 0.0
    ) -> None:
        self._clock = clock
        self._machines = machines
        self._drain_s = drain_s
        self._check: HealthCheck | None = None
        self._targets: dict[str, _Target] = {}
        self._checks: dict[str, Check] = {}
        self._shown: Mapping[str, Check] | None = None
        self._due: list[tuple[float, str]] = []
        machines.watch(self._changed)
        self._undrive = clock.drive(self.step)

    def step(self) -> float | None:
        """Bring checks to now; see `virtual.Step`."""
        now, did = self._clock.monotonic(), False
        while self._due and self._due[0][0] <= now:
            _, target_id = heapq.heappop(self._due)
            did = self._look(target_id) or did
        if did:
            return now
        return self._due[0][0] if self._due else None

    def start(self, check: HealthCheck) -> None:
        """Take the check for every target; ConflictError where it has one."""
        if self._check is not None:
            raise ConflictError("this balancer is started already")
        self._check = check

    def add(self, target_id: str, address: tuple[str, int]) -> None:  # noqa: ARG002  (nothing is there)
        """Take a target in, with checks running from nothing."""
        now = self._clock.monotonic()
        code = self._machines.code(target_id)
        self._targets[target_id] = _Target(now, now + self._interval_s, code)
        self._look(target_id)

    def checks(self) -> Mapping[str, Check]:
        """Say what is known of every target; the same object until something is other than it was."""
        if self._shown is None:
            self._shown = MappingProxyType(dict(self._checks))
        return self._shown

    def ready(self, target_id: str) -> None:
        """Let a target have traffic: there is none."""

    def drain(self, target_id: str) -> None:
        """Give a target no new request."""
        self._targets[target_id].drained_at = self._clock.monotonic()
        self._look(target_id)

    def remove(self, target_id: str) -> None:
        """Take a target away; nothing happens where it is unknown."""
        self._targets.pop(target_id, None)
        self._checks.pop(target_id, None)
        self._shown = None

    def close(self) -> None:
        """Leave the clock; idempotent."""
        self._undrive()

    @property
    def _interval_s(self) -> float:
        return 30.0 if self._check is None else float(self._check.interval_s)

    def _changed(self, target_id: str) -> None:
        target = self._targets.get(target_id)
        if target is None:
            return
        now = self._clock.monotonic()
        target.before = replace(self._checks[target_id], connections=0)
        checks = max(1, math.ceil((now - target.added_at) / self._interval_s))
        target.since = target.added_at + checks * self._interval_s
        target.code = self._machines.code(target_id)
        self._look(target_id)

    def _look(self, target_id: str) -> bool:
        """Compute a target's check anew and when it changes next; say whether it changed."""
        target = self._targets.get(target_id)
        if target is None:
            return False
        now = self._clock.monotonic()
        check, due = _verdict(target, now, self._check or HealthCheck())
        if target.drained_at is not None and target.code is not None:
            over_at = target.drained_at + self._drain_s
            check = replace(check, connections=int(now < over_at))
            due = min(due, over_at if now < over_at else math.inf)
        if due < math.inf:
            heapq.heappush(self._due, (due, target_id))
        if self._checks.get(target_id) == check:
            return False
        self._checks[target_id] = check
        self._shown = None
        return True


def _verdict(target: _Target, now: float, rules: HealthCheck) -> tuple[Check, float]:
    """Return what is known of a target, and when that changes if its machine does not."""
    if now < target.since:
        return target.before, target.since
    count = math.floor((now - target.since) / rules.interval_s) + 1
    good, passing = target.code == 200, target.before.passing
    if good == passing:
        return Check(known=True, passing=passing, code=target.code), math.inf
    needed = rules.unhealthy if passing else rules.healthy if target.before.known else 1
    if count >= needed:
        return Check(known=True, passing=good, code=target.code), math.inf
    turns_at = target.since + (needed - 1) * rules.interval_s
    return Check(known=True, passing=passing, code=target.code), turns_at
