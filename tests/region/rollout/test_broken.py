"""Rollouts among hostile machines, careless operators, a sick cloud and damaged records: the outcome stays true."""

import datetime as dt
import threading
from dataclasses import dataclass, fields, replace

import pytest

from calve.aws.elb import TargetHealth
from calve.aws.refreshes import Preferences
from calve.cache import roots
from calve.demo.virtual import VirtualFleet, Wanted, endpoint
from calve.errors import (
    AccessError,
    CalveError,
    ConflictError,
    DamagedError,
    NotFoundError,
    TransientError,
    UsageError,
)
from calve.fleet import ends, history, lock
from calve.fleet import release as releases
from calve.fleet.config import Strategy
from calve.fleet.release import Content
from calve.fleet.verdict import Outcome, Reason, Verdict
from calve.region.hooks import Result
from calve.region.scripts import Script, dies_after, evidence, fails, good, silent
from calve.rollout import on_lambda
from calve.rollout.deploy import begun
from calve.rollout.guard import Guard
from calve.rollout.judge import Rules
from calve.rollout.observe import Gateways
from calve.rollout.run import Host
from calve.tasks import Cancel


def wait(place, seconds):
    Cancel().wait(seconds, place.clock)


def host_of(place, by="cli"):
    return Host(by=by, clock=place.clock, progress=place.facts.append)


def guard_of(place):
    return Guard(place.fleet, place.gateways, host_of(place, "guard"))


def closure_of(number):
    name = "abcdfghijk"[number % 10] * 32
    return Content(f"/nix/store/{name}-nixos-system-web-{number}", f"{number:064x}", ("acme-1",))


def deploy(place, number, *, gateways=None, detach=False):
    with begun(
        closure_of(number),
        place.fleet,
        gateways or place.gateways,
        host_of(place),
        cache="s3://acme",
    ) as rollout:
        return rollout.run(detach=detach)


def released(place, number):
    """Have it on record that a release went well."""
    ends.write(
        place.objects, Verdict("web", number, Outcome.RELEASED, "", "cli", place.clock.now())
    )


def client(place):
    return place.gateways.scaling._client


class Broken:
    """Gateways of which calls fail: `faults` gives the error to raise for a gateway's and a method's name, or None."""

    def __init__(self, faults):
        self.calls = []
        self._faults = faults

    def of(self, real):
        return Gateways(
            **{one.name: _Proxy(self, one.name, getattr(real, one.name)) for one in fields(real)}
        )

    def call(self, gateway, name, method, arguments, options):
        self.calls.append((gateway, name))
        error = self._faults(gateway, name)
        if error is not None:
            raise error
        return method(*arguments, **options)


class _Proxy:
    def __init__(self, broken, gateway, real):
        self._broken, self._gateway, self._real = broken, gateway, real

    def __getattr__(self, name):
        found = getattr(self._real, name)
        if not callable(found):
            return found
        return lambda *arguments, **options: self._broken.call(
            self._gateway, name, found, arguments, options
        )


class Skewed:
    """A clock that goes wrong by so much."""

    def __init__(self, clock, seconds):
        self._clock, self._by = clock, dt.timedelta(seconds=seconds)

    def monotonic(self):
        return self._clock.monotonic()

    def now(self):
        return self._clock.now() + self._by

    def wait(self, event, seconds):
        return self._clock.wait(event, seconds)


# Hostile words


@dataclass(frozen=True)
class Story:
    """Lines that a failing machine says; the last one is a true failure."""

    lines: tuple[str, ...]

    def script(self, _launch):
        failure = evidence(15.0, "fail", code="signature", phase="pull", message="no signature")
        said = tuple((10.0, line) for line in self.lines)
        return Script(
            (*said, (15.0, failure)),
            result=(75.0, Result.ABANDON),
            beat_s=60.0,
            reports=(15.0,),
            off_at_s=76.0,
        )


@pytest.mark.parametrize(
    "lines",
    [
        ("\x00" * 600,) * 20,
        ("\U0001f480" * 400,) * 20,
        ("\x1b]0;owned\x07\x1b[2J" * 40,) * 20,
        ("\udc80\ufffd" * 300,) * 20,
    ],
    ids=["nul", "astral", "escapes", "broken"],
)
def test_words_of_any_letters_are_kept_and_read_again(place, lines):
    place.scripts[2] = Story(
        tuple(line.encode("utf-8", "replace").decode() for line in lines)
    ).script
    verdict = place.rollout(place.release(2)).run()
    assert verdict.outcome is Outcome.ROLLED_BACK
    assert verdict.reason.failures[0].code == "signature"
    assert ends.read(place.objects, "web", 2).reason == ends.read_reason(place.objects, "web", 2)


