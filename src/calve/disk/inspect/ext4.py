"""ext4 as a tree: extents, directories linear and hashed (read linearly), short and long symlinks.

Source: Linux, Documentation/filesystems/ext4 (ifork, directory, checksums).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator

from calve.disk.inspect.crc32c import crc32c
from calve.disk.inspect.ext4layout import EXTENTS, MAGIC, SUPERBLOCK_AT, Inode, Layout
from calve.disk.inspect.findings import Check, Findings, FlawError, printable
from calve.disk.inspect.source import CHUNK_BYTES, Source
from calve.disk.inspect.tree import Kind, Node

__all__ = ["MAGIC", "SUPERBLOCK_AT", "Ext4"]

_ROOT = 2
_HASHED = 0x1000
_REFUSED = 0x800 | 0x200000 | 0x10000000  # encrypted, an attribute's, data within the inode
_SHORT_TARGET = 60
_EXTENT_MAGIC = 0xF30A
_MAX_EXTENT_DEPTH = 5
_UNWRITTEN = 32768
_TAIL_BYTES, _TAIL_TYPE = 12, 0xDE
_MAX_DIRECTORY_BYTES = 256 << 20
_KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}
_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


class Ext4:
    """An ext4 file system, as a `Tree`.

    Args:
        source: where it is.
        findings: takes what is wrong and does not keep it from being read: a journal to be replayed.

    Raises:
        DamagedError: as `Layout.read`.
    """

    format = "ext4"

    def __init__(self, source: Source, findings: Findings) -> None:
        self.layout = Layout.read(source, findings)
        self.block_size_bytes = self.layout.block_size_bytes
        self.size_bytes = self.layout.size_bytes

    def root(self) -> Node:
        """Return the root directory; DamagedError where it is none."""
        node = self._node(b"", self.layout.inode(_ROOT), _ROOT)
        if node.kind is not Kind.DIRECTORY:
            raise _flaw(Check.EXT4_INODE_DAMAGED, "the root is no directory", _ROOT)
        return node

    def entries(self, directory: Node) -> Iterator[Node]:
        """Yield what is in a directory, sorted: the names of one directory are held in memory."""
        inode = self.layout.inode(directory.number)
        if inode.size > _MAX_DIRECTORY_BYTES:
            raise _flaw(Check.EXT4_INODE_DAMAGED, f"{inode.size} bytes of entries", inode.number)
        dots = {b".": directory.number, b"..": directory.parent}
        found: dict[bytes, tuple[int, int]] = {}
        for name, number, kind in self._dirents(inode):
            if name in dots:
                wanted = dots.pop(name)
                if number != wanted:
                    message = f"{name.decode()} is inode {number}, not {wanted}"
                    raise _flaw(Check.EXT4_DOTS, message, inode.number)
            elif name in found or name in {b".", b".."}:
                message = f"two entries {printable(name)}"
                raise _flaw(Check.EXT4_DIRENT_DAMAGED, message, inode.number)
            else:
                found[name] = number, kind
        if dots:
            missing = " and ".join(name.decode() for name in dots)
            raise _flaw(Check.EXT4_DOTS, f"{missing} is missing", inode.number)
        for name in sorted(found):
            number, kind = found[name]
            child = self.layout.inode(number)
            if kind != _TYPES.get(stat.S_IFMT(child.mode)):
                message = f"{printable(name)} is of type {kind}, inode {number} is {child.mode:#o}"
                raise _flaw(Check.EXT4_DIRENT_DAMAGED, message, inode.number)
            yield self._node(name, child, inode.number)

    def content(self, node: Node) -> Iterator[bytes]:
        """Yield a file's or symlink's bytes, at most 256 KiB at a time; holes are zeros."""
        inode = self.layout.inode(node.number)
        if node.kind is Kind.SYMLINK and inode.size < _SHORT_TARGET and not inode.flags & EXTENTS:
            yield inode.block[: inode.size]
            return
        block = self.block_size_bytes
        done = 0
        for logical, count, physical in self._extents(inode):
            yield from _zeros(min(logical * block, inode.size) - done)
            done = max(done, min(logical * block, inode.size))
            size = min(count * block, inode.size - done)
            if physical is not None:
                for at in range(0, size, CHUNK_BYTES):
                    start = physical * block + at
                    yield self.layout.source.read(start, min(CHUNK_BYTES, size - at))
                done += size
        yield from _zeros(inode.size - done)

    def _node(self, name: bytes, inode: Inode, parent: int) -> Node:
        kind = _KINDS.get(stat.S_IFMT(inode.mode), Kind.OTHER)
        if inode.flags & _REFUSED:
            message = f"flags {inode.flags:#x}: data that are not read"
            raise _flaw(Check.EXT4_UNSUPPORTED, message, inode.number)
        executable = bool(inode.mode & stat.S_IXUSR)
        return Node(name, kind, inode.number, parent, inode.size, executable)

    def _extents(self, inode: Inode) -> Iterator[tuple[int, int, int | None]]:
        """Yield first block in the file, how many, first block of the disk; None where nothing is written yet."""
        if not inode.flags & EXTENTS:
            if not inode.size:
                return
            raise _flaw(Check.EXT4_UNSUPPORTED, "blocks listed without extents", inode.number)
        end = 0
        for logical, count, physical in self._extent_node(inode, inode.block, None, 0):
            if logical < end:
                raise _flaw(Check.EXT4_EXTENT_DAMAGED, "extents out of order", inode.number)
            end = logical + count
            if physical is not None and not 0 < physical <= self.layout.blocks - count:
                message = f"blocks {physical} to {physical + count} of {self.layout.blocks}"
                raise _flaw(Check.EXT4_EXTENT_DAMAGED, message, inode.number)
            yield logical, count, physical

    def _extent_node(
        self, inode: Inode, data: bytes, depth: int | None, least: int
    ) -> Iterator[tuple[int, int, int | None]]:
        """Yield the extents of a node; `depth` and `least` are what the node above says of it."""
        magic, entries, most, own, _ = struct.unpack_from("<HHHHI", data)
        wrong_depth = own > _MAX_EXTENT_DEPTH if depth is None else own != depth
        wrong_count = entries > most or 12 + 12 * most > len(data)
        # A node below the root has entries: else hundreds of entries could lead to one node, over and over.
        if (
            magic != _EXTENT_MAGIC
            or wrong_depth
            or wrong_count
            or (depth is not None and not entries)
        ):
            message = f"a node of {entries} entries of {most}, depth {own}"
            raise _flaw(Check.EXT4_EXTENT_DAMAGED, message, inode.number)
        if depth is not None and self.layout.checksums:
            end = 12 + 12 * most
            _check_tail(data[:end], data[end : end + 4], inode, "a node of extents")
        for at in range(12, 12 + 12 * entries, 12):
            logical, length, high, low = struct.unpack_from("<IHHI", data, at)
            if logical < least:
                raise _flaw(Check.EXT4_EXTENT_DAMAGED, "nodes out of order", inode.number)
            if own:
                child = struct.unpack_from("<IIHH", data, at)
                block = self.layout.block(child[1] | child[2] << 32, f"inode {inode.number}")
                yield from self._extent_node(inode, block, own - 1, logical)
                least = logical + 1
                continue
            count = length - _UNWRITTEN if length > _UNWRITTEN else length
            if not count:
                raise _flaw(Check.EXT4_EXTENT_DAMAGED, "an empty extent", inode.number)
            yield logical, count, None if length > _UNWRITTEN else low | high << 32
            least = logical + count

    def _dirents(self, inode: Inode) -> Iterator[tuple[bytes, int, int]]:
        """Yield name, inode and type of every entry, block by block; an index block looks like an empty one."""
        block = self.block_size_bytes
        expected = 0
        for logical, count, physical in self._extents(inode):
            for number in range(count):
                if (logical + number) * block >= inode.size:
                    return
                if physical is None or logical + number != expected:
                    raise _flaw(Check.EXT4_DIRENT_DAMAGED, "a hole", inode.number)
                expected += 1
                data = self.layout.block(physical + number, f"inode {inode.number}")
                yield from self._dirent_block(inode, data)
        if expected * block < inode.size:
            raise _flaw(Check.EXT4_DIRENT_DAMAGED, "a hole at its end", inode.number)

    def _dirent_block(self, inode: Inode, data: bytes) -> Iterator[tuple[bytes, int, int]]:
        at = 0
        index = False
        while at < len(data):
            number, length, name_length, kind = struct.unpack_from("<IHBB", data, at)
            whole = 8 + name_length <= length <= len(data) - at
            left = len(data) - at - length
            if length % 4 or length < 8 or (number and not whole) or not (left == 0 or left >= 8):
                message = f"an entry of {length} bytes, a name of {name_length}, at byte {at}"
                raise _flaw(Check.EXT4_DIRENT_DAMAGED, message, inode.number)
            is_tail = not number and length == _TAIL_BYTES and kind == _TAIL_TYPE
            if is_tail and self.layout.checksums and at == len(data) - _TAIL_BYTES:
                _check_tail(data[:at], data[at + 8 :], inode, "a block of entries")
                return
            index = index or length == len(data) or (at == 12 and length == len(data) - 12)
            if number:
                yield data[at + 8 : at + 8 + name_length], number, kind
            at += length
        # The index blocks of a hashed directory have a checksum of another shape; what they say is not used.
        if self.layout.checksums and not (index and inode.flags & _HASHED):
            raise _flaw(Check.EXT4_CHECKSUM, "a block of entries without checksum", inode.number)


def _check_tail(data: bytes, said: bytes, inode: Inode, what: str) -> None:
    found = crc32c(data, inode.seed)
    if found.to_bytes(4, "little") != said:
        message = f"the checksum of {what} is not that of its bytes"
        raise _flaw(Check.EXT4_CHECKSUM, message, inode.number)


def _flaw(check: Check, message: str, number: int) -> FlawError:
    return FlawError(check, message, place=f"inode {number}")


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        size = min(CHUNK_BYTES, count)
        yield bytes(size)
        count -= size
