"""The inspection of a disk: what is on it, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

from calve.disk.inspect import fat, gpt, uki, verity
from calve.disk.inspect.erofs import MAGIC as EROFS_MAGIC
from calve.disk.inspect.erofs import SUPERBLOCK_AT as EROFS_AT
from calve.disk.inspect.erofs import Erofs
from calve.disk.inspect.ext4 import MAGIC as EXT4_MAGIC
from calve.disk.inspect.ext4 import SUPERBLOCK_AT as EXT4_AT
from calve.disk.inspect.ext4 import Ext4
from calve.disk.inspect.findings import Check, Finding, Findings, printable
from calve.disk.inspect.source import Slice, Source
from calve.disk.inspect.tree import Kind, Node, Tree, Walk, find
from calve.errors import DamagedError
from calve.nix.hashes import Hash
from calve.nix.storepath import STORE_DIR, StorePath

__all__ = [
    "BOOT_FILES",
    "BootImage",
    "Check",
    "Expected",
    "FileSystem",
    "Finding",
    "Inspection",
    "WantedPartition",
    "inspect",
    "open_tree",
]

BOOT_FILES = {"x86_64": "EFI/BOOT/BOOTX64.EFI", "aarch64": "EFI/BOOT/BOOTAA64.EFI"}

_FOREIGN = {
    b"conectix": "a VHD",
    b"QFI\xfb": "a qcow2 image",
    b"KDMV": "a VMDK image",
    b"vhdxfile": "a VHDX image",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\x1f\x8b": "compressed with gzip",
    b"\xfd7zXZ\0": "compressed with xz",
    b"PK\x03\x04": "a zip archive",
}
_EXT4_MAGIC_AT = EXT4_AT + 56
_MAX_PATHS = 100_000
_ROOT_HASH = re.compile(r"(?:^|\s)(?:roothash|usrhash)=([0-9a-f]{64})(?=\s|$)")


@dataclass(frozen=True, slots=True)
class WantedPartition:
    """What a partition must be; None where it does not matter."""

    type_guid: UUID
    start_bytes: int | None = None
    size_bytes: int | None = None
    guid: UUID | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """What a disk must hold; None where it does not matter.

    Attributes:
        closure: every path in the store, with the hash of its NAR (sha256).
        partitions: all partitions, in the order of the table.
        cmdline: of every unified kernel image.
        sections: likewise, by name (".linux"), the SHA-256 of their content.
        machine: whose boot file there must be: "x86_64" or "aarch64".
        root_hash: of dm-verity, 32 bytes; where it is None, the one that the command line names.
        store: the directory of the file system that is the store; "/" where the file system is the store itself.
    """

    closure: Mapping[StorePath, Hash] | None = None
    partitions: Sequence[WantedPartition] | None = None
    cmdline: str | None = None
    sections: Mapping[str, bytes] = field(default_factory=dict)
    machine: str | None = None
    root_hash: bytes | None = None
    store: str = STORE_DIR


@dataclass(frozen=True, slots=True)
class BootImage:
    """A unified kernel image and its path in the EFI system partition."""

    path: str
    image: uki.Uki


@dataclass(frozen=True, slots=True)
class FileSystem:
    """The file system of a partition: "erofs" or "ext4", the size of a block, the hash of every path in its store."""

    partition: int
    format: str
    block_size_bytes: int
    paths: Mapping[StorePath, Hash]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is on a disk, as far as it could be read, and what is wrong: nothing where `findings` is empty."""

    table: gpt.Table | None
    esp: fat.Fat | None
    ukis: tuple[BootImage, ...]
    file_systems: tuple[FileSystem, ...]
    verity: verity.Superblock | None
    findings: tuple[Finding, ...]


def inspect(source: Source, expected: Expected | None = None) -> Inspection:
    """Read a disk back, whole: partition table, boot files, file systems, every path in the store, dm-verity.

    Damage is a finding. Memory does not depend on the size of files; time is that of reading the disk a few times.

    Args:
        source: the disk.
        expected: what it must hold.

    Raises:
        CalveError: the source cannot be read; not DamagedError, which is a finding.
    """
    return _Inspector(source, expected or Expected()).run()


def open_tree(source: Source, findings: Findings) -> Tree | None:
    """Return the file system in a source; None where it is none that is understood.

    Raises:
        DamagedError: its superblock is damaged.
    """
    if source.size < EXT4_AT + 1024:
        return None
    if source.read(EROFS_AT, 4) == EROFS_MAGIC.to_bytes(4, "little"):
        return Erofs(source)
    if source.read(_EXT4_MAGIC_AT, 2) == EXT4_MAGIC.to_bytes(2, "little"):
        return Ext4(source, findings)
    return None


