"""`calve image register`: an image (AMI) of the snapshot of a disk."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.image.publish import Publisher

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_source(parser)
    shared.add_regions(parser)
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Register."""
    from calve.image import ami

    names = shared.regions(options)
    with (
        shared.open_regions(session, names) as opened,
        common.listen(session, options) as progress,
    ):
        built = shared.take(options, session, progress)
        revision = shared.revision(session)

        def register(one: Publisher) -> tuple[str | None, str]:
            snapshot, planned = one.find(built)
            if options.dry_run:
                return None, snapshot
            return one.register(built, planned, snapshot, revision=revision), snapshot

        done = shared.everywhere(session, shared.publishers(opened, progress), register)
    name = ami.image_name(built.line, built.disk)
    if options.json:
        rows = [
            {"region": region, "image": image, "snapshot": snapshot}
            for region, (image, snapshot) in done.items()
        ]
        body = {"source": str(options.source), "name": name, "dry_run": options.dry_run}
        session.document({**body, "regions": rows})
        return 0
    for region, (image, snapshot) in done.items():
        session.result(
            f"{region}: would register {snapshot} as {name}"
            if image is None
            else f"{region} {image} {name}"
        )
    return 0
