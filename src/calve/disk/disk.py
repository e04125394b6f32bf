"""What a raw disk holds, block by block, without the disk: `disk.json`, version 1.

A block is 512 KiB, as EBS snapshots have them. Every block that was ever meant to be read is listed, zeros included;
what is not listed was never written, and may hold anything: a snapshot of an encrypted volume gives garbage there.
With a parent the file beside it is an overlay: it has only the blocks that differ from the parent's.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calve.disk.arch import Arch, arch
from calve.errors import CalveError, DamagedError, NotFoundError, UsageError

__all__ = ["BLOCK_BYTES", "MAX_BLOCKS", "ZERO_BLOCK", "Block", "Content", "Disk", "read", "sidecar"]

VERSION = 1
BLOCK_BYTES = 512 << 10
MAX_BLOCKS = 1 << 17
"""That are listed: 64 GiB of content."""

ZERO_BLOCK = hashlib.sha256(bytes(BLOCK_BYTES)).hexdigest()

_LIMIT_BYTES = 16 << 20
_MAX_SIZE_BYTES = 64 << 40
_MAX_PARTITIONS = 128
_DIGEST = re.compile(r"[0-9a-f]{64}")


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
        return json.dumps(body, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, place: object) -> Disk:
        """Read a document.

        Raises:
            UsageError: it is of a version that we do not read.
            DamagedError: it is none, or says what cannot be.
        """
        body = _document(data, place)
        try:
            return _disk(body)
        except (KeyError, TypeError, ValueError, CalveError) as error:
            what = error.message if isinstance(error, CalveError) else f"{error}"
            raise DamagedError(f"the disk's description is damaged: {what}", place=place) from error


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


def _document(data: bytes, place: object) -> dict[str, Any]:
    if len(data) > _LIMIT_BYTES:
        raise DamagedError("the disk's description is too long", place=place)
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError("the disk's description is not JSON", place=place) from error
    if not isinstance(body, dict) or "version" not in body:
        raise DamagedError("it is no description of a disk", place=place)
    if body["version"] != VERSION:
        raise UsageError(
            f"the disk's description is of version {str(body['version'])[:20]}, we read {VERSION}",
            place=place,
            hint="a newer calve made it",
        )
    return body


def _disk(body: dict[str, Any]) -> Disk:
    size = _number(body["size"], 1, _MAX_SIZE_BYTES)
    if body["blockSize"] != BLOCK_BYTES or size % BLOCK_BYTES:
        raise ValueError(f"blocks are of {BLOCK_BYTES} bytes")
    blocks = tuple(_blocks(body["blocks"], size // BLOCK_BYTES))
    partitions = tuple(_partition(one, size) for one in _list(body["partitions"], _MAX_PARTITIONS))
    changed, parent = body["changed"], body["parent"]
    if (changed is None) != (parent is None):
        raise ValueError("changed blocks and a parent go together")
    if changed is not None:
        changed = tuple(_list(changed, MAX_BLOCKS))
        parent = _digest(parent)
        listed = {block.index for block in blocks}
        if not all(type(one) is int and one in listed for one in changed):
            raise ValueError("a changed block is not listed")
        if list(changed) != sorted(set(changed)):
            raise ValueError("the changed blocks are not in order")
    return Disk(arch(_text(body["arch"])), size, partitions, blocks, parent, changed)


def _blocks(runs: Any, count: int) -> Iterator[Block]:
    following = total = 0
    for run in _list(runs, MAX_BLOCKS):
        index = _number(run["first"], following, count - 1)
        for digest in _list(run["sha256"], MAX_BLOCKS):
            total += 1
            if index >= count or total > MAX_BLOCKS:
                raise ValueError("there are more blocks than the disk has")
            yield Block(index, _digest(digest))
            index += 1
        following = index


def _partition(one: dict[str, Any], disk_bytes: int) -> Content:
    start = _number(one["start"], 0, disk_bytes)
    size = _number(one["size"], 0, disk_bytes - start)
    content = _number(one["content"], 0, size)
    if start % BLOCK_BYTES:
        raise ValueError("a partition does not begin with a block")
    return Content(_text(one["name"]), uuid.UUID(_text(one["type"])), start, size, content)


def _list(value: Any, limit: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        raise TypeError("a list is none, or too long")
    return value


def _number(value: Any, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"a number is not between {lowest} and {highest}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is none")
    return value


def _digest(value: Any) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError("a digest is none")
    return value
