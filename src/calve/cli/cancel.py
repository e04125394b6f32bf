"""`calve cancel`: end the instance refresh where it stands. What is replaced stays replaced: a mixed fleet."""

from __future__ import annotations

import argparse

from calve.cli import common, fleet_options, rolling
from calve.cli.session import Session

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Cancel, and wait until what is under way has come to its end."""
    with (
        fleet_options.open_fleet(session, options) as there,
        common.listen(session, options) as progress,
    ):
        release = rolling.under_way(there)
        if options.dry_run:
            session.prose(f"would cancel release {release.number} where it stands")
            return 0
        if not options.yes:
            session.prose("calve rollback would bring the old release back; cancel leaves both")
            rolling.confirm(session, f"cancel release {release.number} where it stands?")
        there.gateways.refreshes.cancel(there.fleet.group)
        rollout = rolling.taken_up(options, session, there, progress, release)
        verdict = rollout.run()
        code = rolling.finish(options, session, there, release, verdict)
        return 0 if verdict is not None and verdict.outcome.value == "cancelled" else code
