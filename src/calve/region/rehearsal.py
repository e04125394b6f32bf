"""A release over a group that exists nowhere: the group, its targets and scripted machines alone, on a virtual clock.

    told = simulate(Plan(1000, Preferences(100, 110)), lambda launch: good(40.0))
    told.refresh.status, told.samples[-1].at_s

Nothing is served, so that a thousand machines are seconds of work. The old machines are in service when it begins.
"""

from __future__ import annotations

import datetime
import json
import math
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from calve.errors import CalveError, DeadlineError
from calve.region import group as parts
from calve.region import groups, targets
from calve.region.balancer import tell
from calve.region.ec2 import State
from calve.region.group import Group, Rules, World
from calve.region.hooks import Hook, Transition
from calve.region.hooks_api import HookActions
from calve.region.machine import Launch
from calve.region.query import Params
from calve.region.refresh import Preferences, Refresh, Status
from calve.region.scripted import ScriptedMachines
from calve.region.scripted_balancer import ScriptedBalancer
from calve.region.scripts import Script, good
from calve.region.targets import HealthCheck, TargetGroup, TargetState
from calve.region.templates import TemplateSpec
from calve.region.virtual import VirtualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Event", "Plan", "Rehearsal", "Sample", "simulate"]

NAME = "rehearsal"
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
HOOK = Hook("calve", Transition.LAUNCHING, 180)
OLD, NEW = TemplateSpec("lt-1", NAME, "1"), TemplateSpec("lt-1", NAME, "2")
OLD_IMAGE, NEW_IMAGE = "ami-1", "ami-2"
OLD_BOOT_S = 10.0
CHECK = HealthCheck(interval_s=10, healthy=2, unhealthy=2)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is rehearsed.

    Attributes:
        size: Instances.
        preferences: Of the refresh.
        hook: What holds a new instance; None for none.
        check: The target group's.
        delay_s: At most so long a target drains.
        grace_s: So long after it came into service an instance's failing checks do not count.
        rules: The region's.
        grid_s: Everything happens at multiples of this; the finer, the slower.
        most_s: Then it ends, whatever is.
    """

    size: int
    preferences: Preferences = field(default_factory=Preferences)
    hook: Hook | None = HOOK
    check: HealthCheck = CHECK
    delay_s: float = 30.0
    grace_s: float = 60.0
    rules: Rules = field(default_factory=lambda: Rules(launch_parallelism=None))
    grid_s: float = 2.0
    most_s: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Sample:
    """The group at an instant.

    Attributes:
        at_s: Since the refresh was asked for.
        lifecycles: How many instances are in each state.
        healthy: How many targets are.
        status: The refresh's.
        percent: How far it is.
    """

    at_s: float
    lifecycles: Mapping[str, int]
    healthy: int
    status: Status
    percent: int


@dataclass(frozen=True, slots=True)
class Event:
    """An instance came into a state, "" for gone, or its target did; `at_s` as a sample's."""

    at_s: float
    instance_id: str
    state: str


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What happened: a sample wherever anything is other than in the one before, and each instance's way."""

    samples: tuple[Sample, ...]
    events: tuple[Event, ...]
    group: Group

    @property
    def refresh(self) -> Refresh:
        """Return the refresh as it was at the end."""
        return self.group.refreshes[-1]


def simulate(plan: Plan, script_of: Callable[[Launch], Script]) -> Rehearsal:
    """Replace every instance, and tell how it went.

    Args:
        plan: What is there, and how the refresh goes about it.
        script_of: What each machine of the new version does; those of the old one come up.

    Raises:
        DeadlineError: The old instances did not come up; the plan cannot work.
    """
    clock = VirtualClock(START, grid_s=plan.grid_s)
    stage = _Stage(plan, clock, script_of)
    clock.drive(stage.round)
    if not clock.wait(stage.up, plan.most_s):
        raise DeadlineError("the old instances did not come into service")
    stage.begin()
    clock.wait(stage.over, plan.most_s)
    return Rehearsal(tuple(stage.samples), tuple(stage.events), stage.group)


