"""The partition table: protective MBR, header and entries of GPT, and their backup.

Source: UEFI Specification 2.10, chapter 5; the UAPI group's Discoverable Partitions Specification for the types.
Sectors are of 512 bytes, as EBS volumes have them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from calve.disk.inspect.findings import Check, Findings, FlawError
from calve.disk.inspect.source import Source

__all__ = ["SECTOR_BYTES", "TYPES", "Partition", "Table", "read"]

SECTOR_BYTES = 512

TYPES = {
    UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"): "esp",
    UUID("bc13c2ff-59e6-4262-a352-b275fd6f7172"): "xbootldr",
    UUID("0fc63daf-8483-4772-8e79-3d69d8477de4"): "linux",
    UUID("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"): "swap",
    UUID("4d21b016-b534-45c2-a9fb-5c16e091fd2d"): "var",
    UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"): "root-x86-64",
    UUID("b921b045-1df0-41c3-af44-4c6f280d3fae"): "root-arm64",
    UUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5"): "root-x86-64-verity",
    UUID("df3300ce-d69f-4c92-978c-9bfb0f38d820"): "root-arm64-verity",
    UUID("8484680c-9521-48c6-9c11-b0720656f69e"): "usr-x86-64",
    UUID("b0e01050-ee5f-4390-949a-9101b17104e9"): "usr-arm64",
    UUID("77ff5f63-e7b6-4633-acf4-1565b864c0e6"): "usr-x86-64-verity",
    UUID("6e11a4e7-fbca-4ded-b9e9-e1a512bb664e"): "usr-arm64-verity",
}

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_MBR_ENTRY = struct.Struct("<BxxxBxxxII")
_MBR_PROTECTIVE = 0xEE
_MAX_ENTRIES_BYTES = 64 << 10  # 512 of them; tools make 128
_MIN_ENTRIES_BYTES = 16 << 10
_ALIGNMENT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Partition:
    """One entry: its number from 1, type, own GUID, place in sectors (both inclusive) and name."""

    number: int
    type_guid: UUID
    guid: UUID
    first_lba: int
    last_lba: int
    attributes: int
    name: str

    @property
    def type(self) -> str:
        """Return the type by its name in `TYPES`, or the GUID."""
        return TYPES.get(self.type_guid, str(self.type_guid))

    @property
    def start_bytes(self) -> int:
        """Return where it begins."""
        return self.first_lba * SECTOR_BYTES

    @property
    def size_bytes(self) -> int:
        """Return how long it is."""
        return (self.last_lba - self.first_lba + 1) * SECTOR_BYTES


@dataclass(frozen=True, slots=True)
class Table:
    """What a disk is divided into: its GUID, the sectors that partitions may use, and the partitions."""

    guid: UUID
    first_usable_lba: int
    last_usable_lba: int
    partitions: tuple[Partition, ...]


@dataclass(frozen=True, slots=True)
class _Header:
    lba: int
    alternate: int
    first_usable: int
    last_usable: int
    guid: bytes
    entries_lba: int
    count: int
    entry_size: int
    entries_crc: int

    @property
    def entries_bytes(self) -> int:
        return self.count * self.entry_size

    @property
    def entries_sectors(self) -> int:
        return -(-self.entries_bytes // SECTOR_BYTES)

    @property
    def shared(self) -> tuple[object, ...]:
        """Return what must be the same in the other header."""
        return (
            self.first_usable, self.last_usable, self.guid, self.count, self.entry_size,
            self.entries_crc,
        )  # fmt: skip


def read(source: Source, findings: Findings) -> Table | None:
    """Read the table of a disk, from the backup where the primary is damaged; None where both are.

    What is wrong goes to `findings`.
    """
    sectors, rest = divmod(source.size, SECTOR_BYTES)
    if rest or sectors < 6:
        message = f"{source.size} bytes are no disk of 512-byte sectors"
        findings.add(Check.DISK_SIZE, "disk", message)
        if sectors < 6:
            return None
    with findings.catching(Check.MBR_MISSING, "mbr"):
        _check_mbr(source.read(0, SECTOR_BYTES), sectors)
    primary = backup = entries = backup_entries = None
    with findings.catching(Check.GPT_DAMAGED, "gpt header"):
        primary = _header(source, 1)
    if primary is not None and primary.alternate != sectors - 1:
        message = (
            f"its backup is said to be in sector {primary.alternate}; the last is {sectors - 1}"
        )
        findings.add(Check.GPT_BACKUP_MISPLACED, "gpt header", message)
    with findings.catching(Check.GPT_BACKUP_DAMAGED, "gpt backup header"):
        backup = _backup(source, sectors - 1)
        backup_entries = _entries(source, backup, Check.GPT_BACKUP_DAMAGED)
    if primary is not None:
        with findings.catching(Check.GPT_ENTRIES_DAMAGED, "gpt entries"):
            entries = _entries(source, primary, Check.GPT_ENTRIES_DAMAGED)
    if primary is not None and backup is not None:
        _check_agreement(primary, backup, findings)
    if primary is not None and entries is not None:
        return _table(primary, entries, sectors, findings)
    if backup is not None and backup_entries is not None:
        return _table(backup, backup_entries, sectors, findings)
    return None


def _check_mbr(sector: bytes, sectors: int) -> None:
    if sector[510:] != b"\x55\xaa":
        raise FlawError(Check.MBR_MISSING, "no master boot record: its signature is missing")
    _, kind, start, size = _MBR_ENTRY.unpack_from(sector, 446)
    if (
        kind != _MBR_PROTECTIVE
        or start != 1
        or size not in {min(sectors - 1, 0xFFFFFFFF), 0xFFFFFFFF}
    ):
        message = (
            f"its first entry is of type {kind:#04x}, from sector {start}, {size} sectors long"
        )
        raise FlawError(Check.MBR_NOT_PROTECTIVE, message)
    if any(sector[462:510]):
        raise FlawError(Check.MBR_NOT_PROTECTIVE, "it has more than the protective entry")


def _header(source: Source, lba: int) -> _Header:
    sector = source.read(lba * SECTOR_BYTES, SECTOR_BYTES)
    (
        magic, revision, size, crc, reserved, own, alternate, first, last, guid, entries_lba, count,
        entry_size, entries_crc,
    ) = _HEADER.unpack_from(sector)  # fmt: skip
    if magic != b"EFI PART":
        raise FlawError(Check.GPT_DAMAGED, f"sector {lba} has no GPT header")
    if revision != 0x10000 or not _HEADER.size <= size <= SECTOR_BYTES or reserved:
        message = f"revision {revision:#x}, {size} bytes: no header"
        raise FlawError(Check.GPT_DAMAGED, message)
    found = zlib.crc32(sector[:16] + bytes(4) + sector[20:size])
    if found != crc:
        message = f"its CRC is {crc:08x}, its bytes have {found:08x}"
        raise FlawError(Check.GPT_DAMAGED, message)
    if own != lba:
        raise FlawError(Check.GPT_DAMAGED, f"it says that it is in sector {own}, it is in {lba}")
    header = _Header(lba, alternate, first, last, guid, entries_lba, count, entry_size, entries_crc)
    power_of_two = entry_size >= _ENTRY.size and not entry_size & (entry_size - 1)
    if not power_of_two or not 0 < header.entries_bytes <= _MAX_ENTRIES_BYTES:
        raise FlawError(Check.GPT_DAMAGED, f"{count} entries of {entry_size} bytes")
    return header


def _backup(source: Source, lba: int) -> _Header:
    try:
        return _header(source, lba)
    except FlawError as error:
        raise FlawError(Check.GPT_BACKUP_DAMAGED, error.message) from error


def _entries(source: Source, header: _Header, check: Check) -> bytes:
    data = source.read(header.entries_lba * SECTOR_BYTES, header.entries_bytes)
    found = zlib.crc32(data)
    if found != header.entries_crc:
        message = f"the entries' CRC is {header.entries_crc:08x}, their bytes have {found:08x}"
        raise FlawError(check, message)
    return data


def _check_agreement(primary: _Header, backup: _Header, findings: Findings) -> None:
    if primary.shared != backup.shared:
        message = "it does not say the same as the primary header"
        findings.add(Check.GPT_BACKUP_DIFFERS, "gpt backup header", message)
    if backup.alternate != primary.lba:
        message = f"the primary is said to be in sector {backup.alternate}"
        findings.add(Check.GPT_BACKUP_DIFFERS, "gpt backup header", message)
    if not 2 <= primary.entries_lba <= primary.first_usable - primary.entries_sectors:
        message = (
            f"its entries begin in sector {primary.entries_lba}: no room before the partitions"
        )
        findings.add(Check.GPT_USABLE_RANGE, "gpt header", message)
    if not backup.last_usable < backup.entries_lba <= backup.lba - backup.entries_sectors:
        message = f"its entries begin in sector {backup.entries_lba}: no room behind the partitions"
        findings.add(Check.GPT_USABLE_RANGE, "gpt backup header", message)


def _table(header: _Header, data: bytes, sectors: int, findings: Findings) -> Table:
    reserved = -(-max(header.entries_bytes, _MIN_ENTRIES_BYTES) // SECTOR_BYTES)
    first, last = header.first_usable, header.last_usable
    if not (2 + reserved <= first <= last <= sectors - 2 - reserved):
        message = f"partitions may use sectors {first} to {last} of {sectors}"
        findings.add(Check.GPT_USABLE_RANGE, "gpt header", message)
    partitions = tuple(_partitions(data, header.entry_size))
    for partition in partitions:
        _check_partition(partition, header, sectors, findings)
    _check_pairs(partitions, findings)
    return Table(UUID(bytes_le=header.guid), first, last, partitions)


def _partitions(data: bytes, entry_size: int) -> list[Partition]:
    found = []
    for number, at in enumerate(range(0, len(data), entry_size), 1):
        kind, guid, first, last, attributes, name = _ENTRY.unpack_from(data, at)
        if any(kind):
            text = name.decode("utf-16-le", "replace").partition("\0")[0]
            found.append(
                Partition(
                    number, UUID(bytes_le=kind), UUID(bytes_le=guid), first, last, attributes, text
                )
            )
    return found


def _check_partition(
    partition: Partition, header: _Header, sectors: int, findings: Findings
) -> None:
    place = f"partition {partition.number}"
    first, last = partition.first_lba, partition.last_lba
    inside = header.first_usable <= first <= last <= header.last_usable
    if not inside or last >= sectors:
        message = f"sectors {first} to {last} are not all among those that partitions may use"
        findings.add(Check.GPT_PARTITION_OUTSIDE, place, message)
    if partition.start_bytes % _ALIGNMENT_BYTES:
        message = f"it begins at byte {partition.start_bytes}, no multiple of {_ALIGNMENT_BYTES}"
        findings.add(Check.GPT_PARTITION_UNALIGNED, place, message)


def _check_pairs(partitions: Sequence[Partition], findings: Findings) -> None:
    ordered = sorted(partitions, key=lambda partition: partition.first_lba)
    reach: Partition | None = None  # the one that goes furthest of those before
    for partition in ordered:
        if reach is not None and partition.first_lba <= reach.last_lba:
            message = f"it overlaps partition {reach.number}"
            place = f"partition {partition.number}"
            findings.add(Check.GPT_PARTITIONS_OVERLAP, place, message)
        if reach is None or partition.last_lba > reach.last_lba:
            reach = partition
    seen: dict[UUID, int] = {}
    for partition in partitions:
        other = seen.setdefault(partition.guid, partition.number)
        if other != partition.number:
            message = f"partition {other} has the same GUID"
            findings.add(Check.GPT_GUID_TWICE, f"partition {partition.number}", message)