def test_a_report_that_is_too_long_blinds_nobody(place):
    place.scripts[2] = Story(("x" * 900,) * 100).script
    verdict = place.rollout(place.release(2)).run()
    assert verdict.outcome is Outcome.ROLLED_BACK
    assert verdict.reason.failures[0].code == "signature"  # the console has it too


@pytest.mark.parametrize(
    "fault",
    [
        {"code": {"a": ["b"]}, "message": {"c": 1}, "phase": 7},
        {"code": "c" * 300, "message": None},
        {"message": "m" * 300},
        {"code": None},
    ],
)
def test_fields_of_any_type_take_two_machines_and_are_kept(place, fault):
    line = evidence(15.0, "fail", **fault)
    place.scripts[2] = lambda _launch: Script(((15.0, line),), reports=(15.0,))
    verdict = place.rollout(place.release(2)).run()
    assert (verdict.outcome, verdict.reason.rule) == (Outcome.ROLLED_BACK, "machine-faults")
    assert len(verdict.reason.failures) == 2
    assert ends.read(place.objects, "web", 2) == verdict


# Machines of other versions


def test_old_machines_that_fail_are_not_the_releases_fault(fleets):
    with fleets(size=(4, 4, 8)) as place:
        place.scripts[2] = lambda _launch: good(100.0)
        release = place.release(2)
        assert place.rollout(release).run(detach=True) is None
        wait(place, 10)
        old = [
            one.id for one in place.gateways.scaling.group("web").instances if one.version == "1"
        ]
        for one in old[:3]:
            place.machines.kill(one)
        verdict = place.rollout(release).run()
        assert verdict.outcome is Outcome.RELEASED
        assert place.versions() == ["2"] * 4


def test_a_release_that_mends_a_sick_fleet_is_let_through(fleets):
    with fleets(size=(3, 3, 6)) as place:
        old = [one.id for one in place.gateways.scaling.group("web").instances]
        wait(place, 120)
        place.scripts[2] = lambda _launch: good(60.0)
        release = place.release(2)
        assert place.rollout(release).run(detach=True) is None
        for one in old:
            machine = place.machines._machines[one]
            place.machines._serve(machine, 500)
        verdict = place.rollout(release).run()
        assert verdict.outcome is Outcome.RELEASED


# Records


def test_a_detached_release_that_went_well_is_not_called_cancelled(place):
    place.scripts[2] = place.scripts[3] = lambda _launch: good(20.0)
    released(place, 1)
    assert deploy(place, 2, detach=True) is None
    place.until(lambda: not place.gateways.refreshes.newest("web")[0].active)
    assert deploy(place, 3).outcome is Outcome.RELEASED
    assert ends.read(place.objects, "web", 2).outcome is Outcome.RELEASED


def test_a_detached_release_that_failed_has_awss_reason(place):
    place.scripts[2] = lambda _launch: silent()
    place.scripts[3] = lambda _launch: good(20.0)
    released(place, 1)
    assert deploy(place, 2, detach=True) is None
    place.gateways.refreshes.rollback("web")
    place.until(lambda: not place.gateways.refreshes.newest("web")[0].active)
    assert deploy(place, 3).outcome is Outcome.RELEASED
    assert ends.read(place.objects, "web", 2).outcome is Outcome.ROLLED_BACK


def test_after_many_bad_releases_the_live_one_keeps_its_root(place):
    released(place, 1)
    history.keep(place.objects, "web", place.clock.now())
    for number in range(2, 26):
        place.release(number)
        ends.write(
            place.objects,
            Verdict("web", number, Outcome.ROLLED_BACK, "", "cli", place.clock.now()),
        )
        history.keep(place.objects, "web", place.clock.now())
    assert history.live(place.objects, "web").number == 1
    assert roots.read_root(place.objects, "fleet", "web.00000001") is not None


def test_a_gap_of_millions_of_numbers_costs_nothing(place):
    far = replace(releases.read(place.objects, "web", 1), number=99_000_000)
    place.objects.put(far.key, far.dump())
    broken = Broken(lambda _gateway, _name: None)
    objects = broken.of(place.gateways).objects
    assert [one.release.number for one in history.recent(objects, "web")] == [99_000_000, 1]
    assert len(broken.calls) < 10


def test_a_live_release_whose_record_was_removed_does_not_stop_the_fleet(place):
    released(place, 1)
    place.release(2)
    released(place, 2)
    place.release(3)
    ends.write(place.objects, Verdict("web", 3, Outcome.ROLLED_BACK, "", "cli", place.clock.now()))
    place.objects.delete("fleets/web/releases/00000002.json")
    assert history.live(place.objects, "web").number == 1


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"{", DamagedError), (b'{"version":2}', UsageError), (b"x" * 70_000, DamagedError)],
)
@pytest.mark.parametrize("name", ["verdict", "reason"])
def test_a_damaged_record_is_named(place, name, data, error):
    key = f"fleets/web/releases/00000001/{name}.json"
    place.objects.put(key, data)
    read = {"verdict": ends.read, "reason": ends.read_reason}[name]
    with pytest.raises(error) as caught:
        read(place.objects, "web", 1)
    assert caught.value.place.endswith(key)


