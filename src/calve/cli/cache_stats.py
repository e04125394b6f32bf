"""`calve cache stats`: what takes the space in a binary cache, and what it costs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.cache.stats import RootStats, Stats, Usage

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_cache(parser)
    common.add_jobs(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Show it."""
    from calve.cache.stats import stats

    url = shared.target(options, common.cache_of(options, "cache"))
    with common.caches(session, [url]) as (objects,):
        with common.listen(session, options) as progress:
            found = stats(objects, jobs=options.jobs, progress=progress, cancel=session.cancel)
        if options.json:
            session.document(_document(objects.url, found))
        else:
            _print(session, found)
    return 0


def _print(session: Session, found: Stats) -> None:
    from calve.cache.stats import USD_PER_GIB_MONTH
    from calve.ui.table import table

    headers = ("ROOT", "TOPLEVEL", "PATHS", "NAR MB", "STORED MB", "OWN MB", "SHARED MB")
    if found.roots:
        table([_row(one) for one in found.roots], headers, session.out)
        session.result("")
    rows = [(kind, *_usage(usage)) for kind, usage in found.kinds.items()]
    rows.append(("total", *_usage(found.total)))
    if found.unreferenced is not None:
        rows.append(("of it unreferenced", *_usage(found.unreferenced)))
    table(rows, ("KIND", "OBJECTS", "MB"), session.out)
    if found.unreferenced is None:
        session.prose(
            "what is unreferenced cannot be known: a root, or what it keeps, is unreadable"
        )
    session.prose(
        f"about ${found.usd_per_month:.2f} a month in S3 Standard, at ${USD_PER_GIB_MONTH} a GiB"
        " (us-east-1; without requests and traffic)"
    )


def _usage(usage: Usage) -> tuple[int, float]:
    return usage.objects, _mb(usage.size_bytes)


def _mb(size_bytes: int) -> float:
    return round(size_bytes / 1e6, 1)


def _name(one: RootStats) -> str:
    return one.key.removeprefix("roots/").removesuffix(".json")


def _row(one: RootStats) -> tuple[object, ...]:
    return (
        _name(one),
        one.problem if one.toplevel is None else one.toplevel.basename,
        one.paths,
        _mb(one.nar_bytes),
        _mb(one.stored_bytes),
        _mb(one.own_bytes),
        _mb(one.shared_bytes),
    )


def _document(url: str, found: Stats) -> dict[str, object]:
    from calve.cache.stats import USD_PER_GIB_MONTH

    def usage(one: Usage) -> dict[str, int]:
        return {"objects": one.objects, "bytes": one.size_bytes}

    return {
        "cache": url,
        "roots": [
            {
                "root": _name(one),
                "manifest": None if one.root is None else one.root.manifest,
                "toplevel": None if one.toplevel is None else str(one.toplevel),
                "paths": one.paths,
                "nar_bytes": one.nar_bytes,
                "stored_bytes": one.stored_bytes,
                "own_bytes": one.own_bytes,
                "shared_bytes": one.shared_bytes,
                "problem": one.problem or None,
            }
            for one in found.roots
        ],
        "kinds": {kind: usage(one) for kind, one in found.kinds.items()},
        "total": usage(found.total),
        "unreferenced": None if found.unreferenced is None else usage(found.unreferenced),
        "usd_per_gib_month": USD_PER_GIB_MONTH,
        "usd_per_month": round(found.usd_per_month, 4),
    }
