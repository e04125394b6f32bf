"""An image's debug variant becomes an image of its own: its changed blocks written onto the image's snapshot."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calve.aws.images import Ami
from calve.disk.arch import arch
from calve.disk.disk import BLOCK_BYTES, Block, Disk
from calve.errors import UsageError
from calve.image import ami, debug
from calve.image.parent import SnapshotBlocks
from calve.image.plan import BlockPlan
from calve.image.publish import Publisher
from calve.image.upload import Upload

__all__ = ["SUFFIX", "Made", "Prepared", "make", "prepare"]

SUFFIX: Final = "-debug"
_MOST_NAME: Final = 128


@dataclass(frozen=True, slots=True)
class Prepared:
    """What would be made of an image.

    Attributes:
        image: which.
        name: of the variant.
        variant: what differs.
        plan: what is written.
    """

    image: Ami
    name: str
    variant: debug.Variant
    plan: BlockPlan


@dataclass(frozen=True, slots=True)
class Made:
    """A variant: its image, its snapshot, and how many blocks were sent for it."""

    image: str
    snapshot: str
    blocks: int


def prepare(there: Publisher, image: Ami) -> Prepared:
    """Read what of an image's snapshot is needed, and decide.

    Raises:
        UsageError: the image is not Calve's, or cannot have a variant; see `debug.with_debug`.
        DamagedError: its disk is damaged.
    """
    if ami.LINE not in image.tags or len(image.snapshots) != 1 or not image.size_gib:
        raise UsageError("this image is not Calve's", place=image.id, hint="calve image list")
    name = f"{image.name}{SUFFIX}"
    if ami.VARIANT in image.tags or len(name) > _MOST_NAME:
        raise UsageError("this image is a variant itself", place=image.id)
    (snapshot,) = image.snapshots
    source = SnapshotBlocks(there.ebs, snapshot, there.cancel).source(image.size_gib << 30)
    variant = debug.with_debug(source, image.id)
    if not variant.blocks:
        raise UsageError(f"{debug.WORD} is on its command line already", place=image.id)
    blocks = tuple(
        Block(index, hashlib.sha256(data).hexdigest()) for index, data in variant.blocks.items()
    )
    disk = _disk(image, blocks)
    return Prepared(image, name, variant, BlockPlan(disk.digest, image.size_gib, blocks, snapshot))


def make(there: Publisher, prepared: Prepared) -> Made:
    """Write, verify and register the variant; what an earlier run did is found again.

    Raises:
        VerificationError: the snapshot is not what was planned.
        ConflictError: another image has its name.
        CalveError: of the services.
    """
    plan, image = prepared.plan, prepared.image
    tags = _tags(prepared)
    written = there.written(plan)
    if written is None:
        with tempfile.TemporaryDirectory(prefix="calve-") as work:
            path = _overlay(Path(work), prepared.variant.blocks)
            written = Upload(
                there.ebs, there.images, there.region, path, plan, tags, prepared.name,
                progress=there.progress, cancel=there.cancel, clock=there.clock,
            ).run().id  # fmt: skip
    disk = _disk(image, plan.blocks)
    there.verify(disk, plan, written).check(written)
    made = there.register_as(
        prepared.name,
        written,
        architecture=image.architecture,
        size_gib=image.size_gib,
        description=f"Calve: {image.id} with {debug.WORD}",
        tags=tags,
        holds=ami.PLAN,
    )
    return Made(made, written, len(plan.blocks))


def _disk(image: Ami, blocks: tuple[Block, ...]) -> Disk:
    """Describe what was written; the other blocks are the image's own, and were not read."""
    return Disk(arch(image.architecture), image.size_gib << 30, (), blocks)


def _overlay(work: Path, blocks: Mapping[int, bytes]) -> Path:
    path = work / "disk.raw"
    with path.open("wb") as file:
        for index, data in blocks.items():
            file.seek(index * BLOCK_BYTES)
            file.write(data)
    return path


def _tags(prepared: Prepared) -> dict[str, str]:
    """Return the variant's tags: a line of its own, so that no release is built upon it."""
    image = prepared.image
    kept = {
        key: image.tags[key]
        for key in (ami.CLOSURE, ami.CONTRACT, ami.REVISION)
        if key in image.tags
    }
    return {
        "Name": prepared.name,
        ami.LINE: f"{image.tags[ami.LINE]}{SUFFIX}",
        ami.VARIANT: "debug",
        ami.PLAN: prepared.plan.digest,
        ami.PARENT: prepared.plan.parent or "",
        **kept,
    }
