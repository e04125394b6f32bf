"""EROFS: superblock, inodes and directories, uncompressed, on one device.

Data lies flat (all in blocks), inline (the tail behind its inode) or in chunks (an array of block addresses, or of
indexes, behind the inode). Source: Linux, Documentation/filesystems/erofs.rst and the facts of fs/erofs/erofs_fs.h.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from calve.disk.inspect.crc32c import crc32c
from calve.disk.inspect.findings import Check, FlawError, printable
from calve.disk.inspect.source import CHUNK_BYTES, Source
from calve.disk.inspect.tree import Kind, Node

__all__ = ["MAGIC", "SUPERBLOCK_AT", "Erofs", "Superblock"]

MAGIC = 0xE0F5E1E2
SUPERBLOCK_AT = 1024

_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
_HAS_CHECKSUM = 1
# Zero padding, chunks, long prefixes of attribute names: the rest is compression and other devices.
_KNOWN_INCOMPATIBLE = 0x1 | 0x4 | 0x40
_SLOT = 32  # nids count in these
_PLAIN, _INLINE, _CHUNKED = 0, 2, 4
_CHUNK_BITS, _CHUNK_INDEXES = 0x1F, 0x20
_HOLE = 0xFFFFFFFF
_DIRENT = struct.Struct("<QHBB")
_MAX_NAME = 255
_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
_KINDS = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}


@dataclass(frozen=True, slots=True)
class Superblock:
    """The facts of a file system.

    Attributes:
        block_size_bytes: 512 to 65536.
        root_nid: of the root directory.
        inodes: how many there are, by its own word.
        blocks: how long the image is, in blocks.
        meta_block: where nids count from.
        xattr_block: where shared attributes are.
        has_checksum: the superblock is checksummed; it was right.
        uuid: of the volume.
    """

    block_size_bytes: int
    root_nid: int
    inodes: int
    blocks: int
    meta_block: int
    xattr_block: int
    has_checksum: bool
    uuid: bytes

    @classmethod
    def read(cls, source: Source) -> Superblock:
        """Read and check it.

        Raises:
            DamagedError: it is none, is damaged, asks for what is not understood, or does not fit its source.
        """
        data = source.read(SUPERBLOCK_AT, _SUPERBLOCK.size)
        (
            magic, checksum, compatible, bits, _slots, root_nid, inodes, _time, _nsec, blocks, meta,
            xattrs, uuid, _name, incompatible, _algorithms, devices, _slot, directory_bits, *_,
        ) = _SUPERBLOCK.unpack(data)  # fmt: skip
        if magic != MAGIC:
            raise _flaw(Check.EROFS_DAMAGED, "no EROFS: the magic number is missing")
        if not 9 <= bits <= 16 or directory_bits:
            raise _flaw(Check.EROFS_DAMAGED, f"a block size of 2^{bits}, 2^{directory_bits} times")
        if incompatible & ~_KNOWN_INCOMPATIBLE or devices:
            message = f"features {incompatible:#x} and {devices} devices: not all are understood"
            raise _flaw(Check.EROFS_UNSUPPORTED, message)
        if compatible & _HAS_CHECKSUM:
            _check_checksum(source, 1 << bits, checksum)
        if blocks << bits > source.size:
            message = f"it has {blocks << bits} bytes, its place only {source.size}"
            raise _flaw(Check.EROFS_DAMAGED, message)
        return cls(
            block_size_bytes=1 << bits,
            root_nid=root_nid,
            inodes=inodes,
            blocks=blocks,
            meta_block=meta,
            xattr_block=xattrs,
            has_checksum=bool(compatible & _HAS_CHECKSUM),
            uuid=uuid,
        )


def _check_checksum(source: Source, block: int, checksum: int) -> None:
    """Check the CRC-32C from the superblock to the end of its block, the checksum itself being zero."""
    count = block - SUPERBLOCK_AT if block > SUPERBLOCK_AT else block
    data = bytearray(source.read(SUPERBLOCK_AT, count))
    data[4:8] = bytes(4)
    found = crc32c(bytes(data))
    if found != checksum:
        message = f"the checksum is {checksum:08x}, the bytes have {found:08x}"
        raise _flaw(Check.EROFS_CHECKSUM, message)


def _flaw(check: Check, message: str, place: str = "superblock") -> FlawError:
    return FlawError(check, message, place=place)


@dataclass(frozen=True, slots=True)
class _Inode:
    nid: int
    mode: int
    size: int
    layout: int
    behind: int  # the byte behind the inode and its attributes
    union: int  # a block's address, or how chunks are laid out


class Erofs:
    """An EROFS image, as a `Tree`.

    Raises:
        DamagedError: as `Superblock.read`.
    """

    format = "erofs"

    def __init__(self, source: Source) -> None:
        self.superblock = Superblock.read(source)
        self.block_size_bytes = self.superblock.block_size_bytes
        self.size_bytes = self.superblock.blocks * self.block_size_bytes
        self._source = source

    def root(self) -> Node:
        """Return the root directory; DamagedError where it is none."""
        nid = self.superblock.root_nid
        node = self._node(b"", self._inode(nid), nid)
        if node.kind is not Kind.DIRECTORY:
            raise _flaw(Check.EROFS_INODE_DAMAGED, "the root is no directory", f"nid {nid}")
        return node

    def entries(self, directory: Node) -> Iterator[Node]:
        """Yield what is in a directory, in the order of the image, which is checked."""
        inode = self._inode(directory.number)
        dots = {b".": directory.number, b"..": directory.parent}
        last = b""
        for at, block in self._directory_blocks(inode):
            for name, nid, kind in _dirents(block, f"nid {inode.nid}, byte {at}"):
                place = f"nid {inode.nid}, entry {printable(name)}"
                if name <= last:
                    message = f"it does not come after {printable(last)}"
                    raise _flaw(Check.EROFS_DIRENT_UNSORTED, message, place)
                last = name
                if name in dots:
                    wanted = dots.pop(name)
                    if nid != wanted or kind != _TYPES[stat.S_IFDIR]:
                        message = f"it is nid {nid} of type {kind}, not directory {wanted}"
                        raise _flaw(Check.EROFS_DOTS, message, place)
                    continue
                child = self._inode(nid)
                if _TYPES[stat.S_IFMT(child.mode)] != kind:
                    message = f"it is of type {kind}, nid {nid} has mode {child.mode:#o}"
                    raise _flaw(Check.EROFS_DIRENT_TYPE, message, place)
                yield self._node(name, child, inode.nid)
        if dots:
            missing = " and ".join(name.decode() for name in dots)
            raise _flaw(Check.EROFS_DOTS, f"{missing} is missing", f"nid {inode.nid}")

    def content(self, node: Node) -> Iterator[bytes]:
        """Yield a file's or symlink's bytes, at most 256 KiB at a time; holes are zeros."""
        inode = self._inode(node.number)
        for _, size, place in self._extents(inode):
            for at in range(0, size, CHUNK_BYTES):
                count = min(CHUNK_BYTES, size - at)
                yield bytes(count) if place is None else self._bytes(inode, place + at, count)

    def _node(self, name: bytes, inode: _Inode, parent: int) -> Node:
        kind = _KINDS.get(stat.S_IFMT(inode.mode), Kind.OTHER)
        executable = bool(inode.mode & stat.S_IXUSR)
        return Node(name, kind, inode.nid, parent, inode.size, executable)

    def _bytes(self, inode: _Inode, at: int, count: int) -> bytes:
        """Read a piece of a file's data, which must be in the image."""
        if at + count > self.size_bytes:
            message = f"{count} bytes of data at {at}: the image ends at {self.size_bytes}"
            raise _flaw(Check.EROFS_DATA_OUTSIDE, message, f"nid {inode.nid}")
        return self._source.read(at, count)

    def _inode(self, nid: int) -> _Inode:
        at = self.superblock.meta_block * self.block_size_bytes + nid * _SLOT
        place = f"nid {nid}"
        if at + _SLOT > self.size_bytes:
            raise _flaw(Check.EROFS_INODE_DAMAGED, f"the inode is at byte {at}, outside", place)
        data = self._source.read(at, _SLOT)
        form, attributes, mode = struct.unpack_from("<HHH", data)
        long = form & 1
        if form >> 4 or stat.S_IFMT(mode) not in _TYPES:
            message = f"format {form:#x}, mode {mode:#o}: no inode"
            raise _flaw(Check.EROFS_INODE_DAMAGED, message, place)
        size, union = struct.unpack_from("<Q" if long else "<I4x", data, 8)[0], data[16:20]
        behind = at + (2 * _SLOT if long else _SLOT) + (8 + 4 * attributes if attributes else 0)
        if behind > self.size_bytes:
            raise _flaw(Check.EROFS_INODE_DAMAGED, f"it goes on to byte {behind}", place)
        layout = form >> 1 & 7
        if layout not in {_PLAIN, _INLINE, _CHUNKED}:
            message = f"data layout {layout}: compressed data is not read"
            raise _flaw(Check.EROFS_UNSUPPORTED, message, place)
        return _Inode(nid, mode, size, layout, behind, int.from_bytes(union, "little"))

    def _extents(self, inode: _Inode) -> Iterator[tuple[int, int, int | None]]:
        """Yield where data is: the first byte in the file, how many, the first byte in the image (None: a hole)."""
        block = self.block_size_bytes
        if inode.layout == _CHUNKED:
            yield from self._chunks(inode)
            return
        whole = inode.size
        if inode.layout == _INLINE:
            whole = max(-(-inode.size // block) - 1, 0) * block
        if whole:
            yield 0, whole, inode.union * block
        tail = inode.size - whole
        if tail:
            if inode.behind % block + tail > block:
                message = f"{tail} bytes of inline data go beyond its block"
                raise _flaw(Check.EROFS_INODE_DAMAGED, message, f"nid {inode.nid}")
            yield whole, tail, inode.behind

    def _chunks(self, inode: _Inode) -> Iterator[tuple[int, int, int | None]]:
        place = f"nid {inode.nid}"
        if inode.union >> 6:
            raise _flaw(Check.EROFS_UNSUPPORTED, f"chunk format {inode.union:#x}", place)
        chunk = self.block_size_bytes << (inode.union & _CHUNK_BITS)
        unit = 8 if inode.union & _CHUNK_INDEXES else 4
        table = -(-inode.behind // unit) * unit
        count = -(-inode.size // chunk)
        for number in range(count):
            if number % 512 == 0:
                data = self._bytes(inode, table + number * unit, min(512, count - number) * unit)
            entry = data[number % 512 * unit :][:unit]
            if unit == 8 and int.from_bytes(entry[2:4], "little"):
                raise _flaw(Check.EROFS_UNSUPPORTED, "a chunk on another device", place)
            address = int.from_bytes(entry[-4:], "little")
            at = number * chunk
            where = None if address == _HOLE else address * self.block_size_bytes
            yield at, min(chunk, inode.size - at), where

    def _directory_blocks(self, inode: _Inode) -> Iterator[tuple[int, bytes]]:
        block = self.block_size_bytes
        for start, size, place in self._extents(inode):
            for at in range(0, size, block):
                if place is None:
                    message = f"a hole at byte {start + at} of a directory"
                    raise _flaw(Check.EROFS_DIRENT_DAMAGED, message, f"nid {inode.nid}")
                yield start + at, self._bytes(inode, place + at, min(block, size - at))


def _dirents(block: bytes, place: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, nid and type of each entry of a block: entries first, their names behind them."""
    if len(block) < _DIRENT.size:
        raise _flaw(Check.EROFS_DIRENT_DAMAGED, f"a block of {len(block)} bytes", place)
    names = _DIRENT.unpack_from(block)[1]
    if not 0 < names <= len(block) or names % _DIRENT.size:
        message = f"names begin at byte {names} of {len(block)}"
        raise _flaw(Check.EROFS_DIRENT_DAMAGED, message, place)
    entries = list(_DIRENT.iter_unpack(block[:names]))
    ends = [entry[1] for entry in entries[1:]]
    for (nid, start, kind, _), end in zip(entries, [*ends, len(block)], strict=True):
        if not names <= start < end <= len(block):
            message = f"a name from byte {start} to {end} of {len(block)}"
            raise _flaw(Check.EROFS_DIRENT_DAMAGED, message, place)
        # The last name ends with its block, or with a NUL.
        name = block[start:end].partition(b"\0")[0] if end == len(block) else block[start:end]
        if not 0 < len(name) <= _MAX_NAME or b"\0" in name or b"/" in name:
            message = f"{printable(name)} is no name"
            raise _flaw(Check.EROFS_DIRENT_DAMAGED, message, place)
        yield name, nid, kind
