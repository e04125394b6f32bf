"""`calve rollback`: take back the release that is being rolled out, or put the closure of an earlier one on the fleet."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import common, fleet_options, rolling
from calve.cli.session import Session
from calve.errors import ConflictError, NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.aws.refreshes import Refresh
    from calve.cli.fleet_options import Opened
    from calve.fleet.release import Release
    from calve.progress import Progress

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "--to",
        type=common.between(1, 99_999_999),
        metavar="NUMBER",
        help="the release whose closure comes back, as a new release (default: the one before the live one)",
    )
    rolling.add_rollout(parser)
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Roll back."""
    from calve.cache import manifest as manifests
    from calve.fleet.release import Content
    from calve.rollout.facts import Target
    from calve.rollout.run import version_of

    with (
        fleet_options.open_fleet(session, options) as opened,
        common.listen(session, options) as progress,
    ):
        there = rolling.rules_of(options, opened)
        active = there.gateways.refreshes.newest(there.fleet.group)
        if options.to is None and active and active[0].can_roll_back:
            return _take_back(options, session, there, progress, active[0])
        target = _target(options, session, there)
        manifest = manifests.read(there.gateways.objects, target.manifest)
        group = there.gateways.scaling.group(there.fleet.group)
        booted = version_of(there.gateways.ec2, group, target)
        image = target.image or (None if booted is None else booted.image_id)
        asked = Target(manifest, image=image, release=target, cache=there.cache.url)
        rolling.check(session, there, asked, progress)
        if options.dry_run:
            what = f"would release {target.system} of release {target.number} again"
            return rolling.only(options, session, "again", target, what)
        if not options.yes:
            rolling.confirm(session, f"put {target.system} of release {target.number} on again?")
        content = Content(
            target.system, target.manifest, target.keys, repeats=target.number, image=image
        )
        return rolling.put(options, session, there, progress, content)


def _take_back(
    options: argparse.Namespace,
    session: Session,
    there: Opened,
    progress: Progress,
    active: Refresh,
) -> int:
    """Give the reason and watch: the rollout's next round calls the rollback."""
    from calve.clock import SYSTEM
    from calve.fleet import ends
    from calve.fleet.verdict import Outcome, Reason

    release = rolling.under_way(there)
    _check_active(there, release, active)
    if options.dry_run:
        what = f"would roll release {release.number} back"
        return rolling.only(options, session, "roll-back", release, what)
    if not options.yes:
        rolling.confirm(session, f"roll release {release.number} back?")
    reason = Reason("operator", "an operator called the rollback", (), "operator", SYSTEM.now())
    ends.write_reason(there.gateways.objects, release.fleet, release.number, reason)
    rollout = rolling.taken_up(session, there, progress, release, options.timeout)
    verdict = rollout.run(detach=options.detach)
    code = rolling.finish(options, session, there, release, verdict, begun="rolling-back")
    if verdict is None or verdict.outcome is Outcome.ROLLED_BACK:
        return 0  # what was asked for has come about: that is no failure here
    if verdict.outcome is Outcome.RELEASED:
        raise ConflictError(
            f"release {release.number} had gone through before it could be taken back",
            place=there.fleet.name,
            hint="calve rollback once more puts the closure before it on the fleet",
        )
    return code


def _check_active(there: Opened, release: Release, active: Refresh) -> None:
    """Raise ConflictError where the active refresh is not the release's: its reason would be about another."""
    from calve.rollout.run import version_of

    group = there.gateways.scaling.group(there.fleet.group)
    version = version_of(there.gateways.ec2, group, release)
    if version is None or not active.goes_to(version.template_id, version.number):
        raise ConflictError(
            f"the active instance refresh is not that of release {release.number}",
            place=there.fleet.group,
            hint="AWS's own console rolls it back, or calve cancel ends it",
        )


def _target(options: argparse.Namespace, session: Session, there: Opened) -> Release:
    from calve.fleet import history
    from calve.fleet import release as releases
    from calve.fleet.verdict import Outcome
    from calve.rollout.deploy import unsettled
    from calve.rollout.run import Host

    objects, fleet = there.gateways.objects, there.fleet.name
    through = unsettled(there.fleet, there.gateways, Host(cancel=session.cancel))
    live = through or history.live(objects, fleet)
    if options.to is not None:
        found = releases.read(objects, fleet, options.to)
        if live is not None and _same(found, live):
            raise UsageError(f"release {live.number}, which is live, has that closure already")
        return found
    released = [
        one.release
        for one in history.recent(objects, fleet)
        if one.verdict is not None and one.verdict.outcome is Outcome.RELEASED
    ]
    for one in released:
        if live is not None and one.number < live.number and not _same(one, live):
            return one
    raise NotFoundError(
        "no earlier release went well",
        place=fleet,
        hint="calve history shows all; --to NUMBER names one",
    )


def _same(one: Release, other: Release) -> bool:
    return (one.manifest, one.image) == (other.manifest, other.image)
