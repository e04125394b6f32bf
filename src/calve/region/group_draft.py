"""An Auto Scaling group that is being brought on: what can be done to its instances, with activities and effects.

Source: Amazon EC2 Auto Scaling User Guide, "Amazon EC2 Auto Scaling instance lifecycle", "How lifecycle hooks work",
"Verify a scaling activity" (descriptions and causes), "Temporarily remove instances from your Auto Scaling group".
`groups` decides what of it is done. What nothing happens to is not copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from calve.region import hooks
from calve.region.activities import Ledger
from calve.region.group import (
    Deregister,
    Effect,
    Group,
    GroupInstance,
    Launch,
    Lifecycle,
    Register,
    Rules,
    Terminate,
)
from calve.region.hooks import Transition, Wait
from calve.region.names import activity_uuid, identifier, stamp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.region.templates import TemplateSpec

__all__ = ["Draft"]

DRAINING = "WaitingForELBConnectionDraining"
MOST_REFUSALS = 7


class Draft:
    """A group being brought on; frozen again by `finish`.

    Args:
        group: As it was.
        now: Seconds.

    Attributes:
        group: As it is, but for instances, activities and what was named.
        effects: What is to be done.
        now: Seconds.
    """

    def __init__(self, group: Group, now: float) -> None:
        self.group = group
        self.effects: list[Effect] = []
        self.now = now
        self._written: dict[str, GroupInstance] | None = None
        self._serial = group.serial
        self._ledger = Ledger(group.activities, self._uuid, now)

    @property
    def instances(self) -> Mapping[str, GroupInstance]:
        """Return its instances by id, as they are now."""
        return self.group.instances if self._written is None else self._written

    def _instances(self) -> dict[str, GroupInstance]:
        if self._written is None:
            self._written = dict(self.group.instances)
        return self._written

    def put(self, instance: GroupInstance) -> None:
        """Put an instance in the place of what it was."""
        self._instances()[instance.id] = instance

    # Into service

    def launch(self, spec: TemplateSpec, cause: str, zone: str) -> None:
        """Launch an instance of a numbered version."""
        group = self.group
        instance_id = identifier("i", group.name, group.created_at, self._next())
        description = f"Launching a new EC2 instance: {instance_id}"
        activity = self._ledger.open(description, cause, "PreInService", zone)
        self.put(
            GroupInstance(
                instance_id, spec, self.now, activity, zone=zone, protected=group.protects
            )
        )
        self.effects.append(Launch(instance_id, spec, zone))

    def refused(self, instance: GroupInstance, error: str) -> None:
        """Take in that a launch was refused: another zone is tried at once, or all of them later."""
        del self._instances()[instance.id]
        self._ledger.describe(
            instance.activity,
            f"Launching a new EC2 instance.  Status Reason: {error}. Launching EC2 instance failed.",
        )
        self._ledger.close(instance.activity, "Failed", f"{error}. Launching EC2 instance failed.")
        refused = self.group.refused | {instance.zone}
        if refused >= set(self.group.zones):
            refusals = min(self.group.refusals + 1, MOST_REFUSALS)
            self.group = replace(self.group, refusals=refusals, retry_at=-1.0, refused=frozenset())
        else:
            self.group = replace(self.group, refused=refused)

    def forgive(self) -> None:
        """Forget which zones refused, now that nothing more is to be launched."""
        if self.group.refused:
            self.group = replace(self.group, refused=frozenset())

    def arrive(self, instance: GroupInstance) -> None:
        """Let it in, or let the hooks hold it; while they do, nobody looks at its health."""
        waits = self._waits(Transition.LAUNCHING)
        if waits:
            self._hold(instance, Lifecycle.PENDING_WAIT, waits)
        else:
            self.enter(instance)

    def proceed(self, instance: GroupInstance) -> None:
        """Let go what a hook held at its launch."""
        self.put(replace(instance, lifecycle=Lifecycle.PENDING_PROCEED, waits=()))
        self._ledger.update(instance.activity, "PreInService", 80)

    def enter(self, instance: GroupInstance) -> None:
        """Put it in service, and into the target groups where that is not suspended."""
        self.put(
            replace(instance, lifecycle=Lifecycle.IN_SERVICE, in_service_at=self.now, served=True)
        )
        self._ledger.close(instance.activity, "Successful")
        if self.group.refusals:
            self.group = replace(self.group, refusals=0)
        if "AddToLoadBalancer" not in self.group.suspended:
            self.effects += [Register(instance.id, one) for one in self.group.target_groups]

    def step_aside(self, instance: GroupInstance, target: str | None) -> None:
        """Bring it into standby: out of the target groups first."""
        if target is None:
            self.put(replace(instance, lifecycle=Lifecycle.STANDBY))
            self._ledger.close(instance.activity, "Successful")
        elif target != "draining":
            self.effects += [Deregister(instance.id, one) for one in self.group.target_groups]

    def _waits(self, transition: Transition) -> tuple[Wait, ...]:
        return hooks.begin(self.group.hooks.values(), transition, self._uuid, self.now)

    def _hold(self, instance: GroupInstance, lifecycle: Lifecycle, waits: tuple[Wait, ...]) -> None:
        self.put(replace(instance, lifecycle=lifecycle, waits=waits))
        self._ledger.update(instance.activity, "MidLifecycleAction", 60)

    # Out of it

    def abandon(self, instance: GroupInstance, reason: str) -> None:
        """Retire what a hook gave up, with AWS's words for it."""
        self._ledger.describe(
            instance.activity,
            f"Launching a new EC2 instance: {instance.id}.  Status Reason: {reason}",
        )
        self.retire(instance, "a launch failure", reason)

    def retire(
        self,
        instance: GroupInstance,
        reason: str,
        message: str | None = None,
        *,
        sick: bool = False,
    ) -> None:
        """Begin a departure for a reason; `message` is what is said of a launch that it ends."""
        cause = (
            f"At {stamp(self.now)} an instance was taken out of service in response to {reason}."
        )
        self.dismiss(instance, cause, message, sick=sick)

    def dismiss(
        self, instance: GroupInstance, cause: str, message: str | None = None, *, sick: bool = False
    ) -> None:
        """Begin a departure whose whole cause is given."""
        if instance.lifecycle.launching or instance.lifecycle is Lifecycle.ENTERING_STANDBY:
            self._ledger.close(instance.activity, "Cancelled", message)
        drains = bool(self.group.target_groups) and instance.lifecycle is Lifecycle.IN_SERVICE
        description = f"Terminating EC2 instance: {instance.id}"
        if drains:
            description += " - Waiting For ELB Connection Draining."
        activity = self._ledger.open(
            description, cause, DRAINING if drains else "InProgress", instance.zone
        )
        self.put(
            replace(
                instance,
                lifecycle=Lifecycle.TERMINATING,
                sick=sick,
                ailment="",
                activity=activity,
                waits=(),
            )
        )
        if drains:
            self.effects += [Deregister(instance.id, one) for one in self.group.target_groups]

    def leave(self, instance: GroupInstance, target: str | None, *, off: bool) -> None:
        """Bring a departure on: out of the target groups, through the hooks, off, gone."""
        if target is not None or hooks.outcome(instance.waits, self.now) is None:
            return
        if instance.lifecycle is Lifecycle.TERMINATING_WAIT:
            self.put(replace(instance, lifecycle=Lifecycle.TERMINATING_PROCEED, waits=()))
        elif not instance.ended:
            # Only what was in service is held: what AWS does of the others, it does not document.
            first = instance.served and instance.lifecycle is Lifecycle.TERMINATING
            waits = self._waits(Transition.TERMINATING) if first else ()
            self._ledger.describe(instance.activity, f"Terminating EC2 instance: {instance.id}")
            if waits:
                self._hold(instance, Lifecycle.TERMINATING_WAIT, waits)
                return
            self.put(replace(instance, ended=True))
            self._ledger.update(instance.activity, "InProgress", 50)
            self.effects.append(Terminate(instance.id))
        elif off:
            del self._instances()[instance.id]
            self._ledger.close(instance.activity, "Successful")

    # The end

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    def _uuid(self) -> str:
        return activity_uuid(self.group.name, self.group.created_at, self._next())

    def finish(self, rules: Rules) -> Group:
        """Freeze; the very group that it began with is returned where nothing happened."""
        group, activities = self.group, self._ledger.kept()
        if group.retry_at < 0:
            retry_at = self.now + rules.retry_s * 2.0 ** (group.refusals - 1)
            group = replace(group, retry_at=retry_at)
        changed = activities is not group.activities or self._serial != group.serial
        if changed or self._written is not None:
            group = replace(
                group, instances=self.instances, activities=activities, serial=self._serial
            )
        self.group = group
        self._written = None
        return group
