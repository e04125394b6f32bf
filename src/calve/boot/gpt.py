"""The table of a GPT disk: read and checked, and how its last partition grows to the disk's end, power cuts or not.

Firmware and Linux go by the primary header, in the disk's second sector; Linux by nothing else (it reads the backup
only where it was told `gpt`). A disk writes one sector whole or not at all, and several in any order, so the old table
stays whole until one sector names the new one. What `Plan.steps` writes, each step durable before the next:
  1. backup entries and backup header at the disk's new end   no partition is there, and no header points there yet
                                                              (where one does, a cut spoils a spare copy)
  2. primary entries beside the old ones, which stay; the     no header points there; a protective record of the old
     protective MBR's size                                    size and of the new one are both taken
  3. the primary header                                       one sector: with it the new entries, the new backup and
                                                              the new end of the partition count, or none of them
After a cut in 1 or 2 the old table stands, and the next boot begins again. A page cache may write the sectors around
these along: with the bytes that they have.
The primary entries lie at sector 2 and behind that place by turns; FirstUsableLBA leaves room for both.

Sources: UEFI 2.10, 5.2.3 (protective MBR), 5.3.2 and 5.3.3 (header, entries); Linux, block/partitions/efi.c.
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

from calve.errors import CalveError, DamagedError

__all__ = ["GAIN_BYTES", "Entry", "Header", "Plan", "Table", "Write", "plan"]

GAIN_BYTES: Final = 1 << 20
"""The least for which anything is written."""

_SIGNATURE: Final = b"EFI PART"
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY: Final = struct.Struct("<16s16sQQ")
_ENTRY_BYTES: Final = 128  # the only size that Linux takes
_MOST_ENTRIES: Final = 1024
_UNUSED: Final = bytes(16)
_FIRST_ENTRIES_LBA: Final = 2
_MOST_ENTRIES_LBA: Final = 1 << 32
_ALIGN_BYTES: Final = 4096

_MBR_BYTES: Final = 512
_MBR_RECORDS: Final = range(446, 510, 16)
_MBR_RECORD: Final = struct.Struct("<4sB3sII")  # status and CHS, type, CHS, first sector, sectors
_MBR_MAGIC: Final = b"\x55\xaa"
_PROTECTIVE: Final = 0xEE
_MBR_MOST: Final = 0xFFFFFFFF

Read = Callable[[int, int], bytes]
"""Reads (offset, size) in bytes; fewer come back where the disk ends."""


@dataclass(frozen=True, slots=True)
class Header:
    """A header of the table; positions in logical sectors, `rest` is what follows the known fields in its sector."""

    revision: int
    header_bytes: int
    rest: bytes
    my_lba: int
    alternate_lba: int
    first_usable_lba: int
    last_usable_lba: int
    disk_guid: bytes
    entries_lba: int
    entry_count: int
    entry_bytes: int
    entries_crc: int

    @classmethod
    def parse(cls, sector: bytes, lba: int, place: object = None) -> Self:
        """Read the header that a sector holds.

        Raises:
            DamagedError: it is none, or not a whole one, or one of another place.
        """
        if sector[:8] != _SIGNATURE or len(sector) < _HEADER.size:
            raise DamagedError("no GPT header", place=place)
        _, revision, size, crc, _, *fields = _HEADER.unpack_from(sector)
        if not _HEADER.size <= size <= len(sector) or _header_crc(sector, size) != crc:
            raise DamagedError("the GPT header is damaged", place=place)
        header = cls(revision, size, sector[_HEADER.size :], *fields)
        if header.my_lba != lba:
            raise DamagedError(f"the GPT header is that of sector {header.my_lba}", place=place)
        return header

    def dump(self) -> bytes:
        """Return its sector, with a checksum that is right."""
        fields = (
            *(self.my_lba, self.alternate_lba, self.first_usable_lba, self.last_usable_lba),
            *(self.disk_guid, self.entries_lba, self.entry_count, self.entry_bytes),
            self.entries_crc,
        )

        def packed(crc: int) -> bytes:
            head = (_SIGNATURE, self.revision, self.header_bytes, crc, 0)
            return _HEADER.pack(*head, *fields) + self.rest

        return packed(_header_crc(packed(0), self.header_bytes))


@dataclass(frozen=True, slots=True)
class Entry:
    """A partition: its number from 1, its first and its last sector."""

    number: int
    first_lba: int
    last_lba: int


@dataclass(frozen=True, slots=True)
class Table:
    """What a disk says of its partitions, checked: they are in their order and do not overlap.

    Attributes:
        sector_bytes: of a logical sector.
        mbr: the first sector.
        header: the primary one.
        raw: the bytes of all entries.
        entries: those that are used, by their place on the disk.
    """

    sector_bytes: int
    mbr: bytes
    header: Header
    raw: bytes
    entries: tuple[Entry, ...]

    @classmethod
    def read(cls, read: Read, sector_bytes: int, place: object = None) -> Self:
        """Read the primary table; the backup is not looked at.

        Raises:
            DamagedError: there is none, or it contradicts itself.
        """
        mbr = read(0, sector_bytes)
        if not _is_protective(mbr):
            raise DamagedError("no GPT disk: its MBR is not a protective one", place=place)
        header = Header.parse(read(sector_bytes, sector_bytes), 1, place)
        if header.entry_bytes != _ENTRY_BYTES or not 0 < header.entry_count <= _MOST_ENTRIES:
            raise DamagedError(
                f"a GPT of {header.entry_count} entries of {header.entry_bytes} bytes is not known",
                place=place,
            )
        if not _FIRST_ENTRIES_LBA <= header.entries_lba <= _MOST_ENTRIES_LBA:
            raise DamagedError(f"GPT entries at sector {header.entries_lba}", place=place)
        raw = read(header.entries_lba * sector_bytes, header.entry_count * _ENTRY_BYTES)
        if len(raw) != header.entry_count * _ENTRY_BYTES or zlib.crc32(raw) != header.entries_crc:
            raise DamagedError("the GPT's entries are damaged", place=place)
        table = cls(sector_bytes, mbr, header, raw, _used(raw))
        if not table.is_sound():
            raise DamagedError("the GPT contradicts itself", place=place)
        return table

    @property
    def entry_sectors(self) -> int:
        """Return how many sectors the entries take."""
        return -(-len(self.raw) // self.sector_bytes)

    def entry(self, number: int, place: object = None) -> Entry:
        """Return a partition by its number; DamagedError where there is no such one."""
        for entry in self.entries:
            if entry.number == number:
                return entry
        raise DamagedError(f"the GPT has no partition {number}", place=place)

    def is_sound(self) -> bool:
        """Say whether header, entries and partitions each have a place of their own."""
        header = self.header
        at = header.first_usable_lba
        if header.entries_lba + self.entry_sectors > at:
            return False
        for entry in self.entries:
            if not at <= entry.first_lba <= entry.last_lba:
                return False
            at = entry.last_lba + 1
        return at <= header.last_usable_lba + 1


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes to be written at an offset of the disk; whole sectors."""

    offset_bytes: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """How a partition grows.

    Attributes:
        steps: what is written, a step durable before the next.
        last_lba: of the partition afterwards.
    """

    steps: tuple[tuple[Write, ...], ...]
    last_lba: int


