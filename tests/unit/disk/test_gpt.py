"""The partition table: as sfdisk reads it, equal for equal parts, and refused where it is not right."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import uuid
import zlib

import pytest

from calve.disk import gpt
from calve.disk.arch import AARCH64, ARCHES, X86_64
from calve.disk.gpt import Kind, Room
from calve.errors import DamagedError, UsageError
from calve.process import which

SEED = uuid.UUID("12345678-0000-4000-8000-000000000000")
MIB = 1 << 20
ROOMS = [Room("esp", Kind.ESP, 64 * MIB), Room("root", Kind.ROOT, 300 * MIB + 1, fill=True)]

needs_sfdisk = pytest.mark.skipif(
    shutil.which("sfdisk", path="/usr/sbin:/sbin:/usr/bin") is None, reason="fdisk is not installed"
)


def lay_out(*rooms, arch=X86_64, **more):
    return gpt.lay_out(rooms or ROOMS, arch=arch, seed=SEED, **more)


def write(layout, path):
    with path.open("wb") as file:
        file.truncate(layout.size_bytes)
        file.write(layout.head())
        file.seek(layout.size_bytes - 33 * gpt.SECTOR_BYTES)
        file.write(layout.tail())
    return path


def sfdisk(*arguments):
    return subprocess.run(
        [which("sfdisk", package="fdisk"), *arguments], capture_output=True, text=True, check=True
    )


def test_where_the_parts_lie():
    layout = lay_out()
    esp, root = layout.partitions
    assert layout.size_bytes == 1 << 30
    assert (esp.start_bytes, esp.size_bytes) == (MIB, 64 * MIB)
    assert root.start_bytes == 65 * MIB
    assert root.start_bytes + root.size_bytes == (1 << 30) - MIB


def test_rooms_are_rounded_up_and_the_disk_to_whole_gib():
    layout = lay_out(
        Room("store", Kind.STORE, 1), Room("verity", Kind.STORE_VERITY, 1022 * MIB + 1)
    )
    assert [one.size_bytes for one in layout.partitions] == [MIB, 1023 * MIB]
    assert layout.size_bytes == 2 << 30
    assert lay_out(at_least_bytes=(3 << 30) - 5).size_bytes == 3 << 30


@needs_sfdisk
@pytest.mark.parametrize("arch", ARCHES, ids=lambda arch: arch.name)
def test_sfdisk_reads_and_verifies_it(tmp_path, arch):
    rooms = [Room(kind.value, kind, 2 * MIB) for kind in Kind]
    layout = lay_out(*rooms, arch=arch)
    path = write(layout, tmp_path / "disk")
    assert "No errors" in sfdisk("--verify", path).stdout
    table = json.loads(sfdisk("--json", path).stdout)["partitiontable"]
    assert table["id"] == str(layout.guid).upper()
    assert (table["firstlba"], table["lastlba"]) == (2048, layout.size_bytes // 512 - 34)
    assert [
        (one["start"] * 512, one["size"] * 512, one["name"], one["type"], one["uuid"])
        for one in table["partitions"]
    ] == [
        (one.start_bytes, one.size_bytes, one.name, str(one.type).upper(), str(one.guid).upper())
        for one in layout.partitions
    ]


@needs_sfdisk
def test_the_backup_alone_is_enough(tmp_path):
    path = write(lay_out(), tmp_path / "disk")
    before = json.loads(sfdisk("--json", path).stdout)
    with path.open("r+b") as file:
        file.seek(512)
        file.write(bytes(33 * 512))
    assert json.loads(sfdisk("--json", path).stdout) == before


@needs_sfdisk
@pytest.mark.parametrize(("arch", "name"), [(X86_64, "x86-64"), (AARCH64, "ARM-64")])
def test_types_are_those_that_fdisk_knows(arch, name):
    known = dict(
        line.split(maxsplit=1)
        for line in sfdisk("--label", "gpt", "-T").stdout.splitlines()
        if line
    )
    found = {kind: known[str(gpt.type_guid(kind, arch)).upper()] for kind in Kind}
    assert found == {
        Kind.ESP: "EFI System",
        Kind.ROOT: f"Linux root ({name})",
        Kind.ROOT_VERITY: f"Linux root verity ({name})",
        Kind.STORE: f"Linux /usr ({name})",
        Kind.STORE_VERITY: f"Linux /usr verity ({name})",
    }


def test_equal_parts_make_equal_tables_and_another_seed_another():
    assert lay_out() == lay_out()
    other = gpt.lay_out(ROOMS, arch=X86_64, seed=uuid.UUID(int=1))
    guids = {one.guid for one in (*lay_out().partitions, *other.partitions)}
    assert len(guids | {lay_out().guid, other.guid}) == 6


def test_a_disk_of_more_than_2_tib_says_so_in_its_mbr():
    mbr = lay_out(at_least_bytes=3 << 40).head()[:512]
    assert struct.unpack_from("<II", mbr, 446 + 8) == (1, 0xFFFFFFFF)


def test_what_was_written_is_read():
    layout = lay_out(Room("a ü", Kind.ROOT, MIB), Room("x" * 36, Kind.ROOT, 7))
    assert gpt.parse(layout.head(), size_bytes=layout.size_bytes, place="x") == layout


@pytest.mark.parametrize(
    ("rooms", "message"),
    [
        ([Room("", Kind.ROOT, 1)], "name"),
        ([Room("x" * 37, Kind.ROOT, 1)], "name"),
        ([Room("💥" * 19, Kind.ROOT, 1)], "name"),
        ([Room("a\nb", Kind.ROOT, 1)], "name"),
        ([Room("\ud800", Kind.ROOT, 1)], "name"),
        ([Room("a", Kind.ROOT, 1), Room("a", Kind.ESP, 1)], "two partitions"),
        ([Room("a", Kind.ROOT, 0)], "no size"),
        ([Room("a", Kind.ROOT, 1, fill=True), Room("b", Kind.ROOT, 1)], "last"),
        ([Room("a", Kind.ROOT, 64 << 40)], "volume"),
        ([Room(f"{n}", Kind.ROOT, 1) for n in range(129)], "more than a table has"),
    ],
)
def test_parts_that_cannot_be(rooms, message):
    with pytest.raises(UsageError, match=message):
        lay_out(*rooms)


def damaged(at, new):
    head = bytearray(lay_out().head())
    head[at : at + len(new)] = new
    return bytes(head)


def header(at, new):
    """Change a field, and mend the header's checksum."""
    head = bytearray(damaged(512 + at, new))
    head[512 + 16 : 512 + 20] = bytes(4)
    head[512 + 16 : 512 + 20] = struct.pack("<I", zlib.crc32(head[512 : 512 + 92]))
    return bytes(head)


