"""FAT file systems of others: mtools' own as the oracle, and chains that lead nowhere."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess

import pytest

from calve.disk.esp import FileSystem
from calve.errors import DamagedError, NotFoundError
from calve.process import which

pytestmark = pytest.mark.skipif(
    shutil.which("mcopy") is None or shutil.which("mkfs.vfat", path="/usr/sbin:/sbin") is None,
    reason="dosfstools or mtools are not installed",
)
SIZES = {12: 4, 16: 32, 32: 64}


def run(*argv):
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture(name="image", params=SIZES, ids=lambda bits: f"FAT{bits}")
def _image(request, tmp_path):
    """A file system with a directory of several clusters, long names and a file of 70,000 bytes."""
    path = tmp_path / "esp"
    with path.open("xb") as file:
        file.truncate(SIZES[request.param] << 20)
    run(which("mkfs.vfat", package="dosfstools"), "-F", str(request.param), "-n", "EFI", path)
    run("mmd", "-i", path, "::/efi", "::/efi/boot")
    names = [f"a rather long name {number}.txt" for number in range(80)]
    for name in names:
        (tmp_path / name).write_bytes(b"small")
    run("mcopy", "-i", path, *(tmp_path / name for name in names), "::/efi/boot")
    run("mdel", "-i", path, f"::/efi/boot/{names[3]}")
    (tmp_path / "loader").write_bytes(os.urandom(70_000))
    run("mcopy", "-i", path, tmp_path / "loader", "::/efi/boot/bootx64.efi")
    return path


def file_system(data):
    return FileSystem(lambda offset, size: bytes(data[offset : offset + size]), "the partition")


def test_files_are_found_and_read(image):
    files = file_system(image.read_bytes())
    found = files.find("EFI/BOOT/BOOTX64.EFI")
    assert (found.size_bytes, found.directory) == (70_000, False)
    content = (image.parent / "loader").read_bytes()
    assert files.head(found, 1 << 20) == content
    assert files.head(found, 5_000) == content[:5_000]
    assert files.find("efi/boot").directory


@pytest.mark.parametrize(
    "path", ["EFI/BOOT/BOOTAA64.EFI", "EFI/GONE/X", "BOOTX64.EFI", "EFI/BOOT/BOOTX64.EFI/X"]
)
def test_what_is_not_there(image, path):
    with pytest.raises(NotFoundError, match=f"no {path}") as caught:
        file_system(image.read_bytes()).find(path)
    assert caught.value.place == "the partition"


@pytest.mark.parametrize(
    ("at", "new"), [(510, b"\0"), (11, b"\1\0"), (13, b"\0"), (16, b"\0"), (14, b"")]
)
def test_what_is_no_file_system(image, at, new):
    data = bytearray(image.read_bytes())
    data[at : at + len(new)] = new
    if not new:
        data = data[:300]
    with pytest.raises(DamagedError, match="no FAT"):
        file_system(data)


def test_a_chain_that_leads_out(image):
    data = bytearray(image.read_bytes())
    at = data.index(b"BOOTX64 EFI")
    struct.pack_into("<H", data, at + 26, 1)
    struct.pack_into("<H", data, at + 20, 0)
    files = file_system(data)
    with pytest.raises(DamagedError, match="out of the file system"):
        files.head(files.find("EFI/BOOT/BOOTX64.EFI"), 10)


class Table:
    """The table of an image, to change it; `bits` are those of an entry."""

    def __init__(self, data):
        self.data = data
        reserved, table = struct.unpack_from("<H8xH", data, 14)[0], data[22:24]
        self.start = reserved * 512
        self.bits = 32 if not any(table) else 16 if len(data) > 8 << 20 else 12

    def __getitem__(self, cluster):
        at = self.start + cluster * self.bits // 8
        value = int.from_bytes(self.data[at : at + 4], "little")
        if self.bits == 12:
            return value >> 4 * (cluster & 1) & 0xFFF
        return value & (1 << self.bits) - 1

    def __setitem__(self, cluster, value):
        at = self.start + cluster * self.bits // 8
        old = int.from_bytes(self.data[at : at + 4], "little")
        shift = 4 * (cluster & 1) if self.bits == 12 else 0
        mask = (1 << self.bits) - 1 << shift
        self.data[at : at + 4] = (old & ~mask | value << shift).to_bytes(4, "little")


def test_every_mark_of_an_end_is_one(image):
    """All from 0xFF8 on, of as many bits as there are, end a chain: here that of a directory that is full."""
    data = bytearray(image.read_bytes())
    table = Table(data)
    end = (1 << min(table.bits, 28)) - 8
    files = file_system(data)
    cluster = files.find("EFI/BOOT").cluster
    while cluster < end:
        start = files._offset(cluster)
        for at in range(start, start + files._cluster_bytes, 32):
            data[at] = data[at] or 0xE5  # removed
        last, cluster = cluster, table[cluster]
    table[last] = end
    files = file_system(data)
    with pytest.raises(NotFoundError):
        files.find("EFI/BOOT/NOTHERE.EFI")
    assert files.find("EFI/BOOT/BOOTX64.EFI").size_bytes == 70_000


def test_the_high_word_of_a_cluster_counts_on_fat32_alone(image):
    data = bytearray(image.read_bytes())
    at = data.index(b"BOOTX64 EFI")
    data[at + 20 : at + 22] = b"\7\7"
    files = file_system(data)
    found = files.find("EFI/BOOT/BOOTX64.EFI")
    if Table(data).bits == 32:
        with pytest.raises(DamagedError, match="out of the file system"):
            files.head(found, 1 << 20)
    else:
        assert files.head(found, 1 << 20) == (image.parent / "loader").read_bytes()


def test_a_directory_in_a_circle(image):
    """Its cluster leads to itself: the look ends all the same."""
    data = bytearray(image.read_bytes())
    (cluster,) = struct.unpack_from("<H", data, data.index(b"BOOT       ") + 26)
    Table(data)[cluster] = cluster
    reads = []
    files = FileSystem(
        lambda offset, size: reads.append(size) or bytes(data[offset : offset + size]), "x"
    )
    with pytest.raises(NotFoundError):
        files.find("EFI/BOOT/NOTHERE.EFI")
    assert sum(reads) < 5 << 20
