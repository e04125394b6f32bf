"""`calve demo`: the main job on one machine."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from calve.cli.session import Session
from calve.progress import Event, Fact, Note

__all__ = ["arguments", "run"]

_DIRECTORY = Path(".calve/demo")
_SHOWN = {"refresh", "refused", "rollback", "verdict"}
"""Of what happens in a rollout; the board itself shows the machines."""
_NEXT = """
What to try next
  calve demo --json                      the same as one document; it is in .calve/demo/report.json too
  calve keys generate acme-1             a signing key of your own
  calve push --help, calve pull --help   any closure, any store root, directory, HTTP or S3
  docs/how-to/push-and-pull.md           with and without Nix"""


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
    from calve.demo.show import Play, fleet_file, show
    from calve.ui.live import Board

    with Board(session.err, ["doing"], key="machine") as board:
        # A terminal that went away, a log on a full disk: no reason to end.
        def draw(event: Event) -> None:
            with contextlib.suppress(OSError):
                if isinstance(event, Note) or (isinstance(event, Fact) and event.kind in _SHOWN):
                    board.note(event.text)

        def told(name: str, what: str) -> None:
            with contextlib.suppress(OSError):
                board.set(name, "doing", what)

        report = show(
            Play(
                _DIRECTORY,
                fleet_file(),
                progress=draw,
                told=told,
                cancel=session.cancel,
                system=options.system,
            )
        )
    document = report.document()
    try:
        (_DIRECTORY / "report.json").write_text(json.dumps(document, indent=2) + "\n")
    except OSError as error:
        session.prose(f"cannot keep the report: {error.strerror}")
    if options.json:
        session.document(document)
    else:
        session.result(report.text())
        session.prose(_NEXT)
    return 1 if report.tally.failed else 0
