"""An object's bytes, ahead of their use: the first of them at once, and the last of a large one by several requests.

What costs memory is bounded: a reader holds `PREFETCH_BYTES` until its bytes are wanted. Once some connections have
nothing to do, and the network is what is waited for, the rest of a large object is asked for in ranges of 1 MiB, one
for each reader and `EXTRA_RANGES` more for all of them. Every range waits for an answer first, which pays only where
one connection is slow: four ranges take as long as one, L + 1 MiB / R for a delay L and a rate R. Where they turn out
to be no faster, for all connections share what is slow, one connection goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from threading import Semaphore
from types import TracebackType
from typing import Self

from calve.cache.crew import Crew
from calve.cache.objects import Objects, Readable
from calve.clock import Clock
from calve.errors import DamagedError
from calve.tasks import Cancel

__all__ = ["EXTRA_RANGES", "PREFETCH_BYTES", "RANGE_BYTES", "Reader", "Spare"]

PREFETCH_BYTES = 256 * 1024
RANGE_BYTES = 1 << 20
EXTRA_RANGES = 3
_READ_BYTES = 64 * 1024
_MOST_UNDERWAY_BYTES = (
    3 * RANGE_BYTES / 2
)  # L times R: beyond, all ranges are less than 1.6 times as fast as one
_WAITED = 0.8  # of the time
_TRIAL_BYTES = 16 * RANGE_BYTES
_FASTER = 1.2


class Spare:
    """What readers share: whether connections are idle, and how many ranges may be held ahead."""

    def __init__(self, idle: Callable[[], bool], clock: Clock) -> None:
        self.idle = idle
        self.clock = clock
        self.extra = Semaphore(EXTRA_RANGES)


class Reader:
    """The bytes of one object, in order; a context manager.

    Args:
        objects: where it is.
        key: which.
        size: how long it is said to be; None where that is not known.
        limit: how long it may be: DamagedError beyond.
        cancel: stops it.
        spare: what is shared; None where one connection is to do.
        place: for errors.

    Attributes:
        received: how many bytes have come.
    """

    def __init__(
        self,
        objects: Objects,
        key: str,
        size: int | None,
        *,
        limit: int,
        cancel: Cancel,
        spare: Spare | None,
        place: str,
    ) -> None:
        self.received = 0
        self._objects = objects
        self._key = key
        self._size = size or 0
        self._limit = limit
        self._cancel = cancel
        self._spare = spare
        self._place = place
        self._pieces: list[bytes] = []  # the next one last
        self._source: Readable | None = objects.open(key, size)
        self._owner = contextlib.ExitStack()
        self._ended = False
        self._looked = 0  # at how many bytes the pace was judged
        self._since_s = self._waited_s = self._delay_s = 0.0
        self._ranges: _Ranges | None = None
        self._rate = 0.0  # bytes/s, of one connection

    def prefetch(self) -> None:
        """Receive the first bytes, up to PREFETCH_BYTES."""
        begun = self._now_s()
        pieces: list[bytes] = []
        while self.received < PREFETCH_BYTES and (data := self._receive()):
            if not pieces:
                self._delay_s = self._now_s() - begun
            pieces.append(data)
        self._ended = self.received < PREFETCH_BYTES
        pieces.reverse()
        self._pieces = pieces
        self._since_s, self._looked = self._now_s(), self.received

    def _now_s(self) -> float:
        return 0.0 if self._spare is None else self._spare.clock.monotonic()

    def read(self, _size: int) -> bytes:
        """Return the next bytes, at most 64 KiB; none at the end."""
        if self._pieces:
            return self._pieces.pop()
        if self._ended:
            return b""
        if self._ranges is not None:
            self._pieces = self._ranges.next()
            self._took(sum(map(len, self._pieces)))
            if self.received - self._looked >= _TRIAL_BYTES:
                self._compare()
            return self._pieces.pop() if self._pieces else b""
        if self._spare is None or self._size - self.received < 2 * RANGE_BYTES:
            return self._receive()
        return self._timed(self._spare)

    def _receive(self) -> bytes:
        self._cancel.check()
        if self._source is None:
            return b""
        data = self._source.read(_READ_BYTES)
        self._took(len(data))
        return data

    def _took(self, size: int) -> None:
        self.received += size
        if self.received > self._limit:
            raise DamagedError("longer than any compression makes this NAR", place=self._place)

    def _timed(self, spare: Spare) -> bytes:
        """Receive; every now and then see whether several connections would be faster."""
        if self.received - self._looked >= RANGE_BYTES and spare.idle():
            slow = self._slow(spare)
            self._looked, self._since_s, self._waited_s = self.received, self._now_s(), 0.0
            if slow:
                self._leave_source()
                self._ranges = self._owner.enter_context(
                    _Ranges(
                        self._objects, self._key, self.received, self._size, self._cancel, spare
                    )
                )
                return self.read(_READ_BYTES)
        begun = self._now_s()
        data = self._receive()
        self._waited_s += self._now_s() - begun
        return data

    def _slow(self, spare: Spare) -> bool:
        """Say whether it is this connection that is waited for, and others would not be held up by their answers."""
        elapsed_s = spare.clock.monotonic() - self._since_s
        if self._waited_s <= _WAITED * elapsed_s:
            return False
        self._rate = (self.received - self._looked) / elapsed_s
        return self._delay_s * self._rate < _MOST_UNDERWAY_BYTES

    def _compare(self) -> None:
        """Go back to one connection, for good, unless several are faster."""
        elapsed_s = self._now_s() - self._since_s
        if self.received - self._looked < _FASTER * self._rate * elapsed_s:
            self._owner.close()
            self._ranges = self._spare = None
            self._source = self._objects.open(self._key, self._size, start=self.received)
            self._source.__enter__()
        else:
            self._looked, self._since_s = self.received, self._now_s()

    def _leave_source(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.__exit__(None, None, None)

    def __enter__(self) -> Self:
        if self._source is not None:
            self._source.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        source, self._source = self._source, None
        try:
            if source is not None:
                source.__exit__(kind, error, trace)
        finally:
            self._owner.__exit__(kind, error, trace)


class _Ranges:
    """The rest of an object, by ranges, several at once."""

    def __init__(
        self, objects: Objects, key: str, start: int, size: int, cancel: Cancel, spare: Spare
    ) -> None:
        self._objects = objects
        self._key = key
        self._size = size
        self._spare = spare
        self._next = start  # to be handed out
        self._asked = start  # to be asked for
        self._open = 0
        self._arrived: dict[int, list[bytes]] = {}
        self._crew = Crew[tuple[int, list[bytes]]]("range", jobs=1 + EXTRA_RANGES, cancel=cancel)

    def next(self) -> list[bytes]:
        """Return the next range's bytes, its first piece last; nothing at the end."""
        if self._next >= self._size:
            return []
        self._ask()
        if self._next not in self._arrived:
            for start, pieces in self._crew:
                self._arrived[start] = pieces
                if start == self._next:
                    break
        self._crew.cancel.check()
        pieces = self._arrived.pop(self._next)
        self._next += RANGE_BYTES
        self._close_one()
        self._ask()
        return pieces

    def _ask(self) -> None:
        while self._asked < self._size:
            if self._open and not self._spare.extra.acquire(blocking=False):
                return
            self._open += 1
            self._crew.add(partial(self._fetch, self._asked))
            self._asked += RANGE_BYTES

    def _close_one(self) -> None:
        self._open -= 1
        if self._open:
            self._spare.extra.release()

    def _fetch(self, start: int, cancel: Cancel) -> tuple[int, list[bytes]]:
        end = min(start + RANGE_BYTES, self._size)
        pieces = []
        left = end - start
        with self._objects.open(self._key, self._size, start=start, end=end) as source:
            while left > 0 and (data := source.read(min(left, _READ_BYTES))):
                cancel.check()
                pieces.append(data)
                left -= len(data)
        pieces.reverse()
        return start, pieces

    def __enter__(self) -> Self:
        self._crew.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._crew.__exit__(kind, error, trace)
        finally:
            while self._open:
                self._close_one()
