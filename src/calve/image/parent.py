"""The blocks of an earlier image: out of its file, or out of its snapshot; each held against its digest."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from calve.aws.ebs import EbsDirect, Listed
from calve.disk.disk import BLOCK_BYTES, ZERO_BLOCK, Disk
from calve.errors import CalveError, DamagedError, NotFoundError
from calve.tasks import Cancel
from calve.transport import retry

__all__ = ["Blocks", "FileBlocks", "SnapshotBlocks"]


class Blocks(Protocol):
    """Reads blocks of one disk."""

    def read(self, index: int) -> bytes:
        """Return the 512 KiB of a block.

        Raises:
            NotFoundError: it is not to be had here.
            DamagedError: it is not what the disk's description says.
        """


def _checked(data: bytes, wanted: str, index: int, place: object) -> bytes:
    if hashlib.sha256(data).hexdigest() != wanted:
        raise DamagedError(f"block {index} is not what the image's description says", place=place)
    return data


@dataclass(frozen=True, slots=True)
class FileBlocks:
    """Out of the raw disk that was built.

    Attributes:
        path: the disk, or an overlay: of that only what it has can be read.
        disk: its description.
    """

    path: Path
    disk: Disk

    def read(self, index: int) -> bytes:
        """Read a block."""
        known = {block.index: block.sha256 for block in self.disk.present}
        if index not in known:
            raise NotFoundError(
                f"block {index} is not in this file: it is an overlay upon its own parent",
                place=self.path,
                hint="name a region where its snapshot is: --parent-region; or build with --full",
            )
        if known[index] == ZERO_BLOCK:
            return bytes(BLOCK_BYTES)
        try:
            with self.path.open("rb") as file:
                data = os.pread(file.fileno(), BLOCK_BYTES, index * BLOCK_BYTES)
        except OSError as error:
            raise CalveError(f"cannot be read: {error.strerror}", place=self.path) from error
        return _checked(data, known[index], index, self.path)


@dataclass(slots=True)
class SnapshotBlocks:
    """Out of a completed snapshot.

    Attributes:
        ebs: of its region.
        snapshot: its id.
        disk: the description of what it holds.
        cancel: ends a wait.
    """

    ebs: EbsDirect
    snapshot: str
    disk: Disk
    cancel: Cancel = field(default_factory=Cancel)
    _listed: dict[int, Listed] | None = None

    def read(self, index: int) -> bytes:
        """Read a block."""
        if self._listed is None:
            self._listed = {one.index: one for one in self.ebs.blocks(self.snapshot)}
        found = self._listed.get(index)
        known = {block.index: block.sha256 for block in self.disk.blocks}
        if found is None or index not in known:
            raise NotFoundError(f"the snapshot has no block {index}", place=self.snapshot)
        data = retry.retry(lambda: self.ebs.get(self.snapshot, found), cancel=self.cancel)
        return _checked(data, known[index], index, self.snapshot)
