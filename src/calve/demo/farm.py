"""One tree of links out of many packages: what /usr and /etc of a machine are.

Directories are real, so that packages share them; a regular file becomes an absolute link to its store path; a
package's own symbolic link is made again as it is, so that systemd's aliases and `wants` resolve within the farm.
Where two packages have the same path, the one that was added first wins.
"""

from __future__ import annotations

import os
from pathlib import Path

from calve.errors import UsageError
from calve.nix.storepath import StorePath

__all__ = ["Farm"]


class Farm:
    """A tree of links that grows by packages.

    Args:
        tree: an empty directory.
    """

    def __init__(self, tree: Path) -> None:
        self.tree = tree

    def add(self, source: Path, path: StorePath, part: str) -> int:
        """Add what a package has below `part` ("usr"); return how many links lead to the path itself.

        Args:
            source: where the package's store path lies on this machine.
            path: the store path, as links name it.
            part: a directory of it, which becomes the farm's root.

        Raises:
            UsageError: one package has a directory where another has something else.
        """
        top = source / part
        if top.is_symlink() or not top.is_dir():
            return 0
        return self._merge(top, f"{path}/{part}", self.tree)

    def _merge(self, source: Path, link: str, into: Path) -> int:
        links = 0
        for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
            there = into / entry.name
            if entry.is_dir(follow_symlinks=False):
                if not there.is_dir() or there.is_symlink():
                    self._refuse_over(there, entry.path)
                    there.mkdir()
                links += self._merge(Path(entry.path), f"{link}/{entry.name}", there)
            elif there.is_symlink() or there.exists():
                if not there.is_symlink() and there.is_dir():
                    raise UsageError("a directory in one package, not in another", place=entry.path)
                continue
            else:
                own = not entry.is_symlink()
                there.symlink_to(f"{link}/{entry.name}" if own else os.readlink(entry.path))
                links += own
        return links

    @staticmethod
    def _refuse_over(there: Path, place: str) -> None:
        if there.is_symlink() or there.exists():
            raise UsageError("a directory in one package, not in another", place=place)
