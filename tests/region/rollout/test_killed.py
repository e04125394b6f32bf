"""The operator is killed before and after every call it makes; the same command again converges."""

import itertools
from dataclasses import fields

import pytest

from calve.fleet import ends, lock
from calve.fleet import release as releases
from calve.fleet.release import Content
from calve.fleet.verdict import Outcome
from calve.region.scripts import fails, good
from calve.rollout.deploy import begun
from calve.rollout.observe import Gateways
from calve.rollout.run import Host

CLOSURE = Content("/nix/store/" + "b" * 32 + "-nixos-system-web-2", f"{2:064x}", ("acme-1",))


class Killed(BaseException):
    """What no handler of ours catches: nothing of the run goes on."""


class Recorder:
    """Counts the calls of all gateways; at one of them the operator dies, and every later call finds it dead.

    Args:
        at: the call's number, and whether it dies `before` or `after` it is carried out; None for never.
    """

    def __init__(self, at=None):
        self.calls = []
        self._at = at
        self._dead = False

    def gateways(self, real):
        return Gateways(**{one.name: _Proxy(self, getattr(real, one.name)) for one in fields(real)})

    def call(self, name, method, arguments, options):
        if self._dead:
            raise Killed
        self.calls.append(name)
        mine = self._at is not None and len(self.calls) - 1 == self._at[0]
        if mine and self._at[1] == "before":
            self._die()
        try:
            return method(*arguments, **options)
        finally:
            if mine:
                self._die()

    def _die(self):
        self._dead = True
        raise Killed


class _Proxy:
    def __init__(self, recorder, real):
        self._recorder, self._real = recorder, real

    def __getattr__(self, name):
        found = getattr(self._real, name)
        if not callable(found):
            return found
        return lambda *arguments, **options: self._recorder.call(name, found, arguments, options)


def deploy(place, recorder):
    host = Host(clock=place.clock, progress=place.facts.append)
    with begun(
        CLOSURE, place.fleet, recorder.gateways(place.gateways), host, cache="s3://acme"
    ) as rollout:
        return rollout.run()


def killed_and_again(place, monkeypatch, at):
    """Kill a deploy, then run it again; return the verdict and the fewest healthy machines that were seen."""
    least = []
    undo = place.clock.drive(lambda: least.append(place.serving()))
    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "getpid", lambda: 1 << 22)  # no process has this number
        with pytest.raises(Killed):
            deploy(place, Recorder(at))
    verdict = deploy(place, Recorder())
    undo()
    return verdict, min(least)


@pytest.mark.parametrize("story", ["good", "bad"])
def test_killed_at_every_call_it_converges(fleets, monkeypatch, story):
    script = good(20.0) if story == "good" else fails("signature", "no signature", 15.0)
    expected = Outcome.RELEASED if story == "good" else Outcome.ROLLED_BACK
    undisturbed = Recorder()
    with fleets() as place:
        place.scripts[2] = lambda _launch: script
        assert deploy(place, undisturbed).outcome is expected
    points = _points(undisturbed.calls)
    assert {"create_version", "start", "put", "newest", "console"} <= {
        undisturbed.calls[at] for at in points
    }
    for at, when in itertools.product(points, ("before", "after")):
        if (at, when) == (len(undisturbed.calls) - 1, "after"):
            continue  # it had given the lock back: nothing was left to do
        where = f"{when} call {at}, {undisturbed.calls[at]}"
        with fleets() as place:
            place.scripts[2] = lambda _launch: script
            verdict, least = killed_and_again(place, monkeypatch, (at, when))
            assert verdict.outcome is expected, where
            assert releases.listed(place.objects, "web").latest == 2, where
            refreshes = place.gateways.refreshes.newest("web", 10)
            assert len(refreshes) == 1, where
            assert len(place.cloud.ec2.templates[place.template].versions) == 2, where
            assert least >= 2, where
            assert lock.read(place.objects, "web", place.clock.now()) is None, where
            if story == "bad":
                assert verdict.reason.failures[0].code == "signature", where
                assert ends.read_reason(place.objects, "web", 2) is not None, where
                assert place.versions() == ["1", "1"], where


def _points(calls):
    """Return which calls to die at: all but those of rounds that are like the round before."""
    seen, kept = {}, []
    for at, name in enumerate(calls):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= 4 or name not in {
            "group",
            "newest",
            "activities",
            "health",
            "get",
            "console",
            "get_tagged",
            "find_version",
        }:
            kept.append(at)
    return kept
