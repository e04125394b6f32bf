"""A meta object: a tree's inodes, short contents, symlinks and directories in one run of blocks.

It is built before anyone knows where it will lie: a `Template` is the object as if it lay at block 0, with lists of
what depends on its own address and on those of its data. Inodes are packed into blocks tightly, each with what stands
behind it; then come the directories' blocks. The same nodes give the same bytes.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import TypeAlias

from calve.disk.erofsformat import (
    ADDRESS_AT,
    BLOCK_BYTES,
    DIRECTORY,
    DIRENT_BYTES,
    NUMBER,
    SLOT_BYTES,
    SLOTS,
    directory_runs,
    dirent_block,
    inode,
    inode_bytes,
    kind_of,
)
from calve.disk.scratch import Scratch
from calve.errors import DamagedError

__all__ = ["Node", "Tails", "Template", "build"]

_WINDOW_BYTES = 1 << 20
_U32 = Struct("<I")
_Entry: TypeAlias = tuple[bytes, int, int, bool]
"""A name, its inode, its type; whether the inode is one of our nodes, or a number that is known."""


class Tails:
    """The inline parts of a tree's contents; what is more than 1 MiB lies in the scratch file."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._places: list[int] = []
        self._last = bytearray()

    def add(self, data: bytes) -> int:
        """Keep some bytes, at most a block; return where."""
        if len(self._last) + len(data) > _WINDOW_BYTES:
            self._places.append(self._scratch.reserve(_WINDOW_BYTES))
            self._scratch.write(self._last, self._places[-1])
            self._last.clear()
        at = len(self._places) * _WINDOW_BYTES + len(self._last)
        self._last += data
        return at

    def read(self, at: int, size: int) -> bytes:
        """Return what was kept there."""
        number, offset = divmod(at, _WINDOW_BYTES)
        if number < len(self._places):
            return self._scratch.read(self._places[number] + offset, size)
        return bytes(self._last[offset : offset + size])


@dataclass(slots=True)
class Node:
    """A file, directory or symlink.

    Attributes:
        name: in its directory; empty for a tree's root.
        mode: type and permissions.
        parent: the index of its directory; of the root its own, or -1 where that lies outside.
        size: of its content, bytes; of a directory's it is found out.
        data: the SHA-256 of the content's blocks, of the tail's, padded, too where it is not inline; None without.
        tail_at: where the inline part of its content lies among the tree's tails.
        tail_bytes: how long that is.
        children: of a directory, their indices.
        outside: of a directory, entries that lie elsewhere: name, the inode's number, type.
    """

    name: bytes
    mode: int
    parent: int
    size: int = 0
    data: bytes | None = None
    tail_at: int = 0
    tail_bytes: int = 0
    children: list[int] | None = None
    outside: Sequence[tuple[bytes, int, int]] = ()


@dataclass(frozen=True, slots=True)
class Template:
    """A meta object without an address, its bytes in a scratch file.

    Attributes:
        at: where they lie.
        size_blocks: how many there are.
        root: where the root's inode stands, in slots.
        inodes: how many inodes it has.
        contents: the data that it refers to, by SHA-256, in the order of its files, each once.
        data: the same in the order of `references`; what several files have stands there as often.
        numbers: where the inodes' numbers stand that count from its own begin.
        addresses: likewise, addresses of its own blocks.
        references: likewise, where the address of each of `data` stands.
    """

    at: int
    size_blocks: int
    root: int
    inodes: int
    contents: Sequence[bytes]
    data: Sequence[bytes]
    numbers: array[int]
    addresses: array[int]
    references: array[int]

    def place(
        self,
        scratch: Scratch,
        base: int,
        where: Mapping[bytes, int],
        write: Callable[[bytearray, int], None],
    ) -> None:
        """Write the object for its address.

        Args:
            scratch: has the template.
            base: the address, in blocks.
            where: the addresses of data, in blocks.
            write: takes bytes, and their offset from the object's begin.
        """
        end = self.size_blocks * BLOCK_BYTES
        for start in range(0, end, _WINDOW_BYTES):
            size = min(_WINDOW_BYTES, end - start)
            window = bytearray(scratch.read(self.at + start, size))
            for at in _between(self.numbers, start, start + size):
                (number,) = NUMBER.unpack_from(window, at - start)
                NUMBER.pack_into(window, at - start, number + base * SLOTS)
            for at in _between(self.addresses, start, start + size):
                (address,) = _U32.unpack_from(window, at - start)
                _U32.pack_into(window, at - start, address + base)
            first = bisect.bisect_left(self.references, start)
            for index, at in enumerate(_between(self.references, start, start + size), first):
                _U32.pack_into(window, at - start, where[self.data[index]])
            write(window, start)


