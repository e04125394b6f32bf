"""The layout: where every object of an image lies, so that the next image can leave in place what stays.

Version 1 is a JSON object on one line:

    {"version": 1, "uuid": HEX, "system": BASENAME, "blocks": N, "metaBlock": 0, "headerBlocks": N, "headerUsed": N,
     "registration": SHA256 or null, "dead": [[ADDRESS, BLOCKS], …], "data": [[SHA256, ADDRESS, BLOCKS], …],
     "paths": [{"path": BASENAME, "narHash": "sha256:NIX32", "narSize": N, "references": [BASENAME, …],
         "deriver": BASENAME where known, "kind": N, "inodes": N, "meta": [ADDRESS, BLOCKS], "data": [INDEX, …]}, …]}

Addresses and sizes count blocks of 4 KiB from the image's begin. The header comes first. Every store path has one
meta object; data objects are whole blocks of files, by the SHA-256 of these blocks (base 16), one for equal ones;
`kind` is the path's type in a directory entry, `data` of a path are indices into the whole list. `registration` is
the data object of /nix-path-registration, where that does not fit behind its inode. `dead` is what ancestors had and
this image has no more: their bytes are left there. What is neither dead nor an object's is zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from calve import record
from calve.disk.erofsformat import BLOCK_BYTES, DIRECTORY, REGULAR, SLOTS, SYMLINK
from calve.disk.extents import GROUP_BLOCKS, Extent, without
from calve.errors import DamagedError
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

__all__ = ["MAX_BYTES", "VERSION", "Layout", "PlacedPath"]

VERSION = 1
MAX_BYTES = 256 << 20
_MAX_BLOCKS = 1 << 32
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UUID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class PlacedPath:
    """A store path in an image.

    Attributes:
        info: what Nix knows of it, without signatures.
        kind: its type in a directory entry.
        inodes: how many it has.
        meta: where its meta object lies.
        data: the SHA-256s of its data objects, sorted, each once.
    """

    info: PathInfo
    kind: int
    inodes: int
    meta: Extent
    data: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """An image's objects, and where they lie; sizes and addresses in blocks of 4 KiB.

    Attributes:
        uuid: of the file system, 16 bytes; an image's descendants keep it.
        system: the toplevel that the profile leads to.
        blocks: the size of the image, a multiple of 128.
        header_blocks: how many the header may have.
        header_used: how many of these it has.
        registration: the data object of the registration's whole blocks, by SHA-256; None where it has none.
        dead: what ancestors had and this image has no more; sorted.
        data: data objects by SHA-256.
        paths: store paths.
    """

    uuid: bytes
    system: StorePath
    blocks: int
    header_blocks: int
    header_used: int
    registration: bytes | None
    dead: tuple[Extent, ...]
    data: Mapping[bytes, Extent]
    paths: Mapping[StorePath, PlacedPath]

    @property
    def size_bytes(self) -> int:
        """Return the image's size."""
        return self.blocks * BLOCK_BYTES

    @property
    def dead_bytes(self) -> int:
        """Return how much of the image is dead."""
        return sum(extent.blocks for extent in self.dead) * BLOCK_BYTES

    @property
    def wants_rebase(self) -> bool:
        """Say whether the next image should be built anew: a tenth is dead, or the header is nearly full."""
        return (
            10 * self.dead_bytes > self.size_bytes or 10 * self.header_used > 9 * self.header_blocks
        )

    @property
    def live(self) -> list[Extent]:
        """Return where objects lie, the header among them; sorted."""
        header = Extent(0, self.header_blocks)
        metas = (placed.meta for placed in self.paths.values())
        return sorted([header, *metas, *self.data.values()])

    def dump(self) -> bytes:
        """Write it; the same layout gives the same bytes."""
        data = sorted((extent, digest) for digest, extent in self.data.items())
        numbers = {digest: number for number, (_, digest) in enumerate(data)}
        document = {
            "version": VERSION,
            "uuid": self.uuid.hex(),
            "system": self.system.basename,
            "blocks": self.blocks,
            "metaBlock": 0,
            "headerBlocks": self.header_blocks,
            "headerUsed": self.header_used,
            "registration": None if self.registration is None else self.registration.hex(),
            "dead": [_pair(extent) for extent in self.dead],
            "data": [[digest.hex(), *_pair(extent)] for extent, digest in data],
            "paths": [_dump_path(self.paths[path], numbers) for path in sorted(self.paths)],
        }
        return record.dump(document)

    @classmethod
    def parse(cls, text: bytes, place: str = "layout") -> Layout:
        """Read a layout.

        Raises:
            DamagedError: it is malformed, or not one of an image: objects overlap, or something is missing.
            UsageError: its version is one that we do not read.
        """
        fields = record.parse(text, what="layout", version=VERSION, limit=MAX_BYTES, place=place)
        data = [
            _parse_data(item, f"{place}: data {at}") for at, item in enumerate(fields.items("data"))
        ]
        digests = [digest for digest, _ in data]
        rows = enumerate(fields.items("paths"))
        paths = [_parse_path(item, f"{place}: path {at}", digests) for at, item in rows]
        found = cls(
            uuid=fields.text("uuid", _hex(_UUID)),
            system=fields.text("system", StorePath.from_basename),
            blocks=fields.number("blocks"),
            header_blocks=fields.number("headerBlocks"),
            header_used=fields.number("headerUsed"),
            registration=fields.optional("registration", record.sha256),
            dead=tuple(sorted(_extent(item, place) for item in fields.items("dead"))),
            data=dict(data),
            paths={placed.info.path: placed for placed in paths},
        )
        if len(found.data) != len(data) or len(found.paths) != len(paths):
            raise DamagedError("the layout has an object twice", place=place)
        if fields.number("metaBlock") != 0:
            raise DamagedError("metaBlock is not 0", place=place)
        found.check(place)
        return found

    def check(self, place: object = None) -> None:
        """Raise DamagedError unless the objects can be those of an image."""
        end = 0
        for extent in sorted([*self.live, *self.dead]):
            if extent.address < end:
                raise DamagedError(f"two objects at block {extent.address}", place=place)
            end = extent.end
        if end > self.blocks or self.header_used > self.header_blocks:
            raise DamagedError("an object ends behind its image or header", place=place)
        for size in (self.blocks, self.header_blocks):
            if size % GROUP_BLOCKS or not 0 < size < _MAX_BLOCKS:
                raise DamagedError(f"{size} blocks are not a number of whole 512 KiB", place=place)
        if self.system not in self.paths:
            raise DamagedError(f"the layout lacks its system {self.system}", place=place)
        for path, placed in self.paths.items():
            for reference in placed.info.references:
                if reference not in self.paths:
                    raise DamagedError(
                        f"the layout lacks {reference}, which {path.basename} refers to",
                        place=place,
                    )
        used = {digest for placed in self.paths.values() for digest in placed.data}
        used |= {self.registration} if self.registration is not None else set()
        if used != self.data.keys():
            raise DamagedError(
                "the layout has data that nothing refers to, or lacks some", place=place
            )

    def successor_dead(self, live: Iterable[Extent]) -> tuple[Extent, ...]:
        """Return what will be dead in an image with these objects that is built onto this one."""
        return tuple(without([*self.dead, *self.live], live))


