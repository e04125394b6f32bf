"""Scripted machines and their balancer: what they say, to whom and when; work for what is due alone."""

import datetime as dt
import json
import threading

import pytest

from calve.errors import CalveError, ConflictError
from calve.region.hooks import Result
from calve.region.machine import Launch
from calve.region.scripted import ScriptedMachines, calve_of
from calve.region.scripted_balancer import ScriptedBalancer
from calve.region.scripts import Script, dies_after, fails, good, panics, serves_500, silent
from calve.region.signature import Refusal
from calve.region.targets import Check, HealthCheck
from calve.region.virtual import VirtualClock

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
DATA = json.dumps({"calve": {"release": 1, "hook": {"group": "web", "name": "up"}}}).encode()
NEVER = threading.Event()


class Place:
    """Machines that run one script, and all that they told the outside, with seconds."""

    def __init__(self, drain_s=0.0):
        self.clock = VirtualClock(START)
        self.script = Script()
        self.told = []
        self.machines = ScriptedMachines(
            self.clock,
            lambda _launch: self.script,
            complete=self._tell,
            beat=lambda one, data: self._tell(one, data, "beat"),
            report=self._tell,
        )
        self.balancer = ScriptedBalancer(self.clock, self.machines, drain_s=drain_s)
        self.balancer.start(HealthCheck("/", 10, 5, 3, 2))

    def _tell(self, instance_id, user_data, what):
        assert user_data == DATA
        self.told.append((self.at_s, instance_id, what))

    @property
    def at_s(self):
        return self.clock.monotonic() - START.timestamp()

    def launch(self, script, name="i-1"):
        self.script = script
        self.machines.launch(Launch(name, "ami-1", "t3.nano", DATA))
        return self

    def to(self, seconds):
        self.clock.wait(NEVER, seconds - self.at_s)
        return self

    def check(self, name="i-1"):
        return self.balancer.checks()[name]

    def console(self, name="i-1"):
        return self.machines.console(name).decode()


@pytest.fixture
def place():
    return Place()


def test_a_good_machine_serves_completes_and_reports(place):
    place.launch(good(40, system="/nix/store/x")).to(35)
    assert (place.told, place.machines.code("i-1")) == ([], None)
    place.to(36)
    assert place.machines.code("i-1") == 200
    place.to(39)
    assert '"e":"healthy"' not in place.console()
    place.to(100)
    assert [(at, what) for at, _, what in place.told if what is Result.CONTINUE] == [
        (40, Result.CONTINUE)
    ]
    (report,) = [what for _, _, what in place.told if what is not Result.CONTINUE]
    assert report == place.console()
    lines = [one.removeprefix("@@calve ") for one in report.splitlines() if "@@calve" in one]
    events = [json.loads(one) for one in lines]
    assert [one["t"] for one in events] == sorted(one["t"] for one in events)
    assert [one["e"] for one in events][-3:] == ["ready", "phase", "healthy"]
    assert events[-1]["system"] == "/nix/store/x"
    assert place.machines.running("i-1")


def test_a_failing_machine_beats_abandons_and_powers_off(place):
    place.launch(fails("disk-small", "no room", 10, hold_s=130)).to(300)
    what = [
        (at, "report" if isinstance(said, str) and "@@" in said else said)
        for at, _, said in place.told
    ]
    assert what == [(10, "report"), (60, "beat"), (120, "beat"), (140, Result.ABANDON)]
    assert not place.machines.running("i-1")
    assert '"code":"disk-small"' in place.console().splitlines()[-1]


@pytest.mark.parametrize("script", [silent(), panics()])
def test_some_tell_nobody(place, script):
    place.launch(script).to(1000)
    assert place.told == []
    assert place.machines.running("i-1")


def test_what_is_off_does_nothing_more_and_its_console_stays(place):
    place.launch(dies_after(25)).launch(good(40), "i-2").to(20)
    place.machines.terminate("i-2")
    place.machines.terminate("i-2")
    place.machines.terminate("i-3")
    place.to(100)
    assert place.told == []
    assert not place.machines.running("i-1")
    assert place.machines.code("i-1") is None
    assert '"n":"pull"' in place.console("i-1")
    assert '"e":"ready"' not in place.console("i-1")
    assert place.machines.console("i-9") == b""
    assert place.machines.address("i-9") is None
    assert place.machines.address("i-1") != place.machines.address("i-2")


