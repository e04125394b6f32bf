"""`calve cancel`: end the instance refresh where it stands. What is replaced stays replaced: a mixed fleet."""

from __future__ import annotations

import argparse

from calve.cli import common, fleet_options, rolling
from calve.cli.session import Session
from calve.errors import NotFoundError

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Cancel, and wait until what is under way has come to its end."""
    from calve.fleet.verdict import Outcome

    with (
        fleet_options.open_fleet(session, options) as there,
        common.listen(session, options) as progress,
    ):
        release = rolling.under_way(there)
        if options.dry_run:
            what = f"would cancel release {release.number} where it stands"
            return rolling.only(options, session, "cancel", release, what)
        if not options.yes:
            session.prose("calve rollback would bring the old release back; cancel leaves both")
            rolling.confirm(session, f"cancel release {release.number} where it stands?")
        try:
            there.gateways.refreshes.cancel(there.fleet.group)
        except NotFoundError as error:
            raise NotFoundError(
                f"no instance refresh of release {release.number} is active",
                place=there.fleet.group,
                hint="calve status shows where it stands; the next deploy takes its place",
            ) from error
        rollout = rolling.taken_up(session, there, progress, release)
        verdict = rollout.run()
        code = rolling.finish(options, session, there, release, verdict)
        return 0 if verdict is not None and verdict.outcome is Outcome.CANCELLED else code
