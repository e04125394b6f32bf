"""`calve cache`: the life of a binary cache; one module for each of its commands."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, cast

from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.cli.main import Command

__all__ = ["arguments", "run"]

# Name, module below calve.cli, one line.
_COMMANDS = (
    ("init", "cache_init", "set a bucket or a directory up as a binary cache"),
    ("ls", "cache_ls", "list what is kept: roots, their closures and sizes"),
    ("path-info", "cache_path_info", "show what the cache says of store paths"),
    ("stats", "cache_stats", "show what takes the space: by release, shared and own, and its cost"),
    ("pin", "cache_pin", "keep a closure from garbage collection, or no longer"),
    ("gc", "cache_gc", "remove what nothing keeps, safely beside pushes"),
    ("verify", "cache_verify", "find what is missing, corrupt or dangling"),
    ("repair", "cache_repair", "put back what verify finds, from a store or another cache"),
    ("sign", "cache_sign", "add a key's signature to what the cache has"),
)


def _module(name: str) -> Command:
    return cast("Command", importlib.import_module(f"calve.cli.{name}"))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    what = parser.add_subparsers(title="what", metavar="WHAT", dest="what", required=True)
    for name, module, text in _COMMANDS:
        sub = what.add_parser(name, help=text, description=text, allow_abbrev=False)
        _module(module).arguments(sub)


def run(options: argparse.Namespace, session: Session) -> int:
    """Run one of them."""
    module = next(module for name, module, _ in _COMMANDS if name == options.what)
    return _module(module).run(options, session)
