"""Reading ahead: what is prefetched, and ranges over idle connections."""

from __future__ import annotations

import itertools
import os
import threading

import pytest

from calve.cache import ahead
from calve.cache.ahead import PREFETCH_BYTES, RANGE_BYTES, Reader, Spare
from calve.errors import CancelledError, DamagedError, TransientError
from calve.tasks import Cancel


class Clock:
    """Time goes by only where it is told to."""

    def __init__(self) -> None:
        self.s = 0.0

    def monotonic(self) -> float:
        return self.s


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Slow:
    """An object whose every read takes `each_s` by the clock, and that says what is open."""

    def __init__(self, memory, clock, data: bytes, each_s: float) -> None:
        self.inner = memory()
        self.inner.data["nar/x"] = data
        self.url = self.inner.url
        self.ranges: list[tuple[int, int | None]] = []
        self.most = self.at_once = 0
        self._lock = threading.Lock()
        self._clock = clock
        self._each_s = each_s
        self.first_s = 0.0  # for the first read of all
        self.fail_at = -1

    def open(self, key, size=None, *, start=0, end=None):
        with self._lock:
            self.ranges.append((start, end))
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        if start == self.fail_at:
            raise TransientError("reset")
        return _Slow(self, self.inner.open(key, size, start=start, end=end))

    def closed(self) -> None:
        with self._lock:
            self.at_once -= 1

    def passed(self) -> None:
        self._clock.s += self.first_s
        self.first_s = 0.0
        self._clock.s += self._each_s


class _Slow:
    def __init__(self, owner, inner) -> None:
        self._owner = owner
        self._inner = inner

    def read(self, size):
        self._owner.passed()
        return self._inner.read(size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._owner.closed()


def reader(objects, spare, *, size, limit=1 << 30, cancel=None) -> Reader:
    return Reader(
        objects,
        "nar/x",
        size,
        limit=limit,
        cancel=cancel or Cancel(),
        spare=spare,
        place="x",
    )


def everything(opened: Reader, work=lambda: None) -> bytes:
    parts = []
    with opened:
        opened.prefetch()
        while data := opened.read(65536):
            assert len(data) <= 65536
            parts.append(data)
            work()
    return b"".join(parts)


@pytest.mark.parametrize("size", [0, 1, PREFETCH_BYTES - 1, PREFETCH_BYTES, PREFETCH_BYTES + 1])
def test_small_objects(memory, clock, size: int) -> None:
    data = os.urandom(size)
    objects = Slow(memory, clock, data, 1.0)
    made = reader(objects, Spare(lambda: True, clock), size=size)
    assert everything(made) == data
    assert made.received == size
    assert objects.ranges == [(0, None)]


@pytest.mark.parametrize("beyond", [0, 1, RANGE_BYTES - 1])
def test_a_large_one_behind_a_slow_network_is_read_by_ranges(memory, clock, beyond: int) -> None:
    data = os.urandom(9 * RANGE_BYTES + beyond)
    objects = Slow(memory, clock, data, 1.0)
    spare = Spare(lambda: True, clock)
    made = reader(objects, spare, size=len(data))
    assert everything(made) == data
    assert made.received == len(data)
    assert objects.ranges[0] == (0, None)
    asked = sorted(objects.ranges[1:])
    assert asked[0][0] <= 2 * RANGE_BYTES
    assert asked[-1][1] == len(data)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(asked))
    assert objects.most <= 1 + ahead.EXTRA_RANGES
    assert objects.at_once == 0
    assert all(spare.extra.acquire(blocking=False) for _ in range(ahead.EXTRA_RANGES))


@pytest.mark.parametrize("why", ["busy", "fast", "far", "at work", "alone", "of unknown size"])
def test_one_connection_does_otherwise(memory, clock, why: str) -> None:
    data = os.urandom(6 * RANGE_BYTES)
    objects = Slow(memory, clock, data, 0.0 if why == "fast" else 1.0)
    objects.first_s = 30.0 if why == "far" else 0.0
    spare = None if why == "alone" else Spare(lambda: why != "busy", clock)
    size = None if why == "of unknown size" else len(data)

    def work() -> None:
        clock.s += 0.5 if why == "at work" else 0.0

    assert everything(reader(objects, spare, size=size), work) == data
    assert objects.ranges == [(0, None)]


