"""A NAR's events become a tree's nodes: blocks of contents into the scratch file, their hashes and tails beside."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Container, Iterable
from dataclasses import dataclass

from calve.disk.erofsformat import BLOCK_BYTES, inode_bytes
from calve.disk.metaobject import Node, Tails
from calve.disk.scratch import Scratch
from calve.errors import DamagedError
from calve.nix.nar import Directory, Event, File, Symlink, check_name
from calve.nix.narformat import check_target

__all__ = ["Blocks", "Intake", "divide"]

_DIRECTORY = stat.S_IFDIR | 0o555
_FILE = stat.S_IFREG | 0o444
_PROGRAM = stat.S_IFREG | 0o555
_LINK = stat.S_IFLNK | 0o777
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Blocks:
    """Whole blocks of a content in a scratch file: where, and how many."""

    at: int
    count: int


def divide(size: int) -> tuple[int, int]:
    """Divide a content: how many bytes of it go into blocks, and how many stand behind the inode."""
    tail = size % BLOCK_BYTES
    if inode_bytes(size, 1) + tail > BLOCK_BYTES:
        return size, 0
    return size - tail, tail


class Intake:
    """Takes one tree; threads may have one each.

    Args:
        scratch: takes blocks.
        found: what blocks there are, by SHA-256; more are added.
        elsewhere: SHA-256s of blocks that need not be kept.

    Attributes:
        nodes: of the tree, the root first.
        tails: of their contents.
    """

    def __init__(
        self, scratch: Scratch, found: dict[bytes, Blocks], elsewhere: Container[bytes]
    ) -> None:
        self.nodes: list[Node] = []
        self.tails = Tails(scratch)
        self._scratch = scratch
        self._found = found
        self._elsewhere = elsewhere
        self._open: list[int] = []  # the directories that have not ended
        self._content: _Content | None = None
        self._complete = False
        self._pending: dict[bytes, bytes] = {}  # whole contents that wait to be written together
        self._pending_bytes = 0

    def take(self, events: Iterable[Event]) -> None:
        """Take all events.

        Raises:
            DamagedError: from the events; or they make no tree.
            SpaceError, CalveError: the scratch file cannot be written to.
        """
        for event in events:
            if isinstance(event, bytes):
                self._bytes(event)
            elif self._complete or self._content is not None:
                raise DamagedError("the events of a NAR are out of place")
            elif isinstance(event, File):
                self._file(event)
            elif isinstance(event, Directory):
                self._open.append(self._add(event.name, _DIRECTORY))
                self.nodes[-1].children = []
            elif isinstance(event, Symlink):
                self._symlink(event)
            else:
                self._end()
        if not self._complete:
            raise DamagedError("the events of a NAR end too early")
        self._flush()

    def _add(self, name: bytes, mode: int) -> int:
        """Add a node to the directory that is open; return its index."""
        index = len(self.nodes)
        parent = -1
        if self._open:
            parent = self._open[-1]
            if not check_name(name):
                raise DamagedError(f"a NAR with the name {name!r}")
            siblings = self.nodes[parent].children
            if siblings is not None:
                siblings.append(index)
        self.nodes.append(Node(name, mode, parent))
        return index

    def _file(self, event: File) -> None:
        self._add(event.name, _PROGRAM if event.executable else _FILE)
        self._begin(event.size)

    def _begin(self, size: int) -> None:
        self.nodes[-1].size = size
        if size:
            self._content = _Content(self, size)
        else:
            self._complete = not self._open

    def _symlink(self, event: Symlink) -> None:
        if not check_target(event.target):
            raise DamagedError(f"a NAR with a symlink to {event.target[:100]!r}")
        self._add(event.name, _LINK)
        self._begin(len(event.target))
        self._bytes(event.target)

    def _bytes(self, data: bytes) -> None:
        if self._content is None or len(data) > self._content.left:
            raise DamagedError("a NAR's file has more content than its size")
        if self._content.add(data):
            self.nodes[-1].data = self._content.digest
            if self._content.tail:
                self.nodes[-1].tail_bytes = len(self._content.tail)
                self.nodes[-1].tail_at = self.tails.add(self._content.tail)
            self._content = None
            self._complete = not self._open

    def _end(self) -> None:
        if not self._open:
            raise DamagedError("the events of a NAR are out of place")
        self._open.pop()
        self._complete = not self._open

    def keep(self, digest: bytes, blocks: Blocks) -> None:
        """Remember where the blocks of a content were written."""
        self._found.setdefault(digest, blocks)

    def put(self, digest: bytes, data: bytes) -> None:
        """Take the blocks of a content; they are written, with others, unless they are there or need not be."""
        if digest in self._found or digest in self._elsewhere or digest in self._pending:
            return
        self._pending[digest] = data
        self._pending_bytes += len(data)
        if self._pending_bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        """Write what waits, and only then let it be found."""
        if not self._pending:
            return
        at = self._scratch.reserve(self._pending_bytes)
        self._scratch.write(b"".join(self._pending.values()), at)
        for digest, data in self._pending.items():
            self.keep(digest, Blocks(at, len(data) // BLOCK_BYTES))
            at += len(data)
        self._pending.clear()
        self._pending_bytes = 0

    @property
    def scratch(self) -> Scratch:
        """Return what takes blocks."""
        return self._scratch


class _Content:
    """A file's bytes: what goes into blocks is hashed and written, the rest becomes the tail."""

    __slots__ = ("_at", "_hash", "_owner", "_written", "digest", "left", "long", "tail")

    def __init__(self, owner: Intake, size: int) -> None:
        self._owner = owner
        self.left = size
        self.long, _ = divide(size)  # bytes that go into blocks
        self.digest: bytes | None = None
        self.tail = b""
        self._hash = hashlib.sha256()
        self._at = -1
        self._written = 0

    def add(self, data: bytes) -> bool:
        """Take bytes; say whether they were the last."""
        whole = len(data) == self.left and not self._written and not self.tail
        self.left -= len(data)
        body = data
        if self._written + len(data) > self.long:
            body = data[: self.long - self._written]
            self.tail += data[len(body) :]
        if whole:
            self._add_whole(body)
        elif body:
            self._add_part(body)
        return not self.left

    def _add_whole(self, body: bytes) -> None:
        """Take a content that came in one piece."""
        if body:
            body += bytes(-len(body) % BLOCK_BYTES)
            self.digest = hashlib.sha256(body).digest()
            self._owner.put(self.digest, body)

    def _add_part(self, body: bytes) -> None:
        if self._at < 0:
            self._at = self._owner.scratch.reserve(self.long)
        self._hash.update(body)
        self._owner.scratch.write(body, self._at + self._written)
        self._written += len(body)
        if self._written == self.long:
            padding = bytes(-self.long % BLOCK_BYTES)
            if padding:
                self._hash.update(padding)
                self._owner.scratch.write(padding, self._at + self.long)
            self.digest = self._hash.digest()
            self._owner.keep(
                self.digest, Blocks(self._at, (self.long + len(padding)) // BLOCK_BYTES)
            )
