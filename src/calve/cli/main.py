"""`calve`: finds the command, runs it, prints an error once and turns it into an exit code."""

from __future__ import annotations

import argparse
import importlib
import io
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Protocol, cast

from calve.cli.session import Session
from calve.errors import CalveError, CancelledError

__all__ = ["COMMANDS", "Command", "main"]

# Name, module below calve.cli, one line. A module is imported only when its command runs: start-up is a feature.
COMMANDS: tuple[tuple[str, str, str], ...] = (
    ("demo", "demo", "show the whole on this machine: no AWS account, no Nix, no KVM"),
    ("push", "push", "push closures into a binary cache, signed, with a manifest"),
    ("pull", "pull", "pull closures from binary caches into a store"),
    ("keys", "keys", "generate and show signing keys"),
    ("image", "image", "build what machines boot"),
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path's bytes go out as they came in
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

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        return session.run(lambda: _module(module).run(options, session))
    except CalveError as error:
        report(error, session)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read us has gone (`calve … | head`); nothing is left to say it to.
        sys.stdout = None
        return 1


def report(error: CalveError, session: Session) -> None:
    """Print an error: message, place and hint, on stderr; what others wrote into them is made harmless."""
    from calve.ui.text import sanitize

    if isinstance(error, CancelledError):
        session.prose("interrupted")
        return
    session.prose(sanitize(f"error: {error}"))
    if error.hint:
        session.prose(sanitize(f"hint: {error.hint}"))
