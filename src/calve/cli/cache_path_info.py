"""`calve cache path-info`: what a binary cache says of store paths."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.nix.narinfo import NarInfo
    from calve.nix.storepath import StorePath

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a store path, or a link to one such as ./result"
    )
    shared.add_cache(parser)
    parser.add_argument(
        "--closure", action="store_true", help="show everything that they refer to as well"
    )
    common.add_jobs(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Show it."""
    from calve.cache.scope import walk_narinfos

    url = shared.target(options, common.cache_of(options, "cache"))
    paths = [common.resolve(text, Path("/")) for text in options.paths]
    with common.caches(session, [url]) as (objects,):
        with common.listen(session, options) as progress:
            found = walk_narinfos(
                objects,
                paths,
                closure=options.closure,
                jobs=options.jobs,
                progress=progress,
                cancel=session.cancel,
            )
        if options.json:
            session.document(_document(objects.url, options, found))
        else:
            _print(session, found)
    return 0


def _sizes(found: Mapping[StorePath, NarInfo]) -> tuple[int, int]:
    """Return the bytes of NARs, and of those as stored: each object once."""
    stored = {entry.url: entry.file_size or 0 for entry in found.values()}
    return sum(entry.info.nar_size for entry in found.values()), sum(stored.values())


def _print(session: Session, found: Mapping[StorePath, NarInfo]) -> None:
    from calve.ui.table import table
    from calve.ui.text import mb

    rows = [
        (
            str(path),
            round(entry.info.nar_size / 1e6, 3),
            "" if entry.file_size is None else round(entry.file_size / 1e6, 3),
            entry.compression,
            len(entry.info.references),
            " ".join(sorted({one.name for one in entry.info.signatures})),
        )
        for path, entry in found.items()
    ]
    headers = ("PATH", "NAR MB", "STORED MB", "COMPRESSION", "REFERENCES", "SIGNED BY")
    table(rows, headers, session.out)
    nar_bytes, stored_bytes = _sizes(found)
    session.prose(
        f"{common.plural(len(found), 'path')}, {mb(nar_bytes)} of NARs, stored as {mb(stored_bytes)}"
    )


def _document(
    url: str, options: argparse.Namespace, found: Mapping[StorePath, NarInfo]
) -> dict[str, object]:
    nar_bytes, stored_bytes = _sizes(found)
    return {
        "cache": url,
        "closure": options.closure,
        "paths": [_path(entry) for entry in found.values()],
        "nar_bytes": nar_bytes,
        "stored_bytes": stored_bytes,
    }


def _path(entry: NarInfo) -> dict[str, object]:
    info = entry.info
    return {
        "path": str(info.path),
        "nar_hash": info.nar_hash.nix32,
        "nar_bytes": info.nar_size,
        "references": [str(path) for path in info.references],
        "deriver": None if info.deriver is None else str(info.deriver),
        "signatures": [one.dump() for one in info.signatures],
        "ca": info.ca,
        "url": entry.url,
        "compression": entry.compression,
        "file_hash": None if entry.file_hash is None else entry.file_hash.nix32,
        "file_bytes": entry.file_size,
    }
