"""Where a disk's bytes come from: a file, a part of another source, blocks that somebody fetches."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from calve.errors import CalveError, DamagedError, NotFoundError

__all__ = ["BLOCK_BYTES", "CHUNK_BYTES", "BlockSource", "FileSource", "Slice", "Source", "chunks"]

BLOCK_BYTES = 512 << 10  # of a snapshot: the EBS direct API's only size
CHUNK_BYTES = 256 << 10  # what a reader asks for at most at a time
_KEPT_BLOCKS = 64


class Source(Protocol):
    """Bytes that can be read anywhere."""

    @property
    def size(self) -> int:
        """Return how many bytes there are."""

    def read(self, at: int, count: int) -> bytes:
        """Return exactly `count` bytes from `at` on.

        Raises:
            DamagedError: they are not all within the source.
        """


def _check(size: int, at: int, count: int) -> None:
    if at < 0 or count < 0 or at + count > size:
        raise DamagedError(f"{count} bytes at {at} are outside of its {size}")


def chunks(source: Source, at: int, count: int) -> Iterator[bytes]:
    """Yield `count` bytes from `at` on, at most `CHUNK_BYTES` at a time."""
    end = at + count
    while at < end:
        data = source.read(at, min(CHUNK_BYTES, end - at))
        at += len(data)
        yield data


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of another source: a partition of a disk."""

    source: Source
    start: int
    size: int

    def read(self, at: int, count: int) -> bytes:
        """Return exactly `count` bytes from `at` on; DamagedError where they are outside."""
        _check(self.size, at, count)
        return self.source.read(self.start + at, count)


class FileSource:
    """A file or block device; use it as a context manager.

    Raises:
        NotFoundError: there is none.
        CalveError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            kind = NotFoundError if isinstance(error, FileNotFoundError) else CalveError
            raise kind(f"cannot read: {error.strerror}", place=path) from error
        try:
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            os.close(self._fd)
            raise CalveError(f"cannot seek: {error.strerror}", place=path) from error

    def read(self, at: int, count: int) -> bytes:
        """Return exactly `count` bytes from `at` on; DamagedError where they are outside."""
        _check(self.size, at, count)
        parts: list[bytes] = []
        while count:
            try:
                data = os.pread(self._fd, count, at)
            except OSError as error:
                raise CalveError(f"cannot read: {error.strerror}", place=self._path) from error
            if not data:
                raise DamagedError("the file became shorter while it was read", place=self._path)
            parts.append(data)
            at += len(data)
            count -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class BlockSource:
    """A snapshot, block by block: what was read last is kept, `kept` blocks of 512 KiB.

    Args:
        size: of the volume, in bytes.
        fetch: gives a block's bytes by its index, 512 KiB; the last block may be shorter, as the volume ends.
            Its errors pass. A block that was never written is for `fetch` to make up.
        kept: blocks to keep.
    """

    def __init__(
        self, size: int, fetch: Callable[[int], bytes], *, kept: int = _KEPT_BLOCKS
    ) -> None:
        self.size = size
        self._fetch = fetch
        self._kept = kept
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def read(self, at: int, count: int) -> bytes:
        """Return exactly `count` bytes from `at` on; DamagedError where they are outside."""
        _check(self.size, at, count)
        parts: list[bytes] = []
        end = at + count
        while at < end:
            index, skip = divmod(at, BLOCK_BYTES)
            part = self._block(index)[skip : skip + end - at]
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _block(self, index: int) -> bytes:
        block = self._blocks.get(index)
        if block is not None:
            self._blocks.move_to_end(index)
            return block
        block = self._fetch(index)
        wanted = min(BLOCK_BYTES, self.size - index * BLOCK_BYTES)
        if len(block) != wanted:
            raise DamagedError(f"{len(block)} bytes instead of {wanted}", place=f"block {index}")
        self._blocks[index] = block
        if len(self._blocks) > self._kept:
            self._blocks.popitem(last=False)
        return block
