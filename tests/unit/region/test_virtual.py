"""A clock whose time passes within waits: what is due is done in order, nothing moves between, threads do not hang."""

import datetime as dt
import threading

import pytest

from calve.errors import CalveError
from calve.region.virtual import VirtualClock
from calve.tasks import Cancel

START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NEVER = threading.Event()


@pytest.fixture
def clock():
    return VirtualClock(START)


class Ticks:
    """A step that is due at given seconds."""

    def __init__(self, clock, *at_s, also=lambda _at: None):
        self.clock, self.also = clock, also
        self.left = [clock.monotonic() + one for one in at_s]
        self.done = []

    def __call__(self):
        now, did = self.clock.monotonic(), False
        while self.left and self.left[0] <= now:
            self.left.pop(0)
            self.done.append(now - START.timestamp())
            self.also(self.done[-1])
            did = True
        return now if did else min(self.left, default=None)


def test_a_wait_passes_all_that_is_due_and_ends_where_it_should(clock):
    ticks = Ticks(clock, 0, 10, 20, 30, 40)
    clock.drive(ticks)
    assert clock.wait(NEVER, 30.5) is False
    assert ticks.done == [0, 10, 20, 30]
    assert clock.now() - START == dt.timedelta(seconds=30.5)
    clock.wait(NEVER, 9.5)
    assert ticks.done[-1] == 40


def test_nothing_moves_between_waits(clock):
    called = []
    clock.drive(lambda: called.append(clock.monotonic()))
    assert clock.now() == clock.now() == START
    assert called == []
    clock.wait(NEVER, 0.0)
    assert called == [START.timestamp()]  # a wait of no time still looks


def test_the_event_ends_a_wait_at_the_instant_it_is_set(clock):
    event = threading.Event()
    clock.drive(Ticks(clock, 7, 9, also=lambda at: at == 7 and event.set()))
    assert clock.wait(event, 60) is True
    assert clock.now() - START == dt.timedelta(seconds=7)
    assert clock.wait(event, 60) is True
    assert clock.now() - START == dt.timedelta(seconds=7)


def test_all_look_again_where_one_changed_anything(clock):
    seen = []
    first = Ticks(clock, 5)
    clock.drive(lambda: seen.append(len(first.done)))
    clock.drive(first)
    clock.wait(NEVER, 10)
    assert seen == [0, 0, 1, 1]  # at once; at 5, before and after the tick; at 10


def test_every_instant_is_a_float_and_a_datetime_exactly(clock):
    for seconds in (0.1, 1e-9, 3.3, 12345.678):
        before = clock.monotonic()
        clock.wait(NEVER, seconds)
        assert clock.now().timestamp() == clock.monotonic() >= before + seconds
        assert clock.monotonic() - before < seconds + 1 / 64


def test_a_due_time_between_instants_is_not_missed(clock):
    ticks = Ticks(clock, 0.3, 0.7, 1.1)
    clock.drive(ticks)
    clock.wait(NEVER, 2)
    assert ticks.done == [0.3125, 0.703125, 1.109375]


def test_a_coarse_clock_has_things_happen_together():
    clock = VirtualClock(START, grid_s=5.0)
    ticks = Ticks(clock, 1, 2, 3, 7)
    rounds = []
    clock.drive(ticks)
    clock.drive(lambda: rounds.append(clock.monotonic()))
    clock.wait(NEVER, 10)
    assert ticks.done == [5, 5, 5, 10]
    assert len(set(rounds)) == 3
    with pytest.raises(ValueError, match="no multiple"):
        VirtualClock(START, grid_s=0.01)


def test_what_was_taken_off_is_not_called(clock):
    ticks = Ticks(clock, 1, 2)
    undo = clock.drive(ticks)
    clock.wait(NEVER, 1)
    undo()
    undo()
    clock.wait(NEVER, 9)
    assert ticks.done == [1]


def test_what_never_rests_is_an_error(clock):
    clock.drive(clock.monotonic)
    with pytest.raises(CalveError, match="does not come to rest"):
        clock.wait(NEVER, 1)


def test_what_a_step_raises_reaches_who_waits_and_the_clock_goes_on(clock):
    def step():
        raise OSError("broken")

    undo = clock.drive(step)
    with pytest.raises(OSError, match="broken"):
        clock.wait(NEVER, 1)
    undo()
    clock.wait(NEVER, 1)
    assert clock.now() - START == dt.timedelta(seconds=1)


def test_a_step_must_not_wait(clock):
    clock.drive(lambda: clock.wait(NEVER, 1))
    with pytest.raises(CalveError, match="must not wait"):
        clock.wait(NEVER, 1)


def test_a_cancel_waits_by_it(clock):
    Cancel().wait(600, clock)
    assert clock.now() - START == dt.timedelta(minutes=10)


def test_another_thread_s_wait_ends_as_time_passes_it(clock):
    woke = []

    def follow():
        clock.wait(NEVER, 60)
        woke.append(clock.monotonic() - START.timestamp())

    thread = threading.Thread(target=follow)
    thread.start()
    while thread.is_alive():
        clock.wait(NEVER, 5)
        thread.join(0.02)
    assert woke[0] >= 60


def test_another_thread_s_wait_ends_with_its_event(clock):
    event = threading.Event()
    thread = threading.Thread(target=clock.wait, args=(event, 60))
    thread.start()
    event.set()
    thread.join(20)
    assert not thread.is_alive()
    assert clock.now() == START


def test_who_joins_a_thread_that_waits_is_not_kept_for_ever(clock):
    ticks = Ticks(clock, 30)
    clock.drive(ticks)
    thread = threading.Thread(target=clock.wait, args=(NEVER, 60))
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert ticks.done == [30]
    assert clock.now() - START == dt.timedelta(minutes=1)
