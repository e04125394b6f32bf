"""Base images, whose machines pull: a small ext4 root, which grows to its volume, and what it is seeded with.

That is its own kernel and initrd, and a release's closure where that is asked for: a machine then pulls the difference.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calve.disk import assemble, ext4, gpt
from calve.disk.arch import Arch
from calve.disk.disk import BLOCK_BYTES
from calve.image.builder import Builder
from calve.image.built import Built, keep
from calve.image.seedtree import SeedTree
from calve.image.source import Source
from calve.image.start import Start
from calve.nix.hashes import Hash
from calve.nix.storepath import StorePath
from calve.progress import Progress, silent
from calve.tasks import Cancel

__all__ = ["Base"]

_LEAST_ROOT_BYTES: Final = (
    256 << 20
)  # smaller ones have few inodes and a small journal, however far they grow
_SPARE: Final = 1.25


@dataclass(frozen=True, slots=True)
class Base:
    """A base image to build.

    Attributes:
        line: what it is an image of; all GUIDs follow from it.
        arch: the processor.
        start: what firmware starts: its initrd has the agent.
        source: where seeds come from.
        seeds: store paths whose closures it has from the beginning.
    """

    line: str
    arch: Arch
    start: Start
    source: Source
    seeds: tuple[StorePath, ...] = ()

    def build(self, out: Path, *, progress: Progress = silent, cancel: Cancel) -> Built:
        """Build it into a directory.

        Raises:
            UsageError, NotFoundError: what it needs is not there.
        """
        out.mkdir(parents=True, exist_ok=True)
        builder = Builder(self.line, self.arch, self.start, out, progress, cancel)
        with tempfile.TemporaryDirectory(prefix=".image-", dir=out) as name:
            work = Path(name)
            root = work / "root"
            seeded = self._root(root, work, cancel)
            esp, loader = builder.loader(work, ("root=LABEL=nixos",))
            part = assemble.Part("root", gpt.Kind.ROOT, root, fill=True)
            disk = builder.disk([esp, part])
        return keep(Built(out, disk, self.line, loader=loader, seeded=seeded))

    def _root(self, path: Path, work: Path, cancel: Cancel) -> dict[StorePath, Hash]:
        """Make the root file system: nothing but what it is seeded with, which is returned."""
        tree = work / "tree"
        tree.mkdir(mode=0o755)
        roots = tuple(dict.fromkeys((*self.start.seeds, *self.seeds)))
        with SeedTree(tree) as store:
            if roots:
                self.source.fill(store, roots)
        used = sum(
            file.lstat().st_blocks * 512 + 4096 for file in tree.rglob("*")
        )  # what it takes here it takes there
        size = max(_LEAST_ROOT_BYTES, int(used * _SPARE) + (64 << 20))
        ext4.make(path, -(-size // BLOCK_BYTES) * BLOCK_BYTES, tree=tree, cancel=cancel)
        return {info.path: info.nar_hash for info in store.infos}
