"""`calve console`: what a machine's console says, as it is now and, with --follow, as it goes on.

Source: EC2 API reference, GetConsoleOutput: the last 64 KiB, with `Latest` (Nitro only) as they are at that instant.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Final

from calve.cli import common, fleet_options
from calve.cli.session import Session
from calve.errors import NotFoundError, TransientError, UsageError

if TYPE_CHECKING:
    from calve.aws.ec2 import Ec2
    from calve.clock import Clock

__all__ = ["arguments", "follow", "fresh", "plain", "run"]

_POLL_S: Final = 5.0
_HEAD: Final = 256
_INSTANCE: Final = re.compile(r"i-[0-9a-f]{8,17}", re.ASCII)
_ESCAPE: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[@-Z\\^_])"
)


def instance(text: str) -> str:
    """Read an instance's id, for argparse."""
    if _INSTANCE.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an instance's id, i-…")
    return text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "instance", type=instance, metavar="INSTANCE", help="the machine, i-…; it may be gone"
    )
    parser.add_argument(
        "--follow", action="store_true", help="print what is new every few seconds, to its end"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="print control characters as they are, too: they can do harm to a terminal",
    )
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Print it."""
    from calve.clock import SYSTEM

    if options.json and (options.follow or options.raw):
        raise UsageError("--json goes with neither --follow nor --raw")
    with fleet_options.open_fleet(session, options) as opened:
        ec2 = opened.gateways.ec2
        if options.follow:
            follow(ec2, options.instance, session, SYSTEM, raw=options.raw)
            return 0
        text = ec2.console(options.instance)
    if options.json:
        session.document({"instance": options.instance, "text": text})
    else:
        _write(session, text, raw=options.raw)
        if not text:
            session.prose("the console has nothing yet: EC2 shows it some seconds after the start")
    return 0


def follow(ec2: Ec2, instance_id: str, session: Session, clock: Clock, *, raw: bool) -> None:
    """Print a console, then what is new, whole lines at a time, until the machine is terminated.

    Raises:
        NotFoundError: there was no such machine from the start.
        CancelledError: somebody pressed Ctrl-C.
    """
    text, rest, gone, troubled = "", "", False, False
    while True:
        try:
            # Asked before the console: what it says last is never missed.
            ends = gone or _terminated(ec2, instance_id)
            now = ec2.console(instance_id)
            troubled = False
        except NotFoundError:
            if not text:
                raise
            break
        except TransientError as error:
            if not troubled:
                session.prose(f"AWS gave no good answer, trying again: {error.message}")
            troubled = True
        else:
            rest += fresh(text, now)
            text = now or text
            lines, newline, rest = rest.rpartition("\n")
            _write(session, lines + newline, raw=raw)
            if gone:
                break
            gone = ends
        session.cancel.wait(_POLL_S, clock)
    _write(session, rest, raw=raw)
    session.prose(f"{instance_id} is terminated")


def _terminated(ec2: Ec2, instance_id: str) -> bool:
    return all(one.state == "terminated" for one in ec2.instances([instance_id]))


def fresh(before: str, now: str) -> str:
    """Return what a console has said since, of two windows on its end; all of it where they hardly overlap."""
    # A window may begin within a character, which then is none.
    shown = now.lstrip("\ufffd")
    head = shown[: min(_HEAD, len(before))]
    at = before.find(head) if head else -1
    while at >= 0:
        known = before[at:]
        if shown.startswith(known):
            return shown[len(known) :]
        at = before.find(head, at + 1)
    return now


def plain(text: str) -> str:
    """Return a console's text for a terminal: without escape sequences, lines ended alike, harmless."""
    from calve.ui.text import sanitize

    return sanitize(re.sub(r"\r+\n?", "\n", _ESCAPE.sub("", text)))


def _write(session: Session, text: str, *, raw: bool) -> None:
    """Print text, with a line break at its end unless it is raw."""
    if not text:
        return
    if raw:
        session.out.write(text)
        session.out.flush()
    else:
        session.result(plain(text).removesuffix("\n"))
