"""An image's header: the directories above store paths, what else stands in them, and the superblock.

Its meta object begins at block 1 with the inode of /nix/store, whose number is in every store path's directory and so
never changes. All of it is written for every image.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from calve.disk.erofsformat import SLOTS
from calve.disk.metaobject import Node, Tails, Template, build
from calve.disk.scratch import Scratch
from calve.errors import UsageError
from calve.nix.nar import check_name
from calve.nix.storepath import STORE_DIR, StorePath

__all__ = ["BASE", "STORE", "Header", "check_directories"]

BASE = 1  # the block where its meta object lies
STORE = BASE * SLOTS
"""The number of /nix/store's inode."""

_DIRECTORY = stat.S_IFDIR | 0o755
_LINK = stat.S_IFLNK | 0o777
_PROFILE = "nix/var/nix/profiles"
_GENERATION = "system-1-link"
_REGISTRATION = b"nix-path-registration"
_STORE, _ROOT = 0, 1  # the first nodes

Parts: TypeAlias = tuple[bytes, ...]


class Header:
    """The nodes of a header.

    Args:
        directories: empty ones, as `check_directories` returns them.
        registered: the node of the registration, with its tail among `tails`.
        tails: of what the header holds.
    """

    def __init__(self, directories: Iterable[Parts], registered: Node, tails: Tails) -> None:
        self._tails = tails
        store = Node(b"store", stat.S_IFDIR | 0o555, 0, children=[])
        self._nodes = [store, Node(b"", _DIRECTORY, _ROOT, children=[])]
        self._places: dict[Parts, int] = {(): _ROOT}
        *above, _ = _parts(STORE_DIR)
        self._below(self._directory(tuple(above)), _STORE)
        self._places[_parts(STORE_DIR)] = _STORE
        for parts in directories:
            self._directory(parts)
        registered.name = _REGISTRATION
        self._add(_ROOT, registered)

    def _add(self, parent: int, node: Node) -> int:
        self._nodes.append(node)
        return self._below(parent, len(self._nodes) - 1)

    def _below(self, parent: int, index: int) -> int:
        """Enter a node into a directory."""
        self._nodes[index].parent = parent
        self._nodes[parent].children = [*(self._nodes[parent].children or ()), index]
        return index

    def _directory(self, parts: Parts) -> int:
        """Return a directory's index; made, with those above it, where it is missing."""
        if parts not in self._places:
            parent = self._directory(parts[:-1])
            self._places[parts] = self._add(parent, Node(parts[-1], _DIRECTORY, 0, children=[]))
        return self._places[parts]

    def link(self, system: StorePath) -> None:
        """Add the system profile, with one generation."""
        profiles = self._directory(_parts(_PROFILE))
        for name, target in ((_GENERATION, str(system)), ("system", _GENERATION)):
            at, size = self._tails.add(target.encode()), len(target)
            node = Node(name.encode(), _LINK, 0, size=size, tail_at=at, tail_bytes=size)
            self._add(profiles, node)

    def build(self, scratch: Scratch, paths: Sequence[tuple[StorePath, int, int]]) -> Template:
        """Build the meta object.

        Args:
            scratch: takes it.
            paths: each store path, its inode's number and its type in a directory entry.
        """
        entries = [(path.basename.encode(), number, kind) for path, number, kind in paths]
        self._nodes[_STORE].outside = entries
        return build(self._nodes, self._tails, scratch, root=_ROOT)


def _parts(name: str) -> Parts:
    return tuple(os.fsencode(part) for part in name.split("/") if part)


def check_directories(names: Iterable[str]) -> tuple[Parts, ...]:
    """Read the names of empty directories, relative to the root; return them sorted.

    Raises:
        UsageError: one is not such a name, or its place is taken.
    """
    taken = [_parts(STORE_DIR), _parts(_PROFILE), (_REGISTRATION,)]
    found = set()
    for name in names:
        parts = _parts(name)
        if not parts or not all(map(check_name, parts)):
            raise UsageError(f"{name!r} is not the name of a directory in an image")
        if any(parts[: len(place)] == place for place in taken):
            raise UsageError(f"{name!r} is the image's own")
        found.add(parts)
    return tuple(sorted(found))
