"""An image of store paths as EROFS, a `nix.Sink`: what its parent image had stays where it was.

NARs are staged in any order, by many threads, into a scratch file beside the image: the blocks of contents, hashed,
and a meta object for each path. `finish` gives everything its address (sorted by path: the order of arrival decides
nothing) and writes what the parent does not have. An image onto a parent is a sparse file that holds no more than
that: `written` and `dirty` say where it is, the rest is the parent's. Paths that the parent has are never read.

The image: /nix/store with the closure of one system, /nix-path-registration, the system profile's links, and empty
directories to mount on. The header comes first: superblock, these directories, a reserve for more store paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from calve.disk.erofsformat import BLOCK_BYTES, kind_of, superblock
from calve.disk.extents import Extent, groups
from calve.disk.generation import Generation, Staged, generation
from calve.disk.header import BASE, STORE, Header, check_directories
from calve.disk.intake import Blocks, Intake
from calve.disk.layout import Layout
from calve.disk.metaobject import Template, build
from calve.disk.outfile import replacing
from calve.disk.scratch import Scratch, write_all
from calve.errors import CalveError, DamagedError, NotFoundError, VerificationError
from calve.nix import registration
from calve.nix.closure import closure
from calve.nix.nar import Event, File
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

__all__ = ["DIRECTORIES", "Writer"]

DIRECTORIES = ("dev", "etc", "home", "mnt", "proc", "root", "run", "srv", "sys", "tmp", "var")
"""What stage 2 mounts on, or writes to; /bin, /lib and /usr it makes as it wants them."""


class Writer:
    """Writes one image. Use it as a context manager, or `close` it.

    Args:
        out: the image; it appears when it is whole, over what was there.
        parent: the layout of the image that this one follows; None writes a whole image.
        directories: empty ones, relative to the root, beside /nix.

    Attributes:
        written: where the image's own bytes lie, after `finish`; sorted. A whole image is all its own.

    Raises:
        UsageError: a directory's name is none, or taken.
        SpaceError, CalveError: the directory of `out` cannot be written to.
    """

    def __init__(
        self, out: Path, parent: Layout | None = None, *, directories: Iterable[str] = DIRECTORIES
    ) -> None:
        self.written: tuple[Extent, ...] = ()
        self._out = out
        self._parent = parent
        self._directories = check_directories(directories)
        self._scratch = Scratch(out.parent)
        self._blocks: dict[bytes, Blocks] = {}
        self._staged: dict[StorePath, Staged] = {}
        self._valid: dict[StorePath, PathInfo] = (
            {} if parent is None else {path: placed.info for path, placed in parent.paths.items()}
        )

    @property
    def dirty(self) -> frozenset[int]:
        """Return the blocks of 512 KiB, by their index from the image's begin, that have a byte of `written`."""
        return frozenset(groups(self.written))

    # A sink

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return those that neither the parent has nor a commit brought, in their order."""
        return [path for path in paths if path not in self._valid]

    def adopt(self, infos: Sequence[PathInfo]) -> set[StorePath]:  # noqa: ARG002  (the seam's)
        """Return nothing: a scratch file has no name, interrupted runs leave none."""
        return set()

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        """Take a path's tree into the scratch file; see `Sink`.

        Raises:
            DamagedError: from the events, or they make no tree.
            SpaceError, CalveError: the scratch file cannot be written to.
        """
        intake = self._intake()
        try:
            intake.take(events)
            template = build(intake.nodes, intake.tails, self._scratch, outside=STORE)
        except DamagedError as error:
            raise DamagedError(error.message, place=error.place or info.path) from error
        self._staged[info.path] = Staged(info, template, kind_of(intake.nodes[0].mode))

    def discard(self, path: StorePath) -> None:
        """Forget a staged path; nothing happens where it was not staged."""
        self._staged.pop(path, None)

    def flush(self) -> None:
        """Do nothing: what is staged is of use to this process alone."""

    def commit(self, batch: Sequence[PathInfo]) -> None:
        """Make staged paths valid.

        Raises:
            VerificationError: a path is valid already with another NAR hash.
            DamagedError: a reference is neither in the batch nor valid.
            CalveError: a path was not staged.
        """
        for info in batch:
            known = self._valid.get(info.path)
            if known is not None and known.nar_hash != info.nar_hash:
                raise VerificationError("the image has it with another hash", place=info.path)
            if known is None and info.path not in self._staged:
                raise CalveError("committed without being staged", place=info.path)
        named = {info.path for info in batch}
        for info in batch:
            for reference in info.references:
                if reference not in named and reference not in self._valid:
                    raise DamagedError(
                        f"it refers to {reference}, which is missing", place=info.path
                    )
        for info in batch:
            if self._valid.setdefault(info.path, info) is info:
                self._staged[info.path] = replace(self._staged[info.path], info=info)

    # The image

    def finish(self, system: StorePath) -> Layout:
        """Write the image with the closure of a system, and return its layout.

        What else was committed, or the parent has, is not part of it.

        Raises:
            NotFoundError: a path of the closure was not committed.
            SpaceError: the header has no room for so many paths: the image must be built without a parent.
            CalveError: the image cannot be written.
        """
        infos = sorted(closure([system], self._info), key=lambda info: info.path)
        registered = self._intake()
        registered.take(_registration(infos))
        top = Header(self._directories, registered.nodes[0], registered.tails)
        top.link(system)
        draft = top.build(self._scratch, [(info.path, 0, 0) for info in infos])
        made = generation(
            self._parent,
            system,
            infos,
            self._staged,
            self._blocks,
            registration=registered.nodes[0].data,
            header_used=BASE + draft.size_blocks,
        )
        with replacing(self._out, made.layout.size_bytes) as fd:
            self._write(made, top, fd)
        self.written = made.written
        return made.layout

    def _write(self, made: Generation, top: Header, fd: int) -> None:
        """Write what is new into the image's file, which is all zeros."""
        where = made.addresses
        template = top.build(self._scratch, made.entries)
        self._place(template, BASE, where, fd)
        for staged in made.metas:
            address = made.layout.paths[staged.info.path].meta.address
            self._place(staged.template, address, where, fd)
        for start, count, to in _runs(
            (self._blocks[digest], where[digest]) for digest in made.data
        ):
            self._scratch.copy(start, count * BLOCK_BYTES, fd, to * BLOCK_BYTES)
        inodes = sum(placed.inodes for placed in made.layout.paths.values())
        first = superblock(
            root=STORE + template.root,
            inodes=inodes + template.inodes,
            size_blocks=made.layout.blocks,
            uuid=made.layout.uuid,
        )
        write_all(fd, first, 0)

    def _place(self, template: Template, base: int, where: Mapping[bytes, int], fd: int) -> None:
        def write(data: bytearray, at: int) -> None:
            write_all(fd, data, base * BLOCK_BYTES + at)

        template.place(self._scratch, base, where, write)

    def _info(self, path: StorePath) -> PathInfo:
        info = self._valid.get(path)
        if info is None:
            raise NotFoundError("the image lacks it", place=path)
        return info

    def _intake(self) -> Intake:
        elsewhere = () if self._parent is None else self._parent.data
        return Intake(self._scratch, self._blocks, elsewhere)

    def close(self) -> None:
        """Let go of what was staged; idempotent."""
        self._scratch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _registration(infos: Sequence[PathInfo]) -> Iterator[Event]:
    """Yield the registration as a file's events; it is made twice, and never whole in memory."""
    yield File(b"", sum(map(len, registration.dump(infos))), executable=False)
    yield from registration.dump(infos)


def _runs(pieces: Iterable[tuple[Blocks, int]]) -> Iterator[tuple[int, int, int]]:
    """Join what lies together both in the scratch file and in the image: yield from where, how many blocks, to where."""
    at = count = to = 0
    for blocks, address in pieces:
        if count and blocks.at == at + count * BLOCK_BYTES and address == to + count:
            count += blocks.count
            continue
        if count:
            yield at, count, to
        at, count, to = blocks.at, blocks.count, address
    if count:
        yield at, count, to
