"""Listeners: what draws progress, chosen by what the stream is.

    with listener(sys.stderr) as progress:
        push(…, progress=progress)

`progress` may be called by any thread. Names and sentences are taken to be foreign.
"""

from __future__ import annotations

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from calve.clock import SYSTEM, Clock
from calve.progress import Event, Fact, Note, Step
from calve.ui.meter import Meter, amount, pace
from calve.ui.terminal import console, live
from calve.ui.text import one_line, sanitize

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Lines", "Listener", "Plain", "Terminal", "listener"]

_PLAIN_S = 2.0
_LINES_S = 0.5


class Listener(ABC):
    """Takes events while its block lasts."""

    def __init__(self, stream: IO[str], clock: Clock = SYSTEM) -> None:
        self._stream = stream
        self._clock = clock
        self._turn = threading.Lock()
        self._meters: dict[str, Meter] = {}

    def __call__(self, event: Event) -> None:
        """Take an event; where nobody reads the stream any more it is dropped."""
        with self._turn, suppress(BrokenPipeError):
            match event:
                case Note():
                    self._note(event)
                case Fact():
                    self._fact(event)
                case Step():
                    now_s = self._clock.monotonic()
                    meter = self._meters.setdefault(event.name, Meter())
                    if meter.step != event and event.total != 0:  # 0: there is nothing to do
                        meter.add(event, now_s)
                        self._step(event, meter, now_s)

    @abstractmethod
    def _note(self, note: Note) -> None:
        """Show a sentence."""

    def _fact(self, fact: Fact) -> None:
        """Show what happened: to people, its sentence."""
        if fact.text:
            self._note(Note(fact.text))

    @abstractmethod
    def _step(self, step: Step, meter: Meter, now_s: float) -> None:
        """Show counts that have changed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return


class _Paced(Listener):
    """Writes lines: of a step the first after a pause, then one a pause, and its last."""

    pause_s: float

    def __init__(self, stream: IO[str], clock: Clock = SYSTEM) -> None:
        super().__init__(stream, clock)
        self._due_s: dict[str, float] = {}

    def _step(self, step: Step, meter: Meter, now_s: float) -> None:
        due_s = self._due_s.setdefault(step.name, now_s + self.pause_s)
        if now_s < due_s and not meter.ended:
            return
        self._due_s[step.name] = now_s + self.pause_s
        self._write(self._line(step, meter))

    def _write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    @abstractmethod
    def _line(self, step: Step, meter: Meter) -> str:
        """Return a step's line."""


class Plain(_Paced):
    """Lines for people: a log, a pipe, a dumb terminal."""

    pause_s = _PLAIN_S

    def _note(self, note: Note) -> None:
        self._write(sanitize(note.text))

    def _line(self, step: Step, meter: Meter) -> str:
        speed = pace(meter)
        return f"{one_line(step.name)}: {amount(step)}{', ' if speed else ''}{speed}"


class Lines(_Paced):
    """A JSON object a line, for programs: {"event": "step", …}, {"event": "note", …} or a fact's own."""

    pause_s = _LINES_S

    def _note(self, note: Note) -> None:
        self._write(json.dumps({"event": "note", "text": note.text}))

    def _fact(self, fact: Fact) -> None:
        self._write(json.dumps({"event": fact.kind, **fact.fields}))

    def _line(self, step: Step, meter: Meter) -> str:  # noqa: ARG002
        row = {"name": step.name, "done": step.done, "total": step.total, "unit": step.unit}
        return json.dumps({"event": "step"} | row)


class Terminal(Listener):
    """A row a step, drawn again in place: bar, amount, rate. Sentences stand above the rows."""

    def __init__(
        self, stream: IO[str], clock: Clock = SYSTEM, environ: Mapping[str, str] = os.environ
    ) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__(stream, clock)
        self._rows: dict[str, TaskID] = {}
        self._progress: Progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}", markup=False),
            TextColumn("{task.fields[pace]}", markup=False),
            console=console(stream, environ),
            redirect_stdout=False,  # results are not ours to draw
            redirect_stderr=False,
        )

    def _note(self, note: Note) -> None:
        self._progress.console.print(sanitize(note.text), soft_wrap=True)

    def _step(self, step: Step, meter: Meter, now_s: float) -> None:  # noqa: ARG002
        if step.name not in self._rows:
            self._rows[step.name] = self._progress.add_task(
                one_line(step.name), total=step.total, amount="", pace=""
            )
        self._progress.update(
            self._rows[step.name],
            total=step.total,
            completed=step.done,
            amount=amount(step),
            pace=pace(meter),
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


def listener(
    stream: IO[str],
    *,
    json: bool = False,
    clock: Clock = SYSTEM,
    environ: Mapping[str, str] = os.environ,
) -> Listener:
    """Choose how progress is drawn on a stream: JSON lines where asked for, rows on a terminal, else plain lines."""
    if json:
        return Lines(stream, clock)
    if live(stream, environ):
        return Terminal(stream, clock, environ)
    return Plain(stream, clock)
