import pytest

from calve.region import targets
from calve.region.targets import (
    Add,
    Check,
    Drain,
    HealthCheck,
    Ready,
    Remove,
    Seen,
    TargetGroup,
    TargetState,
)

ADDRESS = ("127.0.0.1", 1)
GROUP = TargetGroup("arn", "web", HealthCheck("/", 10, 5, 2, 3), 60.0)
UP, DOWN = Check(known=True, passing=True, code=200), Check(known=True, code=500)


def step(group, now, check=None, address=ADDRESS, **options):
    return targets.advance(group, {"i-1": Seen(address, check)}, now, **options)


def only(group):
    (target,) = group.targets.values()
    return target


@pytest.fixture
def registered():
    return targets.register(GROUP, "i-1", 0.0)


@pytest.fixture
def serving(registered):
    group = step(registered, 0.0).group
    return step(group, 1.0, UP).group


def test_it_enters_without_traffic_and_is_ready_only_after_its_check(registered):
    waiting = step(registered, 0.0, address=None)
    assert (waiting.effects, only(waiting.group).reason) == ((), "Elb.RegistrationInProgress")
    added = step(registered, 0.0)
    assert added.effects == (Add("i-1", ADDRESS),)
    assert only(added.group).reason == "Elb.InitialHealthChecking"
    unknown = step(added.group, 1.0, Check(known=False, passing=True))
    assert (unknown.effects, only(unknown.group).state) == ((), TargetState.INITIAL)
    up = step(added.group, 1.0, UP)
    assert up.effects == (Ready("i-1"),)
    assert (only(up.group).state, only(up.group).reason) == (TargetState.HEALTHY, None)
    assert step(up.group, 2.0, UP) == targets.Step(up.group, (), None)


def test_one_that_never_passes_is_initial_until_the_threshold_could_be_met(registered):
    group = step(registered, 0.0).group
    early = step(group, 29.0, DOWN)
    assert (only(early.group).state, early.wake_at) == (TargetState.INITIAL, 30.0)
    late = only(step(group, 30.0, DOWN).group)
    assert (late.state, late.reason) == (TargetState.UNHEALTHY, "Target.ResponseCodeMismatch")
    assert late.description == "Health checks failed with these codes: [500]"


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (Check(known=True, timed_out=True), "Target.Timeout"),
        (Check(known=True), "Target.FailedHealthChecks"),
        (DOWN, "Target.ResponseCodeMismatch"),
    ],
)
def test_a_healthy_one_that_fails_says_why_and_needs_no_second_ready(serving, check, reason):
    down = step(serving, 5.0, check)
    assert (only(down.group).state, only(down.group).reason) == (TargetState.UNHEALTHY, reason)
    assert down.effects == ()
    back = step(down.group, 6.0, UP)
    assert (only(back.group).state, back.effects) == (TargetState.HEALTHY, ())


def test_draining_waits_for_what_is_under_way_looking_twice(serving):
    group = targets.deregister(serving, "i-1", 10.0)
    assert targets.deregister(group, "i-1", 11.0) == group
    assert targets.register(group, "i-1", 11.0) == group
    drain = step(group, 10.0, UP)
    assert drain.effects == (Drain("i-1"),)
    busy = step(drain.group, 20.0, Check(known=True, passing=True, connections=1))
    assert (busy.effects, busy.wake_at) == ((), 70.0)
    quiet = step(busy.group, 21.0, UP)
    assert quiet.effects == ()
    busy_again = step(quiet.group, 21.0, Check(known=True, connections=1))
    quiet = step(busy_again.group, 22.0, UP)
    gone = step(quiet.group, 22.0, UP)
    assert (gone.effects, gone.group.targets) == ((Remove("i-1"),), {})


def test_the_delay_ends_the_waiting(serving):
    group = step(targets.deregister(serving, "i-1", 10.0), 10.0, UP).group
    late = step(group, 70.0, Check(known=True, connections=3))
    assert (late.effects, late.group.targets) == ((Remove("i-1"),), {})


def test_without_draining_it_is_cut_off_at_once(serving):
    group = targets.deregister(serving, "i-1", 10.0)
    assert step(group, 10.0, UP, draining=False).effects == (Remove("i-1"),)


def test_one_that_was_never_given_to_the_balancer_just_goes(registered):
    group = targets.deregister(registered, "i-1", 1.0)
    gone = step(group, 1.0)
    assert (gone.effects, gone.group.targets) == ((), {})


def test_the_worst_state_counts():
    state = TargetState
    assert targets.worst([]) is None
    assert targets.worst([state.HEALTHY, state.INITIAL]) is state.INITIAL
    assert targets.worst([state.UNHEALTHY, state.INITIAL]) is state.UNHEALTHY
    assert targets.worst([state.UNHEALTHY, state.DRAINING]) is state.DRAINING