def test_a_version_of_an_earlier_life_is_not_rolled_out(place):
    """The bucket's records were wiped, the launch template was not: numbers come again."""
    data = place.gateways.ec2.version(place.template, 1).user_data
    other = data.replace(f"{1:064x}".encode(), f"{9:064x}".encode())
    place.gateways.ec2.create_version(
        place.template, source=1, description="calve web release 2", user_data=other
    )
    place.scripts[2] = lambda _launch: good(20.0)
    assert place.rollout(place.release(2)).run().outcome is Outcome.RELEASED
    assert place.versions() == ["3", "3"]


# The lock


def test_a_lock_that_cannot_be_given_back_hides_no_outcome(place):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)
    broken = Broken(
        lambda gateway, name: (
            TransientError("503") if (gateway, name) == ("objects", "delete") else None
        )
    )
    verdict = deploy(place, 2, gateways=broken.of(place.gateways))
    assert verdict.outcome is Outcome.ROLLED_BACK
    wait(place, lock.LASTS_S)
    assert lock.read(place.objects, "web", place.clock.now()) is None


# The breaker


@pytest.mark.parametrize("skew_s", [0, -600, 600])
def test_the_breaker_trips_one_release_alone(place, skew_s):
    released(place, 1)
    for number in (2, 3):
        place.scripts[number] = lambda _launch: good(20.0)
        assert place.rollout(place.release(number)).run().outcome is Outcome.RELEASED
    place.scripts[2] = lambda _launch: good(100.0)
    place.scripts[3] = lambda _launch: fails("cache-denied", "403", 5.0, hold_s=5.0)
    client(place).set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=3)
    host = replace(host_of(place, "guard"), clock=Skewed(place.clock, skew_s))
    guard = Guard(place.fleet, place.gateways, host)
    for _ in range(20):
        guard.round()
        wait(place, 20)
    assert place.gateways.scaling.group("web").version == "2"
    assert ends.tripped(place.objects, "web", 3) is not None
    assert ends.tripped(place.objects, "web", 2) is None
    assert place.healthy() == 3


def test_the_breaker_trips_beside_a_release_that_never_began(place):
    released(place, 1)
    place.scripts[2] = lambda _launch: good(20.0)
    assert place.rollout(place.release(2)).run().outcome is Outcome.RELEASED
    place.release(3)
    place.scripts[2] = lambda _launch: fails("cache-denied", "403", 5.0, hold_s=5.0)
    client(place).set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=3)
    guard = guard_of(place)
    for _ in range(10):
        guard.round()
        wait(place, 20)
    assert place.gateways.scaling.group("web").version == "1"


# Lambda


def test_one_fleet_without_its_group_does_not_leave_the_others_unguarded(place):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)
    release = place.release(2)
    assert place.rollout(release).run(detach=True) is None
    gone = Guard(
        replace(place.fleet, name="api", group="api"), place.gateways, host_of(place, "lambda")
    )

    class Context:
        def get_remaining_time_in_millis(self):
            return 900_000

    with pytest.raises(NotFoundError):
        on_lambda.watch([gone, guard_of(place)], Context(), Host(clock=place.clock), [])
    assert ends.read(place.objects, "web", 2).outcome is Outcome.ROLLED_BACK


# Whose hands are in it


def begin(place, script):
    place.scripts[2] = lambda _launch: script
    release = place.release(2)
    assert place.rollout(release).run(detach=True) is None
    wait(place, 10)
    return release


def members(place, version):
    group = place.gateways.scaling.group("web")
    return [one.id for one in group.instances if one.version == version]


@pytest.mark.parametrize("desired", [1, 6])
def test_a_policy_that_scales_in_the_middle_changes_nothing(fleets, desired):
    with fleets(size=(1, 4, 8)) as place:
        release = begin(place, good(30.0))
        client(place).set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=desired)
        verdict = place.rollout(release).run()
        assert verdict.outcome is Outcome.RELEASED
        place.until(lambda: place.versions() == ["2"] * desired)


def test_two_machines_that_somebody_terminates_are_replaced(fleets):
    with fleets(size=(4, 4, 8)) as place:
        release = begin(place, good(30.0))
        place.gateways.ec2.terminate(members(place, "1")[:2])
        wait(place, 25)
        place.gateways.ec2.terminate(members(place, "2")[:2])
        assert place.rollout(release).run().outcome is Outcome.RELEASED
        assert place.versions() == ["2"] * 4