class _Inspector:
    def __init__(self, source: Source, expected: Expected) -> None:
        self._source = source
        self._expected = expected
        self._findings = Findings()
        self._ukis: list[BootImage] = []
        self._file_systems: list[FileSystem] = []
        self._verity: verity.Superblock | None = None

    def run(self) -> Inspection:
        table = esp = None
        with self._findings.catching(Check.DISK_SIZE, "disk"):
            if not self._is_foreign():
                table = gpt.read(self._source, self._findings)
        if table is not None:
            self._check_partitions(table.partitions)
            apart = _apart(table.partitions)
            esp = self._esp(apart)
            self._stores(apart)
            self._verities(apart)
        return Inspection(
            table, esp, tuple(self._ukis), tuple(self._file_systems), self._verity,
            tuple(self._findings),
        )  # fmt: skip

    def _is_foreign(self) -> bool:
        """Note a disk in a container: read as raw bytes it does not boot."""
        head = self._source.read(0, min(8, self._source.size))
        for magic, what in _FOREIGN.items():
            if head.startswith(magic):
                message = f"it is {what}: the bytes of the disk themselves are wanted"
                self._findings.add(Check.DISK_FOREIGN, "disk", message)
                return True
        return False

    def _slice(self, partition: gpt.Partition) -> Slice:
        """Return a partition's bytes; one that ends outside of the disk is cut there."""
        start = min(partition.start_bytes, self._source.size)
        size = min(partition.size_bytes, self._source.size - start)
        return Slice(self._source, start, max(size, 0))

    def _check_partitions(self, partitions: Sequence[gpt.Partition]) -> None:
        wanted = self._expected.partitions
        if wanted is None:
            return
        if len(wanted) != len(partitions):
            message = f"{len(partitions)} partitions, wanted are {len(wanted)}"
            self._findings.add(Check.GPT_DIFFERS, "gpt", message)
        for partition, want in zip(partitions, wanted, strict=False):
            for name in ("type_guid", "start_bytes", "size_bytes", "guid", "name"):
                found, value = getattr(partition, name), getattr(want, name)
                if value is not None and found != value:
                    place = f"partition {partition.number}"
                    message = f"its {name} is {found}, wanted is {value}"
                    self._findings.add(Check.GPT_DIFFERS, place, message)

    def _esp(self, partitions: Sequence[gpt.Partition]) -> fat.Fat | None:
        found = next((one for one in partitions if one.type == "esp"), None)
        if found is None:
            self._findings.add(Check.ESP_MISSING, "gpt", "there is no EFI system partition")
            return None
        findings = self._findings.under(f"partition {found.number}")
        esp = fat.read(self._slice(found), findings)
        if esp is not None:
            self._boot_files(esp, findings)
        return esp

    def _boot_files(self, esp: fat.Fat, findings: Findings) -> None:
        wanted = self._expected.machine
        names = {path.upper(): machine for machine, path in BOOT_FILES.items()}
        present = {names[file.path.upper()] for file in esp.files if file.path.upper() in names}
        if not present or (wanted is not None and wanted not in present):
            path = BOOT_FILES.get(wanted or "", " or ".join(BOOT_FILES.values()))
            findings.add(Check.BOOT_FILE_MISSING, "EFI/BOOT", f"there is no {path}")
        for file in esp.files:
            path = file.path.upper()
            if path in names or (path.startswith("EFI/LINUX/") and path.endswith(".EFI")):
                self._boot_file(file, names.get(path), findings.under(printable(file.path)))
        cmdlines = [one.image.cmdline for one in self._ukis]
        if self._expected.cmdline is not None and not cmdlines:
            findings.add(Check.UKI_CMDLINE_DIFFERS, "EFI", "no image has a command line")
        if self._expected.sections and not cmdlines:
            findings.add(Check.UKI_SECTION_DIFFERS, "EFI", "there is no unified kernel image")

    def _boot_file(self, file: fat.FatFile, machine: str | None, findings: Findings) -> None:
        with findings.catching(Check.PE_DAMAGED):
            image = uki.read(file, findings)
            if image is None:
                return
            self._ukis.append(BootImage(file.path, image))
            if machine is not None and image.machine != machine:
                message = f"it is for {image.machine}, its name is that of {machine}"
                findings.add(Check.PE_MACHINE, "headers", message)
            wanted = self._expected.cmdline
            if wanted is not None and image.cmdline != wanted:
                message = f"it is {image.cmdline!r}, wanted is {wanted!r}"
                findings.add(Check.UKI_CMDLINE_DIFFERS, ".cmdline", message)
            for name, digest in self._expected.sections.items():
                if uki.digest(file, image, name) != digest:
                    message = f"its SHA-256 is not {digest.hex()}"
                    findings.add(Check.UKI_SECTION_DIFFERS, name, message)

    def _stores(self, partitions: Sequence[gpt.Partition]) -> None:
        """Read the file system of every partition that may hold the store."""
        for partition in partitions:
            if partition.type == "linux" or _is_system(partition):
                findings = self._findings.under(f"partition {partition.number}")
                with findings.catching(Check.FILESYSTEM_UNKNOWN):
                    self._store(partition, findings)
        if self._expected.closure is not None and not any(one.paths for one in self._file_systems):
            message = f"no partition has a file system with paths in {self._expected.store}"
            self._findings.add(Check.STORE_MISSING, "disk", message)

    def _store(self, partition: gpt.Partition, findings: Findings) -> None:
        tree = open_tree(self._slice(partition), findings)
        if tree is None:
            if _is_system(partition):
                message = "neither EROFS nor ext4"
                findings.add(Check.FILESYSTEM_UNKNOWN, "file system", message)
            return
        paths: dict[StorePath, Hash] = {}
        found = FileSystem(partition.number, tree.format, tree.block_size_bytes, paths)
        self._file_systems.append(found)
        root, walk = tree.root(), Walk(tree)
        store = find(tree, self._expected.store)
        if store is not None and store.kind is Kind.DIRECTORY:
            seen: set[StorePath] = set()
            for node in _bounded(tree.entries(store), findings):
                self._path(walk, node, paths, seen, findings)
            for path in sorted(set(self._expected.closure or ()) - seen):
                findings.add(Check.PATH_MISSING, str(path), "it is not in the store")
        if store is None or store.number != root.number:
            walk.check(root, but=None if store is None else store.number)

    def _path(
        self,
        walk: Walk,
        node: Node,
        paths: dict[StorePath, Hash],
        seen: set[StorePath],
        findings: Findings,
    ) -> None:
        closure = self._expected.closure
        name = node.name.decode("utf-8", "backslashreplace")
        try:
            path = StorePath.from_basename(name)
        except DamagedError:
            if closure is not None:
                findings.add(Check.PATH_UNEXPECTED, name, "it has no store path's name")
            return
        seen.add(path)
        with findings.catching(Check.TREE_DAMAGED, str(path)):
            paths[path] = walk.nar_hash(node)
            if closure is None:
                return
            if path not in closure:
                findings.add(Check.PATH_UNEXPECTED, str(path), "it is not in the closure")
            elif paths[path] != closure[path]:
                message = f"its hash is {paths[path]}, wanted is {closure[path]}"
                findings.add(Check.PATH_HASH_DIFFERS, str(path), message)

    def _verities(self, partitions: Sequence[gpt.Partition]) -> None:
        """Check the first partition of hashes of each kind against the first of data of that kind."""
        done: set[str] = set()
        for tree in partitions:
            kind = tree.type.removesuffix("-verity")
            if kind == tree.type or kind in done:
                continue
            done.add(kind)
            data = next((one for one in partitions if one.type == kind), None)
            findings = self._findings.under(f"partition {tree.number}")
            root_hash = self._root_hash()
            if data is None or root_hash is None:
                message = f"it protects {kind}: without such a partition, or without a root hash"
                findings.add(Check.VERITY_NO_HASH, "dm-verity", message)
                continue
            found = verity.verify(self._slice(data), self._slice(tree), root_hash, findings)
            self._verity = self._verity or found

    def _root_hash(self) -> bytes | None:
        if self._expected.root_hash is not None:
            return self._expected.root_hash
        for one in self._ukis:
            match = _ROOT_HASH.search(one.image.cmdline or "")
            if match is not None:
                return bytes.fromhex(match[1])
        return None


def _apart(partitions: Sequence[gpt.Partition]) -> list[gpt.Partition]:
    """Return those that lie upon none before them: hundreds of one place would be read hundreds of times."""
    kept: list[gpt.Partition] = []
    for one in partitions:
        if all(one.last_lba < other.first_lba or other.last_lba < one.first_lba for other in kept):
            kept.append(one)
    return kept


def _is_system(partition: gpt.Partition) -> bool:
    """Say whether the store must be there; one of type "linux" may be for anything."""
    kind = partition.type
    return kind.startswith(("root-", "usr-")) and not kind.endswith("-verity")


def _bounded(nodes: Iterator[Node], findings: Findings) -> Iterator[Node]:
    for number, node in enumerate(nodes):
        if number == _MAX_PATHS:
            message = f"more than {_MAX_PATHS} paths: the rest was not read"
            findings.add(Check.TREE_TOO_LARGE, "store", message)
            return
        yield node
