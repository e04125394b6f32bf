"""An image's name and tags, and which images may go. Pure.

The tags say what an image was made of, so that it is found again and nothing has to be remembered elsewhere:
`calve:closure` (store path), `calve:disk` (digest of all blocks), `calve:plan`, `calve:parent` (snapshot), `calve:line`
(what it is an image of: the newest of a line is the parent of the next), `calve:contract` (of user data), `calve:revision`,
and `calve:variant` of what nothing is built upon.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from calve.aws.images import Ami, SnapshotRow
from calve.cache.keep import root_name
from calve.contract import evidence, userdata
from calve.disk.disk import Disk
from calve.errors import UsageError
from calve.image.plan import BlockPlan
from calve.nix.storepath import StorePath

__all__ = [
    "CLOSURE",
    "CONTRACT",
    "DISK",
    "LINE",
    "PARENT",
    "PLAN",
    "REVISION",
    "VARIANT",
    "Pruned",
    "check_line",
    "image_name",
    "line_of",
    "plain_line",
    "prune",
    "sweep",
    "tags",
]

DISK: Final = "calve:disk"
PLAN: Final = "calve:plan"
LINE: Final = "calve:line"
CLOSURE: Final = "calve:closure"
PARENT: Final = "calve:parent"
CONTRACT: Final = "calve:contract"
REVISION: Final = "calve:revision"
VARIANT: Final = "calve:variant"

_LINE: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DIGITS: Final = 12


def image_name(line: str, disk: Disk) -> str:
    """Return an image's name: of the same bytes the same, so that registering twice makes one.

    Raises:
        UsageError: `line` cannot stand in it.
    """
    return f"calve-{check_line(line)}-{disk.arch.name.replace('_', '-')}-{disk.digest[:_DIGITS]}"


def line_of(system: StorePath) -> str:
    """Return the line of a system's images where nobody names one: of `nixos-system-web-25.11` it is `web`."""
    return plain_line(root_name(system).removeprefix("nixos-system-"))


def plain_line(text: str) -> str:
    """Return the name of a line that is nearest to a text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:63] or "system"


def check_line(line: str) -> str:
    """Return a line's name; UsageError where it is none."""
    if not _LINE.fullmatch(line):
        raise UsageError(
            f"{line!r} is no name for a line of images", hint="lower-case letters, digits and -"
        )
    return line


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


def prune(
    images: Iterable[Ami], used: Mapping[str, str], pinned: AbstractSet[str], *, before: str = ""
) -> list[Pruned]:
    """Say of each image whether it may go, the newest first.

    It stays where a launch template names it or an instance runs it, where a release or a pin wants it, and where it is
    the newest of its line: the parent of the next. What is not Calve's stays, and what is young.

    Args:
        images: of one region.
        used: images in use, each with a user.
        pinned: ids of images, or closures, that a release or a pin keeps.
        before: ISO 8601; one that was made later is young.
    """
    newest: set[str] = set()
    found = []
    for image in sorted(images, key=lambda one: (one.created, one.id), reverse=True):
        line = f"{image.tags.get(LINE, '')} {image.architecture}"
        is_parent = image.state == "available" and VARIANT not in image.tags
        if LINE not in image.tags:
            why = "it is not Calve's"
        elif image.id in used:
            why = f"{used[image.id]} uses it"
        elif {image.id, image.tags.get(CLOSURE, image.id)} & pinned:
            why = "a release or a pin keeps it"
        elif line not in newest and is_parent:
            why = "it is the newest of its line"
        elif before and image.created >= before:
            why = "it is young"
        else:
            why = ""
        if is_parent:
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