class _Stage:
    """`cloud.Cloud` without anything around it; `at` is when the refresh began."""

    def __init__(
        self, plan: Plan, clock: VirtualClock, script_of: Callable[[Launch], Script]
    ) -> None:
        self.up, self.over = threading.Event(), threading.Event()
        self.at: float | None = None
        self.samples: list[Sample] = []
        self.events: list[Event] = []
        self.machines = ScriptedMachines(
            clock,
            lambda launch: good(OLD_BOOT_S) if launch.image_id == OLD_IMAGE else script_of(launch),
        )
        self.machines.watch(self._changed)
        self._plan = plan
        self._clock = clock
        self._balancer = ScriptedBalancer(clock, self.machines)
        self._balancer.start(plan.check)
        self._seen: dict[str, parts.Seen] = {}
        self._looks: dict[str, targets.Seen] = {}
        self._targets = TargetGroup(f"arn:{NAME}", NAME, plan.check, plan.delay_s)
        self._told: TargetGroup | None = None
        self._looked: tuple[TargetGroup, Mapping[str, targets.Check]] | None = None
        self._advanced: Group | None = None
        self._fresh = True  # what the group sees is other than when it was last brought on
        self._targets_wake = self._group_wake = math.inf
        hooks = {} if plan.hook is None else {plan.hook.name: plan.hook}
        made = Group(
            NAME,
            OLD,
            0,
            2 * plan.size,
            plan.size,
            clock.monotonic(),
            target_groups=(self._targets.arn,),
            checks_elb=True,
            grace_s=plan.grace_s,
            hooks=hooks,
        )
        self._groups = {NAME: made}
        actions = HookActions(self._groups).actions
        self.machines.connect(lambda action, form: actions[action](Params(form), clock.monotonic()))

    @property
    def group(self) -> Group:
        """Return the group as it is."""
        return self._groups[NAME]

    def begin(self) -> None:
        """Ask for the refresh."""
        self.at = self._clock.monotonic()
        refresh = Refresh("refresh-1", NEW, self._plan.preferences, self.at)
        self._groups[NAME] = replace(self.group, refreshes=(refresh,))

    def round(self) -> float | None:
        """Look, advance, perform; see `virtual.Step`."""
        now, before = self._clock.monotonic(), self.group
        self._advance_targets(now)
        if self._fresh or before is not self._advanced or now >= self._group_wake:
            self._fresh = False
            step = groups.advance(before, World(self._seen, {}), now, self._plan.rules)
            self._groups[NAME] = self._advanced = step.group
            self._group_wake = math.inf if step.wake_at is None else step.wake_at
            for effect in step.effects:
                self._perform(effect, now)
        self._tell(before, now)
        return min(self._targets_wake, self._group_wake)

    def _see(self, instance_id: str, seen: parts.Seen) -> None:
        self._seen[instance_id] = seen
        self._fresh = True

    def _changed(self, instance_id: str) -> None:
        seen = self._seen[instance_id]
        if seen.state is State.RUNNING and not self.machines.running(instance_id):
            self._see(instance_id, replace(seen, state=State.STOPPED))

    def _advance_targets(self, now: float) -> None:
        before, checks = self._targets, self._balancer.checks()
        known = self._looked
        if (
            known is not None
            and known[0] is before
            and known[1] is checks
            and now < self._targets_wake
        ):
            return
        self._looked = before, checks
        for one in before.targets:
            look, check = self._looks.get(one), checks.get(one)
            if look is None or look.check is not check:
                self._looks[one] = targets.Seen(self.machines.address(one), check)
        step = targets.advance(before, self._looks, now)
        self._targets = step.group
        for effect in step.effects:
            tell(self._balancer, effect)
        for target_id, target in before.targets.items() if step.group is not before else ():
            if step.group.targets.get(target_id) is not target:
                self._note_target(target_id, now)
        self._targets_wake = math.inf if step.wake_at is None else step.wake_at

    def _note_target(self, target_id: str, now: float) -> None:
        """Take a target's state, as it is now, into what the group sees of its instance."""
        target, seen = self._targets.targets.get(target_id), self._seen[target_id]
        state = None if target is None else target.state.value
        if seen.target != state:
            self._see(target_id, replace(seen, target=state))
            self._note(target_id, state or "", now)

    def _note(self, instance_id: str, state: str, now: float) -> None:
        if self.at is not None:
            self.events.append(Event(now - self.at, instance_id, state))

    def _perform(self, effect: parts.Effect, now: float) -> None:
        match effect:
            case parts.Launch(instance_id, spec):
                self._launch(instance_id, spec)
            case parts.Terminate(instance_id):
                self.machines.terminate(instance_id)
                self._see(instance_id, replace(self._seen[instance_id], state=State.TERMINATED))
            case parts.Register(instance_id):
                self._targets = targets.register(self._targets, instance_id, now)
                self._note_target(instance_id, now)
            case parts.Deregister(instance_id):
                self._targets = targets.deregister(self._targets, instance_id, now)
                self._note_target(instance_id, now)

    def _launch(self, instance_id: str, spec: TemplateSpec) -> None:
        hook = self._plan.hook
        calve = {} if hook is None else {"hook": {"group": NAME, "name": hook.name}}
        user_data = json.dumps({"calve": calve}).encode()
        image = OLD_IMAGE if spec.version == OLD.version else NEW_IMAGE
        try:
            self.machines.launch(Launch(instance_id, image, "t3.nano", user_data))
        except CalveError as error:
            self._see(instance_id, parts.Seen(State.TERMINATED, None, error.message))
        else:
            self._see(instance_id, parts.Seen(State.RUNNING))

    def _tell(self, before: Group, now: float) -> None:
        """Take down what is other than before."""
        after = self.group
        if after is before and self._targets is self._told:
            return
        self._told = self._targets
        self._tell_instances(before, after, now)
        states = Counter(target.state for target in self._targets.targets.values())
        healthy = states[TargetState.HEALTHY]
        if self.at is None:
            if healthy == after.desired:
                self.up.set()
            return
        refresh = after.refreshes[-1]
        lives = dict(Counter(one.lifecycle.value for one in after.instances.values()))
        sample = Sample(now - self.at, lives, healthy, refresh.status, refresh.percent)
        if not self.samples or replace(self.samples[-1], at_s=sample.at_s) != sample:
            self.samples.append(sample)
        if not refresh.status.active:
            self.over.set()

    def _tell_instances(self, before: Group, after: Group, now: float) -> None:
        for one in after.instances.values():
            was = before.instances.get(one.id)
            if was is not one and (was is None or was.lifecycle is not one.lifecycle):
                self._note(one.id, one.lifecycle.value, now)
        for instance_id in before.instances.keys() - after.instances.keys():
            self._seen.pop(instance_id)
            self._looks.pop(instance_id, None)
            self._note(instance_id, "", now)
