"""`calve image publish`: a disk becomes an image (AMI), in every region at once: uploaded, verified, registered, shared."""

from __future__ import annotations

import argparse
import datetime as dt
from typing import TYPE_CHECKING

from calve.cli import common, image_upload
from calve.cli import image_options as shared
from calve.cli.session import Session
from calve.errors import CancelledError

if TYPE_CHECKING:
    from calve.image.built import Built
    from calve.image.plan import BlockPlan
    from calve.image.publish import Published, Publisher

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_source(parser)
    shared.add_regions(parser)
    parser.add_argument(
        "--deep",
        action="store_true",
        help="read every block back, and the disk down to every path's hash, before it is registered",
    )
    parser.add_argument(
        "--share",
        type=shared.account,
        action="append",
        default=[],
        metavar="ACCOUNT",
        help="let this account launch it; may be repeated",
    )
    parser.add_argument(
        "--deprecate-after",
        type=common.duration,
        metavar="DURATION",
        help="such as 90d: from then on it is deprecated, and still can be launched",
    )
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Publish."""
    names = shared.regions(options)
    with (
        shared.open_regions(session, names) as opened,
        common.listen(session, options) as progress,
    ):
        there = shared.publishers(opened, progress)
        built = shared.take(options, session, progress)
        # What one region lacks is told before anything is written to another.
        plans = image_upload.planned(session, there, built)
        done = {} if options.dry_run else _publish(options, session, there, built, plans)
    if options.dry_run:
        shared.show_plans(options, session, built, plans)
    else:
        _print(options, session, built, done)
    return 0


def _publish(
    options: argparse.Namespace,
    session: Session,
    there: list[Publisher],
    built: Built,
    plans: dict[str, tuple[BlockPlan, str | None]],
) -> dict[str, Published]:
    revision = shared.revision(session)

    def publish(one: Publisher) -> Published:
        published = one.publish(built, plans[one.region][0], revision=revision, deep=options.deep)
        if options.share:
            one.images.share(one.images.image(published.image), options.share)
        if options.deprecate_after is not None:
            when = one.clock.now() + dt.timedelta(seconds=options.deprecate_after)
            one.images.deprecate(published.image, when)
        return published

    try:
        return shared.everywhere(session, there, publish)
    except CancelledError:
        session.prose(
            "what was begun stays: the same command goes on with it, calve image upload --abort deletes it"
        )
        raise


def _print(
    options: argparse.Namespace, session: Session, built: Built, done: dict[str, Published]
) -> None:
    from calve.ui.text import one_line

    if options.json:
        rows = [_row(one) for one in done.values()]
        body = {"source": str(options.source), "disk": built.disk.digest, "dry_run": False}
        session.document({**body, "shared_with": options.share, "regions": rows})
        return
    for name, one in done.items():
        session.result(one_line(f"{name} {one.image} {one.name}"))
        read = f"{common.plural(one.verified.read, 'block')} read back"
        session.prose(
            one_line(
                f"{name}: {one.snapshot.requests} of {one.snapshot.blocks} blocks sent now, {read}"
            )
        )


def _row(one: Published) -> dict[str, object]:
    return {
        "region": one.region,
        "image": one.image,
        "name": one.name,
        "snapshot": one.snapshot.id,
        "blocks": one.snapshot.blocks,
        "requests": one.snapshot.requests,
        "read_blocks": one.verified.read,
    }
