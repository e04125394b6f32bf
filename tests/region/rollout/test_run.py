"""Releases on a virtual clock: good ones come through, bad ones are taken back as soon as it can be known."""

import datetime as dt

import pytest

from calve.fleet import ends
from calve.fleet.verdict import Outcome
from calve.region.scripts import fails, good, panics, serves_500, silent
from calve.rollout.run import POLL_S


def test_a_good_release_is_released(place):
    place.scripts[2] = lambda _launch: good(20.0)
    verdict = place.rollout(place.release(2)).run()
    assert verdict.outcome is Outcome.RELEASED
    assert place.versions() == ["2", "2"]
    assert place.gateways.scaling.group("web").version == "2"
    assert ends.read(place.objects, "web", 2) == verdict


def test_a_release_that_cannot_boot_is_rolled_back_with_the_reason(place):
    place.scripts[2] = lambda _launch: fails("closure-incomplete", "lacks glibc", 15.0)
    verdict = place.rollout(place.release(2)).run()
    assert verdict.outcome is Outcome.ROLLED_BACK
    assert verdict.reason.rule == "release-fault"
    first = verdict.reason.failures[0]
    assert (first.code, first.message, first.phase) == ("closure-incomplete", "lacks glibc", "pull")
    assert any("lacks glibc" in line for line in first.lines)
    assert place.versions() == ["1", "1"]
    assert place.healthy() == 2
    assert first.instance in ends.logs(place.objects, "web", 2)


@pytest.mark.parametrize(
    ("script", "rule", "code"),
    [
        (lambda _launch: panics(), "release-fault", "kernel-panic"),
        (lambda _launch: silent(), "machine-faults", "silent"),
        (lambda _launch: serves_500(20.0), "release-fault", "wrong-answer"),
    ],
)
def test_other_bad_releases_are_rolled_back(place, script, rule, code):
    place.scripts[2] = script
    verdict = place.rollout(place.release(2)).run()
    assert verdict.outcome is Outcome.ROLLED_BACK
    assert (verdict.reason.rule, verdict.reason.failures[0].code) == (rule, code)
    assert place.versions() == ["1", "1"]


def test_the_rollback_is_called_within_two_rounds_of_the_evidence(place):
    place.scripts[2] = lambda _launch: fails("signature", "no signature", 15.0)
    place.rollout(place.release(2)).run()
    (rollback,) = place.said("rollback")
    launched = min(
        place.cloud.ec2.instances[one].launched_at
        for one in {fact.fields["instance"] for fact in place.said("machine")}
    )
    called = dt.datetime.fromisoformat(rollback.fields["at"]).timestamp()
    assert 15.0 <= called - launched <= 15.0 + 2 * POLL_S


def test_no_capacity_is_nobodys_fault(place):
    place.cloud.refuse(1, "We currently do not have sufficient t3.nano capacity")
    place.scripts[2] = lambda _launch: good(20.0)
    verdict = place.rollout(place.release(2)).run()
    assert verdict.outcome is Outcome.RELEASED
    assert place.said("refused")
