from __future__ import annotations

import os

import pytest

from calve.cache.estimate import SAMPLE_BYTES, estimate
from calve.cache.pull import plan
from calve.cache.push import push
from calve.errors import CancelledError, TransientError
from calve.tasks import Cancel


class Clock:
    def __init__(self) -> None:
        self.s = 0.0

    def monotonic(self) -> float:
        return self.s


class Paced:
    """A cache whose first bytes of an object come after 2 s, and others at 64 KiB/s."""

    def __init__(self, inner, clock) -> None:
        self.inner = inner
        self.url = inner.url
        self.clock = clock
        self.bytes = 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def open(self, key, size=None, *, start=0, end=None):
        owner, source = self, self.inner.open(key, size)

        class Opened:
            first = True

            def read(self, size):
                data = source.read(size)
                owner.clock.s += 2 if self.first else len(data) / 65536
                owner.bytes += len(data)
                self.first = False
                return data

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        return Opened()


@pytest.fixture
def made(world, fake_sink):
    clock = Clock()
    push(world.store, [world.top], world.cache, world.key)
    paced = Paced(world.cache, clock)
    return plan([paced], [world.top], fake_sink(), world.ring), paced, clock


def test_it_follows_the_link(made) -> None:
    planned, paced, clock = made
    told = estimate(planned, jobs=8, processors=2, clock=clock)
    assert told == pytest.approx(planned.fetch_bytes / 65536)
    assert paced.bytes <= SAMPLE_BYTES


def test_it_follows_the_delay_of_answers(made) -> None:
    planned, _, clock = made
    assert estimate(planned, jobs=1, processors=2, clock=clock) == pytest.approx(6.0)


def test_a_sample_is_short(world, fake_sink, made) -> None:
    big = world.store.add("big", os.urandom(5 << 20))
    push(world.store, [big], world.cache, world.key)
    _, paced, clock = made
    planned = plan([paced], [big], fake_sink(), world.ring)
    told = estimate(planned, jobs=8, processors=2, clock=clock)
    assert SAMPLE_BYTES <= paced.bytes < SAMPLE_BYTES + 65536
    assert told == pytest.approx(planned.fetch_bytes / 65536)


def test_nothing_missing_and_nothing_known(world, made, fake_sink) -> None:
    planned, _, clock = made
    nothing = plan([world.cache], [world.top], fake_sink([world.top]), world.ring)
    assert estimate(nothing, jobs=8, processors=2, clock=clock) == 0

    def before(method: str, _key: str) -> None:
        raise TransientError("reset")

    world.cache.before = before
    assert estimate(planned, jobs=8, processors=2, clock=clock) is None


def test_it_can_be_cancelled(made) -> None:
    planned, _, clock = made
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CancelledError):
        estimate(planned, jobs=8, processors=2, clock=clock, cancel=cancel)
