"""What a step's counts amount to: a rate, an end, a line of text."""

from __future__ import annotations

from collections import deque

from calve.progress import Step
from calve.ui.text import mb, sanitize

__all__ = ["Meter", "amount", "pace"]

_WINDOW_S = 5.0


class Meter:
    """Follows one step; the rate is that of the last five seconds, or since its first counts where that is less."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, step: Step, now_s: float) -> None:
        """Take the newest counts, at a time of a clock's monotonic seconds."""
        self.step = step
        self._samples.append((now_s, step.done))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - _WINDOW_S:
            self._samples.popleft()

    @property
    def rate(self) -> float | None:
        """Return units a second; None while that is not known."""
        if not self._samples:
            return None
        (since_s, first), (now_s, last) = self._samples[0], self._samples[-1]
        if now_s - since_s < 0.1 or last < first:
            return None
        return (last - first) / (now_s - since_s)

    @property
    def ended(self) -> bool:
        """Say whether all is done."""
        step = self.step
        return step is not None and step.total is not None and step.done >= step.total


def _count(number: float, unit: str) -> str:
    return mb(number) if unit == "bytes" else f"{number:.0f}"


def amount(step: Step) -> str:
    """Write how much is done of how much: "1.0 MB of 2.0 MB", "3 of 7 paths"."""
    tail = "" if step.unit == "bytes" else f" {sanitize(step.unit)}"
    done = _count(step.done, step.unit)
    of = "" if step.total is None else f" of {_count(step.total, step.unit)}"
    return f"{done}{of}{tail}"


def pace(meter: Meter) -> str:
    """Write a rate: "3.4 MB/s"; nothing while it is not known."""
    if meter.step is None or meter.rate is None:
        return ""
    if meter.step.unit == "bytes":
        return f"{mb(meter.rate)}/s"
    return f"{meter.rate:.1f} {sanitize(meter.step.unit)}/s"
