"""What `deploy`, `rollback`, `attach`, `watch` and `cancel` share: a rollout is run, and what came of it is said."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calve.cli import common, diff
from calve.cli.fleet_options import Opened
from calve.cli.session import Session
from calve.errors import CalveError, CancelledError, NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.fleet.difference import Difference
    from calve.fleet.release import Content, Release
    from calve.fleet.verdict import Verdict
    from calve.progress import Progress
    from calve.rollout.facts import Target
    from calve.rollout.run import Rollout

__all__ = [
    "add_rollout",
    "check",
    "confirm",
    "finish",
    "only",
    "put",
    "rules_of",
    "taken_up",
    "tell_github",
    "under_way",
]


def add_rollout(parser: argparse.ArgumentParser) -> None:
    """Declare how a rollout goes about it."""
    from calve.fleet.config import Strategy

    parser.add_argument(
        "--strategy",
        type=Strategy,
        choices=list(Strategy),
        help="rolling, or canary: one machine first, and a pause (default: the fleet file's)",
    )
    for name, least, most, text in (
        ("--min-healthy", 0, 100, "percent of the group that must be healthy at any time"),
        ("--max-healthy", 100, 200, "percent of the group that there may be at any time"),
    ):
        parser.add_argument(
            name,
            type=common.between(least, most),
            metavar="PERCENT",
            help=f"{text} (default: the fleet file's)",
        )
    parser.add_argument(
        "--bake",
        type=common.duration,
        metavar="TIME",
        help="how long all must stay well at the end, such as 2m (default: the fleet file's)",
    )
    parser.add_argument(
        "--timeout",
        type=common.duration,
        metavar="TIME",
        help="roll back what is not done after so long, such as 30m (default: as long as AWS lets it)",
    )
    parser.add_argument(
        "--detach",
        action="store_true",
        help="return once the refresh has started; calve guard, or calve attach, has to watch it then",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")


def rules_of(options: argparse.Namespace, there: Opened) -> Opened:
    """Return the fleet with what the command line says otherwise; UsageError where the two do not go together."""
    from calve.fleet.config import MOST_BAKE_S

    rollout = there.fleet.rollout
    given = {
        "strategy": options.strategy,
        "min_healthy_percent": options.min_healthy,
        "max_healthy_percent": options.max_healthy,
        "bake_s": options.bake,
    }
    rollout = replace(
        rollout, **{name: value for name, value in given.items() if value is not None}
    )
    if options.min_healthy is not None and options.max_healthy is None:
        most = min(rollout.max_healthy_percent, rollout.min_healthy_percent + 100)
        rollout = replace(rollout, max_healthy_percent=most)
    if rollout.bake_s > MOST_BAKE_S:
        raise UsageError(f"--bake must be at most {MOST_BAKE_S // 3600}h")
    if rollout.max_healthy_percent - rollout.min_healthy_percent > 100:
        raise UsageError("--max-healthy must not be more than 100 above --min-healthy")
    return replace(there, fleet=replace(there.fleet, rollout=rollout))


def confirm(session: Session, question: str) -> None:
    """Ask on the terminal; UsageError where there is none, CancelledError where the answer is not yes."""
    if not session.asked(question):
        raise CancelledError("nothing was changed")


def check(session: Session, there: Opened, target: Target, progress: Progress) -> None:
    """Refuse what AWS would let fail an hour later; say what is only doubtful.

    Raises:
        AccessError: the caller lacks a permission, and nothing else stands against it.
        UsageError: something else does.
    """
    from calve.progress import Fact
    from calve.rollout.facts import Sources, gather
    from calve.rollout.preflight import check as checked
    from calve.rollout.preflight import refuse

    sources = Sources.of(there.gateways, there.aws)
    found = checked(gather(sources, there.fleet, target, cancel=session.cancel))
    for one in found:
        text = "" if one.refuses else f"warning: {one.message}"
        progress(Fact("preflight", text, asdict(one)))
    refuse(found, there.fleet.group)


def put(
    options: argparse.Namespace,
    session: Session,
    there: Opened,
    progress: Progress,
    content: Content,
) -> int:
    """Put a closure that is in the cache on the fleet, and watch; return the exit code."""
    from calve.progress import Note
    from calve.rollout.deploy import begun
    from calve.rollout.run import Host

    with begun(
        content,
        there.fleet,
        there.gateways,
        Host(progress=progress, cancel=session.cancel),
        cache=there.cache.url,
        timeout_s=options.timeout,
    ) as rollout:
        release = rollout.release
        verdict = _run(session, rollout, detach=options.detach)
    if verdict is None:
        progress(
            Note(
                f"release {release.number} goes on. Nobody judges it before AWS's own hour is over, unless"
                f" `calve guard {there.fleet.name}` runs somewhere, or `calve attach {there.fleet.name}`."
            )
        )
    return finish(options, session, there, release, verdict)


def _run(session: Session, rollout: Rollout, *, detach: bool) -> Verdict | None:
    """Run a rollout; where that ends before its time, say what becomes of the release."""
    try:
        return rollout.run(detach=detach)
    except CalveError:
        release = rollout.release
        session.prose(
            f"release {release.number}, if it has begun, goes on without this command:"
            f" calve attach {release.fleet} watches it again, calve rollback {release.fleet} takes it back"
        )
        raise


def only(
    options: argparse.Namespace,
    session: Session,
    action: str,
    release: Release,
    what: str,
) -> int:
    """Say what a dry run would do to a release; return the exit code."""
    if options.json:
        body = {"fleet": release.fleet, "release": release.number, "system": release.system}
        session.document({**body, "dry_run": True, "would": action})
    else:
        session.prose(what)
    return 0


def under_way(there: Opened) -> Release:
    """Return the release that has no verdict yet; NotFoundError where there is none."""
    from calve.fleet import history

    release = history.under_way(there.gateways.objects, there.fleet.name)
    if release is None:
        raise NotFoundError(
            "no release is under way",
            place=there.fleet.name,
            hint="calve history shows those that ended",
        )
    return release


def taken_up(
    session: Session,
    there: Opened,
    progress: Progress,
    release: Release,
    timeout_s: int | None = None,
) -> Rollout:
    """Return a rollout that another run began, to be watched and judged from here on."""
    from calve.rollout import start
    from calve.rollout.run import Host, Rollout, Settings

    settings = Settings(rules=start.rules(there.fleet, timeout_s))
    host = Host(progress=progress, cancel=session.cancel)
    return Rollout(release, there.fleet.group, there.gateways, settings, host)


def finish(
    options: argparse.Namespace,
    session: Session,
    there: Opened,
    release: Release,
    verdict: Verdict | None,
    *,
    begun: str = "started",
) -> int:
    """Print what came of a release, tell GitHub where it runs us, and return the exit code.

    Args:
        options: the command's.
        session: likewise.
        there: the fleet.
        release: which.
        verdict: None where it goes on.
        begun: what is said of one that goes on.
    """
    from calve.fleet.verdict import Outcome
    from calve.ui.text import one_line, sanitize

    went_well = verdict is None or verdict.outcome is Outcome.RELEASED
    changed = None if went_well else _changed(session, there, release)
    document = _document(release, verdict, changed, begun)
    reason = None if verdict is None else verdict.reason
    text = "" if reason is None else reason.text
    tell_github(session, release.fleet, release.number, document["outcome"], text)
    if options.json:
        session.document(document)
        return 0 if verdict is None else verdict.outcome.exit_code
    session.result(one_line(f"release {release.number} {document['outcome']}"))
    if reason is not None:
        session.prose(one_line(f"reason: {reason.text}"))
        for line in reason.failures[0].lines if reason.failures else ():
            session.prose(f"  {sanitize(line)}")
        if reason.failures:
            session.prose(one_line(f"calve explain {reason.failures[0].code} says what that is"))
    if changed is not None:
        session.prose("what it had changed:")
        diff.show(changed, session.err)
    return 0 if verdict is None else verdict.outcome.exit_code


def _changed(session: Session, there: Opened, release: Release) -> Difference | None:
    """Return what a release had changed against the live one; None where nothing is live, or that cannot be said."""
    from calve.cache import manifest as manifests
    from calve.fleet import history
    from calve.fleet.difference import difference

    objects = there.gateways.objects
    try:
        live = history.live(objects, release.fleet)
        if live is None or live.manifest == release.manifest:
            return None
        return difference(*(manifests.read(objects, one.manifest) for one in (live, release)))
    except NotFoundError:
        return None
    except CalveError as error:
        session.prose(f"what it had changed cannot be said: {error}")
        return None


def _document(
    release: Release, verdict: Verdict | None, changed: Difference | None, begun: str
) -> dict[str, Any]:
    return {
        "fleet": release.fleet,
        "release": release.number,
        "system": release.system,
        "outcome": begun if verdict is None else verdict.outcome.value,
        "verdict": None if verdict is None else verdict.document(),
        "difference": None if changed is None else changed.document(),
    }


def tell_github(
    session: Session, fleet: str, release: int | None, outcome: str, reason: str = ""
) -> None:
    """Set the outputs `release` and `outcome` of a step of GitHub Actions, and its summary."""
    from calve.ui.text import one_line

    lines = {
        "GITHUB_OUTPUT": f"release={release or ''}\noutcome={outcome}\n",
        "GITHUB_STEP_SUMMARY": (
            f"**{fleet}** release {release or '-'}: {outcome}\n\n"
            + (f"    {one_line(reason)}\n" if reason else "")
        ),
    }
    for name, text in lines.items():
        path = os.environ.get(name)
        if path:
            try:
                with Path(path).open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                session.prose(f"${name} cannot be written: {error.strerror}")
