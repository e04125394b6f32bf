"""`calve cache pin`: keeps a closure from garbage collection under a name, or no longer."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session
from calve.errors import UsageError

if TYPE_CHECKING:
    from calve.cache.objects import Objects
    from calve.fleet.config import Cache
    from calve.nix.signing import Keyring
    from calve.nix.storepath import StorePath

__all__ = ["arguments", "run"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", help="of the pin")
    parser.add_argument(
        "closure",
        nargs="?",
        metavar="PATH|DIGEST",
        help="a store path, a link to one, or the digest of a manifest",
    )
    parser.add_argument("--remove", action="store_true", help="keep it no longer")
    shared.add_cache(parser)
    parser.add_argument(
        "--trusted",
        action="append",
        default=[],
        metavar="KEY",
        help="a public key, NAME:BASE64, for a path that has no manifest yet; may be repeated "
        "(default: the fleet file's)",
    )
    common.add_jobs(parser)
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Pin it."""
    from calve.cache import pins

    if options.remove == (options.closure is not None):
        raise UsageError("give either a path or the digest of a manifest, or --remove")
    cache = common.cache_of(options, "cache")
    url = shared.target(options, cache)
    what = None if options.remove else _what(options.closure)
    with common.caches(session, [url]) as (objects,):
        if options.dry_run:
            _rehearse(options, session, objects, what)
            return 0
        if what is None:
            root = pins.unpin(objects, options.name)
        else:
            with common.listen(session, options) as progress:
                root = pins.pin(
                    objects,
                    options.name,
                    what,
                    keyring=None if isinstance(what, str) else _keyring(options, cache, objects),
                    jobs=options.jobs,
                    progress=progress,
                    cancel=session.cancel,
                )
        if options.json:
            session.document(
                {
                    "cache": objects.url,
                    "name": root.name,
                    "manifest": root.manifest,
                    "removed": options.remove,
                    "dry_run": False,
                }
            )
        elif options.remove:
            session.prose(f"pin {root.name} is removed; it kept the manifest {root.manifest}")
        else:
            session.result(f"{root.name} {root.manifest}")
    return 0


def _rehearse(
    options: argparse.Namespace, session: Session, objects: Objects, what: StorePath | str | None
) -> None:
    """Say what would be kept, or no longer."""
    from calve.cache import manifest, pins

    digest: str | None
    if what is None:
        digest = pins.read(objects, options.name).manifest
    else:
        digest = what if isinstance(what, str) else pins.manifest_of(objects, what)
        if digest is not None:
            manifest.read(objects, digest)
    if options.json:
        session.document(
            {
                "cache": objects.url,
                "name": options.name,
                "manifest": digest,
                "removed": options.remove,
                "dry_run": True,
            }
        )
        return
    what_manifest = (
        "a manifest made of its narinfos" if digest is None else f"the manifest {digest}"
    )
    verb = "no longer keep" if options.remove else "keep"
    session.result(f"would {verb} {what_manifest} as {options.name}")


def _what(text: str) -> StorePath | str:
    return text if _DIGEST.fullmatch(text) else common.resolve(text, Path("/"))


def _keyring(options: argparse.Namespace, cache: Cache | None, objects: Objects) -> Keyring | None:
    """Return the keys that count; None where no key is trusted."""
    from calve.cache.sequences import trusted
    from calve.nix.signing import Keyring

    given = options.trusted or (() if cache is None else cache.trusted)
    return trusted([objects], Keyring.parse(given)).keyring if given else None
