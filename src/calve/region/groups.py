"""Auto Scaling groups as pure machines: `advance(group, world, now)` gives the group, effects and when to look again.

Source: Amazon EC2 Auto Scaling User Guide, "Health checks", "Suspend and resume Amazon EC2 Auto Scaling processes",
"Instance distribution", "Verify a scaling activity" (the texts of causes). No clock, thread or network: effects are data
that `cloud`, or a test with a virtual clock, performs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from calve.region import hooks
from calve.region.ec2 import State
from calve.region.group import Group, GroupInstance, Lifecycle, Rules, Seen, Step, World
from calve.region.group_draft import Draft
from calve.region.group_spread import choose, surplus
from calve.region.hooks import Result
from calve.region.names import stamp
from calve.region.refresh import Refresh, Status
from calve.region.refresh_steps import Member, decide

if TYPE_CHECKING:
    from calve.region.templates import TemplateSpec

__all__ = ["advance"]

_GONE = Seen(State.TERMINATED)
_IN_SERVICE, _RUNNING = Lifecycle.IN_SERVICE, State.RUNNING
_CALM = {"healthy", "initial", None}
"""Target states at which nothing has to be decided of a running instance in service."""
_OFF = {State.STOPPED, State.SHUTTING_DOWN, State.TERMINATED}
_EC2_SICK = "an EC2 health check indicating it has been terminated or stopped"
_ELB_SICK = "an ELB system health check failure"
_REFRESH = "an instance refresh"


def advance(group: Group, world: World, now: float, rules: Rules) -> Step:
    """Bring a group on; after effects, look again at once."""
    look = _Look(group, world, now)
    seen_of = world.instances.get
    for instance in group.instances.values():
        seen = seen_of(instance.id, _GONE)
        if (
            instance.lifecycle is not _IN_SERVICE
            or instance.sick
            or seen.state is not _RUNNING
            or seen.target not in _CALM
        ):
            look.settle(instance, seen)
    refresh = look.draft.group.refresh
    if refresh is not None and not group.deleting and "InstanceRefresh" not in group.suspended:
        look.follow(refresh, rules)
        refresh = look.draft.group.refresh
    if refresh is None or group.deleting:
        look.reconcile(group.spec)
    elif refresh.status is Status.BAKING:
        look.reconcile(refresh.spec or group.spec)
    done = look.draft.finish(rules)
    effects = look.draft.effects
    changed = effects or (done is not group and done != group)
    return Step(done, tuple(effects), now if changed else look.wake_at(rules))


class _Look:
    """A look at a group, and what is decided from it."""

    def __init__(self, group: Group, world: World, now: float) -> None:
        self.draft = Draft(group, now)
        self._world = world
        self._now = now
        self._checked = group.checks_elb and bool(group.target_groups)
        self._suspended = {} if group.deleting else group.suspended

    def _runs(self, *processes: str) -> bool:
        return not any(one in self._suspended for one in processes)

    # Instances

    def settle(self, instance: GroupInstance, seen: Seen) -> None:
        """Take in what was seen of an instance."""
        draft = self.draft
        if seen.error is not None:
            draft.refused(instance, seen.error)
            return
        match instance.lifecycle:
            case Lifecycle.ENTERING_STANDBY:
                draft.step_aside(instance, seen.target)
            case Lifecycle.STANDBY:
                pass
            case Lifecycle.PENDING_WAIT:
                self._held(instance)
            case Lifecycle.PENDING_PROCEED:
                draft.enter(instance)
            case Lifecycle.PENDING:
                if seen.state in _OFF:
                    draft.retire(instance, _EC2_SICK, sick=True)
                elif seen.state is _RUNNING:
                    draft.arrive(instance)
            case Lifecycle.IN_SERVICE:
                self._examine(instance, seen)
            case _:
                draft.leave(instance, seen.target, off=seen.state is State.TERMINATED)

    def _held(self, instance: GroupInstance) -> None:
        outcome = hooks.outcome(instance.waits, self._now)
        if outcome is None:
            return
        if outcome.result is Result.ABANDON:
            self.draft.abandon(instance, outcome.reason or "")
        else:
            self.draft.proceed(instance)

    def _examine(self, instance: GroupInstance, seen: Seen) -> None:
        """Find out whether it is ill; replace it if it is, or where that is suspended, mark it."""
        ailment = instance.ailment
        if not ailment and self._runs("HealthCheck"):
            if seen.state in _OFF:
                ailment = _EC2_SICK
            elif self._fails_elb(instance, seen):
                ailment = _ELB_SICK
        if not ailment:
            return
        if self._runs("ReplaceUnhealthy", "Terminate"):
            self.draft.retire(instance, ailment, sick=True)
        elif not instance.ailment:
            self.draft.put(replace(instance, sick=True, ailment=ailment))

    def _fails_elb(self, instance: GroupInstance, seen: Seen) -> bool:
        group = self.draft.group
        graced = self._now < instance.in_service_at + group.grace_s
        return group.checks_elb and seen.target == "unhealthy" and not graced

    # Capacity

    def reconcile(self, spec: TemplateSpec) -> None:
        """Launch what is missing, from `spec`; retire what is too many."""
        group = self.draft.group
        staying = [
            one
            for one in self.draft.instances.values()
            if not one.lifecycle.leaving and (group.deleting or not one.lifecycle.aside)
        ]
        wanted = 0 if group.deleting else group.desired
        count = len(staying)
        if count >= wanted:
            self.draft.forgive()
        if count < wanted and self._may_launch():
            self._launch_missing(spec, staying, wanted)
        elif count > wanted and self._runs("Terminate"):
            self._retire_surplus(staying, wanted)

    def _asked(self) -> str:
        cause = self.draft.group.cause
        return f"At {stamp(self._now)} {cause}.  " if cause else ""

    def _launch_missing(
        self, spec: TemplateSpec, staying: list[GroupInstance], wanted: int
    ) -> None:
        asked, count = self._asked(), len(staying)
        sick = any(one.sick for one in self.draft.instances.values())
        if sick and not asked:
            cause = (
                f"At {stamp(self._now)} an instance was launched in response to an "
                "unhealthy instance needing to be replaced."
            )
        else:
            cause = (
                f"{asked}At {stamp(self._now)} an instance was started in response to a difference "
                f"between desired and actual capacity, increasing the capacity from {count} to {wanted}."
            )
        self._launch(spec, cause, wanted - count, staying)
        self.draft.group = replace(self.draft.group, cause="")

    def _launch(
        self, spec: TemplateSpec, cause: str, count: int, beside: list[GroupInstance]
    ) -> None:
        """Launch so many, spread over the zones with those there are."""
        group, numbered = self.draft.group, self._world.resolve(spec)
        there = Counter(one.zone for one in beside) if len(group.zones) > 1 else Counter()
        for zone in choose(group.zones, there, count, group.refused):
            self.draft.launch(numbered, cause, zone)

    def _retire_surplus(self, staying: list[GroupInstance], wanted: int) -> None:
        group, asked, count = self.draft.group, self._asked(), len(staying)
        free = [one for one in staying if group.deleting or not one.protected]
        ranked = sorted(free, key=self._dispensable)
        leaving = surplus([(one.zone, self._serves(one), one) for one in ranked], count - wanted)
        for one in leaving:
            cause = (
                f"{asked}At {stamp(self._now)} an instance was taken out of service in response to a "
                f"difference between desired and actual capacity, shrinking the capacity from {count} "
                f"to {wanted}.  At {stamp(self._now)} instance {one.id} was selected for termination."
            )
            self.draft.dismiss(one, cause)
        if leaving:
            self.draft.group = replace(self.draft.group, cause="")

    def _may_launch(self) -> bool:
        return 0.0 <= self.draft.group.retry_at <= self._now and self._runs("Launch")

    def _dispensable(self, one: GroupInstance) -> tuple[bool, int, float, str]:
        """Order for scale-in: not healthy first, then the oldest template version, then the oldest instance.

        AWS's default policy begins with the zone that has most, then the oldest version; that a machine which does
        not serve goes first is this simulation's, so that scaling in after a cancelled refresh costs no capacity.
        """
        return (
            self._serves(one),
            int(one.spec.version),
            one.launched_at,
            one.id,
        )

    def _serves(self, one: GroupInstance) -> bool:
        """Say whether it is in service and its checks pass."""
        seen = self._world.instances.get(one.id, _GONE)
        return (
            one.lifecycle is _IN_SERVICE
            and seen.state is _RUNNING
            and not one.sick
            and (not self._checked or seen.target == "healthy")
        )

    # Refresh

    def follow(self, refresh: Refresh, rules: Rules) -> None:
        """Ask the refresh what it wants, and do it."""
        draft = self.draft
        wanted = None if refresh.rolls_back else refresh.spec
        spec = self._world.resolve(wanted or draft.group.spec)
        instances = draft.instances.values()
        decision = decide(
            refresh,
            [self._member(one, refresh, spec) for one in instances if not one.lifecycle.leaving],
            desired=draft.group.desired,
            leaving=frozenset(one.id for one in instances if one.lifecycle.leaving),
            now=self._now,
            parallelism=rules.launch_parallelism,
            give_up_s=rules.give_up_s,
            alarms=self._world.alarms,
            ends=self._runs("Terminate"),
        )
        for instance_id in decision.retire:
            draft.retire(draft.instances[instance_id], _REFRESH)
        if not decision.launch:
            draft.forgive()
        elif self._may_launch():
            cause = f"At {stamp(self._now)} an instance was launched in response to {_REFRESH}."
            beside = [
                one
                for one in draft.instances.values()
                if one.spec == spec and not one.lifecycle.leaving
            ]
            self._launch(spec, cause, decision.launch, beside)
        self._keep(refresh, decision.refresh)

    def _keep(self, before: Refresh, after: Refresh) -> None:
        group = self.draft.group
        if after.status is Status.SUCCESSFUL and after.spec is not None:
            group = replace(group, spec=after.spec)
        if after is not before and after != before:
            group = replace(group, refreshes=(*group.refreshes[:-1], after))
        self.draft.group = group

    def _warm_at(self, one: GroupInstance, refresh: Refresh) -> float:
        if one.launched_at < refresh.started_at:
            return 0.0
        return one.in_service_at + _warmup_s(self.draft.group, refresh)

    def _member(self, one: GroupInstance, refresh: Refresh, spec: TemplateSpec) -> Member:
        pending = one.lifecycle.launching
        serves = self._serves(one)
        warm = self._now >= self._warm_at(one, refresh)
        return Member(
            one.id,
            one.launched_at,
            matches=one.spec == spec,
            pending=pending,
            healthy=serves and warm,
            booting=pending or (self._checked and not serves),
            warming=serves and not warm,
            standby=one.lifecycle.aside,
            protected=one.protected,
        )

    def wake_at(self, rules: Rules) -> float | None:
        """Return the earliest instant at which time alone changes something."""
        group = self.draft.group
        times = [group.retry_at]
        refresh = group.refresh
        if refresh is not None:
            times += [refresh.progress_at + rules.give_up_s, refresh.until or 0.0]
        for one in group.instances.values():
            if one.waits:
                times += [wait.ends_at for wait in one.waits]
            if one.lifecycle is not _IN_SERVICE:
                continue
            if group.checks_elb:
                times.append(one.in_service_at + group.grace_s)
            if refresh is not None:
                times.append(self._warm_at(one, refresh))
        return min((time for time in times if time > self._now), default=None)


def _warmup_s(group: Group, refresh: Refresh) -> float:
    """Return the warm-up in force: the refresh's, the group's default, else the grace period."""
    for seconds in (refresh.preferences.warmup_s, group.warmup_s):
        if seconds is not None:
            return seconds
    return group.grace_s
