"""Where a pull puts paths: the seam between the engine and a local store, the boot store, an image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from calve.nix.nar import Event
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

__all__ = ["Sink"]


class Sink(Protocol):
    """Takes store paths: staged one by one, from many threads; committed together, by one.

    The order: `missing`; `adopt` of those; `stage` of what is left, and now and then `flush`; `commit` when all are
    there.
    """

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return those that are not valid here, in their order."""

    def adopt(self, infos: Sequence[PathInfo]) -> set[StorePath]:
        """Stage what interrupted runs verified of these paths, and remove what else they left; return which."""

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        """Take a path's tree, out of sight. What fails leaves nothing behind and can be tried again.

        The events are read to their end, where they fail unless the NAR had the path's hash and size.
        """

    def discard(self, path: StorePath) -> None:
        """Forget a staged path; nothing happens where it was not staged."""

    def flush(self) -> None:
        """Have what was staged written to the disk, so that little is left to write for `commit`."""

    def commit(self, batch: Sequence[PathInfo]) -> None:
        """Make paths valid, all or none: staged before, their references among them or valid already."""