def entry(at, new):
    """Change an entry, and mend both checksums."""
    head = damaged(1024 + at, new)
    crc = struct.pack("<I", zlib.crc32(head[1024:]))
    return header(88, crc)[:1024] + head[1024:]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "no GUID partition table"),
        (lay_out().head()[:1000], "no GUID partition table"),
        (damaged(512, b"X"), "no GUID partition table"),
        (damaged(512 + 60, b"X"), "header has a wrong checksum"),
        (damaged(1024 + 40, b"X"), "entries have a wrong checksum"),
        (lay_out().head()[:1024], "no size"),
        (header(12, struct.pack("<I", 91)), "header is of no size"),
        (header(12, struct.pack("<I", 513)), "header is of no size"),
        (header(24, struct.pack("<Q", 2)), "wrong checksum"),
        (header(32, struct.pack("<Q", 1 << 21)), "cut short"),
        (header(80, struct.pack("<I", 1 << 30)), "no size"),
        (header(84, struct.pack("<I", 0)), "no size"),
        (entry(32, struct.pack("<Q", 2047)), "partition 1 lies outside"),
        (entry(128 + 40, struct.pack("<Q", 1 << 21)), "partition 2 lies outside"),
        (entry(128 + 40, struct.pack("<Q", 2048)), "partition 2 lies outside"),
    ],
)
def test_a_damaged_table_is_refused(head, message):
    with pytest.raises(DamagedError, match=message) as caught:
        gpt.parse(head, size_bytes=1 << 30, place="the disk")
    assert caught.value.place == "the disk"


def test_a_disk_that_is_cut_short():
    with pytest.raises(DamagedError, match="cut short"):
        gpt.parse(lay_out().head(), size_bytes=(1 << 30) - 512, place="x")
