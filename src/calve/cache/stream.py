"""One store path on its way out: file system → NAR → SHA-256 → frames → compressed → SHA-256, in one pass.

A NAR of one frame is read and compressed in the caller's thread. For a larger one a thread reads and hashes, the
threads of `Compressors` compress its frames, and the caller's hashes what comes out. Files are read straight into
the buffers that are compressed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path

from calve.cache.compression import Codec
from calve.cache.compressors import Compressors, Frame, Lane
from calve.errors import DamagedError
from calve.nix import narwriter
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.tasks import Cancel, Group

__all__ = ["NarStream"]


class NarStream:
    """The compressed NAR of a store path. Its bytes follow from the NAR, the compression and the level alone.

    Args:
        source: where its files are.
        info: what the store says of it: the hash and size that its NAR must have.
        level: of compression; see `Codec`.
        tell: called in the caller's thread with the size of each piece of NAR, whose compressed bytes come next.
        compression: "zstd", "xz" or "none".
        compressors: shared by all streams of a push, each of which has a thread of its own that takes its chunks.
            Without them the stream has its own while it runs.

    Attributes:
        file_size: of what `chunks` gave, bytes.

    Raises:
        UsageError: there is no such compression, or level.
    """

    def __init__(
        self,
        source: Path,
        info: PathInfo,
        level: int,
        tell: Callable[[int], object],
        *,
        compression: str = "zstd",
        compressors: Compressors | None = None,
    ) -> None:
        self._source = source
        self._info = info
        self._codec = Codec(compression, level)
        self._tell = tell
        self._compressors = compressors
        self._hash = hashlib.sha256()
        self.file_size = 0

    @property
    def file_hash(self) -> Hash:
        """Return the hash of what `chunks` gave, once it has ended."""
        if self._codec.compression == "none":
            return self._info.nar_hash
        return Hash("sha256", self._hash.digest())

    def chunks(self, cancel: Cancel | None = None) -> Generator[bytes, None, None]:
        """Give the compressed NAR, a frame at a time; close the iterator to stop early.

        The last chunk comes after the whole NAR was held against its hash.

        Raises:
            DamagedError: the files are not those that the store registered.
            CalveError: they cannot be read.
            SpaceError: memory does not suffice for this level.
        """
        with ExitStack() as owner:
            pool = self._compressors or owner.enter_context(Compressors(1, budget=3))
            if self._info.nar_size <= self._codec.frame_bytes:
                yield self._counted(self._whole(pool, cancel))
                return
            group = Group("dump", limit=1, parent=cancel)
            lane = pool.lane(self._codec, group.cancel)
            owner.callback(lane.close)  # after the group, whose thread the lane wakes
            owner.enter_context(group)
            group.spawn(self._dump, lane)
            for frame in lane:
                yield self._counted(frame)

    def _counted(self, frame: Frame) -> bytes:
        """Count what goes out; the frame does not keep it."""
        data, frame.data = frame.data, b""
        if self._codec.compression != "none":
            self._hash.update(data)
        self.file_size += len(data)
        self._tell(frame.size_bytes)
        return data

    def _whole(self, pool: Compressors, cancel: Cancel | None) -> Frame:
        """Return a NAR of one frame."""
        with pool.buffer(self._codec.frame_bytes, cancel) as buffer:
            size_bytes = self._read(lambda: buffer, lambda _filled: None)
            data = pool.compress(self._codec, memoryview(buffer)[:size_bytes])
        return Frame(size_bytes, data)

    def _dump(self, lane: Lane) -> None:
        """Fill frames; the last goes on its way once the hash is known to be right."""
        buffer: bytearray | None = None

        def take() -> bytearray:
            nonlocal buffer
            buffer = lane.take()
            return buffer

        def put(filled_bytes: int) -> None:
            nonlocal buffer
            full, buffer = buffer, None
            if full is not None:
                lane.put(full, filled_bytes)

        try:
            put(self._read(take, put))
        finally:
            if buffer is not None:
                lane.give(buffer)
        lane.end()

    def _read(self, take: Callable[[], bytearray], put: Callable[[int], object]) -> int:
        """Read the NAR into buffers; return what the last holds, which is not `put`."""
        digest = hashlib.sha256()
        left = self._info.nar_size
        view = memoryview(b"")

        def swap(filled_bytes: int) -> memoryview:
            nonlocal left, view
            left -= filled_bytes
            if left <= 0:
                raise self._changed()
            if filled_bytes:
                digest.update(view)
                put(filled_bytes)
                view = memoryview(
                    b""
                )  # not to keep the buffer alive while there is no room for the next
            view = memoryview(take())[:left]
            return view

        size_bytes = narwriter.dump_into(self._source, swap)
        digest.update(view[:left])
        if size_bytes != self._info.nar_size or digest.digest() != self._info.nar_hash.digest:
            raise self._changed()
        return left

    def _changed(self) -> DamagedError:
        return DamagedError(
            "the store path changed on disk: its NAR is not the one that was registered",
            place=self._info.path,
            hint="nix-store --verify-path says the same; nix-store --repair-path may help",
        )
