"""What a push may rely on, and until when: its pending record, its heartbeat, and what a collection is about to remove.

A push that only makes new objects, beside what a root keeps, needs no record: a collection removes nothing that is
younger than its grace, which is an hour at least. Whoever looks at what else exists, or lasts longer, writes one
first, and then asks what is doomed. A lease that ran out is an error, however it came about: then the push begins anew.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Collection, Iterable
from contextlib import suppress
from threading import Event, Lock
from types import TracebackType
from typing import Self

from calve.cache import roots as records
from calve.cache import tombstones
from calve.cache.objects import Objects, is_missing
from calve.cache.roots import Pending
from calve.clock import Clock
from calve.errors import AccessError, CalveError, ConflictError
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath
from calve.tasks import Group

__all__ = ["ExpiredError", "Lease"]

WITHOUT_S = 600.0
"""How long a push may do without a record; the least grace is six times as long."""
LASTS_S = 3600.0
BEAT_S = 600.0


class ExpiredError(ConflictError):
    """What a push saw may have been removed since; it has to look again."""


class Lease:
    """One push's; use it as a context manager. The record stays where the push fails: the next one finds it.

    Args:
        objects: the cache.
        top: the (first) path that is pushed: names the record.
        clock: measures, by the time of day, which goes on while a machine sleeps.
    """

    def __init__(self, objects: Objects, top: StorePath, clock: Clock) -> None:
        self._objects = objects
        self._prefix = f"{top.digest}-"
        self._clock = clock
        self._stopped = Event()
        self._thread: Group | None = None
        self._lock = Lock()
        self._pending: Pending | None = None
        self._until = clock.now() + datetime.timedelta(seconds=WITHOUT_S)
        self.gc: str | None = None
        self.asked = False

    def take(self, infos: Iterable[PathInfo], previous: str | None) -> bool:
        """Write the record, unless it is there; say whether another push of the same was, or is, under way.

        Args:
            infos: of the paths that may be referred to.
            previous: digest of the manifest that a root keeps.
        """
        with self._lock:
            if self._pending is not None:
                return False
            self._check()
            pending = Pending.of(
                self._prefix + secrets.token_hex(8),
                infos,
                now=self._clock.now(),
                lasts_s=LASTS_S,
                previous=previous,
            )
            records.write_pending(self._objects, pending)
            self._pending = pending
            self._until = pending.expires
            self._thread = Group("heartbeat", limit=1)
            self._thread.spawn(self._beat)
        return self._met(pending)

    def _met(self, pending: Pending) -> bool:
        prefix = f"pending/{self._prefix}"
        try:
            keys = [one.key for one in self._objects.list(prefix)]
        except AccessError as error:
            if not is_missing(error):
                raise
            return True  # who may not list has to ask for each
        return any(not key.startswith(f"pending/{pending.id}.") for key in keys)

    @property
    def taken(self) -> bool:
        """Say whether the record is written."""
        return self._pending is not None

    @property
    def late(self) -> bool:
        """Say whether it is time for the record: half of the time without one is over."""
        left = self._until - self._clock.now()
        return self._pending is None and left < datetime.timedelta(seconds=WITHOUT_S / 2)

    def doomed(self, keys: Collection[str]) -> frozenset[str]:
        """Return those objects that a collection may remove at any moment; they must not be relied on."""
        found = tombstones.doomed(self._objects, keys)
        self.gc, self.asked = found.gc, True
        return found.keys

    def check(self) -> None:
        """Raise ExpiredError once the lease has run out."""
        with self._lock:
            self._check()

    def _check(self) -> None:
        if self._clock.now() >= self._until:
            raise ExpiredError(
                "the push took so long that what it found may be gone",
                place=self._objects.url,
                hint="run it again; what was sent is not sent twice",
            )

    def _beat(self) -> None:
        while not self._clock.wait(self._stopped, BEAT_S):
            # One that did not get through is made good by the next, or the lease runs out.
            with suppress(CalveError):
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            self._check()
            pending = self._pending
            if pending is None:
                return
            renewed = pending.renewed(self._clock.now(), LASTS_S)
        records.write_pending(self._objects, renewed, renew=True)
        with self._lock:
            if self._pending is not None:
                self._pending, self._until = renewed, renewed.expires

    def release(self) -> None:
        """Remove the record: what it kept is kept by a root now."""
        self._end()
        with self._lock:
            pending, self._pending = self._pending, None
        if pending is not None:
            records.remove_pending(self._objects, pending)

    def _end(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.__exit__(None, None, None)
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
