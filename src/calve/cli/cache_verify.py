"""`calve cache verify`: what is missing, corrupt or dangling in a binary cache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session
from calve.errors import VerificationError

if TYPE_CHECKING:
    from calve.cache.verify import Verified

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_names(parser)
    shared.add_cache(parser)
    parser.add_argument(
        "--deep", action="store_true", help="read every NAR too, and hold it against its hashes"
    )
    common.add_trusted(parser)
    common.add_jobs(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Verify."""
    from calve.cache.verify import verify

    cache = common.cache_of(options, "cache", "trusted")
    url = shared.target(options, cache)
    with common.caches(session, [url]) as (objects,):
        chosen = shared.choose(objects, options.names)
        keyring = shared.keyring(options, cache, [objects])
        with common.listen(session, options) as progress:
            done = verify(
                objects,
                keyring,
                chosen,
                deep=options.deep,
                jobs=options.jobs,
                progress=progress,
                cancel=session.cancel,
            )
        _print(options, session, objects.url, done)
    if done.errors:
        raise VerificationError(
            f"{common.plural(len(done.errors), 'finding')}: not all of it is what it should be",
            place=objects.url,
            hint="calve cache repair --store ROOT or --from URL puts back what it can",
        )
    return 0


def _print(options: argparse.Namespace, session: Session, url: str, done: Verified) -> None:
    from calve.ui.text import mb

    if options.json:
        session.document(
            {
                "cache": url,
                "deep": options.deep,
                "roots": done.roots,
                "manifests": done.manifests,
                "narinfos": done.narinfos,
                "nars": done.nars,
                "read_bytes": done.read_bytes if options.deep else None,
                "errors": [shared.document(one) for one in done.errors],
                "unreferenced": [one.key for one in done.findings if one.harmless],
            }
        )
        return
    shared.show(session, [(one, one.why) for one in done.errors])
    looked = ", ".join(
        (
            common.plural(done.roots, "root"),
            common.plural(done.manifests, "manifest"),
            common.plural(done.narinfos, "narinfo"),
            common.plural(done.nars, "NAR"),
        )
    )
    read = f", {mb(done.read_bytes)} of them read" if options.deep else " by their sizes"
    session.prose(f"verified {looked}{read}")
    loose = sum(one.harmless for one in done.findings)
    if loose:
        session.prose(
            f"{common.plural(loose, 'object')} that no manifest names: calve cache gc removes them"
        )
