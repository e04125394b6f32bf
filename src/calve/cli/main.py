"""`calve`: finds the command, runs it, prints an error once and turns it into an exit code."""

from __future__ import annotations

import argparse
import errno
import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Protocol, cast

from calve.cli import streams
from calve.cli.session import Session
from calve.errors import AccessError, CalveError, CancelledError, SpaceError

__all__ = ["COMMANDS", "ENDS", "Command", "main"]

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a command in good order: Ctrl-C, a supervisor, a terminal that was closed."""

# Name, module below calve.cli, one line. A module is imported only when its command runs: start-up is a feature.
COMMANDS: tuple[tuple[str, str, str], ...] = (
    ("demo", "demo", "show the whole on this machine: no AWS account, no Nix, no KVM"),
    ("init", "init", "write a project's first files: fleet file, signing key, workflow"),
    ("adopt", "adopt", "make a fleet of an Auto Scaling group that is there"),
    ("push", "push", "push closures into a binary cache, signed, with a manifest"),
    ("pull", "pull", "pull closures from binary caches into a store"),
    ("cache", "cache", "set up, look at, check and clean a binary cache"),
    ("diff", "diff", "show what changes between two releases, closures or systems"),
    ("doctor", "doctor", "say whether a fleet could be deployed to from here, and what to change"),
    ("plan", "plan", "show what a deploy would do, and change nothing"),
    ("deploy", "deploy", "put a release on a fleet, watch it, and take it back where it is bad"),
    ("attach", "attach", "watch and judge a rollout that another run began"),
    ("watch", "watch", "show a rollout, and do nothing about it"),
    ("guard", "guard", "judge rollouts and break loops of failing launches, without a person"),
    ("rollback", "rollback", "take a release back, or bring an earlier one on again"),
    ("cancel", "cancel", "end a rollout where it stands"),
    ("status", "status", "show how a fleet stands: releases, refresh, lock, machines"),
    ("history", "history", "list a fleet's releases, how each ended, and why"),
    ("instances", "instances", "list a fleet's machines, and what each said last"),
    ("console", "console", "print what a machine's console says, or follow it"),
    ("logs", "logs", "print what the failed machines of a release said"),
    ("keys", "keys", "make, show, add and revoke signing keys"),
    ("image", "image", "build what machines boot"),
    (
        "rehearse",
        "rehearse",
        "run releases over a group like the fleet's, where nothing is launched",
    ),
    ("iam", "iam", "print the policies that its roles need in an account"),
    ("timeline", "timeline", "draw how a machine booted, from its console's log"),
    ("explain", "explain", "say what a failure code means, and what to do"),
    ("version", "version", "print the version and those of the formats"),
)


class Command(Protocol):
    """What a command's module has."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    @staticmethod
    def run(options: argparse.Namespace, session: Session) -> int:
        """Do it; return the exit code."""


def _module(name: str) -> Command:
    return cast("Command", importlib.import_module(f"calve.cli.{name}"))


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="calve", description="Ships NixOS machines to AWS.", allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, module, text in COMMANDS:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in argv[:1]:
            _module(module).arguments(sub)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code (docs/reference/exit-codes.md)."""
    streams.prepare()
    parser = _parser(argv)
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    module = next(module for name, module, _ in COMMANDS if name == options.command)
    session = Session()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        # The second Ctrl-C changes nothing: what is being closed has to be closed.
        session.interrupt()

    for number in ENDS:
        # `nohup` has SIGHUP ignored, and means it.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        return session.run(lambda: _module(module).run(options, session))
    except CalveError as error:
        report(error, session)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read us has gone (`calve … | head`); nothing is left to say it to.
        return 1
    except OSError as error:
        # What nobody knew better: a directory that is not ours to write to, a full disk.
        told = _of_system(error)
        report(told, session)
        return told.exit_code
    finally:
        streams.let_go()


def _of_system(error: OSError) -> CalveError:
    """Make our error of the system's."""
    text = error.strerror or str(error)
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return AccessError(text, place=error.filename, hint="is it another user's, or read-only?")
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return SpaceError(text, place=error.filename, hint="make room on that file system")
    return CalveError(text, place=error.filename)


def report(error: CalveError, session: Session) -> None:
    """Print an error: message, place and hint, on stderr; what others wrote into them is made harmless."""
    from calve.ui.text import sanitize

    if isinstance(error, CancelledError):
        session.prose(error.message)
        return
    session.prose(sanitize(f"error: {error}"))
    if error.hint:
        session.prose(sanitize(f"hint: {error.hint}"))
