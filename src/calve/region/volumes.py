"""A snapshot's blocks as files: the record that outlives the region, and the volume that is made of them.

A record is JSON beside the blocks, written when a snapshot is completed. An exported volume is a sparse raw disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from typing import IO, TYPE_CHECKING, Literal

from calve.errors import DamagedError
from calve.region.snapshot import BLOCK_BYTES, BLOCKS_PER_GIB, Entry, Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from calve.region.blobs import Blobs

__all__ = ["Omitted", "Records", "export"]

Omitted = Literal["zeros", "random"]
_STRIDE = 104_729
"""Odd: no two of half a million blocks begin at the same byte of the pad."""
_ZEROS = hashlib.sha256(bytes(BLOCK_BYTES)).hexdigest()


class Records:
    """What is known of completed snapshots, a file for each.

    Args:
        directory: Theirs, and that of nothing else that ends in `.json`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self) -> Iterator[tuple[Snapshot, dict[int, Entry]]]:
        """Read all; DamagedError where a file is no record."""
        for path in sorted(self._directory.glob("snap-*.json")):
            yield _parse(path.read_bytes(), path)

    def save(self, snapshot: Snapshot, blocks: Mapping[int, Entry]) -> None:
        """Write one, replacing what is there."""
        rows = [
            [index, entry.digest.hex(), entry.blob, entry.writer]
            for index, entry in sorted(blocks.items())
        ]
        path = self._path(snapshot.id)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps({**snapshot.dump(), "blocks": rows}))
        temporary.replace(path)

    def forget(self, snapshot_id: str) -> None:
        """Delete one; nothing happens where there is none."""
        self._path(snapshot_id).unlink(missing_ok=True)

    def _path(self, snapshot_id: str) -> Path:
        return self._directory / f"{snapshot_id}.json"


def _parse(data: bytes, place: object) -> tuple[Snapshot, dict[int, Entry]]:
    try:
        document = json.loads(data)
        blocks = {
            int(index): Entry(bytes.fromhex(digest), str(blob), str(writer))
            for index, digest, blob, writer in document.pop("blocks")
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError("this is no snapshot's record", place=place) from error
    return Snapshot.parse(document, place), blocks


def export(
    blocks: Mapping[int, Entry],
    blobs: Blobs,
    path: Path,
    *,
    gib: int,
    omitted: Omitted,
    key: bytes,
) -> None:
    """Write the volume that EC2 would make of a snapshot.

    Args:
        blocks: Of the snapshot's whole chain, by index.
        blobs: Their contents.
        path: A new file; blocks of zeros are holes.
        gib: The volume's size, which may be larger than the snapshot's.
        omitted: What a block reads as that was never written: zeros, or pseudo-random bytes, as on an encrypted
            volume, where nobody ever encrypted the zeros.
        key: Of the pseudo-random bytes: each block is another piece of one pad that is made of it.
    """
    pad = memoryview(hashlib.shake_128(key).digest(2 * BLOCK_BYTES))
    with path.open("xb", buffering=0) as target:
        target.truncate(gib << 30)
        for index in range(gib * BLOCKS_PER_GIB) if omitted == "random" else sorted(blocks):
            entry = blocks.get(index)
            target.seek(index * BLOCK_BYTES)
            if entry is None:
                start = index * _STRIDE % BLOCK_BYTES
                if target.write(pad[start : start + BLOCK_BYTES]) != BLOCK_BYTES:
                    raise OSError(errno.ENOSPC, "no room for a volume", str(path))
            elif entry.blob != _ZEROS:
                with blobs.open(entry.blob) as source:
                    _copy(source, target)


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    """Copy a block within the kernel."""
    position = 0
    while position < BLOCK_BYTES:
        left = BLOCK_BYTES - position
        count = os.sendfile(target.fileno(), source.fileno(), position, left)
        if not count:
            raise OSError(errno.EIO, "a block's file is too short", str(source.name))
        position += count
