"""`calve image`: what machines boot, from a closure to an AMI; one module for each of its commands."""

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
    ("initrd", "image_initrd", "build the initrd in which the agent pulls a machine's system"),
    ("build", "image_build", "build a raw disk that UEFI starts: a release, or a base image"),
    ("upload", "image_upload", "write a disk into an EBS snapshot, in every region at once"),
    ("verify", "image_verify", "read a snapshot back and compare it with the disk"),
    ("register", "image_register", "make an image (AMI) of the snapshot of a disk"),
    ("publish", "image_publish", "upload, verify, register and share"),
    ("list", "image_list", "list Calve's images"),
    ("show", "image_show", "show an image: its tags, its snapshots, who uses it"),
    ("share", "image_share", "let other accounts launch an image, or no longer"),
    ("copy", "image_copy", "copy an image into other regions"),
    ("prune", "image_prune", "remove images and snapshots that nothing needs"),
    ("debug", "image_debug", "register a variant of an image with a root shell on the console"),
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
