"""An image's name and tags, and which images may go: pure.

The tags say what an image was made of, so that it is found again and nothing has to be remembered elsewhere:
`calve:closure` (store path), `calve:disk` (digest of all blocks), `calve:plan`, `calve:parent` (snapshot), `calve:line`
(what it is an image of: the newest of a line is the parent of the next), `calve:contract` (of user data), `calve:revision`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from calve.aws.images import Ami, SnapshotRow
from calve.contract import evidence, userdata
from calve.disk.disk import Disk
from calve.errors import UsageError
from calve.image.plan import BlockPlan

__all__ = ["CLOSURE", "DISK", "LINE", "PLAN", "Pruned", "image_name", "prune", "sweep", "tags"]

DISK: Final = "calve:disk"
PLAN: Final = "calve:plan"
LINE: Final = "calve:line"
CLOSURE: Final = "calve:closure"
PARENT: Final = "calve:parent"
CONTRACT: Final = "calve:contract"
REVISION: Final = "calve:revision"

_LINE: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DIGITS: Final = 12


def image_name(line: str, disk: Disk) -> str:
    """Return an image's name: of the same bytes the same, so that registering twice makes one.

    Raises:
        UsageError: `line` cannot stand in it.
    """
    if not _LINE.fullmatch(line):
        raise UsageError(
            f"{line!r} is no name for a line of images", hint="lower-case letters, digits and -"
        )
    return f"calve-{line}-{disk.arch.name.replace('_', '-')}-{disk.digest[:_DIGITS]}"


def tags(
    line: str, disk: Disk, plan: BlockPlan, *, closure: str = "", revision: str = ""
) -> dict[str, str]:
    """Return the tags of a snapshot and its image; what is not known is left out."""
    found = {
        "Name": image_name(line, disk),
        LINE: line,
        DISK: disk.digest,
        PLAN: plan.digest,
        CLOSURE: closure,
        PARENT: plan.parent or "",
        CONTRACT: f"{userdata.VERSION}.{evidence.VERSION}",
        REVISION: revision,
    }
    return {key: value for key, value in found.items() if value}


@dataclass(frozen=True, slots=True)
class Pruned:
    """One image, and why it stays; empty where it may go."""

    image: Ami
    why: str


def prune(images: Iterable[Ami], used: Mapping[str, str], pinned: AbstractSet[str]) -> list[Pruned]:
    """Say of each image whether it may go, the newest first.

    It stays where a launch template names it or an instance runs it, where a release or a pin wants it, and where it is
    the newest of its line: the parent of the next. What is not Calve's stays.

    Args:
        images: of one region.
        used: images in use, each with a user.
        pinned: ids of images, or closures, that a release or a pin keeps.
    """
    newest: set[str] = set()
    found = []
    for image in sorted(images, key=lambda one: (one.created, one.id), reverse=True):
        line = f"{image.tags.get(LINE, '')} {image.architecture}"
        if LINE not in image.tags:
            why = "it is not Calve's"
        elif image.id in used:
            why = f"{used[image.id]} uses it"
        elif {image.id, image.tags.get(CLOSURE, image.id)} & pinned:
            why = "a release or a pin keeps it"
        elif line not in newest and image.state == "available":
            why = "it is the newest of its line"
        else:
            why = ""
        if image.state == "available":
            newest.add(line)
        found.append(Pruned(image, why))
    return found


def sweep(
    snapshots: Iterable[SnapshotRow], images: Iterable[Ami], *, before: str, going: AbstractSet[str]
) -> list[SnapshotRow]:
    """Return snapshots of ours that nothing needs: in error, or without an image for long.

    Args:
        snapshots: that have our tag.
        images: all of the region.
        before: ISO 8601; a younger one may be an upload under way, or about to be registered.
        going: images that are taken away in the same run: theirs go too.
    """
    kept = {one for image in images if image.id not in going for one in image.snapshots}
    gone = {one for image in images if image.id in going for one in image.snapshots}
    return [
        row
        for row in snapshots
        if row.id not in kept and (row.id in gone or row.state == "error" or row.started < before)
    ]
