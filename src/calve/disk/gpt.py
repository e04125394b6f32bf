"""The partition table of a raw disk: where each partition lies, and the table's bytes.

Source: UEFI specification 2.10, chapter 5 (GUID Partition Table); types are those of the Discoverable Partitions
Specification (https://uapi-group.org/specifications/specs/discoverable_partitions_specification/). Sectors are of 512
bytes, as EBS volumes have them.

The same parts give the same table: every GUID follows from a seed. A writer of ours, because head and tail are all
that there is of it (34 and 33 sectors), and what is written goes into a disk of which only some blocks exist.
"""

from __future__ import annotations

import enum
import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from calve.disk.arch import AARCH64, X86_64, Arch
from calve.errors import DamagedError, UsageError

__all__ = [
    "SECTOR_BYTES",
    "Kind",
    "Layout",
    "Partition",
    "Room",
    "lay_out",
    "parse",
    "type_guid",
]

SECTOR_BYTES = 512

_ALIGN_BYTES = (
    1 << 20
)  # a partition never shares a block of 512 KiB with another, nor with the table
_GIB = 1 << 30
_MAX_BYTES = 64 << 40  # the largest volume of EBS (io2 Block Express)
_MAGIC = b"EFI PART"
_HEADER = struct.Struct("<8s4sIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_REVISION = b"\0\0\1\0"
_ENTRIES = 128
_NAME_CHARACTERS = 36


class Kind(enum.Enum):
    """What a partition is for; the value is the name that people know it by."""

    ESP = "EFI system partition"
    ROOT = "root"
    ROOT_VERITY = "root verity"
    STORE = "/usr"
    STORE_VERITY = "/usr verity"


_ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
_TYPES: dict[tuple[Kind, Arch], str] = {
    (Kind.ESP, X86_64): _ESP,
    (Kind.ESP, AARCH64): _ESP,
    (Kind.ROOT, X86_64): "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
    (Kind.ROOT, AARCH64): "b921b045-1df0-41c3-af44-4c6f280d3fae",
    (Kind.ROOT_VERITY, X86_64): "2c7357ed-ebd2-46d9-aec1-23d437ec2bf5",
    (Kind.ROOT_VERITY, AARCH64): "df3300ce-d69f-4c92-978c-9bfb0f38d820",
    (Kind.STORE, X86_64): "8484680c-9521-48c6-9c11-b0720656f69e",
    (Kind.STORE, AARCH64): "b0e01050-ee5f-4390-949a-9101b17104e9",
    (Kind.STORE_VERITY, X86_64): "77ff5f63-e7b6-4633-acf4-1565b864c0e6",
    (Kind.STORE_VERITY, AARCH64): "6e11a4e7-fbca-4ded-b9e9-e1a512bb664e",
}


def type_guid(kind: Kind, arch: Arch) -> uuid.UUID:
    """Return the type of a partition."""
    return uuid.UUID(_TYPES[kind, arch])


@dataclass(frozen=True, slots=True)
class Room:
    """A partition that is wanted.

    Attributes:
        name: its label, at most 36 UTF-16 code units, unlike all others.
        kind: what it is for.
        size_bytes: at least; rounded up to 1 MiB.
        fill: it takes what the disk has left; the last one only.
    """

    name: str
    kind: Kind
    size_bytes: int
    fill: bool = False


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition: label, type, its own GUID, where it begins and how long it is."""

    name: str
    type: uuid.UUID
    guid: uuid.UUID
    start_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A partition table.

    Attributes:
        guid: of the disk.
        size_bytes: of the disk.
        partitions: in the table's order.
    """

    guid: uuid.UUID
    size_bytes: int
    partitions: tuple[Partition, ...]

    def head(self) -> bytes:
        """Return the disk's first 34 sectors: protective MBR, header, entries."""
        entries = self._entries()
        return self._mbr() + self._header(1, self._sectors - 1, 2, entries) + entries

    def tail(self) -> bytes:
        """Return the disk's last 33 sectors: the entries again, the backup header."""
        entries = self._entries()
        last = self._sectors - 1
        return entries + self._header(last, 1, last - 32, entries)

    @property
    def _sectors(self) -> int:
        return self.size_bytes // SECTOR_BYTES

    def _mbr(self) -> bytes:
        """One partition of type 0xEE over all of the disk, or what 32 bits can say of it."""
        sectors = min(self._sectors - 1, 0xFFFFFFFF)
        record = struct.pack("<B3sB3sII", 0, b"\x00\x02\x00", 0xEE, b"\xff\xff\xff", 1, sectors)
        return (bytes(446) + record).ljust(510, b"\0") + b"\x55\xaa"

    def _entries(self) -> bytes:
        packed = b"".join(
            _ENTRY.pack(
                one.type.bytes_le,
                one.guid.bytes_le,
                one.start_bytes // SECTOR_BYTES,
                (one.start_bytes + one.size_bytes) // SECTOR_BYTES - 1,
                0,
                one.name.encode("utf-16-le"),
            )
            for one in self.partitions
        )
        return packed.ljust(_ENTRIES * _ENTRY.size, b"\0")

    def _header(self, own: int, other: int, table: int, entries: bytes) -> bytes:
        def packed(crc: int) -> bytes:
            return _HEADER.pack(
                *(_MAGIC, _REVISION, _HEADER.size, crc, 0, own, other),
                *(_ALIGN_BYTES // SECTOR_BYTES, self._sectors - 34, self.guid.bytes_le),
                *(table, _ENTRIES, _ENTRY.size, zlib.crc32(entries)),
            )

        return packed(zlib.crc32(packed(0))).ljust(SECTOR_BYTES, b"\0")


def lay_out(
    rooms: Sequence[Room], *, arch: Arch, seed: uuid.UUID, at_least_bytes: int = 0
) -> Layout:
    """Place partitions one after the other, from 1 MiB on; the disk is as many GiB as that takes.

    Args:
        rooms: in their order.
        arch: decides the types.
        seed: all GUIDs follow from it, and from the partitions' names.
        at_least_bytes: size of the disk: a snapshot never becomes smaller than its parent.

    Raises:
        UsageError: a name is too long or not unlike the others, a size is no size, or it is too much for a volume.
    """
    _check(rooms)
    start = _ALIGN_BYTES
    places = []
    for room in rooms:
        places.append((start, _up(room.size_bytes, _ALIGN_BYTES)))
        start += places[-1][1]
    size = _up(max(start + _ALIGN_BYTES, at_least_bytes), _GIB)
    if size > _MAX_BYTES:
        raise UsageError(f"{size >> 30} GiB are more than a volume has")
    if rooms and rooms[-1].fill:
        places[-1] = places[-1][0], size - _ALIGN_BYTES - places[-1][0]
    partitions = tuple(
        Partition(
            room.name,
            type_guid(room.kind, arch),
            uuid.uuid5(seed, f"partition {room.name}"),
            *place,
        )
        for room, place in zip(rooms, places, strict=True)
    )
    return Layout(uuid.uuid5(seed, "disk"), size, partitions)


def _check(rooms: Sequence[Room]) -> None:
    names = [room.name for room in rooms]
    for room in rooms:
        units = len(room.name.encode("utf-16-le", "surrogatepass")) // 2
        if not 0 < units <= _NAME_CHARACTERS or not room.name.isprintable():
            raise UsageError(f"{room.name!r} cannot be a partition's name")
        if names.count(room.name) > 1:
            raise UsageError(f"two partitions have the name {room.name!r}")
        if room.size_bytes <= 0:
            raise UsageError(f"the partition {room.name} has no size")
        if room.fill and room is not rooms[-1]:
            raise UsageError(f"only the last partition can fill the disk, not {room.name}")
    if len(rooms) > _ENTRIES:
        raise UsageError(f"{len(rooms)} partitions are more than a table has")


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def parse(head: bytes, *, size_bytes: int, place: object) -> Layout:
    """Read a table of anybody's.

    Args:
        head: the disk from its first sector on; as much as the table needs (17 KiB, unless it says otherwise).
        size_bytes: of the disk.
        place: the disk, for errors.

    Raises:
        DamagedError: there is none, a checksum is wrong, or it does not fit the disk.
    """
    fields = _read_header(head, place)
    other, first, last, guid, table, count, entry_bytes, entries_crc = fields
    if entry_bytes < _ENTRY.size or entry_bytes % 8 or count * entry_bytes > len(head):
        raise DamagedError("the partition table's entries are of no size", place=place)
    entries = head[table * SECTOR_BYTES :][: count * entry_bytes]
    if zlib.crc32(entries) != entries_crc:
        raise DamagedError("the partition table's entries have a wrong checksum", place=place)
    sectors = size_bytes // SECTOR_BYTES
    if other >= sectors or last >= sectors:
        raise DamagedError(
            "the disk is cut short: its partition table is for "
            f"{max(other, last) + 1} sectors, and it has {sectors}",
            place=place,
        )
    found = []
    for at in range(0, len(entries), entry_bytes):
        kind, own, start, end, _, name = _ENTRY.unpack_from(entries, at)
        if kind == bytes(16):
            continue
        if not first <= start <= end <= last:
            raise DamagedError(
                f"partition {at // entry_bytes + 1} lies outside of the disk", place=place
            )
        text = name.decode("utf-16-le", "replace").partition("\0")[0]
        found.append(
            Partition(
                text,
                uuid.UUID(bytes_le=kind),
                uuid.UUID(bytes_le=own),
                start * SECTOR_BYTES,
                (end + 1 - start) * SECTOR_BYTES,
            )
        )
    return Layout(uuid.UUID(bytes_le=guid), size_bytes, tuple(found))


def _read_header(head: bytes, place: object) -> tuple[int, int, int, bytes, int, int, int, int]:
    sector = head[SECTOR_BYTES : 2 * SECTOR_BYTES]
    if len(sector) < SECTOR_BYTES or not sector.startswith(_MAGIC):
        raise DamagedError("it has no GUID partition table", place=place)
    _, _, size, crc, _, own, other, first, last, guid, *table = _HEADER.unpack_from(sector)
    if not _HEADER.size <= size <= SECTOR_BYTES:
        raise DamagedError("the partition table's header is of no size", place=place)
    blank = bytearray(sector[:size])
    blank[16:20] = bytes(4)
    if zlib.crc32(blank) != crc or own != 1:
        raise DamagedError("the partition table's header has a wrong checksum", place=place)
    return other, first, last, guid, *table
