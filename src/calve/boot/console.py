"""Evidence on the console: one line per event, stamped with the kernel's uptime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from calve.contract.evidence import Evidence

__all__ = ["Console", "uptime_s"]


def uptime_s() -> float:
    """Return seconds since the kernel started."""
    return float(Path("/proc/uptime").read_text().split()[0])


class Console:
    """Writes evidence lines to a text stream; thread-safe, as a line is one write."""

    def __init__(self, out: IO[str], uptime: Callable[[], float] = uptime_s) -> None:
        self._out = out
        self._uptime = uptime

    def emit(self, kind: str, **fields: Any) -> None:
        """Write one event."""
        self._out.write(Evidence(kind, self._uptime(), fields).dump() + "\n")
        self._out.flush()

    def phase(self, name: str) -> None:
        """Say that a phase begins."""
        self.emit("phase", n=name)

    def write(self, text: str) -> None:
        """Write text that is no evidence."""
        self._out.write(text)
        self._out.flush()
