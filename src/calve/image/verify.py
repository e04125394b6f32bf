"""A snapshot held against its plan: which blocks it has, and what is in them.

None of the writers that we know reads back what it wrote, and what a service forgot or a disk turned over is found at
the first boot. Here each check has a name, and a snapshot that fails one is no image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from calve.aws.ebs import BLOCK_BYTES, EbsDirect, Listed
from calve.disk.disk import ZERO_BLOCK, Block, Disk
from calve.errors import RefusedError, VerificationError
from calve.image.plan import BlockPlan
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel, Group
from calve.transport import retry

__all__ = ["CHECKS", "Finding", "Verified", "listed", "verify"]

_JOBS: Final = 32
_MOST: Final = 20

CHECKS: Final = {
    "block-missing": "a block that was planned is not in the snapshot",
    "block-unplanned": "the snapshot has a block that nobody planned",
    "block-differs": "a block reads other than it was written",
    "parent-differs": "a block that was left to the parent is not the parent's",
    "parent-unrelated": "the snapshot does not descend from the parent",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong: which check, where, and what was seen."""

    check: str
    place: str
    message: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was looked at.

    Attributes:
        listed: blocks that the snapshot says it has.
        read: blocks that were read and compared.
        findings: at most 20; none where all is well.
    """

    listed: int
    read: int
    findings: tuple[Finding, ...] = field(default=())

    def check(self, place: str) -> None:
        """Raise VerificationError, which names the first finding, where there is one."""
        if self.findings:
            first = self.findings[0]
            more = f", and {len(self.findings) - 1} more" if len(self.findings) > 1 else ""
            raise VerificationError(
                f"{first.check}: {first.place}: {first.message}{more}",
                place=place,
                hint="delete the snapshot and write it again",
            )


def listed(found: Iterable[int], plan: BlockPlan, disk: Disk) -> Iterator[Finding]:
    """Compare what a snapshot says it has, its parents' blocks included, with what it should.

    Args:
        found: indices of its blocks.
        plan: what was written.
        disk: the whole disk.
    """
    there = set(found)
    for block in disk.blocks:
        if block.index not in there:
            yield Finding("block-missing", f"block {block.index}", CHECKS["block-missing"])
    if plan.parent is None:
        for index in sorted(there - {block.index for block in disk.blocks}):
            yield Finding("block-unplanned", f"block {index}", CHECKS["block-unplanned"])


def _changed(
    ebs: EbsDirect, parent: str, snapshot: str, written: set[int], cancel: Cancel
) -> Iterator[Finding]:
    """Compare what differs from the parent with what was written onto it."""
    try:
        rows = retry.retry(lambda: list(ebs.changed(parent, snapshot)), cancel=cancel)
    except RefusedError as error:
        if "UNRELATED_SNAPSHOTS" not in error.message:
            raise
        yield Finding("parent-unrelated", parent, CHECKS["parent-unrelated"])
        return
    found = {one.index for one in rows}
    for index in sorted(found - written):
        yield Finding("block-unplanned", f"block {index}", CHECKS["block-unplanned"])
    for index in sorted(written - found):
        yield Finding("block-missing", f"block {index}", "it is as in the parent snapshot")


def verify(
    ebs: EbsDirect,
    snapshot: str,
    plan: BlockPlan,
    disk: Disk,
    *,
    deep: bool = False,
    progress: Progress = silent,
    cancel: Cancel,
) -> Verified:
    """Look at a completed snapshot.

    Args:
        ebs: of its region.
        snapshot: its id.
        plan: what was written.
        disk: the whole disk.
        deep: read every block, the parent's too; else those that were written, and the first and last ones.
        progress: told of blocks.
        cancel: ends it.

    Raises:
        CalveError: the service refuses, or fails again and again.
    """
    rows = retry.retry(lambda: list(ebs.blocks(snapshot)), cancel=cancel)
    blocks = {one.index: one for one in rows}
    findings = list(listed(blocks, plan, disk))
    if any(one.check == "block-unplanned" for one in findings):
        # EC2's import writes the whole volume: zeros do no harm where nobody will read.
        zeros = _zeros(ebs, snapshot, disk, blocks, progress, cancel)
        findings = [
            one for one in findings if one.check != "block-unplanned" or one.place not in zeros
        ]
    written = {block.index for block in plan.blocks}
    if plan.parent is not None:
        findings += _changed(ebs, plan.parent, snapshot, written, cancel)
    ends = {disk.blocks[0].index, disk.blocks[-1].index} if disk.blocks else set()
    wanted = [
        block
        for block in disk.blocks
        if block.index in blocks and (deep or block.index in written or block.index in ends)
    ]
    findings += _read(ebs, snapshot, wanted, blocks, written, progress, cancel)
    return Verified(len(blocks), len(wanted), tuple(findings[:_MOST]))


def _zeros(
    ebs: EbsDirect,
    snapshot: str,
    disk: Disk,
    blocks: dict[int, Listed],
    progress: Progress,
    cancel: Cancel,
) -> set[str]:
    """Return the places of the blocks that nobody planned and that are all zeros."""
    known = {block.index for block in disk.blocks}
    wanted = [Block(index, ZERO_BLOCK) for index in sorted(blocks.keys() - known)]
    other = {one.place for one in _read(ebs, snapshot, wanted, blocks, set(), progress, cancel)}
    return {f"block {block.index}" for block in wanted} - other


def _read(
    ebs: EbsDirect,
    snapshot: str,
    wanted: list[Block],
    blocks: dict[int, Listed],
    written: set[int],
    progress: Progress,
    cancel: Cancel,
) -> list[Finding]:
    found: dict[int, Finding] = {}
    done: list[int] = []

    def look(block: Block) -> None:
        data = retry.retry(lambda: ebs.get(snapshot, blocks[block.index]), cancel=group.cancel)
        if hashlib.sha256(data).hexdigest() != block.sha256:
            check = "block-differs" if block.index in written else "parent-differs"
            found[block.index] = Finding(check, f"block {block.index}", CHECKS[check])
        done.append(block.index)
        progress(Step("verify", len(done) * BLOCK_BYTES, len(wanted) * BLOCK_BYTES))

    with Group("verify", limit=_JOBS, parent=cancel) as group:
        for block in wanted:
            group.spawn(look, block)
    return [found[index] for index in sorted(found)]
