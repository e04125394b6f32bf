"""A clock whose time passes only while somebody waits: an hour of the region's life takes a second of ours.

clock = VirtualClock(datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
machines = ScriptedMachines(clock, script_of)
with Cloud(machines, balancer, clock=clock).still(clock.drive) as cloud, Server(cloud.handle) as server: ...
"""

from __future__ import annotations

import datetime
import math
import threading
from collections.abc import Callable

from calve.errors import CalveError

__all__ = ["Step", "VirtualClock"]

GRID_S = 1 / 64
"""Floats and datetimes both hold its multiples exactly, so that no instant is ever just missed."""
LOOKS = 10_000
PATIENCE_S = 0.5
_POLL_S = 0.01

Step = Callable[[], float | None]
"""Brings something on to the clock's now. Returns when it wants to be called again, in `monotonic`'s seconds: now
where it changed anything, so that all others look at it; None where only others can bring something about."""


class VirtualClock:
    """Moves from one instant at which something is due to the next, within `wait`; a `calve.clock.Clock`.

    At every instant all steps are called, in the order in which they came, until none wants to be called again at
    once. Nothing moves between waits. The thread that made the clock moves it; a wait of another thread ends when
    time has come so far, and moves it only where the first one has not waited for a while: it may be joining that
    very thread.

    Args:
        start: With its time zone.
        grid_s: Time stands at multiples of this; shorter waits, and what is due between, are rounded up to it. A
            coarse one has many things happen at once, which is fast. A multiple of 1/64 s.
    """

    def __init__(self, start: datetime.datetime, *, grid_s: float = GRID_S) -> None:
        if grid_s < GRID_S or grid_s % GRID_S:
            raise ValueError(f"{grid_s} s is no multiple of 1/64 s")
        self._grid_s = grid_s
        self._at = self._ceil(start.timestamp())
        self._steps: dict[object, Step] = {}
        self._owner = threading.get_ident()
        self._mover: int | None = None
        self._lock = threading.Lock()
        self._moved = threading.Condition()

    def monotonic(self) -> float:
        """Return seconds since 1970: `now().timestamp()`, exactly."""
        return self._at

    def now(self) -> datetime.datetime:
        """Return the time of day, in UTC."""
        return datetime.datetime.fromtimestamp(self._at, datetime.UTC)

    def drive(self, step: Step) -> Callable[[], None]:
        """Have `step` called at every instant at which anything is due; return how to take it off."""
        key = object()
        self._steps[key] = step

        def undo() -> None:
            self._steps.pop(key, None)

        return undo

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Let so much time pass, or less where the event is set meanwhile; say whether it is set.

        Raises:
            CalveError: What is driven does not come to rest. What a step raises is raised as it is.
        """
        until = self._ceil(self._at + max(0.0, seconds))
        if threading.get_ident() != self._owner:
            return self._follow(event, until)
        return self._lead(event, until)

    def _ceil(self, seconds: float) -> float:
        return math.ceil(seconds / self._grid_s) * self._grid_s if seconds < math.inf else seconds

    def _lead(self, event: threading.Event, until: float) -> bool:
        if self._mover == threading.get_ident():
            raise CalveError("what a virtual clock drives must not wait for it")
        with self._lock:
            self._mover = threading.get_ident()
            try:
                self._pass(event, until)
            finally:
                self._mover = None
        return event.is_set()

    def _pass(self, event: threading.Event, until: float) -> None:
        while not event.is_set():
            due = self._settle(event)
            if self._at >= until or event.is_set():
                return
            with self._moved:
                self._at = min(until, due)
                self._moved.notify_all()

    def _settle(self, event: threading.Event) -> float:
        """Call all steps until this instant is over; return when the next one is."""
        for _ in range(LOOKS):
            wanted = [step() for step in list(self._steps.values())]
            due = min((time for time in wanted if time is not None), default=math.inf)
            if due > self._at or event.is_set():
                return max(self._ceil(due), self._at + self._grid_s)
        raise CalveError(f"what is driven does not come to rest at {self.now()}")

    def _follow(self, event: threading.Event, until: float) -> bool:
        stood_s, at = 0.0, self._at
        while not event.is_set() and self._at < until:
            with self._moved:
                if self._at < until:
                    self._moved.wait(_POLL_S)
            stood_s, at = (stood_s + _POLL_S, at) if self._at == at else (0.0, self._at)
            if stood_s >= PATIENCE_S and self._mover is None:
                return self._lead(event, until)
        return event.is_set()
