"""`calve timeline`: how a machine booted, drawn from its console's log."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from calve.cli import common
from calve.cli.session import Session
from calve.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.contract.timeline import Boot, Failure, Phase
    from calve.ui.svg import Chart

__all__ = ["arguments", "run"]

_BUFFER_BYTES: Final = 64 * 1024
_WAIT_S: Final = 0.2
_MOST_BOOTS: Final = 100  # of one log: the last are what one looks for
_BAR: Final = 40
_INSTANCE: Final = re.compile(r"i-[0-9a-f]{8,17}", re.ASCII)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "source",
        metavar="FILE|INSTANCE",
        help="the log of a console, - for stdin, or an EC2 instance (i-…), whose console is asked for",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture, too")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace, session: Session) -> int:
    """Draw it."""
    from calve.contract.timeline import Outcome, boots

    found: deque[Boot] = deque(maxlen=_MOST_BOOTS)
    with contextlib.closing(_log(options.source, session)) as chunks:
        found.extend(boots(chunks))
    if all(boot.outcome is Outcome.SILENT for boot in found):
        raise NotFoundError(
            "no evidence of a boot by Calve is in this log",
            place=options.source,
            hint="evidence is lines with @@calve; EC2 keeps the last 64 KiB of a console, and a new one has none yet",
        )
    if options.svg is not None:
        _write_svg(options.svg, found)
    if options.json:
        session.document({"source": options.source, "boots": [_document(boot) for boot in found]})
        return 0
    if found[0].number > 1:
        session.prose(f"the first {found[0].number - 1} boots of the log are left out")
    end_s = max(boot.end_s for boot in found)
    for boot in found:
        if boot is not found[0]:
            session.result("")
        _print(session, boot, end_s)
    return 0


# Input


def _log(source: str, session: Session) -> Generator[bytes]:
    """Yield a console's log, wherever it is."""
    if source == "-":
        yield from _read(0, session)
    elif _INSTANCE.fullmatch(source) and not Path(source).exists():
        yield _console(source)
    else:
        try:
            # Of a pipe that nobody writes to yet, opening would wait for ever.
            descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError("no such file", place=source) from error
        try:
            yield from _read(descriptor, session)
        except IsADirectoryError as error:
            raise UsageError("this is a directory", place=source) from error
        finally:
            os.close(descriptor)


def _read(descriptor: int, session: Session) -> Generator[bytes]:
    """Yield what a file, pipe or terminal has to its end; Ctrl-C ends the wait for more."""
    while True:
        session.cancel.check()
        if select.select([descriptor], [], [], _WAIT_S)[0]:
            chunk = os.read(descriptor, _BUFFER_BYTES)
            if not chunk:
                return
            yield chunk


def _console(instance_id: str) -> bytes:
    from calve.aws.ec2 import Ec2
    from calve.aws.session import Session as AwsSession
    from calve.aws.session import default_region

    return Ec2(AwsSession(default_region())).console(instance_id).encode("utf-8", "replace")


# Text


def _title(boot: Boot) -> str:
    from calve.contract.timeline import Outcome

    at = f"{boot.end_s:.1f} s"
    if boot.failure is not None:
        return f"boot {boot.number}: failed after {at}: {boot.failure.code or 'no code'}"
    return {
        Outcome.HEALTHY: f"boot {boot.number}: healthy after {at}",
        Outcome.READY: f"boot {boot.number}: handed over to the system, last heard of at {at}",
        Outcome.UNFINISHED: f"boot {boot.number}: neither ready nor failed, last heard of at {at}",
    }.get(boot.outcome, f"boot {boot.number}: a kernel started, and left no evidence")


def _notes(boot: Boot) -> list[str]:
    """Return what is to be said of a boot beside its phases."""
    figures = boot.figures
    lines = []
    if boot.degraded is not None:
        lines.append(f"an older system went on: {boot.degraded.code}: {boot.degraded.message}")
    if figures.system is not None:
        numbers = [("release", figures.release), ("generation", figures.generation)]
        known = [f"{name} {number}" for name, number in numbers if number is not None]
        lines.append(", ".join([figures.system, *known]))
    fetched, memory = _fetched(boot), _memory(boot)
    if fetched or memory:
        lines.append("; ".join([*fetched, *memory]))
    if boot.damaged_lines:
        lines.append(f"{common.plural(boot.damaged_lines, 'line')} of evidence cannot be read")
    return lines


def _fetched(boot: Boot) -> list[str]:
    from calve.ui.text import mb

    figures, rate = boot.figures, boot.fetched_bytes_per_s
    if figures.fetched_bytes is not None:
        per_s = "" if rate is None or not figures.fetched_bytes else f", {mb(rate)}/s"
        unpacked = "" if figures.nar_bytes is None else f" ({mb(figures.nar_bytes)} of NAR)"
        paths = "" if figures.paths is None else f"{common.plural(figures.paths, 'path')}, "
        return [f"fetched {paths}{mb(figures.fetched_bytes)}{unpacked}{per_s}"]
    if figures.nar_bytes is not None and figures.total_bytes is not None:
        return [f"unpacked {mb(figures.nar_bytes)} of {mb(figures.total_bytes)} of NAR"]
    return []


