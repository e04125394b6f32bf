"""What releases would do to a group of these settings: a good one, one that never gets healthy, one that fails at once.

The good one, and the bad ones with AWS alone, run in `region.rehearsal`; where Calve judges, the real operator runs
upon a virtual fleet. Machines are scripts, time is virtual. Types: `Settings`, `Told`, `Advice`.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from calve.aws.autoscaling import Group, Hook
from calve.aws.elb import Check
from calve.contract.codes import Code
from calve.demo.virtual import NAME, Endpoint, VirtualFleet, Wanted, endpoint
from calve.fleet.config import Health, Rollout
from calve.fleet.plan import surge
from calve.fleet.tags import HOOK
from calve.region import hooks
from calve.region.refresh import Preferences, Status
from calve.region.rehearsal import Plan, Rehearsal, simulate
from calve.region.scripts import Script, fails, good, serves_500
from calve.region.targets import HealthCheck
from calve.rollout import start
from calve.tasks import Cancel

__all__ = ["Advice", "Settings", "Told", "advise", "rehearse"]

GOOD: Final = "good"
NEVER: Final = "never healthy"
AT_ONCE: Final = "fails at once"

BAD_MOST: Final = 200
"""Machines that a bad release meets, at most: what a verdict rests on are the first few that fail."""
_LONGEST_S: Final = 14 * 86_400.0
"""Auto Scaling's bound of a refresh."""
_BEATS_S: Final = 180
_ALARM_S: Final = 120
"""When an alarm of two periods of a minute goes off at the earliest."""
_LONG_S: Final = 1800
_FEW: Final = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """What is rehearsed.

    Attributes:
        machines: the group's desired capacity, 1 or more.
        boot_s: from a machine's launch until it serves.
        rollout: the fleet's.
        within_s: so long a machine may take until it is healthy.
        hook_s: heartbeat of the launch hook; None for none.
        grace_s: the group's health check grace period.
        warmup_s: the group's default warm-up; None where it is not set.
        check: the balancer's.
    """

    machines: int
    boot_s: float
    rollout: Rollout
    within_s: int = 180
    hook_s: int | None = 180
    grace_s: int = 300
    warmup_s: int | None = None
    check: Check = field(default_factory=Check)


@dataclass(frozen=True, slots=True)
class Told:
    """How a release went; seconds since its refresh was asked for.

    Attributes:
        release: which.
        judge: who could end it early: `calve`, or `aws` alone.
        outcome: `released`, `rolled-back` or `failed`.
        machines: that it was rehearsed with.
        noticed_s: when it was given up; None where it was not.
        by: what it was given up for.
        done_s: when all was over.
        least_healthy: machines that served at the worst moment.
        surge_machine_s: time of machines beyond the group's size, summed up.
        launched: machines that were launched for it.
    """

    release: str
    judge: str
    outcome: str
    machines: int
    noticed_s: float | None
    by: str
    done_s: float
    least_healthy: int
    surge_machine_s: float
    launched: int


@dataclass(frozen=True, slots=True)
class Advice:
    """What could be set better; `hint` is how."""

    code: str
    message: str
    hint: str


def rehearse(settings: Settings, cancel: Cancel | None = None) -> Iterator[Told]:
    """Run one release after the other, and tell how each went.

    Args:
        settings: of the group and its rollouts.
        cancel: stops between two of them.

    Raises:
        DeadlineError: with these settings nothing comes into service.
    """
    token = cancel or Cancel()
    fewer = replace(settings, machines=min(settings.machines, BAD_MOST))
    yield _alone(settings, GOOD, good(settings.boot_s), judge="calve")
    with tempfile.TemporaryDirectory(prefix="calve-rehearse-") as work, endpoint() as served:
        for number, (release, script, bare) in enumerate(_bad(settings)):
            token.check()
            yield _judged(fewer, release, script, Path(work) / str(number), served)
            token.check()
            yield _alone(replace(fewer, hook_s=None), release, bare, judge="aws")