def test_a_cancel_at_the_console_and_another_refresh_right_after(place):
    release = begin(place, good(30.0))
    place.gateways.refreshes.cancel("web")
    place.until(lambda: not place.gateways.refreshes.newest("web")[0].active)
    place.gateways.refreshes.start(
        "web", template_id=place.template, version=1, preferences=Preferences()
    )
    verdict = place.rollout(release).run()
    assert (verdict.outcome, verdict.reason.by) == (Outcome.CANCELLED, "aws")
    assert verdict.refresh == place.gateways.refreshes.newest("web", 2)[1].id


def test_a_rollback_at_the_console_has_awss_reason(place):
    release = begin(place, good(30.0))
    place.gateways.refreshes.rollback("web")
    verdict = place.rollout(release).run()
    assert (verdict.outcome, verdict.reason.rule) == (Outcome.ROLLED_BACK, "aws")
    assert "user request" in verdict.reason.text


def test_without_launches_aws_gives_up_after_its_hour(place):
    client(place).suspend_processes(AutoScalingGroupName="web", ScalingProcesses=["Launch"])
    release = begin(place, good(30.0))
    client(place).suspend_processes(AutoScalingGroupName="web", ScalingProcesses=["Launch"])
    verdict = place.rollout(release).run()
    assert verdict.outcome in {Outcome.ROLLED_BACK, Outcome.ROLLBACK_FAILED, Outcome.FAILED}
    assert verdict.reason.by == "aws"
    assert place.healthy() == 2


def test_without_launches_a_timeout_gives_up(place):
    client(place).suspend_processes(AutoScalingGroupName="web", ScalingProcesses=["Launch"])
    release = begin(place, good(30.0))
    client(place).suspend_processes(AutoScalingGroupName="web", ScalingProcesses=["Launch"])
    verdict = place.rollout(release, rules=Rules(timeout_s=300)).run()
    assert (verdict.outcome, verdict.reason.rule) == (Outcome.ROLLED_BACK, "timeout")


def test_a_group_that_is_deleted_ends_it_and_gives_the_lock_back(place):
    place.scripts[2] = lambda _launch: good(60.0)
    at = {"start": 0}

    def faults(_gateway, name):
        at["start"] += name == "start" or bool(at["start"])
        if at["start"] == 20:
            place.gateways.scaling.delete_group("web", force=True)
            place.until(lambda: not place.cloud.autoscaling.groups)

    with pytest.raises(NotFoundError):
        deploy(place, 2, gateways=Broken(faults).of(place.gateways))
    assert lock.read(place.objects, "web", place.clock.now()) is None
    with pytest.raises(NotFoundError):
        guard_of(place).round()


def test_a_rollback_that_is_refused_is_told_once_and_the_end_is_true(place):
    release = begin(place, fails("signature", "no signature", 15.0))
    place.scripts[2] = lambda _launch: good(20.0)  # the group tries again, and now it works
    refused = ConflictError("IrreversibleInstanceRefresh: CloudFormation's")
    broken = Broken(lambda _gateway, name: refused if name == "rollback" else None)
    rollout = place.rollout(release)
    rollout._gateways = broken.of(place.gateways)
    verdict = rollout.run()
    assert verdict.outcome is Outcome.RELEASED
    assert ends.read_reason(place.objects, "web", 2).rule == "release-fault"
    notes = [one for one in place.facts if "rollback was not taken" in getattr(one, "text", "")]
    assert len(notes) == 1
    assert broken.calls.count(("refreshes", "rollback")) > 3


def test_a_rollback_that_is_refused_is_tried_once_a_round_where_no_reason_can_be_kept(place):
    release = begin(place, fails("signature", "no signature", 15.0))
    place.scripts[2] = lambda _launch: good(20.0)

    def faults(gateway, name):
        if name == "rollback":
            return ConflictError("IrreversibleInstanceRefresh: CloudFormation's")
        return AccessError("denied") if (gateway, name) == ("objects", "put") else None

    broken = Broken(faults)
    rollout = place.rollout(release)
    rollout._gateways = broken.of(place.gateways)
    began = place.clock.monotonic()
    with pytest.raises(AccessError):  # of the verdict, at last
        rollout.run()
    rounds = (place.clock.monotonic() - began) / 5
    assert 3 < broken.calls.count(("refreshes", "rollback")) <= rounds


