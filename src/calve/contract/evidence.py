"""Evidence v1: what a machine says about its own boot, one console line per event.

A line is `@@calve ` and a JSON object of at most 512 bytes in all: `v` (1), `t` (seconds since the kernel
started), `e` (the kind) and the kind's own fields. Kinds: `phase` (a phase begins: `n`), `progress`, `ready`
(about to hand over), `grown` (the root file system took the rest of its disk, or why not), `degraded` (an older system goes on, and why), `healthy`, `fail` (`code`, `message`), `note`
(`message`). The first line also has `agent` and `contract`, the versions.
Foreign text: a hint, never a proof of health. Readers ignore what they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LINE_BYTES", "PHASES", "PREFIX", "VERSION", "Evidence", "read"]

VERSION = 1
PREFIX = "@@calve "
LINE_BYTES = 512

# In the order of a boot; `answer` begins with stage 2 and ends with the new system's first answer to whoever asks;
# `health` begins when stage 2 looks whether it is well.
PHASES = (
    "kernel",
    "network",
    "agent",
    "imds",
    "manifest",
    "pull",
    "commit",
    "switch-root",
    "answer",
    "health",
)

_SHORT = 160
_MOST_S = 1e9


@dataclass(frozen=True, slots=True)
class Evidence:
    """One event: its kind, seconds since the kernel started, and the kind's fields."""

    kind: str
    at_s: float
    fields: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> str:
        """Return the line, without its newline; long texts are shortened until it fits."""
        head: dict[str, Any] = {"v": VERSION, "t": round(self.at_s, 2), "e": self.kind}
        limit = _SHORT * 2
        fields = self.fields
        while True:
            line = PREFIX + json.dumps(head | fields, separators=(",", ":"))
            if len(line) < LINE_BYTES or limit < 8:
                break
            fields = {key: _shorten(value, limit) for key, value in self.fields.items()}
            limit //= 2
        return line if len(line) < LINE_BYTES else PREFIX + json.dumps(head, separators=(",", ":"))

    @classmethod
    def parse(cls, line: str) -> Evidence | None:
        """Return the event of a console line, None where the line is not evidence we can read."""
        start = line.find(PREFIX)
        if start < 0 or len(line) - start > LINE_BYTES:
            return None
        try:
            data = json.loads(line[start + len(PREFIX) :])
        except (ValueError, RecursionError):
            return None
        version = data.pop("v", None) if isinstance(data, dict) else None
        if type(version) is not int or version != VERSION:
            return None
        at, kind = data.pop("t", None), data.pop("e", None)
        if isinstance(at, bool) or not isinstance(at, int | float) or not isinstance(kind, str):
            return None
        if not 0 <= at < _MOST_S:  # NaN is not either
            return None
        return cls(kind, float(at), data)


def _shorten(value: Any, limit: int) -> Any:
    if isinstance(value, str) and len(value) > limit:
        return value[: limit - 1] + "…"
    return value


def read(console: str) -> Iterator[Evidence]:
    """Yield the events of a console log, in order; other lines are passed over."""
    for line in console.splitlines():
        event = Evidence.parse(line.rstrip())
        if event is not None:
            yield event
