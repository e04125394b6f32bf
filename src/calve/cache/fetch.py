"""One NAR through the pipe: socket → decompress → SHA-256 → NAR events → sink; and which NAR is next.

Requests are under way for as many NARs as there are threads, whatever their size; what costs memory, decoders'
windows, and what costs turns at the interpreter, is bounded by two gates.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import Lock, Semaphore

from calve.cache.ahead import PREFETCH_BYTES, Reader, Spare
from calve.cache.compression import Read, decompressor
from calve.cache.lookup import OTHER_MAY_HELP, Found, find_same, gravest
from calve.cache.objects import Objects
from calve.clock import Clock
from calve.errors import (
    CalveError,
    DamagedError,
    DeadlineError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.nix import nar
from calve.nix.narinfo import PathInfo
from calve.nix.signing import Keyring
from calve.nix.sink import Sink
from calve.tasks import Cancel

__all__ = ["Fetcher"]

_SLACK_BYTES = 1 << 20
_TELL_BYTES = 1 << 20
_SMALL_NAR_BYTES = 1 << 20


def _small(found: Found) -> bool:
    """Say whether a NAR is received before it is looked at, and needs no window that counts."""
    size = found.entry.file_size
    return (
        size is not None and size < PREFETCH_BYTES and found.entry.info.nar_size <= _SMALL_NAR_BYTES
    )


class _Turns:
    """Which NAR is next: while decoders are at work on large ones, the other connections fetch small ones.

    Of a small NAR most of the time is the network's answer; behind large ones it costs nothing, at the end it would.
    """

    def __init__(self, paths: Iterable[Found], decoders: int) -> None:
        self._lanes: dict[bool, deque[Found]] = {True: deque(), False: deque()}
        for found in paths:
            self._lanes[_small(found)].append(found)
        self._enough = decoders + 1  # one more is received while the others are decoded
        self._large = 0  # under way
        self._lock = Lock()

    def take(self) -> Found:
        """Return the next; there is one for every task."""
        with self._lock:
            small = not self._lanes[False] or (
                self._large >= self._enough and bool(self._lanes[True])
            )
            self._large += not small
            return self._lanes[small].popleft()

    def done(self, found: Found) -> None:
        """Make room for another large one."""
        with self._lock:
            self._large -= not _small(found)

    def none_left(self) -> bool:
        """Say whether all were taken: some thread may have nothing to do."""
        return not self._lanes[True] and not self._lanes[False]


class Fetcher:
    """Fetches paths; used by all threads of a pull.

    Args:
        paths: all that will be fetched.
        caches: all that may have them, in order of priority.
        keyring: the trusted keys.
        sink: takes them.
        decoders: how many large NARs are decompressed at once; one small NAR may be beside them.
        clock: measures whether it is the network that is waited for.
        tell: is told how many bytes of NARs are done.
    """

    def __init__(
        self,
        paths: Sequence[Found],
        caches: Sequence[Objects],
        keyring: Keyring,
        sink: Sink,
        *,
        decoders: int,
        clock: Clock,
        tell: Callable[[int], None],
    ) -> None:
        self._turns = _Turns(paths, decoders)
        self._caches = caches
        self._keyring = keyring
        self._sink = sink
        self._gates = {True: Semaphore(1), False: Semaphore(decoders)}
        self._spare = Spare(self._turns.none_left, clock)
        self._tell = tell
        self._lock = Lock()
        self._told = 0
        self.done_bytes = 0
        self.fetched_bytes = 0
        self.retries = 0

    def fetch(self, cancel: Cancel) -> PathInfo:
        """Stage the next path: from where the plan found it, else from wherever its narinfo, read again, says."""
        found = self._turns.take()
        try:
            return self._fetch(found, cancel)
        finally:
            self._turns.done(found)

    def _fetch(self, found: Found, cancel: Cancel) -> PathInfo:
        errors: list[CalveError] = []
        try:
            self._stage(found, cancel, self._spare)
        except OTHER_MAY_HELP as error:
            errors.append(error)
        else:
            return found.entry.info
        others = [cache for cache in self._caches if cache is not found.cache]
        if not isinstance(errors[0], TransientError | DeadlineError):
            others.append(found.cache)
        for cache in others:
            cancel.check()
            self.count(retries=1)
            try:
                again = find_same([cache], self._keyring, found.entry.info)  # it may have moved
                self._stage(again, cancel, None)
            except (*OTHER_MAY_HELP, UsageError) as error:
                errors.append(error)
            else:
                return again.entry.info
        raise gravest(errors)

    def _stage(self, found: Found, cancel: Cancel, spare: Spare | None) -> None:
        """Stage one path from one place; what fails leaves nothing staged."""
        entry, info = found.entry, found.entry.info
        place = f"{found.cache.url}/{entry.url}"
        reader = Reader(
            found.cache,
            entry.url,
            entry.file_size,
            limit=_most(info.nar_size),
            cancel=cancel,
            spare=spare,
            place=place,
        )
        gate = self._gates[_small(found)]
        try:
            with reader:
                reader.prefetch()
                while not gate.acquire(timeout=0.2):
                    cancel.check()
                try:
                    self._unpack(found, reader, place)
                finally:
                    gate.release()
        except VerificationError as error:
            raise DamagedError(
                f"{error.message} ({info.path.basename})", place=place, hint=error.hint
            ) from error
        finally:
            self.count(fetched=reader.received)

    def _unpack(self, found: Found, reader: Reader, place: str) -> None:
        info = found.entry.info
        source = decompressor(found.entry.compression, reader.read, place=place)
        content = _Checked(source, info, place, self)
        try:
            self._sink.stage(info, nar.read(content.read, limit=info.nar_size))
            content.expect_whole()
        except BaseException:
            self._sink.discard(info.path)
            content.undo()
            raise

    def count(self, *, fetched: int = 0, done: int = 0, retries: int = 0) -> None:
        """Count, and tell."""
        with self._lock:
            self.fetched_bytes += fetched
            self.done_bytes += done
            self.retries += retries
            if abs(self.done_bytes - self._told) >= _TELL_BYTES:
                self._told = self.done_bytes
                self._tell(self.done_bytes)


def _most(nar_bytes: int) -> int:
    """Return how long a compressed NAR may be: empty frames would go on for ever without a byte of NAR."""
    return 2 * nar_bytes + _SLACK_BYTES


class _Checked:
    """A NAR's bytes, hashed on their way; at their end it is an error unless they are what was signed."""

    def __init__(self, source: Read, info: PathInfo, place: str, owner: Fetcher) -> None:
        self._source = source
        self._info = info
        self._place = place
        self._owner = owner
        self._hash = hashlib.sha256()
        self._size = 0
        self._counted = 0
        self._whole = False

    def read(self, size: int) -> bytes:
        data = self._source(size)
        if not data:
            self._check()
            return data
        self._hash.update(data)
        self._size += len(data)
        if self._size - self._counted >= _TELL_BYTES:
            self._count()
        return data

    def _count(self) -> None:
        self._owner.count(done=self._size - self._counted)
        self._counted = self._size

    def _check(self) -> None:
        info = self._info
        if self._size != info.nar_size or self._hash.digest() != info.nar_hash.digest:
            raise DamagedError("the NAR is not the one that was signed", place=self._place)
        self._count()
        self._whole = True

    def expect_whole(self) -> None:
        """Raise unless all was read."""
        if not self._whole:
            raise DamagedError("not all of the NAR was read", place=self._place)

    def undo(self) -> None:
        """Take back what was counted."""
        self._owner.count(done=-self._counted)
        self._counted = 0
