"""The root file system grows: what is decided on a superblock, and what the kernel is asked, in which order."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from calve.boot.device import Linux
from calve.boot.grow import FileSystem, Grown, grow
from calve.disk import ext4
from calve.errors import CalveError, DamagedError

_spec = importlib.util.spec_from_file_location("gptdisk", Path(__file__).with_name("gptdisk.py"))
gptdisk = importlib.util.module_from_spec(_spec)
sys.modules["gptdisk"] = gptdisk
_spec.loader.exec_module(gptdisk)

MIB = 1 << 20
GROUP_BYTES = 128 * MIB
FS = FileSystem(
    block_bytes=4096,
    blocks=65536,
    first_block=0,
    blocks_per_group=32768,
    inodes_per_group=16384,
    inode_bytes=256,
    reserved_gdt_blocks=31,
    descriptor_bytes=64,
    is_64bit=True,
)


def superblock(fs=FS):
    data = bytearray(1024)

    def put(offset, size, value):
        data[offset : offset + size] = value.to_bytes(size, "little")

    put(4, 4, fs.blocks & 0xFFFFFFFF)
    put(20, 4, fs.first_block)
    put(24, 4, fs.block_bytes.bit_length() - 11)
    put(32, 4, fs.blocks_per_group)
    put(40, 4, fs.inodes_per_group)
    put(56, 2, 0xEF53)
    put(88, 2, fs.inode_bytes)
    put(96, 4, 0x80 if fs.is_64bit else 0)
    put(206, 2, fs.reserved_gdt_blocks)
    put(254, 2, fs.descriptor_bytes)
    put(336, 4, fs.blocks >> 32)
    return bytes(data)


# The superblock


def test_a_superblock_of_mke2fs(tmp_path):
    disk = tmp_path / "disk"
    ext4.make(disk, 64 * MIB)
    with disk.open("rb") as file:
        file.seek(1024)
        found = FileSystem.parse(file.read(1024))
    assert found.size_bytes == 64 * MIB
    assert (found.block_bytes, found.blocks_per_group, found.first_block) == (4096, 32768, 0)
    assert (found.inodes_per_group, found.inode_bytes) == (8192, 256)
    assert (found.descriptor_bytes, found.is_64bit) == (64, True)


@pytest.mark.parametrize("fs", [FS, dataclasses.replace(FS, blocks=1 << 33)])
def test_a_superblock_is_read(fs):
    assert FileSystem.parse(superblock(fs)) == fs


def test_a_file_system_without_64_bits_has_small_descriptors():
    found = FileSystem.parse(superblock(dataclasses.replace(FS, is_64bit=False)))
    assert (found.blocks, found.descriptor_bytes) == (65536, 32)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(1024),
        superblock()[:-1],
        superblock().replace(b"\x53\xef", b"\x53\xee"),
        superblock(dataclasses.replace(FS, blocks_per_group=0)),
        superblock(dataclasses.replace(FS, inodes_per_group=0)),
        superblock(dataclasses.replace(FS, blocks=0)),
    ],
)
def test_what_is_no_superblock(data):
    with pytest.raises(DamagedError, match="/dev/vda: no superblock of ext4"):
        FileSystem.parse(data, "/dev/vda")


# The decision


@pytest.mark.parametrize(
    ("device_bytes", "blocks"),
    [
        (256 * MIB, None),
        (128 * MIB, None),
        (256 * MIB + 4095, None),
        (8 << 30, 2 << 20),
        ((8 << 30) + 4095, 2 << 20),
        # The last group: left out while it is hardly more than what it needs itself.
        (3 * GROUP_BYTES + 5 * MIB, 3 * 32768 + 1280),
        (3 * GROUP_BYTES + 4 * MIB, 3 * 32768),
        (256 * MIB + 4 * MIB, None),
    ],
)
def test_how_far_it_grows(device_bytes, blocks):
    assert FS.grown(device_bytes) == blocks


def test_a_last_group_is_left_out_up_to_the_block():
    needs = 1 + 31 + 1024 + 4
    assert FS.grown(3 * GROUP_BYTES + needs * 4096) == 3 * 32768
    assert FS.grown(3 * GROUP_BYTES + (needs + 1) * 4096) == 3 * 32768 + needs + 1


def test_it_gains_a_mebibyte_or_nothing():
    nearly = dataclasses.replace(FS, blocks=3 * 32768 - 255)
    assert nearly.grown(3 * GROUP_BYTES) is None
    assert dataclasses.replace(nearly, blocks=3 * 32768 - 256).grown(3 * GROUP_BYTES) == 3 * 32768


def test_once_grown_there_is_nothing_to_do():
    for device_bytes in range(256 * MIB, 700 * MIB, MIB // 2 + 4096):
        blocks = FS.grown(device_bytes)
        if blocks is not None:
            assert dataclasses.replace(FS, blocks=blocks).grown(device_bytes) is None


def test_32_bits_of_blocks_or_of_inodes():
    narrow = dataclasses.replace(FS, is_64bit=False, inodes_per_group=2048)
    assert narrow.grown(64 << 40) <= (1 << 32) - 1
    assert narrow.grown(64 << 40) > (1 << 32) - 32768 - 1
    # 262,143 groups of 16,384 inodes.
    assert FS.grown(64 << 40) == ((1 << 32) - 1) // 16384 * 32768


# What is done


class Machine(Linux):
    """A kernel of files: it does what it is asked, and remembers."""

    def __init__(self, base, disk, fs=FS, *, root="vda2"):
        super().__init__(base)
        self.base = base
        self.fs = fs
        self.asked = []
        self.opened = []
        self.written = []
        self.refuses = {}
        (base / "dev").mkdir()
        disk.save(base / "dev/vda")
        _, entries = gptdisk.linux_reads(disk)
        sizes = [
            (int.from_bytes(e[32:40], "little"), int.from_bytes(e[40:48], "little"))
            for e in entries
        ]
        self.add("vda", "254:0", disk.size_bytes // 512)
        logical = base / "sys/devices/vda/queue"
        logical.mkdir()
        (logical / "logical_block_size").write_text(f"{disk.sector_bytes}\n")
        units = disk.sector_bytes // 512
        for number, (first, last) in enumerate(sizes[:2], 1):
            folder = self.add(f"vda/vda{number}", f"254:{number}", (last + 1 - first) * units)
            (folder / "partition").write_text(f"{number}\n")
            (folder / "start").write_text(f"{first * units}\n")
        self.root = base / "dev" / root
        with self.root.open("r+b" if root == "vda" else "wb") as file:
            file.seek(1024)
            file.write(superblock(fs))
        minor = root.removeprefix("vda") or "0"
        (base / "proc/self").mkdir(parents=True)
        (base / "proc/self/mountinfo").write_text(
            f"1 1 0:2 / / rw - rootfs none rw\n2 1 254:{minor} / {base} rw,noatime - ext4 /dev/root rw\n"
        )

    def add(self, name, number, sectors):
        folder = self.base / "sys/devices" / name
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{sectors}\n")
        (folder / "dev").write_text(f"{number}\n")
        (folder / "uevent").write_text(f"MAJOR=254\nDEVNAME={name.rpartition('/')[2]}\n")
        link = self.base / "sys/dev/block" / number
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"../../devices/{name}")
        return folder

    def open(self, device, *, write=False):
        self.opened.append(device.name)
        if write:
            self.written.append(device.name)
        return super().open(device, write=write)

    def check(self, descriptor, device):
        """Files are no block devices."""

    def ask(self, what, *arguments):
        self.asked.append((what, *arguments))
        if what in self.refuses:
            raise OSError(self.refuses[what], os.strerror(self.refuses[what]))

    def resize_partition(self, disk_fd, partition, size_bytes):
        self.ask("partition", partition.number, partition.start_bytes, size_bytes)
        (self.base / f"sys/devices/vda/vda{partition.number}/size").write_text(
            f"{size_bytes // 512}\n"
        )

    def resize_file_system(self, root, blocks):
        self.ask("file system", root, blocks)
        self.fs = dataclasses.replace(self.fs, blocks=blocks)
        with self.root.open("r+b") as file:
            file.seek(1024)
            file.write(superblock(self.fs))


def machine(tmp_path, *, added=256 * MIB, sector_bytes=512, fs=FS, **options):
    """A disk of 266 MiB, an ESP of 8 and a root of 256, in a larger one."""
    one = MIB // sector_bytes
    disk = gptdisk.simple(266 * one, 265 * one - 1, sector_bytes=sector_bytes)
    disk.sectors += added // sector_bytes
    return Machine(tmp_path, disk, fs, **options)


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_a_partition_grows_and_then_its_file_system(tmp_path, sector_bytes):
    linux = machine(tmp_path, added=320 * MIB, sector_bytes=sector_bytes)
    grown = grow(tmp_path, linux)
    # The ESP is before it; behind it the table, and what does not make a block of 4 KiB.
    size_bytes = (266 + 320 - 9) * MIB - 20480
    assert grown == Grown(256 * MIB, size_bytes)
    assert linux.asked == [
        ("partition", 2, 9 * MIB, size_bytes),
        ("file system", tmp_path, size_bytes // 4096),
    ]
    assert grow(tmp_path, linux) is None
    assert len(linux.asked) == 2


def test_a_machine_that_starts_again_reads_its_superblock_and_no_more(tmp_path):
    linux = machine(tmp_path)
    grow(tmp_path, linux)
    assert linux.written == ["vda"]
    linux.opened.clear()
    assert grow(tmp_path, linux) is None
    assert linux.opened == ["vda2"]
    assert linux.written == ["vda"]


def test_the_writes_are_durable_step_by_step_before_the_kernel_hears_of_them(tmp_path, monkeypatch):
    linux = machine(tmp_path)
    done = linux.asked
    pwrite, fsync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *a: done.append(a[2] // 512) or pwrite(*a))
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("fsync") or fsync(fd))
    grow(tmp_path, linux)
    last = (266 + 256) * 2048 - 1
    names = [one[0] if isinstance(one, tuple) else one for one in done]
    assert names == [
        *(last - 32, last, "fsync", 34, 0, "fsync", 1, "fsync"),
        *("partition", "file system"),
    ]


def test_a_whole_disk(tmp_path):
    disk = gptdisk.simple((1 << 30) // 512)
    linux = Machine(tmp_path, disk, root="vda")
    assert grow(tmp_path, linux) == Grown(256 * MIB, 1 << 30)
    assert linux.asked == [("file system", tmp_path, 262144)]
    assert linux.written == []
    assert grow(tmp_path, linux) is None


def test_a_file_system_smaller_than_its_partition_on_a_disk_that_is_full(tmp_path):
    fs = dataclasses.replace(FS, blocks=32768)
    linux = machine(tmp_path, added=0, fs=fs)
    assert grow(tmp_path, linux) == Grown(128 * MIB, 256 * MIB)
    assert linux.written == []


def test_a_partition_that_is_not_the_last_one(tmp_path):
    fs = dataclasses.replace(FS, blocks=2048)
    linux = machine(tmp_path, root="vda1", fs=fs)
    before = (tmp_path / "dev/vda").read_bytes()
    assert grow(tmp_path, linux) is None
    assert linux.asked == []
    assert (tmp_path / "dev/vda").read_bytes() == before


def test_no_ext4_is_mounted_there(tmp_path):
    linux = machine(tmp_path)
    assert grow(tmp_path / "dev", linux) is None
    place = tmp_path / "proc/self/mountinfo"
    place.write_text(place.read_text().replace("ext4", "xfs"))
    assert grow(tmp_path, linux) is None
    assert linux.asked == []


def test_a_damaged_table_is_left_alone(tmp_path):
    linux = machine(tmp_path)
    place = tmp_path / "dev/vda"
    data = bytearray(place.read_bytes())
    data[1024 + 40] ^= 1
    place.write_bytes(data)
    with pytest.raises(DamagedError, match="/dev/vda: the GPT's entries are damaged"):
        grow(tmp_path, linux)
    assert linux.asked == []
    assert place.read_bytes() == data


def test_a_partition_that_the_kernel_knows_elsewhere(tmp_path):
    linux = machine(tmp_path)
    (tmp_path / "sys/devices/vda/vda2/start").write_text("2048\n")
    (tmp_path / "sys/devices/vda/vda2/size").write_text("100\n")
    with pytest.raises(DamagedError, match="has partition 2 elsewhere"):
        grow(tmp_path, linux)
    assert linux.asked == []


@pytest.mark.parametrize("what", ["partition", "file system"])
def test_a_kernel_that_refuses_is_asked_again_at_the_next_boot(tmp_path, what):
    linux = machine(tmp_path)
    linux.refuses[what] = errno.EBUSY
    with pytest.raises(CalveError, match=f"does not let the {what} grow: Device or resource busy"):
        grow(tmp_path, linux)
    linux.refuses.clear()
    linux.asked.clear()
    grown = grow(tmp_path, linux)
    assert grown.after_bytes > 500 * MIB
    # The table was written the first time, whether the kernel has heard of it or not.
    expected = ["partition", "file system"] if what == "partition" else ["file system"]
    assert [one[0] for one in linux.asked] == expected


def test_a_device_that_is_not_there(tmp_path):
    linux = machine(tmp_path)
    (tmp_path / "dev/vda2").unlink()
    with pytest.raises(FileNotFoundError):
        grow(tmp_path, linux)
