"""dm-verity: the superblock of its hashes, and the tree computed anew from the data.

Source: cryptsetup's wiki, DMVerity, and Linux, Documentation/admin-guide/device-mapper/verity.rst. Version 1 with
SHA-256: the digest of a block is that of salt and block; the tree follows the superblock, the level of the fewest
blocks first.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from calve.disk.inspect.findings import Check, Findings, FlawError
from calve.disk.inspect.source import CHUNK_BYTES, Source

__all__ = ["Superblock", "verify"]

_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s168x")
_DIGEST_BYTES = 32
_MAX_BLOCK_BYTES = CHUNK_BYTES
_MAX_SALT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a tree is of: the sizes of blocks of data and of hashes, how many of data there are, and the salt."""

    data_block_bytes: int
    hash_block_bytes: int
    data_blocks: int
    salt: bytes
    uuid: bytes

    @classmethod
    def read(cls, tree: Source) -> Superblock:
        """Read it.

        Raises:
            DamagedError: it is none, or not of version 1 with SHA-256.
        """
        data = tree.read(0, _SUPERBLOCK.size)
        magic, version, kind, uuid, name, data_block, hash_block, blocks, salted, salt = (
            _SUPERBLOCK.unpack(data)
        )
        algorithm = name.partition(b"\0")[0]
        if magic != b"verity\0\0" or version != 1 or kind != 1 or algorithm != b"sha256":
            message = f"no dm-verity superblock of version 1 with sha256: {magic!r}, {algorithm!r}"
            raise FlawError(Check.VERITY_DAMAGED, message)
        for size in (data_block, hash_block):
            if not 512 <= size <= _MAX_BLOCK_BYTES or size & (size - 1):
                raise FlawError(Check.VERITY_DAMAGED, f"blocks of {size} bytes")
        if salted > _MAX_SALT_BYTES or not blocks:
            message = f"{blocks} blocks, a salt of {salted} bytes"
            raise FlawError(Check.VERITY_DAMAGED, message)
        return cls(data_block, hash_block, blocks, salt[:salted], uuid)

    @property
    def levels(self) -> tuple[int, ...]:
        """Return how many blocks of hashes each level has, that of the data first; none for one block of data."""
        per_block = self.hash_block_bytes // _DIGEST_BYTES
        found: list[int] = []
        count = self.data_blocks
        while count > 1:
            count = -(-count // per_block)
            found.append(count)
        return tuple(found)


def verify(data: Source, tree: Source, root_hash: bytes, findings: Findings) -> Superblock | None:
    """Compute the tree anew; a difference goes to `findings`.

    Args:
        data: what the tree protects.
        tree: the superblock and the tree.
        root_hash: what the computed root must be, 32 bytes.
        findings: where differences go: of the root, and of each block of the tree.

    Returns:
        The superblock; None where it is damaged.
    """
    with findings.catching(Check.VERITY_DAMAGED, "superblock"):
        superblock = Superblock.read(tree)
        _check_sizes(superblock, data, tree)
        computed = _Computation(superblock, tree, findings).root(data)
        if computed != root_hash:
            message = f"the data have the root hash {computed.hex()}, wanted is {root_hash.hex()}"
            findings.add(Check.VERITY_ROOT_DIFFERS, "root", message)
        return superblock
    return None


def _check_sizes(superblock: Superblock, data: Source, tree: Source) -> None:
    """Refuse a tree that is of more data than there is, or longer than its place, before anything is computed."""
    wanted = superblock.data_blocks * superblock.data_block_bytes
    if wanted > data.size:
        message = f"it is of {wanted} bytes, the data have {data.size}"
        raise FlawError(Check.VERITY_DAMAGED, message)
    wanted = (1 + sum(superblock.levels)) * superblock.hash_block_bytes
    if wanted > tree.size:
        raise FlawError(Check.VERITY_DAMAGED, f"the tree has {wanted} bytes of {tree.size}")


class _Computation:
    """Holds the block of hashes that is being filled, of each level."""

    def __init__(self, superblock: Superblock, tree: Source, findings: Findings) -> None:
        self._superblock = superblock
        self._tree = tree
        self._findings = findings
        self._salted = hashlib.sha256(superblock.salt)
        counts = superblock.levels
        # The level of the data comes last in the tree; block 0 is the superblock's.
        self._starts = [1 + sum(counts[level + 1 :]) for level in range(len(counts))]
        self._open = [bytearray() for _ in counts]
        self._done = [0 for _ in counts]
        self._root = b""

    def root(self, data: Source) -> bytes:
        """Return the digest at the top."""
        for block in _blocks(data, self._superblock):
            self._put(0, self._digest(block))
        for level, pending in enumerate(self._open):
            if pending:
                self._close(level)
        return self._root

    def _digest(self, block: bytes | bytearray) -> bytes:
        digest = self._salted.copy()
        digest.update(block)
        return digest.digest()

    def _put(self, level: int, digest: bytes) -> None:
        if level == len(self._open):
            self._root = digest
            return
        self._open[level] += digest
        if len(self._open[level]) == self._superblock.hash_block_bytes:
            self._close(level)

    def _close(self, level: int) -> None:
        size = self._superblock.hash_block_bytes
        block = bytes(self._open[level]).ljust(size, b"\0")
        self._open[level].clear()
        number = self._starts[level] + self._done[level]
        self._done[level] += 1
        if self._tree.read(number * size, size) != block:
            message = f"the hashes of level {level} are not those of the blocks below"
            self._findings.add(Check.VERITY_TREE_DIFFERS, f"block {number}", message)
        self._put(level + 1, self._digest(block))


def _blocks(data: Source, superblock: Superblock) -> Iterator[bytes]:
    size = superblock.data_block_bytes
    total = superblock.data_blocks * size
    for at in range(0, total, CHUNK_BYTES):
        chunk = data.read(at, min(CHUNK_BYTES, total - at))
        for start in range(0, len(chunk), size):
            yield chunk[start : start + size]
