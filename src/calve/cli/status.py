"""`calve status`: how a fleet stands, from AWS and the bucket: its group, releases, refresh, lock and machines."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from calve.cli import common, fleet_options, fleet_rows
from calve.cli.session import Session

if TYPE_CHECKING:
    import datetime as dt

    from calve.aws.refreshes import Refresh
    from calve.cli.fleet_rows import Seen
    from calve.clock import Clock
    from calve.fleet.lock import Holder
    from calve.fleet.release import Release
    from calve.fleet.verdict import Verdict

__all__ = ["Status", "Warned", "arguments", "document", "look", "run", "show", "warnings"]

_ROWS: Final = 20
"""So many machines have a line each."""


@dataclass(frozen=True, slots=True)
class Status:
    """How a fleet stands.

    Attributes:
        seen: its group and machines.
        live: the newest release that went well; None before the first.
        ended: that release's verdict.
        under_way: the newest release, where it has no verdict.
        failed: the newest release's verdict, where it has one and is not the live one.
        refresh: the group's newest, whatever it is to; None where AWS knows of none.
        lock: who holds the deploy lock.
        at: when this was seen, UTC.
    """

    region: str
    seen: Seen
    live: Release | None
    ended: Verdict | None
    under_way: Release | None
    failed: Verdict | None
    refresh: Refresh | None
    lock: Holder | None
    at: dt.datetime

    @property
    def active(self) -> bool:
        """Say whether a refresh is under way."""
        return self.refresh is not None and self.refresh.active


@dataclass(frozen=True, slots=True)
class Warned:
    """What a person should see to: a code for programs, a sentence, and what to do."""

    code: str
    message: str
    hint: str


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Show it."""
    from calve.clock import SYSTEM

    with fleet_options.open_fleet(session, options) as opened:
        status = look(opened, SYSTEM)
    if options.json:
        session.document(document(status))
    else:
        show(session, status)
    return 0


def look(opened: fleet_options.Opened, clock: Clock) -> Status:
    """Ask the bucket and AWS how a fleet stands.

    Raises:
        NotFoundError: the bucket or the group does not exist.
    """
    from calve.fleet import ends, history, lock
    from calve.fleet import release as releases

    gateways, fleet = opened.gateways, opened.fleet
    objects = gateways.objects
    live = history.live(objects, fleet.name)
    ended = None if live is None else ends.read(objects, fleet.name, live.number)
    under_way = history.under_way(objects, fleet.name)
    last = releases.listed(objects, fleet.name).latest
    other = bool(last) and (live is None or last != live.number)
    failed = ends.read(objects, fleet.name, last) if other else None
    holder = lock.read(objects, fleet.name, clock.now())
    # The group goes first: of one that does not exist, AWS cannot be asked for refreshes either.
    seen = fleet_rows.look(gateways, fleet)
    refresh = next(iter(gateways.refreshes.newest(fleet.group, 1)), None)
    if refresh is not None and refresh.version is not None:
        seen = fleet_rows.with_version(seen, gateways.ec2, refresh.version)
    region = opened.aws.region or ""
    return Status(region, seen, live, ended, under_way, failed, refresh, holder, clock.now())


