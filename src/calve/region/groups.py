"""Auto Scaling groups as pure machines: `advance(group, world, now)` gives the group, effects and when to look again.

Source: Amazon EC2 Auto Scaling User Guide, "Amazon EC2 Auto Scaling instance lifecycle", "How lifecycle hooks work",
"Health checks", "Verify a scaling activity" (the texts of causes). No clock, thread or network: effects are data that
`cloud`, or a test with a virtual clock, performs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from calve.region import hooks
from calve.region import refresh as refreshes
from calve.region.activities import Ledger
from calve.region.ec2 import State
from calve.region.group import (
    Deregister,
    Effect,
    Group,
    GroupInstance,
    Launch,
    Lifecycle,
    Register,
    Rules,
    Seen,
    Step,
    Terminate,
    World,
)
from calve.region.hooks import Result, Transition, Wait
from calve.region.names import activity_uuid, identifier, stamp
from calve.region.refresh import Member, Refresh, Status

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
_LAUNCH_FAILED = "a launch failure"
_REFRESH = "an instance refresh"


def advance(group: Group, world: World, now: float, rules: Rules) -> Step:
    """Bring a group on; after effects, look again at once."""
    draft = _Draft(group, world, now)
    for instance in group.instances.values():
        seen = world.instances.get(instance.id, _GONE)
        if not (
            instance.lifecycle is _IN_SERVICE and seen.state is _RUNNING and seen.target in _CALM
        ):
            draft.settle(instance, seen)
    refresh = draft.group.refresh
    if refresh is not None and not group.deleting:
        draft.follow(refresh, rules)
    if draft.group.refresh is None or group.deleting:
        draft.reconcile()
    done = draft.finish(rules)
    wake_at = now if draft.effects or done != group else draft.wake_at(rules)
    return Step(done, tuple(draft.effects), wake_at)


class _Draft:
    """A group being brought on; frozen again by `finish`."""

    def __init__(self, group: Group, world: World, now: float) -> None:
        self.group = group
        self.effects: list[Effect] = []
        self._world = world
        self._now = now
        self._instances = dict(group.instances)
        self._serial = group.serial
        self._ledger = Ledger(group.activities, self._uuid, now)
        self._checked = group.checks_elb and bool(group.target_groups)

    # Instances

    def settle(self, instance: GroupInstance, seen: Seen) -> None:
        """Take in what was seen of an instance."""
        if seen.error is not None:
            self._refused(instance, seen.error)
        elif instance.lifecycle.leaving:
            self._leave(instance, seen)
        elif instance.lifecycle is Lifecycle.PENDING_WAIT:
            self._held(instance)
        elif instance.lifecycle is Lifecycle.PENDING_PROCEED:
            self._enter(instance)
        elif seen.state in _OFF:
            self._retire(instance, _EC2_SICK, sick=True)
        elif instance.lifecycle is Lifecycle.PENDING:
            if seen.state is _RUNNING:
                self._arrive(instance)
        elif self._fails_elb(instance, seen):
            self._retire(instance, _ELB_SICK, sick=True)

    def _fails_elb(self, instance: GroupInstance, seen: Seen) -> bool:
        graced = self._now < instance.in_service_at + self.group.grace_s
        return self.group.checks_elb and seen.target == "unhealthy" and not graced

    def _arrive(self, instance: GroupInstance) -> None:
        """Let it in, or let the hooks hold it; while they do, nobody looks at its health."""
        waits = self._waits(Transition.LAUNCHING)
        if waits:
            self._hold(instance, Lifecycle.PENDING_WAIT, waits)
        else:
            self._enter(instance)

    def _held(self, instance: GroupInstance) -> None:
        outcome = hooks.outcome(instance.waits, self._now)
        if outcome is None:
            return
        if outcome.result is Result.ABANDON:
            description = (
                f"Launching a new EC2 instance: {instance.id}.  Status Reason: {outcome.reason}"
            )
            self._ledger.describe(instance.activity, description)
            self._retire(instance, _LAUNCH_FAILED, outcome.reason)
        else:
            self._instances[instance.id] = replace(
                instance, lifecycle=Lifecycle.PENDING_PROCEED, waits=()
            )
            self._ledger.update(instance.activity, "PreInService", 80)

    def _waits(self, transition: Transition) -> tuple[Wait, ...]:
        return hooks.begin(self.group.hooks.values(), transition, self._uuid, self._now)

    def _hold(self, instance: GroupInstance, lifecycle: Lifecycle, waits: tuple[Wait, ...]) -> None:
        self._instances[instance.id] = replace(instance, lifecycle=lifecycle, waits=waits)
        self._ledger.update(instance.activity, "MidLifecycleAction", 60)

    def _enter(self, instance: GroupInstance) -> None:
        self._instances[instance.id] = replace(
            instance, lifecycle=_IN_SERVICE, in_service_at=self._now, served=True
        )
        self._ledger.close(instance.activity, "Successful")
        self.group = replace(self.group, refusals=0)
        for target_group in self.group.target_groups:
            self.effects.append(Register(instance.id, target_group))

    def _refused(self, instance: GroupInstance, error: str) -> None:
        del self._instances[instance.id]
        self._ledger.describe(
            instance.activity,
            f"Launching a new EC2 instance.  Status Reason: {error}. Launching EC2 instance failed.",
        )
        self._ledger.close(instance.activity, "Failed", f"{error}. Launching EC2 instance failed.")
        refusals = min(self.group.refusals + 1, 7)
        self.group = replace(self.group, refusals=refusals, retry_at=-1.0)

    def _leave(self, instance: GroupInstance, seen: Seen) -> None:
        """Bring a departure on: out of the target groups, through the hooks, off, gone."""
        if seen.target is not None or hooks.outcome(instance.waits, self._now) is None:
            return
        if instance.lifecycle is Lifecycle.TERMINATING_WAIT:
            proceeds = replace(instance, lifecycle=Lifecycle.TERMINATING_PROCEED, waits=())
            self._instances[instance.id] = proceeds
        elif not instance.ended:
            # Only what was in service is held: what AWS does of the others, it does not document.
            first = instance.served and instance.lifecycle is Lifecycle.TERMINATING
            waits = self._waits(Transition.TERMINATING) if first else ()
            self._ledger.describe(instance.activity, f"Terminating EC2 instance: {instance.id}")
            if waits:
                self._hold(instance, Lifecycle.TERMINATING_WAIT, waits)
                return
            self._instances[instance.id] = replace(instance, ended=True)
            self._ledger.update(instance.activity, "InProgress", 50)
            self.effects.append(Terminate(instance.id))
        elif seen.state is State.TERMINATED:
            del self._instances[instance.id]
            self._ledger.close(instance.activity, "Successful")

    def _retire(
        self,
        instance: GroupInstance,
        reason: str,
        message: str | None = None,
        *,
        sick: bool = False,
    ) -> None:
        cause = (
            f"At {stamp(self._now)} an instance was taken out of service in response to {reason}."
        )
        self._terminating(instance, cause, message, sick=sick)

    def _terminating(
        self, instance: GroupInstance, cause: str, message: str | None = None, *, sick: bool = False
    ) -> None:
        """Begin a departure; `message` is what is said of a launch that it ends."""
        if instance.lifecycle.launching:
            self._ledger.close(instance.activity, "Cancelled", message)
        drains = bool(self.group.target_groups) and instance.lifecycle is _IN_SERVICE
        description = f"Terminating EC2 instance: {instance.id}"
        if drains:
            description += " - Waiting For ELB Connection Draining."
        activity = self._ledger.open(
            description, cause, "WaitingForELBConnectionDraining" if drains else "InProgress"
        )
        self._instances[instance.id] = replace(
            instance, lifecycle=Lifecycle.TERMINATING, sick=sick, activity=activity, waits=()
        )
        for target_group in self.group.target_groups if drains else ():
            self.effects.append(Deregister(instance.id, target_group))

    def _launch(self, spec: TemplateSpec, cause: str) -> None:
        instance_id = identifier("i", self.group.name, self.group.created_at, self._next())
        numbered = self._world.resolve(spec)
        activity = self._ledger.open(
            f"Launching a new EC2 instance: {instance_id}", cause, "PreInService"
        )
        self._instances[instance_id] = GroupInstance(instance_id, numbered, self._now, activity)
        self.effects.append(Launch(instance_id, numbered))

    # Capacity

    def _staying(self) -> list[GroupInstance]:
        return [one for one in self._instances.values() if not one.lifecycle.leaving]

    def reconcile(self) -> None:
        """Launch what is missing, retire what is too many."""
        group, staying = self.group, self._staying()
        wanted = 0 if group.deleting else group.desired
        count = len(staying)
        asked = f"At {stamp(self._now)} {group.cause}.  " if group.cause else ""
        if count < wanted and self._may_launch():
            sick = any(one.sick for one in self._instances.values())
            for _ in range(wanted - count):
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
                self._launch(group.spec, cause)
            self.group = replace(self.group, cause="")
        elif count > wanted:
            for one in sorted(staying, key=self._dispensable)[: count - wanted]:
                cause = (
                    f"{asked}At {stamp(self._now)} an instance was taken out of service in response to a "
                    f"difference between desired and actual capacity, shrinking the capacity from {count} "
                    f"to {wanted}.  At {stamp(self._now)} instance {one.id} was selected for termination."
                )
                self._terminating(one, cause)
            self.group = replace(self.group, cause="")

    def _may_launch(self) -> bool:
        return 0.0 <= self.group.retry_at <= self._now

    def _dispensable(self, one: GroupInstance) -> tuple[bool, int, float, str]:
        """Order for scale-in: not healthy first, then the oldest template version, then the oldest instance.

        AWS's default policy begins with the oldest version; that a machine which does not serve goes first is
        this simulation's, so that scaling in after a cancelled refresh costs no capacity.
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
            and (not self._checked or seen.target == "healthy")
        )

    # Refresh

    def follow(self, refresh: Refresh, rules: Rules) -> None:
        """Ask the refresh what it wants, and do it."""
        spec = self._world.resolve(refresh.spec or self.group.spec)
        decision = refreshes.decide(
            refresh,
            [self._member(one, refresh, spec) for one in self._staying()],
            desired=self.group.desired,
            leaving=frozenset(one.id for one in self._instances.values() if one.lifecycle.leaving),
            now=self._now,
            parallelism=rules.launch_parallelism,
            give_up_s=rules.give_up_s,
        )
        for instance_id in decision.retire:
            self._retire(self._instances[instance_id], _REFRESH)
        if self._may_launch():
            cause = f"At {stamp(self._now)} an instance was launched in response to {_REFRESH}."
            for _ in range(decision.launch):
                self._launch(spec, cause)
        after = decision.refresh
        keeps = (*self.group.refreshes[:-1], after)
        group_spec = self.group.spec
        if after.status is Status.SUCCESSFUL and after.spec is not None:
            group_spec = after.spec
        self.group = replace(self.group, refreshes=keeps, spec=group_spec)

    def _warm_at(self, one: GroupInstance, refresh: Refresh) -> float:
        if one.launched_at < refresh.started_at:
            return 0.0
        return one.in_service_at + _warmup_s(self.group, refresh)

    def _member(self, one: GroupInstance, refresh: Refresh, spec: TemplateSpec) -> Member:
        pending = one.lifecycle.launching
        serves = self._serves(one)
        return Member(
            one.id,
            one.launched_at,
            matches=one.spec == spec,
            pending=pending,
            healthy=serves and self._now >= self._warm_at(one, refresh),
            booting=pending or (self._checked and not serves),
        )

    # The end

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    def _uuid(self) -> str:
        return activity_uuid(self.group.name, self.group.created_at, self._next())

    def finish(self, rules: Rules) -> Group:
        """Freeze."""
        group = self.group
        if group.retry_at < 0:
            group = replace(group, retry_at=self._now + rules.retry_s * 2.0 ** (group.refusals - 1))
        self.group = replace(
            group,
            instances=self._instances,
            activities=self._ledger.kept(),
            serial=self._serial,
        )
        return self.group

    def wake_at(self, rules: Rules) -> float | None:
        """Return the earliest instant at which time alone changes something."""
        times = [self.group.retry_at]
        refresh = self.group.refresh
        if refresh is not None:
            times.append(refresh.progress_at + rules.give_up_s)
        for one in self._instances.values():
            times += [wait.ends_at for wait in one.waits]
            if one.lifecycle is not Lifecycle.IN_SERVICE:
                continue
            if self.group.checks_elb:
                times.append(one.in_service_at + self.group.grace_s)
            if refresh is not None:
                times.append(self._warm_at(one, refresh))
        return min((time for time in times if time > self._now), default=None)


def _warmup_s(group: Group, refresh: Refresh) -> float:
    """Return the warm-up in force: the refresh's, the group's default, else the grace period."""
    for seconds in (refresh.preferences.warmup_s, group.warmup_s):
        if seconds is not None:
            return seconds
    return group.grace_s
