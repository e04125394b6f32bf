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

    The order: `missing`, then for each of those `stage`; the puller checks the NAR's hash and size once the events
    have ended, and calls `discard` where they are wrong; `commit` when all are there.
    """

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return those that are not valid here, in their order."""

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        """Take a path's tree, out of sight. What fails leaves nothing behind and can be tried again."""

    def discard(self, path: StorePath) -> None:
        """Forget a staged path; nothing happens where it was not staged."""

    def commit(self, batch: Sequence[PathInfo]) -> None:
        """Make paths valid, all or none: staged before, their references among them or valid already."""
