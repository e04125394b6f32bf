"""`calve history`: a fleet's releases, how each ended, and why. Read from the bucket; AWS knows how long they took."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from calve.cli import common, fleet_options
from calve.cli.session import Session
from calve.errors import AccessError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.aws.refreshes import Refresh
    from calve.fleet.history import Entry

__all__ = ["arguments", "document", "outcome", "run", "took_s"]

_MOST: Final = 1000
_REFRESHES: Final = 100  # DescribeInstanceRefreshes gives no more at once
_WIDTH: Final = 100


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "--last",
        type=common.between(1, _MOST),
        default=20,
        metavar="N",
        help="how many releases to show, the newest first (default: 20)",
    )
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """List them."""
    from calve.fleet import history

    with fleet_options.open_fleet(session, options) as opened:
        objects, fleet = opened.gateways.objects, opened.fleet
        entries = history.recent(objects, fleet.name, options.last)
        good = history.live(objects, fleet.name)
        live = None if good is None else good.number
        refreshes = _refreshes(opened, session) if entries else {}
    if options.json:
        found = [document(one, live=live, refreshes=refreshes) for one in entries]
        session.document({"fleet": fleet.name, "live": live, "releases": found})
    elif entries:
        _show(session, entries, live, refreshes)
    else:
        session.prose(f"{fleet.name} has no release yet")
    return 0


def _refreshes(opened: fleet_options.Opened, session: Session) -> dict[str, Refresh]:
    """Return the refreshes that AWS still knows, by their ids; none where it cannot be asked, as records suffice."""
    try:
        found = opened.gateways.refreshes.newest(opened.fleet.group, _REFRESHES)
    except (AccessError, NotFoundError) as error:
        session.prose(f"how long releases took is told by their records alone: {error.message}")
        return {}
    return {one.id: one for one in found}


def took_s(entry: Entry, refreshes: Mapping[str, Refresh]) -> float | None:
    """Return how long a rollout took: its refresh's time, else from record to verdict; None where it has not ended."""
    verdict = entry.verdict
    if verdict is None:
        return None
    refresh = refreshes.get(verdict.refresh)
    if refresh is not None and refresh.started_at is not None and refresh.ended_at is not None:
        return (refresh.ended_at - refresh.started_at).total_seconds()
    return max(0.0, (verdict.at - entry.release.created).total_seconds())


def outcome(entry: Entry, *, live: int | None, newest: bool) -> str:
    """Say how a release ended, or that it did not."""
    if entry.verdict is None:
        return "under way" if newest else "unfinished"
    ended = entry.verdict.outcome.value.replace("-", " ")
    return f"{ended}, live" if entry.release.number == live else ended


def _show(
    session: Session, entries: list[Entry], live: int | None, refreshes: Mapping[str, Refresh]
) -> None:
    from calve.nix.storepath import StorePath
    from calve.ui.table import table
    from calve.ui.text import seconds

    lines = []
    for at, one in enumerate(entries):
        took = took_s(one, refreshes)
        lines.append(
            (
                one.release.number,
                f"{one.release.created:%Y-%m-%d %H:%M}",
                StorePath.parse(one.release.system).name,
                # An older one without a verdict is none that is under way: a newer one took over.
                outcome(one, live=live, newest=at == 0),
                "-" if took is None else seconds(took),
                "-" if one.verdict is None else one.verdict.by,
                _why(one),
            )
        )
    headers = ("RELEASE", "WHEN (UTC)", "SYSTEM", "OUTCOME", "TOOK", "BY", "WHY")
    table(lines, headers, session.out)


def _why(entry: Entry) -> str:
    """Return the reason in one line, or which release it repeats."""
    verdict = entry.verdict
    if verdict is not None and verdict.reason is not None:
        text = " ".join(verdict.reason.text.split())
        return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
    return "" if entry.release.repeats is None else f"release {entry.release.repeats} again"


def document(entry: Entry, *, live: int | None, refreshes: Mapping[str, Refresh]) -> dict[str, Any]:
    """Return a release as JSON's types, without what machines' consoles said."""
    body = entry.document()
    took = took_s(entry, refreshes)
    reason = None if body["verdict"] is None else body["verdict"]["reason"]
    for failure in [] if reason is None else reason["failures"]:
        del failure["lines"]
    return {
        **body,
        "live": entry.release.number == live,
        "seconds": None if took is None else round(took, 1),
    }
