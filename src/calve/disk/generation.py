"""A generation: the objects of one image, those that its parent has and those that are new, and their addresses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from calve.disk.erofsformat import SLOTS
from calve.disk.extents import GROUP_BLOCKS, Extent, allocate, merged
from calve.disk.intake import Blocks
from calve.disk.layout import Layout, PlacedPath
from calve.disk.metaobject import Template
from calve.errors import SpaceError
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

__all__ = ["Generation", "Staged", "generation"]


@dataclass(frozen=True, slots=True)
class Staged:
    """A path that was staged: its meta object, and its root's type in a directory entry."""

    info: PathInfo
    template: Template
    kind: int


@dataclass(frozen=True, slots=True)
class Generation:
    """What an image will be.

    Attributes:
        layout: of the image.
        metas: the paths whose meta objects are new, sorted.
        data: the data objects that are new, by SHA-256.
        written: what differs from the parent, or may: new objects, the header, and all by which the image grew.
    """

    layout: Layout
    metas: tuple[Staged, ...]
    data: tuple[bytes, ...]
    written: tuple[Extent, ...]

    @property
    def addresses(self) -> dict[bytes, int]:
        """Return where data objects lie."""
        return {digest: extent.address for digest, extent in self.layout.data.items()}

    @property
    def entries(self) -> list[tuple[StorePath, int, int]]:
        """Return each path with its inode's number and its type."""
        paths = self.layout.paths
        return [
            (path, paths[path].meta.address * SLOTS, paths[path].kind) for path in sorted(paths)
        ]


def generation(
    parent: Layout | None,
    system: StorePath,
    infos: Sequence[PathInfo],
    staged: Mapping[StorePath, Staged],
    blocks: Mapping[bytes, Blocks],
    *,
    registration: bytes | None,
    header_used: int,
) -> Generation:
    """Give every object its address.

    Args:
        parent: the layout of the image that this one follows.
        system: the toplevel.
        infos: of its closure, sorted by path.
        staged: of those that the parent does not have.
        blocks: of their data objects.
        registration: the data object of the registration.
        header_used: how many blocks the header needs.

    Raises:
        SpaceError: the parent's header is too small.
    """
    objects = _Objects(parent)
    for info in infos:
        objects.keep(info.path)
    fresh = tuple(staged[info.path] for info in infos if info.path not in objects.paths)
    for each in fresh:
        sizes = {digest: blocks[digest].count for digest in objects.new(each.template.contents)}
        objects.add(each.info.path, each.template.size_blocks, sizes)
    if registration is not None:
        sizes = {digest: blocks[digest].count for digest in objects.new((registration,))}
        objects.add(None, 0, sizes)
    header_blocks = _header(parent, header_used)
    size = header_blocks if parent is None else parent.blocks
    places = objects.lay(header_blocks, size)
    live = merged([Extent(0, header_blocks), *objects.taken, *places.values()])
    layout = Layout(
        uuid=_uuid(system) if parent is None else parent.uuid,
        system=system,
        blocks=max(size, _round(live[-1].end)),
        header_blocks=header_blocks,
        header_used=header_used,
        registration=registration,
        dead=() if parent is None else parent.successor_dead(live),
        data=objects.data,
        paths=objects.paths | {each.info.path: _placed(each, places) for each in fresh},
    )
    new = tuple(key for key in places if isinstance(key, bytes))
    return Generation(layout, fresh, new, _written(parent, layout, places.values()))


_Key: TypeAlias = StorePath | bytes


class _Objects:
    """What an image will have: what stays in its place, and what is new, path by path."""

    def __init__(self, parent: Layout | None) -> None:
        self._paths = {} if parent is None else parent.paths
        self._data = {} if parent is None else parent.data
        self._runs: list[dict[_Key, int]] = []
        self._seen: set[bytes] = set()
        self.paths: dict[StorePath, PlacedPath] = {}  # that stay
        self.data: dict[bytes, Extent] = {}

    def keep(self, path: StorePath) -> None:
        """Leave a path where it is, with its data, if the parent has it."""
        placed = self._paths.get(path)
        if placed is not None:
            self.paths[path] = placed
            self.new(placed.data)

    def new(self, digests: Iterable[bytes]) -> list[bytes]:
        """Leave data where it is that the parent has; return what it does not have, each once and never again."""
        found = []
        for digest in digests:
            if digest in self._data:
                self.data[digest] = self._data[digest]
            elif digest not in self._seen:
                self._seen.add(digest)
                found.append(digest)
        return found

    def add(self, path: StorePath | None, size: int, data: Mapping[bytes, int]) -> None:
        """Have room made for a path's meta object and its new data, sizes in blocks."""
        run: dict[_Key, int] = {} if path is None else {path: size}
        run.update(data.items())
        self._runs.append(run)

    @property
    def taken(self) -> list[Extent]:
        """Return where what stays lies, and what was laid."""
        return [*(placed.meta for placed in self.paths.values()), *self.data.values()]

    def lay(self, begin: int, size: int) -> dict[_Key, Extent]:
        """Give what is new its places."""
        runs = [list(run.values()) for run in self._runs]
        taken = [Extent(0, begin), *self.taken]
        found = allocate(runs, taken, begin=begin, size=size)
        sizes = [item for run in self._runs for item in run.items()]
        places = {
            key: Extent(address, count) for (key, count), address in zip(sizes, found, strict=True)
        }
        self.data |= {key: place for key, place in places.items() if isinstance(key, bytes)}
        return places


def _round(blocks: int) -> int:
    return -(-blocks // GROUP_BLOCKS) * GROUP_BLOCKS


def _header(parent: Layout | None, used: int) -> int:
    """Return how many blocks the header has: of a first image, half as many again as it needs, and 512 KiB at least."""
    if parent is None:
        return _round(used + used // 2)
    if used > parent.header_blocks:
        raise SpaceError(
            f"the header needs {used} blocks, the parent image's has {parent.header_blocks}",
            hint="build the image without a parent: its header will be larger",
        )
    return parent.header_blocks


def _uuid(system: StorePath) -> bytes:
    """Return a UUID of our own making (RFC 9562, version 8): the same system begins the same lineage."""
    made = bytearray(hashlib.sha256(f"calve-erofs-1;{system}".encode()).digest()[:16])
    made[6] = made[6] & 0x0F | 0x80
    made[8] = made[8] & 0x3F | 0x80
    return bytes(made)


def _placed(staged: Staged, places: Mapping[_Key, Extent]) -> PlacedPath:
    template = staged.template
    meta = places[staged.info.path]
    data = tuple(sorted(template.contents))
    info = replace(staged.info, signatures=(), ca=None)
    return PlacedPath(info, staged.kind, template.inodes, meta, data)


def _written(parent: Layout | None, layout: Layout, places: Iterable[Extent]) -> tuple[Extent, ...]:
    """Return what the image's file holds; what the header had and has no more is zeros in it."""
    if parent is None:
        return (Extent(0, layout.blocks),)
    own = [Extent(0, max(layout.header_used, parent.header_used)), *places]
    if layout.blocks > parent.blocks:
        own.append(Extent(parent.blocks, layout.blocks - parent.blocks))
    return tuple(merged(own))
