"""What has to be written so that a snapshot holds a disk: decided before the snapshot is begun.

Every block that the disk lists is data, zeros included: what is never written of an encrypted volume reads as garbage,
and onto a parent a block that became zero would keep the parent's bytes. With a parent only what differs is written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from calve.disk.disk import BLOCK_BYTES, Block, Disk
from calve.errors import UsageError

__all__ = ["BlockPlan", "Parent", "plan", "whole"]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Parent:
    """A completed snapshot, and the disk that it holds."""

    snapshot: str
    disk: Disk


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What to write.

    Attributes:
        disk: digest of the whole disk, parent's blocks included.
        size_gib: of the volumes that will be made of it.
        blocks: by their index.
        parent: snapshot whose blocks stand where none are written; None where all are written.
    """

    disk: str
    size_gib: int
    blocks: tuple[Block, ...]
    parent: str | None = None

    @property
    def digest(self) -> str:
        """Return the SHA-256 of the plan, in base 16: of where which block goes onto what."""
        state = hashlib.sha256(f"calve-plan-1;{self.size_gib};{self.parent or ''}\n".encode())
        for block in self.blocks:
            state.update(f"{block.index} {block.sha256}\n".encode())
        return state.hexdigest()

    @property
    def linear_sha256(self) -> bytes:
        """Return what EBS calls the LINEAR checksum: the SHA-256 of the blocks' digests, joined by index."""
        return hashlib.sha256(b"".join(bytes.fromhex(b.sha256) for b in self.blocks)).digest()

    @property
    def size_bytes(self) -> int:
        """Return how much is sent."""
        return len(self.blocks) * BLOCK_BYTES

    def token(self, region: str, attempt: int) -> str:
        """Return the client's token: the same plan finds the same snapshot again.

        Args:
            region: where it is written.
            attempt: counts up where what an earlier token began was deleted or ended in error.
        """
        return hashlib.sha256(f"{self.digest};{region};{attempt}".encode()).hexdigest()


def whole(disk: Disk) -> BlockPlan:
    """Return the plan of all that a disk holds, whether its file has it or not: to be read, not to be written."""
    return BlockPlan(disk.digest, disk.size_bytes // _GIB, disk.blocks)


def plan(disk: Disk, parent: Parent | None = None) -> BlockPlan:
    """Decide what to write.

    Raises:
        UsageError: a block that differs from the parent's is not in the disk's file; or the parent is larger.
    """
    size_gib = disk.size_bytes // _GIB
    there: dict[int, str] = {}
    if parent is not None:
        if parent.disk.size_bytes > disk.size_bytes:
            raise UsageError(
                f"the parent has {parent.disk.size_bytes // _GIB} GiB, the disk {size_gib}",
                place=parent.snapshot,
                hint="build it with the parent's size, or without a parent",
            )
        there = {block.index: block.sha256 for block in parent.disk.blocks}
    blocks = tuple(one for one in disk.blocks if there.get(one.index) != one.sha256)
    present = {block.index for block in disk.present}
    absent = [block.index for block in blocks if block.index not in present]
    if absent:
        raise UsageError(
            f"block {absent[0]} differs from the parent's, and the file has it not: it was built upon another disk",
            hint="give the snapshot of the disk that it was built upon, or build it with --full",
        )
    return BlockPlan(disk.digest, size_gib, blocks, None if parent is None else parent.snapshot)
