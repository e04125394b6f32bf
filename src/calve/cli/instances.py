"""`calve instances`: a fleet's machines, a row each, with what each said last of its boot: a hint, never a proof."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from calve.cli import common, fleet_options, fleet_rows
from calve.cli.session import Session
from calve.errors import AccessError, NotFoundError, TransientError
from calve.tasks import Group

if TYPE_CHECKING:
    import datetime as dt

    from calve.aws.ec2 import Ec2
    from calve.cli.fleet_rows import Row, Seen
    from calve.contract.evidence import Evidence
    from calve.rollout.observe import Gateways
    from calve.tasks import Cancel

__all__ = ["Heard", "arguments", "hear", "last", "launched", "run"]

_REPORTS: Final = 16
"""Reports that are asked for at once."""
_CONSOLES: Final = 2
"""Consoles likewise: GetConsoleOutput has a small budget of its own in an account."""
_TOGETHER: Final = 200


@dataclass(frozen=True, slots=True)
class Heard:
    """What a machine said of its boot: where, "report" or "console", and its evidence."""

    source: str
    events: tuple[Evidence, ...]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "--console",
        action="store_true",
        help="ask for the console of each machine that has written no report yet",
    )
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """List them."""
    from calve.clock import SYSTEM

    with fleet_options.open_fleet(session, options) as opened:
        gateways = opened.gateways
        seen = fleet_rows.look(gateways, opened.fleet)
        born = launched(gateways.ec2, [row.id for row in seen.rows])
        heard = hear(gateways, seen, session.cancel, consoles=options.console)
    now = SYSTEM.now()
    if options.json:
        found = [_document(row, born.get(row.id), heard.get(row.id)) for row in seen.rows]
        session.document({"fleet": opened.fleet.name, "instances": found})
    elif seen.rows:
        _show(session, seen.rows, born, heard, now)
    else:
        session.prose(f"{seen.group.name} has no machines")
    return 0


def launched(ec2: Ec2, ids: Sequence[str]) -> dict[str, dt.datetime]:
    """Return when instances were launched; one that EC2 does not show, yet or any more, is left out."""
    found: dict[str, dt.datetime] = {}
    todo = [ids[at : at + _TOGETHER] for at in range(0, len(ids), _TOGETHER)]
    while todo:
        some = todo.pop()
        try:
            found.update((one.id, one.launched_at) for one in ec2.instances(some))
        except NotFoundError:
            # One of them is unknown, and all go without an answer: halve until it stands alone.
            half = len(some) // 2
            todo += [part for part in (some[:half], some[half:]) if half]
    return found


def hear(gateways: Gateways, seen: Seen, cancel: Cancel, *, consoles: bool) -> dict[str, Heard]:
    """Read machines' reports, and the consoles of those that have none where these are wanted.

    Args:
        gateways: the bucket and EC2.
        seen: the machines, and what they were told.
        cancel: ends it.
        consoles: a machine that is booting has written no report, and costs a call of EC2's.
    """
    from calve.rollout.observe import report_of

    heard: dict[str, Heard] = {}

    def report(row: Row) -> None:
        text = report_of(gateways.objects, seen.told_of(row), row.id)
        if text:
            heard[row.id] = _heard("report", text)

    def console(row: Row) -> None:
        try:
            text = gateways.ec2.console(row.id)
        except (AccessError, NotFoundError, TransientError):
            return
        if text:
            heard[row.id] = _heard("console", text)

    with Group("reports", limit=_REPORTS, parent=cancel) as group:
        for row in seen.rows:
            group.spawn(report, row)
    if consoles:
        with Group("consoles", limit=_CONSOLES, parent=cancel) as group:
            for row in seen.rows:
                if row.id not in heard:
                    group.spawn(console, row)
    return heard


def _heard(source: str, text: str) -> Heard:
    from calve.contract import evidence

    return Heard(source, tuple(evidence.read(text)))


def last(events: Iterable[Evidence]) -> str:
    """Say what evidence comes to: a failure, how far the boot came, or that it is well; foreign text, "-" for none."""
    said = "-"
    for event in events:
        fields = event.fields
        match event.kind:
            case "fail":
                said = f"failed: {fields.get('code')}: {fields.get('message')}"
            case "degraded":
                said = f"degraded: {fields.get('code')}: {fields.get('message')}"
            case "healthy" | "ready":
                # Of one that fell back, the older system is well.
                said = said if said.startswith("degraded") else event.kind
            case "phase":
                said = said if said.startswith("degraded") else str(fields.get("n", "-"))
    return said


def _show(
    session: Session,
    rows: Sequence[Row],
    born: dict[str, dt.datetime],
    heard: dict[str, Heard],
    now: dt.datetime,
) -> None:
    from calve.ui.table import table

    lines = []
    for row in rows:
        one, began = heard.get(row.id), born.get(row.id)
        lines.append(
            (
                row.id,
                fleet_rows.number(row.release),
                row.version or "-",
                row.zone,
                row.lifecycle if row.healthy else f"{row.lifecycle}, unhealthy",
                row.balance,
                "-" if one is None else last(one.events),
                fleet_rows.span(None if began is None else (now - began).total_seconds()),
            )
        )
    headers = ("INSTANCE", "RELEASE", "VERSION", "ZONE", "LIFECYCLE", "TARGET", "SAID", "AGE")
    table(lines, headers, session.out)


def _document(row: Row, began: dt.datetime | None, heard: Heard | None) -> dict[str, Any]:
    events = () if heard is None else heard.events
    event = events[-1] if events else None
    phases = (str(one.fields.get("n", "")) for one in reversed(events) if one.kind == "phase")
    return {
        **row.document(),
        "launched_at": None if began is None else began.isoformat(timespec="seconds"),
        "source": None if heard is None else heard.source,
        "phase": next(phases, None),
        "said": None if event is None else last(events),
        "evidence": None if event is None else {"e": event.kind, "t": event.at_s, **event.fields},
    }