def _between(offsets: array[int], start: int, end: int) -> array[int]:
    return offsets[bisect.bisect_left(offsets, start) : bisect.bisect_left(offsets, end)]


def build(
    nodes: Sequence[Node], tails: Tails, scratch: Scratch, *, outside: int = 0, root: int = 0
) -> Template:
    """Build a meta object; the first node's inode stands at its very begin.

    Args:
        nodes: of a tree, each directory's children among them; sizes and tails of directories are filled in.
        tails: has their tails.
        scratch: takes the template.
        outside: the number of the inode that is the parent of a node whose parent is -1.
        root: the index of the tree's root.

    Raises:
        DamagedError: a directory has a name twice.
        SpaceError, CalveError: the scratch file cannot be written to.
    """
    return _Builder(nodes, tails, outside).build(scratch, root)


class _Builder:
    """The object under way: where each inode stands, and what depends on addresses."""

    def __init__(self, nodes: Sequence[Node], tails: Tails, outside: int) -> None:
        self.nodes = nodes
        self.tails = tails
        self.outside = outside
        self.links = [1] * len(nodes)
        self.entries: dict[int, list[_Entry]] = {}  # of each directory
        self.runs: dict[int, list[tuple[int, int, int]]] = {}
        self.own_blocks: dict[
            int, int
        ] = {}  # of directories that have some, the first one's address
        self.slots = [0] * len(nodes)  # where each inode stands
        self.numbers = array("Q")
        self.addresses = array("Q")
        self.references = array("Q")
        self.data: list[bytes] = []

    def build(self, scratch: Scratch, root: int) -> Template:
        for index, node in enumerate(self.nodes):
            if node.children is not None:
                self._measure(index, node, node.children)
        rows = self._pack(root)
        size_blocks = len(rows)
        for index in self.runs:
            count = len(self.runs[index]) - bool(self.nodes[index].tail_bytes)
            if count:
                self.own_blocks[index] = size_blocks
                size_blocks += count
        at = scratch.reserve(size_blocks * BLOCK_BYTES)
        self._write(scratch, at, rows)
        return Template(
            at,
            size_blocks,
            self.slots[root],
            len(self.nodes),
            list(dict.fromkeys(node.data for node in self.nodes if node.data is not None)),
            self.data,
            self.numbers,
            self.addresses,
            self.references,
        )

    def _measure(self, index: int, node: Node, children: Sequence[int]) -> None:
        """Find out a directory's entries, its size and how it is divided into blocks."""
        parent = (self.outside, False) if node.parent < 0 else (node.parent, True)
        entries: list[_Entry] = [
            (b".", index, DIRECTORY, True),
            (b"..", parent[0], DIRECTORY, parent[1]),
        ]
        entries.extend(
            (self.nodes[child].name, child, kind_of(self.nodes[child].mode), True)
            for child in children
        )
        entries.extend((*entry, False) for entry in node.outside)
        entries.sort()
        names = [entry[0] for entry in entries]
        if len(set(names)) != len(names):
            raise DamagedError(f"a directory with a name twice, {node.name[:100]!r}")
        self.entries[index] = entries
        self.links[index] = sum(entry[2] == DIRECTORY for entry in entries)
        runs = self.runs[index] = list(directory_runs(names))
        last = runs[-1][2]
        node.size = (len(runs) - 1) * BLOCK_BYTES + last
        room = BLOCK_BYTES - inode_bytes(node.size, self.links[index])
        node.tail_bytes = last if last <= room else 0

    def _pack(self, root: int) -> list[list[int]]:
        """Say which inodes stand in each block: the first node, the root, the largest, each where it fits tightest."""
        wanted = [
            -(-(inode_bytes(node.size, links) + node.tail_bytes) // SLOT_BYTES)
            for node, links in zip(self.nodes, self.links, strict=True)
        ]
        rows: list[list[int]] = []
        rooms: list[list[int]] = [
            [] for _ in range(SLOTS + 1)
        ]  # the blocks by what is free in them
        some = 0  # a bit for each of `rooms` that is not empty
        by_size = sorted(range(len(wanted)), key=lambda index: -wanted[index])
        for index in dict.fromkeys((0, root, *by_size)):
            slots = wanted[index]
            fitting = some >> slots << slots
            if fitting:
                free = (fitting & -fitting).bit_length() - 1
                row = rooms[free].pop()
                if not rooms[free]:
                    some ^= 1 << free
            else:
                free, row = SLOTS, len(rows)
                rows.append([])
            self.slots[index] = row * SLOTS + SLOTS - free
            rows[row].append(index)
            rooms[free - slots].append(row)
            some |= 1 << free - slots
        return rows

    def _write(self, scratch: Scratch, at: int, rows: Sequence[Sequence[int]]) -> None:
        """Write the template, a window at a time."""
        window: list[bytes] = []
        for block in self._blocks(rows):
            window.append(block)
            if len(window) * BLOCK_BYTES == _WINDOW_BYTES:
                scratch.write(b"".join(window), at)
                at += _WINDOW_BYTES
                window.clear()
        scratch.write(b"".join(window), at)

    def _blocks(self, rows: Sequence[Sequence[int]]) -> Iterator[bytes]:
        for row in rows:
            pieces = [piece for index in row for piece in self._inode(index)]
            yield b"".join(pieces).ljust(BLOCK_BYTES, b"\0")
        for index, first in self.own_blocks.items():
            runs = self.runs[index]
            count = len(runs) - bool(self.nodes[index].tail_bytes)
            for block, run in enumerate(runs[:count], first):
                yield self._entries(index, run, block * BLOCK_BYTES).ljust(BLOCK_BYTES, b"\0")

    def _inode(self, index: int) -> Iterator[bytes]:
        """Yield an inode and what stands behind it, padded to whole slots."""
        node = self.nodes[index]
        at = self.slots[index] * SLOT_BYTES
        head = inode(
            node.mode,
            node.size,
            self.links[index],
            inline=bool(node.tail_bytes),
            number=self.slots[index] & 0xFFFFFFFF,
        )
        if node.data is not None:
            self.references.append(at + ADDRESS_AT)
            self.data.append(node.data)
        elif index in self.own_blocks:
            self.addresses.append(at + ADDRESS_AT)
            address = _U32.pack(self.own_blocks[index])
            head = head[:ADDRESS_AT] + address + head[ADDRESS_AT + _U32.size :]
        yield head
        if node.tail_bytes:
            if node.children is None:
                yield self.tails.read(node.tail_at, node.tail_bytes)
            else:
                yield self._entries(index, self.runs[index][-1], at + len(head))
            yield bytes(-(len(head) + node.tail_bytes) % SLOT_BYTES)

    def _entries(self, index: int, run: tuple[int, int, int], at: int) -> bytes:
        """Return a directory's block, which will stand at `at`."""
        made: list[tuple[bytes, int, int]] = []
        for name, inode_of, kind, ours in self.entries[index][run[0] : run[1]]:
            if ours:
                self.numbers.append(at + DIRENT_BYTES * len(made))
            made.append((name, self.slots[inode_of] if ours else inode_of, kind))
        return dirent_block(made)
