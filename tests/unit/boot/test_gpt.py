"""The table of a GPT disk: what is read, what is refused, and when a partition grows."""

from __future__ import annotations

import importlib.util
import struct
import sys
from pathlib import Path

import pytest

from calve.boot import gpt
from calve.boot.gpt import Entry, Header, Table
from calve.errors import CalveError, DamagedError

_spec = importlib.util.spec_from_file_location("gptdisk", Path(__file__).with_name("gptdisk.py"))
gptdisk = importlib.util.module_from_spec(_spec)
sys.modules["gptdisk"] = gptdisk
_spec.loader.exec_module(gptdisk)

SECTORS = 65536
MIB = 2048
BLANK = [bytes(128)] * 126


def table(disk):
    return Table.read(disk.read, disk.sector_bytes, "/dev/vda")


def plan(disk, number=2):
    return gpt.plan(table(disk), number, disk.size_bytes, "/dev/vda")


def larger(disk, sectors):
    disk.sectors += sectors
    return disk


def make(*entries, **changes):
    return gptdisk.make(SECTORS, [*entries, *BLANK], **changes)


def test_what_is_read():
    found = table(gptdisk.simple())
    assert found.entries == (Entry(1, 2048, 18431), Entry(2, 18432, SECTORS - 35))
    assert (found.header.my_lba, found.header.alternate_lba) == (1, SECTORS - 1)
    assert (found.header.entries_lba, found.entry_sectors) == (2, 32)
    assert found.entry(2) == found.entries[1]


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_a_header_is_written_as_it_was_read(sector_bytes):
    disk = gptdisk.simple(sector_bytes=sector_bytes)
    sector = disk.read(sector_bytes, sector_bytes)
    assert Header.parse(sector, 1).dump() == sector


def test_what_follows_the_known_fields_of_a_header_is_kept():
    disk = gptdisk.simple()
    header = Header.parse(disk.read(512, 512), 1)
    longer = Header(
        **{name: getattr(header, name) for name in Header.__slots__}
        | {"header_bytes": 100, "rest": b"whatever".ljust(420, b"x")}
    )
    assert Header.parse(longer.dump(), 1) == longer
    with pytest.raises(DamagedError, match="header is damaged"):
        Header.parse(longer.dump().replace(b"whatever", b"whatevil"), 1)


# What is refused


def flip(disk, lba, at):
    """Change a bit."""
    sector = bytearray(disk.data[lba])
    sector[at] ^= 1
    disk.data[lba] = bytes(sector)


@pytest.mark.parametrize(
    ("lba", "at", "message"),
    [
        (0, 450, "no GPT disk"),
        (0, 454, "no GPT disk"),
        (0, 466, "no GPT disk"),  # a second record: a hybrid
        (0, 511, "no GPT disk"),
        (1, 0, "no GPT header"),
        (1, 12, "header is damaged"),
        (1, 13, "header is damaged"),
        (1, 48, "header is damaged"),
        (2, 0, "entries are damaged"),
        (33, 511, "entries are damaged"),
    ],
)
def test_damage_is_refused_with_its_place(lba, at, message):
    disk = larger(gptdisk.simple(), 2 * MIB)
    flip(disk, lba, at)
    with pytest.raises(DamagedError, match=message) as caught:
        plan(disk)
    assert caught.value.place == "/dev/vda"


def test_the_boot_code_and_the_backup_are_not_looked_at():
    disk = gptdisk.simple()
    flip(disk, 0, 0)
    flip(disk, SECTORS - 1, 0)
    assert table(disk).entries


def test_a_header_of_another_place():
    disk = gptdisk.simple()
    disk.data[1] = disk.data[SECTORS - 1]
    with pytest.raises(DamagedError, match=f"that of sector {SECTORS - 1}"):
        table(disk)


@pytest.mark.parametrize("size", [91, 513, 0, 1 << 31])
def test_a_header_of_an_impossible_size(size):
    with pytest.raises(DamagedError, match="header is damaged"):
        table(make(gptdisk.entry(2048, 4095), size=size))


@pytest.mark.parametrize("changes", [{"entry_bytes": 256}, {"count": 1025}, {"count": 0}])
def test_entries_of_a_kind_that_is_not_known(changes):
    with pytest.raises(DamagedError, match="is not known"):
        table(make(gptdisk.entry(2048, 4095), **changes))


