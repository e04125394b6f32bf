"""`calve cache init`: a bucket or a directory becomes a binary cache."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli.session import Session
from calve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calve.cache.init import Bucket, Done

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--cache", metavar="URL", help="the cache: s3://…, file:///… (default: the fleet file's)"
    )
    parser.add_argument(
        "--root-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a secret root key: the cache gets a keyring; may be repeated (default: the fleet file's)",
    )
    parser.add_argument(
        "--trusted",
        action="append",
        default=[],
        metavar="KEY",
        help="a public root key, NAME:BASE64; may be repeated (default: the fleet file's)",
    )
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Set it up."""
    from calve.cache.init import init
    from calve.cache.sequences import Sequences, directory
    from calve.cli.keys import root_keys, roots_of

    cache = common.cache_of(options, "cache", "root_key", "trusted")
    url = options.cache or (None if cache is None else cache.url)
    if url is None:
        raise UsageError("no cache is named", hint="give --cache URL, or [cache] in calve.toml")
    signers = root_keys(options, cache, session)
    with contextlib.ExitStack() as owner:
        bucket = _bucket(url, owner)
        (objects,) = owner.enter_context(common.caches(session, [url]))
        steps = init(
            objects,
            bucket,
            roots=roots_of(options, cache, signers),
            signers=signers,
            seen=Sequences(directory()).load(objects.url),
            dry_run=options.dry_run,
        )
        _print(options, session, objects.url, steps)
    return 0


def _bucket(url: str, owner: contextlib.ExitStack) -> Bucket | None:
    """Return the bucket that holds the cache; None for a directory."""
    from calve.cache import url as locations

    place = locations.parse(url)
    if isinstance(place, locations.Web):
        raise UsageError(
            "a cache behind a web server can only be read",
            place=url,
            hint="set up the bucket or the directory that it serves",
        )
    if isinstance(place, locations.Directory):
        return None
    from calve.aws.buckets import Bucket
    from calve.aws.session import Session as Account

    account = Account(region=place.region, endpoint=place.endpoint, profile=place.profile)
    return owner.enter_context(Bucket(account, place.bucket, place.prefix))


def _print(options: argparse.Namespace, session: Session, url: str, steps: Iterable[Done]) -> None:
    if options.json:
        session.document(
            {
                "cache": url,
                "dry_run": options.dry_run,
                "steps": [{"name": one.name, "state": one.state.value} for one in steps],
            }
        )
        return
    for one in steps:
        session.result(f"{one.name}: {one.state} ({one.text})")
