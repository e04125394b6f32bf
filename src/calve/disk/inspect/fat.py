"""FAT16 and FAT32, as the EFI system partition has them: boot sector, allocation tables, directories, files.

Source: Microsoft's FAT32 File System Specification (fatgen103). Every chain of clusters is followed once: a cluster
that two of them have, or that none has, is a finding.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from calve.disk.inspect.fatboot import Boot, check_copies
from calve.disk.inspect.fatdirectory import MAX_DIRECTORY_BYTES, Entry, entries
from calve.disk.inspect.findings import Check, Findings, FlawError, printable
from calve.disk.inspect.source import CHUNK_BYTES, Source
from calve.errors import DamagedError

__all__ = ["Fat", "FatFile", "read"]

_MAX_DEPTH = 16
_MAX_NODES = 10_000
_WINDOW_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class FatFile:
    """A file: its path as it is written ("EFI/BOOT/BOOTX64.EFI"), its size, and where it lies, in runs of bytes.

    A `Source` of its content.
    """

    path: str
    size: int
    source: Source = field(repr=False, compare=False)
    starts: array[int]  # in the file, ascending
    places: array[int]  # in the file system, of each run

    def read(self, at: int, count: int) -> bytes:
        """Return exactly `count` bytes from `at` on; DamagedError where they are outside."""
        if at < 0 or count < 0 or at + count > self.size:
            message = f"{count} bytes at {at} are outside of its {self.size}"
            raise DamagedError(message)
        parts = []
        while count:
            run = bisect_right(self.starts, at) - 1
            end = self.starts[run + 1] if run + 1 < len(self.starts) else self.size
            part = self.source.read(self.places[run] + at - self.starts[run], min(count, end - at))
            parts.append(part)
            at += len(part)
            count -= len(part)
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Fat:
    """A file system: its kind, the size of a cluster, its label, and its files in the order of the directories."""

    bits: int
    cluster_bytes: int
    clusters: int
    label: str
    files: tuple[FatFile, ...]

    def find(self, path: str) -> FatFile | None:
        """Return a file by its path, whatever the case of the letters."""
        return next((file for file in self.files if file.path.upper() == path.upper()), None)


def read(source: Source, findings: Findings) -> Fat | None:
    """Read a file system; None where its boot sector is damaged. What is wrong goes to `findings`."""
    with findings.catching(Check.FAT_DAMAGED, "fat"):
        boot = Boot.read(source)
        return _Reader(source, boot, findings).run()
    return None


def _no_chain() -> array[int]:
    return array("I")


class _Reader:
    """Follows every chain, and knows which clusters belong to one."""

    def __init__(self, source: Source, boot: Boot, findings: Findings) -> None:
        self._source = source
        self._boot = boot
        self._findings = findings
        self._taken = bytearray((boot.clusters + 2) // 8 + 1)  # a bit each; they count from 2
        self._files: list[FatFile] = []
        self._nodes = 0
        self._label = ""
        self._window = b""
        self._window_at = -1

    def run(self) -> Fat:
        boot = self._boot
        root = self._root()
        self._directory(root, "", first=0, parent=0)
        free = self._free_clusters()
        check_copies(self._source, boot, free, self._findings)
        label = self._label or boot.label
        return Fat(boot.bits, boot.cluster_bytes, boot.clusters, label, tuple(self._files))

    def _root(self) -> bytes:
        boot = self._boot
        if boot.bits == 16:
            return self._source.read(boot.root_at, boot.root_bytes)
        chain = self._chain(boot.root_cluster, "/", MAX_DIRECTORY_BYTES // boot.cluster_bytes)
        return self._content(chain)

    def _directory(self, data: bytes, path: str, *, first: int, parent: int) -> None:
        """Read a directory and all below it; `first` is its first cluster, `parent` that of the one above."""
        depth = path.count("/") + 1 if path else 0
        if depth > _MAX_DEPTH:
            message = f"more than {_MAX_DEPTH} directories deep"
            raise FlawError(Check.FAT_DIRECTORY_DAMAGED, message, place=printable(path))
        dots = {".": first, "..": parent} if path else {}
        names: set[str] = set()
        for entry in entries(data, self._boot.bits, path or "/", self._findings):
            self._nodes += 1
            if self._nodes > _MAX_NODES:
                message = f"more than {_MAX_NODES} files and directories"
                raise FlawError(Check.FAT_DIRECTORY_DAMAGED, message)
            if entry.name in {".", ".."}:
                if dots.pop(entry.name, None) != entry.cluster or not entry.is_directory:
                    message = f"its entry {entry.name} leads to cluster {entry.cluster}"
                    self._findings.add(Check.FAT_DIRECTORY_DAMAGED, path or "/", message)
            elif entry.is_label:
                self._label = self._label or entry.name
            else:
                self._node(entry, f"{path}/{entry.name}" if path else entry.name, names, first)
        if dots:
            message = f"it has no entry {' and no '.join(dots)}"
            self._findings.add(Check.FAT_DIRECTORY_DAMAGED, path, message)

    def _node(self, entry: Entry, path: str, names: set[str], first: int) -> None:
        """Take in a file or a directory; damage to one does not hide the others."""
        if entry.name.upper() in names:
            self._findings.add(Check.FAT_DIRECTORY_DAMAGED, path, "there are two of this name")
            return
        names.add(entry.name.upper())
        with self._findings.catching(Check.FAT_DAMAGED):
            if entry.is_directory:
                most = MAX_DIRECTORY_BYTES // self._boot.cluster_bytes
                chain = self._chain(entry.cluster, path, most)
                data = self._content(chain)
                self._directory(data, path, first=entry.cluster, parent=first)
            else:
                self._files.append(self._file(entry, path))

    def _file(self, entry: Entry, path: str) -> FatFile:
        size = self._boot.cluster_bytes
        wanted = -(-entry.size // size)
        chain = self._chain(entry.cluster, path, wanted) if wanted or entry.cluster else _no_chain()
        if len(chain) != wanted:
            message = f"{len(chain)} clusters for {entry.size} bytes"
            raise FlawError(Check.FAT_CHAIN_LENGTH, message, place=printable(path))
        starts, places = array("Q"), array("Q")
        for number, cluster in enumerate(chain):
            if not number or cluster != chain[number - 1] + 1:
                starts.append(number * size)
                places.append(self._boot.cluster_at(cluster))
        return FatFile(path, entry.size, self._source, starts, places)

    def _content(self, chain: array[int]) -> bytes:
        size = self._boot.cluster_bytes
        return b"".join(self._source.read(self._boot.cluster_at(n), size) for n in chain)

    def _chain(self, cluster: int, path: str, most: int) -> array[int]:
        """Follow a chain of at most so many clusters, and take them."""
        boot = self._boot
        place = printable(path)
        chain = _no_chain()
        while not boot.is_end(cluster):
            if not 2 <= cluster < boot.clusters + 2:
                message = f"cluster {cluster} after {len(chain)} others is none that holds data"
                raise FlawError(Check.FAT_CHAIN_DAMAGED, message, place=place)
            if self._is_taken(cluster):
                message = f"cluster {cluster} belongs to two chains, or twice to this one"
                raise FlawError(Check.FAT_CHAIN_CROSSED, message, place=place)
            if len(chain) == most:
                message = f"more than the {most} clusters that it may have"
                raise FlawError(Check.FAT_CHAIN_LENGTH, message, place=place)
            self._taken[cluster >> 3] |= 1 << (cluster & 7)
            chain.append(cluster)
            cluster = self._next(cluster)
        return chain

    def _is_taken(self, cluster: int) -> bool:
        return bool(self._taken[cluster >> 3] >> (cluster & 7) & 1)

    def _next(self, cluster: int) -> int:
        """Return what the first table says of a cluster; a window of the table is kept."""
        width = self._boot.bits // 8
        at = cluster * width
        start = at - at % _WINDOW_BYTES
        if start != self._window_at:
            count = min(_WINDOW_BYTES, self._boot.fat_bytes - start)
            self._window = self._source.read(self._boot.fat_at + start, count)
            self._window_at = start
        raw = self._window[at - start :][:width]
        return int.from_bytes(raw, "little") & self._boot.mask

    def _free_clusters(self) -> int:
        """Count the clusters that are free; note those that are in use and belong to nothing."""
        free = lost = 0
        first = None
        for cluster, value in self._table():
            if value == 0:
                free += 1
            elif not self._is_taken(cluster) and value != self._boot.bad:
                lost += 1
                first = cluster if first is None else first
        if lost:
            message = f"{lost} clusters are in use and belong to no file, from cluster {first} on"
            self._findings.add(Check.FAT_CLUSTERS_LOST, "fat", message)
        return free

    def _table(self) -> Iterator[tuple[int, int]]:
        """Yield every cluster that can hold data, with what the first table says of it."""
        boot = self._boot
        width = boot.bits // 8
        end = (boot.clusters + 2) * width
        for at in range(0, end, CHUNK_BYTES):
            data = self._source.read(boot.fat_at + at, min(CHUNK_BYTES, end - at))
            values = struct.iter_unpack("<H" if width == 2 else "<I", data)
            for number, (value,) in enumerate(values, at // width):
                if number >= 2:
                    yield number, value & boot.mask