def warnings(status: Status) -> Iterator[Warned]:
    """Yield what a person should see to."""
    seen, live = status.seen, status.live
    version = seen.group.version
    if version is not None and not version.isdecimal():
        yield Warned(
            "unnumbered",
            f"the group launches from {version}, not from a numbered version",
            "calve adopt puts it on a number: from $Latest and $Default nothing can be rolled back",
        )
    staying = Counter(
        (row.template or "", row.version or "none") for row in seen.rows if not row.leaving
    )
    if len(staying) > 1 and not status.active:
        several = len({template for template, _ in staying}) > 1
        each = ", ".join(
            f"{count} of version {version}{f' of {template}' if several else ''}"
            for (template, version), count in sorted(staying.items())
        )
        yield Warned(
            "mixed",
            f"machines differ, and no instance refresh is under way: {each}",
            "the next deploy makes them one again",
        )
    if live is None:
        yield Warned(
            "no-last-good",
            "no release has gone well yet: there is none to go back to",
            "the first one that does is the last good one from then on",
        )
    elif not status.active and seen.release(seen.configured) not in _wanted(status, live):
        now = seen.release(seen.configured)
        carried = "no release of this fleet" if now is None else f"release {now}"
        yield Warned(
            "drift",
            f"the group launches {carried}, and release {live.number} is the live one",
            "somebody changed the group's version: the next machine would be another than its neighbours",
        )
    if status.under_way is not None and not status.active and status.lock is None:
        yield Warned(
            "stalled",
            f"release {status.under_way.number} has no verdict, and nobody is at work on it",
            "calve deploy of the same system goes on with it",
        )


def _wanted(status: Status, live: Release) -> set[int]:
    """Return the releases that the group may well launch: the live one, and one that only lacks its verdict."""
    return {live.number} if status.under_way is None else {live.number, status.under_way.number}


# Text


def show(session: Session, status: Status) -> None:
    """Print it."""
    from calve.ui.table import table
    from calve.ui.text import one_line

    for label, text in _lines(status):
        session.result(f"{label:<10} {one_line(text)}")
    rows = status.seen.rows
    if rows:
        session.result("")
    if len(rows) > _ROWS:
        lines = [
            (count, fleet_rows.number(release), version or "-", state)
            for release, version, state, count in fleet_rows.counts(rows)
        ]
        table(lines, ("MACHINES", "RELEASE", "VERSION", "STATE"), session.out)
    elif rows:
        each = [
            (row.id, fleet_rows.number(row.release), row.version or "-", row.zone, row.state)
            for row in rows
        ]
        table(each, ("INSTANCE", "RELEASE", "VERSION", "ZONE", "STATE"), session.out)


def _lines(status: Status) -> Iterator[tuple[str, str]]:
    seen = status.seen
    group = seen.group
    yield "fleet", f"{seen.fleet}, in {status.region}"
    yield (
        "group",
        (
            f"{group.name}: {common.plural(group.desired, 'machine')} wanted,"
            f" {group.min_size} to {group.max_size}; health checks: {group.health_check}"
        ),
    )
    if group.suspended:
        yield "suspended", ", ".join(group.suspended)
    yield "launches", _launches(seen)
    yield "live", _live(status)
    if status.under_way is not None:
        ago = fleet_rows.span((status.at - status.under_way.created).total_seconds())
        yield "under way", f"{_release(status.under_way)}, made {ago} ago"
    if status.failed is not None:
        yield "last", _failed(status, status.failed)
    if status.refresh is not None:
        yield "refresh", _refresh(status, status.refresh)
    if status.lock is not None:
        lock = status.lock
        yield "lock", f"{lock.owner} for {lock.doing}, until {lock.expires:%H:%M:%S} UTC or longer"
    yield "machines", _machines(seen)
    if group.target_groups:
        yield "targets", _targets(seen)
    for one in warnings(status):
        yield "warning", f"{one.message} ({one.hint})"


def _launches(seen: Seen) -> str:
    if seen.group.template_id is None:
        return "from no launch template"
    said = seen.group.version or "$Default"
    named = said if said.isdecimal() or seen.configured is None else f"{said} = {seen.configured}"
    release = seen.release(seen.configured)
    carried = "which carries no release of this fleet" if release is None else f"release {release}"
    return f"version {named} of {seen.group.template_id}, {carried}"


def _live(status: Status) -> str:
    if status.live is None:
        return "none yet"
    if status.ended is None:
        return _release(status.live)
    ago = fleet_rows.span((status.at - status.ended.at).total_seconds())
    return f"{_release(status.live)}, for {ago}"


def _release(release: Release) -> str:
    from calve.nix.storepath import StorePath

    return f"release {release.number}, {StorePath.parse(release.system).name}"


