"""Partition tables: as sfdisk and sgdisk write them, and each way in which they can be wrong."""

from __future__ import annotations

import re
import struct
import zlib
from uuid import UUID

import pytest

from calve.disk.inspect import gpt

MIB = 1 << 20
SECTORS = 8 * MIB // 512
SCRIPT = """label: gpt
label-id: 00000000-0000-4000-8000-000000000001
start=2048, size=4096, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="boot", uuid=00000000-0000-4000-8000-000000000002
start=6144, size=8192, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, name="räksmörgås"
"""


@pytest.fixture(scope="module")
def pristine(tools, tmp_path_factory):
    image = tmp_path_factory.mktemp("gpt") / "disk"
    with image.open("wb") as out:
        out.truncate(SECTORS * 512)
    tools.run("sfdisk", "-q", image, input=SCRIPT.encode())
    return image.read_bytes()


@pytest.fixture
def disk(tools, pristine):
    return tools.memory(pristine)


def sign(disk, lba):
    """Make a header's checksums right again, for its entries as they are."""
    at = lba * 512
    entries, count, size = struct.unpack_from("<QII", disk.data, at + 72)
    crc = zlib.crc32(disk.data[entries * 512 : entries * 512 + count * size])
    struct.pack_into("<I", disk.data, at + 88, crc)
    struct.pack_into("<I", disk.data, at + 16, 0)
    struct.pack_into("<I", disk.data, at + 16, zlib.crc32(disk.data[at : at + 92]))


def patch(disk, form, at, *values, lbas=(1, SECTORS - 1)):
    """Write into both headers, and sign them."""
    for lba in lbas:
        struct.pack_into(form, disk.data, lba * 512 + at, *values)
        sign(disk, lba)


def patch_entry(disk, number, form, at, *values):
    """Write into an entry of both tables, and sign them."""
    for lba, entries in ((1, 2), (SECTORS - 1, SECTORS - 33)):
        struct.pack_into(form, disk.data, entries * 512 + (number - 1) * 128 + at, *values)
        sign(disk, lba)


def test_what_sfdisk_wrote(disk, findings):
    table = gpt.read(disk, findings)
    assert not list(findings)
    assert table.guid == UUID("00000000-0000-4000-8000-000000000001")
    assert (table.first_usable_lba, table.last_usable_lba) == (2048, SECTORS - 34)
    boot, root = table.partitions
    assert (boot.number, boot.type, boot.name) == (1, "esp", "boot")
    assert boot.guid == UUID("00000000-0000-4000-8000-000000000002")
    assert (boot.start_bytes, boot.size_bytes) == (MIB, 2 * MIB)
    assert (root.number, root.type, root.name) == (2, "root-x86-64", "räksmörgås")
    assert (root.start_bytes, root.size_bytes) == (3 * MIB, 4 * MIB)


def test_what_sgdisk_wrote(tools, tmp_path, findings):
    image = tmp_path / "disk"
    image.write_bytes(bytes(8 * MIB))
    tools.run(
        "sgdisk", "-n", "3:4096:8191", "-t", "3:ef00", "-c", "3:x", "-n", "1:2048:4095", image
    )
    table = gpt.read(tools.memory(image.read_bytes()), findings)
    assert not list(findings)
    assert [(one.number, one.type) for one in table.partitions] == [(1, "linux"), (3, "esp")]


def test_the_types_are_sfdisk_s(tools):
    known = {}
    for line in tools.run("sfdisk", "--list-types", "--label", "gpt").decode().splitlines():
        match = re.match(r"([0-9A-F-]{36})\s+(.*)", line)
        if match:
            known[UUID(match[1])] = match[2]
    spelled = {
        "esp": "EFI System",
        "xbootldr": "Linux extended boot",
        "linux": "Linux filesystem",
        "swap": "Linux swap",
        "var": "Linux variable data",
    }
    for guid, name in gpt.TYPES.items():
        kind, _, rest = name.partition("-")
        wanted = spelled.get(name) or (
            f"Linux {kind} ".replace("usr", "/usr")
            + ("verity " if rest.endswith("-verity") else "")
            + {"x86": "(x86-64)", "arm64": "(ARM-64)"}[rest.split("-")[0]]
        )
        assert known[guid].lower() == wanted.lower()


def found(disk, findings):
    table = gpt.read(disk, findings)
    return table, [finding.check for finding in findings]


def test_a_damaged_primary_is_read_from_the_backup(disk, findings):
    disk.data[512 + 40] ^= 1
    table, names = found(disk, findings)
    assert names == ["gpt-damaged"]
    assert [one.type for one in table.partitions] == ["esp", "root-x86-64"]


def test_damaged_entries_are_read_from_the_backup(disk, findings):
    disk.data[1024 + 56] ^= 1
    table, names = found(disk, findings)
    assert names == ["gpt-entries-damaged"]
    assert table.partitions[0].name == "boot"


@pytest.mark.parametrize("at", [(SECTORS - 1) * 512 + 40, (SECTORS - 33) * 512 + 56])
def test_a_damaged_backup(disk, findings, at):
    disk.data[at] ^= 1
    table, names = found(disk, findings)
    assert names == ["gpt-backup-damaged"]
    assert len(table.partitions) == 2


def test_a_header_that_is_none_has_right_checksums(disk, findings):
    patch(disk, "<8s", 0, b"EFI PARX", lbas=[1])
    assert found(disk, findings)[1] == ["gpt-damaged"]


