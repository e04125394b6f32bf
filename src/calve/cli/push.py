"""`calve push`: closures from a store into a binary cache, signed, each with a manifest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli.session import Session
from calve.errors import UsageError

if TYPE_CHECKING:
    from calve.cache.compression import Codec
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
        "--to",
        dest="targets",
        action="append",
        default=[],
        metavar="URL",
        help="a cache: s3://…, file:///…; may be repeated (default: the fleet file's)",
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="the secret signing key (default: the fleet file's)",
    )
    common.add_store(parser)
    parser.add_argument(
        "--compression",
        choices=("zstd", "xz", "none"),
        default="zstd",
        help="of NARs (default: zstd)",
    )
    parser.add_argument(
        "--level",
        type=common.between(0, 19),
        metavar="N",
        help="of the compression: zstd 1 to 19 (default: 3), xz 0 to 6 (default: 6)",
    )
    parser.add_argument(
        "--skip-signed-by",
        action="append",
        default=[],
        metavar="KEY",
        help="do not push what this public key, NAME:BASE64, signed: machines get it from another cache",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="look at everything again, and put back what is gone from the cache",
    )
    common.add_jobs(parser)
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Push."""
    from calve.cache.push import push
    from calve.nix.signing import Keyring
    from calve.nix.store import LocalStore

    cache = common.cache_of(options, "targets", "key")
    urls = _targets(options, cache)
    codec = _codec(options)
    skip = Keyring.parse(options.skip_signed_by) if options.skip_signed_by else None
    key = _key(options, cache, session)
    root: Path = options.store or Path("/")
    roots = list(dict.fromkeys(common.resolve(text, root) for text in options.paths))
    done: list[tuple[str, Pushed]] = []
    with LocalStore(root) as store, common.caches(session, urls) as targets:
        with common.listen(session, options) as progress:
            for objects in targets:
                pushed = push(
                    store,
                    roots,
                    objects,
                    key,
                    codec=codec,
                    jobs=options.jobs,
                    check=options.check,
                    skip=skip,
                    dry_run=options.dry_run,
                    progress=progress,
                    cancel=session.cancel,
                )
                done.append((objects.url, pushed))
        _print(options, session, roots, done)
    return 0


def _targets(options: argparse.Namespace, cache: Cache | None) -> list[str]:
    from calve.cache import url as locations

    urls: list[str] = options.targets or ([] if cache is None else [cache.url])
    if not urls:
        raise UsageError("no cache to push to", hint="give --to URL, or [cache] in calve.toml")
    for text in urls:
        if isinstance(locations.parse(text), locations.Web):
            raise UsageError(
                "a cache behind a web server can only be read",
                place=text,
                hint="push to s3://… or to a directory",
            )
    return list(dict.fromkeys(urls))


def _codec(options: argparse.Namespace) -> Codec:
    from calve.cache.compression import Codec

    usual = {"zstd": 3, "xz": 6, "none": 0}[options.compression]
    if options.compression == "none" and options.level is not None:
        raise UsageError("--compression none has no level")
    return Codec(options.compression, usual if options.level is None else options.level)


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
    roots: list[StorePath],
    done: list[tuple[str, Pushed]],
) -> None:
    if options.json:
        session.document(
            {
                "dry_run": options.dry_run,
                "caches": [_document(options, url, roots, pushed) for url, pushed in done],
            }
        )
        return
    if not options.dry_run:
        for path in roots:
            # Caches that have NARs under other keys have other manifests.
            digests = dict.fromkeys(pushed.manifests[path] for _, pushed in done)
            session.result(f"{path} {' '.join(digests)}")
    for url, pushed in done:
        _say(options, session, url, pushed)


def _document(
    options: argparse.Namespace, url: str, roots: list[StorePath], pushed: Pushed
) -> dict[str, object]:
    return {
        "cache": url,
        "roots": [{"path": str(path), "manifest": pushed.manifests.get(path)} for path in roots],
        "paths": pushed.paths,
        "new_paths": pushed.new_paths,
        "skipped_paths": pushed.skipped_paths,
        "nar_bytes": pushed.nar_bytes,
        "compressed_bytes": None if options.dry_run else pushed.compressed_bytes,
    }


def _say(options: argparse.Namespace, session: Session, url: str, pushed: Pushed) -> None:
    from calve.ui.text import mb

    which = f"{pushed.new_paths} of {common.plural(pushed.paths, 'path')}"
    away = f", {pushed.skipped_paths} left to other caches" if pushed.skipped_paths else ""
    if options.dry_run:
        session.result(f"would push {which}, {mb(pushed.nar_bytes)} of NARs, to {url}{away}")
        return
    sizes = f"{mb(pushed.nar_bytes)} of NARs as {mb(pushed.compressed_bytes)}"
    session.prose(f"pushed {which}, {sizes}, to {url}{away}")
