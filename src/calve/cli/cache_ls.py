"""`calve cache ls`: the roots of a cache, and what each keeps."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.cache.pins import Kept

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_cache(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """List them."""
    from calve.cache.pins import kept
    from calve.ui.table import table

    cache = common.cache_of(options, "cache")
    url = shared.target(options, cache)
    with common.caches(session, [url]) as (objects,):
        found = list(kept(objects))
        if options.json:
            session.document({"cache": objects.url, "roots": [_document(one) for one in found]})
            return 0
        headers = ("OWNER", "NAME", "CREATED", "TOPLEVEL", "PATHS", "NAR MB", "FILE MB")
        table([_row(one) for one in found], headers, session.out)
    return 0


def _row(one: Kept) -> tuple[object, ...]:
    root = one.root
    return (
        root.owner,
        root.name,
        f"{root.created:%Y-%m-%d %H:%M}",
        one.problem if one.toplevel is None else one.toplevel.basename,
        one.paths,
        round(one.nar_bytes / 1e6, 1),
        round(one.file_bytes / 1e6, 1),
    )


def _document(one: Kept) -> dict[str, Any]:
    root = one.root
    return {
        "owner": root.owner,
        "name": root.name,
        "created": f"{root.created:%Y-%m-%dT%H:%M:%SZ}",
        "manifest": root.manifest,
        "toplevel": None if one.toplevel is None else str(one.toplevel),
        "paths": one.paths,
        "nar_bytes": one.nar_bytes,
        "file_bytes": one.file_bytes,
        "checked": root.checked,
        "gc": root.gc,
        "problem": one.problem or None,
    }
