"""`calve cache sign`: add a key's signature to what a trusted key has signed already."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session
from calve.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from calve.cache.sign import Signed
    from calve.fleet.config import Cache
    from calve.nix.signing import SecretKey

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_names(parser)
    shared.add_cache(parser)
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="the secret key that signs (default: the fleet file's)",
    )
    common.add_trusted(parser)
    common.add_jobs(parser)
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Sign."""
    from calve.cache.sign import sign

    cache = common.cache_of(options, "cache", "key", "trusted")
    url = shared.target(options, cache)
    key = _key(options, cache, session)
    with common.caches(session, [url]) as (objects,):
        chosen = shared.choose(objects, options.names)
        keyring = shared.keyring(options, cache, [objects])
        with common.listen(session, options) as progress:
            done = sign(
                objects,
                keyring,
                key,
                chosen,
                dry_run=options.dry_run,
                jobs=options.jobs,
                progress=progress,
                cancel=session.cancel,
            )
        _print(options, session, objects.url, key.name, done)
    if done.refused:
        raise VerificationError(
            f"{common.plural(len(done.refused), 'object')} not signed: they are not good",
            place=objects.url,
            hint="calve cache verify tells more, calve cache repair puts back what it can",
        )
    return 0


def _key(options: argparse.Namespace, cache: Cache | None, session: Session) -> SecretKey:
    from calve.fleet import keys
    from calve.fleet.config import File

    if options.key is not None:
        return keys.read(File(options.key))
    if cache is None or cache.key is None:
        raise UsageError("no signing key", hint="give --key FILE, or cache.key in calve.toml")
    return keys.read(cache.key, cancel=session.cancel)


def _print(
    options: argparse.Namespace, session: Session, url: str, name: str, done: Signed
) -> None:
    if options.json:
        session.document(
            {
                "cache": url,
                "dry_run": options.dry_run,
                "key": name,
                "narinfos": done.narinfos,
                "manifests": done.manifests,
                "known": done.known,
                "refused": [shared.document(one) for one in done.refused],
            }
        )
        return
    shared.show(session, [(one, one.why) for one in done.refused])
    what = (
        f"{common.plural(done.narinfos, 'narinfo')} and {common.plural(done.manifests, 'manifest')}"
    )
    before = f"; {done.known} had its signature" if done.known else ""
    text = f"{'would sign' if options.dry_run else 'signed'} {what} with {name}{before}"
    if options.dry_run:
        session.result(text)
    else:
        session.prose(text)
