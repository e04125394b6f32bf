"""The description of a raw disk that was made elsewhere, by reading it: every block of it is data, zeros included."""

from __future__ import annotations

import hashlib
from pathlib import Path

from calve.disk.check import check
from calve.disk.disk import BLOCK_BYTES, MAX_BLOCKS, Block, Disk
from calve.errors import CalveError, ConflictError, UsageError
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["describe"]

_GIB = 1 << 30


def describe(path: Path, *, progress: Progress = silent, cancel: Cancel | None = None) -> Disk:
    """Look at a disk and hash its blocks.

    Args:
        path: a file or a block device.
        progress: told of bytes.
        cancel: ends it.

    Returns:
        The disk, its size rounded up to whole GiB; the partitions are left out, for nothing is built upon it.

    Raises:
        UsageError: it is no raw disk that UEFI firmware starts, or too large.
        DamagedError: its partition table or EFI system partition is damaged.
        ConflictError: it became shorter while it was read.
    """
    checked = check(path)
    count = checked.size_bytes // BLOCK_BYTES
    if count > MAX_BLOCKS:
        raise UsageError(
            f"more than {MAX_BLOCKS * BLOCK_BYTES >> 30} GiB are not written into a snapshot",
            place=path,
            hint="shrink the disk: volumes grow when machines are launched",
        )
    blocks = _hash(path, count, progress, cancel)
    size_bytes = -(-checked.size_bytes // _GIB) * _GIB
    return Disk(checked.arches[0], size_bytes, (), blocks)  # it may start on both processors


def _hash(path: Path, count: int, progress: Progress, cancel: Cancel | None) -> tuple[Block, ...]:
    blocks = []
    try:
        with path.open("rb") as file:
            for index in range(count):
                if cancel is not None:
                    cancel.check()
                data = file.read(BLOCK_BYTES)
                if len(data) != BLOCK_BYTES:
                    raise ConflictError("it became shorter while it was read", place=path)
                blocks.append(Block(index, hashlib.sha256(data).hexdigest()))
                progress(Step("hash", (index + 1) * BLOCK_BYTES, count * BLOCK_BYTES))
    except OSError as error:
        raise CalveError(f"cannot be read: {error.strerror}", place=path) from error
    return tuple(blocks)
