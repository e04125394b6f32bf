"""FAT's boot sector, its backup, the FSInfo sector, and the copies of the allocation table.

Source: Microsoft's FAT32 File System Specification (fatgen103).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from calve.disk.inspect.findings import Check, Findings, FlawError
from calve.disk.inspect.source import CHUNK_BYTES, Source

__all__ = ["Boot", "check_copies"]

_HEAD = struct.Struct("<3s8sHBHBHHBHHHII")
_FAT32 = struct.Struct("<IHHIHH")
_MAX_FAT12, _MAX_FAT16, _MAX_FAT32 = 4084, 65524, 0x0FFFFFF5
_MAX_READ = 1 << 21  # an ESP of 8 GiB; what is larger would take its reader's memory
_UNKNOWN = 0xFFFFFFFF
_SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Boot:
    """Where everything is, in bytes from the start of the file system.

    Attributes:
        bits: of an entry of the allocation table, 16 or 32.
        cluster_bytes: size of a cluster.
        clusters: how many hold data; they count from 2.
        fats: how many copies of the table there are.
        fat_at: the first table.
        fat_bytes: how long a table is.
        root_at: the root directory of FAT16; where data begin in FAT32.
        root_bytes: its size in FAT16; 0 in FAT32.
        root_cluster: its first cluster in FAT32.
        fsinfo_at: the FSInfo sector of FAT32, 0 where there is none.
        backup_at: the copy of the boot sector of FAT32, 0 where there is none.
        media: what the first entry of the table begins with.
        dirty: it was written to and not unmounted.
        label: of the volume.
    """

    bits: int
    cluster_bytes: int
    clusters: int
    fats: int
    fat_at: int
    fat_bytes: int
    root_at: int
    root_bytes: int
    root_cluster: int
    fsinfo_at: int
    backup_at: int
    media: int
    dirty: bool
    label: str

    @property
    def mask(self) -> int:
        """Return the bits of a table's entry that count."""
        return 0xFFFF if self.bits == 16 else 0x0FFFFFFF

    @property
    def bad(self) -> int:
        """Return what stands for a broken cluster; what is above ends a chain."""
        return self.mask - 8

    def is_end(self, cluster: int) -> bool:
        """Say whether it ends a chain."""
        return cluster > self.bad

    def cluster_at(self, cluster: int) -> int:
        """Return where a cluster begins."""
        return self.root_at + self.root_bytes + (cluster - 2) * self.cluster_bytes

    @classmethod
    def read(cls, source: Source) -> Boot:
        """Read and check the boot sector.

        Raises:
            DamagedError: it is none, contradicts itself, or is of a file system larger than its place.
        """
        sector = source.read(0, _SECTOR_BYTES)
        (
            _, _, sector_bytes, per_cluster, reserved, fats, root_entries, total16, media, fat16, _, _,
            _hidden, total32,
        ) = _HEAD.unpack_from(sector)  # fmt: skip
        fat32, _flags, version, root_cluster, fsinfo, backup = _FAT32.unpack_from(sector, 36)
        if sector[510:] != b"\x55\xaa":
            raise _flaw("no boot sector: its signature is missing")
        if sector_bytes not in {512, 1024, 2048, 4096} or per_cluster not in _POWERS:
            raise _flaw(f"sectors of {sector_bytes} bytes, clusters of {per_cluster} sectors")
        bits = 16 if fat16 else 32
        fat_sectors, total = fat16 or fat32, total16 or total32
        if not reserved or not 1 <= fats <= 4 or not fat_sectors or not total:
            message = f"{reserved} reserved sectors, {fats} tables of {fat_sectors}, {total} in all"
            raise _flaw(message)
        root_sectors = -(-root_entries * 32 // sector_bytes)
        if (bits == 32) != (root_entries == 0) or (bits == 32 and version):
            raise _flaw(f"FAT{bits} of version {version} with {root_entries} entries in its root")
        data_sectors = total - reserved - fats * fat_sectors - root_sectors
        clusters = data_sectors // per_cluster
        if clusters < 1 or total * sector_bytes > source.size:
            message = f"{total} sectors of {sector_bytes} bytes, its place has {source.size} bytes"
            raise _flaw(message)
        if (clusters + 2) * bits // 8 > fat_sectors * sector_bytes:
            raise _flaw(f"a table of {fat_sectors} sectors for {clusters} clusters")
        boot = cls(
            bits=bits,
            cluster_bytes=per_cluster * sector_bytes,
            clusters=clusters,
            fats=fats,
            fat_at=reserved * sector_bytes,
            fat_bytes=fat_sectors * sector_bytes,
            root_at=(reserved + fats * fat_sectors) * sector_bytes,
            root_bytes=root_sectors * sector_bytes,
            root_cluster=root_cluster if bits == 32 else 0,
            fsinfo_at=_reserved(fsinfo, reserved, sector_bytes) if bits == 32 else 0,
            backup_at=_reserved(backup, reserved, sector_bytes) if bits == 32 else 0,
            media=media,
            dirty=bool(sector[37 if bits == 16 else 65] & 1),
            label=sector[43:54].decode("ascii", "replace").rstrip()
            if bits == 16
            else sector[71:82].decode("ascii", "replace").rstrip(),
        )
        if (clusters <= _MAX_FAT12 and bits == 16) or clusters > _MAX_READ:
            raise _flaw(f"{clusters} clusters: it is FAT12, or larger than any system partition")
        return boot


_POWERS = frozenset({1, 2, 4, 8, 16, 32, 64, 128})


def _reserved(sector: int, reserved: int, sector_bytes: int) -> int:
    """Return where one of the reserved sectors is; 0 and 0xFFFF stand for none."""
    if sector in {0, 0xFFFF}:
        return 0
    if sector >= reserved:
        raise _flaw(f"sector {sector} should be one of the {reserved} reserved ones")
    return sector * sector_bytes


def _flaw(message: str) -> FlawError:
    return FlawError(Check.FAT_DAMAGED, message, place="boot sector")


def check_copies(source: Source, boot: Boot, free: int, findings: Findings) -> None:
    """Compare what is said twice: the tables, the boot sector, how many clusters are free, the kind of FAT."""
    most = _MAX_FAT16 if boot.bits == 16 else _MAX_FAT32
    if not (boot.bits == 16 or boot.clusters > _MAX_FAT16) or boot.clusters > most:
        message = f"{boot.clusters} clusters: by their number it is no FAT{boot.bits}"
        findings.add(Check.FAT_TYPE, "boot sector", message)
    _check_start(source, boot, findings)
    _check_tables(source, boot, findings)
    if boot.bits == 16:
        return
    if boot.backup_at and source.read(0, _SECTOR_BYTES) != source.read(
        boot.backup_at, _SECTOR_BYTES
    ):
        findings.add(Check.FAT_BACKUP_DIFFERS, "boot sector", "its copy has other bytes")
    if boot.fsinfo_at:
        _check_fsinfo(source.read(boot.fsinfo_at, _SECTOR_BYTES), boot, free, findings)


def _check_start(source: Source, boot: Boot, findings: Findings) -> None:
    """Check the two entries that belong to no cluster: the medium, and whether all was written."""
    width = boot.bits // 8
    first, second = struct.unpack(
        "<HH" if width == 2 else "<II", source.read(boot.fat_at, 2 * width)
    )
    if first & boot.mask != boot.mask & ~0xFF | boot.media:
        message = f"the table begins with {first:#x}, the medium is {boot.media:#x}"
        findings.add(Check.FAT_DAMAGED, "fat", message)
    written = 3 << (14 if width == 2 else 26)  # set: unmounted, no faults
    if boot.dirty or second & written != written:
        findings.add(Check.FAT_NOT_CLEAN, "fat", "it was written to and not unmounted")


def _check_tables(source: Source, boot: Boot, findings: Findings) -> None:
    for copy in range(1, boot.fats):
        for at in range(0, boot.fat_bytes, CHUNK_BYTES):
            count = min(CHUNK_BYTES, boot.fat_bytes - at)
            first = source.read(boot.fat_at + at, count)
            if first != source.read(boot.fat_at + copy * boot.fat_bytes + at, count):
                message = f"tables 1 and {copy + 1} differ between bytes {at} and {at + count}"
                findings.add(Check.FAT_COPIES_DIFFER, "fat", message)
                break


def _check_fsinfo(sector: bytes, boot: Boot, free: int, findings: Findings) -> None:
    lead, middle, said, following, trail = struct.unpack("<I480xIII12xI", sector)
    if (lead, middle, trail) != (0x41615252, 0x61417272, 0xAA550000):
        findings.add(Check.FAT_FSINFO, "fsinfo", "its signatures are missing")
        return
    if said not in {_UNKNOWN, free}:
        findings.add(Check.FAT_FSINFO, "fsinfo", f"{said} free clusters; {free} are free")
    if following != _UNKNOWN and not 2 <= following < boot.clusters + 2:
        message = f"the next free cluster is said to be {following}"
        findings.add(Check.FAT_FSINFO, "fsinfo", message)
