"""The look at a raw disk before a byte of it is uploaded: is it one, and would firmware start it?

A snapshot takes any bytes. A VHD that is uploaded as if it were raw makes an image that starts nowhere, and nothing
says why; so everything that is not a raw disk with a GUID partition table is refused by name, with the command that
makes one of it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from calve.disk import gpt, pe
from calve.disk.arch import ARCHES, X86_64, Arch
from calve.disk.disk import BLOCK_BYTES
from calve.disk.esp import FileSystem, Read
from calve.errors import CalveError, DamagedError, NotFoundError, UsageError

__all__ = ["Checked", "check"]

_HEAD_BYTES = 1 << 20
_LOADER_HEAD_BYTES = 64 << 10
_VHD = b"conectix"


@dataclass(frozen=True, slots=True)
class Checked:
    """What a raw disk is: its size, its partition table, and the processors that it starts on."""

    size_bytes: int
    layout: gpt.Layout
    arches: tuple[Arch, ...]


@dataclass(frozen=True, slots=True)
class _Foreign:
    """Something that is no raw disk: what it is called, its magic and where that is, and what converts it."""

    name: str
    magic: bytes
    command: str
    offset: int = 0

    def of(self, head: bytes) -> bool:
        return head[self.offset :].startswith(self.magic)


def _by_qemu(driver: str) -> str:
    return f"qemu-img convert -f {driver} -O raw {{source}} {{target}}"


_FOREIGN = (
    _Foreign("a dynamic VHD", _VHD, _by_qemu("vpc")),
    _Foreign("a VHDX", b"vhdxfile", _by_qemu("vhdx")),
    _Foreign("a qcow2 image", b"QFI\xfb", _by_qemu("qcow2")),
    _Foreign("a VMDK", b"KDMV", _by_qemu("vmdk")),
    _Foreign("a VMDK", b"COWD", _by_qemu("vmdk")),
    _Foreign("a VMDK's description", b"# Disk DescriptorFile", _by_qemu("vmdk")),
    _Foreign("a VDI", b"\x7f\x10\xda\xbe", _by_qemu("vdi"), offset=64),
    _Foreign("compressed with zstd", b"\x28\xb5\x2f\xfd", "zstd -d {source} -o {target}"),
    _Foreign("compressed with gzip", b"\x1f\x8b\x08", "gzip -dc {source} > {target}"),
    _Foreign("compressed with xz", b"\xfd7zXZ\0", "xz -dc {source} > {target}"),
    _Foreign("compressed with bzip2", b"BZh", "bzip2 -dc {source} > {target}"),
)
_FIXED_VHD = _Foreign("a fixed VHD", _VHD, "cp {source} {target} && truncate -s -512 {target}")


def check(path: Path) -> Checked:
    """Look at a disk: its partition table, EFI system partition and loader.

    Args:
        path: a file or a block device.

    Raises:
        UsageError: it is no raw disk that UEFI firmware starts; the hint says what makes one of it.
        DamagedError: its partition table or EFI system partition is damaged.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", place=path) from error
    with contextlib.ExitStack() as owner:
        owner.callback(os.close, descriptor)
        try:
            return _check(descriptor, path)
        except OSError as error:
            raise CalveError(f"cannot be read: {error.strerror}", place=path) from error


def _check(fd: int, path: Path) -> Checked:
    size = os.lseek(fd, 0, os.SEEK_END)
    head = os.pread(fd, _HEAD_BYTES, 0)
    _refuse_foreign(head, os.pread(fd, 512, max(0, size - 512)), path)
    if not head[gpt.SECTOR_BYTES :].startswith(b"EFI PART"):
        raise _no_table(head, path)
    if not _protected(head):
        raise UsageError(
            "it has no protective MBR, and firmware looks at no partition table without one",
            place=path,
            hint="partition it with a tool that writes both: sfdisk, sgdisk, systemd-repart",
        )
    if size % BLOCK_BYTES:
        raise UsageError(
            f"its size, {size} bytes, is not a multiple of 512 KiB",
            place=path,
            hint=f"truncate -s %512K {shlex.quote(str(path))}",
        )
    layout = gpt.parse(head, size_bytes=size, place=path)
    esp = gpt.type_guid(gpt.Kind.ESP, X86_64)
    partitions = [one for one in layout.partitions if one.type == esp]
    if not partitions:
        raise UsageError(
            "it has no EFI system partition",
            place=path,
            hint="EC2 starts Calve's images by UEFI: make the image with one (NixOS: boot by EFI)",
        )
    arches = tuple(arch for one in partitions for arch in _arches(fd, one, path))
    if not arches:
        wanted = " nor ".join(f"EFI/BOOT/{one.loader}" for one in ARCHES)
        raise UsageError(
            f"its EFI system partition has neither {wanted}",
            place=path,
            hint="a loader under another name is started only where firmware remembers it",
        )
    return Checked(size, layout, arches)


def _refuse_foreign(head: bytes, end: bytes, path: Path) -> None:
    found = next((one for one in _FOREIGN if one.of(head)), None)
    if found is None and end.startswith(_VHD):
        found = _FIXED_VHD
    if found is not None:
        source, target = (
            shlex.quote(str(one)) for one in (path, path.with_name(f"{path.name}.raw"))
        )
        raise UsageError(
            f"it is {found.name}, not a raw disk",
            place=path,
            hint=found.command.format(source=source, target=target),
        )


def _no_table(head: bytes, path: Path) -> UsageError:
    """Return the error for what has no GUID partition table."""
    what, hint = "it has no partition table", "a raw disk is wanted, not a file system"
    if head[0x8001:].startswith(b"CD001"):
        what, hint = (
            "it is an ISO 9660 image",
            "install from it to a disk; a CD is not started by EC2",
        )
    elif head[4096:].startswith(b"EFI PART"):
        what = "its partition table is for sectors of 4096 bytes, and EBS has 512"
        hint = "make the image with sectors of 512 bytes"
    elif head[510:512] == b"\x55\xaa" and any(head[446:510]):
        what = "it has an MBR partition table, and UEFI wants a GUID partition table"
        hint = f"sgdisk --mbrtogpt {shlex.quote(str(path))}; it also needs an EFI system partition"
    return UsageError(what, place=path, hint=hint)


def _protected(head: bytes) -> bool:
    """Say whether the MBR protects the table (UEFI specification 2.10, 5.2.3): type 0xEE, from sector 1 on."""
    records = [head[at : at + 16] for at in range(446, 510, 16)]
    return head[510:512] == b"\x55\xaa" and any(
        record[4] == 0xEE and record[8:12] == b"\1\0\0\0" for record in records
    )


def _arches(fd: int, partition: gpt.Partition, path: Path) -> list[Arch]:
    """Return the processors that an EFI system partition has a loader for."""
    place = f"{path}, partition {partition.name!r}"
    files = FileSystem(_reader(fd, partition), place)
    found = []
    for arch in ARCHES:
        name = f"EFI/BOOT/{arch.loader}"
        try:
            file = files.find(name)
        except NotFoundError:
            continue
        machine = pe.machine(files.head(file, _LOADER_HEAD_BYTES), f"{place}, {name}")
        if machine != arch.machine:
            raise DamagedError(f"{name} is for another processor", place=place)
        found.append(arch)
    return found


def _reader(fd: int, partition: gpt.Partition) -> Read:
    def read(offset: int, size: int) -> bytes:
        size = max(0, min(size, partition.size_bytes - offset))
        return os.pread(fd, size, partition.start_bytes + offset)

    return read
