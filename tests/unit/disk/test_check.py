"""The look before an upload: what is no raw disk is refused by name, with the command that makes one of it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shlex
import shutil
import struct
import subprocess
import uuid
import zlib

import pytest

from calve.disk import arch, assemble, check, fat, gpt
from calve.disk.assemble import Part
from calve.disk.gpt import Kind
from calve.errors import DamagedError, UsageError
from calve.nix.zstd import ZstdCompressor

SEED = uuid.UUID(int=13)

pytestmark = pytest.mark.skipif(
    shutil.which("mcopy") is None, reason="dosfstools or mtools are not installed"
)


def make(folder, pe_file, processor=arch.X86_64, machine=None, kind=Kind.ESP):
    (folder / "loader").write_bytes(pe_file(machine or processor.machine))
    (folder / "esp").unlink(missing_ok=True)
    fat.make(folder / "esp", folder / "loader", arch=processor, seed=SEED)
    (folder / "root").write_bytes(b"root")
    parts = [
        Part("esp", kind, folder / "esp"),
        Part("root", Kind.ROOT, folder / "root", fill=True),
    ]
    out = folder / "disk.raw"
    out.unlink(missing_ok=True)
    assemble.build(parts, out, arch=processor, seed=SEED)
    return out


@pytest.fixture(name="raw", scope="module")
def _raw(tmp_path_factory, pe_file):
    return make(tmp_path_factory.mktemp("raw"), pe_file)


@pytest.fixture(name="disk")
def _disk(raw, tmp_path):
    """A copy that a test may damage."""
    out = tmp_path / "the disk.img"
    subprocess.run(["cp", raw, out], check=True)
    return out


def put(path, at, data):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


def start(path, size=4 << 20):
    with path.open("rb") as file:
        return file.read(size)


def refused(path):
    with pytest.raises(UsageError) as caught:
        check.check(path)
    assert caught.value.place == str(path)
    return caught.value


@pytest.mark.parametrize("processor", arch.ARCHES, ids=lambda one: one.name)
def test_a_disk_of_ours(tmp_path, pe_file, processor):
    found = check.check(make(tmp_path, pe_file, processor))
    assert found.arches == (processor,)
    assert found.size_bytes == 1 << 30
    assert [one.name for one in found.layout.partitions] == ["esp", "root"]


MAGICS = {
    "a dynamic VHD": (0, b"conectix"),
    "a VHDX": (0, b"vhdxfile"),
    "a qcow2 image": (0, b"QFI\xfb\0\0\0\3"),
    "a VMDK": (0, b"KDMV\1\0\0\0"),
    "a VMDK's description": (0, b"# Disk DescriptorFile\nversion=1\n"),
    "a VDI": (64, b"\x7f\x10\xda\xbe"),
}


@pytest.mark.parametrize("name", MAGICS)
def test_formats_of_virtual_disks(disk, name):
    error = refused(put(disk, *MAGICS[name]))
    assert error.message == f"it is {name}, not a raw disk"
    assert error.hint.startswith("qemu-img convert -f ")
    assert shlex.split(error.hint)[-2:] == [str(disk), f"{disk}.raw"]


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")
@pytest.mark.parametrize(
    ("driver", "options", "name"),
    [
        ("vpc", "subformat=dynamic", "a dynamic VHD"),
        ("vpc", "subformat=fixed,force_size=on", "a fixed VHD"),
        ("qcow2", "compat=1.1", "a qcow2 image"),
        ("vmdk", "subformat=monolithicSparse", "a VMDK"),
        ("vmdk", "subformat=streamOptimized", "a VMDK"),
        ("vdi", "static=off", "a VDI"),
        ("vhdx", "subformat=dynamic", "a VHDX"),
    ],
)
def test_what_qemu_img_makes_and_the_hint_undoes(raw, tmp_path, driver, options, name):
    made = tmp_path / "image of ours"
    subprocess.run(["qemu-img", "convert", "-O", driver, "-o", options, raw, made], check=True)
    error = refused(made)
    assert name in error.message
    subprocess.run(["sh", "-c", error.hint], check=True)
    out = tmp_path / "image of ours.raw"
    if driver == "vpc" and "force_size" not in options:  # a VHD's size is one of cylinders
        subprocess.run(["sh", "-c", refused(out).hint], check=True)
    assert check.check(out).arches == (arch.X86_64,)


def test_a_fixed_vhd(disk):
    size = disk.stat().st_size
    error = refused(put(disk, size, b"conectix".ljust(512, b"\0")))
    assert "a fixed VHD" in error.message
    subprocess.run(["sh", "-c", error.hint], check=True)
    assert (disk.parent / f"{disk.name}.raw").stat().st_size == size


@pytest.mark.parametrize("name", ["zstd", "gzip", "xz", "bzip2"])
def test_compressed_ones(tmp_path, name):
    zstd = ZstdCompressor(1)
    pack = {
        "zstd": lambda data: zstd.compress(data) + zstd.flush(),
        "gzip": gzip.compress,
        "xz": lzma.compress,
        "bzip2": bz2.compress,
    }[name]
    path = tmp_path / f"image.{name}"
    path.write_bytes(pack(b"content" * 9))
    error = refused(path)
    assert error.message == f"it is compressed with {name}, not a raw disk"
    if shutil.which(name):
        subprocess.run(["sh", "-c", error.hint], check=True)
        assert (tmp_path / f"image.{name}.raw").read_bytes() == b"content" * 9


def test_a_size_that_is_no_multiple_of_a_block(disk):
    put(disk, disk.stat().st_size, b"\0")
    error = refused(disk)
    assert "multiple of 512 KiB" in error.message
    subprocess.run(["sh", "-c", error.hint], check=True)
    assert check.check(disk).size_bytes == (1 << 30) + (512 << 10)


def test_a_cd(tmp_path):
    path = tmp_path / "iso"
    path.write_bytes(bytes(0x8001) + b"CD001" + bytes(1 << 20))
    assert "ISO 9660" in refused(path).message


def test_an_mbr_alone(disk):
    put(disk, 512, bytes(16 << 10))
    error = refused(disk)
    assert "MBR" in error.message
    assert "sgdisk --mbrtogpt" in error.hint


@pytest.mark.parametrize(("at", "new"), [(510, b"\0"), (450, b"\x83"), (454, b"\2")])
def test_a_table_that_firmware_does_not_look_at(disk, at, new):
    assert "no protective MBR" in refused(put(disk, at, new)).message


def test_sectors_of_4096_bytes(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096) + b"EFI PART" + bytes(1 << 20))
    assert "4096" in refused(path).message


@pytest.mark.parametrize("content", [b"", b"x", bytes(1 << 20)])
def test_no_disk_at_all(tmp_path, content):
    path = tmp_path / "disk"
    path.write_bytes(content)
    assert "no partition table" in refused(path).message


def test_what_is_not_there(tmp_path):
    assert "No such file" in refused(tmp_path / "gone").message


def test_a_damaged_table(disk):
    with pytest.raises(DamagedError, match="checksum") as caught:
        check.check(put(disk, 512 + 60, b"X"))
    assert caught.value.place == str(disk)


def test_a_disk_that_is_cut_short(disk):
    with disk.open("r+b") as file:
        file.truncate(512 << 20)
    with pytest.raises(DamagedError, match="cut short"):
        check.check(disk)


def test_no_esp(tmp_path, pe_file):
    path = make(tmp_path, pe_file, kind=Kind.STORE)
    assert "no EFI system partition" in refused(path).message


def test_an_esp_without_a_loader(disk):
    at = start(disk).index(b"BOOTX64 EFI")
    error = refused(put(disk, at, b"GRUBX64 "))
    assert "neither EFI/BOOT/BOOTX64.EFI nor EFI/BOOT/BOOTAA64.EFI" in error.message


def test_a_loader_for_another_processor(tmp_path, pe_file):
    path = make(tmp_path, pe_file, arch.X86_64, machine=arch.AARCH64.machine)
    with pytest.raises(DamagedError, match=r"BOOTX64.EFI is for another processor"):
        check.check(path)


def test_a_loader_that_is_none(disk):
    at = start(disk).index(b"MZ")
    with pytest.raises(DamagedError, match="no PE file") as caught:
        check.check(put(disk, at, b"ZZ"))
    assert caught.value.place == f"{disk}, partition 'esp', EFI/BOOT/BOOTX64.EFI"


def test_an_esp_of_another_file_system(disk):
    with pytest.raises(DamagedError, match="no FAT file system"):
        check.check(put(disk, 1 << 20, bytes(512)))


def test_a_table_of_somebody_else_s(tmp_path, raw):
    """As sfdisk writes it: the same partitions elsewhere, with one number left out."""
    sfdisk = shutil.which("sfdisk", path="/usr/sbin:/sbin")
    if sfdisk is None:
        pytest.skip("fdisk is not installed")
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(256 << 20)
    script = b"label: gpt\n2: start=6144, size=131072, type=uefi\n"
    subprocess.run([sfdisk, "-q", path], input=script, check=True)
    esp = (raw.parent / "esp").read_bytes()
    put(path, 6144 * 512, esp)
    found = check.check(path)
    assert [one.start_bytes for one in found.layout.partitions] == [6144 * 512]
    assert found.layout.partitions[0].type == gpt.type_guid(Kind.ESP, arch.X86_64)


def test_entries_of_another_size(disk):
    """A table may have larger entries, as long as it says so."""
    head = bytearray(start(disk, 34 * 512))
    old = [head[1024 + 128 * number :][:128] for number in range(64)]
    entries = b"".join(bytes(entry).ljust(256, b"\0") for entry in old)
    head[1024:] = entries
    struct.pack_into("<III", head, 512 + 80, 64, 256, zlib.crc32(entries))
    struct.pack_into("<I", head, 512 + 16, 0)
    struct.pack_into("<I", head, 512 + 16, zlib.crc32(head[512 : 512 + 92]))
    found = check.check(put(disk, 0, bytes(head)))
    assert [one.name for one in found.layout.partitions] == ["esp", "root"]
