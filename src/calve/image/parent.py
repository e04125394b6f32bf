"""The blocks of an earlier image: out of its file, or out of its snapshot; each held against its digest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

from calve.aws.ebs import EbsDirect, Listed
from calve.disk.disk import BLOCK_BYTES, Block, Disk
from calve.disk.inspect.source import BlockSource
from calve.errors import CalveError, DamagedError, NotFoundError
from calve.tasks import Cancel
from calve.transport import retry

__all__ = ["Blocks", "FileBlocks", "SnapshotBlocks"]


class Blocks(Protocol):
    """Reads blocks of one disk."""

    def read(self, block: Block) -> bytes:
        """Return the 512 KiB of a block.

        Raises:
            NotFoundError: it is not to be had here.
            DamagedError: it is not what the disk's description says.
        """


def _checked(data: bytes, block: Block, place: object) -> bytes:
    if hashlib.sha256(data).hexdigest() != block.sha256:
        raise DamagedError(
            f"block {block.index} is not what the image's description says", place=place
        )
    return data


class FileBlocks:
    """Out of the raw disk that was built.

    Args:
        path: the disk, or an overlay: of that only what it has can be read.
        disk: its description.
    """

    def __init__(self, path: Path, disk: Disk) -> None:
        self._path = path
        self._changed = None if disk.changed is None else frozenset(disk.changed)

    def read(self, block: Block) -> bytes:
        """Read a block."""
        if self._changed is not None and block.index not in self._changed:
            raise NotFoundError(
                f"block {block.index} is not in this file: it is an overlay upon its own parent",
                place=self._path,
                hint="name a region where its snapshot is: --parent-region; or build with --full",
            )
        if block.zero:
            return bytes(BLOCK_BYTES)
        try:
            with self._path.open("rb") as file:
                data = os.pread(file.fileno(), BLOCK_BYTES, block.index * BLOCK_BYTES)
        except OSError as error:
            raise CalveError(f"cannot be read: {error.strerror}", place=self._path) from error
        return _checked(data, block, self._path)


class SnapshotBlocks:
    """Out of a completed snapshot; which blocks it has is asked once, when the first is read.

    Args:
        ebs: of its region.
        snapshot: its id.
        cancel: ends a wait.
    """

    def __init__(self, ebs: EbsDirect, snapshot: str, cancel: Cancel) -> None:
        self._ebs = ebs
        self._snapshot = snapshot
        self._cancel = cancel
        self._listed: dict[int, Listed] | None = None

    def read(self, block: Block) -> bytes:
        """Read a block, and hold it against its digest."""
        data = self.get(block.index)
        if data is None:
            raise NotFoundError(f"the snapshot has no block {block.index}", place=self._snapshot)
        return _checked(data, block, self._snapshot)

    def get(self, index: int) -> bytes | None:
        """Return a block as it is there; None where nobody wrote it."""
        if self._listed is None:
            rows = retry.retry(lambda: list(self._ebs.blocks(self._snapshot)), cancel=self._cancel)
            self._listed = {one.index: one for one in rows}
        found = self._listed.get(index)
        if found is None:
            return None
        return retry.retry(lambda: self._ebs.get(self._snapshot, found), cancel=self._cancel)

    def source(self, size_bytes: int) -> BlockSource:
        """Return the whole volume, for a reader; what nobody wrote are zeros."""
        return BlockSource(size_bytes, lambda index: self.get(index) or bytes(BLOCK_BYTES))