def plan(table: Table, number: int, disk_bytes: int, place: object = None) -> Plan | None:
    """Decide how a partition grows to the end of its disk.

    Args:
        table: of the disk.
        number: of the partition, from 1.
        disk_bytes: size of the disk.
        place: the disk, in errors.

    Returns:
        None where it is not the last one, or would grow by less than `GAIN_BYTES`.

    Raises:
        DamagedError: the table does not know the partition, or describes a larger disk.
        CalveError: there is no room for a second copy of the entries.
    """
    old = table.header
    last_lba = disk_bytes // table.sector_bytes - 1
    ours = table.entry(number, place)
    if old.last_usable_lba >= last_lba or old.alternate_lba > last_lba:
        raise DamagedError("the GPT is that of a larger disk", place=place)
    last_usable_lba = last_lba - table.entry_sectors - 1
    step = max(1, _ALIGN_BYTES // table.sector_bytes)
    end_lba = (last_usable_lba + 1) // step * step - 1
    if ours != table.entries[-1] or (end_lba - ours.last_lba) * table.sector_bytes < GAIN_BYTES:
        return None
    raw = _with_end(table.raw, number, end_lba)
    entries_lba = _free_place(table, place)
    primary = dataclasses.replace(
        old,
        alternate_lba=last_lba,
        first_usable_lba=max(old.first_usable_lba, entries_lba + table.entry_sectors),
        last_usable_lba=last_usable_lba,
        entries_lba=entries_lba,
        entries_crc=zlib.crc32(raw),
    )
    return Plan(_steps(table, primary, raw), end_lba)


def _steps(table: Table, primary: Header, raw: bytes) -> tuple[tuple[Write, ...], ...]:
    last_lba = primary.alternate_lba
    backup = dataclasses.replace(
        primary, my_lba=last_lba, alternate_lba=1, entries_lba=last_lba - table.entry_sectors
    )
    padded = raw.ljust(table.entry_sectors * table.sector_bytes, b"\0")

    def write(lba: int, data: bytes) -> Write:
        return Write(lba * table.sector_bytes, data)

    return (
        (write(backup.entries_lba, padded), write(last_lba, backup.dump())),
        (write(primary.entries_lba, padded), write(0, _with_size(table.mbr, last_lba))),
        (write(1, primary.dump()),),
    )


def _free_place(table: Table, place: object) -> int:
    """Return where the entries go while the old ones stay: before the first partition, at one of two places."""
    old, size = table.header.entries_lba, table.entry_sectors
    for lba in (_FIRST_ENTRIES_LBA, _FIRST_ENTRIES_LBA + size):
        apart = lba + size <= old or old + size <= lba
        if apart and lba + size <= table.entries[0].first_lba:
            return lba
    raise CalveError("no room for a second GPT before the first partition", place=place)


def _used(raw: bytes) -> tuple[Entry, ...]:
    found = []
    for index in range(len(raw) // _ENTRY_BYTES):
        kind, _, first_lba, last_lba = _ENTRY.unpack_from(raw, index * _ENTRY_BYTES)
        if kind != _UNUSED:
            found.append(Entry(index + 1, first_lba, last_lba))
    return tuple(sorted(found, key=lambda entry: entry.first_lba))


def _with_end(raw: bytes, number: int, last_lba: int) -> bytes:
    """Return the entries with another end of one partition."""
    changed = bytearray(raw)
    struct.pack_into("<Q", changed, (number - 1) * _ENTRY_BYTES + 40, last_lba)
    return bytes(changed)


def _header_crc(sector: bytes, size: int) -> int:
    """Return the checksum of a header: that of its bytes with the checksum's own as zeros."""
    return zlib.crc32(sector[20:size], zlib.crc32(bytes(4), zlib.crc32(sector[:16])))


def _is_protective(mbr: bytes) -> bool:
    """Say whether an MBR has one record, which covers the disk; beside others it would be a hybrid one."""
    records = [_MBR_RECORD.unpack_from(mbr, at) for at in _MBR_RECORDS if len(mbr) >= _MBR_BYTES]
    used = [(kind, first_lba) for _, kind, _, first_lba, _ in records if kind]
    return used == [(_PROTECTIVE, 1)] and mbr[510:512] == _MBR_MAGIC


def _with_size(mbr: bytes, last_lba: int) -> bytes:
    """Return a protective MBR that covers a disk up to a sector."""
    at = next(at for at in _MBR_RECORDS if mbr[at + 4])
    changed = bytearray(mbr)
    struct.pack_into("<I", changed, at + 12, min(last_lba, _MBR_MOST))
    return bytes(changed)
