"""ext4's superblock, group descriptors and inodes, with their checksums.

Source: Linux, Documentation/filesystems/ext4 (super, group_descr, inodes, checksums).
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass

from calve.disk.inspect.crc32c import crc32c
from calve.disk.inspect.findings import Check, Findings, FlawError
from calve.disk.inspect.source import Source

__all__ = ["EXTENTS", "MAGIC", "SUPERBLOCK_AT", "Inode", "Layout"]

MAGIC = 0xEF53
SUPERBLOCK_AT = 1024
EXTENTS = 0x80000

_SUPERBLOCK_BYTES = 1024
_RECOVER, _WIDE, _CHECKSUM_SEED = 0x4, 0x80, 0x2000
# File types in directories, recovery, extents, 64 bits, multiple mounts, flexible groups, the seed, large directories.
_KNOWN_INCOMPATIBLE = 0x2 | _RECOVER | 0x40 | _WIDE | 0x100 | 0x200 | _CHECKSUM_SEED | 0x4000
_METADATA_CHECKSUMS = 0x400
_ERRORS, _VALID = 0x2, 0x1
_CRC32C = 1
_MAX_BLOCK_BITS = 15


@dataclass(frozen=True, slots=True)
class Inode:
    """What an inode says; `block` are the 60 bytes that hold an extent tree or a short target."""

    number: int
    mode: int
    size: int
    flags: int
    block: bytes
    seed: int  # of the checksums of what belongs to it


@dataclass(frozen=True, slots=True)
class Layout:
    """The facts of a file system, and where its inodes are.

    Attributes:
        block_size_bytes: 1024 to 32768.
        blocks: how long it is.
        inodes: how many there are room for.
        inodes_per_group: of them in each group.
        inode_bytes: how long an inode is.
        descriptors_at: the byte where the groups' descriptors begin.
        descriptor_bytes: how long one is.
        checksums: metadata have them.
        seed: what they begin with.
    """

    source: Source
    block_size_bytes: int
    blocks: int
    inodes: int
    inodes_per_group: int
    inode_bytes: int
    descriptors_at: int
    descriptor_bytes: int
    checksums: bool
    seed: int

    @property
    def size_bytes(self) -> int:
        """Return how long the file system is."""
        return self.blocks * self.block_size_bytes

    @classmethod
    def read(cls, source: Source, findings: Findings) -> Layout:
        """Read and check the superblock; a journal that must be replayed goes to `findings`.

        Raises:
            DamagedError: it is none, is damaged, asks for what is not understood, or does not fit its source.
        """
        data = source.read(SUPERBLOCK_AT, _SUPERBLOCK_BYTES)
        inodes, blocks, first, bits = struct.unpack_from("<II12xII", data)
        per_group_blocks, per_group, magic, state = struct.unpack_from("<I4xI12xHH", data, 32)
        inode_bytes, _, _, incompatible, read_only = struct.unpack_from("<HHIII", data, 88)
        if magic != MAGIC:
            raise _flaw(Check.EXT4_DAMAGED, "no ext4: the magic number is missing")
        if incompatible & ~_KNOWN_INCOMPATIBLE:
            message = f"features {incompatible:#x}: not all are understood"
            raise _flaw(Check.EXT4_UNSUPPORTED, message)
        checksums = bool(read_only & _METADATA_CHECKSUMS)
        _check_checksum(data, checksums=checksums)
        descriptor = 32
        if incompatible & _WIDE:
            descriptor = int.from_bytes(data[254:256], "little")
            blocks |= int.from_bytes(data[336:340], "little") << 32
        block = 1024 << min(bits, 64)
        sane = bits <= _MAX_BLOCK_BITS - 10 and descriptor in {32, 64} and per_group and inodes
        if not sane or inode_bytes not in {128, 256, 512, 1024} or not per_group_blocks:
            message = f"blocks of 2^{bits + 10} bytes, inodes of {inode_bytes}, {per_group} a group"
            raise _flaw(Check.EXT4_DAMAGED, message)
        if blocks * block > source.size:
            message = f"it has {blocks * block} bytes, its place only {source.size}"
            raise _flaw(Check.EXT4_DAMAGED, message)
        _check_state(state, incompatible, findings)
        seeded = incompatible & _CHECKSUM_SEED
        seed = int.from_bytes(data[624:628], "little") if seeded else crc32c(data[104:120])
        # With clusters (bigalloc) of 1 KiB blocks the first block is 0, the superblock nevertheless in block 1.
        at = (max(first, SUPERBLOCK_AT // block) + 1) * block
        return cls(
            source, block, blocks, inodes, per_group, inode_bytes, at, descriptor, checksums, seed
        )

    def inode(self, number: int) -> Inode:
        """Read an inode; DamagedError where there is none, or its checksum is not right."""
        place = f"inode {number}"
        if not 1 <= number <= self.inodes:
            message = f"there are {self.inodes} inodes"
            raise FlawError(Check.EXT4_INODE_DAMAGED, message, place=place)
        group, index = divmod(number - 1, self.inodes_per_group)
        at = self._table(group) * self.block_size_bytes + index * self.inode_bytes
        if at + self.inode_bytes > self.size_bytes:
            message = f"it would be at byte {at}, outside"
            raise FlawError(Check.EXT4_INODE_DAMAGED, message, place=place)
        data = self.source.read(at, self.inode_bytes)
        mode, low = struct.unpack_from("<HxxI", data)
        flags, generation, high = (
            *struct.unpack_from("<I", data, 32),
            *struct.unpack_from("<I4xI", data, 100),
        )
        seed = crc32c(struct.pack("<II", number, generation), self.seed) if self.checksums else 0
        if self.checksums:
            _check_inode(data, seed, place)
        large = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        return Inode(number, mode, low | high << 32 if large else low, flags, data[40:100], seed)

    def block(self, number: int, place: str) -> bytes:
        """Read a block; DamagedError where it is outside."""
        if not 0 < number < self.blocks:
            message = f"block {number}: there are {self.blocks}"
            raise FlawError(Check.EXT4_EXTENT_DAMAGED, message, place=place)
        return self.source.read(number * self.block_size_bytes, self.block_size_bytes)

    def _table(self, group: int) -> int:
        """Return the block where the inodes of a group begin."""
        place = f"group {group}"
        at = self.descriptors_at + group * self.descriptor_bytes
        data = self.source.read(at, self.descriptor_bytes)
        if self.checksums:
            said = int.from_bytes(data[30:32], "little")
            blank = data[:30] + bytes(2) + data[32:]
            found = crc32c(blank, crc32c(group.to_bytes(4, "little"), self.seed)) & 0xFFFF
            _compare(said, found, place)
        table = int.from_bytes(data[8:12], "little")
        if self.descriptor_bytes == 64:
            table |= int.from_bytes(data[40:44], "little") << 32
        if not 0 < table < self.blocks:
            message = f"its inodes begin at block {table} of {self.blocks}"
            raise FlawError(Check.EXT4_DAMAGED, message, place=place)
        return table


def _flaw(check: Check, message: str) -> FlawError:
    return FlawError(check, message, place="superblock")


def _compare(said: int, found: int, place: str) -> None:
    if said != found:
        message = f"the checksum is {said:x}, the bytes have {found:x}"
        raise FlawError(Check.EXT4_CHECKSUM, message, place=place)


def _check_checksum(data: bytes, *, checksums: bool) -> None:
    if not checksums:
        return
    if data[373] != _CRC32C:
        raise _flaw(Check.EXT4_UNSUPPORTED, f"checksums of type {data[373]}")
    _compare(int.from_bytes(data[1020:], "little"), crc32c(data[:1020]), "superblock")


def _check_state(state: int, incompatible: int, findings: Findings) -> None:
    if incompatible & _RECOVER:
        message = "its journal must be replayed: it was written to and not unmounted"
        findings.add(Check.EXT4_RECOVERY, "superblock", message)
    if state & _ERRORS or not state & _VALID:
        findings.add(Check.EXT4_NOT_CLEAN, "superblock", f"its state is {state:#x}, not clean")


def _check_inode(data: bytes, seed: int, place: str) -> None:
    """Check an inode's CRC-32C: its halves are zero while it is computed; small inodes have only the lower."""
    wide = len(data) > 128 and int.from_bytes(data[128:130], "little") >= 4
    said = int.from_bytes(data[124:126], "little")
    blank = bytearray(data)
    blank[124:126] = bytes(2)
    if wide:
        said |= int.from_bytes(data[130:132], "little") << 16
        blank[130:132] = bytes(2)
    found = crc32c(bytes(blank), seed)
    _compare(said, found if wide else found & 0xFFFF, place)
