"""Builds raw disks that UEFI starts: base images, whose machines pull, and release images, with the closure inside.

A base image has a small ext4 root, which grows to its volume, with what it is seeded with: its own kernel and initrd,
and a release's closure where that is asked for. A release image has the closure as EROFS, laid out onto its parent's:
what the parent has is neither read nor moved, and what is written is an overlay of the changed blocks.

    DIRECTORY/disk.raw            the disk, or the overlay upon its parent
    DIRECTORY/disk.json           every block's digest (`disk.disk`)
    DIRECTORY/layout-DIGEST.json  of a release image: where every object lies (`disk.layout`); of this very disk
    DIRECTORY/verity              of a release image with dm-verity: the tree of hashes
    DIRECTORY/parent.json         of an overlay: every block's digest of its parent
    DIRECTORY/image.json          what it is an image of, v1: line, closure, what it is seeded with, what firmware starts
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from calve.contract import abi
from calve.disk import assemble, erofs, ext4, fat, gpt, uki
from calve.disk import verity as dm_verity
from calve.disk.arch import Arch
from calve.disk.disk import BLOCK_BYTES, Disk
from calve.disk.disk import read as read_disk
from calve.disk.erofsformat import BLOCK_BYTES as FS_BLOCK_BYTES
from calve.disk.extents import Extent
from calve.disk.layout import Layout
from calve.errors import CalveError, DamagedError, NotFoundError, UsageError
from calve.image.parent import Blocks
from calve.image.seedtree import SeedTree
from calve.image.source import Source
from calve.nix.hashes import Hash
from calve.nix.storepath import STORE_DIR, StorePath
from calve.progress import Note, Progress, silent
from calve.tasks import Cancel

__all__ = [
    "CONSOLES",
    "Base",
    "Built",
    "Loader",
    "Release",
    "Start",
    "is_built",
    "load",
    "start_of",
]

CONSOLES: Final = ("console=tty0", "console=ttyS0,115200n8")
"""The screen, and last the serial console: that is /dev/console, which EC2 shows."""

_NAMESPACE: Final = uuid.UUID("ca1fe000-0000-4000-8000-0000000000ff")
_RAW: Final = "disk.raw"
_TREE: Final = "verity"
_TREE_PARTITION: Final = "root-verity"
_PARENT: Final = "parent.json"
_FACTS: Final = "image.json"
_VERSION: Final = 1
_LEAST_TREE_BYTES: Final = 8 << 20  # of 1 GiB of data
_LEAST_ROOT_BYTES: Final = (
    256 << 20
)  # smaller ones have few inodes and a small journal, however far they grow
_SPARE: Final = 1.25
_LIMIT_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Start:
    """What firmware starts.

    Attributes:
        kernel: its file.
        initrd: its file.
        uname: the kernel's release; empty where neither the system nor the kernel's file says it.
        params: the kernel's command line, without root= and init=.
        seeds: store paths that the two come from.
        os_release: content of os-release(5).
    """

    kernel: Path
    initrd: Path
    uname: str
    params: tuple[str, ...]
    seeds: tuple[StorePath, ...] = ()
    os_release: str = "ID=calve\nPRETTY_NAME=Calve\n"


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
        return any(one.name == _TREE_PARTITION for one in self.disk.partitions)

    @property
    def raw(self) -> Path:
        """Return the raw disk, or the overlay."""
        return self.directory / _RAW if self.file is None else self.file


def start_of(
    source: Source,
    system: StorePath,
    work: Path,
    *,
    initrd: Path | None = None,
    debug: bool = False,
) -> Start:
    """Read what a system starts with: kernel, initrd and parameters of its bootspec.

    Args:
        source: has the system.
        system: the toplevel.
        work: for what has to be unpacked.
        initrd: in place of the system's own.
        debug: ask for the root shell that the image's policy may allow.

    Raises:
        NotFoundError: the system has no boot.json, or names no kernel or initrd.
        DamagedError: it is damaged.
    """
    top = source.take(system, work)
    place = top / "boot.json"
    try:
        data = place.read_bytes()
    except OSError as error:
        raise NotFoundError(
            f"the system has no boot.json: {error.strerror}",
            place=system,
            hint="only a system (toplevel) can be made an image",
        ) from error
    wanted = abi.parse_wanted(data, f"{system}/boot.json")
    spec = wanted.bootspec
    if spec is None or (spec.initrd is None and initrd is None):
        raise NotFoundError("the system's boot.json names no initrd", place=system)
    kernel_path, kernel = _file(source, spec.kernel, work)
    seeds = [kernel_path]
    if initrd is None:
        path, initrd = _file(source, spec.initrd or "", work)
        seeds.append(path)
    own = {word.partition("=")[0] for word in spec.params} - {"console"}
    words = [word for word in spec.params if word not in CONSOLES]
    words += [*CONSOLES, f"calve.kernel={kernel_path}"]
    words += [word for word in ("panic=30",) if word.partition("=")[0] not in own]
    words += ["calve.debug=1"] if debug else []
    release = wanted.release or uki.kernel_release(kernel)
    return Start(kernel, initrd, release, tuple(words), tuple(seeds))


def _file(source: Source, file: str, work: Path) -> tuple[StorePath, Path]:
    """Find a file of a store path; return the path and where the file can be read."""
    name, _, inner = file.removeprefix(f"{STORE_DIR}/").partition("/")
    path = StorePath.from_basename(name)
    place = source.take(path, work)
    return path, place / inner if inner else place


class _Builder:
    """What both kinds of image have: a loader, a partition table, one directory."""

    def __init__(
        self, line: str, arch: Arch, start: Start, out: Path, progress: Progress, cancel: Cancel
    ) -> None:
        self.arch = arch
        self.start = start
        self.out = out
        self.progress = progress
        self.cancel = cancel
        self.seed = uuid.uuid5(_NAMESPACE, f"{line} {arch.name}")
        self.made: Loader | None = None

    def loader(self, work: Path, root: Sequence[str]) -> assemble.Part:
        """Make the EFI system partition."""
        self.progress(Note("making the unified kernel image and the EFI system partition"))
        line = " ".join([*self.start.params, *root, f"init={abi.INIT}"])
        self.made = Loader(_digest(self.start.kernel), _digest(self.start.initrd), line)
        made = uki.write(
            uki.Uki(
                self.arch,
                uki.find_stub(self.arch),
                self.start.kernel,
                self.start.initrd,
                line,
                self.start.os_release,
                self.start.uname,
            ),
            work / "loader.efi",
            cancel=self.cancel,
        )
        size = fat.DEFAULT_BYTES if made.size_bytes < fat.DEFAULT_BYTES * 3 // 4 else fat.MAX_BYTES
        esp = work / "esp"
        fat.make(
            esp, made.path, arch=self.arch, seed=self.seed, size_bytes=size, cancel=self.cancel
        )
        return assemble.Part("esp", gpt.Kind.ESP, esp)

    def disk(self, parts: Sequence[assemble.Part], parent: Disk | None = None) -> Disk:
        """Put the disk together."""
        self.progress(Note("putting the disk together"))
        raw = self.out / _RAW
        raw.unlink(missing_ok=True)
        return assemble.build(
            parts, raw, arch=self.arch, seed=self.seed, parent=parent, cancel=self.cancel
        )


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
        builder = _Builder(self.line, self.arch, self.start, out, progress, cancel)
        with tempfile.TemporaryDirectory(prefix=".image-", dir=out) as name:
            work = Path(name)
            root = work / "root"
            seeded = self._root(root, work, cancel)
            esp = builder.loader(work, ("root=LABEL=nixos",))
            part = assemble.Part("root", gpt.Kind.ROOT, root, fill=True)
            disk = builder.disk([esp, part])
        return _keep(Built(out, disk, self.line, loader=builder.made, seeded=seeded))

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
        if parent is not None and parent.layout is None:
            raise UsageError("the parent is no release image", place=parent.directory)
        if parent is not None and parent.directory.resolve() == out.resolve():
            raise UsageError("this is the parent's own directory", place=out)
        if parent is not None and parent.has_verity != self.verity:
            raise UsageError(
                f"the parent is {'' if parent.has_verity else 'not '}under dm-verity",
                place=parent.directory,
                hint="build it whole, with --full",
            )
        out.mkdir(parents=True, exist_ok=True)
        builder = _Builder(self.line, self.arch, self.start, out, progress, cancel)
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
            hashes = []
            if self.verity:
                progress(Note("hashing the file system for dm-verity"))
                tree = self._tree(store, work, builder.seed, dirty or (), cancel)
                hashes.append(self._hashes(tree))
                words.append(f"roothash={tree.root_hash}")
            esp = builder.loader(work, words)
            part = assemble.Part("root", gpt.Kind.ROOT, store, fill=True, dirty=dirty)
            disk = builder.disk([esp, *hashes, part], None if parent is None else parent.disk)
            if self.verity:
                tree.path.replace(out / _TREE)
        upon = None if parent is None else parent.disk
        return _keep(Built(out, disk, self.line, self.system, layout, upon, loader=builder.made))

    def _tree(
        self, store: Path, work: Path, seed: uuid.UUID, dirty: Collection[int], cancel: Cancel
    ) -> dm_verity.Tree:
        """Make the tree of hashes, upon the parent's where there is one."""
        before = None if self.parent is None else dm_verity.read(self.parent.directory / _TREE)
        return dm_verity.write(
            store, work / _TREE, seed=seed, parent=before, dirty=dirty, cancel=cancel
        )

    def _hashes(self, tree: dm_verity.Tree) -> assemble.Part:
        """Return the tree's partition: as large as the parent's, so that what stands behind it does not move."""
        size = tree.path.stat().st_size
        room = max(_LEAST_TREE_BYTES, 2 * size)
        if self.parent is not None:
            disk = self.parent.disk
            room = next(one.size_bytes for one in disk.partitions if one.name == _TREE_PARTITION)
            if size > room:
                raise UsageError(
                    "the parent has no room for the hashes of so much data",
                    place=self.parent.directory,
                    hint="build it whole, with --full",
                )
        return assemble.Part(
            _TREE_PARTITION, gpt.Kind.ROOT_VERITY, tree.path, room, dirty=tree.changed
        )

    def _complete(
        self, store: Path, written: Sequence[Extent], dirty: Collection[int], parent: Built
    ) -> None:
        """Fill the changed blocks up with what of the parent stands beside the change in them."""
        if self.blocks is None:
            raise UsageError("the parent's blocks cannot be read", place=parent.directory)
        start = next(one.start_bytes for one in parent.disk.partitions if one.name == "root")
        known = {block.index for block in parent.disk.blocks}
        per_block = BLOCK_BYTES // FS_BLOCK_BYTES
        descriptor = os.open(store, os.O_RDWR)
        try:
            for number in sorted(dirty):
                first = number * per_block
                gaps = _gaps(written, first, first + per_block)
                index = start // BLOCK_BYTES + number
                if not gaps or index not in known:
                    continue
                data = self.blocks.read(index)
                for gap in gaps:
                    at = (gap.address - first) * FS_BLOCK_BYTES
                    piece = data[at : at + gap.blocks * FS_BLOCK_BYTES]
                    os.pwrite(descriptor, piece, gap.address * FS_BLOCK_BYTES)
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


