"""`calve image share`: other accounts may launch an image, or no longer."""

from __future__ import annotations

import argparse

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session

__all__ = ["arguments", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_image(parser)
    parser.add_argument(
        "accounts",
        nargs="+",
        type=shared.account,
        metavar="ACCOUNT",
        help="the number of an account, 12 digits",
    )
    shared.add_region(parser)
    parser.add_argument("--take-back", action="store_true", help="they may no longer")
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Share it."""
    name = shared.region(options)
    accounts = list(dict.fromkeys(options.accounts))
    with shared.open_regions(session, [name]) as (there,):
        image = there.images.image(options.image)
        if not options.dry_run:
            there.images.share(image, accounts, take_back=options.take_back)
    if options.json:
        session.document(
            {
                "region": name,
                "image": image.id,
                "accounts": accounts,
                "taken_back": options.take_back,
                "dry_run": options.dry_run,
            }
        )
        return 0
    if options.dry_run:
        verb = "would be taken back from" if options.take_back else "would be shared with"
    else:
        verb = "is taken back from" if options.take_back else "is shared with"
    session.result(f"{name} {image.id} {verb} {', '.join(accounts)}")
    return 0
