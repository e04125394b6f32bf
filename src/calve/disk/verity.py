"""dm-verity: a tree of hashes over a partition, so that a kernel reads no block that was altered.

Source: the kernel's Documentation/admin-guide/device-mapper/verity.rst and cryptsetup's on-disk format
(https://gitlab.com/cryptsetup/cryptsetup/-/wikis/DMVerity), version 1: SHA-256, blocks of 4 KiB, the salt before the
data. The file is what `veritysetup format` writes: a superblock, then the levels of the tree, the top one first.

A block of the lowest level has the hashes of 128 blocks of data, which is 512 KiB: one block of a disk. So of a
disk's changed blocks each changes one hash block, and those above it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import struct
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from calve.disk.scratch import write_all
from calve.errors import CalveError, DamagedError, UsageError
from calve.tasks import Cancel

__all__ = ["Tree", "read", "write"]

BLOCK_BYTES = 4096
_DIGEST_BYTES = 32
_FAN = BLOCK_BYTES // _DIGEST_BYTES
GROUP_BYTES = _FAN * BLOCK_BYTES  # a block of a disk, and what one block of hashes is about
_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s168x")
_MAGIC = b"verity\0\0"


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of hashes.

    Attributes:
        path: its file, for a partition of its own.
        root_hash: in base 16; whoever knows it can check all else.
        salt: in base 16.
        data_bytes: of the data, whole blocks of 4 KiB.
        changed: blocks of 512 KiB of the file that differ from the parent's; None where there was none.
    """

    path: Path
    root_hash: str
    salt: str
    data_bytes: int
    changed: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class _Shape:
    """Where the levels are: (first block in the file, count of blocks), the lowest level first."""

    data_blocks: int
    levels: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, data_blocks: int) -> _Shape:
        counts = []
        below = data_blocks
        while below > 1:
            below = -(-below // _FAN)
            counts.append(below)
        at = 1  # behind the superblock
        levels = []
        for count in reversed(counts):
            levels.append((at, count))
            at += count
        return cls(data_blocks, tuple(reversed(levels)))

    @property
    def size_bytes(self) -> int:
        return (1 + sum(count for _, count in self.levels)) * BLOCK_BYTES

    def offset(self, level: int, number: int) -> int:
        return (self.levels[level][0] + number) * BLOCK_BYTES

    def below(self, level: int, number: int) -> int:
        """Return how many blocks a hash block has the hashes of."""
        count = self.levels[level - 1][1] if level else self.data_blocks
        return max(0, min(_FAN, count - number * _FAN))


def write(
    data: Path,
    out: Path,
    *,
    seed: uuid.UUID,
    parent: Tree | None = None,
    dirty: Collection[int] = (),
    cancel: Cancel | None = None,
) -> Tree:
    """Write the tree of a partition's content, under a temporary name first.

    Args:
        data: the content, whole blocks of 4 KiB.
        out: the tree's file; replaced where it is there.
        seed: salt and UUID follow from it.
        parent: the tree of an earlier content, of the same seed, as `write` or `read` returned it: hashes of what did
            not change are taken from it.
        dirty: with a parent, the blocks of 512 KiB of `data` that differ from that content; no others are read, and
            `data` need not have them.
        cancel: ends it.

    Raises:
        UsageError: there are no whole blocks, the parent is of another seed, or a block is new and not dirty.
    """
    size = _data_size(data)
    salt = hashlib.sha256(b"verity salt" + seed.bytes).digest()
    if parent is not None and parent.salt != salt.hex():
        raise UsageError("the parent's tree has another salt", place=parent.path)
    temporary = out.with_name(f".{out.name}.new")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        shape = _Shape.of(size // BLOCK_BYTES)
        with _Writer(temporary, shape, salt, parent, cancel) as writer:
            writer.superblock(uuid.uuid5(seed, "verity"))
            root = writer.levels(data, frozenset(dirty))
        changed = None if parent is None else tuple(_differing(temporary, parent.path))
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Tree(out, root.hex(), salt.hex(), size, changed)


def read(path: Path) -> Tree:
    """Read a tree and check it in itself: each hash block against the one above it.

    Raises:
        UsageError: it cannot be read.
        DamagedError: it is no tree, of a kind that we do not write, or in disagreement with itself.
    """
    try:
        with path.open("rb") as file:
            return _read(file, path)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", place=path) from error


def _read(file: IO[bytes], path: Path) -> Tree:
    head = file.read(BLOCK_BYTES)
    if len(head) < BLOCK_BYTES or not head.startswith(_MAGIC):
        raise DamagedError("it is no tree of dm-verity", place=path)
    _, version, kind, _, name, *sizes, blocks, salt_bytes, salt = _SUPERBLOCK.unpack_from(head)
    known = (1, 1, b"sha256", [BLOCK_BYTES, BLOCK_BYTES])
    if (version, kind, name.rstrip(b"\0"), sizes) != known or blocks < 2 or salt_bytes > len(salt):
        raise DamagedError("the tree is of a kind that we do not write", place=path)
    shape = _Shape.of(blocks)
    if os.fstat(file.fileno()).st_size != shape.size_bytes:
        raise DamagedError("the tree's file does not have its size", place=path)
    salted = hashlib.sha256(salt[:salt_bytes])
    top = len(shape.levels) - 1
    root = _hash(salted, os.pread(file.fileno(), BLOCK_BYTES, shape.offset(top, 0)))
    for level in range(top, 0, -1):
        for number in range(shape.levels[level][1]):
            block = os.pread(file.fileno(), BLOCK_BYTES, shape.offset(level, number))
            if block != _hash_block(file.fileno(), shape, level, number, salted):
                raise DamagedError("a hash block is not the one that the tree knows", place=path)
    return Tree(path, root.hex(), salt[:salt_bytes].hex(), blocks * BLOCK_BYTES)


def _hash(salted: hashlib._Hash, block: bytes | memoryview) -> bytes:
    state = salted.copy()
    state.update(block)
    return state.digest()


def _hash_block(fd: int, shape: _Shape, level: int, number: int, salted: hashlib._Hash) -> bytes:
    """Return a hash block of an upper level, made of the level below it."""
    start = shape.offset(level - 1, number * _FAN)
    below = os.pread(fd, shape.below(level, number) * BLOCK_BYTES, start)
    return _hashes(salted, below)


def _hashes(salted: hashlib._Hash, data: bytes) -> bytes:
    """Return the hash block of at most 128 blocks."""
    view = memoryview(data)
    found = [_hash(salted, view[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES)]
    return b"".join(found).ljust(BLOCK_BYTES, b"\0")


class _Writer:
    """The file of a new tree, and that of the parent's."""

    def __init__(
        self, path: Path, shape: _Shape, salt: bytes, parent: Tree | None, cancel: Cancel | None
    ) -> None:
        self._shape = shape
        self._salt = salt
        self._salted = hashlib.sha256(salt)
        self._cancel = cancel
        self._owner = contextlib.ExitStack()
        self._old = self._old_fd = None
        if parent is not None:
            self._old = _Shape.of(parent.data_bytes // BLOCK_BYTES)
            self._old_fd = self._owner.enter_context(parent.path.open("rb")).fileno()
        self._fd = self._owner.enter_context(path.open("w+b", buffering=0)).fileno()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.close()

    def superblock(self, own: uuid.UUID) -> None:
        packed = _SUPERBLOCK.pack(
            *(_MAGIC, 1, 1, own.bytes, b"sha256", BLOCK_BYTES, BLOCK_BYTES),
            *(self._shape.data_blocks, len(self._salt), self._salt),
        )
        write_all(self._fd, packed.ljust(BLOCK_BYTES, b"\0"), 0)

    def levels(self, data: Path, dirty: Collection[int]) -> bytes:
        """Write all levels and return the root hash; a block of hashes whose data is clean is the parent's."""
        with data.open("rb", buffering=0) as file:
            for number in range(self._shape.levels[0][1]):
                if self._cancel is not None:
                    self._cancel.check()
                block = self._kept(number, data) if number not in dirty else None
                if block is None:
                    wanted = self._shape.below(0, number) * BLOCK_BYTES
                    content = os.pread(file.fileno(), wanted, number * GROUP_BYTES)
                    if len(content) < wanted:
                        raise CalveError("became shorter while it was read", place=data)
                    block = _hashes(self._salted, content)
                write_all(self._fd, block, self._shape.offset(0, number))
        for level in range(1, len(self._shape.levels)):
            for number in range(self._shape.levels[level][1]):
                block = _hash_block(self._fd, self._shape, level, number, self._salted)
                write_all(self._fd, block, self._shape.offset(level, number))
        top = self._shape.offset(len(self._shape.levels) - 1, 0)
        return _hash(self._salted, os.pread(self._fd, BLOCK_BYTES, top))

    def _kept(self, number: int, data: Path) -> bytes | None:
        """Return the parent's hashes of a group of blocks that did not change; None without a parent."""
        if self._old is None or self._old_fd is None:
            return None
        count = self._shape.below(0, number)
        if self._old.below(0, number) < count:
            raise UsageError(
                f"block {number} is new, and not among those that changed",
                place=data,
                hint="make the tree anew, without a parent",
            )
        block = os.pread(self._old_fd, BLOCK_BYTES, self._old.offset(0, number))
        return block[: count * _DIGEST_BYTES].ljust(BLOCK_BYTES, b"\0")


def _data_size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", place=path) from error
    if size % BLOCK_BYTES or size < 2 * BLOCK_BYTES:
        raise UsageError(f"{size} bytes are not two or more blocks of 4 KiB", place=path)
    return size


def _differing(new: Path, old: Path) -> Iterator[int]:
    """Yield which blocks of 512 KiB of a file are not as in another."""
    with new.open("rb") as one, old.open("rb") as other:
        for number in itertools.count():
            block = one.read(GROUP_BYTES)
            if not block:
                return
            if block != other.read(GROUP_BYTES):
                yield number
