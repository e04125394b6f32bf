"""Block devices: which one a mounted ext4 is on, what sysfs says of it, and what the kernel is told of new sizes.

Names mean nothing here (vda2, xvda2, nvme0n1p2): a device is its number, and sysfs tells the rest.

Sources: proc(5) (mountinfo); Linux: Documentation/ABI/stable/sysfs-block, include/uapi/linux/blkpg.h,
include/uapi/linux/ext4.h.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calve.errors import CalveError, DamagedError

__all__ = ["LINUX", "Device", "Linux", "Partition"]

_EXT4_IOC_RESIZE_FS: Final = 0x40086610  # _IOW('f', 16, __u64)
_BLKPG: Final = 0x1269  # _IO(0x12, 105)
_BLKPG_RESIZE_PARTITION: Final = 3
_BLKPG_ARGUMENT: Final = struct.Struct("@iiiP")  # operation, flags, length of the data, the data
_BLKPG_PARTITION: Final = struct.Struct("@qqi64s64s0q")  # start, length: bytes; number; two names

_SYSFS_SECTOR_BYTES: Final = 512  # whatever the disk's own is


@dataclass(frozen=True, slots=True)
class Device:
    """A block device.

    Attributes:
        number: "major:minor".
        name: in /dev.
        size_bytes: of it.
        partition: where it is a partition: which.
    """

    number: str
    name: str
    size_bytes: int
    partition: Partition | None = None


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition's place: its number from 1, its first byte, its disk and the disk's logical sector."""

    number: int
    start_bytes: int
    disk: Device
    sector_bytes: int


class Linux:
    """The kernel.

    Args:
        base: where /proc, /sys and /dev are.
    """

    def __init__(self, base: Path = Path("/")) -> None:
        self._base = base

    def mounted(self, root: Path) -> str | None:
        """Return the number of the device whose ext4 is mounted at `root`; None where no ext4 is."""
        place = os.path.realpath(root)
        found = None
        for line in os.fsdecode((self._base / "proc/self/mountinfo").read_bytes()).splitlines():
            before, _, after = line.partition(" - ")
            fields = before.split(" ")
            if len(fields) > 4 and _unescape(fields[4]) == place:  # the last one covers the others
                found = fields[2] if after.startswith("ext4 ") else None
        return found

    def device(self, number: str) -> Device:
        """Look a block device up in sysfs.

        Raises:
            DamagedError: sysfs does not say what it should.
            OSError: there is no such device.
        """
        folder = (self._base / "sys/dev/block" / number).resolve(strict=True)
        device = _device(folder)
        if not (folder / "partition").exists():
            return device
        partition = Partition(
            number=_count(folder / "partition"),
            start_bytes=_count(folder / "start") * _SYSFS_SECTOR_BYTES,
            disk=_device(folder.parent),
            sector_bytes=_count(folder.parent / "queue/logical_block_size"),
        )
        return Device(device.number, device.name, device.size_bytes, partition)

    @contextlib.contextmanager
    def open(self, device: Device, *, write: bool = False) -> Iterator[int]:
        """Open a block device; yield its descriptor.

        Raises:
            CalveError: its name in /dev is another device's.
            OSError: it cannot be opened.
        """
        path = self._base / "dev" / device.name
        descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            self.check(descriptor, device)
            yield descriptor
        finally:
            os.close(descriptor)

    def check(self, descriptor: int, device: Device) -> None:
        """Raise CalveError where a descriptor is not the device's."""
        status = os.fstat(descriptor)
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        if not stat.S_ISBLK(status.st_mode) or number != device.number:
            raise CalveError(f"not the block device {device.number}", place=f"/dev/{device.name}")

    def resize_partition(self, disk_fd: int, partition: Partition, size_bytes: int) -> None:
        """Tell the kernel of a new size of a partition that may be in use; OSError where it will not have it."""
        import ctypes

        data = ctypes.create_string_buffer(
            _BLKPG_PARTITION.pack(partition.start_bytes, size_bytes, partition.number, b"", b""),
            _BLKPG_PARTITION.size,
        )
        address = ctypes.addressof(data)
        fcntl.ioctl(
            disk_fd, _BLKPG, _BLKPG_ARGUMENT.pack(_BLKPG_RESIZE_PARTITION, 0, len(data), address)
        )

    def resize_file_system(self, root: Path, blocks: int) -> None:
        """Let the ext4 mounted at `root` grow to a count of blocks; OSError where the kernel will not."""
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_RESIZE_FS, struct.pack("@Q", blocks))
        finally:
            os.close(descriptor)


LINUX: Final = Linux()


def _device(folder: Path) -> Device:
    """Read what sysfs says of every block device."""
    variables = dict(
        line.partition("=")[::2] for line in (folder / "uevent").read_text().splitlines()
    )
    name = variables.get("DEVNAME", "")
    if not name:
        raise DamagedError("no name of the device", place=folder)
    number = (folder / "dev").read_text().strip()
    return Device(number, name, _count(folder / "size") * _SYSFS_SECTOR_BYTES)


def _count(path: Path) -> int:
    text = path.read_text().strip()
    if not text.isdecimal():
        raise DamagedError(f"no number: {text!r}", place=path)
    return int(text)


def _unescape(text: str) -> str:
    """Undo what mountinfo does to blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
