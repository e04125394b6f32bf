"""The root file system grows to the end of its disk while it is mounted: its partition first, then ext4.

Where both fill the disk already, that costs reads of sysfs and of the superblock, and no write. A cut leaves the old
size, the new one or one between, and the next call goes on from there: the table by the order of its writes
(`boot.gpt`), ext4 group by group through its journal. What new groups need to be zero, ext4 writes later, beside
whatever runs then.

Sources: Linux, Documentation/filesystems/ext4/super.rst; ext4_resize_fs in fs/ext4/resize.c.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from calve.boot import gpt
from calve.boot.device import LINUX, Device, Linux, Partition
from calve.errors import CalveError, DamagedError

__all__ = ["FileSystem", "Grown", "grow"]

_SUPERBLOCK_OFFSET: Final = 1024
_SUPERBLOCK_BYTES: Final = 1024
_MAGIC: Final = 0xEF53
_INCOMPAT_64BIT: Final = 0x80
_SPARE_BLOCKS: Final = 4
_MOST: Final = (1 << 32) - 1
_MOST_LOG_BLOCK: Final = 6


@dataclass(frozen=True, slots=True)
class Grown:
    """The size of a file system before and after, in bytes: all of its blocks, what it needs itself included."""

    before_bytes: int
    after_bytes: int


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What a superblock of ext4 says of sizes."""

    block_bytes: int
    blocks: int
    first_block: int
    blocks_per_group: int
    inodes_per_group: int
    inode_bytes: int
    reserved_gdt_blocks: int
    descriptor_bytes: int
    is_64bit: bool

    @classmethod
    def parse(cls, data: bytes, place: object = None) -> Self:
        """Read a superblock.

        Raises:
            DamagedError: it is none.
        """

        def number(offset: int, size: int) -> int:
            return int.from_bytes(data[offset : offset + size], "little")

        is_64bit = bool(number(96, 4) & _INCOMPAT_64BIT)
        found = cls(
            block_bytes=1024 << min(number(24, 4), _MOST_LOG_BLOCK),
            blocks=number(4, 4) | (number(336, 4) << 32 if is_64bit else 0),
            first_block=number(20, 4),
            blocks_per_group=number(32, 4),
            inodes_per_group=number(40, 4),
            inode_bytes=number(88, 2),
            reserved_gdt_blocks=number(206, 2),
            descriptor_bytes=number(254, 2) if is_64bit else 32,
            is_64bit=is_64bit,
        )
        whole = len(data) == _SUPERBLOCK_BYTES and number(56, 2) == _MAGIC
        if not (whole and found.blocks and found.blocks_per_group and found.inodes_per_group):
            raise DamagedError("no superblock of ext4", place=place)
        return found

    @property
    def size_bytes(self) -> int:
        """Return the size of all blocks."""
        return self.blocks * self.block_bytes

    def grown(self, device_bytes: int) -> int | None:
        """Return how many blocks it should have on a device; None where it gains less than `gpt.GAIN_BYTES`.

        A last group with hardly more blocks than it needs itself is left out. Linux does so too, and would be asked
        for it at every boot, in vain. Nor does it number more inodes than 32 bits do.
        """
        blocks = device_bytes // self.block_bytes
        if not self.is_64bit:
            blocks = min(blocks, _MOST)
        groups, rest = divmod(blocks - self.first_block, self.blocks_per_group)
        most_groups = _MOST // self.inodes_per_group
        if groups >= most_groups:
            groups, rest = most_groups, 0
        if rest <= self._overhead_blocks(groups + 1):
            rest = 0
        blocks = self.first_block + groups * self.blocks_per_group + rest
        gain_bytes = (blocks - self.blocks) * self.block_bytes
        return blocks if gain_bytes >= gpt.GAIN_BYTES else None

    def _overhead_blocks(self, groups: int) -> int:
        """Return the most that a group needs itself: superblock, descriptors, bitmaps, inodes."""
        descriptors = -(-groups * self.descriptor_bytes // self.block_bytes)
        inodes = -(-self.inodes_per_group * self.inode_bytes // self.block_bytes)
        return descriptors + self.reserved_gdt_blocks + inodes + _SPARE_BLOCKS


def grow(root: Path, linux: Linux = LINUX) -> Grown | None:
    """Let the ext4 that is mounted at `root` fill its disk.

    The partition it is on grows where it is the last one of a GPT disk.

    Returns:
        None where there was nothing to do: it fills its device, something comes after it on the disk, or no ext4 is
        mounted there.

    Raises:
        DamagedError: the table of the disk is not in order, and nothing was written; or the superblock is not.
        CalveError: the kernel refuses, or the table has no room to be rewritten.
        OSError: a device cannot be read or written.
    """
    number = linux.mounted(root)
    if number is None:
        return None
    device = linux.device(number)
    size_bytes = device.size_bytes
    if device.partition is not None:
        size_bytes = _grow_partition(linux, device.partition, size_bytes)
    before = _file_system(linux, device)
    blocks = before.grown(size_bytes)
    if blocks is None:
        return None
    try:
        linux.resize_file_system(root, blocks)
    except OSError as error:
        raise _refused("file system", device, error) from error
    after = _file_system(linux, device)
    return None if after == before else Grown(before.size_bytes, after.size_bytes)


def _grow_partition(linux: Linux, partition: Partition, size_bytes: int) -> int:
    """Let a partition grow; return its size afterwards."""
    disk, sector_bytes = partition.disk, partition.sector_bytes
    if disk.size_bytes - partition.start_bytes - size_bytes < gpt.GAIN_BYTES:
        return size_bytes
    place = f"/dev/{disk.name}"
    with linux.open(disk) as disk_fd:
        table = gpt.Table.read(
            lambda offset, size: os.pread(disk_fd, size, offset), sector_bytes, place
        )
    entry = table.entry(partition.number, place)
    if entry.first_lba * sector_bytes != partition.start_bytes:
        raise DamagedError(f"the GPT has partition {entry.number} elsewhere", place=place)
    plan = gpt.plan(table, entry.number, disk.size_bytes, place)
    if plan is not None:
        _rewrite(linux, disk, plan)
    # Without a plan, too, the table may say more than the kernel was told.
    last_lba = entry.last_lba if plan is None else plan.last_lba
    new_bytes = (last_lba + 1 - entry.first_lba) * sector_bytes
    if new_bytes <= size_bytes:
        return size_bytes
    with linux.open(disk) as disk_fd:
        try:
            linux.resize_partition(disk_fd, partition, new_bytes)
        except OSError as error:
            raise _refused("partition", disk, error) from error
    return new_bytes


def _rewrite(linux: Linux, disk: Device, plan: gpt.Plan) -> None:
    with linux.open(disk, write=True) as disk_fd:
        for step in plan.steps:
            for write in step:
                if os.pwrite(disk_fd, write.data, write.offset_bytes) != len(write.data):
                    raise CalveError("the GPT could not be written", place=f"/dev/{disk.name}")
            os.fsync(disk_fd)


def _file_system(linux: Linux, device: Device) -> FileSystem:
    """Read the superblock, by the page cache: what ext4 has changed of it is there."""
    with linux.open(device) as device_fd:
        data = os.pread(device_fd, _SUPERBLOCK_BYTES, _SUPERBLOCK_OFFSET)
    return FileSystem.parse(data, f"/dev/{device.name}")


def _refused(what: str, device: Device, error: OSError) -> CalveError:
    return CalveError(
        f"the kernel does not let the {what} grow: {error.strerror}", place=f"/dev/{device.name}"
    )
