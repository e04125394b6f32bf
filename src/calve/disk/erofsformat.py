"""EROFS as it lies on the disk: superblock, inodes, directory blocks; uncompressed, in blocks of 4 KiB.

An inode's number is where it lies, in slots of 32 bytes; metadata may lie anywhere between data. A file's content is
one run of whole blocks; what is left over may stand right behind its inode, in the inode's block ("inline").
Every structure here is one that Linux 5.4 reads; all integers are little-endian.
Source: the kernel's fs/erofs/erofs_fs.h; https://erofs.docs.kernel.org, "Core on-disk format".
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from struct import Struct

__all__ = [
    "ADDRESS_AT",
    "BLOCK_BYTES",
    "DIRECTORY",
    "DIRENT_BYTES",
    "NUMBER",
    "REGULAR",
    "SLOTS",
    "SLOT_BYTES",
    "SYMLINK",
    "directory_runs",
    "dirent_block",
    "inode",
    "inode_bytes",
    "kind_of",
    "superblock",
]

BLOCK_BYTES = 4096
SLOT_BYTES = 32
SLOTS = BLOCK_BYTES // SLOT_BYTES
ADDRESS_AT = 16  # of the first block's address in either form of inode, a u32
REGULAR, DIRECTORY, SYMLINK = 1, 2, 7  # a directory entry's type
NUMBER = Struct("<Q")  # of an inode, in a directory entry

_SUPERBLOCK_AT = 1024
_MAGIC = 0xE0F5E1E2
_CHECKSUM = 1  # a compatible feature
_EPOCH = 1
_SUPER = Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_COMPACT = Struct("<HHHHIIIIHHI")
_EXTENDED = Struct("<HHHHQIIIIQII16x")
_DIRENT = Struct("<QHBB")
DIRENT_BYTES = _DIRENT.size
_PLAIN, _INLINE = 0, 2
_COMPACT_LIMIT = 1 << 32
_LINKS_LIMIT = 1 << 16
_CASTAGNOLI = 0x82F63B78


def _table() -> tuple[int, ...]:
    entries = []
    for entry in range(256):
        value = entry
        for _ in range(8):
            value = value >> 1 ^ (_CASTAGNOLI if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


_CRC = _table()


def _crc32c(data: bytes) -> int:
    """Return the CRC-32C that begins with all ones and is not inverted in the end, as the kernel computes it."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC[(value ^ byte) & 0xFF]
    return value


def superblock(*, root: int, inodes: int, size_blocks: int, uuid: bytes) -> bytes:
    """Return the first block.

    Args:
        root: the number of the root directory's inode; less than 65,536.
        inodes: how many there are.
        size_blocks: of the whole image.
        uuid: 16 bytes.
    """

    def pack(checksum: int) -> bytes:
        made = _SUPER.pack(
            *(_MAGIC, checksum, _CHECKSUM, BLOCK_BYTES.bit_length() - 1, 0, root),
            *(inodes, _EPOCH, 0, size_blocks, 0, 0, uuid, b""),
            *(0, 0, 0, 0, 0, 0, 0, 0),
        )
        return made.ljust(BLOCK_BYTES - _SUPERBLOCK_AT, b"\0")

    return bytes(_SUPERBLOCK_AT) + pack(_crc32c(pack(0)))


def inode_bytes(size: int, links: int) -> int:
    """Return how long an inode is: 32 bytes, or 64 where size or links want it."""
    fits = size < _COMPACT_LIMIT and links < _LINKS_LIMIT
    return _COMPACT.size if fits else _EXTENDED.size


def inode(mode: int, size: int, links: int, *, inline: bool, number: int) -> bytes:
    """Return an inode of root's, of 1 s after the epoch; its first block's address is left 0.

    Args:
        mode: type and permissions.
        size: bytes.
        links: to it.
        inline: the last block, not full, stands behind it.
        number: one that tells it from others, for programs that know numbers of 32 bits only.
    """
    layout = (_INLINE if inline else _PLAIN) << 1
    if inode_bytes(size, links) == _COMPACT.size:
        return _COMPACT.pack(layout, 0, mode, links, size, 0, 0, number, 0, 0, 0)
    return _EXTENDED.pack(layout | 1, 0, mode, 0, size, 0, number, 0, 0, _EPOCH, 0, links)


def directory_runs(names: Sequence[bytes]) -> Iterator[tuple[int, int, int]]:
    """Divide a directory's names into blocks: yield where each begins and ends, and how many bytes it has.

    Args:
        names: all of them, `.` and `..` too, in bytewise order.
    """
    start = used = 0
    for at, name in enumerate(names):
        size = _DIRENT.size + len(name)
        if used + size > BLOCK_BYTES:
            yield start, at, used
            start, used = at, 0
        used += size
    yield start, len(names), used


def dirent_block(entries: Sequence[tuple[bytes, int, int]]) -> bytes:
    """Return one directory block, not padded: 12 bytes for each entry, then the names.

    Args:
        entries: name, the inode's number, type.
    """
    offset = _DIRENT.size * len(entries)
    heads = []
    for name, number, kind in entries:
        heads.append(_DIRENT.pack(number, offset, kind, 0))
        offset += len(name)
    heads.extend(name for name, _, _ in entries)
    return b"".join(heads)


def kind_of(mode: int) -> int:
    """Return the directory entry's type for a mode."""
    if stat.S_ISDIR(mode):
        return DIRECTORY
    return SYMLINK if stat.S_ISLNK(mode) else REGULAR
