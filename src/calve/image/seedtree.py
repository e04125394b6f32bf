"""A root file system's tree with a store in it, as a `nix.Sink`: what a base image is seeded with.

The registration names what is there, for the agent of the first boot and for stage 2, which loads it into Nix's
database: an image brings no database, and so no other version's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from calve.nix import registration
from calve.nix.nar import Event
from calve.nix.narinfo import PathInfo
from calve.nix.staging import Staging
from calve.nix.storepath import STORE_DIR, StorePath

__all__ = ["SeedTree"]

_REGISTRATION: Final = "nix-path-registration"


class SeedTree:
    """Takes paths; leaving the block writes the registration of all of them.

    Args:
        root: an empty directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        store = root / STORE_DIR.lstrip("/")
        store.mkdir(parents=True, exist_ok=True)
        self._staging = Staging(store)
        self._valid: dict[StorePath, PathInfo] = {}

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return those that no commit brought."""
        return [path for path in paths if path not in self._valid]

    @property
    def infos(self) -> list[PathInfo]:
        """Return what was brought, by path."""
        return [self._valid[path] for path in sorted(self._valid)]

    def adopt(self, infos: Sequence[PathInfo]) -> set[StorePath]:  # noqa: ARG002  (the seam's)
        """Return nothing: the tree is new."""
        return set()

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        """Unpack a path under a temporary name."""
        self._staging.stage(info, events)

    def discard(self, path: StorePath) -> None:
        """Drop what was staged of a path."""
        self._staging.discard(path)

    def flush(self) -> None:
        """Do nothing: the tree becomes an image, and nobody goes on with it."""

    def commit(self, batch: Sequence[PathInfo]) -> None:
        """Give paths their names."""
        for info in batch:
            self._staging.publish(info.path)
            self._valid[info.path] = info

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._staging.close()
        if error is None and self._valid:
            with (self._root / _REGISTRATION).open("wb") as file:
                file.writelines(registration.dump(self.infos))