def _bad(settings: Settings) -> Iterator[tuple[str, Script, Script]]:
    """Return the bad releases: what a machine of Calve's does, and what one does without the agent."""
    sick = serves_500(settings.boot_s)
    ill = sick
    if settings.hook_s is not None:
        at_s = float(max(settings.within_s, settings.boot_s))
        ill = replace(
            fails(Code.UNHEALTHY.value, Code.UNHEALTHY.text, at_s, phase="health"),
            serves=sick.serves,
        )
    yield NEVER, ill, replace(sick, result=None, beat_s=None)
    code = Code.CLOSURE_INCOMPLETE
    ended = fails(code.value, code.text, settings.boot_s * 0.3)
    yield AT_ONCE, ended, replace(ended, result=None, beat_s=None)


# By Auto Scaling's rules alone


def _alone(settings: Settings, release: str, script: Script, *, judge: str) -> Told:
    told = simulate(_plan(settings), lambda _launch: script)
    refresh, size = told.refresh, settings.machines
    back = refresh.rollback
    ended = {Status.SUCCESSFUL: "released", Status.ROLLBACK_SUCCESSFUL: "rolled-back"}
    return Told(
        release,
        judge,
        ended.get(refresh.status, "failed"),
        size,
        None if back is None else back.started_at - refresh.started_at,
        "" if back is None else back.reason.partition(". ")[0],
        told.samples[-1].at_s,
        min(one.healthy for one in told.samples),
        _surge_s(told, size),
        sum(event.state == "Pending" for event in told.events),
    )


def _plan(settings: Settings) -> Plan:
    asked = start.preferences(replace(settings.rollout, alarms=()), _group(settings))
    heartbeat = settings.hook_s
    return Plan(
        settings.machines,
        Preferences(
            asked.min_healthy_percent,
            asked.max_healthy_percent,
            float(asked.warmup_s),
            auto_rollback=True,
            checkpoints=asked.checkpoints,
            checkpoint_delay_s=float(asked.checkpoint_delay_s),
            bake_s=float(asked.bake_s),
        ),
        hook=None
        if heartbeat is None
        else hooks.Hook("calve", hooks.Transition.LAUNCHING, heartbeat),
        check=HealthCheck(
            interval_s=settings.check.interval_s,
            healthy=settings.check.healthy,
            unhealthy=settings.check.unhealthy,
        ),
        grace_s=float(settings.grace_s),
        grid_s=1.0 if settings.machines <= BAD_MOST else 10.0,
        most_s=_LONGEST_S,
    )


def _group(settings: Settings) -> Group:
    size = settings.machines
    return Group(NAME, None, None, 0, 2 * size, size, "ELB", (), (), ())


def _surge_s(told: Rehearsal, size: int) -> float:
    return sum(
        (after.at_s - before.at_s) * max(0, sum(before.lifecycles.values()) - size)
        for before, after in itertools.pairwise(told.samples)
    )


# With Calve


class _Meter:
    """Looks at a fleet's size at every instant of its clock."""

    def __init__(self, made: VirtualFleet, size: int) -> None:
        self._made = made
        self._size = size
        self._at = made.clock.monotonic()
        self._there = size
        self._seen = set(self._instances())
        self.least = made.serving()
        self.surge_s = 0.0
        self.launched = 0

    def _instances(self) -> tuple[str, ...]:
        return tuple(self._made.cloud.autoscaling.groups[NAME].instances)

    def look(self) -> float | None:
        """Take the time since the last look into account; see `region.virtual.Step`."""
        now, there = self._made.clock.monotonic(), self._instances()
        self.surge_s += (now - self._at) * max(0, self._there - self._size)
        self._at, self._there = now, len(there)
        self.least = min(self.least, self._made.serving())
        self.launched += len(set(there) - self._seen)
        self._seen.update(there)
        return None


