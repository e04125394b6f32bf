"""A disk that was built, and the directory that it was built into.

DIRECTORY/disk.raw            the disk, or the overlay upon its parent
DIRECTORY/disk.json           every block's digest (`disk.disk`)
DIRECTORY/layout-DIGEST.json  of a release image: where every object lies (`disk.layout`); of this very disk
DIRECTORY/verity              of a release image with dm-verity: the tree of hashes
DIRECTORY/parent.json         of an overlay: every block's digest of its parent
DIRECTORY/image.json          what it is an image of, v1: line, closure, what it is seeded with, what firmware starts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from calve import record
from calve.disk.disk import Disk
from calve.disk.disk import read as read_disk
from calve.disk.layout import MAX_BYTES, Layout
from calve.errors import DamagedError, NotFoundError
from calve.nix.hashes import Hash
from calve.nix.storepath import StorePath

__all__ = ["RAW", "TREE", "TREE_PARTITION", "Built", "Loader", "is_built", "keep", "load"]

RAW: Final = "disk.raw"
TREE: Final = "verity"
TREE_PARTITION: Final = "root-verity"

_PARENT: Final = "parent.json"
_FACTS: Final = "image.json"
_VERSION: Final = 1
_LIMIT_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Loader:
    """What the unified kernel image was made of: hashed where it came from, so that what was written can be held against it.

    Attributes:
        kernel: SHA-256 of its file.
        initrd: likewise.
        command_line: the kernel's.
    """

    kernel: bytes
    initrd: bytes
    command_line: str

    def dump(self) -> dict[str, str]:
        """Return image.json's member."""
        return {
            "kernel": self.kernel.hex(),
            "initrd": self.initrd.hex(),
            "commandLine": self.command_line,
        }

    @classmethod
    def parse(cls, fields: record.Fields) -> Loader:
        """Read it; DamagedError where it is none."""
        kernel, initrd = (fields.text(name, record.sha256) for name in ("kernel", "initrd"))
        return cls(kernel, initrd, fields.text("commandLine", str))


@dataclass(frozen=True, slots=True)
class Built:
    """A disk that was built.

    Attributes:
        directory: where its files are.
        disk: every block of it.
        line: what it is an image of.
        closure: the system inside; None of a base image.
        layout: of a release image.
        parent: of an overlay, every block of the disk that it lies upon.
        file: of a disk that was made elsewhere, where it is; else it is that of the directory.
        loader: what firmware starts; None of a disk that was made elsewhere.
        seeded: of a base image, its store paths and the hashes of their NARs.
    """

    directory: Path
    disk: Disk
    line: str
    closure: StorePath | None = None
    layout: Layout | None = None
    parent: Disk | None = None
    file: Path | None = None
    loader: Loader | None = None
    seeded: Mapping[StorePath, Hash] = field(default_factory=dict)

    @property
    def paths(self) -> Mapping[StorePath, Hash]:
        """Return every store path inside, and the hash of its NAR."""
        if self.layout is None:
            return self.seeded
        return {path: placed.info.nar_hash for path, placed in self.layout.paths.items()}

    @property
    def has_verity(self) -> bool:
        """Say whether its root partition is under dm-verity."""
        return any(one.name == TREE_PARTITION for one in self.disk.partitions)

    @property
    def raw(self) -> Path:
        """Return the raw disk, or the overlay."""
        return self.directory / RAW if self.file is None else self.file


def keep(built: Built) -> Built:
    """Write what stands beside a disk that was built."""
    out = built.directory
    if built.layout is not None:
        _layout_place(out, built.disk).write_bytes(built.layout.dump())
    (out / _PARENT).unlink(missing_ok=True)
    if built.parent is not None:
        (out / _PARENT).write_bytes(built.parent.dump())
    facts: dict[str, Any] = {
        "version": _VERSION,
        "line": built.line,
        "disk": built.disk.digest,
        "closure": None if built.closure is None else str(built.closure),
        "seeded": [
            {"path": path.basename, "narHash": str(built.seeded[path])}
            for path in sorted(built.seeded)
        ],
        "loader": None if built.loader is None else built.loader.dump(),
    }
    (out / _FACTS).write_bytes(record.dump(facts))
    return built


def is_built(directory: Path) -> bool:
    """Say whether a directory was built into."""
    return (directory / _FACTS).exists()


def load(directory: Path) -> Built:
    """Read what was built into a directory.

    Raises:
        NotFoundError: there is no image.
        UsageError: its description is of a version that we do not read.
        DamagedError: its description is damaged, or of another disk.
    """
    disk = read_disk(directory / RAW)
    place = directory / _FACTS
    data = _read(place, _LIMIT_BYTES)
    if data is None:
        raise NotFoundError("there is no image", place=directory)
    fields = record.parse(
        data, what="image's description", version=_VERSION, limit=_LIMIT_BYTES, place=str(place)
    )
    if fields.text("disk", str) != disk.digest:
        raise DamagedError("the image's description is that of another disk", place=place)
    layout_place = _layout_place(directory, disk)
    layout = _read(layout_place, MAX_BYTES)
    # What an older Calve did not write is not known.
    seeded = fields.items("seeded") if fields.has("seeded") else []
    upon = None if disk.parent is None else _read(directory / _PARENT, _LIMIT_BYTES)
    return Built(
        directory,
        disk,
        fields.text("line", str),
        fields.optional("closure", StorePath.parse),
        None if layout is None else Layout.parse(layout, str(layout_place)),
        None if upon is None else Disk.parse(upon, directory / _PARENT),
        loader=Loader.parse(fields.fields("loader")) if fields.has("loader") else None,
        seeded=dict(_seeded(record.Fields(one, fields.place)) for one in seeded),
    )


def _layout_place(directory: Path, disk: Disk) -> Path:
    """Return where a disk's layout stands: its name binds it to this very disk."""
    return directory / f"layout-{disk.digest[:16]}.json"


def _seeded(fields: record.Fields) -> tuple[StorePath, Hash]:
    return fields.text("path", StorePath.from_basename), fields.text("narHash", Hash.parse)


def _read(path: Path, limit: int) -> bytes | None:
    """Read a file, a byte more than the limit at the most; None where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        return None
