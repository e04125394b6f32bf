"""`calve image show`: one image, its tags and snapshots, and who uses it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import common, image_list
from calve.cli import image_options as shared
from calve.cli.session import Session

if TYPE_CHECKING:
    from calve.aws.images import Ami

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_image(parser)
    shared.add_region(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Show it."""
    name = shared.region(options)
    with shared.open_regions(session, [name]) as (there,):
        image = there.images.image(options.image)
        states = {one: there.images.snapshot_state(one) for one in image.snapshots}
        user = there.images.used().get(image.id)
    if options.json:
        rows = [
            {"snapshot": one, "state": None if state is None else state[0]}
            for one, state in states.items()
        ]
        document = image_list.row(name, image)
        session.document({**document, "tags": dict(image.tags), "snapshots": rows, "used_by": user})
        return 0
    for label, text in _lines(name, image, states, user):
        session.result(f"{label:<12} {text}")
    return 0


def _lines(
    name: str, image: Ami, states: dict[str, tuple[str, str] | None], user: str | None
) -> list[tuple[str, str]]:
    from calve.ui.text import one_line

    lines = [
        ("image", f"{image.id} in {name}"),
        ("name", image.name),
        ("state", image.state),
        ("processor", image.architecture),
        ("created", image.created),
        *([("deprecated", image.deprecated)] if image.deprecated else []),
        ("used by", user or "no launch template and no instance"),
        *(
            ("snapshot", f"{one} {'is gone' if state is None else state[0]}")
            for one, state in states.items()
        ),
        *(("tag", f"{key}={value}") for key, value in sorted(image.tags.items())),
    ]
    return [(label, one_line(text)) for label, text in lines]
