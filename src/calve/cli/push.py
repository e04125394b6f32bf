"""`calve push`: closures from a store into a binary cache, signed, each with a manifest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli.session import Session
from calve.errors import UsageError

if TYPE_CHECKING:
    from calve.cache.push import Pushed
    from calve.fleet.config import Cache
    from calve.nix.signing import SecretKey
    from calve.nix.storepath import StorePath

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a store path, or a link to one such as ./result"
    )
    parser.add_argument(
        "--to", metavar="URL", help="the cache: s3://…, file:///… (default: the fleet file's)"
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="the secret signing key (default: the fleet file's)",
    )
    common.add_store(parser)
    parser.add_argument(
        "--level",
        type=common.between(1, 19),
        default=3,
        metavar="N",
        help="of zstd, 1 to 19 (default: 3)",
    )
    common.add_jobs(parser)
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Push."""
    from calve.cache.push import push
    from calve.nix.store import LocalStore

    cache = common.cache_of(options, "to", "key")
    url = _target(options, cache)
    key = _key(options, cache, session)
    root: Path = options.store or Path("/")
    roots = [common.resolve(text, root) for text in options.paths]
    with LocalStore(root) as store, common.caches(session, [url]) as (objects,):
        with common.listen(session, options) as progress:
            pushed = push(
                store,
                roots,
                objects,
                key,
                level=options.level,
                jobs=options.jobs,
                dry_run=options.dry_run,
                progress=progress,
                cancel=session.cancel,
            )
        _print(options, session, objects.url, list(dict.fromkeys(roots)), pushed)
    return 0


def _target(options: argparse.Namespace, cache: Cache | None) -> str:
    from calve.cache import url as locations

    text: str | None = options.to or (None if cache is None else cache.url)
    if text is None:
        raise UsageError("no cache to push to", hint="give --to URL, or [cache] in calve.toml")
    if isinstance(locations.parse(text), locations.Web):
        raise UsageError(
            "a cache behind a web server can only be read",
            place=text,
            hint="push to s3://… or to a directory",
        )
    return text


def _key(options: argparse.Namespace, cache: Cache | None, session: Session) -> SecretKey:
    from calve.fleet import keys
    from calve.fleet.config import File

    if options.key is not None:
        return keys.read(File(options.key))
    if cache is None or cache.key is None:
        raise UsageError("no signing key", hint="give --key FILE, or cache.key in calve.toml")
    return keys.read(cache.key, cancel=session.cancel)


def _print(
    options: argparse.Namespace,
    session: Session,
    url: str,
    roots: list[StorePath],
    pushed: Pushed,
) -> None:
    from calve.ui.text import mb

    if options.json:
        session.document(
            {
                "cache": url,
                "dry_run": options.dry_run,
                "roots": [
                    {"path": str(path), "manifest": pushed.manifests.get(path)} for path in roots
                ],
                "paths": pushed.paths,
                "new_paths": pushed.new_paths,
                "nar_bytes": pushed.nar_bytes,
                "compressed_bytes": None if options.dry_run else pushed.compressed_bytes,
            }
        )
        return
    which = f"{pushed.new_paths} of {common.plural(pushed.paths, 'path')}"
    if options.dry_run:
        session.result(f"would push {which}, {mb(pushed.nar_bytes)} of NARs, to {url}")
        return
    for path in roots:
        session.result(f"{path} {pushed.manifests[path]}")
    session.prose(
        f"pushed {which}, {mb(pushed.nar_bytes)} of NARs as {mb(pushed.compressed_bytes)}, to {url}"
    )
