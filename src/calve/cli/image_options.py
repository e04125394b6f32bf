"""What the commands of `calve image` share: regions, what works in each of them, durations, plans as people read them."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from calve.cli import common
from calve.cli.session import Session
from calve.errors import CalveError, UsageError

if TYPE_CHECKING:
    from calve.image.built import Built
    from calve.image.plan import BlockPlan
    from calve.image.publish import Publisher
    from calve.progress import Event, Progress

__all__ = [
    "account",
    "add_image",
    "add_region",
    "add_regions",
    "add_source",
    "everywhere",
    "open_regions",
    "publishers",
    "region",
    "regions",
    "revision",
    "show_plans",
    "take",
]

T = TypeVar("T")

_REGION: Final = re.compile(r"[a-z]{2,}(?:-[a-z0-9]+)+")
_MOST_REGIONS: Final = 40  # more than AWS has
_USD_PER_1000_PUTS: Final = 0.006  # https://aws.amazon.com/ebs/pricing/, EBS direct APIs, us-east-1


# Arguments


def account(text: str) -> str:
    """Read the number of an account, for argparse."""
    if not re.fullmatch(r"[0-9]{12}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an account: 12 digits")
    return text


def add_source(parser: argparse.ArgumentParser) -> None:
    """Declare what is uploaded."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="DIR|FILE",
        help="the directory that calve image build wrote, or a raw disk that was made elsewhere",
    )


def add_image(parser: argparse.ArgumentParser) -> None:
    """Declare the image."""
    parser.add_argument("image", metavar="IMAGE", help="id (ami-…) or name of an image")


def add_regions(parser: argparse.ArgumentParser) -> None:
    """Declare --region, which may be repeated."""
    parser.add_argument(
        "--region",
        dest="regions",
        action="append",
        default=[],
        metavar="REGION",
        help="of AWS; may be repeated (default: AWS_REGION, or the profile's)",
    )


def add_region(parser: argparse.ArgumentParser) -> None:
    """Declare --region."""
    parser.add_argument(
        "--region", metavar="REGION", help="of AWS (default: AWS_REGION, or the profile's)"
    )


def regions(options: argparse.Namespace) -> list[str]:
    """Return the regions that are meant, each once; UsageError where one is none, or none is named."""
    from calve.aws.session import default_region

    found = list(dict.fromkeys(options.regions or [default_region()]))
    for one in found:
        _check_region(one)
    if len(found) > _MOST_REGIONS:
        raise UsageError(f"{len(found)} regions are more than there are")
    return found


def region(options: argparse.Namespace) -> str:
    """Return the region that is meant; UsageError where it is none, or none is named."""
    from calve.aws.session import default_region

    return _check_region(options.region or default_region())


def _check_region(name: str) -> str:
    if not _REGION.fullmatch(name):
        raise UsageError("this is no region of AWS", place=name, hint="such as eu-central-1")
    return name


# Regions


@contextlib.contextmanager
def open_regions(session: Session, names: Sequence[str]) -> Iterator[list[Publisher]]:
    """Open regions; they share a client, which is closed at the end.

    Endpoints are those of the environment, AWS_ENDPOINT_URL and its like, as boto3 reads them.
    """
    from calve.aws.ebs import EbsDirect, configured_endpoint
    from calve.aws.images import Images
    from calve.aws.session import Session as AwsSession
    from calve.aws.session import credentials_provider
    from calve.image.publish import Publisher
    from calve.transport.http import Client

    provider = credentials_provider()
    endpoint = configured_endpoint()
    with Client(context=None, cancel=session.cancel) as client:
        yield [
            Publisher(
                name,
                EbsDirect(client, name, provider, endpoint=endpoint),
                Images(AwsSession(region=name)),
                cancel=session.cancel,
            )
            for name in names
        ]


def publishers(opened: Sequence[Publisher], progress: Progress) -> list[Publisher]:
    """Have regions report their progress, each under its name where there are several."""
    if len(opened) == 1:
        return [replace(opened[0], progress=progress)]
    return [replace(one, progress=_named(one.region, progress)) for one in opened]


def _named(name: str, progress: Progress) -> Progress:
    from calve.progress import Note, Step

    def tell(event: Event) -> None:
        match event:
            case Step():
                progress(replace(event, name=f"{event.name} {name}"))
            case Note():
                progress(Note(f"{name}: {event.text}"))

    return tell


def everywhere(
    session: Session, opened: Sequence[Publisher], work: Callable[[Publisher], T]
) -> dict[str, T]:
    """Do the same in every region at once; the first error ends all, and names its region.

    Returns:
        What came of it, by region, in their order.
    """
    from calve.tasks import Group

    found: dict[str, T] = {}

    def run(one: Publisher) -> None:
        try:
            found[one.region] = work(replace(one, cancel=group.cancel))
        except CalveError as error:
            if len(opened) > 1:
                error.place = ": ".join(filter(None, (one.region, error.place)))
            raise

    with Group("region", limit=max(1, len(opened)), parent=session.cancel) as group:
        for one in opened:
            group.spawn(run, one)
    return {one.region: found[one.region] for one in opened}


# Images


def take(options: argparse.Namespace, session: Session, progress: Progress) -> Built:
    """Read what is uploaded."""
    from calve.image.foreign import take as read

    return read(options.source, progress=progress, cancel=session.cancel)


def revision(session: Session) -> str:
    """Return the commit of the working directory; nothing where it is not under Git, or has changes."""
    from calve.errors import NotFoundError
    from calve.process import run

    def ask(*words: str) -> str | None:
        done = run(["git", *words], check=False, cancel=session.cancel)
        return done.stdout.decode("utf-8", "replace").strip() if done.returncode == 0 else None

    try:
        changes = ask("status", "--porcelain")
        commit = ask("rev-parse", "--verify", "HEAD") if changes == "" else None
    except NotFoundError:
        return ""  # there is no Git
    return commit if commit is not None and re.fullmatch(r"[0-9a-f]{40,64}", commit) else ""


# Plans


def show_plans(
    options: argparse.Namespace,
    session: Session,
    built: Built,
    plans: Mapping[str, tuple[BlockPlan, str | None]],
    *,
    bucket: str | None = None,
) -> None:
    """Print what an upload would write into each region, and what it would cost; or what would go through a bucket."""
    from calve.ui.text import mb, one_line

    if options.json:
        rows = [_plan(name, *found, bucket) for name, found in plans.items()]
        body = {"source": str(options.source), "disk": built.disk.digest, "dry_run": True}
        session.document({**body, "regions": rows})
        return
    for name, (planned, written) in plans.items():
        if written is not None:
            session.result(one_line(f"{name}: {written} has it already"))
            continue
        if bucket is not None:
            session.result(
                one_line(f"{name}: would import {planned.size_gib} GiB through {bucket}")
            )
            continue
        upon = "" if planned.parent is None else f" onto {planned.parent}"
        size = f"{common.plural(len(planned.blocks), 'block')}, {mb(planned.size_bytes)}{upon}"
        session.result(one_line(f"{name}: would write {size}, for {_usd(planned):.5f} USD"))


def _usd(planned: BlockPlan) -> float:
    return len(planned.blocks) * _USD_PER_1000_PUTS / 1000


def _plan(name: str, planned: BlockPlan, written: str | None, bucket: str | None) -> dict[str, Any]:
    return {
        "region": name,
        "snapshot": written,
        "parent": planned.parent,
        "blocks": 0 if written is not None else len(planned.blocks),
        "bytes": 0 if written is not None else planned.size_bytes,
        "usd": 0.0 if written is not None or bucket is not None else round(_usd(planned), 6),
    }
