"""How machines booted, out of their console's log: for each boot its phases, figures and end.

    with open("console.log", "rb") as log:
        for boot in boots(iter(lambda: log.read(65536), b"")):
            print(boot.outcome, boot.end_s)

Evidence is a hint: whoever writes to the console can write evidence. What it does not say is not made up: time of
which no line says what it went into is a gap.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from calve.contract.console import Item, Mark, scan
from calve.contract.evidence import PHASES, Evidence

__all__ = ["Boot", "Failure", "Figures", "Outcome", "Phase", "boots"]

# What every boot goes through; the others are left out where there is nothing to do.
_ALWAYS = frozenset({"kernel", "network", "agent", "imds", "commit"})
_BACK_S = 1.0  # threads write as they come; a kernel's clock never goes back further
_MOST_PHASES = 64  # of one boot: foreign text decides nothing about our memory
_LARGEST = 1 << 62


class Outcome(enum.StrEnum):
    """How a boot ended, as far as its console tells."""

    HEALTHY = "healthy"  # the system is well, and has said so
    READY = "ready"  # handed over to the system
    FAILED = "failed"  # said so
    UNFINISHED = "unfinished"  # the log ends, or the next boot begins
    SILENT = "silent"  # a kernel started, and nothing more is known


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of a boot; seconds since the kernel started.

    Attributes:
        name: of the phase; of a gap the phases between which nothing is known.
        begin_s: when it began.
        end_s: when it ended; of an open one when it was last heard of.
        is_open: no line says when it ended.
        is_gap: no line says what began or ended in it.
    """

    name: str
    begin_s: float
    end_s: float
    is_open: bool = False
    is_gap: bool = False

    @property
    def seconds(self) -> float:
        """Return how long it took; of an open one at least."""
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a boot failed, in the machine's words: foreign text, and a code that may be of a later version."""

    code: str
    phase: str
    message: str


@dataclass(frozen=True, slots=True)
class Figures:
    """What a machine said of itself; None is what it did not say.

    Attributes:
        agent: version of the agent.
        system: store path.
        release: number.
        generation: number.
        paths: fetched.
        nar_bytes: unpacked, of the paths that were fetched.
        total_bytes: that were to be unpacked.
        fetched_bytes: as they came over the network.
        agent_peak_mb: largest resident set of the agent.
        lowest_available_mb: lowest MemAvailable.
    """

    agent: str | None = None
    system: str | None = None
    release: int | None = None
    generation: int | None = None
    paths: int | None = None
    nar_bytes: int | None = None
    total_bytes: int | None = None
    fetched_bytes: int | None = None
    agent_peak_mb: float | None = None
    lowest_available_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Boot:
    """One boot of a kernel.

    Attributes:
        number: in the log, from 1.
        outcome: how it ended.
        phases: in their order, without a break from 0 to `end_s`.
        figures: what the machine said of itself.
        failure: why it failed.
        degraded: why another system went on than the one that was wanted.
        end_s: seconds from the kernel's start to the last evidence.
        damaged_lines: lines of evidence that are cut or were written into.
        last_lines: what the console said last, after the last evidence; three at most, foreign text.
    """

    number: int
    outcome: Outcome
    phases: tuple[Phase, ...]
    figures: Figures
    failure: Failure | None
    degraded: Failure | None
    end_s: float
    damaged_lines: int
    last_lines: tuple[str, ...]

    def share(self, phase: Phase) -> float:
        """Return a phase's part of the whole, 0 to 1."""
        return phase.seconds / self.end_s if self.end_s > 0 else 0.0

    @property
    def fetched_bytes_per_s(self) -> float | None:
        """Return the rate over the network while pulling; None where it is not known."""
        pulled = [phase for phase in self.phases if phase.name == "pull" and not phase.is_open]
        seconds = sum(phase.seconds for phase in pulled)
        if self.figures.fetched_bytes is None or seconds <= 0:
            return None
        return self.figures.fetched_bytes / seconds


def boots(chunks: Iterable[bytes]) -> Iterator[Boot]:
    """Yield the boots of a console log, in order; none where it has no evidence and no kernel's first line.

    Args:
        chunks: the log's bytes, in pieces of any size.
    """
    number = 1
    boot = _Boot()
    for item in scan(chunks):
        if boot.ends_before(item):
            if boot.begun:
                yield boot.made(number, item.before)
                number += 1
            boot = _Boot()
        boot.take(item)