def test_housekeeping_that_fails_hides_no_outcome(place):
    release = begin(place, good(20.0))
    broken = Broken(
        lambda gateway, name: (
            DamagedError("roots") if (gateway, name) == ("objects", "list") else None
        )
    )
    rollout = place.rollout(release)
    rollout._gateways = broken.of(place.gateways)
    assert rollout.run().outcome is Outcome.RELEASED
    assert [one.fields["outcome"] for one in place.said("verdict")] == ["released"]
    assert any("was not renewed" in getattr(one, "text", "") for one in place.facts)


def test_a_reason_of_an_earlier_refresh_is_neither_told_nor_followed(place):
    release = place.release(2)
    old = Reason("operator", "long ago", (), "operator", place.clock.now())
    ends.write_reason(place.objects, "web", 2, old)
    wait(place, 3600)
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)
    verdict = place.rollout(release).run()
    assert (verdict.outcome, verdict.reason.rule) == (Outcome.ROLLED_BACK, "release-fault")
    assert [one.fields["rule"] for one in place.said("rollback")] == ["release-fault"]
    assert list(ends.logs(place.objects, "web", 2))


def test_a_machine_s_time_begins_with_its_launch_whoever_looks(place):
    release = begin(place, silent())
    wait(place, 100)
    rollout = place.rollout(release)
    rollout.round()
    _, seen = rollout._look()
    born = place.cloud.ec2.instances
    assert len(seen.machines) == 2
    assert all(abs(one.first_s - born[one.id].launched_at) <= 1 for one in seen.machines)
    assert all(seen.at_s - one.first_s > 90 for one in seen.machines)


# A sick cloud


class Window:
    """Faults of some gateways from now on, for so long."""

    def __init__(self, place, error, seconds, gateways=()):
        self._place, self._error, self._gateways = place, error, gateways
        self._end = place.clock.monotonic() + seconds

    def __call__(self, gateway, _name):
        ill = self._place.clock.monotonic() < self._end
        return self._error if ill and (not self._gateways or gateway in self._gateways) else None


def under(place, release, faults):
    rollout = place.rollout(release)
    rollout._gateways = Broken(faults).of(place.gateways)
    return rollout


@pytest.mark.parametrize("seconds", [60, 300])
@pytest.mark.parametrize("gateways", [("objects",), ("scaling", "refreshes", "ec2", "elb"), ()])
def test_minutes_without_a_good_answer_are_borne(place, seconds, gateways):
    release = begin(place, fails("signature", "no signature", 15.0))
    ill = Window(place, TransientError("503"), seconds, gateways)
    verdict = under(place, release, ill).run()
    assert verdict.outcome is Outcome.ROLLED_BACK
    assert place.versions() == ["1", "1"]


@pytest.mark.parametrize("follow", [False, True])
def test_a_quarter_of_an_hour_without_an_answer_is_too_long(place, follow):
    release = begin(place, good(20.0))
    rollout = under(place, release, Window(place, TransientError("503"), 2000))
    with pytest.raises(TransientError):
        rollout.follow() if follow else rollout.run()


def test_who_only_watches_bears_it_too(place):
    release = begin(place, good(20.0))
    watching = under(place, release, Window(place, TransientError("503"), 300))
    guard = guard_of(place)
    undo = place.clock.drive(lambda: None)
    wait(place, 60)
    guard.round()
    guard.round()
    undo()
    assert watching.follow().outcome is Outcome.RELEASED


def test_who_only_watches_does_not_wait_for_ever(place):
    never = place.release(2)
    with pytest.raises(ConflictError, match="never started"):
        place.rollout(never, may_start=False).follow()
    place.scripts[2] = lambda _launch: good(20.0)
    assert place.rollout(never).run(detach=True) is None
    with pytest.raises(ConflictError, match="nobody has written the verdict"):
        place.rollout(never, may_start=False).follow()


def test_access_that_is_lost_and_comes_back(place):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)
    calls = {"n": 0}

    def faults(gateway, name):
        calls["n"] += name == "start" or bool(calls["n"])
        return AccessError("ExpiredToken") if calls["n"] > 10 and gateway != "objects" else None

    with pytest.raises(AccessError):
        deploy(place, 2, gateways=Broken(faults).of(place.gateways))
    assert lock.read(place.objects, "web", place.clock.now()) is None
    assert ends.read(place.objects, "web", 2) is None
    guard = guard_of(place)
    for _ in range(60):
        guard.round()
        wait(place, 5)
    verdict = ends.read(place.objects, "web", 2)
    assert (verdict.outcome, verdict.by) == (Outcome.ROLLED_BACK, "guard")


class Late:
    """A gateway to refreshes that does not list a new one at first."""

    def __init__(self, real):
        self._real, self.hidden, self.started = real, 3, 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def start(self, group, **options):
        self.started += 1
        return self._real.start(group, **options)

    def newest(self, group, most=1):
        if self.started and self.hidden:
            self.hidden -= 1
            return ()
        return self._real.newest(group, most)


