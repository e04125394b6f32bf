"""`calve version`: of the program, and of the formats it writes and reads."""

from __future__ import annotations

import argparse
import platform

import calve
from calve.cli.session import Session
from calve.contract import evidence, userdata

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace, session: Session) -> int:
    """Print the versions."""
    if options.json:
        session.document(
            {
                "calve": calve.__version__,
                "python": platform.python_version(),
                "formats": {"user-data": userdata.VERSION, "evidence": evidence.VERSION},
            }
        )
    else:
        session.result(f"calve {calve.__version__}")
    return 0
