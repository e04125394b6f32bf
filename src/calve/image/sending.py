"""Blocks of a disk into a pending snapshot: the threads that do what `schedule` decides."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from calve.aws.ebs import BLOCK_BYTES, EbsDirect
from calve.clock import SYSTEM, Clock
from calve.disk.disk import Block
from calve.errors import (
    CalveError,
    CancelledError,
    DamagedError,
    NotFoundError,
    RefusedError,
    TransientError,
)
from calve.image.schedule import Fault, Limits, Schedule
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel, Group

__all__ = ["Sending", "classify"]

_TICK_S: Final = 0.25
_THROTTLES: Final = frozenset(
    {
        "ConcurrentLimitExceededException",
        "RequestThrottled",
        "RequestThrottledException",
        "ThrottlingException",
    }
)
_PASSING: Final = ("CONFLICTING_BLOCK_UPDATE", "WRITE_REQUEST_TIMEOUT", "Failed to read block data")


def classify(error: CalveError) -> Fault:
    """Say what an error of PutSnapshotBlock means; a request that was refused for its data is the caller's to judge."""
    if error.service_code in _THROTTLES:
        return Fault.THROTTLED
    if isinstance(error, TransientError):
        return Fault.PASSING
    if isinstance(error, NotFoundError):
        return Fault.UNKNOWN
    if any(text in error.message for text in _PASSING):
        return Fault.PASSING
    return Fault.FINAL


class Sending:
    """Blocks on their way into one snapshot.

    Args:
        ebs: of the region, on connections that nobody else uses.
        snapshot: its id; it is pending.
        path: the raw disk.
        blocks: that are to be sent.
        taken: told the index of each block once it is sent.
        limits: bounds of what is in flight.
        progress: told of bytes.
        clock: for the schedule.
    """

    def __init__(
        self,
        ebs: EbsDirect,
        snapshot: str,
        path: Path,
        blocks: Iterable[Block],
        *,
        taken: Callable[[int], object],
        limits: Limits,
        progress: Progress = silent,
        clock: Clock = SYSTEM,
    ) -> None:
        self._ebs = ebs
        self._snapshot = snapshot
        self._path = path
        self._digests = {block.index: bytes.fromhex(block.sha256) for block in blocks}
        self._taken = taken
        self._limits = limits
        self._progress = progress
        self._clock = clock
        self._schedule = Schedule(self._digests, clock.monotonic(), limits)
        self._turn = threading.Condition()

    def run(self, cancel: Cancel) -> int:
        """Send them all; return how many requests that took.

        Raises:
            DamagedError: the file is not what was planned.
            CalveError: the service refuses, or a block's time is over.
        """
        # Twice as many as blocks: each may have a second request, when the first is not answered.
        threads = min(self._limits.most, 2 * len(self._digests))
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CalveError(f"cannot be read: {error.strerror}", place=self._path) from error
        try:
            with Group("upload", limit=max(threads, 1), parent=cancel) as group:
                group.cancel.on_cancel(self._ebs.cut)
                for _ in range(threads):
                    group.spawn(self._work, descriptor, group.cancel)
        finally:
            os.close(descriptor)
        return self._schedule.done + self._schedule.again

    def _work(self, descriptor: int, cancel: Cancel) -> None:
        """Send what the schedule says, until all is sent."""
        while (turn := self._next(cancel)) is not None:
            index, sent_s = turn
            data = self._read(descriptor, index)
            try:
                self._ebs.put(self._snapshot, index, data, self._digests[index])
            except CancelledError:
                cancel.check()
                return  # the last block was answered, by another request than this
            except CalveError as error:
                fault = self._judge(index, data, error)
                with self._turn:
                    now_s = self._clock.monotonic()
                    self._schedule.failed(index, sent_s, now_s, fault, error)
            else:
                self._sent(index, sent_s)

    def _next(self, cancel: Cancel) -> tuple[int, float] | None:
        """Wait for a turn; return the block and the time that the schedule knows the request by."""
        with self._turn:
            while True:
                cancel.check()
                now_s = self._clock.monotonic()
                step = self._schedule.next(now_s)
                if step is None:
                    return None
                if isinstance(step, int):
                    return step, now_s
                self._turn.wait(min(step, _TICK_S))

    def _read(self, descriptor: int, index: int) -> bytes:
        try:
            return os.pread(descriptor, BLOCK_BYTES, index * BLOCK_BYTES)
        except OSError as error:
            raise CalveError(f"cannot be read: {error.strerror}", place=self._path) from error

    def _sent(self, index: int, sent_s: float) -> None:
        with self._turn:
            is_first = self._schedule.succeeded(index, sent_s, self._clock.monotonic())
            done, left = self._schedule.done, self._schedule.left
            # This thread takes the place that it made free; one more may be allowed now, or all are done.
            self._turn.notify(1 if left else self._limits.most)
        if is_first:
            self._taken(index)
            self._progress(Step("upload", done * BLOCK_BYTES, len(self._digests) * BLOCK_BYTES))
        if not left:
            self._ebs.cut()  # requests that were sent a second time are waited for no longer

    def _judge(self, index: int, data: bytes, error: CalveError) -> Fault:
        """Say what an error means.

        Raises:
            DamagedError: the service refused a block that is not what was planned.
        """
        refused = isinstance(error, RefusedError) and len(data) == BLOCK_BYTES
        if not refused and len(data) == BLOCK_BYTES:
            return classify(error)
        if hashlib.sha256(data).digest() != self._digests[index]:
            raise DamagedError(
                f"block {index} is not what was planned: the disk was changed meanwhile",
                place=self._path,
                hint="build it again",
            ) from error
        return Fault.PASSING if "INVALID_BLOCK" in error.message else classify(error)
