"""`calve attach`: watch and judge the rollout that another run began, from any machine."""

from __future__ import annotations

import argparse

from calve.cli import common, fleet_options, rolling
from calve.cli.session import Session

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "--timeout",
        type=common.duration,
        metavar="TIME",
        help="roll back what is not done so long after its start, such as 30m",
    )
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Attach."""
    with (
        fleet_options.open_fleet(session, options) as there,
        common.listen(session, options) as progress,
    ):
        release = rolling.under_way(there)
        rollout = rolling.taken_up(session, there, progress, release, options.timeout)
        return rolling.finish(options, session, there, release, rollout.run())
