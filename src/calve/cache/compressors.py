"""What all streams of a push share: as many threads that compress as there are processors, and a budget of memory.

A NAR is cut into frames (`Codec.frame_bytes`); each is compressed on its own by whichever thread is free, and they
come out in order. libzstd's own threads (`nb_workers`) would make much the same of a NAR for the same CPU seconds, but
their buffers belong to one stream: two of them hold 11 MB with jobs of 1 MiB, 20 MB with 2 MiB, 63 MB by default;
and three streams would run six threads on two processors.

Memory, for all streams together: `budget` frames (buffers that are filled, wait or are idle, and what was compressed
and waits for its consumer), and for each thread an encoder and twice one frame's output. For two threads at level 3
that is 10 MiB and at most twice 5 MB. A stream alone has at most `threads` + 2 frames of the budget. Without
compressors to share, a stream has one thread and a budget of three frames: 6 MiB and 5 MB.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from threading import Condition, Lock, Semaphore
from types import TracebackType
from typing import Self

from calve.cache.compression import Codec, Encode
from calve.errors import CancelledError, SpaceError
from calve.nix.zstd import ZstdError
from calve.tasks import Cancel, Group

__all__ = ["Compressors", "Frame", "Lane"]

_AHEAD = 2  # of one stream: a frame that is being read, and one that waits for its consumer
_SHARED = 3


class Frame:
    """A frame.

    Attributes:
        size_bytes: of its content.
        data: compressed. Whoever takes it leaves nothing here: frames are large.
    """

    __slots__ = ("data", "size_bytes")

    def __init__(self, size_bytes: int, data: bytes = b"") -> None:
        self.size_bytes = size_bytes
        self.data = data


class _Piece(Frame):
    """A frame on its way through a lane."""

    __slots__ = ("buffer", "done", "error", "lane")

    def __init__(self, lane: Lane, buffer: bytearray, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.lane = lane
        self.buffer = buffer
        self.done = False
        self.error: BaseException | None = None

    def compress(self, pool: Compressors) -> None:
        """Become what is compressed, unless nobody wants it any more."""
        if not self.lane.closed:
            try:
                self.data = pool.compress(
                    self.lane.codec, memoryview(self.buffer)[: self.size_bytes]
                )
            except BaseException as error:  # noqa: BLE001  (raised where the frame is wanted)
                self.error = error
        buffer, self.buffer = self.buffer, bytearray()
        pool.give(buffer, len(self.data))
        self.lane.done(self)


class Compressors:
    """Threads that compress, and the buffers of what they compress; used as a context.

    Args:
        threads: how many frames are compressed at a time; by default as many as there are processors. Threads
            start with the first large NAR. What comes out does not depend on it.
        budget: of frames in memory; by default three more than threads.
    """

    def __init__(self, threads: int | None = None, *, budget: int | None = None) -> None:
        self._threads = threads or os.cpu_count() or 1
        self._budget = budget or self._threads + _SHARED
        self._group = Group("compress", limit=self._threads)
        self._started = 0
        self._slots = Semaphore(self._threads)
        self._encoders: dict[Codec, list[Encode]] = {}
        lock = Lock()
        self._work = Condition(lock)
        self._room = Condition(lock)
        self._queue: deque[_Piece] = deque()
        self._idle: list[bytearray] = []
        self._held_bytes = 0  # of all buffers, and of the frames that wait for a consumer
        self._closed = False

    def __enter__(self) -> Self:
        self._group.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._work:
            self._closed = True
            self._work.notify_all()
            self._room.notify_all()
        self._group.__exit__(kind, error, trace)
        self._held_bytes -= sum(map(len, self._idle))
        self._idle.clear()
        self._encoders.clear()

    # Memory

    @property
    def held_bytes(self) -> int:
        """Return what buffers, and frames that wait for a consumer, take."""
        with self._room:
            return self._held_bytes

    def take(self, size_bytes: int, cancel: Cancel) -> bytearray:
        """Return a buffer of this size, once there is room; whoever waits calls `wake` when it is cancelled.

        Raises:
            CancelledError: it was cancelled, or the compressors are closed.
        """
        with self._room:
            try:
                self._check(cancel)
                while not self._fits(size_bytes):
                    self._room.wait()
                    self._check(cancel)
                if self._idle:
                    return self._idle.pop()
                self._held_bytes += size_bytes
            finally:
                self._room.notify()  # the call may have been meant for others too
        return bytearray(size_bytes)

    @contextmanager
    def buffer(self, size_bytes: int, cancel: Cancel | None) -> Generator[bytearray, None, None]:
        """Lend a buffer of this size, once there is room.

        Raises:
            CancelledError: it was cancelled.
        """
        token = Cancel(cancel)
        unhook = token.on_cancel(self.wake)
        try:
            taken = self.take(size_bytes, token)
        finally:
            unhook()
            token.close()
        try:
            yield taken
        finally:
            self.give(taken)

    def _check(self, cancel: Cancel) -> None:
        if self._closed:
            raise CancelledError
        cancel.check()

    def _fits(self, size_bytes: int) -> bool:
        """Say whether a buffer is idle, or may be made; those of other sizes, which nobody uses, are let go."""
        if self._idle and len(self._idle[-1]) != size_bytes:
            self._held_bytes -= sum(map(len, self._idle))
            self._idle.clear()
        return bool(self._idle) or self._held_bytes + size_bytes <= self._budget * size_bytes

    def give(self, buffer: bytearray, kept_bytes: int = 0) -> None:
        """Take a buffer back; what became of it is kept, until `release`."""
        with self._room:
            self._held_bytes += kept_bytes
            same = not self._idle or len(self._idle[-1]) == len(buffer)
            if same and self._held_bytes <= self._budget * len(buffer):
                self._idle.append(buffer)
            else:
                self._held_bytes -= len(buffer)
            self._room.notify()

    def release(self, kept_bytes: int) -> None:
        """Say that what was kept is not any more."""
        with self._room:
            self._held_bytes -= kept_bytes
            self._room.notify()

    def wake(self) -> None:
        """Have those who wait for room look at their tokens."""
        with self._room:
            self._room.notify_all()

    # Compression

    def compress(self, codec: Codec, content: memoryview) -> bytes:
        """Return one frame of some content; in the caller's thread, once a processor is free for it.

        Raises:
            SpaceError: memory does not suffice for this level.
        """
        with self._slots:
            with self._work:
                idle = self._encoders.setdefault(codec, [])
                encode = idle.pop() if idle else None
            try:
                encode = encode or codec.encoder()
                data = encode(content)
            except (MemoryError, ZstdError) as error:
                raise SpaceError(
                    f"cannot compress with {codec.compression} at level {codec.level}: "
                    f"{str(error) or 'not enough memory'}",
                    hint="a lower level takes less memory",
                ) from error
            with self._work:
                idle.append(encode)
        return data

    def lane(self, codec: Codec, cancel: Cancel) -> Lane:
        """Return a way for one NAR's frames; close it."""
        return Lane(self, codec, cancel, self._threads + _AHEAD)

    def submit(self, frame: _Piece) -> None:
        """Have a frame compressed; its lane is told."""
        with self._work:
            self._queue.append(frame)
            self._work.notify()
            if self._started < self._threads:
                self._started += 1
                self._group.spawn(
                    self._member
                )  # under the lock: a group is spawned into by one at a time

    def _member(self) -> None:
        while True:
            with self._work:
                while not self._queue and not self._closed:
                    self._work.wait()
                if not self._queue:
                    return
                frame = self._queue.popleft()
            frame.compress(self)
            del frame  # with the thread asleep nobody else would