def _failed(status: Status, verdict: Verdict) -> str:
    ago = fleet_rows.span((status.at - verdict.at).total_seconds())
    reason = "" if verdict.reason is None else f": {verdict.reason.text}"
    return f"release {verdict.release}, {verdict.outcome.value.replace('-', ' ')} {ago} ago{reason}"


def _refresh(status: Status, refresh: Refresh) -> str:
    number = status.seen.release(refresh.version)
    to = "" if number is None else f" to release {number}"
    # Its end is when it ended, or its beginning where it has not.
    when = refresh.started_at if refresh.active else refresh.ended_at
    ago = "" if when is None else fleet_rows.span((status.at - when).total_seconds())
    since = "" if not ago else f", for {ago}" if refresh.active else f", {ago} ago"
    said = refresh.reason or ("" if refresh.rollback is None else refresh.rollback.reason)
    reason = f": {said}" if said else ""
    return f"{refresh.status}{to}, {refresh.percent} %{since}{reason}"


def _machines(seen: Seen) -> str:
    """Say how many machines of each release there are."""
    found = Counter(row.release for row in seen.rows)
    parts = [
        f"{count} of {'no release' if release is None else f'release {release}'}"
        for release, count in found.items()
    ]
    return ", ".join(parts) or "none"


def _targets(seen: Seen) -> str:
    found = Counter(row.target.state for row in seen.rows if row.target is not None)
    return ", ".join(f"{count} {state}" for state, count in sorted(found.items())) or "none"


# JSON


def document(status: Status) -> dict[str, Any]:
    """Return it as JSON's types."""
    seen = status.seen
    group, refresh = seen.group, status.refresh
    return {
        "fleet": seen.fleet,
        "region": status.region,
        "at": _time(status.at),
        "group": {
            "name": group.name,
            "template": group.template_id,
            "version": group.version,
            "version_number": None if seen.configured is None else int(seen.configured),
            "release": seen.release(seen.configured),
            "desired": group.desired,
            "min": group.min_size,
            "max": group.max_size,
            "health_check": group.health_check,
            "suspended": list(group.suspended),
        },
        "live": _release_document(status.live, None if status.ended is None else status.ended.at),
        "under_way": _release_document(status.under_way, None),
        "last": None if status.failed is None else _verdict_document(status.failed),
        "refresh": None if refresh is None else _refresh_document(seen, refresh),
        "lock": None if status.lock is None else status.lock.document(),
        "machines": [
            {"release": release, "version": version, "state": state, "count": count}
            for release, version, state, count in fleet_rows.counts(seen.rows)
        ],
        "targets": dict(Counter(row.target.state for row in seen.rows if row.target is not None)),
        "warnings": [
            {"code": one.code, "message": one.message, "hint": one.hint} for one in warnings(status)
        ],
    }


def _release_document(release: Release | None, since: dt.datetime | None) -> dict[str, Any] | None:
    if release is None:
        return None
    return {
        "release": release.number,
        "system": release.system,
        "created": _time(release.created),
        "live_since": _time(since),
    }


def _verdict_document(verdict: Verdict) -> dict[str, Any]:
    return {
        "release": verdict.release,
        "outcome": verdict.outcome.value,
        "at": _time(verdict.at),
        "by": verdict.by,
        "reason": None if verdict.reason is None else verdict.reason.text,
    }


def _refresh_document(seen: Seen, refresh: Refresh) -> dict[str, Any]:
    back = refresh.rollback
    return {
        "id": refresh.id,
        "status": refresh.status,
        "percent": refresh.percent,
        "remaining": refresh.remaining,
        "reason": refresh.reason,
        "rollback_reason": None if back is None else back.reason,
        "version": refresh.version,
        "release": seen.release(refresh.version),
        "started_at": _time(refresh.started_at),
        "ended_at": _time(refresh.ended_at),
    }


def _time(when: dt.datetime | None) -> str | None:
    return None if when is None else when.isoformat(timespec="seconds")
