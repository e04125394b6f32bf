"""Lifecycle hooks of one group on a virtual clock: every transition, and a naive model of one instance's life."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.region import group as group_
from calve.region import groups, hooks
from calve.region.ec2 import State
from calve.region.group import Group, Rules, World
from calve.region.hooks import Hook, Result, Transition
from calve.region.hooks_api import HookActions
from calve.region.query import Params
from calve.region.signature import Refusal
from calve.region.templates import TemplateSpec

LAUNCHING, TERMINATING = Transition
CONTINUE, ABANDON = Result
ARN = "arn:tg"
UP = Hook("up", LAUNCHING, 180)
DOWN = Hook("down", TERMINATING, 180)


class Life:
    """A group of one whose machines run at once; drained and off as soon as asked."""

    def __init__(self, *having, target_groups=(), desired=1):
        found = {one.name: one for one in having}
        group = Group(
            "web",
            TemplateSpec("lt-1", "web", "1"),
            0,
            2,
            desired,
            0.0,
            target_groups=target_groups,
            hooks=found,
        )
        self.groups = {"web": group}
        self.actions = HookActions(self.groups).actions
        self.now = 0.0
        self.states = {}
        self.targets = {}
        self.effects = []
        self.slow = False  # machines stay pending until `runs`
        self.wake_at = 0.0

    @property
    def group(self):
        return self.groups["web"]

    def change(self, **changes):
        self.groups["web"] = replace(self.group, **changes)
        self.settle()

    def settle(self):
        """Advance until nothing is due at this instant."""
        for _ in range(50):
            seen = {
                one: group_.Seen(self.states[one], self.targets.get(one))
                for one in self.group.instances
            }
            step = groups.advance(self.group, World(seen, {}), self.now, Rules())
            self.groups["web"], self.wake_at = step.group, step.wake_at
            self.effects += step.effects
            for effect in step.effects:
                match effect:
                    case group_.Launch(name, _):
                        self.states[name] = State.PENDING if self.slow else State.RUNNING
                    case group_.Terminate(name):
                        self.states[name] = State.TERMINATED
                    case group_.Register(name, _):
                        self.targets[name] = "healthy"
                    case group_.Deregister(name, _):
                        self.targets[name] = "draining"
            if self.wake_at != self.now:
                return self
        raise AssertionError("it never settles")

    def to(self, now):
        """Go to an instant, stopping where the group asked to be looked at."""
        while self.wake_at is not None and self.wake_at <= now:
            self.now = self.wake_at
            self.settle()
        self.now = now
        return self

    def act(self, action, **parameters):
        values = {"AutoScalingGroupName": "web", **parameters}
        answer = self.actions[action](Params(values), self.now)
        self.settle()
        return answer

    def complete(self, name, hook, result):
        self.act(
            "CompleteLifecycleAction",
            LifecycleHookName=hook,
            InstanceId=name,
            LifecycleActionResult=result.value,
        )

    def beat(self, name, hook):
        self.act("RecordLifecycleActionHeartbeat", LifecycleHookName=hook, InstanceId=name)

    def one(self):
        (found,) = self.group.instances.values()
        return found

    def lifecycle(self, name):
        found = self.group.instances.get(name)
        return None if found is None else found.lifecycle.value

    def activity(self, description):
        (found,) = [
            one for one in self.group.activities.values() if one.description.startswith(description)
        ]
        return found


def held(*having, **more):
    """Return a group whose first machine is held by its launch hooks."""
    life = Life(*having, **more).settle()
    assert life.lifecycle(life.one().id) == "Pending:Wait"
    return life


def kinds(life):
    return [type(one).__name__ for one in life.effects]


# Launching


def test_a_machine_is_held_once_it_runs_and_registered_once_it_may_go_on():
    life = Life(UP, target_groups=(ARN,))
    life.slow = True
    name = life.settle().one().id
    assert life.lifecycle(name) == "Pending"
    assert life.one().waits == ()
    life.to(40.0).states[name] = State.RUNNING
    life.settle()
    assert life.lifecycle(name) == "Pending:Wait"
    assert life.activity("Launching").status == "MidLifecycleAction"
    assert life.wake_at == 220.0
    life.to(100.0)
    assert kinds(life) == ["Launch"]
    life.complete(name, "up", CONTINUE)
    assert life.lifecycle(name) == "InService"
    assert life.one().in_service_at == 100.0  # the grace period begins here
    assert kinds(life) == ["Launch", "Register"]
    assert life.activity("Launching").status == "Successful"


def test_proceed_is_a_state_of_its_own_and_not_yet_in_service():
    life = held(UP, target_groups=(ARN,))
    name = life.one().id
    HookActions(life.groups).actions["CompleteLifecycleAction"](
        Params(
            {
                "AutoScalingGroupName": "web",
                "LifecycleHookName": "up",
                "LifecycleActionResult": "CONTINUE",
                "InstanceId": name,
            }
        ),
        life.now,
    )
    world = World({name: group_.Seen(State.RUNNING)}, {})
    step = groups.advance(life.group, world, life.now, Rules())
    assert step.group.instances[name].lifecycle.value == "Pending:Proceed"
    assert (step.effects, step.wake_at) == ((), life.now)
    step = groups.advance(step.group, world, life.now, Rules())
    assert step.group.instances[name].lifecycle.value == "InService"
    assert step.effects == (group_.Register(name, ARN),)


@pytest.mark.parametrize(
    ("at", "how", "said"),
    [
        (
            50.0,
            lambda life, name: life.complete(name, "up", ABANDON),
            "Lifecycle Action Completed with ABANDON Result",
        ),
        (180.0, lambda life, name: None, "Heartbeat Timeout"),
    ],
)
def test_what_is_abandoned_is_terminated_at_once_and_replaced(at, how, said):
    life = held(UP, DOWN, target_groups=(ARN,))
    first = life.one()
    life.to(at - 1)
    assert len(life.states) == 1
    life.to(at)
    how(life, first.id)
    assert life.lifecycle(first.id) is None  # no hook holds what was never in service
    second = life.one()
    assert second.id != first.id
    assert (second.lifecycle.value, second.launched_at) == ("Pending:Wait", at)
    assert kinds(life).count("Register") == kinds(life).count("Deregister") == 0
    reason = (
        "Instance failed to complete user's Lifecycle Action: Lifecycle Action with token "
        f"{first.waits[0].token} was abandoned: {said}"
    )
    launch = life.activity(f"Launching a new EC2 instance: {first.id}")
    assert (launch.status, launch.message, launch.ended_at) == ("Cancelled", reason, at)
    assert launch.description.endswith(f"{first.id}.  Status Reason: {reason}")
    ending = life.activity(f"Terminating EC2 instance: {first.id}")
    assert ending.cause.endswith("was taken out of service in response to a launch failure.")
    again = life.activity(f"Launching a new EC2 instance: {second.id}")
    assert "difference between desired and actual capacity" in again.cause


def test_a_timeout_with_default_continue_goes_on():
    life = held(replace(UP, default=CONTINUE))
    name = life.one().id
    life.to(179.0)
    assert life.lifecycle(name) == "Pending:Wait"
    life.to(180.0)
    assert life.lifecycle(name) == "InService"


def test_a_machine_that_powers_off_is_noticed_only_at_the_timeout():
    for default, then in ((ABANDON, "Cancelled"), (CONTINUE, "Successful")):
        life = held(replace(UP, default=default))
        name = life.one().id
        life.states[name] = State.STOPPED
        life.to(179.0).settle()
        assert life.lifecycle(name) == "Pending:Wait"
        life.to(180.0)
        assert life.lifecycle(name) is None
        assert life.activity(f"Launching a new EC2 instance: {name}").status == then
        cause = life.activity(f"Terminating EC2 instance: {name}").cause
        assert ("EC2 health check" in cause) is (default is CONTINUE)


def test_every_hook_has_to_say_continue():
    life = held(UP, replace(UP, name="other", heartbeat_s=60, default=CONTINUE))
    name = life.one().id
    life.complete(name, "up", CONTINUE)
    assert life.lifecycle(name) == "Pending:Wait"
    life.to(60.0)
    assert life.lifecycle(name) == "InService"


def test_one_abandon_ends_the_others():
    life = held(UP, replace(UP, name="other"))
    name = life.one().id
    life.complete(name, "other", ABANDON)
    assert life.lifecycle(name) is None
    with pytest.raises(Refusal, match="No active Lifecycle Action found with instance ID"):
        life.complete(name, "up", CONTINUE)


def test_heartbeats_restart_the_timeout_up_to_the_limit():
    life = held(replace(UP, heartbeat_s=30))
    name = life.one().id
    for beat in range(1, 200):
        life.to(beat * 29.0)
        if life.lifecycle(name) is None:
            break
        life.beat(name, "up")
    assert beat == 104
    closed = life.activity(f"Launching a new EC2 instance: {name}")
    assert closed.ended_at == 3000.0  # 100 times the timeout
    assert Hook("long", LAUNCHING, 7200).most_s == 48 * 3600


def test_a_heartbeat_of_a_hook_that_timed_out_does_not_bring_it_back():
    life = held(replace(UP, default=CONTINUE, heartbeat_s=30), replace(UP, name="other"))
    name = life.one().id
    life.to(30.0)
    with pytest.raises(Refusal, match="No active Lifecycle Action"):
        life.beat(name, "up")
    life.beat(name, "other")
    life.complete(name, "other", CONTINUE)
    assert life.lifecycle(name) == "InService"


def test_a_hook_that_is_changed_or_put_while_it_holds_counts_for_the_next():
    life = held(UP)
    name = life.one().id
    life.act("PutLifecycleHook", LifecycleHookName="up", HeartbeatTimeout="30")
    life.act("PutLifecycleHook", LifecycleHookName="new", LifecycleTransition=str(LAUNCHING))
    life.to(100.0)
    assert life.lifecycle(name) == "Pending:Wait"
    life.complete(name, "up", CONTINUE)
    assert life.lifecycle(name) == "InService"
    assert life.group.hooks["up"] == Hook("up", LAUNCHING, 30)


def test_deleting_a_hook_abandons_what_launches():
    life = held(UP)
    name = life.one().id
    life.act("DeleteLifecycleHook", LifecycleHookName="up")
    assert life.lifecycle(name) is None
    assert life.one().lifecycle.value == "InService"
    assert life.group.hooks == {}


def test_a_refused_launch_is_never_held():
    life = Life(UP)
    life.slow = True
    name = life.settle().one().id
    world = World({name: group_.Seen(State.TERMINATED, error="no capacity")}, {})
    after = groups.advance(life.group, world, life.now, Rules()).group
    assert name not in after.instances


# Terminating


def leaving(*having, **more):
    life = Life(*having, **more).settle()
    life.change(desired=0)
    return life


def test_a_departing_machine_is_held_after_it_has_drained():
    life = leaving(DOWN, target_groups=(ARN,))
    name = life.one().id
    assert life.lifecycle(name) == "Terminating"
    assert life.activity("Terminating").status == "WaitingForELBConnectionDraining"
    life.to(20.0).targets[name] = None
    life.settle()
    assert life.lifecycle(name) == "Terminating:Wait"
    assert life.activity("Terminating").status == "MidLifecycleAction"
    assert "Terminate" not in kinds(life)
    life.to(199.0)
    assert life.lifecycle(name) == "Terminating:Wait"
    life.to(200.0)
    assert life.lifecycle(name) is None
    assert kinds(life)[-1] == "Terminate"
    assert life.activity("Terminating").status == "Successful"


@pytest.mark.parametrize("result", [CONTINUE, ABANDON])
def test_either_result_lets_it_go(result):
    life = leaving(DOWN)
    name = life.one().id
    life.complete(name, "down", result)
    assert life.lifecycle(name) is None
    assert life.activity("Terminating").message is None


def test_of_two_hooks_both_continue_or_one_abandons():
    other = replace(DOWN, name="other")
    for result, after in ((CONTINUE, "Terminating:Wait"), (ABANDON, None)):
        life = leaving(DOWN, other)
        name = life.one().id
        life.complete(name, "down", result)
        assert life.lifecycle(name) == after


def test_proceed_is_seen_before_the_machine_is_ended():
    life = leaving(replace(DOWN, heartbeat_s=30))
    name = life.one().id
    world = World({name: group_.Seen(State.RUNNING)}, {})
    step = groups.advance(life.group, world, 30.0, Rules())
    assert step.group.instances[name].lifecycle.value == "Terminating:Proceed"
    assert (step.effects, step.wake_at) == ((), 30.0)
    step = groups.advance(step.group, world, 30.0, Rules())
    assert step.effects == (group_.Terminate(name),)
    assert step.group.instances[name].lifecycle.value == "Terminating:Proceed"


def test_deleting_a_hook_lets_what_terminates_go():
    life = leaving(DOWN)
    name = life.one().id
    life.act("DeleteLifecycleHook", LifecycleHookName="down")
    assert life.lifecycle(name) is None


def test_a_machine_that_powers_off_in_service_is_held_too():
    life = Life(DOWN).settle()
    name = life.one().id
    life.states[name] = State.STOPPED
    life.settle()
    assert life.lifecycle(name) == "Terminating:Wait"
    assert len(life.group.instances) == 2  # its replacement does not wait for it


def test_scaling_in_takes_what_is_held_first():
    life = Life(UP, desired=2).settle()
    first, second = life.group.instances
    life.complete(first, "up", CONTINUE)
    life.change(desired=1)
    assert list(life.group.instances) == [first]
    assert life.activity(f"Launching a new EC2 instance: {second}").status == "Cancelled"


# The rules by themselves


def test_only_a_transition_s_own_hooks_begin_and_tokens_differ():
    tokens = iter("abc")
    waits = hooks.begin([UP, DOWN, replace(UP, name="x")], LAUNCHING, lambda: next(tokens), 5.0)
    assert [(one.hook.name, one.token, one.ends_at) for one in waits] == [
        ("up", "a", 185.0),
        ("x", "b", 185.0),
    ]


def test_no_waits_are_a_continue():
    assert hooks.outcome((), 0.0).result is CONTINUE


# A naive model: counters that are counted down, once a second


class Model:
    """One instance's life; None once it is gone."""

    def __init__(self, having):
        self.having = dict(having)
        self.off = False
        self.counts = {}
        self.state = None
        self._wait(LAUNCHING, "Pending:Wait", self._serve)

    def _wait(self, transition, state, then):
        self.then, self.transition = then, transition
        self.counts = {
            one.name: [one.heartbeat_s, one.most_s, one]
            for one in self.having.values()
            if one.transition is transition
        }
        self.state = state
        if not self.counts:
            then()

    def _serve(self):
        self.state = "InService"
        if self.off:
            self.leave()

    def leave(self):
        if self.state == "InService":
            self._wait(TERMINATING, "Terminating:Wait", self._end)
        elif self.state == "Pending:Wait":
            self._end()

    def _end(self):
        self.state, self.counts = None, {}

    def second(self):
        for name in list(self.counts):
            if name in self.counts:
                count = self.counts[name]
                count[0] -= 1
                count[1] -= 1
                if min(count[:2]) == 0:
                    self.result(name, count[2].default)

    def result(self, name, result):
        if name not in self.counts:
            return False
        del self.counts[name]
        if result is ABANDON:
            self._end()
        elif not self.counts:
            self.then()
        return True

    def beat(self, name):
        if name in self.counts:
            self.counts[name][0] = self.counts[name][2].heartbeat_s
        return name in self.counts

    def power_off(self):
        self.off = True
        if self.state == "InService":
            self.leave()

    def delete(self, name):
        if self.having.pop(name, None) is not None:
            self.result(name, ABANDON if self.transition is LAUNCHING else CONTINUE)


