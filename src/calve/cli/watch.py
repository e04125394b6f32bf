"""`calve watch`: show the rollout that is under way, and do nothing about it."""

from __future__ import annotations

import argparse

from calve.cli import common, fleet_options, rolling
from calve.cli.session import Session

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Watch until it has ended."""
    with (
        fleet_options.open_fleet(session, options) as there,
        common.listen(session, options) as progress,
    ):
        release = rolling.under_way(there)
        rollout = rolling.taken_up(session, there, progress, release)
        return rolling.finish(options, session, there, release, rollout.follow())
