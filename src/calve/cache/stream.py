"""One store path on its way out: file system → NAR → SHA-256 → zstd → SHA-256 → chunks, in one pass.

A thread walks the file system and hashes; the caller's thread compresses and hashes what comes out. Between the two
wait at most `_PIPE_CHUNKS` chunks of NAR.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from threading import Condition

from calve.cache.compression import compressor
from calve.errors import DamagedError
from calve.nix import narwriter
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.tasks import Cancel, Group

__all__ = ["NarStream"]

_PIPE_CHUNKS = 4


class _Pipe:
    """A bounded queue of chunks between two threads."""

    def __init__(self, cancel: Cancel) -> None:
        self._cancel = cancel
        self._changed = Condition()
        self._chunks: deque[bytes] = deque()
        self._ended = False

    def put(self, chunk: bytes) -> None:
        """Hand a chunk over; CancelledError once nobody wants it."""
        with self._changed:
            while len(self._chunks) >= _PIPE_CHUNKS and not self._cancel.cancelled:
                self._changed.wait()
            self._cancel.check()
            self._chunks.append(chunk)
            self._changed.notify()

    def end(self) -> None:
        """Say that there is no more."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def wake(self) -> None:
        """Make both sides look at the token."""
        with self._changed:
            self._changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                while not self._chunks and not self._ended and not self._cancel.cancelled:
                    self._changed.wait()
                self._cancel.check()
                if not self._chunks:
                    return
                chunk = self._chunks.popleft()
                self._changed.notify()
            yield chunk


class NarStream:
    """The compressed NAR of a store path.

    Args:
        source: where its files are.
        info: what the store says of it: the hash and size that its NAR must have.
        level: of zstd.
        tell: called with the size of each chunk of NAR, in this order of threads: the caller's.

    Attributes:
        file_hash: of what `chunks` gave, once it has ended.
        file_size: likewise, bytes.
    """

    def __init__(
        self, source: Path, info: PathInfo, level: int, tell: Callable[[int], object]
    ) -> None:
        self._source = source
        self._info = info
        self._level = level
        self._tell = tell
        self._hash = hashlib.sha256()
        self.file_size = 0

    @property
    def file_hash(self) -> Hash:
        """Return the hash of what `chunks` gave."""
        return Hash("sha256", self._hash.digest())

    def chunks(self, cancel: Cancel | None = None) -> Generator[bytes, None, None]:
        """Give the compressed NAR; close the iterator to stop early.

        The last chunk comes after the whole NAR was held against its hash.

        Raises:
            DamagedError: the files are not those that the store registered.
            CalveError: they cannot be read.
        """
        with Group("dump", limit=1, parent=cancel) as group:
            pipe = _Pipe(group.cancel)
            unhook = group.cancel.on_cancel(pipe.wake)
            try:
                group.spawn(self._dump, pipe)
                made = compressor(self._level, self._info.nar_size)
                for chunk in pipe:
                    yield from self._count(made.compress(chunk))
                    self._tell(len(chunk))
                yield from self._count(made.flush())
            finally:
                unhook()

    def _count(self, data: bytes) -> Iterator[bytes]:
        if data:
            self._hash.update(data)
            self.file_size += len(data)
            yield data

    def _dump(self, pipe: _Pipe) -> None:
        digest = hashlib.sha256()
        left = self._info.nar_size

        def write(chunk: bytes) -> None:
            nonlocal left
            left -= len(chunk)
            if left < 0:
                raise self._changed()
            digest.update(chunk)
            pipe.put(chunk)

        narwriter.dump(self._source, write)
        if left or digest.digest() != self._info.nar_hash.digest:
            raise self._changed()
        pipe.end()

    def _changed(self) -> DamagedError:
        return DamagedError(
            "the store path changed on disk: its NAR is not the one that was registered",
            place=self._info.path,
            hint="nix-store --verify-path says the same; nix-store --repair-path may help",
        )
