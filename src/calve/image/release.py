"""Release images, with the closure inside: EROFS, laid out onto the parent's.

What the parent has is neither read nor moved, and what is written is an overlay of the changed blocks.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calve.disk import assemble, erofs, gpt
from calve.disk import verity as dm_verity
from calve.disk.arch import Arch
from calve.disk.disk import BLOCK_BYTES
from calve.disk.erofsformat import BLOCK_BYTES as FS_BLOCK_BYTES
from calve.disk.extents import Extent
from calve.disk.scratch import write_all
from calve.errors import DamagedError, UsageError
from calve.image.builder import Builder
from calve.image.built import TREE, TREE_PARTITION, Built, keep
from calve.image.parent import Blocks
from calve.image.source import Source
from calve.image.start import Start
from calve.nix.storepath import StorePath
from calve.progress import Note, Progress, silent
from calve.tasks import Cancel

__all__ = ["Release"]

_LEAST_TREE_BYTES: Final = 8 << 20  # of 1 GiB of data


@dataclass(frozen=True, slots=True)
class Release:
    """A release image to build.

    Attributes:
        line: what it is an image of.
        arch: the processor.
        start: what firmware starts.
        source: has the closure.
        system: the toplevel.
        parent: the image of the release before; None writes a whole one.
        blocks: reads the parent's blocks.
        verity: put the root partition under dm-verity; as the parent is.
    """

    line: str
    arch: Arch
    start: Start
    source: Source
    system: StorePath
    parent: Built | None = None
    blocks: Blocks | None = None
    verity: bool = False

    def build(self, out: Path, *, progress: Progress = silent, cancel: Cancel) -> Built:
        """Build it into a directory, which must not be the parent's.

        Raises:
            UsageError: the parent is no release image, or stands in that directory.
            SpaceError: the parent's header has no room for more paths: build it whole.
        """
        parent = self.parent
        if parent is not None:
            self._check(parent, out)
        out.mkdir(parents=True, exist_ok=True)
        builder = Builder(self.line, self.arch, self.start, out, progress, cancel)
        with tempfile.TemporaryDirectory(prefix=".image-", dir=out) as name:
            work = Path(name)
            store = work / "store"
            with erofs.Writer(store, None if parent is None else parent.layout) as writer:
                self.source.fill(writer, [self.system])
                progress(Note("laying the file system out"))
                layout = writer.finish(self.system)
                dirty = None if parent is None else writer.dirty
                if parent is not None:
                    self._complete(store, writer.written, writer.dirty, parent)
            identity = uuid.UUID(bytes=layout.uuid)
            words = [f"root=UUID={identity}", "rootfstype=erofs"]
            parts = [assemble.Part("root", gpt.Kind.ROOT, store, fill=True, dirty=dirty)]
            if self.verity:
                progress(Note("hashing the file system for dm-verity"))
                tree = self._tree(store, work, builder.seed, dirty or (), cancel)
                words.append(_word(tree))
                parts.insert(0, self._hashes(tree))
            upon = None if parent is None else parent.disk
            esp, loader = builder.loader(work, words, upon)
            disk = builder.disk([esp, *parts], upon)
            if self.verity:  # what stands in `out` already is whole until all is new
                (work / TREE).replace(out / TREE)
        return keep(Built(out, disk, self.line, self.system, layout, upon, loader=loader))

    def _check(self, parent: Built, out: Path) -> None:
        if parent.layout is None:
            raise UsageError("the parent is no release image", place=parent.directory)
        if parent.directory.resolve() == out.resolve():
            raise UsageError("this is the parent's own directory", place=out)
        if parent.has_verity != self.verity:
            raise UsageError(
                f"the parent is {'' if parent.has_verity else 'not '}under dm-verity",
                place=parent.directory,
                hint="build it whole, with --full",
            )

    def _tree(
        self, store: Path, work: Path, seed: uuid.UUID, dirty: Collection[int], cancel: Cancel
    ) -> dm_verity.Tree:
        """Make the tree of hashes, upon the parent's where there is one."""
        before = None
        if self.parent is not None:
            before = dm_verity.read(self.parent.directory / TREE)
            loader = self.parent.loader
            if loader is None:
                raise UsageError(
                    "the parent was built by an older Calve, which did not write its loader down",
                    place=self.parent.directory,
                    hint="build it whole, with --full",
                )
            if _word(before) not in loader.command_line.split():
                raise DamagedError("the tree is not that of the parent's disk", place=before.path)
        return dm_verity.write(
            store, work / TREE, seed=seed, parent=before, dirty=dirty, cancel=cancel
        )

    def _hashes(self, tree: dm_verity.Tree) -> assemble.Part:
        """Return the tree's partition: as large as the parent's, so that what stands behind it does not move."""
        size = tree.path.stat().st_size
        room = max(_LEAST_TREE_BYTES, 2 * size)
        if self.parent is not None:
            disk = self.parent.disk
            room = next(one.size_bytes for one in disk.partitions if one.name == TREE_PARTITION)
            if size > room:
                raise UsageError(
                    "the parent has no room for the hashes of so much data",
                    place=self.parent.directory,
                    hint="build it whole, with --full",
                )
        return assemble.Part(
            TREE_PARTITION, gpt.Kind.ROOT_VERITY, tree.path, room, dirty=tree.changed
        )

    def _complete(
        self, store: Path, written: Sequence[Extent], dirty: Collection[int], parent: Built
    ) -> None:
        """Fill the changed blocks up with what of the parent stands beside the change in them."""
        if self.blocks is None:
            raise UsageError("the parent's blocks cannot be read", place=parent.directory)
        start = next(one.start_bytes for one in parent.disk.partitions if one.name == "root")
        known = {block.index: block for block in parent.disk.blocks}
        per_block = BLOCK_BYTES // FS_BLOCK_BYTES
        descriptor = os.open(store, os.O_RDWR)
        try:
            for number in sorted(dirty):
                first = number * per_block
                gaps = _gaps(written, first, first + per_block)
                index = start // BLOCK_BYTES + number
                if not gaps or index not in known:
                    continue
                data = self.blocks.read(known[index])
                for gap in gaps:
                    at = (gap.address - first) * FS_BLOCK_BYTES
                    piece = data[at : at + gap.blocks * FS_BLOCK_BYTES]
                    write_all(descriptor, piece, gap.address * FS_BLOCK_BYTES)
        finally:
            os.close(descriptor)


def _gaps(written: Sequence[Extent], first: int, end: int) -> list[Extent]:
    """Return what of a run of blocks is not written; `written` is sorted."""
    found = []
    at = first
    for extent in written:
        if extent.end <= at or extent.address >= end:
            continue
        if extent.address > at:
            found.append(Extent(at, extent.address - at))
        at = max(at, extent.end)
    if at < end:
        found.append(Extent(at, end - at))
    return found


def _word(tree: dm_verity.Tree) -> str:
    """Return the word of the kernel command line that says the root hash."""
    return f"roothash={tree.root_hash}"
