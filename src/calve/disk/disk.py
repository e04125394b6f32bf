"""What a raw disk holds, block by block, without the disk: `disk.json`, version 1.

A block is 512 KiB, as EBS snapshots have them. Every block that was ever meant to be read is listed, zeros included;
what is not listed was never written, and may hold anything: a snapshot of an encrypted volume gives garbage there.
With a parent the file beside it is an overlay: it has only the blocks that differ from the parent's.
"""

from __future__ import annotations

import hashlib
import itertools
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calve import record
from calve.disk.arch import Arch, arch
from calve.errors import DamagedError, NotFoundError, UsageError

__all__ = ["BLOCK_BYTES", "MAX_BLOCKS", "ZERO_BLOCK", "Block", "Content", "Disk", "read", "sidecar"]

VERSION = 1
BLOCK_BYTES = 512 << 10
MAX_BLOCKS = 1 << 17
"""That are listed: 64 GiB of content."""

ZERO_BLOCK = hashlib.sha256(bytes(BLOCK_BYTES)).hexdigest()

_LIMIT_BYTES = 16 << 20
_MAX_SIZE_BYTES = 64 << 40
_MAX_PARTITIONS = 128


@dataclass(frozen=True, slots=True)
class Block:
    """A block: which of the disk, and the SHA-256 of its 512 KiB in base 16."""

    index: int
    sha256: str

    @property
    def zero(self) -> bool:
        """Say whether it is all zeros."""
        return self.sha256 == ZERO_BLOCK


@dataclass(frozen=True, slots=True)
class Content:
    """A partition, and how much of it has content.

    Attributes:
        name: its label.
        type: its GUID of the partition table.
        start_bytes: on the disk.
        size_bytes: of the partition.
        content_bytes: from its start; what lies behind it was never written.
    """

    name: str
    type: uuid.UUID
    start_bytes: int
    size_bytes: int
    content_bytes: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw disk.

    Attributes:
        arch: the processor that it starts on.
        size_bytes: of the disk, whole GiB.
        partitions: in their order on the disk.
        blocks: all that have content, by their index.
        parent: the digest of the disk that the file is an overlay of; None where it is whole.
        changed: indices of the blocks that differ from the parent's, and so are in the file; None where it is whole.
    """

    arch: Arch
    size_bytes: int
    partitions: tuple[Content, ...]
    blocks: tuple[Block, ...]
    parent: str | None = None
    changed: tuple[int, ...] | None = None

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what the disk holds where, in base 16, however it was made."""
        state = hashlib.sha256(f"calve-disk-1;{self.size_bytes}\n".encode())
        for block in self.blocks:
            state.update(f"{block.index} {block.sha256}\n".encode())
        return state.hexdigest()

    @property
    def end_bytes(self) -> int:
        """Return where its last block ends."""
        return (self.blocks[-1].index + 1) * BLOCK_BYTES if self.blocks else 0

    @property
    def present(self) -> tuple[Block, ...]:
        """Return the blocks that the file has: all that are listed, or those that changed."""
        if self.changed is None:
            return self.blocks
        changed = frozenset(self.changed)
        return tuple(block for block in self.blocks if block.index in changed)

    def dump(self) -> bytes:
        """Return the document's bytes, one line of ASCII.

        Raises:
            UsageError: there are more than `MAX_BLOCKS` blocks.
        """
        if len(self.blocks) > MAX_BLOCKS:
            raise UsageError(f"{len(self.blocks)} blocks are more than a disk may have")
        body = {
            "version": VERSION,
            "arch": self.arch.name,
            "size": self.size_bytes,
            "blockSize": BLOCK_BYTES,
            "partitions": [
                {
                    "name": one.name,
                    "type": str(one.type),
                    "start": one.start_bytes,
                    "size": one.size_bytes,
                    "content": one.content_bytes,
                }
                for one in self.partitions
            ],
            "blocks": list(_runs(self.blocks)),
            "parent": self.parent,
            "changed": None if self.changed is None else list(self.changed),
        }
        return record.dump(body)

    @classmethod
    def parse(cls, data: bytes, place: object) -> Disk:
        """Read a document.

        Raises:
            UsageError: it is of a version that we do not read.
            DamagedError: it is none, or says what cannot be.
        """
        fields = record.parse(
            data, what="disk's description", version=VERSION, limit=_LIMIT_BYTES, place=str(place)
        )
        try:
            return _disk(fields)
        except UsageError as error:  # a processor, or a size, that is not ours
            raise DamagedError(error.message, place=place) from error


