"""A rehearsed release: what it tells, what bounds hold meanwhile, and that it is the same every time."""

import itertools
import random

import pytest

from calve.errors import CalveError, DeadlineError
from calve.region.group import Rules
from calve.region.refresh import Preferences, Status
from calve.region.rehearsal import Plan, simulate
from calve.region.scripts import dies_after, fails, good, serves_500

CAREFUL = Preferences(100, 110, 30.0)


def jittered(seed=1):
    rng = random.Random(seed)
    return lambda _launch: good(40 + 30 * rng.random())


@pytest.fixture(scope="module")
def told():
    return simulate(Plan(50, CAREFUL), jittered())


def test_every_machine_is_replaced(told):
    assert told.refresh.status is Status.SUCCESSFUL
    last = told.samples[-1]
    assert (last.lifecycles, last.healthy, last.percent) == ({"InService": 50}, 50, 100)
    assert {one.spec.version for one in told.group.instances.values()} == {"2"}
    assert 10 * 40 < last.at_s < 10 * 200


def test_capacity_stays_within_its_bounds(told):
    assert min(sample.healthy for sample in told.samples) >= 50
    assert max(sum(sample.lifecycles.values()) for sample in told.samples) <= 55 + 5


def test_samples_differ_and_progress_only_grows(told):
    for before, after in itertools.pairwise(told.samples):
        assert before.at_s <= after.at_s
        assert before.percent <= after.percent
        assert before != after


def test_each_instance_s_way_is_told(told):
    ways = {}
    for event in told.events:
        ways.setdefault(event.instance_id, []).append(event.state)
    came = ["Pending", "Pending:Wait", "Pending:Proceed", "InService", "initial", "healthy"]
    went = ["draining", "Terminating", "", ""]
    assert len(ways) == 100
    assert sorted(map(sorted, ways.values())) == sorted([sorted(came)] * 50 + [sorted(went)] * 50)


def test_it_is_the_same_every_time(told):
    assert simulate(Plan(50, CAREFUL), jittered()) == told
    assert simulate(Plan(50, CAREFUL), jittered(2)).samples != told.samples


def test_a_failing_release_is_given_up_and_costs_no_capacity():
    plan = Plan(20, CAREFUL, rules=Rules(None, give_up_s=600))
    told = simulate(plan, lambda _launch: fails("nar-damaged", "truncated", 20))
    assert told.refresh.status is Status.FAILED
    assert told.samples[-1].at_s == pytest.approx(600, abs=4)
    assert min(sample.healthy for sample in told.samples) == 20
    assert {sample.percent for sample in told.samples} == {0}


def test_machines_that_answer_500_never_count_as_healthy():
    plan = Plan(10, CAREFUL, rules=Rules(None, give_up_s=600))
    told = simulate(plan, lambda _launch: serves_500(20))
    assert told.refresh.status is Status.FAILED
    assert {event.state for event in told.events if event.state == "unhealthy"}
    assert min(sample.healthy for sample in told.samples) == 10


def test_refused_launches_are_tried_again():
    left = iter([True] * 3)

    def script_of(_launch):
        if next(left, False):
            raise CalveError("no room")
        return good(40)

    told = simulate(Plan(10, CAREFUL), script_of)
    assert told.refresh.status is Status.SUCCESSFUL
    failed = [one for one in told.group.activities.values() if one.status == "Failed"]
    assert [one.message for one in failed] == ["no room. Launching EC2 instance failed."] * 3


def test_a_new_machine_that_dies_is_replaced_too():
    scripts = iter([dies_after(60, 40)])
    told = simulate(Plan(10, CAREFUL), lambda _launch: next(scripts, good(40)))
    assert told.refresh.status is Status.SUCCESSFUL
    assert told.samples[-1].healthy == 10
    assert sum(event.state == "InService" for event in told.events) == 11
    # EC2's own check comes before the balancer's.
    assert not any(event.state == "unhealthy" for event in told.events)


def test_it_ends_with_the_refresh():
    told = simulate(Plan(10, CAREFUL), lambda _launch: dies_after(5000))
    assert told.refresh.status is Status.SUCCESSFUL
    assert told.samples[-1].lifecycles == {"InService": 10}
    assert max(event.at_s for event in told.events) <= told.samples[-1].at_s < 5000


def test_it_ends_with_its_time_whatever_is():
    told = simulate(Plan(10, CAREFUL, most_s=100), lambda _launch: good(1000))
    assert told.refresh.status is Status.IN_PROGRESS
    with pytest.raises(DeadlineError):
        simulate(Plan(10, CAREFUL, most_s=5), jittered())


def test_without_a_hook_the_balancer_judges():
    told = simulate(Plan(10, CAREFUL, hook=None), lambda _launch: good(40))
    assert told.refresh.status is Status.SUCCESSFUL
    assert not any(event.state == "Pending:Wait" for event in told.events)


def test_a_thousand_machines_come_and_go():
    told = simulate(Plan(1000, CAREFUL, grid_s=10.0), jittered())
    assert told.refresh.status is Status.SUCCESSFUL
    assert min(sample.healthy for sample in told.samples) >= 1000
    assert len(told.events) == 10_000
