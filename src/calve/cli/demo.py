"""`calve demo`: the main job on one machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from calve.cli.session import Session
from calve.progress import Event, Note

__all__ = ["arguments", "run"]

_DIRECTORY = Path(".calve/demo")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    parser.add_argument(
        "--system",
        choices=("webserver", "tiny"),
        default="webserver",
        help="what the machines run: systemd and nginx, or busybox alone (default: %(default)s)",
    )


def run(options: argparse.Namespace, session: Session) -> int:
    """Run the demo; its report stays in .calve/demo/report.json."""
    from calve.demo.show import Play, show

    def draw(event: Event) -> None:
        if isinstance(event, Note):
            session.prose(event.text)

    report = show(
        Play(
            _DIRECTORY,
            progress=draw,
            told=lambda name, what: session.prose(f"  {name}  {what}"),
            cancel=session.cancel,
            system=options.system,
        )
    )
    document = report.document()
    (_DIRECTORY / "report.json").write_text(json.dumps(document, indent=2) + "\n")
    if options.json:
        session.document(document)
    else:
        session.result(report.text())
    return 1 if report.tally.failed else 0
