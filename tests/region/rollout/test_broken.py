"""Rollouts among hostile machines, careless operators, a sick cloud and damaged records: the outcome stays true."""

import json
from dataclasses import dataclass, fields, replace

import pytest

from calve.cache import roots
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
from calve.fleet.verdict import Outcome, Reason, Verdict
from calve.region.hooks import Result
from calve.region.scripts import Script, evidence, fails, good, panics, serves_500, silent
from calve.rollout import on_lambda
from calve.rollout.deploy import begun
from calve.rollout.guard import Guard
from calve.rollout.observe import Gateways
from calve.rollout.run import Host, description
from calve.rollout.start import Closure
from calve.tasks import Cancel


def wait(place, seconds):
    Cancel().wait(seconds, place.clock)


def host_of(place, by="cli"):
    return Host(by=by, clock=place.clock, progress=place.facts.append)


def guard_of(place):
    return Guard(place.fleet, place.gateways, host_of(place, "guard"))


def closure_of(number):
    name = "abcdfghijk"[number % 10] * 32
    return Closure(f"/nix/store/{name}-nixos-system-web-{number}", f"{number:064x}", ("acme-1",))


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


def test_the_breaker_trips_one_release_alone(place):
    released(place, 1)
    for number in (2, 3):
        place.scripts[number] = lambda _launch: good(20.0)
        assert place.rollout(place.release(number)).run().outcome is Outcome.RELEASED
    place.scripts[2] = lambda _launch: good(100.0)
    place.scripts[3] = lambda _launch: fails("cache-denied", "403", 5.0, hold_s=5.0)
    client(place).set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=3)
    guard = guard_of(place)
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
        on_lambda.watch([gone, guard_of(place)], Context(), place.clock)
    assert ends.read(place.objects, "web", 2).outcome is Outcome.ROLLED_BACK