def test_a_usable_range_that_only_one_header_tells(disk, findings):
    patch(disk, "<Q", 40, 20, lbas=[SECTORS - 1])
    disk.data[512] ^= 1
    table, names = found(disk, findings)
    assert names == ["gpt-damaged", "gpt-usable-range"]
    assert table.first_usable_lba == 20


def test_both_are_damaged(disk, findings):
    disk.data[512] ^= 1
    disk.data[-512] ^= 1
    assert found(disk, findings) == (None, ["gpt-damaged", "gpt-backup-damaged"])


def test_entries_of_both_are_damaged(disk, findings):
    disk.data[1024 + 56] ^= 1
    disk.data[(SECTORS - 33) * 512 + 56] ^= 1
    assert found(disk, findings) == (None, ["gpt-backup-damaged", "gpt-entries-damaged"])


def test_a_backup_that_says_something_else(disk, findings):
    disk.data[(SECTORS - 33) * 512 + 56] ^= 1
    sign(disk, SECTORS - 1)
    assert found(disk, findings)[1] == ["gpt-backup-differs"]


def test_a_backup_that_does_not_know_the_primary(disk, findings):
    patch(disk, "<Q", 32, 5, lbas=[SECTORS - 1])
    assert found(disk, findings)[1] == ["gpt-backup-differs"]


def test_an_image_smaller_than_its_volume(disk, findings):
    """The volume is larger than the image: the backup is not at its end."""
    disk.data += bytes(MIB)
    table, names = found(disk, findings)
    assert names == ["mbr-not-protective", "gpt-backup-misplaced", "gpt-backup-damaged"]
    assert len(table.partitions) == 2


@pytest.mark.parametrize(
    ("form", "at", "values"),
    [
        ("<I", 8, [0x20000]),
        ("<I", 12, [600]),
        ("<I", 12, [91]),
        ("<I", 20, [1]),
        ("<I", 84, [100]),
        ("<I", 84, [64]),
        ("<I", 80, [0]),
        ("<I", 80, [1 << 20]),
        ("<Q", 24, [7]),
    ],
)
def test_headers_that_are_none(disk, findings, form, at, values):
    """What they say has right checksums and cannot be."""
    size = struct.unpack_from(form, struct.pack(form, *values))[0] if at == 12 else 92
    struct.pack_into(form, disk.data, 512 + at, *values)
    struct.pack_into("<I", disk.data, 512 + 16, 0)
    crc = zlib.crc32(disk.data[512 : 512 + min(size, 512)])
    struct.pack_into("<I", disk.data, 512 + 16, crc)
    assert found(disk, findings)[1] == ["gpt-damaged"]


@pytest.mark.parametrize(
    ("form", "at", "values"),
    [("<QQ", 40, [20, SECTORS - 34]), ("<QQ", 40, [34, SECTORS - 10]), ("<QQ", 40, [9, 8])],
)
def test_the_usable_range_reaches_into_the_tables(disk, findings, form, at, values):
    patch(disk, form, at, *values)
    assert "gpt-usable-range" in found(disk, findings)[1]


def test_entries_among_the_partitions(disk, findings):
    disk.data[3000 * 512 : 3000 * 512 + 16384] = disk.data[1024 : 1024 + 16384]
    patch(disk, "<Q", 72, 3000, lbas=[1])
    assert found(disk, findings)[1] == ["gpt-usable-range"]
    other = type(findings)()
    patch(disk, "<Q", 72, 2, lbas=[1])
    patch(disk, "<Q", 72, 3000, lbas=[SECTORS - 1])
    assert found(disk, other)[1] == ["gpt-usable-range"]


@pytest.mark.parametrize(
    ("number", "first", "last", "names"),
    [
        (1, 34, 2047, ["gpt-partition-outside", "gpt-partition-unaligned"]),
        (2, 6144, SECTORS - 10, ["gpt-partition-outside"]),
        (2, 1 << 60, 1 << 61, ["gpt-partition-outside"]),
        (2, 9000, 8000, ["gpt-partition-outside"]),
        (2, 6145, 9000, ["gpt-partition-unaligned"]),
        (2, 6136, 9000, ["gpt-partitions-overlap"]),
        (2, 2048, 2055, ["gpt-partitions-overlap"]),
        (2, 6144, 6144, []),
    ],
)
def test_places_of_partitions(disk, findings, number, first, last, names):
    patch_entry(disk, number, "<QQ", 32, first, last)
    assert found(disk, findings)[1] == names


def test_a_guid_that_two_have(disk, findings):
    guid = disk.data[1024 + 16 : 1024 + 32]
    patch_entry(disk, 2, "<16s", 16, bytes(guid))
    assert found(disk, findings)[1] == ["gpt-guid-twice"]


def test_no_mbr(disk, findings):
    disk.data[511] = 0
    assert found(disk, findings)[1] == ["mbr-missing"]


@pytest.mark.parametrize(("at", "value"), [(450, 0x83), (454, 2), (458, 1), (470, 0x83)])
def test_an_mbr_that_does_not_protect(disk, findings, at, value):
    disk.data[at] = value
    assert found(disk, findings)[1] == ["mbr-not-protective"]


def test_a_size_that_no_disk_has(tools, disk, findings):
    del disk.data[-1:]
    assert found(disk, findings)[1][0] == "disk-size"
    assert found(tools.memory(bytes(1024)), type(findings)())[1] == ["disk-size"]
    assert found(tools.memory(b""), type(findings)()) == (None, ["disk-size"])
