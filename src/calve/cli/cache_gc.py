"""`calve cache gc`: what nothing keeps gets a tombstone, and is removed once the grace is over."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session
from calve.errors import NotFoundError

if TYPE_CHECKING:
    from calve.cache.gc import Collected
    from calve.cache.objects import Objects
    from calve.cache.reach import Tally

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_cache(parser)
    parser.add_argument(
        "--grace",
        type=common.duration,
        default=86_400,
        metavar="DURATION",
        help="what is younger is kept, and nothing is removed before it was marked so long: 1h or more (default: 24h)",
    )
    parser.add_argument(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        help="say what would be marked, write nothing (default for a cache that never was collected)",
    )
    parser.add_argument(
        "--wait", action="store_true", help="until the grace is over, and remove what was marked"
    )
    common.add_jobs(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Collect."""
    from calve.cache import gc

    cache = common.cache_of(options, "cache")
    url = shared.target(options, cache)
    with common.caches(session, [url]) as (objects,):
        # Whoever mistypes a prefix is not to be told that there is no garbage.
        _check(objects)
        with common.listen(session, options) as progress:
            done = gc.run(
                objects,
                grace_s=options.grace,
                dry_run=options.dry_run,
                wait=options.wait,
                jobs=options.jobs,
                progress=progress,
                cancel=session.cancel,
            )
        if options.json:
            session.document({"cache": objects.url, **_document(done)})
        else:
            _print(session, done, asked=options.dry_run is not None)
    return 0


def _check(objects: Objects) -> None:
    try:
        objects.get("nix-cache-info", 1 << 16)
    except NotFoundError as error:
        if type(error) is not NotFoundError:
            raise
        raise NotFoundError(
            "there is no binary cache", place=objects.url, hint="calve cache init makes one"
        ) from error


def _print(session: Session, done: Collected, *, asked: bool) -> None:
    kept = f"{common.plural(done.kept_roots, 'root')}, {common.plural(done.kept_manifests, 'manifest')}"
    if done.kept_pending:
        kept += f", {common.plural(done.kept_pending, 'push').replace('pushs', 'pushes')} under way"
    if done.listed is not None:
        session.prose(f"the cache has {_amount(done.listed)}; kept by {kept}")
    if done.removed is not None:
        spared = f"; {common.plural(done.spared, 'object')} spared" if done.spared else ""
        session.result(f"removed {_amount(done.removed)}{spared}")
    if done.marked is not None:
        session.result(f"{'would mark' if done.dry_run else 'marked'} {_amount(done.marked)}")
    if done.collection is not None and done.due is not None:
        due = f"{done.due:%Y-%m-%dT%H:%M:%SZ}"
        session.result(
            f"{common.plural(done.collection.objects, 'marked object')} can be removed from {due} on: run it again then"
        )
    if done.dry_run and not asked:
        session.prose("nothing was changed: run it again with --no-dry-run")


def _amount(tally: Tally) -> str:
    from calve.ui.text import mb

    nouns = {kind: "NAR" if kind.value == "nars" else kind.value[:-1] for kind in tally.objects}
    counts = [common.plural(count, nouns[kind]) for kind, count in tally.objects.items()]
    return f"{', '.join(counts)}, {mb(tally.total_bytes)}"


def _document(done: Collected) -> dict[str, Any]:
    now = done.collection
    return {
        "dry_run": done.dry_run,
        "listed": _counts(done.listed),
        "marked": _counts(done.marked),
        "removed": _counts(done.removed),
        "spared_objects": done.spared,
        "kept_by": {
            "roots": done.kept_roots,
            "pushes": done.kept_pending,
            "manifests": done.kept_manifests,
        },
        "collection": None
        if now is None
        else {"id": now.id, "state": now.state, "objects": now.objects, "bytes": now.bytes},
        "due": None if done.due is None else f"{done.due:%Y-%m-%dT%H:%M:%SZ}",
    }


def _counts(tally: Tally | None) -> dict[str, dict[str, int]] | None:
    if tally is None:
        return None
    return {
        kind.value: {"objects": tally.objects[kind], "bytes": tally.bytes[kind]}
        for kind in tally.objects
    }