def test_what_is_held_ahead_is_bounded_for_all_readers(memory, clock) -> None:
    """One reader has all that is spare; another still gets on, a range at a time."""
    data = os.urandom(8 * RANGE_BYTES)
    spare = Spare(lambda: True, clock)
    first = Slow(memory, clock, data, 1.0)
    with reader(first, spare, size=len(data)) as made:
        made.prefetch()
        while made._ranges is None:
            made.read(1)
        assert not spare.extra.acquire(blocking=False)
        second = Slow(memory, clock, data, 1.0)
        assert everything(reader(second, spare, size=len(data))) == data
        assert second.most == 1
    assert all(spare.extra.acquire(blocking=False) for _ in range(ahead.EXTRA_RANGES))


@pytest.mark.parametrize("shared", [False, True])
def test_ranges_that_are_no_faster_are_given_up(memory, clock, shared: bool) -> None:
    """Time goes by as the user works on what came: as long for a byte of a range as before, or a tenth of it."""
    data = os.urandom(24 * RANGE_BYTES)
    objects = Slow(memory, clock, data, 1.0)
    spare = Spare(lambda: True, clock)
    with reader(objects, spare, size=len(data)) as made:
        made.prefetch()
        while made._ranges is None:
            made.read(1)
        objects._each_s = 0.0
        while piece := made.read(1):
            clock.s += len(piece) / 65536 / (1 if shared else 10)
    assert objects.ranges[-1][1] == (None if shared else len(data))
    assert (len(objects.ranges) < 22) == shared
    assert objects.at_once == 0
    assert all(spare.extra.acquire(blocking=False) for _ in range(ahead.EXTRA_RANGES))


def test_an_error_of_a_range_is_raised(memory, clock) -> None:
    data = os.urandom(8 * RANGE_BYTES)
    objects = Slow(memory, clock, data, 1.0)
    spare = Spare(lambda: True, clock)
    made = reader(objects, spare, size=len(data))
    with pytest.raises(TransientError), made:
        made.prefetch()
        while made._ranges is None:
            made.read(1)
        objects.fail_at = made._ranges._asked
        while made.read(1):
            pass
    assert all(spare.extra.acquire(blocking=False) for _ in range(ahead.EXTRA_RANGES))
    assert not [each for each in threading.enumerate() if each.name.startswith("range")]


def test_cancelling(memory, clock) -> None:
    data = os.urandom(8 * RANGE_BYTES)
    cancel = Cancel()
    made = reader(
        Slow(memory, clock, data, 1.0), Spare(lambda: True, clock), size=len(data), cancel=cancel
    )
    with pytest.raises(CancelledError), made:
        made.prefetch()
        while made._ranges is None:
            made.read(1)
        cancel.cancel()
        while made.read(1):
            pass


@pytest.mark.parametrize("pace", [0.0, 1.0])
def test_an_object_that_is_too_long(memory, clock, pace: float) -> None:
    data = os.urandom(5 * RANGE_BYTES)
    objects = Slow(memory, clock, data, pace)
    made = reader(objects, Spare(lambda: True, clock), size=len(data), limit=4 * RANGE_BYTES)
    with pytest.raises(DamagedError, match="longer"):
        everything(made)


def test_an_object_that_is_shorter_than_it_is_said_to_be(memory, clock) -> None:
    """The decoder notices that it ends early."""
    data = os.urandom(5 * RANGE_BYTES + 3)
    objects = Slow(memory, clock, data, 1.0)
    made = reader(objects, Spare(lambda: True, clock), size=len(data) + 4 * RANGE_BYTES)
    assert data.startswith(everything(made))
