"""`calve deploy`: build, plan, ask, push, write the release, roll it out, watch, and take it back where it is bad."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common, diff, fleet_options, plan, rolling
from calve.cli.session import Session
from calve.errors import ConflictError, UsageError

if TYPE_CHECKING:
    from calve.cli.fleet_options import Opened
    from calve.fleet.plan import Plan
    from calve.fleet.release import Content, Release
    from calve.nix.storepath import StorePath
    from calve.progress import Progress

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "--system",
        metavar="SYSTEM",
        help="a store path, a link to one, a Nix file or a flake attribute (default: the fleet file's)",
    )
    parser.add_argument(
        "--image",
        metavar="AMI",
        help="what machines boot from now on (default: what they boot already)",
    )
    rolling.add_rollout(parser)
    common.add_store(parser)
    common.add_jobs(parser)
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Deploy."""
    with (
        fleet_options.open_fleet(session, options) as opened,
        common.listen(session, options) as progress,
    ):
        there = rolling.rules_of(options, opened)
        _check_delivery(there, options.image)
        system = plan.system_of(options, session, there.config, there.fleet, progress)
        found = _plan(options, session, there, system)
        if options.dry_run or not found.changes:
            _show(options, session, found)
        if not found.changes:
            if not options.dry_run:
                rolling.tell_github(session, found.fleet, found.live, "unchanged")
            return 0
        _check(options, session, there, system, progress)
        if options.dry_run:
            return 0
        if not options.yes:
            plan.show(session, found, out=session.err)
            rolling.confirm(session, f"roll release {found.number} out on {there.fleet.group}?")
        content = _push(options, session, there, system, progress)
        return rolling.put(options, session, there, progress, content)


def _check_delivery(there: Opened, image: str | None) -> None:
    from calve.fleet.config import Delivery

    if there.fleet.delivery not in {Delivery.INITRD, Delivery.IMAGE}:
        raise UsageError(
            f"fleet.{there.fleet.name}.delivery: {there.fleet.delivery.value} cannot be deployed yet",
            place=there.config.path,
            hint="initrd and image can",
        )
    if there.fleet.delivery is Delivery.IMAGE and image is None:
        raise UsageError(
            f"fleet.{there.fleet.name}.delivery is image, and no image is named",
            hint="calve image build and calve image publish make one; then --image AMI",
        )


def _plan(options: argparse.Namespace, session: Session, there: Opened, system: StorePath) -> Plan:
    from calve.fleet import history

    group = there.gateways.scaling.group(there.fleet.group)
    config, objects = there.config, there.gateways.objects
    with diff.Closures(options, session, config=config, objects=objects) as closures:
        found = plan.planned(
            closures, there.fleet, system, image=options.image, machines=group.desired
        )
    other = None if found.changes else history.under_way(there.gateways.objects, there.fleet.name)
    if other is not None:
        raise ConflictError(
            f"release {other.number} is being rolled out over this system",
            place=there.fleet.name,
            hint="calve rollback takes it back",
        )
    return found


def _check(
    options: argparse.Namespace,
    session: Session,
    there: Opened,
    system: StorePath,
    progress: Progress,
) -> None:
    """Look at the group; the closure is not there yet, and a push leaves no gap in it."""
    from calve.fleet import history
    from calve.nix.storepath import StorePath
    from calve.rollout.facts import Target
    from calve.rollout.run import version_of

    objects, name = there.gateways.objects, there.fleet.name
    running, begun = history.live(objects, name), history.under_way(objects, name)
    version = None
    if begun is not None:
        # What is to be gone on with has a refresh of its own, which does not stand against it.
        group = there.gateways.scaling.group(there.fleet.group)
        version = version_of(there.gateways.ec2, group, begun)
    live = None if running is None else StorePath.parse(running.system)
    target = Target(
        version=version,
        image=options.image,
        release=_draft(there, system, options.image),
        cache=there.cache.url,
        live=live,
    )
    rolling.check(session, there, target, progress)


def _draft(there: Opened, system: StorePath, image: str | None) -> Release:
    """Return the release as it will be, but for what a push will say: as long, whatever that is."""
    from calve.clock import SYSTEM
    from calve.fleet.release import Release

    names = [one.partition(":")[0] for one in there.cache.trusted] or ["acme-1"]
    now = SYSTEM.now()
    return Release(there.fleet.name, 1, str(system), "0" * 64, (names[0],), now, image=image)


def _show(options: argparse.Namespace, session: Session, found: Plan) -> None:
    if options.json:
        session.document(found.document())
    else:
        plan.show(session, found)


def _push(
    options: argparse.Namespace,
    session: Session,
    there: Opened,
    system: StorePath,
    progress: Progress,
) -> Content:
    """Push the closure; return what is to be run."""
    from calve.cache.push import push
    from calve.fleet import keys
    from calve.fleet.release import Content
    from calve.nix.store import LocalStore

    if there.cache.key is None:
        raise UsageError(
            "no signing key", place=there.config.path, hint="cache.key says where it is"
        )
    key = keys.read(there.cache.key, cancel=session.cancel)
    with LocalStore(options.store or Path("/")) as store:
        pushed = push(
            store,
            [system],
            there.gateways.objects,
            key,
            jobs=options.jobs,
            progress=progress,
            cancel=session.cancel,
        )
    return Content(str(system), pushed.manifests[system], (key.name,), image=options.image)
