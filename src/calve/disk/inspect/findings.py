"""What is wrong with a disk: checks with stable names, and where they failed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType

from calve.errors import DamagedError

__all__ = ["MAX_FINDINGS", "Check", "Finding", "Findings", "FlawError", "printable"]

MAX_FINDINGS = 200
_MAX_TEXT = 400


class Check(StrEnum):
    """Every check, by the name that scripts may rely on."""

    DISK_FOREIGN = "disk-foreign-format"
    DISK_SIZE = "disk-size"
    FINDINGS_LEFT_OUT = "findings-left-out"
    MBR_MISSING = "mbr-missing"
    MBR_NOT_PROTECTIVE = "mbr-not-protective"
    GPT_DAMAGED = "gpt-damaged"
    GPT_ENTRIES_DAMAGED = "gpt-entries-damaged"
    GPT_BACKUP_DAMAGED = "gpt-backup-damaged"
    GPT_BACKUP_DIFFERS = "gpt-backup-differs"
    GPT_BACKUP_MISPLACED = "gpt-backup-misplaced"
    GPT_USABLE_RANGE = "gpt-usable-range"
    GPT_PARTITION_OUTSIDE = "gpt-partition-outside"
    GPT_PARTITIONS_OVERLAP = "gpt-partitions-overlap"
    GPT_PARTITION_UNALIGNED = "gpt-partition-unaligned"
    GPT_GUID_TWICE = "gpt-guid-twice"
    GPT_DIFFERS = "gpt-differs"
    ESP_MISSING = "esp-missing"
    FAT_DAMAGED = "fat-damaged"
    FAT_NOT_CLEAN = "fat-not-clean"
    FAT_TYPE = "fat-type"
    FAT_BACKUP_DIFFERS = "fat-backup-differs"
    FAT_FSINFO = "fat-fsinfo"
    FAT_COPIES_DIFFER = "fat-copies-differ"
    FAT_CHAIN_CROSSED = "fat-chain-crossed"
    FAT_CHAIN_DAMAGED = "fat-chain-damaged"
    FAT_CHAIN_LENGTH = "fat-chain-length"
    FAT_CLUSTERS_LOST = "fat-clusters-lost"
    FAT_DIRECTORY_DAMAGED = "fat-directory-damaged"
    FAT_LONG_NAME = "fat-long-name"
    BOOT_FILE_MISSING = "boot-file-missing"
    PE_DAMAGED = "pe-damaged"
    PE_MACHINE = "pe-machine"
    PE_SECTION_OUTSIDE = "pe-section-outside"
    PE_SECTION_OVERLAPS = "pe-section-overlaps"
    PE_SECTION_UNALIGNED = "pe-section-unaligned"
    UKI_SECTION_MISSING = "uki-section-missing"
    UKI_SECTION_OVERLAPS = "uki-section-overlaps"
    UKI_SECTION_TWICE = "uki-section-twice"
    UKI_TEXT_DAMAGED = "uki-text-damaged"
    UKI_KERNEL = "uki-kernel"
    UKI_CMDLINE_DIFFERS = "uki-cmdline-differs"
    UKI_SECTION_DIFFERS = "uki-section-differs"
    FILESYSTEM_UNKNOWN = "filesystem-unknown"
    TREE_DAMAGED = "tree-damaged"
    TREE_TOO_LARGE = "tree-too-large"
    EROFS_DAMAGED = "erofs-damaged"
    EROFS_CHECKSUM = "erofs-checksum"
    EROFS_UNSUPPORTED = "erofs-unsupported"
    EROFS_INODE_DAMAGED = "erofs-inode-damaged"
    EROFS_DATA_OUTSIDE = "erofs-data-outside"
    EROFS_DIRENT_DAMAGED = "erofs-dirent-damaged"
    EROFS_DIRENT_UNSORTED = "erofs-dirent-unsorted"
    EROFS_DIRENT_TYPE = "erofs-dirent-type"
    EROFS_DOTS = "erofs-dots"
    EXT4_DAMAGED = "ext4-damaged"
    EXT4_CHECKSUM = "ext4-checksum"
    EXT4_UNSUPPORTED = "ext4-unsupported"
    EXT4_RECOVERY = "ext4-recovery-needed"
    EXT4_NOT_CLEAN = "ext4-not-clean"
    EXT4_INODE_DAMAGED = "ext4-inode-damaged"
    EXT4_EXTENT_DAMAGED = "ext4-extent-damaged"
    EXT4_DIRENT_DAMAGED = "ext4-dirent-damaged"
    EXT4_DOTS = "ext4-dots"
    VERITY_DAMAGED = "verity-damaged"
    VERITY_NO_HASH = "verity-no-root-hash"
    VERITY_ROOT_DIFFERS = "verity-root-differs"
    VERITY_TREE_DIFFERS = "verity-tree-differs"
    STORE_MISSING = "store-missing"
    PATH_MISSING = "path-missing"
    PATH_UNEXPECTED = "path-unexpected"
    PATH_HASH_DIFFERS = "path-hash-differs"


@dataclass(frozen=True, slots=True)
class Finding:
    """A check that failed: its name, where ("partition 2: nid 36"), and what is there instead."""

    check: str
    place: str
    message: str

    def __str__(self) -> str:
        """Give all three on one line."""
        return f"{self.check}: {self.place}: {self.message}"


class FlawError(DamagedError):
    """Damage behind which a reader cannot go on; knows its check."""

    def __init__(self, check: Check, message: str, *, place: object = None) -> None:
        super().__init__(message, place=place)
        self.check = check


def printable(name: bytes | str) -> str:
    """Return a foreign name for a message: one line, no control characters, not too long."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return shown if len(shown) <= _MAX_TEXT else shown[:_MAX_TEXT] + "…"


class Findings:
    """Collects findings, at most `MAX_FINDINGS`: a hostile disk could give millions.

    Args:
        place: what stands before the place of each.
    """

    def __init__(self, place: str = "") -> None:
        self._place = place
        self._found: list[Finding] = []

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def under(self, place: str) -> Findings:
        """Return a collector into the same list, for a part of the disk."""
        part = Findings(self._joined(place))
        part._found = self._found
        return part

    def add(self, check: Check, place: str, message: str) -> None:
        """Note a check that failed; `place` and `message` may hold foreign text."""
        if len(self._found) < MAX_FINDINGS:
            found = Finding(check, printable(self._joined(place)), printable(message))
            self._found.append(found)
        elif len(self._found) == MAX_FINDINGS:
            message = f"there is more: only {MAX_FINDINGS} findings are listed"
            self._found.append(Finding(Check.FINDINGS_LEFT_OUT, "disk", message))

    def catching(self, check: Check, place: str = "") -> Catching:
        """Turn damage into a finding: of its own check, of `check` where it has none (the source's)."""
        return Catching(self, check, place)

    def _joined(self, place: str) -> str:
        return ": ".join(part for part in (self._place, place) if part)


class Catching:
    """A context that ends where damage is met, and notes it; other errors pass."""

    def __init__(self, findings: Findings, check: Check, place: str) -> None:
        self._findings = findings
        self._check = check
        self._place = place

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, DamagedError):
            return False
        check = error.check if isinstance(error, FlawError) else self._check
        place = ": ".join(part for part in (self._place, error.place) if part)
        self._findings.add(check, place, error.message)
        return True
