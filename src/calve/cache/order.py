"""In which order narinfos may appear, so that none refers to one that is not there."""

from __future__ import annotations

from collections.abc import Mapping

from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

__all__ = ["Waits"]


class Waits:
    """Which narinfos may be written: those whose NAR is there, and the narinfos of all references."""

    def __init__(self, new: Mapping[StorePath, PathInfo]) -> None:
        self._missing: dict[StorePath, set[StorePath | None]] = {}
        self._behind: dict[StorePath, list[StorePath]] = {path: [] for path in new}
        for path, info in new.items():
            needed = {one for one in info.references if one in new and one != path}
            self._missing[path] = {None, *needed}  # None is its own NAR
            for one in needed:
                self._behind[one].append(path)

    def sent(self, path: StorePath) -> list[StorePath]:
        """A NAR is there: return the narinfo that may be written now, if it may."""
        return self._ready(path, None)

    def written(self, path: StorePath) -> list[StorePath]:
        """A narinfo is there: return those that may be written now."""
        return [each for one in self._behind.get(path, ()) for each in self._ready(one, path)]

    def _ready(self, path: StorePath, arrived: StorePath | None) -> list[StorePath]:
        self._missing[path].discard(arrived)
        return [] if self._missing[path] else [path]
