"""`calve demo`: the main job on one machine."""

from __future__ import annotations

import argparse

from calve.cli.session import Session
from calve.errors import UsageError

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(options: argparse.Namespace, session: Session) -> int:
    """Run the demo."""
    del options, session
    raise UsageError("the demo cannot do anything yet: machines that pull come next")
