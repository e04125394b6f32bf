"""Time as an argument: what waits or stamps takes a `Clock`, and a test passes one of its own."""

from __future__ import annotations

import datetime
import threading
import time
from typing import Protocol

__all__ = ["SYSTEM", "Clock", "SystemClock"]


class Clock(Protocol):
    """Seconds that only grow, the time of day, and waiting."""

    def monotonic(self) -> float:
        """Return seconds since some fixed instant; never goes back."""

    def now(self) -> datetime.datetime:
        """Return the time of day, in UTC."""

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until the event is set, at most so many seconds; say whether it is set."""


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()

    def now(self) -> datetime.datetime:
        """Return the time of day, in UTC."""
        return datetime.datetime.now(datetime.UTC)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until the event is set, at most so many seconds; say whether it is set."""
        return event.wait(seconds)


SYSTEM = SystemClock()
