"""What the kernel says of disks, in its own formats, and the requests that it gets."""

from __future__ import annotations

import ctypes
import fcntl
import struct
from pathlib import Path

import pytest

from calve.boot.device import Device, Linux, Partition
from calve.errors import CalveError, DamagedError

NVME = Device("259:0", "nvme0n1", 8 << 30)


@pytest.fixture
def linux(tmp_path):
    """A machine with an NVMe disk of two partitions, as sysfs shows it."""
    disk = tmp_path / "sys/devices/pci0000:00/0000:00:04.0/nvme/nvme0/nvme0n1"
    rows = {
        disk: ("nvme0n1", "259:0", 16777216, {"queue/logical_block_size": 4096}),
        disk / "nvme0n1p2": ("nvme0n1p2", "259:2", 600000, {"partition": 2, "start": 18432}),
    }
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    for folder, (name, number, size, more) in rows.items():
        folder.mkdir(parents=True)
        (folder / "uevent").write_text(f"MAJOR=259\nDEVNAME={name}\nDEVTYPE=disk\n")
        files = {"dev": number, "size": size, **more}
        for file, value in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(f"{value}\n")
        link = tmp_path / "sys/dev/block" / number
        link.symlink_to(Path("../..") / folder.relative_to(tmp_path / "sys"))
    return Linux(tmp_path)


def mounted(tmp_path, *lines):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text("".join(f"{line}\n" for line in lines))
    return Linux(tmp_path)


def test_a_partition_and_its_disk(linux):
    found = linux.device("259:2")
    assert found == Device(
        "259:2", "nvme0n1p2", 600000 * 512, Partition(2, 18432 * 512, NVME, 4096)
    )
    assert linux.device("259:0") == NVME


def test_a_device_that_sysfs_does_not_know(linux):
    with pytest.raises(FileNotFoundError):
        linux.device("259:7")


@pytest.mark.parametrize(
    ("file", "message"), [("size", "no number: 'x'"), ("uevent", "no name"), ("start", "no number")]
)
def test_sysfs_that_makes_no_sense(linux, tmp_path, file, message):
    (tmp_path / "sys/dev/block/259:2" / file).write_text("x\n")
    with pytest.raises(DamagedError, match=message):
        linux.device("259:2")


def test_which_device_is_mounted(tmp_path):
    root = tmp_path / "sys root"
    escaped = str(root).replace(" ", "\\040")
    linux = mounted(
        tmp_path,
        "1 1 0:2 / / rw - rootfs rootfs rw",
        f"21 1 259:1 / {escaped} rw shared:3 master:1 - ext4 /dev/nvme0n1p1 rw",
        f"22 1 259:2 / {escaped} rw,noatime - ext4 /dev/root rw",
        f"23 22 0:20 / {escaped}/proc rw - proc proc rw",
        "damaged",
    )
    assert linux.mounted(root) == "259:2"
    assert linux.mounted(root / "proc") is None
    assert linux.mounted(tmp_path) is None


def test_another_file_system_over_it(tmp_path):
    linux = mounted(
        tmp_path,
        f"22 1 259:2 / {tmp_path} rw - ext4 /dev/root rw",
        f"23 1 0:40 / {tmp_path} rw - overlay overlay rw",
    )
    assert linux.mounted(tmp_path) is None


def test_the_kernel_of_this_machine_is_understood(tmp_path):
    assert Linux().mounted(tmp_path / "missing") is None


def test_a_name_that_is_another_device_s(linux, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvme0n1").write_bytes(b"")
    with (
        pytest.raises(CalveError, match="/dev/nvme0n1: not the block device 259:0"),
        linux.open(NVME),
    ):
        pass
    (tmp_path / "dev/null").symlink_to("/dev/null")
    with (
        pytest.raises(CalveError, match="not the block device 1:3"),
        linux.open(Device("1:3", "null", 0)),
    ):
        pass


def test_the_request_for_a_partition(monkeypatch):
    seen = []

    def ioctl(fd, request, argument):
        operation, _, length, address = struct.unpack("@iiiP", argument)
        data = ctypes.string_at(address, length)
        seen.append((fd, request, operation, length, struct.unpack_from("@qqi", data)))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    Linux().resize_partition(7, Partition(2, 9 << 20, NVME, 512), 1 << 30)
    # linux/blkpg.h: BLKPG, BLKPG_RESIZE_PARTITION, sizeof(struct blkpg_partition).
    assert seen == [(7, 0x1269, 3, 152, (9 << 20, 1 << 30, 2))]


def test_the_request_for_a_file_system(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(fcntl, "ioctl", lambda _fd, *request: seen.append(request))
    Linux().resize_file_system(tmp_path, 1 << 33)
    write, size, kind, number = 1, 8, ord("f"), 16
    assert seen == [
        (write << 30 | size << 16 | kind << 8 | number, (1 << 33).to_bytes(8, "little"))
    ]
