"""`calve image upload`: a disk into an EBS snapshot, in every region at once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session
from calve.errors import CancelledError, UsageError

if TYPE_CHECKING:
    from calve.cache.url import S3
    from calve.image.built import Built
    from calve.image.plan import BlockPlan
    from calve.image.publish import Publisher
    from calve.image.upload import Snapshot

__all__ = ["arguments", "planned", "run"]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_source(parser)
    shared.add_regions(parser)
    parser.add_argument(
        "--abort",
        action="store_true",
        help="delete the snapshot that an interrupted upload left pending",
    )
    parser.add_argument(
        "--via",
        choices=("direct", "import"),
        default="direct",
        help="EBS direct, or EC2's import out of a bucket, which takes minutes (default: direct)",
    )
    parser.add_argument(
        "--bucket", metavar="URL", help="for --via import: s3://…, of the same region"
    )
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Upload."""
    _check(options)
    names = shared.regions(options)
    with (
        shared.open_regions(session, names) as opened,
        common.listen(session, options) as progress,
    ):
        there = shared.publishers(opened, progress)
        built = shared.take(options, session, progress)
        if options.abort:
            gone = shared.everywhere(session, there, lambda one: one.abort(built))
        else:
            if options.via == "import":
                _import_place(options, built, names)
            plans = planned(session, there, built)
            done = {} if options.dry_run else _write(options, session, there, built, plans)
    if options.abort:
        _print_aborted(options, session, gone)
    elif options.dry_run:
        shared.show_plans(options, session, built, plans, bucket=options.bucket)
    else:
        _print(options, session, built, done)
    return 0


def _check(options: argparse.Namespace) -> None:
    if (options.via == "import") != (options.bucket is not None):
        raise UsageError("--via import and --bucket go together")
    if options.abort and (options.dry_run or options.via == "import"):
        raise UsageError("--abort goes with neither --dry-run nor --via import")


def _import_place(options: argparse.Namespace, built: Built, names: list[str]) -> S3:
    """Return where the bucket is; UsageError where it cannot be imported from there."""
    from calve.cache import url as locations

    place = locations.parse(options.bucket)
    if not isinstance(place, locations.S3) or names != [place.region]:
        raise UsageError(
            "an import is of one region, out of a bucket of that region",
            place=options.bucket,
            hint=f"--bucket 's3://NAME?region={names[0]}'",
        )
    if built.disk.parent is not None:
        raise UsageError(
            "an overlay upon its parent cannot be imported",
            place=built.directory,
            hint="build it with --full, or upload it without --via import",
        )
    return place


def planned(
    session: Session, there: list[Publisher], built: Built
) -> dict[str, tuple[BlockPlan, str | None]]:
    """Find out for every region what is to be written, and the snapshot that has it already; nothing is written."""

    def find(one: Publisher) -> tuple[BlockPlan, str | None]:
        plan = one.plan(built)
        return plan, one.written(plan)

    return shared.everywhere(session, there, find)


def _write(
    options: argparse.Namespace,
    session: Session,
    there: list[Publisher],
    built: Built,
    plans: dict[str, tuple[BlockPlan, str | None]],
) -> dict[str, Snapshot]:
    if options.via == "import":
        return _import(options, session, there, built, plans)
    try:
        return shared.everywhere(
            session, there, lambda one: one.upload(built, plans[one.region][0])
        )
    except CancelledError:
        session.prose(
            "what was begun stays pending: the same command goes on with it, --abort deletes it"
        )
        raise


def _import(
    options: argparse.Namespace,
    session: Session,
    there: list[Publisher],
    built: Built,
    plans: dict[str, tuple[BlockPlan, str | None]],
) -> dict[str, Snapshot]:
    from calve.image.imported import Import

    (one,) = there
    place = _import_place(options, built, [one.region])
    plan, written = plans[one.region]
    with common.caches(session, [options.bucket]) as (objects,):
        task = Import(
            one.images, objects, place, built, plan, one.tags(built, plan),
            region=one.region, progress=one.progress, cancel=session.cancel,
        )  # fmt: skip
        return {one.region: task.run(written)}


def _print(
    options: argparse.Namespace, session: Session, built: Built, done: dict[str, Snapshot]
) -> None:
    from calve.ui.text import one_line

    if options.json:
        rows = [
            {
                "region": name,
                "snapshot": one.id,
                "blocks": one.blocks,
                "requests": one.requests,
            }
            for name, one in done.items()
        ]
        body = {"source": str(options.source), "disk": built.disk.digest, "dry_run": False}
        session.document({**body, "regions": rows})
        return
    for name, one in done.items():
        session.result(one_line(f"{name} {one.id}"))
        there = "imported" if options.via == "import" else "was there"
        what = common.plural(one.requests, "request") if one.requests else there
        session.prose(
            one_line(f"{name}: {one.id} has {common.plural(one.blocks, 'block')}; {what}")
        )


def _print_aborted(
    options: argparse.Namespace, session: Session, gone: dict[str, str | None]
) -> None:
    if options.json:
        rows = [{"region": name, "deleted": one} for name, one in gone.items()]
        session.document({"source": str(options.source), "regions": rows})
        return
    for name, one in gone.items():
        session.result(f"{name}: " + ("nothing is pending" if one is None else f"deleted {one}"))
