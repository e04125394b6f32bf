"""The root disk's store as the agent sees it: a `nix.Sink` with a commit protocol instead of a database.

The order, each step durable before the next (reference: docs/explanation/commit.md):
  1. files under temporary names, NAR hash verified      `stage`, by the pull engine
  2. `syncfs`, rename into the store, our record         `commit`, the whole closure
  3. `/nix-path-registration` and our record, `syncfs`   `finish`
  4. the generation's link and the profile, `syncfs`     `finish`
A cut before 4 leaves the old profile, and of the new system only paths whose bytes are on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from calve.boot import durable
from calve.boot.record import Record, dump_sequences, parse_sequences, reachable
from calve.boot.served import LAST_GOOD
from calve.errors import CalveError, DamagedError
from calve.nix import registration
from calve.nix.nar import Event
from calve.nix.narinfo import PathInfo
from calve.nix.staging import Staging, passes
from calve.nix.storepath import STORE_DIR, StorePath

__all__ = ["BootStore", "profile_system"]

_RECORD = "nix/var/calve/committed.json"
_KEYRINGS = "nix/var/calve/keyrings.json"
_REGISTRATION = "nix-path-registration"
_PROFILES = "nix/var/nix/profiles"
_LIMIT = 64 << 20


class BootStore:
    """The store below a mounted root file system; one writer: the agent."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._store = root / STORE_DIR.lstrip("/")
        for directory in (self._store, root / _PROFILES, (root / _RECORD).parent):
            directory.mkdir(parents=True, exist_ok=True)
        self._record = Record.parse(_read(root / _RECORD))
        self._registered = self._registration()
        self._valid = self._known()
        self._staging = Staging(self._store)

    def _registration(self) -> dict[StorePath, PathInfo]:
        """Read the image's (or an earlier boot's) registration that stage 2 has not loaded yet."""
        data = _read(self._root / _REGISTRATION)
        try:
            return {info.path: info for info in registration.parse(data)}
        except CalveError:
            return {}  # ours is written whole; a damaged one of the image vouches for nothing

    def _known(self) -> dict[StorePath, PathInfo]:
        named = {
            **reachable(self._record.committed, self._roots()),
            **self._record.fetched,
            **self._registered,
        }
        return {
            path: info
            for path, info in named.items()
            if os.path.lexists(self._store / path.basename)
        }

    def _roots(self) -> Iterator[StorePath]:
        links = [self._root / LAST_GOOD, *sorted((self._root / _PROFILES).glob("system-*-link"))]
        for link in links:
            path = _target(link)
            if path is not None:
                yield path

    # The Sink

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return those of the paths that are not valid here, in their order."""
        return [path for path in paths if path not in self._valid]

    def adopt(self, infos: Sequence[PathInfo]) -> set[StorePath]:
        """Stage what earlier boots had verified, or published and not recorded, of these paths; see `Sink`.

        A boot that is interrupted ends with its kernel: all is hashed again.
        """
        return self._staging.adopt(infos, rehash=True)

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        """Unpack under a temporary name."""
        self._staging.stage(info, events)

    def discard(self, path: StorePath) -> None:
        """Drop what was staged of a path."""
        self._staging.discard(path)

    def flush(self) -> None:
        """Write what was staged to the disk: a boot that is cut off afterwards need not fetch it again."""
        self._staging.sync()

    def commit(self, batch: Sequence[PathInfo]) -> None:
        """Make staged paths valid: their bytes on the disk, then their names, then our record."""
        self._staging.sync()
        for info in batch:
            self._staging.publish(info.path)
        self._valid.update((info.path, info) for info in batch)
        fetched = {**self._record.fetched, **{info.path: info for info in batch}}
        self._write_record(Record(self._record.committed, fetched))

    # Keyrings

    def sequences(self) -> Mapping[str, int]:
        """Return the highest sequence seen of each cache's keyring."""
        return parse_sequences(_read(self._root / _KEYRINGS))

    def remember(self, sequences: Mapping[str, int]) -> None:
        """Keep the highest sequences seen; durable on return."""
        if sequences != self.sequences():
            durable.replace(self._root / _KEYRINGS, [dump_sequences(sequences)])
            self._staging.sync()

    # The end of a boot

    def current(self) -> StorePath | None:
        """Return the system of the profile."""
        return profile_system(self._root)

    def whole(self, system: StorePath) -> bool:
        """Say whether the whole closure of a system is valid here."""
        found = reachable(self._valid, [system])
        return system in found and all(
            reference in found for info in found.values() for reference in info.references
        )

    def finish(self, system: StorePath) -> int:
        """Register everything, flip the profile to `system` and return its generation's number.

        Raises:
            DamagedError: the closure of the system is not complete here.
        """
        if not self.whole(system):
            raise DamagedError("the closure is not complete on the disk", place=system)
        self._staging.clean()  # the system is there: what interrupted boots left nobody will adopt
        if self._record.fetched or (self._registered and not self._record.committed):
            self.register()
        if self.current() == system:
            return _generation(os.readlink(self._root / _PROFILES / "system"))
        return self._flip(system)

    def register(self) -> None:
        """Write the registration of all that is valid, and our record; both are durable on return."""
        complete = _closed(self._valid)
        durable.replace(
            self._root / _REGISTRATION,
            registration.dump([complete[path] for path in sorted(complete)]),
        )
        self._write_record(Record(complete, {}))
        self._staging.sync()

    def _flip(self, system: StorePath) -> int:
        profiles = self._root / _PROFILES
        numbers = [_generation(link.name) for link in profiles.glob("system-*-link")]
        number = max(numbers, default=0) + 1
        durable.symlink(str(system), profiles / f"system-{number}-link")
        self._staging.sync()  # the generation is durable before the profile names it
        durable.symlink(f"system-{number}-link", profiles / "system")
        self._staging.sync()
        return number

    def _write_record(self, record: Record) -> None:
        durable.replace(self._root / _RECORD, [record.dump()])
        self._record = record

    def close(self, *, keep: bool = False) -> None:
        """Remove what was staged and not committed, or leave it for the next boot to adopt."""
        self._staging.close(keep=keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(keep=passes(error))


def profile_system(root: Path) -> StorePath | None:
    """Return the system that the profile on the disk at `root` names; None where there is none."""
    return _target(root / _PROFILES / "system")


def _closed(infos: Mapping[StorePath, PathInfo]) -> dict[StorePath, PathInfo]:
    """Return the paths all of whose references are there: `--load-db` refuses a file with one that is not."""
    kept = dict(infos)
    while True:
        bad = [p for p, info in kept.items() if any(ref not in kept for ref in info.references)]
        if not bad:
            return kept
        for path in bad:
            del kept[path]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT + 1)
    except FileNotFoundError:
        return b""
    return data if len(data) <= _LIMIT else b""


def _target(link: Path) -> StorePath | None:
    """Return the store path that a link names, by way of one more link in its folder."""
    try:
        target = os.readlink(link)
        if "/" not in target:
            target = os.readlink(link.parent / target)
        return StorePath.parse(target)
    except (OSError, CalveError):
        return None


def _generation(name: str) -> int:
    number = name.removeprefix("system-").removesuffix("-link")
    return int(number) if number.isdecimal() else 0
