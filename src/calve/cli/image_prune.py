"""`calve image prune`: images and snapshots that nothing needs are removed."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from calve.cli import common
from calve.cli import image_options as shared
from calve.cli.session import Session
from calve.clock import SYSTEM
from calve.errors import ConflictError, DamagedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.aws.images import SnapshotRow
    from calve.image.ami import Pruned
    from calve.image.publish import Publisher

__all__ = ["arguments", "run"]

_IDLE_S: Final = (
    86_400  # a snapshot without an image may be an upload under way, or about to be registered
)


@dataclass(frozen=True)
class _Found:
    """What was found in one region: every image with why it stays, and the snapshots that go."""

    images: list[Pruned]
    snapshots: list[SnapshotRow]

    @property
    def going(self) -> list[Pruned]:
        return [one for one in self.images if not one.why]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    shared.add_regions(parser)
    parser.add_argument(
        "--cache",
        metavar="URL",
        help="keep the images of what this cache's pins and releases name (default: the fleet file's)",
    )
    parser.add_argument(
        "--keep-closure",
        action="append",
        default=[],
        metavar="PATH",
        help="keep the images of this store path, whatever their age; may be repeated",
    )
    parser.add_argument(
        "--older-than",
        type=common.duration,
        default=7 * 86_400,
        metavar="DURATION",
        help="what is younger stays (default: 7d)",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    common.add_dry_run(parser)
    common.add_json(parser)
    common.add_config(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Prune."""
    from pathlib import Path

    kept = frozenset(str(common.resolve(text, Path("/"))) for text in options.keep_closure)
    kept |= _rooted(options, session)
    before, idle = (_ago(seconds) for seconds in (options.older_than, _IDLE_S))
    names = shared.regions(options)
    with (
        shared.open_regions(session, names) as opened,
        common.listen(session, options) as progress,
    ):
        there = shared.publishers(opened, progress)
        found = shared.everywhere(session, there, lambda one: _look(one, kept, before, idle))
        if not options.json:
            _show(session, found)
        due = any(one.going or one.snapshots for one in found.values())
        wanted = due and not options.dry_run and _is_wanted(options, session)
        spared = shared.everywhere(
            session, there if wanted else [], lambda one: _remove(one, found[one.region])
        )
    _print(options, session, found, spared, done=wanted)
    return 0


def _rooted(options: argparse.Namespace, session: Session) -> frozenset[str]:
    """Return the closures that pins and releases of the cache name; none where no cache is named.

    Raises:
        DamagedError: what one of them names cannot be read, so that nobody knows what may go.
    """
    from calve.cache import pins

    cache = common.cache_of(options, "cache")
    url = options.cache or (None if cache is None else cache.url)
    if url is None:
        return frozenset()
    found = set()
    with common.caches(session, [url]) as (objects,):
        for one in pins.kept(objects):
            if one.problem:
                raise DamagedError(
                    f"the manifest of {one.root.owner}/{one.root.name} cannot be read: {one.problem}",
                    place=url,
                    hint="calve cache repair, or calve cache pin NAME --remove",
                )
            found.add(str(one.toplevel))
    return frozenset(found)


def _ago(seconds: float) -> str:
    """Return an instant as EC2 writes it, to the millisecond."""
    since = SYSTEM.now() - dt.timedelta(seconds=seconds)
    return since.replace(tzinfo=None).isoformat(timespec="milliseconds")


def _look(one: Publisher, kept: frozenset[str], before: str, idle: str) -> _Found:
    from calve.image import ami

    images = one.images.images()
    judged = ami.prune(
        [image for image in images if ami.LINE in image.tags],
        one.images.used(),
        kept,
        before=before,
    )
    judged = [each if each.why else _unless_shared(one, each) for each in judged]
    going = {each.image.id for each in judged if not each.why}
    rows = one.images.snapshots(ami.LINE)
    return _Found(judged, ami.sweep(rows, images, before=min(before, idle), going=going))


def _unless_shared(one: Publisher, found: Pruned) -> Pruned:
    """Keep what other accounts may launch: who of them uses it cannot be seen from here."""
    accounts = one.images.shared_with(found.image.id)
    return replace(found, why=f"it is shared with {', '.join(accounts)}") if accounts else found


def _remove(one: Publisher, found: _Found) -> list[str]:
    """Remove what goes, images first; return the snapshots that could not go, for something uses them now."""
    spared = []
    for each in found.going:
        one.cancel.check()
        with contextlib.suppress(NotFoundError):  # another run was first
            one.images.deregister(each.image.id)
    for row in found.snapshots:
        one.cancel.check()
        try:
            one.images.delete_snapshot(row.id)
        except NotFoundError:
            continue
        except ConflictError:
            spared.append(row.id)
    return spared


def _is_wanted(options: argparse.Namespace, session: Session) -> bool:
    """Ask, unless that was answered; a document shows nothing to ask about."""
    if options.json and not options.yes:
        raise UsageError("--json asks nobody", hint="--yes removes them, --dry-run shows them")
    return options.yes or session.asked("remove them?")


# Output


def _show(session: Session, found: dict[str, _Found]) -> None:
    from calve.ui.table import table

    rows = [
        (
            name,
            each.image.id,
            each.image.name,
            each.image.created[:16].replace("T", " "),
            "goes" if not each.why else f"stays: {each.why}",
        )
        for name, one in found.items()
        for each in one.images
    ]
    rows += [
        (name, row.id, row.tags.get("Name", ""), row.started[:16].replace("T", " "), _why(row))
        for name, one in found.items()
        for row in one.snapshots
    ]
    table(rows, ("REGION", "ID", "NAME", "CREATED", "WHAT"), session.out)


def _why(row: SnapshotRow) -> str:
    return "goes" if row.state == "completed" else f"goes: {row.state}"


def _print(
    options: argparse.Namespace,
    session: Session,
    found: dict[str, _Found],
    spared: dict[str, list[str]],
    *,
    done: bool,
) -> None:
    if options.json:
        rows = [_row(name, one, spared.get(name, [])) for name, one in found.items()]
        session.document({"dry_run": options.dry_run, "removed": done, "regions": rows})
        return
    images = sum(len(one.going) for one in found.values())
    snapshots = sum(len(one.snapshots) for one in found.values())
    left = sum(len(one) for one in spared.values())
    what = f"{common.plural(images, 'image')} and {common.plural(snapshots - left, 'snapshot')}"
    verb = "removed" if done else "would remove" if options.dry_run else "nothing was removed of"
    session.prose(f"{verb} {what}" if images or snapshots else "nothing is to be removed")
    for name, snapshots_left in spared.items():
        for one in snapshots_left:
            session.prose(f"{name}: {one} stays: an image uses it now")


def _row(name: str, one: _Found, spared: list[str]) -> dict[str, object]:
    return {
        "region": name,
        "images": [
            {"image": each.image.id, "name": each.image.name, "kept_because": each.why or None}
            for each in one.images
        ],
        "snapshots": [
            {"snapshot": row.id, "state": row.state, "spared": row.id in spared}
            for row in one.snapshots
        ],
    }