NAMES = {"l1": LAUNCHING, "l2": LAUNCHING, "t1": TERMINATING, "t2": TERMINATING}
HOOKS = st.dictionaries(
    st.sampled_from(sorted(NAMES)), st.tuples(st.sampled_from([30, 41]), st.sampled_from(Result))
)
OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 25),
        st.sampled_from(
            ["continue", "abandon", "beat", "beat", "beat", "off", "delete", "leave", "nothing"]
        ),
        st.sampled_from(sorted(NAMES)),
    ),
    max_size=20,
)


def _operate(life, model, name, kind, hook):
    """Do one thing to both; whether the service took it must be what the model says."""
    taken = None
    match kind:
        case "continue" | "abandon":
            result = CONTINUE if kind == "continue" else ABANDON
            taken = model.result(hook, result)
            do = lambda: life.complete(name, hook, result)  # noqa: E731
        case "beat":
            taken = model.beat(hook)
            do = lambda: life.beat(name, hook)  # noqa: E731
        case "delete":
            taken = hook in model.having
            model.delete(hook)
            do = lambda: life.act("DeleteLifecycleHook", LifecycleHookName=hook)  # noqa: E731
        case "off":
            model.power_off()
            if life.states[name] is State.RUNNING:
                life.states[name] = State.STOPPED
            do = life.settle
        case "leave":
            model.leave()
            do = lambda: life.change(desired=0)  # noqa: E731
        case _:
            return
    if taken is False:
        with pytest.raises(Refusal):
            do()
    else:
        do()


@settings(deadline=None, max_examples=150)
@given(chosen=HOOKS, operations=OPERATIONS)
def test_one_instance_s_life_is_the_naive_model_s(chosen, operations):
    limit, hooks.MOST_HEARTBEATS = hooks.MOST_HEARTBEATS, 2
    try:
        having = {name: Hook(name, NAMES[name], *chosen[name]) for name in chosen}
        life, model = Life(*having.values()), Model(having)
        name = life.settle().one().id
        assert life.lifecycle(name) == model.state
        for wait_s, kind, hook in [*operations, *[(25, "nothing", "l1")] * 8]:
            for _ in range(wait_s):
                model.second()
                life.to(life.now + 1)  # which looks only where the group asked for it
                assert life.lifecycle(name) == model.state
            _operate(life, model, name, kind, hook)
            assert life.lifecycle(name) == model.state
    finally:
        hooks.MOST_HEARTBEATS = limit
