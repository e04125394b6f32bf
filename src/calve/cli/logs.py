"""`calve logs`: why a release failed, and what its failed machines said; the rollout kept it in the bucket."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.cli import common, fleet_options
from calve.cli.console import instance, plain
from calve.cli.session import Session
from calve.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.cache.objects import Objects
    from calve.fleet.verdict import Failure, Reason

__all__ = ["Log", "Told", "arguments", "failed", "read", "run"]


@dataclass(frozen=True, slots=True)
class Log:
    """What is known of one machine; foreign text.

    Attributes:
        failure: what became of it; None where the reason does not name it.
        text: what it said; "" where nothing was kept.
        whole: it is the report or console; else only the last lines, of the reason.
    """

    instance: str
    failure: Failure | None
    text: str
    whole: bool


@dataclass(frozen=True, slots=True)
class Told:
    """Why a release was given up, and its machines' logs; `outcome` is None while it has not ended."""

    fleet: str
    release: int
    outcome: str | None
    reason: Reason | None
    logs: tuple[Log, ...]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "release",
        nargs="?",
        type=common.between(1, 99_999_999),
        metavar="NUMBER",
        help="the release (default: the newest one that failed)",
    )
    parser.add_argument(
        "--instance", type=instance, metavar="ID", help="only what this machine said"
    )
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Print them."""
    _number_alone(options)
    with fleet_options.open_fleet(session, options) as opened:
        objects, fleet = opened.gateways.objects, opened.fleet.name
        number = failed(objects, fleet) if options.release is None else options.release
        if number is None:
            raise NotFoundError(f"no release of {fleet} has failed", place=objects.url)
        told = read(objects, fleet, number, options.instance)
    if options.json:
        session.document(_document(told))
    else:
        _show(session, told)
    return 0


def _number_alone(options: argparse.Namespace) -> None:
    """Take a number that stands alone as the release's, unless a fleet has that name."""
    name = options.fleet
    if options.release is not None or name is None or not (name.isascii() and name.isdecimal()):
        return
    if name in fleet_options.config_of(options).fleets:
        return
    try:
        options.release = common.between(1, 99_999_999)(name)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error), place="NUMBER") from error
    options.fleet = None


def failed(objects: Objects, fleet: str) -> int | None:
    """Return the number of the newest release that failed, or is being given up; None where none has."""
    from calve.fleet import ends, history
    from calve.fleet import release as releases
    from calve.fleet.verdict import Outcome

    there = history.under_way(objects, fleet)
    if there is not None and ends.read_reason(objects, fleet, there.number) is not None:
        return there.number
    bad = {Outcome.ROLLED_BACK, Outcome.ROLLBACK_FAILED, Outcome.FAILED}
    for number in releases.listed(objects, fleet).ended:
        verdict = ends.read(objects, fleet, number)
        if verdict is not None and verdict.outcome in bad:
            return number
    return None


def read(objects: Objects, fleet: str, number: int, only: str | None = None) -> Told:
    """Return what is known of a release's failed machines, in the order of its reason.

    Args:
        objects: the bucket.
        fleet: its name.
        number: the release's.
        only: a machine's id; None for all.

    Raises:
        NotFoundError: there is no such release, or nothing was kept of that machine.
    """
    from calve.fleet import ends
    from calve.fleet import release as releases

    release = releases.read(objects, fleet, number)
    verdict = ends.read(objects, fleet, number)
    reason = None if verdict is None else verdict.reason
    if reason is None:
        reason = ends.read_reason(objects, fleet, number)
    kept = ends.logs(objects, fleet, number)
    failures = {one.instance: one for one in (() if reason is None else reason.failures)}
    found = [
        _log(one, failures.get(one), kept.get(one))
        for one in dict.fromkeys([*failures, *kept])
        if only in {None, one}
    ]
    if only is not None and not found:
        raise NotFoundError(
            f"nothing was kept of {only}",
            place=f"{objects.url}/{release.key}",
            hint="calve console asks for what EC2 still has: for an hour after a machine's end",
        )
    outcome = None if verdict is None else verdict.outcome.value
    return Told(fleet, number, outcome, reason, tuple(found))


def _log(name: str, failure: Failure | None, text: str | None) -> Log:
    if text is not None:
        return Log(name, failure, text, whole=True)
    return Log(name, failure, "" if failure is None else "\n".join(failure.lines), whole=False)


def _show(session: Session, told: Told) -> None:
    from calve.ui.text import one_line

    ended = "has not ended" if told.outcome is None else told.outcome.replace("-", " ")
    reason = "" if told.reason is None else f": {told.reason.text}"
    session.result(one_line(f"release {told.release} of {told.fleet}: {ended}{reason}"))
    for log in told.logs:
        failure = log.failure
        where = f" in phase {failure.phase}" if failure is not None and failure.phase else ""
        what = "" if failure is None else f"{where}: {failure.code}: {failure.message}"
        session.result("")
        session.result(one_line(f"== {log.instance}{what}"))
        if log.text:
            session.result(plain(log.text).removesuffix("\n"))
        if not log.whole:
            session.prose(
                f"{log.instance}: {'only these lines were' if log.text else 'nothing was'} kept"
            )
    if not told.logs:
        session.prose("no machine's words were kept")


def _document(told: Told) -> dict[str, Any]:
    reason = told.reason
    return {
        "fleet": told.fleet,
        "release": told.release,
        "outcome": told.outcome,
        "rule": None if reason is None else reason.rule,
        "reason": None if reason is None else reason.text,
        "by": None if reason is None else reason.by,
        "at": None if reason is None else reason.at.isoformat(timespec="milliseconds"),
        "logs": [
            {
                "instance": log.instance,
                "code": None if log.failure is None else log.failure.code,
                "message": None if log.failure is None else log.failure.message,
                "phase": None if log.failure is None else log.failure.phase,
                "text": log.text,
                "whole": log.whole,
            }
            for log in told.logs
        ],
    }
