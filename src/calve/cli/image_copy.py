"""`calve image copy`: an image into other regions, by EC2's own copy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session
from calve.errors import CancelledError, UsageError

if TYPE_CHECKING:
    from calve.image.publish import Publisher

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_image(parser)
    parser.add_argument(
        "--to",
        dest="regions",
        action="append",
        required=True,
        metavar="REGION",
        help="a region to copy it into; may be repeated",
    )
    shared.add_region(parser)
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Copy it."""
    from calve.image.copying import Copy

    source, names = shared.region(options), shared.regions(options)
    if source in names:
        raise UsageError("the image is there already", place=source)
    with (
        shared.open_regions(session, [source, *names]) as (origin, *opened),
        common.listen(session, options) as progress,
    ):
        image = origin.images.image(options.image)
        session.prose(
            "with the image's directory at hand, calve image publish DIR --region REGION "
            "writes only what differs"
        )

        def copy(one: Publisher) -> str:
            task = Copy(
                one.images, image, source, one.region,
                progress=one.progress, cancel=one.cancel, clock=one.clock,
            )  # fmt: skip
            return task.run()

        there = shared.publishers(opened, progress)
        try:
            done = {} if options.dry_run else shared.everywhere(session, there, copy)
        except CancelledError:
            session.prose("EC2 copies on: the same command waits for it")
            raise
    if options.json:
        rows = [{"region": name, "image": done.get(name)} for name in names]
        body = {"source": {"region": source, "image": image.id}, "dry_run": options.dry_run}
        session.document({**body, "regions": rows})
        return 0
    for name in names:
        verb = f"would copy {image.id}" if options.dry_run else done[name]
        session.result(f"{name} {verb} {image.name}")
    return 0