def _pair(extent: Extent) -> list[int]:
    return [extent.address, extent.blocks]


def _dump_path(placed: PlacedPath, numbers: Mapping[bytes, int]) -> dict[str, Any]:
    info = placed.info
    fields = {
        "path": info.path.basename,
        "narHash": info.nar_hash.nix32,
        "narSize": info.nar_size,
        "references": [path.basename for path in sorted(info.references)],
        "deriver": None if info.deriver is None else info.deriver.basename,
        "kind": placed.kind,
        "inodes": placed.inodes,
        "meta": _pair(placed.meta),
        "data": sorted(numbers[digest] for digest in placed.data),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _hex(pattern: re.Pattern[str]) -> Callable[[str], bytes]:
    def read(text: str) -> bytes:
        if not pattern.fullmatch(text):
            raise DamagedError(f"{text[:100]!r} is not such digits of base 16")
        return bytes.fromhex(text)

    return read


def _extent(item: object, place: str) -> Extent:
    if isinstance(item, list) and len(item) == 2:
        address, blocks = item
        if type(address) is type(blocks) is int and 0 <= address < _MAX_BLOCKS > blocks > 0:
            return Extent(address, blocks)
    raise DamagedError("a place that is not [address, blocks]", place=place)


def _parse_data(item: object, place: str) -> tuple[bytes, Extent]:
    if not isinstance(item, list) or len(item) != 3 or not isinstance(item[0], str):
        raise DamagedError("not [digest, address, blocks]", place=place)
    if not _SHA256.fullmatch(item[0]):
        raise DamagedError(f"{item[0][:100]!r} is not the digest of a data object", place=place)
    return bytes.fromhex(item[0]), _extent(item[1:], place)


def _parse_path(item: object, place: str, digests: list[bytes]) -> PlacedPath:
    fields = record.Fields(item, place)
    nar_size = fields.number("narSize")
    kind = fields.number("kind")
    if nar_size == 0 or kind not in {DIRECTORY, REGULAR, SYMLINK}:
        raise DamagedError("narSize or kind is not that of a store path", place=place)
    references = set(fields.texts("references", StorePath.from_basename))
    numbers = fields.items("data")
    if not all(type(number) is int and 0 <= number < len(digests) for number in numbers):
        raise DamagedError("data that the layout does not have", place=place)
    meta = _extent(fields.items("meta"), place)
    inodes = fields.number("inodes")
    if not 0 < inodes <= meta.blocks * SLOTS:
        raise DamagedError(f"{inodes} inodes in {meta.blocks} blocks", place=place)
    return PlacedPath(
        info=PathInfo(
            path=fields.text("path", StorePath.from_basename),
            nar_hash=fields.text("narHash", _sha256),
            nar_size=nar_size,
            references=tuple(sorted(references)),
            deriver=fields.optional("deriver", StorePath.from_basename),
        ),
        kind=kind,
        inodes=inodes,
        meta=meta,
        data=tuple(sorted({digests[number] for number in numbers})),
    )


def _sha256(text: str) -> Hash:
    value = Hash.parse(text)
    if value.algorithm != "sha256":
        raise DamagedError(f"a {value.algorithm} hash instead of sha256")
    return value
