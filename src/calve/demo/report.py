"""The report of a show: what was served, and how each machine booted. Pure: from recorded facts to a document.

{"requests": {"served", "failed", "by_release", "slowest_s"},
 "releases": [{"release", "what", "outcome", "reason", "seconds"}], "machines": [{"name", "release", "phases": [{"name", "seconds"}], "bytes_fetched", "agent_peak_mb",
               "lowest_available_mb", "failure"}], "seconds"}
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from calve.contract.evidence import Evidence
from calve.demo.load import Tally

__all__ = ["Act", "Machine", "Report", "phases"]

_BAR = 44  # columns of the longest timeline


@dataclass(frozen=True, slots=True)
class Act:
    """One release of the show.

    Attributes:
        what: in a few words.
        outcome: its verdict's.
        reason: why it was taken back; "" where it was not.
        seconds: from its record to its verdict.
    """

    release: int
    what: str
    outcome: str
    reason: str
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return its part of the report."""
        return {
            "release": self.release,
            "what": self.what,
            "outcome": self.outcome,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """What became of one machine.

    Attributes:
        name: its instance id.
        events: its evidence, in order.
        answer_s: seconds from the kernel's start to its first answer; None where it never answered.
    """

    name: str
    events: tuple[Evidence, ...]
    answer_s: float | None

    @property
    def ready(self) -> dict[str, Any]:
        """Return the fields of its `ready` event; empty where it did not get there."""
        return next((event.fields for event in self.events if event.kind == "ready"), {})

    @property
    def failure(self) -> dict[str, Any] | None:
        """Return the fields of its `fail` event."""
        return next((event.fields for event in self.events if event.kind == "fail"), None)

    def document(self) -> dict[str, Any]:
        """Return its part of the report."""
        ready = self.ready
        return {
            "name": self.name,
            "release": ready.get("release"),
            "phases": [
                {"name": name, "seconds": round(seconds, 2)}
                for name, seconds in phases(self.events, self.answer_s)
            ],
            "bytes_fetched": ready.get("fetched_bytes"),
            "agent_peak_mb": ready.get("agent_peak_mb"),
            "lowest_available_mb": ready.get("lowest_available_mb"),
            "failure": None if self.failure is None else self.failure.get("code"),
        }


def phases(events: Iterable[Evidence], answer_s: float | None) -> list[tuple[str, float]]:
    """Return each phase and how long it took, in seconds; the kernel's begins at 0.

    The last one, `answer`, begins with stage 2 and ends with the first answer.
    """
    starts = [("kernel", 0.0)]
    starts += [
        (str(event.fields.get("n")), event.at_s) for event in events if event.kind == "phase"
    ]
    if answer_s is None:
        return [(name, end - start) for (name, start), (_, end) in itertools.pairwise(starts)]
    # The host's clock says when it answered, the machine's when stage 2 began: they differ by hundredths.
    ends = [start for _, start in starts[1:]] + [max(answer_s, starts[-1][1])]
    return [(name, end - start) for (name, start), end in zip(starts, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class Report:
    """What a show came to; `seconds` is its whole length, `system` what was shown."""

    tally: Tally
    machines: Sequence[Machine]
    seconds: float
    system: str
    acts: Sequence[Act] = ()

    def document(self) -> dict[str, Any]:
        """Return the report as one JSON document."""
        return {
            "version": 1,
            "system": self.system,
            "seconds": round(self.seconds, 1),
            "requests": {
                "served": self.tally.served,
                "failed": self.tally.failed,
                "by_release": {str(n): count for n, count in self.tally.by_release.items()},
                "slowest_s": round(self.tally.slowest_s, 3),
                "reasons": list(self.tally.reasons),
            },
            "releases": [act.document() for act in self.acts],
            "machines": [machine.document() for machine in self.machines],
        }

    def text(self) -> str:
        """Return the report for people."""
        by_release = ", ".join(
            f"{count} of release {number}" for number, count in self.tally.by_release.items()
        )
        lines = [
            "",
            (
                f"Requests   {self.tally.served} served ({by_release or 'none'}), "
                f"{self.tally.failed} failed, slowest {self.tally.slowest_s:.2f} s"
            ),
        ]
        lines += [f"           failed: {reason}" for reason in self.tally.reasons[:5]]
        lines += ["", *map(_act, self.acts)]
        longest = max((machine.answer_s or 0.0 for machine in self.machines), default=0.0)
        for machine in self.machines:
            lines += ["", *_machine(machine, longest)]
        return "\n".join(lines)


def _act(act: Act) -> str:
    line = f"Release {act.release}  {act.outcome:<12} {act.seconds:6.1f} s  {act.what}"
    return f"{line}\n           {act.reason}" if act.reason else line


def _machine(machine: Machine, longest_s: float) -> list[str]:
    failure = machine.failure
    if failure is not None:
        return [f"{machine.name}   {failure.get('code')}: {failure.get('message')}"]
    ready = machine.ready
    fetched = (ready.get("fetched_bytes") or 0) / 1e6
    answer = "no answer" if machine.answer_s is None else f"answers after {machine.answer_s:.1f} s"
    lines = [
        f"{machine.name}   release {ready.get('release', '?')}, {answer}",
        (
            f"  {ready.get('paths', 0)} paths and {fetched:.1f} MB fetched, "
            f"agent's peak {ready.get('agent_peak_mb', '?')} MB, "
            f"lowest MemAvailable {ready.get('lowest_available_mb', '?')} MB"
        ),
    ]
    at = 0.0
    for name, seconds in phases(machine.events, machine.answer_s):
        scale = _BAR / longest_s if longest_s else 0.0
        left = round(at * scale)
        bar = " " * left + "━" * max(1, round((at + seconds) * scale) - left)
        lines.append(f"  {name:<12} {seconds:6.2f} s  {bar}")
        at += seconds
    return lines