class Lane:
    """The frames of one NAR in their order: `take` and `put` in a thread that reads, iterated over in another."""

    def __init__(self, pool: Compressors, codec: Codec, cancel: Cancel, most: int) -> None:
        self.codec = codec
        self.closed = False
        self._pool = pool
        self._cancel = cancel
        self._most = most
        self._changed = Condition()
        self._frames: deque[_Piece] = deque()
        self._ended = False
        self._unhook = cancel.on_cancel(self._wake)

    def take(self) -> bytearray:
        """Return a buffer to be filled, once there is room.

        Raises:
            CancelledError: nobody wants it any more.
        """
        with self._changed:
            while len(self._frames) >= self._most - 1 and not self._cancel.cancelled:
                self._changed.wait()
        return self._pool.take(self.codec.frame_bytes, self._cancel)

    def put(self, buffer: bytearray, size_bytes: int) -> None:
        """Have a buffer's first bytes compressed; it belongs to the lane from here on."""
        frame = _Piece(self, buffer, size_bytes)
        with self._changed:
            self._frames.append(frame)
        self._pool.submit(frame)

    def give(self, buffer: bytearray) -> None:
        """Take a buffer back that was not filled."""
        self._pool.give(buffer)

    def end(self) -> None:
        """Say that there is no more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def done(self, frame: _Piece) -> None:
        """Be told that a frame is compressed."""
        with self._changed:
            frame.done = True
            self._changed.notify_all()
            unwanted = len(frame.data) if self.closed else 0
            if self.closed:
                frame.data = b""
        if unwanted:
            self._pool.release(unwanted)

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames, compressed.

        Raises:
            CancelledError: it was cancelled.
            SpaceError: memory did not suffice.
        """
        while True:
            with self._changed:
                while not self._next() and not self._cancel.cancelled:
                    self._changed.wait()
                self._cancel.check()
                if not self._frames:
                    return
                frame = self._frames.popleft()
                self._changed.notify_all()
            self._pool.release(len(frame.data))
            if frame.error is not None:
                raise frame.error
            yield frame

    def _next(self) -> bool:
        """Say whether there is something to do for who iterates: a frame is there, or the end."""
        return self._frames[0].done if self._frames else self._ended

    def close(self) -> None:
        """Let go of what was not taken; what is being compressed is dropped when it is done."""
        self._unhook()
        with self._changed:
            self.closed = True
            kept = [len(frame.data) for frame in self._frames if frame.done]
            self._frames.clear()
        for size_bytes in kept:
            self._pool.release(size_bytes)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
        self._pool.wake()
