"""A file system as a tree, whatever its format, and the NAR hash of what is below a path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from calve.disk.inspect.findings import Check, FlawError, printable
from calve.errors import NotFoundError
from calve.nix.hashes import Hash
from calve.nix.nar import MAX_DEPTH, Directory, Event, File, Symlink, check_name, emit
from calve.nix.narformat import END, MAX_TARGET_BYTES, check_target

__all__ = ["Kind", "Node", "Tree", "Walk", "find", "nar_hash"]

# A file may be sparse and data may be shared, a store is neither to such an extent: what an image claims to hold
# beyond this is a trap that would keep its reader busy for ever.
_LIMIT_FACTOR = 16
_LIMIT_MORE = 64 << 20


class Kind(Enum):
    """What a node is; a NAR has no `OTHER`."""

    DIRECTORY = "directory"
    FILE = "file"
    SYMLINK = "symlink"
    OTHER = "neither a file, nor a directory, nor a symlink"


@dataclass(frozen=True, slots=True)
class Node:
    """An entry of a directory with what its inode says.

    Attributes:
        name: in its directory; the root's is empty.
        kind: of the inode.
        number: the inode's: a nid in EROFS.
        parent: the number of the directory that it was found in; the root's is its own.
        size_bytes: of the content, the target or the directory.
        executable: its owner may execute it.
    """

    name: bytes
    kind: Kind
    number: int
    parent: int
    size_bytes: int
    executable: bool


class Tree(Protocol):
    """A file system that can be walked. Every method raises DamagedError, and names the place."""

    @property
    def format(self) -> str:
        """Return "erofs" or "ext4"."""

    @property
    def block_size_bytes(self) -> int:
        """Return the file system's block size."""

    @property
    def size_bytes(self) -> int:
        """Return how long the file system is by its own word."""

    def root(self) -> Node:
        """Return the root directory."""

    def entries(self, directory: Node) -> Iterator[Node]:
        """Yield what is in a directory, without `.` and `..`, in bytewise order of the names."""

    def content(self, node: Node) -> Iterator[bytes]:
        """Yield a file's or symlink's bytes, `size_bytes` in all, at most 256 KiB at a time."""


def find(tree: Tree, path: str) -> Node | None:
    """Return what stands at a path, None where nothing does; symlinks are not followed.

    Raises:
        DamagedError: a directory on the way is damaged.
    """
    node = tree.root()
    for name in filter(None, path.encode("utf-8", "surrogateescape").split(b"/")):
        if node.kind is not Kind.DIRECTORY:
            return None
        inside = (entry for entry in tree.entries(node) if entry.name == name)
        found = next(inside, None)
        if found is None:
            return None
        node = found
    return node


def nar_hash(tree: Tree, path: str) -> Hash:
    """Return the hash of the NAR of what stands at a path.

    Raises:
        NotFoundError: nothing does.
        DamagedError: the file system is damaged there, or holds what a NAR cannot.
    """
    node = find(tree, path)
    if node is None:
        raise NotFoundError("the file system has no such path", place=printable(path))
    return Walk(tree).nar_hash(node)


class Walk:
    """Reads below one or more nodes of a tree: every directory once, and no more bytes than an honest image holds."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._left = _LIMIT_FACTOR * tree.size_bytes + _LIMIT_MORE
        self._seen: set[int] = set()

    def nar_hash(self, top: Node) -> Hash:
        """Return the hash of a node's NAR; memory does not depend on its size.

        Raises:
            DamagedError: the file system is damaged there, or holds what a NAR cannot.
        """
        digest = hashlib.sha256()
        emit(self.events(top), digest.update)
        return Hash("sha256", digest.digest())

    def events(self, top: Node) -> Iterator[Event]:
        """Yield a node and all below it as a NAR's events; the node itself has no name there.

        Raises:
            DamagedError: the file system is damaged there, or holds what a NAR cannot.
        """
        yield from self._node(top, b"")
        if top.kind is not Kind.DIRECTORY:
            return
        opened = [self._enter(top)]
        while opened:
            node = next(opened[-1], None)
            if node is None:
                opened.pop()
                yield END
                continue
            if not check_name(node.name):
                raise _flaw(node, "a name that no file can have")
            if len(opened) > MAX_DEPTH:
                raise _flaw(node, f"more than {MAX_DEPTH} deep")
            yield from self._node(node, node.name)
            if node.kind is Kind.DIRECTORY:
                opened.append(self._enter(node))

    def check(self, top: Node, *, but: int | None) -> None:
        """Read a directory and all below it, except the directory of number `but`; only damage comes of it.

        Raises:
            DamagedError: the file system is damaged there.
        """
        opened = [self._enter(top)]
        while opened:
            node = next(opened[-1], None)
            if node is None:
                opened.pop()
            elif node.kind is not Kind.DIRECTORY:
                if node.kind is not Kind.OTHER:
                    for _ in self._node(node, node.name):
                        pass
            elif node.number != but:
                opened.append(self._enter(node))

    def _enter(self, directory: Node) -> Iterator[Node]:
        if directory.number in self._seen:
            raise _flaw(directory, "a directory that is reached twice")
        self._seen.add(directory.number)
        return self._tree.entries(directory)

    def _node(self, node: Node, name: bytes) -> Iterator[Event]:
        """Yield the event of a node, and a file's content."""
        if node.kind is Kind.DIRECTORY:
            yield Directory(name)
        elif node.kind is Kind.FILE:
            self._left -= node.size_bytes
            if self._left < 0:
                message = f"with the {node.size_bytes} bytes of this file it holds too much"
                raise FlawError(Check.TREE_TOO_LARGE, message, place=_place(node))
            yield File(name, node.size_bytes, node.executable)
            yield from self._tree.content(node)
        elif node.kind is Kind.SYMLINK:
            yield Symlink(name, self._target(node))
        else:
            raise _flaw(node, node.kind.value)

    def _target(self, node: Node) -> bytes:
        if node.size_bytes > MAX_TARGET_BYTES:
            raise _flaw(node, f"a symlink with a target of {node.size_bytes} bytes")
        target = b"".join(self._tree.content(node))
        if not check_target(target):
            raise _flaw(node, "a symlink whose target is empty or has a NUL")
        return target


def _place(node: Node) -> str:
    return f"inode {node.number} ({printable(node.name)})"


def _flaw(node: Node, message: str) -> FlawError:
    return FlawError(Check.TREE_DAMAGED, message, place=_place(node))