def test_a_refresh_that_is_not_listed_yet_is_waited_for(place):
    place.scripts[2] = lambda _launch: good(20.0)
    late = Late(place.gateways.refreshes)
    verdict = deploy(place, 2, gateways=replace(place.gateways, refreshes=late))
    assert verdict.outcome is Outcome.RELEASED
    assert late.started > 1
    assert len(place.gateways.refreshes.newest("web", 10)) == 1


def test_somebody_elses_refresh_that_began_a_moment_before_is_a_conflict(place):
    release = place.release(2)
    rollout = place.rollout(release)

    def faults(_gateway, name):
        if name == "start":
            place.gateways.refreshes.start(
                "web",
                template_id=place.template,
                version=1,
                preferences=Preferences(skip_matching=False),
            )

    rollout._gateways = Broken(faults).of(place.gateways)
    with pytest.raises(ConflictError, match="another instance refresh"):
        rollout.run()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("ec2", "console"), CalveError("UnsupportedOperation: no Latest for this type")),
        (("elb", "health"), NotFoundError("TargetGroupNotFound")),
    ],
)
def test_without_consoles_or_a_target_group_it_goes_on(place, call, error):
    release = begin(place, fails("signature", "no signature", 15.0))
    verdict = under(place, release, lambda *named: error if named == call else None).run()
    assert verdict.outcome is Outcome.ROLLED_BACK


def test_words_that_cannot_be_kept_do_not_stop_the_verdict(place):
    release = begin(place, fails("signature", "no signature", 15.0))
    puts = []

    def faults(gateway, name):
        puts.append((gateway, name))
        second = puts.count(("objects", "put")) == 2
        return AccessError("denied") if second and (gateway, name) == ("objects", "put") else None

    assert under(place, release, faults).run().outcome is Outcome.ROLLED_BACK
    assert any("what it said is lost" in getattr(one, "text", "") for one in place.facts)


def test_the_breaker_trips_without_consoles(place):
    released(place, 1)
    place.scripts[2] = lambda _launch: good(20.0)
    assert place.rollout(place.release(2)).run().outcome is Outcome.RELEASED
    place.scripts[2] = lambda _launch: fails("cache-denied", "403", 5.0, hold_s=5.0)
    client(place).set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=3)
    broken = Broken(lambda _gateway, name: AccessError("denied") if name == "console" else None)
    guard = Guard(place.fleet, broken.of(place.gateways), host_of(place, "guard"))
    for _ in range(10):
        guard.round()
        wait(place, 20)
    assert place.gateways.scaling.group("web").version == "1"


# Numbers


def test_one_machine_of_two_hundred_is_nobodys_fault(fleets):
    with fleets(size=(200, 200, 400)) as place:
        ill = {"left": 1}

        def script(_launch):
            ill["left"] -= 1
            if ill["left"] == 0:
                return fails("disk-fault", "I/O error", 5.0, hold_s=5.0)
            return good(20.0)

        place.scripts[2] = script
        assert place.rollout(place.release(2)).run().outcome is Outcome.RELEASED
        assert place.versions() == ["2"] * 200


def test_a_thousand_machines_that_fail_at_once_cost_a_bounded_round(fleets):
    with fleets(size=(1000, 1000, 2000), console_lag_s=600.0, report_lag_s=600.0) as place:
        place.scripts[2] = lambda _launch: fails("disk-fault", "x" * 300, 15.0)
        release = place.release(2)
        assert place.rollout(release).run(detach=True) is None
        wait(place, 30)
        assert len(place.machines.launches) == 2000
        rollout = place.rollout(release)
        broken = Broken(lambda _gateway, _name: None)
        rollout._gateways = broken.of(place.gateways)
        rollout.round()
        first, broken.calls[:] = tuple(broken.calls), []
        rollout.round()
        assert len(first) <= 50
        assert len(broken.calls) <= 50
        assert sum(name == "console" for _, name in broken.calls) <= 4


# Shapes of fleets


def test_one_machine_whose_health_flaps_is_not_enough(fleets):
    with fleets(size=(3, 3, 6)) as place:
        place.fleet = replace(place.fleet, rollout=replace(place.fleet.rollout, bake_s=200))
        serves = tuple((18.0 + 30.0 * at, 500 if at % 2 else 200) for at in range(9))
        first = []

        def script(launch):
            first.append(launch.instance_id)
            return replace(good(20.0), serves=serves) if len(first) == 1 else good(20.0)

        place.scripts[2] = script
        assert place.rollout(place.release(2)).run().outcome is Outcome.RELEASED


def test_slow_machines_have_their_time(place):
    place.fleet = replace(place.fleet, health=replace(place.fleet.health, within_s=180))
    place.scripts[2] = lambda _launch: good(170.0)
    assert place.rollout(place.release(2)).run().outcome is Outcome.RELEASED


