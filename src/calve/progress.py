"""Progress as events: what works reports, what draws listens.

A worker takes a `Progress` and calls it with events; it never prints. `cli` and `demo` draw them as rows on a
terminal, plain lines or JSON lines; the agent writes them to the console. Counts are absolute, so that a listener
may drop events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "Fact", "Note", "Progress", "Step", "silent"]


@dataclass(frozen=True)
class Step:
    """One activity's counts: `done` of `total` (None where unknown), in `unit`."""

    name: str
    done: int
    total: int | None = None
    unit: str = "bytes"


@dataclass(frozen=True)
class Note:
    """One sentence that a user wants to read: a retry, a thing skipped."""

    text: str


@dataclass(frozen=True)
class Fact:
    """One thing that happened, for people and for programs: `{"event": kind, **fields}`, or the sentence."""

    kind: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Event = Step | Note | Fact
Progress = Callable[[Event], None]


def silent(_event: Event) -> None:
    """Ignore an event: the default listener."""
