"""Partitions put together to one raw disk, and every block of it known by its digest.

The disk is a sparse file. With a parent (the description of an earlier disk) it is an overlay of it: of parts that say
which blocks they changed, no other block is read, and of all that is read only what differs is written. So the work is
in the size of the change.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from calve.disk import gpt
from calve.disk.arch import Arch
from calve.disk.disk import BLOCK_BYTES, MAX_BLOCKS, ZERO_BLOCK, Block, Content, Disk, sidecar
from calve.disk.scratch import write_all
from calve.errors import CalveError, UsageError
from calve.tasks import Cancel, Group

__all__ = ["Part", "build"]

_ZEROS = bytes(BLOCK_BYTES)
_RUN_BLOCKS = 32  # that a thread takes at a time
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Part:
    """A partition to be.

    Attributes:
        name: its label.
        kind: what it is for.
        content: a file with its bytes from the first on; as long as the content is.
        room_bytes: of the partition, at least; what the content does not need stays free for later ones.
        fill: it takes what the disk has left; the last one only.
        dirty: blocks (of 512 KiB, from the partition's start) that differ from the parent's; only these are read, and
            `content` need have no others. None: all are read.
    """

    name: str
    kind: gpt.Kind
    content: Path
    room_bytes: int = 0
    fill: bool = False
    dirty: Collection[int] | None = None


def build(
    parts: Sequence[Part],
    out: Path,
    *,
    arch: Arch,
    seed: uuid.UUID,
    parent: Disk | None = None,
    cancel: Cancel | None = None,
) -> Disk:
    """Write a raw disk, and its description beside it (`disk.json` beside `disk.raw`).

    Args:
        parts: partitions, in their order.
        out: the disk; it must not exist.
        arch: the processor that it starts on.
        seed: all GUIDs of the partition table follow from it.
        parent: write an overlay of this disk.
        cancel: ends it.

    Raises:
        UsageError: `out` exists, a content does not, or is empty; see also `gpt.lay_out`. Or a part leaves blocks
            unread that the parent does not have.
    """
    if out.exists() or out == sidecar(out):
        raise UsageError("exists already" if out.exists() else "ends in .json", place=out)
    sizes = [_size(part) for part in parts]
    if sum(_blocks(size) for size in sizes) + 3 > MAX_BLOCKS:
        raise UsageError(f"a disk has at most {MAX_BLOCKS * BLOCK_BYTES >> 30} GiB of content")
    rooms = [
        gpt.Room(part.name, part.kind, max(size, part.room_bytes), part.fill)
        for part, size in zip(parts, sizes, strict=True)
    ]
    layout = gpt.lay_out(
        rooms, arch=arch, seed=seed, at_least_bytes=parent.size_bytes if parent else 0
    )
    contents = tuple(
        Content(one.name, one.type, one.start_bytes, one.size_bytes, size)
        for one, size in zip(layout.partitions, sizes, strict=True)
    )
    temporary = out.with_name(f".{out.name}.new")
    try:
        with _Writer(temporary, layout.size_bytes, parent) as writer:
            writer.table(layout)
            with Group("disk", limit=min(_THREADS, os.cpu_count() or 1), parent=cancel) as group:
                for part, content in zip(parts, contents, strict=True):
                    writer.part(part, content, group)
        disk = writer.disk(arch, contents)
        _put(sidecar(out), disk.dump())
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return disk


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _size(part: Part) -> int:
    try:
        size = part.content.stat().st_size
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", place=part.content) from error
    if not size:
        raise UsageError("is empty", place=part.content)
    return size


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(data)
    temporary.replace(path)


class _Writer:
    """The disk's file, and the digests of what was put into it."""

    def __init__(self, path: Path, size_bytes: int, parent: Disk | None) -> None:
        self._parent = parent
        self._known = {block.index: block.sha256 for block in parent.blocks} if parent else {}
        self._size_bytes = size_bytes
        self._digests: dict[int, str] = {}
        self._changed: set[int] = set()
        path.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._fd, size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def table(self, layout: gpt.Layout) -> None:
        """Put the partition table: the first MiB, which is its own, and the last block."""
        self._put(0, layout.head().ljust(BLOCK_BYTES, b"\0"))
        self._put(1, _ZEROS)
        self._put(self._size_bytes // BLOCK_BYTES - 1, layout.tail().rjust(BLOCK_BYTES, b"\0"))

    def part(self, part: Part, content: Content, group: Group) -> None:
        """Put a partition's content, run by run, in threads of the group."""
        first = content.start_bytes // BLOCK_BYTES
        count = _blocks(content.content_bytes)
        dirty = range(count) if part.dirty is None else self._keep(part, first, count)
        for run in _runs(dirty):
            group.spawn(self._copy, part.content, content, run, group.cancel)

    def _keep(self, part: Part, first: int, count: int) -> list[int]:
        """Take over the digests of blocks that the parent has; return those to be read."""
        dirty = frozenset(part.dirty or ())
        same = self._parent is not None and any(
            one.name == part.name and one.start_bytes == first * BLOCK_BYTES
            for one in self._parent.partitions
        )
        for number in sorted(set(range(count)) - dirty):
            index = first + number
            if not same or index not in self._known:
                raise UsageError(
                    f"the parent does not have block {number} of the partition {part.name}",
                    place=part.content,
                    hint="make the partition anew, and the disk without a parent",
                )
            self._digests[index] = self._known[index]
        return sorted(number for number in dirty if 0 <= number < count)

    def _copy(self, path: Path, content: Content, numbers: Sequence[int], cancel: Cancel) -> None:
        first = content.start_bytes // BLOCK_BYTES
        with path.open("rb", buffering=0) as file:
            for number in numbers:
                cancel.check()
                offset = number * BLOCK_BYTES
                wanted = min(BLOCK_BYTES, content.content_bytes - offset)
                data = _read(file.fileno(), wanted, offset)
                if len(data) < wanted:
                    raise CalveError("became shorter while it was read", place=path)
                self._put(first + number, data.ljust(BLOCK_BYTES, b"\0"))

    def _put(self, index: int, data: bytes) -> None:
        """Put a block; one that is as the parent has it, or all zeros, needs no place in the file."""
        zero = data == _ZEROS
        digest = ZERO_BLOCK if zero else hashlib.sha256(data).hexdigest()
        self._digests[index] = digest
        if self._known.get(index) == digest:
            return
        self._changed.add(index)
        if not zero:
            write_all(self._fd, data, index * BLOCK_BYTES)

    def disk(self, arch: Arch, partitions: tuple[Content, ...]) -> Disk:
        """Return the description of what was put."""
        blocks = tuple(Block(index, digest) for index, digest in sorted(self._digests.items()))
        if self._parent is None:
            return Disk(arch, self._size_bytes, partitions, blocks)
        changed = tuple(sorted(self._changed))
        return Disk(arch, self._size_bytes, partitions, blocks, self._parent.digest, changed)


def _runs(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for at in range(0, len(numbers), _RUN_BLOCKS):
        yield numbers[at : at + _RUN_BLOCKS]


def _read(fd: int, size: int, offset: int) -> bytes:
    data = os.pread(fd, size, offset)
    while len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