@dataclass(slots=True)
class _Boot:
    """A boot that is being read."""

    begun: bool = False
    heard: bool = False
    phases: list[Phase] = field(default_factory=list)
    last_s: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    failure: Failure | None = None
    degraded: Failure | None = None
    ready: bool = False
    healthy: bool = False
    damaged: int = 0

    def ends_before(self, item: Item) -> bool:
        """Say whether an item is of the next boot."""
        event = item.event
        if event is None:
            return item.mark in {Mark.KERNEL, Mark.END}
        if not self.heard:
            return False
        name = event.fields.get("n") if event.kind == "phase" else None
        return (
            event.at_s < self.last_s - _BACK_S
            or name == "network"  # the first phase that says so
            or (self.failure is not None and event.kind in {"start", "phase"})
        )

    def take(self, item: Item) -> None:
        """Take an item of this boot."""
        self.begun = self.begun or item.mark is not Mark.END
        self.damaged += item.mark is Mark.DAMAGED
        event = item.event
        if event is None:
            return
        self.heard = True
        at_s = max(round(event.at_s, 3), self.last_s)
        match event.kind:
            case "phase":
                self._enter(_text(event.fields.get("n")) or "?", at_s)
            case "start":
                self._imply("agent", at_s)
                self.figures["agent"] = _text(event.fields.get("agent"))
            case "progress":
                self._imply(event.fields.get("n"), at_s)
                self._progress(event)
            case "ready":
                self._imply("commit", at_s)
                self.ready = True
                self._ready(event.fields)
            case "degraded":
                self.degraded = _failure(event)
            case "healthy":
                self._imply("health", at_s)
                self.healthy = True
            case "fail":
                self._imply(event.fields.get("phase"), at_s)
                self.failure = _failure(event)
        self.last_s = at_s

    # Phases

    def _enter(self, name: str, at_s: float) -> None:
        """Begin a phase; what was left out before it, and should not have been, is a gap."""
        if len(self.phases) >= _MOST_PHASES:
            return
        if not self.phases:
            if name == "kernel":
                self.phases.append(Phase(name, 0.0, at_s, is_open=True))
                return
            first = "kernel" if name == "network" else f"kernel to {_before(name)}"
            self.phases.append(Phase(first, 0.0, at_s, is_gap=name != "network"))
        elif any(each in _ALWAYS for each in _between(self.phases[-1].name, name)):
            self._gap(_between(self.phases[-1].name, name)[-1], at_s)
        else:
            last = self.phases[-1]
            self.phases[-1] = Phase(last.name, last.begin_s, at_s)
        self.phases.append(Phase(name, at_s, at_s, is_open=True))

    def _imply(self, name: object, at_s: float) -> None:
        """Begin a phase whose own line is lost: one that a later line speaks of."""
        now = self.phases[-1].name if self.phases else ""
        if not isinstance(name, str) or name not in PHASES or len(self.phases) >= _MOST_PHASES:
            return
        if not now:
            self._enter(name, at_s)
        elif now in PHASES and PHASES.index(now) < PHASES.index(name):
            self._gap(name, at_s)
            self.phases.append(Phase(name, at_s, at_s, is_open=True))

    def _gap(self, until: str, at_s: float) -> None:
        """End the last phase when it was last heard of; from there on nothing is known."""
        last = self.phases.pop()
        if self.last_s > last.begin_s:
            self.phases.append(Phase(last.name, last.begin_s, self.last_s))
        if at_s > self.last_s:
            self.phases.append(Phase(f"{last.name} to {until}", self.last_s, at_s, is_gap=True))

    # Figures

    def _progress(self, event: Evidence) -> None:
        fields = event.fields
        self._lowest(fields.get("available_mb"))
        if fields.get("n") == "pull" and fields.get("unit") == "bytes":
            self.figures["nar_bytes"] = _count(fields.get("done"))
            self.figures["total_bytes"] = _count(fields.get("total"))

    def _ready(self, fields: Mapping[str, Any]) -> None:
        self._lowest(fields.get("lowest_available_mb"))
        self.figures["system"] = _text(fields.get("system"))
        self.figures["agent_peak_mb"] = _number(fields.get("agent_peak_mb"))
        for name in ("release", "generation", "paths", "nar_bytes", "fetched_bytes"):
            self.figures[name] = _count(fields.get(name))
        self.figures["total_bytes"] = self.figures["nar_bytes"]

    def _lowest(self, value: object) -> None:
        found = [self.figures.get("lowest_available_mb"), _number(value)]
        known = [each for each in found if each is not None]
        self.figures["lowest_available_mb"] = min(known, default=None)

    def made(self, number: int, last_lines: tuple[str, ...]) -> Boot:
        """Return the boot, now that it is over."""
        phases = self.phases
        if phases:
            is_open = self.failure is None and not self.healthy
            phases[-1] = Phase(phases[-1].name, phases[-1].begin_s, self.last_s, is_open=is_open)
        elif self.heard:
            phases.append(Phase("kernel to ?", 0.0, self.last_s, is_gap=True))
        return Boot(
            number,
            self._outcome(),
            tuple(phases),
            Figures(**self.figures),
            self.failure,
            self.degraded,
            self.last_s,
            self.damaged,
            last_lines,
        )

    def _outcome(self) -> Outcome:
        if self.failure is not None:
            return Outcome.FAILED
        if self.healthy:
            return Outcome.HEALTHY
        if self.ready:
            return Outcome.READY
        return Outcome.UNFINISHED if self.heard else Outcome.SILENT


def _between(first: str, then: str) -> tuple[str, ...]:
    """Return the phases that stand between two in the order of a boot; none where one of them is not known."""
    if first not in PHASES or then not in PHASES:
        return ()
    return PHASES[PHASES.index(first) + 1 : PHASES.index(then)]


def _before(name: str) -> str:
    """Return the phase that stands before one in the order of a boot."""
    at = PHASES.index(name) if name in PHASES else 0
    return PHASES[at - 1] if at else "?"


def _failure(event: Evidence) -> Failure:
    return Failure(*(_text(event.fields.get(name)) or "" for name in ("code", "phase", "message")))


def _text(value: object) -> str | None:
    """Return a text that can be encoded: JSON may name half a character."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _number(value: object) -> float | None:
    """Return a number that one can reckon with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < _LARGEST and isfinite(value) else None


def _count(value: object) -> int | None:
    return int(value) if isinstance(value, int) and _number(value) is not None else None
