"""Evidence on the console: one line per event, stamped with the kernel's uptime, and what was said so far."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

from calve.contract.evidence import Evidence

__all__ = ["Console", "uptime_s"]


_FIRST: Final = 16
_LAST: Final = 240
"""Lines that a transcript keeps: a long pull says much in its middle."""


def uptime_s() -> float:
    """Return seconds since the kernel started."""
    return float(Path("/proc/uptime").read_text().split()[0])


class Console:
    """Writes evidence lines to a text stream; thread-safe, as a line is one write.

    Args:
        out: the console.
        uptime: seconds since the kernel started.
        before: what was said earlier in this boot, as `transcript` gave it.
    """

    def __init__(
        self, out: IO[str], uptime: Callable[[], float] = uptime_s, *, before: str = ""
    ) -> None:
        self._out = out
        self._uptime = uptime
        self._lock = threading.Lock()
        self._first: list[str] = []
        self._last: deque[str] = deque(maxlen=_LAST)
        for line in before.splitlines(keepends=True):
            self._keep(line)

    def emit(self, kind: str, **fields: Any) -> None:
        """Write one event."""
        self.write(Evidence(kind, self._uptime(), fields).dump() + "\n")

    def phase(self, name: str) -> None:
        """Say that a phase begins."""
        self.emit("phase", n=name)

    def write(self, text: str) -> None:
        """Write text, evidence or not."""
        self._keep(text)
        self._out.write(text)
        self._out.flush()

    def transcript(self) -> str:
        """Return what was said: the first lines and the last ones."""
        with self._lock:
            return "".join((*self._first, *self._last))

    def _keep(self, text: str) -> None:
        with self._lock:
            (self._first if len(self._first) < _FIRST else self._last).append(text)