@pytest.mark.parametrize("size", [(1, 1, 2), (2, 2, 4), (5, 5, 10)])
def test_what_turns_bad_while_it_bakes_is_rolled_back(fleets, size):
    with fleets(size=size) as place:
        place.fleet = replace(place.fleet, rollout=replace(place.fleet.rollout, bake_s=300))
        place.scripts[2] = lambda _launch: replace(good(20.0), serves=((18.0, 200), (100.0, 500)))
        verdict = place.rollout(place.release(2)).run()
        assert (verdict.outcome, verdict.reason.rule) == (Outcome.ROLLED_BACK, "release-fault")
        assert place.versions() == ["1"] * size[0]


def test_a_canary_that_turns_bad_in_its_pause_costs_one_machine(fleets):
    with fleets(size=(4, 4, 8)) as place:
        bounds = replace(place.fleet.rollout, strategy=Strategy.CANARY, canary_s=300)
        place.fleet = replace(place.fleet, rollout=bounds)
        place.scripts[2] = lambda _launch: replace(good(20.0), serves=((18.0, 200), (80.0, 500)))
        verdict = place.rollout(place.release(2)).run()
        assert (verdict.outcome, verdict.reason.rule) == (Outcome.ROLLED_BACK, "release-fault")
        assert len(verdict.reason.failures) == 1


def test_what_dies_in_its_warm_up_is_rolled_back(fleets):
    with fleets(size=(2, 2, 4)) as place:
        place.fleet = replace(place.fleet, rollout=replace(place.fleet.rollout, warmup_s=120))
        place.scripts[2] = lambda _launch: dies_after(60.0, 20.0)
        verdict = place.rollout(place.release(2)).run()
        assert verdict.outcome is Outcome.ROLLED_BACK


@pytest.mark.parametrize("bad", [False, True])
def test_a_group_of_one_is_never_without_its_machine(fleets, bad):
    with fleets(size=(1, 1, 2)) as place:
        script = fails("signature", "no signature", 15.0) if bad else good(20.0)
        place.scripts[2] = lambda _launch: script
        least = []
        undo = place.clock.drive(lambda: least.append(place.serving()))
        verdict = place.rollout(place.release(2)).run()
        undo()
        assert verdict.outcome is (Outcome.ROLLED_BACK if bad else Outcome.RELEASED)
        assert min(least) == 1


@pytest.mark.parametrize("bad", [False, True])
def test_a_fleet_without_a_hook_and_without_health_rules(fleets, bad):
    with fleets(hook=False) as place:
        place.fleet = replace(place.fleet, health=None)
        script = fails("signature", "no signature", 15.0) if bad else good(20.0)
        place.scripts[2] = lambda _launch: replace(script, result=None, beat_s=None)
        verdict = place.rollout(place.release(2)).run()
        assert verdict.outcome is (Outcome.ROLLED_BACK if bad else Outcome.RELEASED)
        assert place.healthy() == 2


class NoTargets(VirtualFleet):
    """A fleet without a target group."""

    def _create(self):
        real = self.gateways.scaling

        class Scaling:
            def __getattr__(self, name):
                return getattr(real, name)

            def create_group(self, name, **options):
                real.create_group(name, **{**options, "target_groups": ()})

        self.gateways = replace(self.gateways, scaling=Scaling())
        super()._create()
        self.gateways = replace(self.gateways, scaling=real)

    def serving(self):
        (group,) = self.cloud.autoscaling.groups.values()
        return sum(one.lifecycle.value == "InService" for one in group.instances.values())


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_without_a_target_group(tmp_path, bad, hook):
    with endpoint() as served, NoTargets(tmp_path, served, Wanted(hook=hook)) as place:
        script = fails("signature", "no signature", 2.0) if bad else good(20.0)
        place.fleet = replace(place.fleet, rollout=replace(place.fleet.rollout, bake_s=60))
        place.scripts[2] = lambda _launch: script
        verdict = place.rollout(place.release(2)).run()
        assert verdict.outcome is (Outcome.ROLLED_BACK if bad else Outcome.RELEASED)
        assert place.versions() == ["1" if bad else "2"] * 2


class SecondTargets:
    """A gateway to the balancer by which a second target group finds all of a version's machines ill."""

    def __init__(self, place):
        self._place, self._real = place, place.gateways.elb

    def health(self, arn):
        if arn != "second":
            return self._real.health(arn)
        ill = ("unhealthy", "Target.ResponseCodeMismatch", None)
        return tuple(TargetHealth(one, *ill) for one in members(self._place, "2"))