def sidecar(path: Path) -> Path:
    """Return where the description of a raw disk stands: `disk.json` beside `disk.raw`."""
    return path.with_suffix(".json")


def read(path: Path) -> Disk:
    """Read the description beside a raw disk.

    Raises:
        NotFoundError: there is none.
        UsageError, DamagedError: see `Disk.parse`.
    """
    place = sidecar(path)
    try:
        with place.open("rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
    except OSError as error:
        raise NotFoundError(
            f"the disk's description cannot be read: {error.strerror}", place=place
        ) from error
    return Disk.parse(data, place)


def _runs(blocks: Iterable[Block]) -> Iterator[dict[str, Any]]:
    """Group blocks that follow one another: most of a disk is one run."""
    numbered = enumerate(blocks)
    for _, run in itertools.groupby(numbered, key=lambda pair: pair[1].index - pair[0]):
        members = [block for _, block in run]
        yield {"first": members[0].index, "sha256": [block.sha256 for block in members]}


def _disk(fields: record.Fields) -> Disk:
    size = _within(fields, "size", 1, _MAX_SIZE_BYTES)
    if fields.number("blockSize") != BLOCK_BYTES or size % BLOCK_BYTES:
        raise DamagedError(f"blocks are not of {BLOCK_BYTES} bytes", place=fields.place)
    blocks = tuple(_blocks(fields, size // BLOCK_BYTES))
    rows = _items(fields, "partitions", _MAX_PARTITIONS)
    partitions = tuple(_partition(record.Fields(one, fields.place), size) for one in rows)
    parent, changed = fields.optional("parent", _digest), None
    if fields.has("changed") != (parent is not None):
        raise DamagedError("changed blocks and a parent do not go together", place=fields.place)
    if parent is not None:
        changed = tuple(_changed(fields, {block.index for block in blocks}))
    return Disk(fields.text("arch", arch), size, partitions, blocks, parent, changed)


def _changed(fields: record.Fields, listed: Collection[int]) -> Iterator[int]:
    last = -1
    for index in _items(fields, "changed", MAX_BLOCKS):
        if type(index) is not int or index not in listed or index <= last:
            raise DamagedError("a changed block is not listed, or not in order", place=fields.place)
        yield index
        last = index


def _blocks(fields: record.Fields, count: int) -> Iterator[Block]:
    following = total = 0
    for one in _items(fields, "blocks", MAX_BLOCKS):
        run = record.Fields(one, fields.place)
        index = _within(run, "first", following, count - 1)
        for digest in run.texts("sha256", _digest):
            total += 1
            if index >= count or total > MAX_BLOCKS:
                raise DamagedError("there are more blocks than the disk has", place=fields.place)
            yield Block(index, digest)
            index += 1
        following = index


def _partition(fields: record.Fields, disk_bytes: int) -> Content:
    start = _within(fields, "start", 0, disk_bytes)
    size = _within(fields, "size", 0, disk_bytes - start)
    content = _within(fields, "content", 0, size)
    if start % BLOCK_BYTES:
        raise DamagedError("a partition does not begin with a block", place=fields.place)
    return Content(fields.text("name", str), fields.text("type", _guid), start, size, content)


def _items(fields: record.Fields, key: str, limit: int) -> list[Any]:
    found = fields.items(key)
    if len(found) > limit:
        raise DamagedError(f"{key} has more than {limit} entries", place=fields.place)
    return found


def _within(fields: record.Fields, key: str, lowest: int, highest: int) -> int:
    value = fields.number(key)
    if not lowest <= value <= highest:
        raise DamagedError(f"{key} is not between {lowest} and {highest}", place=fields.place)
    return value


def _guid(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise DamagedError("it is no GUID") from error


def _digest(text: str) -> str:
    return record.sha256(text).hex()
