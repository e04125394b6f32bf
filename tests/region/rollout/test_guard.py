"""The guard takes over from an operator that is gone, and breaks loops outside rollouts."""

from dataclasses import replace
from pathlib import Path

import pytest

from calve.errors import AccessError, CancelledError, NotFoundError, TransientError
from calve.fleet import ends, history
from calve.fleet.config import Config
from calve.fleet.verdict import Outcome, Verdict
from calve.progress import Note
from calve.region.scripts import fails, good
from calve.rollout import on_lambda
from calve.rollout.guard import Guard
from calve.rollout.run import Host
from calve.tasks import Cancel


def guard_of(place, by="guard"):
    host = Host(by=by, progress=place.facts.append, clock=place.clock)
    return Guard(place.fleet, place.gateways, host)


def begun(place, release):
    """Start a rollout, and go away."""
    assert place.rollout(release).run(detach=True) is None


def rounds(place, guard, until, poll_s=5.0):
    cancel = Cancel()
    for _ in range(200):
        guard.round()
        if until():
            return
        cancel.wait(poll_s, place.clock)
    raise AssertionError("it never came to that")


def test_a_bad_release_whose_operator_is_gone_is_rolled_back(place):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)
    begun(place, place.release(2))
    rounds(place, guard_of(place), lambda: ends.read(place.objects, "web", 2) is not None)
    verdict = ends.read(place.objects, "web", 2)
    assert (verdict.outcome, verdict.by, verdict.reason.by) == (
        Outcome.ROLLED_BACK,
        "guard",
        "guard",
    )
    assert place.versions() == ["1", "1"]


class Denied:
    """A bucket that nobody may look into from some moment on; `ends_s` later they may again."""

    def __init__(self, place, begins_s, ends_s):
        self._place = place
        self._begins, self._ends = (place.clock.monotonic() + one for one in (begins_s, ends_s))

    def __getattr__(self, name):
        if self._begins <= self._place.clock.monotonic() < self._ends:
            raise AccessError("the token has expired")
        return getattr(self._place.objects, name)


@pytest.mark.parametrize("once", [False, True])
def test_a_guard_that_has_begun_outlives_what_it_is_denied_for_a_while(place, once):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 40.0)
    begun(place, place.release(2))
    cancel = Cancel()
    place.clock.drive(
        lambda: cancel.cancel() if ends.read(place.objects, "web", 2) is not None else None
    )
    host = Host(by="guard", progress=place.facts.append, clock=place.clock, cancel=cancel)
    gateways = replace(place.gateways, objects=Denied(place, 10.0, 60.0))
    guard = Guard(place.fleet, gateways, host)
    with pytest.raises(AccessError if once else CancelledError):
        guard.run(once=once)
    notes = [one.text for one in place.facts if isinstance(one, Note)]
    assert notes.count("could not look, trying again: the token has expired") == (not once)
    if not once:
        assert ends.read(place.objects, "web", 2).outcome is Outcome.ROLLED_BACK


@pytest.mark.parametrize("once", [False, True])
def test_a_guard_that_never_gets_an_answer_gives_up_after_a_quarter_of_an_hour(place, once):
    class Mute:
        def __getattr__(self, _name):
            raise TransientError("503")

    began = place.clock.monotonic()
    guard = Guard(
        place.fleet, replace(place.gateways, objects=Mute()), Host(by="guard", clock=place.clock)
    )
    with pytest.raises(TransientError):
        guard.run(once=once)
    assert 900 <= place.clock.monotonic() - began < 1000


def test_a_guard_that_may_not_look_at_all_says_so_at_once(place):
    gateways = replace(place.gateways, objects=Denied(place, 0.0, 60.0))
    with pytest.raises(AccessError):
        Guard(place.fleet, gateways, Host(by="guard", clock=place.clock)).run()


def test_a_good_one_gets_its_verdict(place):
    place.scripts[2] = lambda _launch: good(20.0)
    begun(place, place.release(2))
    rounds(place, guard_of(place), lambda: ends.read(place.objects, "web", 2) is not None)
    assert ends.read(place.objects, "web", 2).outcome is Outcome.RELEASED