def test_what_one_of_two_target_groups_finds_ill_is_ill(place):
    real = place.gateways.scaling

    class Scaling:
        def __getattr__(self, name):
            return getattr(real, name)

        def group(self, name):
            found = real.group(name)
            return replace(found, target_groups=(*found.target_groups, "second"))

    place.fleet = replace(place.fleet, rollout=replace(place.fleet.rollout, bake_s=120))
    place.scripts[2] = lambda _launch: good(20.0)
    rollout = place.rollout(place.release(2))
    rollout._gateways = replace(place.gateways, scaling=Scaling(), elb=SecondTargets(place))
    verdict = rollout.run()
    assert (verdict.outcome, verdict.reason.failures[0].code) == (
        Outcome.ROLLED_BACK,
        "wrong-answer",
    )


def test_a_group_of_nothing_is_refused_and_can_be_tried_again(fleets):
    with fleets(size=(0, 0, 4)) as place:
        place.scripts[2] = lambda _launch: good(20.0)
        with pytest.raises(CalveError):
            deploy(place, 2)
        client(place).set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=1)
        place.until(lambda: place.healthy() == 1)
        assert deploy(place, 2).outcome is Outcome.RELEASED
        assert releases.listed(place.objects, "web").latest == 2


def test_a_rollback_may_take_an_hour(place):
    release = begin(place, fails("signature", "no signature", 15.0))
    place.until(lambda: len(place.machines.launches) == 4)
    place.scripts[1] = lambda _launch: good(3000.0)
    place.gateways.ec2.terminate(members(place, "1"))
    verdict = place.rollout(release).run()
    assert verdict.outcome is Outcome.ROLLED_BACK
    assert place.healthy() == 2


# Many at once


def test_three_judges_in_threads_come_to_one_end(place):
    release = begin(place, fails("signature", "no signature", 15.0))
    found = []

    def judge(by):
        found.append(place.rollout(release, by=by, may_start=False).run())

    threads = [threading.Thread(target=judge, args=(by,)) for by in ("guard", "lambda")]
    for one in threads:
        one.start()
    judge("cli")
    for one in threads:
        one.join(60)
    assert len(found) == 3
    assert len({one.dump() for one in found}) == 1
    assert found[0].outcome is Outcome.ROLLED_BACK
    assert len(place.gateways.refreshes.newest("web", 10)) == 1


def test_who_loses_the_lock_to_a_fast_clock_goes_on_as_a_judge(place):
    place.scripts[2] = place.scripts[3] = lambda _launch: good(120.0)
    seen = []

    def faults(_gateway, name):
        if name == "start":
            seen.append(name)
        if name != "activities" or len(seen) != 1:
            return
        seen.append(name)
        with pytest.raises(ConflictError, match="release 2 is being rolled out"):
            host = replace(host_of(place), clock=Skewed(place.clock, 600))
            with begun(closure_of(3), place.fleet, place.gateways, host, cache="s3://acme"):
                raise AssertionError("it took the lock for its own")

    verdict = deploy(place, 2, gateways=Broken(faults).of(place.gateways))
    assert verdict.outcome is Outcome.RELEASED
    assert any("goes on as a judge" in getattr(one, "text", "") for one in place.facts)
    assert len(place.gateways.refreshes.newest("web", 10)) == 1
    assert releases.listed(place.objects, "web").latest == 2


def test_a_lock_of_another_make_is_named(place):
    for data, error in ((b"{", DamagedError), (b'{"version":2}', UsageError)):
        place.objects.put("fleets/web/lock.json", data)
        with pytest.raises(error) as caught:
            deploy(place, 2)
        assert caught.value.place.endswith("fleets/web/lock.json")


# What a round costs


def test_a_quiet_round_asks_little(fleets):
    with fleets(size=(4, 4, 8)) as place:
        released(place, 1)
        broken = Broken(lambda _gateway, _name: None)
        guard = Guard(place.fleet, broken.of(place.gateways), host_of(place, "guard"))
        guard.round()
        assert sorted(broken.calls) == [
            ("objects", "list"),
            ("refreshes", "newest"),
            ("scaling", "activities"),
        ]


def test_a_bucket_that_takes_nothing_does_not_keep_a_bad_release_up(place):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)

    def faults(gateway, name):
        if (gateway, name) == ("objects", "put") and place.said("refresh"):
            raise CalveError("the disk is full")

    with pytest.raises(CalveError, match="the disk is full"):
        deploy(place, 2, gateways=Broken(faults).of(place.gateways))
    assert any("could not be kept" in getattr(one, "text", "") for one in place.facts)
    place.until(lambda: place.gateways.refreshes.newest("web")[0].status == "RollbackSuccessful")
    assert place.versions() == ["1", "1"]
    assert deploy(place, 2).outcome is Outcome.ROLLED_BACK
