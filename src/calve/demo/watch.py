"""Watches machines boot: their consoles for evidence, their port for the first answer."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from calve.clock import SYSTEM, Clock
from calve.contract.evidence import Evidence, read
from calve.demo.report import Machine
from calve.region.qemu import QemuMachines
from calve.tasks import Cancel

__all__ = ["Told", "Watcher"]

_POLL_S: Final = 0.1

Told = Callable[[str, str], None]
"""Told a machine's name and what it does now."""


@dataclass(slots=True)
class _Seen:
    events: tuple[Evidence, ...] = ()
    offset_s: float | None = None  # of our clock at the kernel's start
    answered_at: float | None = None
    said: str = ""


class Watcher:
    """Looks at all machines of a region, over and over; `run` in a thread of its own.

    Args:
        machines: of the region.
        told: is told when a machine's phase changes.
        clock: stamps what is seen.
    """

    def __init__(self, machines: QemuMachines, told: Told, clock: Clock = SYSTEM) -> None:
        self._machines = machines
        self._told = told
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()

    def run(self, cancel: Cancel, stop: threading.Event) -> None:
        """Watch until stopped."""
        while not self._clock.wait(stop, _POLL_S):
            cancel.check()
            for name in self._machines.instances():
                self._look(name)

    def machines(self) -> list[Machine]:
        """Return what was seen, machines in the order of their launch."""
        with self._lock:
            return [
                Machine(
                    name,
                    seen.events,
                    None
                    if seen.answered_at is None or seen.offset_s is None
                    else seen.answered_at - seen.offset_s,
                )
                for name, seen in self._seen.items()
            ]

    def _look(self, name: str) -> None:
        with self._lock:
            seen = self._seen.setdefault(name, _Seen())
        if seen.answered_at is not None:
            return
        now = self._clock.monotonic()
        console = self._machines.console(name).decode("utf-8", "replace")
        events = tuple(read(console))
        if events and seen.offset_s is None:
            # The earliest line that we saw as it came: the console is looked at every 0.1 s.
            seen.offset_s = now - events[-1].at_s
        seen.events = events
        self._say(name, seen, _state(events))
        if any(event.kind == "ready" for event in events) and self._answers(name):
            seen.answered_at = self._clock.monotonic()
            self._say(name, seen, "answers")

    def _say(self, name: str, seen: _Seen, text: str) -> None:
        if text != seen.said:
            seen.said = text
            self._told(name, text)

    def _answers(self, name: str) -> bool:
        address = self._machines.address(name)
        if address is None:
            return False
        connection = http.client.HTTPConnection(*address, timeout=1.0)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _state(events: tuple[Evidence, ...]) -> str:
    for event in reversed(events):
        if event.kind == "fail":
            return f"failed: {event.fields.get('code')}"
        if event.kind == "phase":
            return str(event.fields.get("n"))
        if event.kind == "progress" and event.fields.get("total"):
            done = event.fields["done"] / event.fields["total"]
            return f"{event.fields.get('n')} {done:.0%}"
    return "kernel"
