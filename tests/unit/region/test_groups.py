"""Groups, refreshes and target groups together, on a virtual clock, with machines that are three numbers."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.region import group as group_
from calve.region import groups, refresh, targets
from calve.region.ec2 import State
from calve.region.group import Group, Rules, World
from calve.region.group_instances import InstanceActions
from calve.region.group_processes import ProcessActions
from calve.region.hooks import Hook, Result, Transition
from calve.region.hooks_api import HookActions
from calve.region.query import Params
from calve.region.refresh import Preferences, Refresh, Status
from calve.region.signature import Refusal
from calve.region.targets import Check, HealthCheck, TargetGroup
from calve.region.templates import TemplateSpec

ONE, TWO = (TemplateSpec("lt-1", "web", str(number)) for number in (1, 2))
ELB = "arn:tg"


CHECKS = {
    (passing, busy): Check(True, passing, 200 if passing else None, connections=int(busy))
    for passing in (True, False)
    for busy in (True, False)
}
SEEN = {
    (state, target): group_.Seen(state, target)
    for state in State
    for target in (None, *map(str, targets.TargetState))
}


@dataclass
class Plan:
    """How a machine behaves: healthy after so long (None: never), off after so long, busy so long in drain.

    Where hooks hold it, it says CONTINUE after `ready_s` (None: never).
    """

    boot_s: float | None = 20.0
    ready_s: float | None = 20.0
    off_s: float | None = None
    busy_s: float = 0.0
    refused: bool = False


@dataclass
class FakeMachine:
    plan: Plan
    version: str
    launched_at: float
    ended: bool = False

    def on(self, now):
        off = self.plan.off_s is not None and now >= self.launched_at + self.plan.off_s
        return not self.ended and not off

    def passing(self, now):
        boot_s = self.plan.boot_s
        return self.on(now) and boot_s is not None and now >= self.launched_at + boot_s

    def events(self):
        for seconds in (self.plan.boot_s, self.plan.ready_s, self.plan.off_s):
            if seconds is not None:
                yield self.launched_at + seconds


@dataclass
class Sim:
    first: Group
    plan: Callable[[str, int], Plan] = lambda _version, _count: Plan()
    rules: Rules = field(default_factory=Rules)
    now: float = 0.0
    watch: Callable[["Sim"], None] = lambda _sim: None

    def __post_init__(self):
        self.named = {"web": self.first}
        self.machines: dict[str, FakeMachine] = {}
        self.refused: set[str] = set()
        self.balanced: dict[str, str] = {}
        self.drained: dict[str, float] = {}
        self.targets = TargetGroup(ELB, "web", HealthCheck("/", 10, 5, 2, 2), 300.0)
        self.launches: list[float] = []
        self.full: set[str] = set()
        self.rounds = 0

    # What the balancer would do with a client's requests

    def serving(self):
        return [
            one
            for one, state in self.balanced.items()
            if state == "ready" and self.machines[one].passing(self.now)
        ]

    def booting(self):
        return [
            one
            for one, machine in self.machines.items()
            if machine.on(self.now) and not machine.passing(self.now)
        ]

    def _check(self, name):
        if name not in self.balanced:
            return None
        machine = self.machines[name]
        busy = name in self.drained and self.now < self.drained[name] + machine.plan.busy_s
        return CHECKS[machine.passing(self.now), busy]

    def _advance_targets(self):
        seen = {
            one: targets.Seen(("127.0.0.1", 1), self._check(one)) for one in self.targets.targets
        }
        step = targets.advance(self.targets, seen, self.now)
        self.targets = step.group
        for effect in step.effects:
            name = effect.target_id
            match effect:
                case targets.Add():
                    self.balanced[name] = "drain"
                case targets.Ready():
                    self.balanced[name] = "ready"
                case targets.Drain():
                    self.balanced[name] = "drain"
                    self.drained[name] = self.now
                case targets.Remove():
                    del self.balanced[name]
        return step.wake_at

    def _seen(self, name):
        if name in self.refused:
            return group_.Seen(State.PENDING, error="no capacity")
        machine = self.machines[name]
        target = self.targets.targets.get(name)
        state = State.RUNNING if machine.on(self.now) else State.STOPPED
        if machine.ended:
            state = State.TERMINATED
        return SEEN[state, None if target is None else target.state.value]

    def _answer_hooks(self):
        """Let every machine that is held and on say CONTINUE once it is ready."""
        complete = HookActions(self.named).actions["CompleteLifecycleAction"]
        for name, one in self.group.instances.items():
            machine = self.machines.get(name)
            if not one.waits or machine.plan.ready_s is None or not machine.on(self.now):
                continue
            if self.now < one.launched_at + machine.plan.ready_s:
                continue
            said = {
                "AutoScalingGroupName": "web",
                "LifecycleHookName": one.waits[0].hook.name,
                "LifecycleActionResult": "CONTINUE",
                "InstanceId": name,
            }
            if one.waits[0].active(self.now):
                complete(Params(said), self.now)

    def do(self, action, **form):
        actions = {
            **InstanceActions(self.named, lambda one, _group: {"Cause": one.cause}).actions,
            **ProcessActions(self.named).actions,
        }
        if action != "SetInstanceHealth":
            form = {"AutoScalingGroupName": "web", **form}
        return actions[action](Params(form), self.now)

    def pass_s(self, seconds):
        end = self.now + seconds
        assert not self.run(lambda _sim: False, limit_s=seconds)
        self.now = end

    @property
    def group(self):
        return self.named["web"]

    @group.setter
    def group(self, group):
        self.named["web"] = group

    def _advance_group(self):
        if self.group.hooks:
            self._answer_hooks()
        world = World({one: self._seen(one) for one in self.group.instances}, {"lt-1": (1, 2)})
        step = groups.advance(self.group, world, self.now, self.rules)
        self.group = step.group
        for effect in step.effects:
            match effect:
                case group_.Launch(name, spec, zone):
                    plan = self.plan(spec.version, len(self.launches))
                    self.launches.append(self.now)
                    if plan.refused or zone in self.full:
                        self.refused.add(name)
                    else:
                        self.machines[name] = FakeMachine(plan, spec.version, self.now)
                case group_.Terminate(name):
                    assert name not in self.balanced
                    self.machines[name].ended = True
                case group_.Register(name, _):
                    self.targets = targets.register(self.targets, name, self.now)
                case group_.Deregister(name, _):
                    self.targets = targets.deregister(self.targets, name, self.now)
        return step.wake_at

    def run(self, until, *, limit_s=1e6):
        """Go from instant to instant, where something happens, until `until(self)`."""
        stop = self.now + limit_s
        while not until(self):
            self.rounds += 1
            wakes = [self._advance_targets(), self._advance_group()]
            self.watch(self)
            if any(wake == self.now for wake in wakes):
                continue
            for name, at in self.drained.items():
                wakes.append(at + self.machines[name].plan.busy_s)
            for name in self.group.instances:
                if name in self.machines:
                    wakes += self.machines[name].events()
            following = min(
                (wake for wake in wakes if wake is not None and wake > self.now), default=None
            )
            if following is None or following > stop:
                self.now = stop
                return False
            self.now = following
        return True

    def start(self, spec=TWO, **preferences):
        preferences = Preferences(
            **({"min_healthy": 100, "max_healthy": 200, "warmup_s": 0.0} | preferences)
        )
        made = Refresh(f"r{len(self.group.refreshes)}", spec, preferences, self.now)
        self.group = replace(self.group, refreshes=(*self.group.refreshes, made))

    @property
    def refresh(self):
        return self.group.refreshes[-1]

    def versions(self):
        return sorted(one.spec.version for one in self.group.instances.values())


def settled(sim):
    return len(sim.serving()) == sim.group.desired == len(sim.group.instances)


def done(sim):
    return not sim.refresh.status.active


def make(desired=2, **changes):
    sim_changes = {
        name: changes.pop(name) for name in ("plan", "rules", "watch") if name in changes
    }
    group = Group(
        "web",
        ONE,
        0,
        desired * 2,
        desired,
        created_at=0.0,
        target_groups=(ELB,),
        checks_elb=True,
        grace_s=60.0,
        cause=f"a user request created an AutoScalingGroup changing the desired capacity from 0 to {desired}",
    )
    return Sim(replace(group, **changes), **sim_changes)


def started(desired=2, **changes):
    sim = make(desired, **changes)
    assert sim.run(settled)
    return sim


# Groups


def test_a_group_launches_its_exact_version_and_says_why():
    sim = started(2)
    assert sim.versions() == ["1", "1"]
    assert sim.now == 20.0
    first = next(iter(sim.group.activities.values()))
    assert first.status == "Successful"
    assert first.description.startswith("Launching a new EC2 instance: i-")
    assert first.cause == (
        "At 1970-01-01T00:00:00Z a user request created an AutoScalingGroup changing the desired capacity "
        "from 0 to 2.  At 1970-01-01T00:00:00Z an instance was started in response to a difference between "
        "desired and actual capacity, increasing the capacity from 0 to 2."
    )


def test_default_version_is_resolved_at_launch():
    sim = started(1, spec=TemplateSpec("lt-1", "web", "$Latest"))
    assert sim.versions() == ["2"]


def test_a_machine_that_powers_off_is_replaced():
    sim = started(2, plan=lambda _version, count: Plan(off_s=100.0 if count == 0 else None))
    assert sim.run(lambda sim: len(sim.launches) == 3)
    assert sim.now == 100.0
    assert sim.run(settled)
    causes = [one.cause for one in sim.group.activities.values()]
    assert any("EC2 health check indicating it has been terminated" in cause for cause in causes)
    assert any("unhealthy instance needing to be replaced" in cause for cause in causes)


def test_target_health_counts_only_after_the_grace_period_and_only_with_elb_checks():
    def dead(_version, count):
        return Plan(boot_s=None) if count == 0 else Plan()

    sim = make(1, plan=dead)
    assert sim.run(lambda sim: len(sim.launches) == 2)
    assert sim.now == 60.0
    sim = make(1, plan=dead, checks_elb=False)
    assert not sim.run(lambda sim: len(sim.launches) == 2, limit_s=10_000)


def test_refused_launches_are_tried_again_ever_more_slowly():
    sim = make(1, plan=lambda _version, count: Plan(refused=count < 4))
    assert sim.run(settled)
    assert sim.launches == [0.0, 5.0, 15.0, 35.0, 75.0]
    failed = [one for one in sim.group.activities.values() if one.status == "Failed"]
    assert len(failed) == 4
    assert failed[0].message == "no capacity. Launching EC2 instance failed."


def test_scaling_in_and_out():
    sim = started(3)
    sim.group = replace(sim.group, desired=1, cause="a user request explicitly set")
    assert sim.run(settled)
    sim.group = replace(sim.group, desired=2)
    assert sim.run(settled)
    assert len(sim.launches) == 4
    assert not sim.drained.keys() & sim.group.instances.keys()


def test_a_deleted_group_drains_and_goes():
    sim = started(2, plan=lambda _version, _count: Plan(busy_s=7.0))
    sim.group = replace(sim.group, deleting=True)
    assert sim.run(lambda sim: sim.group.gone)
    assert sim.now == 27.0
    assert sim.balanced == {}
    assert all(one.status == "Successful" for one in sim.group.activities.values())


# Zones

ZONES = ("a", "b", "c")


def zones_of(sim):
    return Counter(one.zone for one in sim.group.instances.values())


def test_instances_are_spread_evenly_and_taken_away_evenly():
    sim = started(7, zones=ZONES)
    assert zones_of(sim) == {"a": 3, "b": 2, "c": 2}
    sim.group = replace(sim.group, desired=4)
    assert sim.run(settled)
    assert sorted(zones_of(sim).values()) == [1, 1, 2]
    sim.group = replace(sim.group, desired=6)
    assert sim.run(settled)
    assert zones_of(sim) == {"a": 2, "b": 2, "c": 2}
    sim.start()
    assert sim.run(done)
    assert zones_of(sim) == {"a": 2, "b": 2, "c": 2}
    assert sim.versions() == ["2"] * 6


def test_what_one_zone_refuses_another_one_gets_at_once():
    sim = make(4, zones=ZONES)
    sim.full = {"b"}
    assert sim.run(settled)
    assert sim.now == 20.0
    assert zones_of(sim) == {"a": 2, "c": 2}
    failed = [one for one in sim.group.activities.values() if one.status == "Failed"]
    assert [one.zone for one in failed] == ["b"]
    assert failed[0].message == "no capacity. Launching EC2 instance failed."
    assert "Status Reason: no capacity" in failed[0].description
    sim.full = set()
    sim.group = replace(sim.group, desired=6)
    assert sim.run(settled)
    assert zones_of(sim) == {"a": 2, "b": 2, "c": 2}


def test_where_all_zones_refuse_they_are_tried_again_later():
    sim = make(1, zones=ZONES)
    sim.full = set(ZONES)
    assert not sim.run(settled, limit_s=14.0)
    assert sim.launches == [0.0] * 3 + [5.0] * 3
    sim.full = {"a", "c"}
    assert sim.run(settled)
    assert zones_of(sim) == {"b": 1}


# Suspended processes


def suspended(sim, *names):
    sim.do("SuspendProcesses", ScalingProcesses=list(names))
    return sim


def resumed(sim):
    sim.do("ResumeProcesses")
    assert sim.group.suspended == {}
    return sim


def test_without_launch_nothing_is_launched():
    sim = suspended(started(2), "Launch")
    sim.group = replace(sim.group, desired=3)
    sim.pass_s(1000)
    assert len(sim.launches) == 2
    assert resumed(sim).run(settled)
    assert len(sim.launches) == 3


def test_without_terminate_nothing_is_scaled_in_or_replaced():
    sim = suspended(
        started(2, plan=lambda _v, count: Plan(off_s=None if count else 50.0)), "Terminate"
    )
    sim.group = replace(sim.group, desired=1)
    sim.pass_s(1000)
    assert [one.lifecycle for one in sim.group.instances.values()] == ["InService"] * 2
    assert sorted(one.sick for one in sim.group.instances.values()) == [False, True]
    assert resumed(sim).run(settled)
    assert len(sim.launches) == 2


def test_without_replacing_the_unhealthy_are_marked_and_stay():
    sim = suspended(
        started(1, plan=lambda _v, count: Plan(off_s=None if count else 50.0)), "ReplaceUnhealthy"
    )
    sim.pass_s(1000)
    (one,) = sim.group.instances.values()
    assert (one.lifecycle, one.sick) == ("InService", True)
    assert resumed(sim).run(settled)
    cause = next(
        one.cause for one in sim.group.activities.values() if "Terminating" in one.description
    )
    assert "EC2 health check indicating it has been terminated or stopped" in cause


def test_without_health_checks_nobody_is_found_ill():
    sim = suspended(
        started(1, plan=lambda _v, count: Plan(off_s=None if count else 50.0)), "HealthCheck"
    )
    sim.pass_s(1000)
    (one,) = sim.group.instances.values()
    assert not one.sick
    assert len(sim.launches) == 1
    assert resumed(sim).run(settled)
    assert len(sim.launches) == 2


def test_without_adding_to_the_balancer_new_ones_stay_outside():
    sim = suspended(started(1), "AddToLoadBalancer")
    sim.group = replace(sim.group, desired=2)
    sim.pass_s(1000)
    assert len(sim.group.instances) == 2
    assert len(sim.targets.targets) == 1
    resumed(sim).pass_s(1000)
    assert len(sim.targets.targets) == 1


def test_a_suspended_refresh_goes_on_and_has_an_hour_again():
    sim = started(2)
    sim.start()
    suspended(sim, "InstanceRefresh").pass_s(9000)
    assert (sim.refresh.status, len(sim.launches)) == (Status.PENDING, 2)
    sim.do("ResumeProcesses", ScalingProcesses=["InstanceRefresh"])
    assert sim.run(lambda sim: sim.refresh.percent == 50)
    suspended(sim, "InstanceRefresh").pass_s(9000)
    assert resumed(sim).run(done)
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.versions() == ["2", "2"]


def test_a_bad_release_has_another_hour_after_it_was_suspended():
    sim = started(1, plan=lambda version, _count: Plan(boot_s=20.0 if version == "1" else None))
    sim.start()
    sim.pass_s(3000)
    suspended(sim, "InstanceRefresh").pass_s(3000)
    began = sim.now
    assert resumed(sim).run(done)
    assert (sim.refresh.status, sim.now - began) == (Status.FAILED, 3600.0)


def test_all_processes_are_suspended_where_none_is_named():
    sim = started(1)
    sim.do("SuspendProcesses")
    assert len(sim.group.suspended) == 9
    assert sim.group.suspended["Launch"] == "User suspended at 1970-01-01T00:00:20Z"
    with pytest.raises(Refusal, match="Invalid process type 'Lunch'"):
        sim.do("ResumeProcesses", ScalingProcesses=["Lunch"])


def test_a_deleted_group_goes_whatever_is_suspended():
    sim = started(2)
    sim.do("SuspendProcesses")
    sim.group = replace(sim.group, deleting=True)
    assert sim.run(lambda sim: sim.group.gone)


# Instances set aside


def standby(sim, *ids, decrement="true"):
    return sim.do("EnterStandby", InstanceIds=list(ids), ShouldDecrementDesiredCapacity=decrement)


def test_standby_is_out_of_the_balancer_and_of_the_capacity_and_back():
    sim = started(2, plan=lambda _version, _count: Plan(busy_s=7.0))
    first = next(iter(sim.group.instances))
    (activity,) = standby(sim, first)["Activities"]
    assert activity["Cause"] == (
        f"At 1970-01-01T00:00:20Z instance {first} was moved to standby in response to a user request, "
        "shrinking the capacity from 2 to 1."
    )
    assert sim.group.instances[first].lifecycle == "EnteringStandby"
    assert sim.run(lambda sim: sim.group.instances[first].lifecycle == "Standby")
    assert sim.now == 27.0
    assert first not in sim.targets.targets
    sim.pass_s(1000)
    assert (len(sim.launches), sim.group.desired) == (2, 1)
    (activity,) = sim.do("ExitStandby", InstanceIds=[first])["Activities"]
    assert (
        "out of standby in response to a user request, increasing the capacity from 1 to 2."
        in (activity["Cause"])
    )
    assert sim.run(settled)
    assert first in sim.serving()
    assert len(sim.launches) == 2


def test_what_is_in_standby_is_replaced_where_the_capacity_stays_and_surplus_when_it_is_back():
    sim = started(2)
    first = next(iter(sim.group.instances))
    standby(sim, first, decrement="false")
    assert sim.run(lambda sim: sim.group.instances[first].lifecycle == "Standby")
    assert sim.run(lambda sim: len(sim.serving()) == 2)
    assert len(sim.launches) == 3
    sim.do("ExitStandby", InstanceIds=[first])
    assert sim.group.desired == 3
    assert sim.run(settled)
    sim.group = replace(sim.group, deleting=True)
    assert sim.run(lambda sim: sim.group.gone)


def test_standby_keeps_to_the_bounds_of_the_group():
    sim = started(2, min_size=2, max_size=2)
    first = next(iter(sim.group.instances))
    with pytest.raises(Refusal, match="min-size=2, max-size=2, and desired-size=2"):
        standby(sim, first)
    standby(sim, first, decrement="false")
    with pytest.raises(Refusal, match=f"The instance {first} is not in Standby"):
        sim.do("ExitStandby", InstanceIds=[first])
    assert sim.run(lambda sim: sim.group.instances[first].lifecycle == "Standby")
    with pytest.raises(Refusal, match="To exit standby 1 more instance"):
        sim.do("ExitStandby", InstanceIds=[first])
    with pytest.raises(Refusal, match=f"The instance {first} is not in InService"):
        standby(sim, first)
    with pytest.raises(Refusal, match="The instance i-0 is not part of Auto Scaling group web"):
        standby(sim, "i-0")


def test_a_machine_may_be_off_in_standby():
    sim = started(2, plan=lambda _version, count: Plan(off_s=None if count else 100.0))
    first = next(iter(sim.group.instances))
    standby(sim, first)
    sim.pass_s(1000)
    assert sim.group.instances[first].lifecycle == "Standby"
    sim.do("ExitStandby", InstanceIds=[first])
    assert sim.run(settled)
    assert first not in sim.group.instances
    assert len(sim.launches) == 3


def test_what_is_protected_is_not_scaled_in():
    sim = started(3, protects=True)
    assert all(one.protected for one in sim.group.instances.values())
    sim.group = replace(sim.group, desired=1)
    sim.pass_s(1000)
    assert len(sim.group.instances) == 3
    kept, *others = sim.group.instances
    sim.do("SetInstanceProtection", InstanceIds=others, ProtectedFromScaleIn="false")
    assert sim.run(settled)
    assert list(sim.group.instances) == [kept]
    sim.machines[kept].ended = True
    assert sim.run(lambda sim: len(sim.launches) == 4)  # protection is no health


def test_who_says_that_an_instance_is_unhealthy_has_it_replaced():
    sim = started(1, grace_s=60.0)
    (one,) = sim.group.instances
    sim.do("SetInstanceHealth", InstanceId=one, HealthStatus="Unhealthy")
    sim.pass_s(30)
    assert list(sim.group.instances) == [one]
    said = {"InstanceId": one, "HealthStatus": "Unhealthy", "ShouldRespectGracePeriod": "false"}
    sim.do("SetInstanceHealth", **said)
    sim.do("SetInstanceHealth", InstanceId=one, HealthStatus="Healthy")
    sim.pass_s(1)
    assert list(sim.group.instances) == [one]
    sim.do("SetInstanceHealth", **said)
    assert sim.run(lambda sim: len(sim.launches) == 2)
    causes = [one.cause for one in sim.group.activities.values()]
    assert any(
        "an instance was taken out of service in response to a user health-check." in cause
        for cause in causes
    )
    with pytest.raises(Refusal, match="No managed instance found for: i-0"):
        sim.do("SetInstanceHealth", InstanceId="i-0", HealthStatus="Healthy")


# What costs nothing


def test_a_group_to_which_nothing_happens_is_the_very_same_object():
    sim = started(3)
    world = World({one: sim._seen(one) for one in sim.group.instances}, {"lt-1": (1, 2)})
    assert groups.advance(sim.group, world, sim.now, sim.rules).group is sim.group
    sim.start(warmup_s=100.0)
    assert not sim.run(done, limit_s=5.0)
    world = World({one: sim._seen(one) for one in sim.group.instances}, {"lt-1": (1, 2)})
    step = groups.advance(sim.group, world, sim.now, sim.rules)
    assert step.group is sim.group
    assert step.wake_at > sim.now


# Refresh


def test_a_refresh_of_two_is_new_before_old_one_boot_at_a_time():
    sim = started(2)
    lowest, most_booting = [], []

    def watch(sim):
        lowest.append(len(sim.serving()))
        most_booting.append(len(sim.booting()))

    sim.watch = watch
    sim.start()
    assert sim.run(done)
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.refresh.percent == 100
    assert sim.refresh.remaining == 0
    assert sim.versions() == ["2", "2"]
    assert sim.group.spec == TWO
    assert min(lowest) == 2
    assert max(most_booting) == 1
    assert sim.now == 60.0  # two boots, one after the other


def test_without_the_hosts_limit_all_boot_at_once():
    sim = started(2, rules=Rules(launch_parallelism=None))
    sim.start()
    assert sim.run(done)
    assert sim.now == 40.0


def test_warm_up_holds_the_old_ones():
    sim = started(2, rules=Rules(launch_parallelism=None))
    sim.start(warmup_s=100.0)
    assert sim.run(lambda sim: bool(sim.drained))
    assert sim.now == 120.0
    assert sim.run(done)


def test_without_a_maximum_the_old_go_first():
    sim = started(4, rules=Rules(launch_parallelism=None))
    counts = []
    sim.watch = lambda sim: counts.append((len(sim.serving()), len(sim.group.instances)))
    sim.start(min_healthy=50, max_healthy=None)
    assert sim.run(done)
    assert min(serving for serving, _ in counts) == 2
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.versions() == ["2"] * 4


def test_one_machine_is_replaced_even_where_the_minimum_forbids_it():
    sim = started(1)
    sim.start(min_healthy=100, max_healthy=100)
    assert sim.run(done)
    assert sim.refresh.status is Status.SUCCESSFUL


@pytest.mark.parametrize(
    ("desired", "low", "high", "expected"),
    [
        (2, 100, 200, (2, 4)),
        (1, 100, 110, (1, 2)),
        (10, 90, 110, (9, 11)),
        (3, 90, None, (2, 3)),
        (3, 100, 100, (2, 3)),
        (7, 50, 150, (4, 10)),
        (0, 100, 200, (0, 1)),
    ],
)
def test_bounds(desired, low, high, expected):
    assert refresh.bounds(Preferences(low, high), desired) == expected


def test_skip_matching_replaces_only_what_differs():
    sim = started(2)
    sim.start()
    assert sim.run(done)
    sim.start(skip_matching=True)
    before = len(sim.launches)
    assert sim.run(done)
    assert (sim.refresh.status, sim.refresh.percent) == (Status.SUCCESSFUL, 100)
    assert len(sim.launches) == before
    sim.start(spec=None)  # the group's own template, again, without skipping
    assert sim.run(done)
    assert len(sim.launches) == before + 2
    assert sim.group.spec == TWO


def test_busy_targets_are_waited_for_until_the_delay_is_over():
    sim = started(1, plan=lambda version, _count: Plan(busy_s=9.0 if version == "1" else 0.0))
    sim.start()
    assert sim.run(done)
    assert sim.now == 20.0 + 20.0 + 9.0
    sim = started(1, plan=lambda version, _count: Plan(busy_s=1e9 if version == "1" else 0.0))
    sim.start()
    assert sim.run(done)
    assert sim.now == 20.0 + 20.0 + 300.0


def test_a_bad_release_is_retried_for_an_hour_and_costs_no_capacity():
    sim = started(2, plan=lambda version, _count: Plan(boot_s=20.0 if version == "1" else None))
    lowest = []
    sim.watch = lambda sim: lowest.append(len(sim.serving()))
    began = sim.now
    sim.start()
    assert sim.run(done)
    assert sim.refresh.status is Status.FAILED
    assert "No replacement instance became healthy within 3600 seconds" in sim.refresh.reason
    assert sim.now - began == 3600.0
    assert len(sim.launches) > 30
    assert sim.run(settled)
    assert sim.versions() == ["1", "1"]
    assert sim.group.spec == ONE
    assert min(lowest) == 2


def test_a_cancelled_refresh_keeps_the_group_on_its_template_and_its_capacity():
    sim = started(2, plan=lambda version, _count: Plan(boot_s=20.0 if version == "1" else None))
    lowest = []
    sim.watch = lambda sim: lowest.append(len(sim.serving()))
    sim.start()
    assert sim.run(lambda sim: len(sim.launches) == 3)
    sim.group = replace(sim.group, refreshes=(refresh.cancel(sim.refresh),))
    assert sim.run(done)
    assert sim.refresh.status is Status.CANCELLED
    assert sim.run(settled)
    assert sim.versions() == ["1", "1"]
    assert min(lowest) == 2


def test_a_refresh_is_started_on_a_fleet_that_does_not_serve():
    sim = make(2, plan=lambda version, _count: Plan(boot_s=None if version == "1" else 20.0))
    assert not sim.run(settled, limit_s=30.0)
    sim.start()
    assert sim.run(done)
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.versions() == ["2", "2"]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    desired=st.integers(1, 12),
    high=st.integers(101, 200),
    parallelism=st.sampled_from([None, 1, 3]),
    warmup_s=st.sampled_from([None, 0.0, 45.0]),
)
def test_never_fewer_than_desired_serve_whatever_the_new_ones_do(
    seed, desired, high, parallelism, warmup_s
):
    chance = random.Random(seed)

    def plan(version, _count):
        if version == "1":
            return Plan(boot_s=chance.uniform(1, 90), busy_s=chance.choice([0.0, 3.0, 400.0]))
        fate = chance.random()  # below 0.2 silent, to 0.3 refused, above 0.9 off before it serves
        return Plan(
            boot_s=None if fate < 0.2 or fate > 0.9 else chance.uniform(0, 120),
            off_s=chance.uniform(0, 10) if fate > 0.9 else None,
            refused=0.2 < fate < 0.3,
        )

    sim = make(desired, plan=plan, grace_s=150.0, rules=Rules(launch_parallelism=parallelism))
    assert sim.run(settled)

    def watch(sim):
        assert len(sim.serving()) >= desired
        staying = [one for one in sim.group.instances.values() if not one.lifecycle.leaving]
        assert len(staying) <= refresh.bounds(sim.refresh.preferences, desired)[1]
        if parallelism is not None:
            unready = [one for one in staying if one.id not in sim.serving()]
            assert len(unready) <= parallelism

    sim.watch = watch
    sim.start(max_healthy=high, warmup_s=warmup_s)
    assert sim.run(done)
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.versions() == ["2"] * desired


# Refresh with lifecycle hooks

UP = Hook("up", Transition.LAUNCHING, 180)
DOWN = Hook("down", Transition.TERMINATING, 60, Result.CONTINUE)


def test_what_is_held_counts_as_booting_and_not_as_healthy():
    sim = started(2, hooks={"up": UP}, plan=lambda _version, _count: Plan(ready_s=35.0))
    assert sim.now == 35.0
    seen = []

    def watch(sim):
        held = [one for one in sim.group.instances.values() if one.lifecycle.launching]
        seen.append((len(sim.serving()), len(held)))

    sim.watch = watch
    sim.start()
    assert sim.run(done)
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.versions() == ["2", "2"]
    assert min(serving for serving, _ in seen) == 2
    assert max(held for _, held in seen) == 1
    assert sim.now == 35.0 + 2 * 35.0  # though each answers after 20 s


def test_a_release_that_never_says_continue_is_retried_for_an_hour_and_costs_no_capacity():
    sim = started(
        2,
        hooks={"up": UP},
        plan=lambda version, _count: Plan(ready_s=20.0 if version == "1" else None),
    )
    lowest = []
    sim.watch = lambda sim: lowest.append(len(sim.serving()))
    began = sim.now
    sim.start()
    assert sim.run(done)
    assert sim.refresh.status is Status.FAILED
    assert sim.now - began == 3600.0
    assert len(sim.launches) == 2 + 20  # one for each heartbeat timeout
    assert min(lowest) == 2
    assert sim.run(settled)
    assert sim.versions() == ["1", "1"]


def test_a_refresh_is_done_when_the_last_old_one_is_let_go():
    sim = started(2, hooks={"down": DOWN}, plan=lambda _version, _count: Plan(ready_s=None))
    sim.start()
    assert sim.run(done)
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.now == 60.0 + 60.0  # two boots, and the second departure's hook
    assert sim.versions() == ["2", "2"]


def test_a_cancelled_refresh_waits_for_what_is_held():
    sim = started(
        2,
        hooks={"up": UP},
        plan=lambda version, _count: Plan(ready_s=20.0 if version == "1" else None),
    )
    sim.start()
    assert sim.run(lambda sim: len(sim.launches) == 3)
    sim.group = replace(sim.group, refreshes=(refresh.cancel(sim.refresh),))
    assert sim.run(done)
    assert sim.now == 20.0 + 180.0
    assert sim.refresh.status is Status.CANCELLED
    assert sim.versions() == ["1", "1"]


def test_a_deleted_group_is_not_held_up():
    sim = started(
        1, hooks={"up": UP}, plan=lambda _version, count: Plan(ready_s=[20.0, None][count])
    )
    sim.group = replace(sim.group, desired=2)
    assert not sim.run(settled, limit_s=100.0)
    freed = {one.id: replace(one, waits=()) for one in sim.group.instances.values()}
    sim.group = replace(sim.group, deleting=True, hooks={}, instances=freed)
    assert sim.run(lambda sim: sim.group.gone)
    assert sim.now == 120.0
    assert len(sim.launches) == 2


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    desired=st.integers(1, 8),
    high=st.integers(101, 200),
    parallelism=st.sampled_from([None, 1, 3]),
    leaving=st.booleans(),
)
def test_a_refresh_with_holding_machines_keeps_capacity(seed, desired, high, parallelism, leaving):
    chance = random.Random(seed)

    def plan(version, _count):
        if version == "1":
            return Plan(boot_s=chance.uniform(1, 90), ready_s=chance.uniform(1, 90))
        fate = (
            chance.random()
        )  # below 0.2 never ready, to 0.3 refused, above 0.9 off while it is held
        return Plan(
            boot_s=chance.uniform(0, 120),
            ready_s=None if fate < 0.2 else chance.uniform(1, 120),
            off_s=chance.uniform(0, 1) if fate > 0.9 else None,
            refused=0.2 < fate < 0.3,
        )

    having = {"up": UP, "down": DOWN} if leaving else {"up": UP}
    sim = make(
        desired, plan=plan, grace_s=150.0, rules=Rules(launch_parallelism=parallelism), hooks=having
    )
    assert sim.run(settled)

    def watch(sim):
        assert len(sim.serving()) >= desired
        staying = [one for one in sim.group.instances.values() if not one.lifecycle.leaving]
        assert len(staying) <= refresh.bounds(sim.refresh.preferences, desired)[1]
        assert not {one.id for one in staying if one.waits} & sim.balanced.keys()
        if parallelism is not None:
            assert len([one for one in staying if one.id not in sim.serving()]) <= parallelism

    sim.watch = watch
    sim.start(max_healthy=high)
    assert sim.run(done)
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.versions() == ["2"] * desired


def test_a_thousand():
    chance = random.Random(7)
    sim = started(
        1000,
        plan=lambda _version, _count: Plan(boot_s=float(chance.randrange(15, 45, 5))),
        rules=Rules(launch_parallelism=50),
    )
    lowest = []
    sim.watch = lambda sim: lowest.append(len(sim.serving()))
    sim.start(max_healthy=110)
    assert sim.run(done)
    assert sim.refresh.status is Status.SUCCESSFUL
    assert sim.versions() == ["2"] * 1000
    assert min(lowest) == 1000
    assert len(sim.launches) == 2000
