"""What the commands about a fleet share: which one, its bucket, its region's gateways, machines as people read them."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli.session import Session
from calve.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.aws.session import Session as AwsSession
    from calve.fleet.config import Cache, Config, Fleet
    from calve.rollout.observe import Gateways

__all__ = ["Opened", "add_fleet", "config_of", "fleet_of", "open_fleet"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A fleet with all that it is asked by."""

    config: Config
    cache: Cache
    fleet: Fleet
    aws: AwsSession
    gateways: Gateways


def add_fleet(parser: argparse.ArgumentParser, default: str = "the only one there") -> None:
    """Declare FLEET, --region and --config."""
    parser.add_argument(
        "fleet",
        nargs="?",
        metavar="FLEET",
        help=f"its name in the fleet file (default: {default})",
    )
    parser.add_argument(
        "--region",
        metavar="REGION",
        help="of AWS (default: that of the bucket's URL, AWS_REGION, or the profile's)",
    )
    common.add_config(parser)


def config_of(options: argparse.Namespace) -> Config:
    """Read the fleet file; NotFoundError where there is none."""
    from calve.fleet.config import FILE_NAME, load

    config = load(options.config)
    if config is None:
        raise NotFoundError(
            f"there is no {FILE_NAME} here",
            hint="calve init writes one; --config FILE names another",
        )
    return config


def fleet_of(config: Config, name: str | None) -> Fleet:
    """Find a fleet.

    Raises:
        NotFoundError: the file has none of that name.
        UsageError: it has several, or none, and none was named.
    """
    known = ", ".join(config.fleets) or "none"
    if name is None:
        if len(config.fleets) != 1:
            raise UsageError("which fleet?", place=config.path, hint=f"there are: {known}")
        return next(iter(config.fleets.values()))
    if name not in config.fleets:
        raise NotFoundError(
            f"no fleet is called {name}", place=config.path, hint=f"there are: {known}"
        )
    return config.fleets[name]


@contextlib.contextmanager
def open_fleet(
    session: Session, options: argparse.Namespace, *, group: str | None = None
) -> Iterator[Opened]:
    """Open a fleet's bucket and its region; `group` is its group's name, where it is not what the fleet file says."""
    from calve.aws.session import Session as AwsSession
    from calve.aws.session import default_region
    from calve.cache import url as urls
    from calve.rollout.observe import Gateways
    from calve.rollout.start import resolved

    config = config_of(options)
    fleet = fleet_of(config, options.fleet)
    if config.cache is None:
        raise UsageError("a fleet needs [cache]: its releases are kept there", place=config.path)
    place = urls.parse(config.cache.url)
    bucket = place if isinstance(place, urls.S3) else None
    region = options.region or (bucket.region if bucket is not None else None) or default_region()
    aws = AwsSession(region, profile=None if bucket is None else bucket.profile)
    with common.caches(session, [config.cache.url]) as (objects,):
        gateways = Gateways.of(aws, objects)
        fleet = resolved(replace(fleet, group=group or fleet.group), gateways.scaling)
        yield Opened(config, config.cache, fleet, aws, gateways)
