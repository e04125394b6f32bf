"""`calve guard`: watch a fleet without a person: judge what is being rolled out, break loops of failing launches."""

from __future__ import annotations

import argparse

from calve.cli import common, fleet_options
from calve.cli.session import Session

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "--once",
        action="store_true",
        help="end as soon as nothing is being rolled out: for cron, or a scheduled job",
    )
    parser.add_argument(
        "--timeout",
        type=common.duration,
        metavar="TIME",
        help="roll back what is not done so long after its start, such as 30m",
    )
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Guard."""
    from calve.progress import Note
    from calve.rollout.guard import Guard
    from calve.rollout.run import Host

    with (
        fleet_options.open_fleet(session, options) as there,
        common.listen(session, options) as progress,
    ):
        host = Host(by="guard", progress=progress, cancel=session.cancel)
        guard = Guard(there.fleet, there.gateways, host, options.timeout)
        progress(Note(f"guarding {there.fleet.name}, group {there.fleet.group}"))
        guard.run(once=options.once)
    return 0
