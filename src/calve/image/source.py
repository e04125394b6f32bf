"""Where the paths of an image come from: a store on this machine, or binary caches; straight in, with no copy between."""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from calve.cache import pull
from calve.cache.objects import Objects
from calve.errors import CalveError
from calve.nix.nar import Event
from calve.nix.narinfo import PathInfo
from calve.nix.signing import Keyring
from calve.nix.sink import Sink
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.nix.unpack import unpack
from calve.nix.walk import checked, walk
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel, Group

__all__ = ["CacheSource", "Source", "StoreSource"]

_JOBS = 4


class Source(Protocol):
    """Gives store paths."""

    def fill(self, sink: Sink, roots: Sequence[StorePath]) -> None:
        """Bring the closure of the roots into a sink: what it lacks is staged and committed."""

    def wanted(self, roots: Sequence[StorePath], known: Container[StorePath]) -> list[PathInfo]:
        """Return what of the closure of the roots would be read, by whoever knows some paths; nothing is read of it."""

    def take(self, path: StorePath, directory: Path) -> Path:
        """Return where one path can be read, without what it refers to; unpacked below `directory` where it must be."""


@dataclass(frozen=True, slots=True)
class StoreSource:
    """A store on this machine.

    Attributes:
        store: open; the caller closes it.
        progress: told of bytes.
        cancel: ends it.
    """

    store: LocalStore
    progress: Progress = silent
    cancel: Cancel = field(default_factory=Cancel)

    def fill(self, sink: Sink, roots: Sequence[StorePath]) -> None:
        """Bring a closure into a sink; every path is held against its registered hash."""
        infos = {info.path: info for info in self.store.closure(roots)}
        wanted = [infos[path] for path in sink.missing(infos)]
        total = sum(info.nar_size for info in wanted)
        done: list[int] = []

        def stage(info: PathInfo) -> None:
            sink.stage(info, checked(walk(self.store.real(info.path)), info))
            done.append(info.nar_size)
            self.progress(Step("read", sum(done), total))

        with Group("read", limit=_JOBS, parent=self.cancel) as group:
            for info in sorted(wanted, key=lambda one: -one.nar_size):
                group.spawn(stage, info)
        sink.commit(wanted)

    def wanted(self, roots: Sequence[StorePath], known: Container[StorePath]) -> list[PathInfo]:
        """Return what of a closure would be read; NotFoundError where a path is not valid."""
        return [info for info in self.store.closure(roots) if info.path not in known]

    def take(self, path: StorePath, directory: Path) -> Path:  # noqa: ARG002  (it is there)
        """Return where a path lies."""
        return self.store.real(path)


@dataclass(frozen=True, slots=True)
class CacheSource:
    """Binary caches.

    Attributes:
        caches: in order of priority.
        keyring: the keys that count.
        manifest: digest of the closure's manifest; None where narinfos are walked.
        progress: told of bytes.
        cancel: ends it.
    """

    caches: Sequence[Objects]
    keyring: Keyring
    manifest: str | None = None
    progress: Progress = silent
    cancel: Cancel = field(default_factory=Cancel)

    def fill(self, sink: Sink, roots: Sequence[StorePath]) -> None:
        """Pull a closure into a sink."""
        found = pull.plan(
            self.caches,
            roots,
            sink,
            self.keyring,
            manifest=self.manifest,
            progress=self.progress,
            cancel=self.cancel,
        )
        pull.pull(found, sink, progress=self.progress, cancel=self.cancel)

    def wanted(self, roots: Sequence[StorePath], known: Container[StorePath]) -> list[PathInfo]:
        """Return what of a closure would be pulled; that it is signed is looked at, too."""
        found = pull.plan(
            self.caches,
            roots,
            _Known(known),
            self.keyring,
            manifest=self.manifest,
            resume=False,
            progress=self.progress,
            cancel=self.cancel,
        )
        return [one.entry.info for one in found.missing]

    def take(self, path: StorePath, directory: Path) -> Path:
        """Pull one path, and nothing that it refers to."""
        only = _Only(path, directory)
        self.fill(only, [path])
        place = directory / path.basename
        if not place.exists() and not place.is_symlink():
            raise CalveError("no cache gave it", place=path)
        return place


class _Known:
    """A sink that knows some paths, and takes none."""

    def __init__(self, known: Container[StorePath]) -> None:
        self._known = known

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return those that are not known."""
        return [path for path in paths if path not in self._known]

    def adopt(self, infos: Sequence[PathInfo]) -> set[StorePath]:  # noqa: ARG002
        """Return nothing."""
        return set()

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        """Do nothing."""

    def discard(self, path: StorePath) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def commit(self, batch: Sequence[PathInfo]) -> None:
        """Do nothing."""


class _Only(_Known):
    """A sink that lacks one path alone, and unpacks it into a directory."""

    def __init__(self, path: StorePath, directory: Path) -> None:
        super().__init__(())
        self._path = path
        self._directory = directory

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return the one path."""
        there = (self._directory / self._path.basename).exists()
        return [path for path in paths if path == self._path and not there]

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        """Unpack it."""
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            unpack(events, descriptor, info.path.basename)
        finally:
            os.close(descriptor)