def _memory(boot: Boot) -> list[str]:
    pairs = (
        ("agent's peak", boot.figures.agent_peak_mb),
        ("lowest MemAvailable", boot.figures.lowest_available_mb),
    )
    return [f"{name} {value:.1f} MB" for name, value in pairs if value is not None]


def _print(session: Session, boot: Boot, end_s: float) -> None:
    from calve.ui.table import table
    from calve.ui.text import one_line

    session.result(one_line(_title(boot)))
    if boot.phases:
        rows = [
            (
                phase.name,
                f"{phase.begin_s:7.2f}",
                _time(phase).rjust(7),
                f"{boot.share(phase):6.1%}",
                _bar(phase, end_s),
            )
            for phase in boot.phases
        ]
        table(rows, ("PHASE", "START s", " TIME s", " SHARE", ""), session.out)
    for line in _notes(boot):
        session.result(one_line(line))
    if any(phase.is_gap for phase in boot.phases):
        session.result("...: no evidence says when one phase ended and the next began")
    _print_end(session, boot)


def _print_end(session: Session, boot: Boot) -> None:
    """Say why it failed; or what the console said last, where the machine does not say how it ended."""
    from calve.cli.explain import page
    from calve.contract.timeline import Outcome
    from calve.ui.text import one_line

    failure = boot.failure
    if failure is not None:
        where = f" in phase {failure.phase}" if failure.phase else ""
        session.result(one_line(f"{failure.code}{where}: {failure.message}"))
        for line in page(failure.code) or ["this version of Calve does not know the code"]:
            session.result(f"  {line}")
    elif boot.outcome not in {Outcome.READY, Outcome.HEALTHY} and boot.last_lines:
        session.result("last on the console:")
        for line in boot.last_lines:
            session.result(f"  {one_line(line)}")


def _time(phase: Phase) -> str:
    """Write how long a phase took, at least."""
    if phase.is_open:
        return f">{phase.seconds:.2f}" if phase.seconds else "?"
    return f"{phase.seconds:.2f}"


def _bar(phase: Phase, end_s: float) -> str:
    """Return a phase's bar: ━ what is known, > an end that is not, . a gap."""
    scale = _BAR / end_s if end_s else 0.0
    left = min(round(phase.begin_s * scale), _BAR - 1)
    size = max(1, round(phase.end_s * scale) - left)
    if phase.is_gap:
        return " " * left + "." * size
    return " " * left + ("━" * (size - 1) + ">" if phase.is_open else "━" * size)


# Picture


def _write_svg(path: Path, boots: Sequence[Boot]) -> None:
    from calve.ui.svg import timeline

    drawn = timeline(
        [_chart(boot) for boot in boots], title="calve timeline: seconds since the kernel started"
    )
    with common.translated("write the picture"):
        path.write_text(drawn, encoding="utf-8")


def _chart(boot: Boot) -> Chart:
    from calve.contract.explain import known
    from calve.ui.svg import Bar, Chart, Kind

    bars = []
    for phase in boot.phases:
        kind = Kind.GAP if phase.is_gap else Kind.OPEN if phase.is_open else Kind.SOLID
        note = f"{_time(phase)} s".rjust(9) + f"  {boot.share(phase):6.1%}"
        bars.append(Bar(phase.name, phase.begin_s, phase.end_s, note, kind))
    lines = _notes(boot)
    failure = boot.failure
    if failure is not None:
        code = known(failure.code)
        lines += [failure.message, *([] if code is None else [code.text])]
    return Chart(_title(boot), lines, bars, alarm=failure is not None)


# JSON


def _document(boot: Boot) -> dict[str, object]:
    rate = boot.fetched_bytes_per_s
    return {
        "number": boot.number,
        "outcome": boot.outcome.value,
        "seconds": boot.end_s,
        "phases": [
            {
                "name": phase.name,
                "begin_s": phase.begin_s,
                "seconds": round(phase.seconds, 3),
                "share": round(boot.share(phase), 4),
                "open": phase.is_open,
                "gap": phase.is_gap,
            }
            for phase in boot.phases
        ],
        **asdict(boot.figures),
        "fetched_bytes_per_s": None if rate is None else round(rate),
        "failure": _failure(boot.failure),
        "degraded": _failure(boot.degraded),
        "damaged_lines": boot.damaged_lines,
        "last_lines": list(boot.last_lines),
    }


def _failure(failure: Failure | None) -> dict[str, object] | None:
    from calve.contract.explain import known

    if failure is None:
        return None
    code = known(failure.code)
    return {
        **asdict(failure),
        "text": None if code is None else code.text,
        "transient": None if code is None else code.transient,
    }
