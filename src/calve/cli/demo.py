"""`calve demo`: the main job on one machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from calve.cli.session import Session
from calve.progress import Event, Note

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(options: argparse.Namespace, session: Session) -> int:
    """Run the demo."""
    from calve.demo.show import show

    def draw(event: Event) -> None:
        if isinstance(event, Note):
            session.prose(event.text)

    page = show(Path(".calve/demo"), progress=draw, cancel=session.cancel)
    if options.json:
        session.document({"page": page})
    else:
        session.result(page)
    return 0
