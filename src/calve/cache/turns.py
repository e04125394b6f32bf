"""Whose turn it is to remove, and what time it is: what one collector needs to know of others.

A sweeper holds a lease in `gc.json`, which it renews before each batch by a conditional write. Times are those of the
store's clock, for collectors on machines whose clocks differ must agree on when a lease, or a grace, is over.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import replace

from calve.cache import tombstones
from calve.cache.objects import Objects
from calve.cache.tombstones import DONE, SWEEPING, Collection
from calve.clock import Clock
from calve.errors import ConflictError, DamagedError

__all__ = ["StoreTime", "SweepLease", "time_of", "write_record"]

_LEASE_S = 900  # longer than a batch takes with all its retries
_DRIFT_S = 30
_CLOCK = f"{tombstones.PREFIX}clock"


def time_of(epoch_s: float) -> datetime.datetime:
    """Return a time of the store's clock as records have it: to the second."""
    return datetime.datetime.fromtimestamp(int(epoch_s), datetime.UTC)


class StoreTime:
    """The time by the store's clock: looked at once, and again where this machine slept or its clock was set."""

    def __init__(self, objects: Objects, clock: Clock) -> None:
        self._objects = objects
        self._clock = clock
        self._look()

    def _look(self) -> None:
        self._objects.put(_CLOCK, b"{}\n", content_type="application/json")
        stamps = [one.modified_s for one in self._objects.list(_CLOCK) if one.key == _CLOCK]
        if not stamps:
            place = f"{self._objects.url}/{_CLOCK}"
            raise DamagedError("it was written and is not listed", place=place)
        self._stamp_s = stamps[0]
        self._begin_s, self._begin = self._clock.monotonic(), self._clock.now()

    def now_s(self) -> float:
        """Return it, seconds since the epoch."""
        by_day_s = (self._clock.now() - self._begin).total_seconds()
        if abs(by_day_s - (self._clock.monotonic() - self._begin_s)) > _DRIFT_S:
            self._look()
        return self._stamp_s + self._clock.monotonic() - self._begin_s


class SweepLease:
    """Who removes: at most one at a time, as long as it renews."""

    def __init__(self, objects: Objects, time: StoreTime, collection: Collection, tag: str) -> None:
        self._objects = objects
        self._time = time
        self._collection = replace(collection, state=SWEEPING, sweeper=secrets.token_hex(8))
        self._tag = tag
        self._renewed_s = 0.0

    def renew(self) -> None:
        """Take it, or take it again; ConflictError where another has it."""
        now_s = self._time.now_s()
        self._write(replace(self._collection, expires=time_of(now_s + _LEASE_S)))
        self._renewed_s = now_s

    @property
    def fresh(self) -> bool:
        """Say whether there is time for a batch, however long its requests take."""
        return self._time.now_s() - self._renewed_s < _LEASE_S / 3

    def count(self, objects: int, size_bytes: int) -> None:
        """Count what was removed; the next write says so."""
        self._collection = replace(
            self._collection,
            removed_objects=self._collection.removed_objects + objects,
            removed_bytes=self._collection.removed_bytes + size_bytes,
        )

    def finish(self) -> None:
        """Say that the collection is done."""
        swept = time_of(self._time.now_s())
        self._write(replace(self._collection, state=DONE, sweeper=None, expires=None, swept=swept))

    def _write(self, made: Collection) -> None:
        self._tag = write_record(self._objects, made, self._tag)
        self._collection = made


def write_record(objects: Objects, made: Collection, tag: str | None) -> str:
    """Write the record and return its tag; an answer that was lost does not matter: it is ours, or it is not."""
    tombstones.write(objects, made, tag)
    found = tombstones.read(objects)
    if found is None or found[0] != made:
        raise ConflictError(
            "another collector was quicker",
            place=f"{objects.url}/{tombstones.RECORD}",
            hint="one at a time is enough",
        )
    return found[1]
