"""Files on an EFI system partition of anybody's making: FAT12, FAT16, FAT32, read through one function.

Source: Microsoft's FAT specification (fatgen103). Short names only: those that firmware looks for are short. Foreign
bytes: a directory is read to 2 MiB at most, and no chain can lead in a circle for longer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from calve.errors import DamagedError, NotFoundError

__all__ = ["File", "FileSystem", "Read"]

Read = Callable[[int, int], bytes]
"""Return so many bytes (offset, size) of the partition; fewer only at its end."""

_BOOT_SECTOR = struct.Struct("<11xHBHBHHxH8xII4xI")
_ENTRY = struct.Struct("<11sB8xH4xHI")
_DIRECTORY_BYTES = 2 << 20
_VOLUME, _DIRECTORY = 0x08, 0x10


@dataclass(frozen=True, slots=True)
class File:
    """A file or directory: its first cluster and size (0 of a directory)."""

    cluster: int
    size_bytes: int
    directory: bool


class FileSystem:
    """A FAT file system.

    Args:
        read: gives the partition's bytes.
        place: the partition, for errors.

    Raises:
        DamagedError: it is none.
    """

    def __init__(self, read: Read, place: object) -> None:
        self._read = read
        self._place = place
        sector = read(0, 512)
        if len(sector) < 512 or sector[510:] != b"\x55\xaa":
            raise DamagedError("it has no FAT file system", place=place)
        (
            step,
            per_cluster,
            reserved,
            tables,
            root_entries,
            few,
            table_few,
            many,
            table_many,
            root,
        ) = _BOOT_SECTOR.unpack_from(sector)
        table = table_few or table_many
        sectors = few or many
        if step not in {512, 1024, 2048, 4096} or not per_cluster or not table or not tables:
            raise DamagedError("it has no FAT file system", place=place)
        self._table: int = reserved * step
        self._root = self._table + tables * table * step
        self._root_bytes = root_entries * 32
        root_sectors = -(-self._root_bytes // step)
        self._data: int = self._root + root_sectors * step
        self._cluster_bytes: int = per_cluster * step
        self._clusters = max(0, sectors - self._data // step) // per_cluster
        self._bits = 12 if self._clusters < 4085 else 16 if self._clusters < 65525 else 32
        self._root_cluster = int(root)

    def find(self, path: str) -> File:
        """Return a file by its path, `EFI/BOOT/BOOTX64.EFI`; letters of either case.

        Raises:
            NotFoundError: it is not there.
            DamagedError: the file system is damaged.
        """
        found: File | None = None
        for name in path.upper().split("/"):
            wanted = self._short(name)
            if found is not None and not found.directory:
                found = None
                break
            found = next((one for own, one in self._list(found) if own == wanted), None)
            if found is None:
                break
        if found is None:
            raise NotFoundError(f"there is no {path}", place=self._place)
        return found

    def head(self, file: File, size: int) -> bytes:
        """Return a file's first bytes."""
        wanted = min(size, file.size_bytes)
        data = b""
        for cluster in self._chain(file.cluster, wanted):
            data += self._read(self._offset(cluster), self._cluster_bytes)
        return data[:wanted]

    @staticmethod
    def _short(name: str) -> bytes:
        stem, _, suffix = name.partition(".")
        return stem.encode().ljust(8)[:8] + suffix.encode().ljust(3)[:3]

    def _list(self, directory: File | None) -> Iterator[tuple[bytes, File]]:
        for data in self._directory(directory):
            for at in range(0, len(data) - 31, 32):
                name, flags, high, low, size = _ENTRY.unpack_from(data, at)
                if name[0] == 0:
                    return
                if flags & _VOLUME:  # of a long name, too
                    continue
                cluster = low | (high << 16 if self._bits == 32 else 0)
                yield name, File(cluster, size, bool(flags & _DIRECTORY))

    def _directory(self, directory: File | None) -> Iterator[bytes]:
        if directory is None and self._bits != 32:
            yield self._read(self._root, self._root_bytes)
            return
        first = self._root_cluster if directory is None else directory.cluster
        for cluster in self._chain(first, _DIRECTORY_BYTES):
            yield self._read(self._offset(cluster), self._cluster_bytes)

    def _chain(self, cluster: int, size: int) -> Iterator[int]:
        """Yield a chain's clusters, as many as so many bytes need at the most."""
        for _ in range(-(-size // self._cluster_bytes)):
            if not 2 <= cluster < self._clusters + 2:
                raise DamagedError(
                    "a chain of clusters leads out of the file system", place=self._place
                )
            yield cluster
            cluster = self._next(cluster)
            if cluster >= {12: 0xFF8, 16: 0xFFF8, 32: 0xFFFFFF8}[self._bits]:
                return

    def _next(self, cluster: int) -> int:
        at = self._table + cluster * self._bits // 8
        value = int.from_bytes(self._read(at, 4), "little")
        if self._bits == 12:
            return value >> 4 * (cluster & 1) & 0xFFF
        return value & (0xFFFF if self._bits == 16 else 0x0FFFFFFF)

    def _offset(self, cluster: int) -> int:
        return self._data + (cluster - 2) * self._cluster_bytes