def _judged(
    settings: Settings, release: str, script: Script, directory: Path, served: Endpoint
) -> Told:
    size = settings.machines
    wanted = Wanted(
        size=(0, size, 2 * size),
        hook=settings.hook_s is not None,
        grace_s=settings.grace_s,
        check=settings.check,
    )
    with VirtualFleet(directory, served, wanted) as made:
        made.fleet = replace(
            made.fleet,
            health=Health("/healthz", None, settings.within_s),
            rollout=replace(settings.rollout, alarms=()),
        )
        if settings.hook_s is not None:
            made.gateways.scaling.put_hook(NAME, Hook(HOOK, heartbeat_s=settings.hook_s))
        made.scripts[2] = lambda _launch: script
        meter = _Meter(made, size)
        undo: Callable[[], None] = made.clock.drive(meter.look)
        began = made.clock.monotonic()
        try:
            verdict = made.rollout(made.release(2)).run()
        finally:
            undo()
        meter.look()
        reason = None if verdict is None else verdict.reason
        return Told(
            release,
            "calve",
            "failed" if verdict is None else verdict.outcome.value,
            size,
            None if reason is None else reason.at.timestamp() - began,
            "" if reason is None else _said(reason.rule, [one.code for one in reason.failures]),
            made.clock.monotonic() - began,
            meter.least,
            meter.surge_s,
            meter.launched,
        )


def _said(rule: str, codes: list[str]) -> str:
    return f"{rule}: {', '.join(dict.fromkeys(codes))}" if codes else rule


# Advice


def advise(settings: Settings) -> tuple[Advice, ...]:
    """Return what could be set better."""
    return tuple(found for rule in (_pace, _waits, _bake) for found in rule(settings))


def _pace(settings: Settings) -> Iterator[Advice]:
    rules, size = settings.rollout, settings.machines
    how = surge(size, rules)
    if (rules.min_healthy_percent, rules.max_healthy_percent) == (100, 100):
        yield Advice(
            "no-surge",
            "min-healthy and max-healthy are both 100: a machine is ended before its successor is there",
            "max-healthy above 100",
        )
    if how.at_once == 1 and size > _FEW:
        yield Advice(
            "one-at-a-time",
            f"one machine at a time is replaced: {how.batches} times {settings.boot_s:.0f} s and more",
            "max-healthy = 200 replaces all at once, 110 a tenth",
        )
    wait_s = how.batches * settings.grace_s
    if settings.warmup_s is None and wait_s >= _LONG_S:
        yield Advice(
            "warm-up",
            "the group has no default warm-up: an instance refresh that names none, as Terraform's and the console's,"
            f" waits the grace period of {settings.grace_s} s for each of {how.batches} batches:"
            f" {wait_s / 3600:.1f} h for {size} machines; Calve names {rules.warmup_s} s",
            "a default instance warm-up, or releases by Calve alone",
        )


def _waits(settings: Settings) -> Iterator[Advice]:
    if settings.hook_s is not None and settings.hook_s > _BEATS_S:
        yield Advice(
            "hook-heartbeat",
            f"a machine that says nothing is noticed after the launch hook's {settings.hook_s} s; those that work say"
            " so every minute",
            f"a heartbeat timeout of {_BEATS_S} s: calve adopt sets it",
        )
    if settings.boot_s > settings.within_s:
        yield Advice(
            "within",
            f"machines take {settings.boot_s:.0f} s, and are given up after {settings.within_s} s",
            "health.within above what a boot takes",
        )


def _bake(settings: Settings) -> Iterator[Advice]:
    bake_s, alarms = settings.rollout.bake_s, settings.rollout.alarms
    if alarms and bake_s < _ALARM_S:
        yield Advice(
            "bake",
            f"the release bakes for {bake_s} s, and an alarm of two periods of a minute needs {_ALARM_S} s to go off",
            f'bake = "{_ALARM_S // 60}m" or more',
        )
    elif bake_s > 5 * _ALARM_S:
        why = "alarms of two periods of a minute have gone off" if alarms else "no alarm is named"
        yield Advice(
            "bake",
            f"the release bakes for {bake_s} s, in which it holds up the next one; {why} by then",
            "a shorter bake, unless an alarm of longer periods is waited for",
        )
