"""`calve image debug`: the variant of an image that one can log in to."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.image.variant import Made, Prepared

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_image(parser)
    shared.add_region(parser)
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Register it."""
    from calve.image import variant

    name = shared.region(options)
    with (
        shared.open_regions(session, [name]) as opened,
        common.listen(session, options) as progress,
    ):
        (there,) = shared.publishers(opened, progress)
        prepared = variant.prepare(there, there.images.image(options.image))
        made = None if options.dry_run else variant.make(there, prepared)
    _print(options, session, name, prepared, made)
    return 0


def _print(
    options: argparse.Namespace,
    session: Session,
    name: str,
    prepared: Prepared,
    made: Made | None,
) -> None:
    from calve.ui.text import one_line

    blocks = common.plural(len(prepared.plan.blocks), "block")
    if options.json:
        session.document(
            {
                "region": name,
                "source": prepared.image.id,
                "name": prepared.name,
                "image": None if made is None else made.image,
                "snapshot": None if made is None else made.snapshot,
                "blocks": len(prepared.plan.blocks),
                "command_lines": list(prepared.variant.command_lines),
                "dry_run": made is None,
            }
        )
        return
    if made is None:
        session.result(
            one_line(
                f"{name}: would write {blocks} onto {prepared.plan.parent}, as {prepared.name}"
            )
        )
    else:
        session.result(one_line(f"{name} {made.image} {prepared.name}"))
        session.prose(f"{name}: {made.snapshot} differs in {blocks}")
    for line in prepared.variant.command_lines:
        session.prose(one_line(f"command line: {line}"))