def test_what_a_machine_is_refused_it_says_on_its_console():
    place = Place()

    def refuse(_action, _form):
        raise Refusal(400, "ValidationError", "No active Lifecycle Action found")

    place.machines.connect(refuse)
    place.launch(good(10)).to(50)
    assert "calve: the hook: ValidationError: No active" in place.console()
    assert place.machines.running("i-1")


def test_hooks_are_called_as_user_data_names_them(place):
    calls = []
    place.machines.connect(lambda action, form: calls.append((action, dict(form))))
    place.launch(good(70)).to(100)
    named = {"AutoScalingGroupName": "web", "LifecycleHookName": "up", "InstanceId": "i-1"}
    assert calls == [
        ("RecordLifecycleActionHeartbeat", named),
        ("CompleteLifecycleAction", {**named, "LifecycleActionResult": "CONTINUE"}),
    ]


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh", b"\xff", b"[]", b'{"calve": 1}', b"{}"])
def test_foreign_user_data_names_no_hook(place, data):
    assert calve_of(data) == {}
    calls = []
    place.machines.connect(lambda *call: calls.append(call))
    place.script = good(10)
    place.machines._report = None
    place.machines.launch(Launch("i-1", "ami-1", "t3.nano", data))
    place.to(50)
    assert calls == []


def test_a_script_may_refuse_the_launch(place):
    def refuse(_launch):
        raise CalveError("no room on this host")

    place.machines._script_of = refuse
    with pytest.raises(CalveError, match="no room"):
        place.launch(Script())
    assert not place.machines.running("i-1")


def test_one_good_check_makes_a_new_target_healthy_an_interval_later(place):
    place.launch(good(0)).to(5)
    place.balancer.add("i-1", ("10.0.0.1", 80))
    assert place.check() == Check()
    place.to(14)
    assert place.check() == Check()
    place.to(15)
    assert place.check() == Check(known=True, passing=True, code=200)


def test_thresholds_count_once_checks_have_failed(place):
    place.launch(Script(serves=((32, 200), (63, 500), (78, 200)))).to(5)
    place.balancer.add("i-1", ("10.0.0.1", 80))
    seen = []
    for second in range(5, 130):
        place.to(second)
        check = place.check()
        if not seen or seen[-1][1:] != (check.passing, check.code):
            seen.append((second, check.passing, check.code))
    assert seen == [
        (5, False, None),
        (35, False, 200),  # the first good one; two more are asked for
        (55, True, 200),
        (65, True, 500),
        (75, False, 500),  # the second bad one
        (85, False, 200),
        (105, True, 200),
    ]


def test_a_machine_that_dies_fails_its_checks_without_a_status(place):
    place.launch(dies_after(31, 0)).to(0.5)
    place.balancer.add("i-1", ("10.0.0.1", 80))
    place.to(31)
    assert place.check().passing
    place.to(60)
    assert place.check() == Check(known=True, passing=False, code=None)


def test_requests_of_a_drained_target_end_after_their_time():
    place = Place(drain_s=20.0)
    place.launch(good(0)).to(1)
    place.balancer.add("i-1", ("10.0.0.1", 80))
    place.to(30)
    assert place.check().connections == 0
    place.balancer.drain("i-1")
    assert place.check().connections == 1
    place.to(49)
    assert place.check().connections == 1
    place.to(50)
    assert place.check().connections == 0
    place.balancer.remove("i-1")
    place.balancer.remove("i-1")
    assert place.balancer.checks() == {}
    place.to(200)


def test_a_balancer_starts_once(place):
    with pytest.raises(ConflictError):
        place.balancer.start(HealthCheck())


def test_a_thousand_machines_cost_what_happens_to_them(place):
    looks = []
    place.clock.drive(lambda: looks.append(place.at_s))
    for number in range(1000):
        place.launch(serves_500(10 + number % 4), f"i-{number}")
    place.to(3600)
    assert len([one for one in place.told if one[2] is Result.CONTINUE]) == 1000
    assert len(looks) < 60


def test_nobody_looks_again_for_what_an_ended_machine_would_have_done(place):
    place.launch(good(40)).to(1)
    place.machines.terminate("i-1")
    looks = []
    place.clock.drive(lambda: looks.append(place.at_s))
    place.to(100)
    assert looks == [1, 100]


def test_close_ends_all_and_leaves_the_clock(place):
    place.launch(good(40)).to(10)
    for one in (place.machines, place.balancer):
        one.close()
        one.close()
    assert not place.machines.running("i-1")
    place.to(100)
    assert place.told == []
    place.launch(good(1)).to(200)
    assert place.told == []