def test_a_disk_that_ends_too_early():
    disk = gptdisk.simple()
    for sectors in (0, 1, 2, 33):
        disk.sectors = sectors
        with pytest.raises(DamagedError):
            table(disk)


@pytest.mark.parametrize("lba", [0, 1, (1 << 64) - 1, 1 << 40])
def test_entries_nowhere(lba):
    disk = gptdisk.simple()
    raw = disk.read(1024, 16384)
    disk.put(1, gptdisk.header(1, SECTORS - 1, 34, SECTORS - 34, lba, raw))
    with pytest.raises(DamagedError, match="GPT entries at sector"):
        table(disk)


@pytest.mark.parametrize(
    "entries",
    [
        [gptdisk.entry(2048, 4095), gptdisk.entry(4095, 6000)],  # they overlap
        [gptdisk.entry(4095, 6000), gptdisk.entry(2048, 9000)],
        [gptdisk.entry(2048, 2047)],  # ends before it begins
        [gptdisk.entry(33, 4095)],  # on the table
        [gptdisk.entry(2048, SECTORS - 33)],  # on the backup
        [gptdisk.entry(2048, (1 << 64) - 1)],
    ],
)
def test_a_table_that_contradicts_itself(entries):
    with pytest.raises(DamagedError, match="contradicts itself"):
        table(make(*entries))


def test_entries_in_the_space_for_partitions():
    disk = gptdisk.simple()
    raw = disk.read(1024, 16384)
    disk.put(1, gptdisk.header(1, SECTORS - 1, 33, SECTORS - 34, 2, raw))
    with pytest.raises(DamagedError, match="contradicts itself"):
        table(disk)


def test_a_table_of_a_larger_disk():
    disk = larger(gptdisk.simple(), -10)
    with pytest.raises(DamagedError, match="larger disk"):
        plan(disk)


def test_a_partition_that_the_table_does_not_have():
    with pytest.raises(DamagedError, match="no partition 3"):
        plan(larger(gptdisk.simple(), 2 * MIB), 3)


# The decision


def test_it_grows_by_a_mebibyte_and_not_by_less():
    # The end moves by whole blocks of 4 KiB; at first it is 34 sectors and 6 before the disk's.
    assert plan(gptdisk.simple()) is None
    assert plan(larger(gptdisk.simple(root_end=SECTORS - 41), MIB - 8)) is None
    grown = plan(larger(gptdisk.simple(root_end=SECTORS - 41), MIB))
    assert grown.last_lba == SECTORS + MIB - 41


def test_a_partition_that_is_not_the_last_one_stays():
    assert plan(larger(gptdisk.simple(), 2 * MIB), 1) is None


def test_the_last_one_is_so_by_its_place_not_by_its_number():
    entries = (gptdisk.entry(20000, 40000, mark=1), gptdisk.entry(2048, 10000, mark=2))
    assert plan(larger(make(*entries), MIB), 2) is None
    assert plan(larger(make(*entries), MIB), 1).last_lba > 40000


def test_without_room_for_a_second_table_nothing_is_done():
    disk = larger(make(gptdisk.entry(65, 4095)), 2 * MIB)
    with pytest.raises(CalveError, match="no room for a second GPT") as caught:
        plan(disk, 1)
    assert not isinstance(caught.value, DamagedError)
    assert plan(larger(make(gptdisk.entry(66, 4095)), 2 * MIB), 1) is not None


def test_entries_take_turns_at_two_places():
    disk = larger(gptdisk.simple(), 2 * MIB)
    places = []
    for _ in range(3):
        for step in plan(disk).steps:
            disk.write(step)
        header = table(disk).header
        places.append((header.entries_lba, header.first_usable_lba))
        larger(disk, 2 * MIB)
    assert places == [(34, 66), (2, 66), (34, 66)]


def test_the_order_of_the_writes():
    grown = plan(larger(gptdisk.simple(), 2 * MIB))
    last = SECTORS + 2 * MIB - 1
    places = [
        [(write.offset_bytes // 512, len(write.data) // 512) for write in step]
        for step in grown.steps
    ]
    assert places == [[(last - 32, 32), (last, 1)], [(34, 32), (0, 1)], [(1, 1)]]


def test_a_disk_that_no_mbr_can_describe():
    disk = gptdisk.simple()
    disk.sectors = (1 << 33) + 8
    (_, (_, boot), _) = plan(disk).steps
    assert struct.unpack_from("<I", boot.data, 458) == (0xFFFFFFFF,)
