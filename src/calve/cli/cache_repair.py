"""`calve cache repair`: put back what is missing or corrupt, from a store or another cache."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session
from calve.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calve.cache.objects import Objects
    from calve.cache.repair import Repaired
    from calve.cache.sources import Source
    from calve.nix.signing import Keyring

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_names(parser)
    shared.add_cache(parser)
    parser.add_argument(
        "--store",
        type=Path,
        metavar="ROOT",
        help="take what is lost from the store ROOT/nix/store; / is this machine's",
    )
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="URL",
        help="take what is lost from another cache; may be repeated, is asked after the store",
    )
    parser.add_argument(
        "--deep", action="store_true", help="read every NAR to find what is corrupt"
    )
    common.add_trusted(parser)
    common.add_jobs(parser)
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Repair."""
    from calve.cache.repair import repair

    cache = common.cache_of(options, "cache", "trusted")
    url = shared.target(options, cache)
    with contextlib.ExitStack() as owner:
        objects, *others = owner.enter_context(common.caches(session, [url, *options.sources]))
        chosen = shared.choose(objects, options.names)
        keyring = shared.keyring(options, cache, [objects, *others])
        with common.listen(session, options) as progress:
            done = repair(
                objects,
                keyring,
                _sources(options, owner, others, keyring),
                chosen,
                deep=options.deep,
                dry_run=options.dry_run,
                jobs=options.jobs,
                progress=progress,
                cancel=session.cancel,
            )
        _print(options, session, objects.url, done)
    if done.left:
        raise VerificationError(
            f"{len(done.left)} of {len(done.left) + len(done.repaired)} findings remain",
            place=objects.url,
        )
    return 0


def _sources(
    options: argparse.Namespace,
    owner: contextlib.ExitStack,
    others: Sequence[Objects],
    keyring: Keyring,
) -> list[Source]:
    from calve.cache.sources import CacheSource, StoreSource
    from calve.nix.store import LocalStore

    sources: list[Source] = []
    if options.store is not None:
        store = owner.enter_context(LocalStore(options.store))
        sources.append(StoreSource(store, f"the store of {options.store}"))
    return [*sources, *(CacheSource(other, keyring) for other in others)]


def _print(options: argparse.Namespace, session: Session, url: str, done: Repaired) -> None:
    from calve.ui.text import mb

    if options.json:
        session.document(
            {
                "cache": url,
                "dry_run": options.dry_run,
                "repaired": [shared.document(one) for one in done.repaired],
                "left": [{**shared.document(one.finding), "todo": one.why} for one in done.left],
                "sent_bytes": None if options.dry_run else done.sent_bytes,
            }
        )
        return
    word = "would be repaired" if options.dry_run else "repaired"
    rows = [(one, word) for one in done.repaired]
    rows += [(one.finding, f"{one.finding.why}; {one.why}") for one in done.left]
    shared.show(session, rows, "WHAT BECAME OF IT")
    if not rows:
        session.prose("there is nothing to repair")
    elif options.dry_run:
        session.prose(f"would repair {common.plural(len(done.repaired), 'finding')}")
    else:
        session.prose(
            f"repaired {common.plural(len(done.repaired), 'finding')}, sent {mb(done.sent_bytes)}"
        )
