"""What the commands of `calve cache` share: which cache, whose keys, which closures, and how findings are shown."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common
from calve.errors import UsageError

if TYPE_CHECKING:
    from calve.cache.findings import Finding
    from calve.cache.objects import Objects
    from calve.cache.scope import Scope
    from calve.cli.session import Session
    from calve.fleet.config import Cache
    from calve.nix.signing import Keyring

__all__ = [
    "add_cache",
    "add_names",
    "choose",
    "document",
    "keyring",
    "show",
    "target",
]

_LINKS = ("/", "./", "../")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Declare --cache."""
    parser.add_argument(
        "--cache",
        metavar="URL",
        help="the cache: s3://…, https://…, file:///… (default: the fleet file's)",
    )


def add_names(parser: argparse.ArgumentParser) -> None:
    """Declare the closures."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME|PATH",
        help="a root (OWNER/NAME or NAME), the digest of a manifest, or a store path with its closure"
        " (default: all that the cache has)",
    )


def target(options: argparse.Namespace, cache: Cache | None) -> str:
    """Return the cache's URL; UsageError where there is none."""
    url: str | None = options.cache or (None if cache is None else cache.url)
    if url is None:
        raise UsageError("no cache is named", hint="give --cache URL, or [cache] in calve.toml")
    return url


def keyring(
    options: argparse.Namespace, cache: Cache | None, objects: Sequence[Objects]
) -> Keyring:
    """Return the keys that count: the trusted ones, and what the caches' keyrings make of them.

    Raises:
        UsageError: no key is trusted.
        VerificationError: a keyring is damaged, not signed, or older than one that was seen.
    """
    from calve.cache.sequences import trusted

    return trusted(objects, common.trusted_keys(options, cache)).keyring


def choose(objects: Objects, names: Iterable[str]) -> Scope:
    """Find what names stand for; links to store paths, such as ./result, are followed."""
    from calve.cache.scope import scope

    return scope(
        objects,
        (
            str(common.resolve(name, Path("/"))) if name.startswith(_LINKS) else name
            for name in names
        ),
    )


def document(finding: Finding) -> dict[str, object]:
    """Return a finding for --json."""
    return {
        "kind": str(finding.kind),
        "key": finding.key,
        "path": None if finding.path is None else str(finding.path),
        "why": finding.why,
    }


def show(session: Session, rows: Sequence[tuple[Finding, str]], last: str = "WHY") -> None:
    """Print a table of findings, each with a text; nothing where there is none."""
    from calve.ui.table import table

    if not rows:
        return
    table(
        [
            (
                str(finding.kind),
                finding.key,
                "" if finding.path is None else finding.path.name,
                text,
            )
            for finding, text in rows
        ],
        ("KIND", "OBJECT", "NAME", last),
        session.out,
    )