def _layout_place(directory: Path, disk: Disk) -> Path:
    """Return where a disk's layout stands: its name binds it to this very disk."""
    return directory / f"layout-{disk.digest[:16]}.json"


def _keep(built: Built) -> Built:
    """Write what stands beside the disk."""
    out = built.directory
    if built.layout is not None:
        _layout_place(out, built.disk).write_bytes(built.layout.dump())
    (out / _PARENT).unlink(missing_ok=True)
    if built.parent is not None:
        (out / _PARENT).write_bytes(built.parent.dump())
    facts: dict[str, object] = {
        "version": _VERSION,
        "line": built.line,
        "disk": built.disk.digest,
        "closure": None if built.closure is None else str(built.closure),
    }
    if built.seeded:
        facts["seeded"] = {one.basename: str(nar_hash) for one, nar_hash in built.seeded.items()}
    if built.loader is not None:
        facts["loader"] = {
            "kernel": built.loader.kernel.hex(),
            "initrd": built.loader.initrd.hex(),
            "commandLine": built.loader.command_line,
        }
    (out / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return built


def is_built(directory: Path) -> bool:
    """Say whether a directory was built into."""
    return (directory / _FACTS).exists()


def load(directory: Path) -> Built:
    """Read what was built into a directory.

    Raises:
        NotFoundError: there is no image.
        DamagedError: its description is damaged, or of another disk.
    """
    disk = read_disk(directory / _RAW)
    place = directory / _FACTS
    try:
        facts = json.loads(place.read_bytes())
        line, digest, closure = facts["line"], facts["disk"], facts["closure"]
        system = None if closure is None else StorePath.parse(closure)
        loader = _loader(facts.get("loader"))
        seeded = {
            StorePath.from_basename(name): Hash.parse(text)
            for name, text in facts.get("seeded", {}).items()
        }
    except FileNotFoundError as error:
        raise NotFoundError("there is no image", place=directory) from error
    except (ValueError, KeyError, TypeError, AttributeError, CalveError) as error:
        raise DamagedError("the image's description is damaged", place=place) from error
    if digest != disk.digest or not isinstance(line, str):
        raise DamagedError("the image's description is that of another disk", place=place)
    layout = _read(_layout_place(directory, disk))
    upon = _read(directory / _PARENT)
    return Built(
        directory,
        disk,
        line,
        system,
        None if layout is None else Layout.parse(layout, str(_layout_place(directory, disk))),
        None if upon is None or disk.parent is None else Disk.parse(upon, directory / _PARENT),
        loader=loader,
        seeded=seeded,
    )


def _loader(found: Mapping[str, str] | None) -> Loader | None:
    """Read what image.json says of the loader; KeyError, TypeError, ValueError where it is damaged."""
    if found is None:
        return None  # it was built by an older Calve
    line = found["commandLine"]
    if not isinstance(line, str):
        raise TypeError
    return Loader(bytes.fromhex(found["kernel"]), bytes.fromhex(found["initrd"]), line)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_LIMIT_BYTES + 1)
    except FileNotFoundError:
        return None
