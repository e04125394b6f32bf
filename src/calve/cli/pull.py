"""`calve pull`: closures from binary caches into a store; every path is verified by a trusted key."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli.session import Session
from calve.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.cache.pull import Pulled, PullPlan
    from calve.fleet.config import Cache
    from calve.nix.store import LocalStore
    from calve.nix.storepath import StorePath

__all__ = ["arguments", "run"]

_LEAST_DECODERS = 3


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a store path")
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="URL",
        help="a cache: s3://…, https://…, file:///…; several are asked in order (default: the fleet file's)",
    )
    common.add_trusted(parser)
    parser.add_argument(
        "--manifest",
        metavar="DIGEST",
        help="of the closure, as push printed it: saves a request for every path",
    )
    common.add_store(parser, more="; one that is named is made where it is missing")
    common.add_jobs(parser)
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Pull."""
    from calve.cache import pull
    from calve.cache.estimate import estimate
    from calve.cache.sequences import trusted

    cache = common.cache_of(options, "sources", "trusted")
    urls = _sources(options, cache)
    keys = common.trusted_keys(options, cache)
    manifest = common.manifest_digest(options)
    roots = list(dict.fromkeys(common.store_path(text) for text in options.paths))
    with contextlib.ExitStack() as owner:
        sources = owner.enter_context(common.caches(session, urls))
        store = _open(options, owner)
        with common.listen(session, options) as progress:
            known = trusted(sources, keys)
            plan = pull.plan(
                known.caches,
                roots,
                store,
                known.keyring,
                manifest=manifest,
                resume=not options.dry_run,
                jobs=options.jobs,
                progress=progress,
                cancel=session.cancel,
            )
            processors = os.cpu_count() or 1
            done = about_s = None
            if options.dry_run:
                about_s = estimate(
                    plan, jobs=options.jobs, processors=processors, cancel=session.cancel
                )
            else:
                done = pull.pull(
                    plan,
                    store,
                    jobs=options.jobs,
                    decoders=max(_LEAST_DECODERS, processors),
                    progress=progress,
                    cancel=session.cancel,
                )
        _print(options, session, roots, plan, done, about_s)
    return 0


def _sources(options: argparse.Namespace, cache: Cache | None) -> Sequence[str]:
    if options.sources:
        return list(options.sources)
    if cache is None:
        raise UsageError("no cache to pull from", hint="give --from URL, or [cache] in calve.toml")
    return [cache.url]


def _open(options: argparse.Namespace, owner: contextlib.ExitStack) -> LocalStore:
    """Open the store; for a dry run one that is not there is an empty one elsewhere."""
    import tempfile

    from calve.nix.store import LocalStore

    root: Path = options.store or Path("/")
    try:
        store = owner.enter_context(
            LocalStore(root, create=options.store is not None and not options.dry_run)
        )
    except NotFoundError as error:
        if options.store is None:
            raise NotFoundError(
                error.message, place=error.place, hint="give --store ROOT to make a store"
            ) from error
        work = owner.enter_context(tempfile.TemporaryDirectory(prefix="calve-"))
        return owner.enter_context(LocalStore(Path(work), create=True))
    return store


def _print(
    options: argparse.Namespace,
    session: Session,
    roots: Sequence[StorePath],
    plan: PullPlan,
    done: Pulled | None,
    about_s: float | None,
) -> None:
    from calve.nix.storepath import STORE_DIR
    from calve.ui.text import mb

    root: Path = options.store or Path("/")
    closure = plan.present + len(plan.adopted) + len(plan.missing)
    if options.json:
        session.document(_document(plan, root, roots, done, about_s))
        return
    which = f"{len(plan.missing)} of {common.plural(closure, 'path')}"
    if done is None:
        about = "" if about_s is None else f", in about {max(1, round(about_s))} s"
        session.result(
            f"would fetch {which}, {mb(plan.nar_bytes)} of NARs as {mb(plan.fetch_bytes)}{about}"
        )
        return
    for path in roots:
        session.result(str(root / STORE_DIR[1:] / path.basename))
    if plan.adopted:
        session.prose(f"{common.plural(len(plan.adopted), 'path')} had come before an interruption")
    session.prose(f"fetched {which}, {mb(done.nar_bytes)} of NARs as {mb(done.fetched_bytes)}")


def _document(
    plan: PullPlan,
    root: Path,
    roots: Sequence[StorePath],
    done: Pulled | None,
    about_s: float | None,
) -> dict[str, object]:
    return {
        "store": str(root),
        "dry_run": done is None,
        "roots": [str(path) for path in roots],
        "manifest": plan.manifest,
        "present_paths": plan.present,
        "adopted_paths": len(plan.adopted),
        "fetched": [
            {
                "path": str(found.entry.info.path),
                "nar_bytes": found.entry.info.nar_size,
                "file_bytes": found.entry.file_size,
                "cache": found.cache.url,
            }
            for found in plan.missing
        ],
        "nar_bytes": plan.nar_bytes,
        "fetched_bytes": None if done is None else done.fetched_bytes,
        "estimate_s": None if about_s is None else round(about_s, 1),
        "retries": None if done is None else done.retries,
    }
