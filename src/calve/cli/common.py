"""What several commands share: arguments, store paths as people write them, caches, progress.

Heavy imports stand inside the functions: `calve --help` and the arguments of every command stay quick.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli.session import Session
from calve.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from calve.cache.objects import Objects
    from calve.cache.url import S3
    from calve.fleet.config import Cache
    from calve.nix.signing import Keyring
    from calve.nix.storepath import StorePath
    from calve.transport.credentials import Provider
    from calve.ui.listener import Listener

__all__ = [
    "add_config",
    "add_dry_run",
    "add_jobs",
    "add_json",
    "add_store",
    "add_trusted",
    "between",
    "cache_of",
    "caches",
    "duration",
    "listen",
    "manifest_digest",
    "plural",
    "resolve",
    "store_path",
    "translated",
    "trusted_keys",
]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"([0-9]{1,6})([smhd])")


# Arguments


def between(least: int, most: int) -> Callable[[str], int]:
    """Return a converter for argparse: a whole number between two bounds."""

    def convert(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} to {most}")
        return number

    return convert


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declare --json."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON document, and progress as JSON lines on stderr",
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Declare --dry-run."""
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be done, write nothing"
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Declare --config."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the fleet file (default: ./calve.toml, where there is one)",
    )


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Declare --jobs."""
    parser.add_argument(
        "--jobs",
        type=between(1, 256),
        default=8,
        metavar="N",
        help="how many paths are under way at once (default: 8)",
    )


def add_store(parser: argparse.ArgumentParser, *, more: str = "") -> None:
    """Declare --store."""
    parser.add_argument(
        "--store",
        type=Path,
        metavar="ROOT",
        help=f"the store is ROOT/nix/store (default: /){more}",
    )


def cache_of(options: argparse.Namespace, *needs: str) -> Cache | None:
    """Return the fleet file's cache; the file is read where it is named, or the arguments need it.

    Args:
        options: with `config`, and the arguments that go before the file's.
        needs: their names; one that is empty is looked for in the file.
    """
    if options.config is None and all(getattr(options, name) for name in needs):
        return None
    from calve.fleet.config import load

    config = load(options.config)
    return None if config is None else config.cache


def add_trusted(parser: argparse.ArgumentParser, what: str = "a public key") -> None:
    """Declare --trusted."""
    parser.add_argument(
        "--trusted",
        action="append",
        default=[],
        metavar="KEY",
        help=f"{what}, NAME:BASE64; may be repeated (default: the fleet file's)",
    )


def trusted_keys(options: argparse.Namespace, cache: Cache | None) -> Keyring:
    """Return the keys that are trusted, --trusted or the fleet file's; UsageError where there is none."""
    from calve.nix.signing import Keyring

    trusted = options.trusted or (() if cache is None else cache.trusted)
    if not trusted:
        raise UsageError(
            "no key is trusted, so nothing could be verified",
            hint="give --trusted KEY, or cache.trusted in calve.toml; calve keys show FILE prints the public key",
        )
    return Keyring.parse(trusted)


def manifest_digest(options: argparse.Namespace) -> str | None:
    """Return --manifest; UsageError where it is no digest."""
    from calve.cache.manifest import check_digest

    if options.manifest is None:
        return None
    try:
        return check_digest(options.manifest)
    except DamagedError as error:
        raise UsageError(error.message, place="--manifest") from error


def duration(text: str) -> int:
    """Read "90m", "24h" or "7d" as seconds, for argparse."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90m, 24h or 7d")
    return int(found[1]) * _UNITS[found[2]]


# Store paths


def store_path(text: str) -> StorePath:
    """Read a full store path; UsageError where it is not one."""
    from calve.nix.storepath import StorePath

    try:
        return StorePath.parse(text.rstrip("/"))
    except DamagedError as error:
        raise UsageError(error.message, hint=error.hint) from error


def resolve(text: str, root: Path) -> StorePath:
    """Find the store path that a path is, leads to by symlinks, or lies in: ./result, /run/current-system.

    Args:
        text: a path as a user writes it.
        root: of the store: links may lead to /nix/store or to ROOT/nix/store.

    Raises:
        UsageError: it leads to no store path.
    """
    from calve.nix.links import follow
    from calve.nix.storepath import STORE_DIR

    try:
        found = follow(text, root)
    except DamagedError as error:
        raise UsageError(error.message, hint=error.hint) from error
    if found is not None:
        return found
    raise UsageError(
        "this is neither a store path nor a link to one",
        place=text,
        hint=f"give a path in {STORE_DIR}, or a link such as ./result",
    )


# Caches


@contextlib.contextmanager
def caches(session: Session, urls: Sequence[str]) -> Iterator[list[Objects]]:
    """Open caches by their URLs; they share a client, which is closed at the end."""
    from calve.cache import url as locations
    from calve.cache.objects import open_objects
    from calve.transport.http import Client

    places = [locations.parse(url) for url in urls]
    with Client(context=None, cancel=session.cancel) as client:
        yield [
            open_objects(
                place, client, _provider(place) if isinstance(place, locations.S3) else None
            )
            for place in places
        ]


def _provider(place: S3) -> Provider:
    """Return who gives credentials: boto's chain; its first link without it, for importing boto takes long."""
    from calve.transport.credentials import Environment

    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    if place.profile is None and all(os.environ.get(name) for name in names):
        return Environment()
    from calve.aws.session import credentials_provider

    return credentials_provider(place.profile)


# Output


def listen(session: Session, options: argparse.Namespace) -> Listener:
    """Return what draws progress on stderr."""
    from calve.ui.listener import listener

    return listener(session.err, json=options.json)


def plural(count: int, noun: str) -> str:
    """Write a number and its noun: "1 path", "3 paths"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn an error of the file system into one of ours: "cannot write the initrd: No space left"."""
    from calve.errors import CalveError

    try:
        yield
    except OSError as error:
        raise CalveError(
            f"cannot {doing}: {error.strerror or error}", place=error.filename
        ) from error