def test_a_release_that_never_began_is_left_alone(place):
    place.release(2)
    assert guard_of(place).round() is False
    assert place.gateways.refreshes.newest("web") == ()


def test_two_judges_at_once_do_no_harm(place):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)
    release = place.release(2)
    begun(place, release)
    one, two = place.rollout(release, may_start=False), guard_of(place)
    rounds(place, two, lambda: (one.round(), ends.read(place.objects, "web", 2))[1] is not None)
    assert len(place.gateways.refreshes.newest("web", 10)) == 1
    assert ends.read(place.objects, "web", 2).outcome is Outcome.ROLLED_BACK


def released(place, number):
    place.scripts[number] = lambda _launch: good(20.0)
    assert place.rollout(place.release(number)).run().outcome is Outcome.RELEASED


def test_a_version_whose_machines_no_longer_come_up_is_pinned_back(place):
    verdict = Verdict("web", 1, Outcome.RELEASED, "", "cli", place.clock.now())
    ends.write(place.objects, verdict)
    released(place, 2)
    place.scripts[2] = lambda _launch: fails("cache-denied", "403", 5.0, hold_s=5.0)
    place.gateways.scaling._client.set_desired_capacity(
        AutoScalingGroupName="web", DesiredCapacity=3
    )
    guard = guard_of(place)
    rounds(place, guard, lambda: ends.tripped(place.objects, "web", 2) is not None, poll_s=30.0)
    reason = ends.tripped(place.objects, "web", 2)
    assert reason.rule == "breaker"
    assert len(reason.failures) == 3
    assert place.gateways.scaling.group("web").version == "1"
    place.until(lambda: place.healthy() == 3)
    assert place.versions() == ["1", "2", "2"]
    assert history.live(place.objects, "web").number == 1
    launched = len(place.machines.launches)
    rounds(place, guard, lambda: True)
    assert len(place.machines.launches) == launched


@pytest.mark.parametrize("left_ms", [900_000, 10_000])
def test_an_invocation_of_lambda_ends_in_time(place, left_ms):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)
    begun(place, place.release(2))

    class Context:
        def get_remaining_time_in_millis(self):
            return left_ms

    on_lambda.watch([guard_of(place, "lambda")], Context(), Host(clock=place.clock), [])
    verdict = ends.read(place.objects, "web", 2)
    assert (verdict is None) == (left_ms < 20_000)
    if verdict is not None:
        assert (verdict.outcome, verdict.by) == (Outcome.ROLLED_BACK, "lambda")


class Hours:
    """An invocation of Lambda that ends when a virtual clock says so."""

    def __init__(self, place, lasts_s):
        self._place, self._end = place, place.clock.monotonic() + lasts_s

    def get_remaining_time_in_millis(self):
        return round((self._end - self._place.clock.monotonic()) * 1000)


def test_an_invocation_that_aws_never_answers_fails_and_says_so(place):
    class Mute:
        def __getattr__(self, _name):
            raise TransientError("503")

    gateways = replace(place.gateways, objects=Mute())
    host = Host(by="lambda", progress=place.facts.append, clock=place.clock)
    with pytest.raises(TransientError):
        on_lambda.watch([Guard(place.fleet, gateways, host)], Hours(place, 60), host, [])
    assert any("no good answer" in getattr(one, "text", "") for one in place.facts)


def test_a_fleet_is_found_by_its_tag_and_one_without_a_group_is_an_error(place):
    place.gateways.scaling.tag("web", {"team": "shop"})
    shop = replace(place.fleet, name="shop", group="tag:team=shop")
    gone = replace(place.fleet, name="gone", group="tag:team=gone")
    config = Config(Path("calve.toml"), None, {"shop": shop, "gone": gone})
    for group, found in ((None, ["shop"]), ("web", ["shop"]), ("other", [])):
        failed = []
        event = {} if group is None else {"detail": {"AutoScalingGroupName": group}}
        fleets = list(on_lambda._meant(config, event, place.gateways, failed))
        assert [(one.name, one.group) for one in fleets] == [(name, "web") for name in found]
        assert [type(one) for one in failed] == [NotFoundError]
