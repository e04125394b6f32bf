"""`calve image list`: Calve's images, the newest first."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.aws.images import Ami

__all__ = ["arguments", "row", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_regions(parser)
    parser.add_argument("--line", metavar="NAME", help="only what is an image of this")
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """List them."""
    from calve.image import ami
    from calve.ui.table import table

    names = shared.regions(options)
    with shared.open_regions(session, names) as opened:
        found = shared.everywhere(session, opened, lambda one: one.images.images(tag=ami.LINE))
    rows = [
        (region, image)
        for region, images in found.items()
        for image in sorted(images, key=lambda one: (one.created, one.id), reverse=True)
        if options.line in {None, image.tags.get(ami.LINE)}
    ]
    if options.json:
        session.document({"images": [row(region, image) for region, image in rows]})
        return 0
    headers = ("REGION", "LINE", "IMAGE", "NAME", "CREATED", "STATE", "CLOSURE")
    table([_cells(region, image) for region, image in rows], headers, session.out)
    return 0


def _cells(region: str, image: Ami) -> tuple[str, ...]:
    from calve.image import ami

    closure = image.tags.get(ami.CLOSURE, "").rpartition("/")[2]
    return (
        region,
        image.tags.get(ami.LINE, ""),
        image.id,
        image.name,
        image.created[:16].replace("T", " "),
        image.state,
        closure,
    )


def row(region: str, image: Ami) -> dict[str, object]:
    """Return an image for --json."""
    from calve.image import ami

    return {
        "region": region,
        "image": image.id,
        "name": image.name,
        "line": image.tags.get(ami.LINE),
        "architecture": image.architecture,
        "state": image.state,
        "created": image.created,
        "deprecated": image.deprecated or None,
        "closure": image.tags.get(ami.CLOSURE),
        "disk": image.tags.get(ami.DISK),
        "revision": image.tags.get(ami.REVISION),
        "snapshots": list(image.snapshots),
    }
