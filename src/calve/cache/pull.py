"""Pull: paths of a closure from caches into a sink, many at once, with bounded memory.

A plan is made first: it knows every path that is missing, where its NAR is and how large, and that a trusted key
signed it. Then each NAR goes through one pipe: socket → decompress → SHA-256 → NAR events → sink. `jobs` requests
are under way at once; each holds at most 256 KiB until it gets one of `decoders` places, because what costs memory
is decoders' windows. The owner's thread commits what is staged, whenever all its references are valid too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, Semaphore

from calve.cache.compression import Read, decompressor
from calve.cache.crew import Crew
from calve.cache.lookup import OTHER_MAY_HELP, Found, find, gravest, read_manifest, verify, walk
from calve.cache.manifest import Manifest
from calve.cache.objects import Objects, Readable
from calve.errors import (
    CalveError,
    DamagedError,
    DeadlineError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.nix import nar
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring
from calve.nix.sink import Sink
from calve.nix.storepath import StorePath
from calve.progress import Note, Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["PullPlan", "Pulled", "plan", "pull"]

_PREFETCH_BYTES = 256 * 1024
_READ_BYTES = 64 * 1024
_BATCH_BYTES = 128 << 20
_SLACK_BYTES = 1 << 20
_PROGRESS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull will do.

    Attributes:
        missing: paths to fetch, in that order.
        present: how many paths of the closure (where its manifest was read; else of those met) are valid already.
        nar_bytes: of all that is missing.
        fetch_bytes: of its compressed NARs, as far as caches say.
        manifest: the digest of the manifest that was read; None where narinfos were walked.
    """

    missing: tuple[Found, ...]
    present: int
    nar_bytes: int
    fetch_bytes: int
    manifest: str | None
    caches: tuple[Objects, ...] = field(repr=False)
    keyring: Keyring = field(repr=False)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What a pull did; `fetched_bytes` counts what was fetched in vain too, `retries` paths fetched again."""

    paths: int
    nar_bytes: int
    fetched_bytes: int
    retries: int


def plan(
    caches: Sequence[Objects],
    roots: Iterable[StorePath],
    sink: Sink,
    keyring: Keyring,
    *,
    manifest: str | None = None,
    jobs: int = 8,
    progress: Progress = silent,
    cancel: Cancel | None = None,
) -> PullPlan:
    """Find out what is missing, where it is, and that it is signed; fetch nothing else.

    Args:
        caches: in order of priority.
        roots: whose closure is wanted.
        sink: says what is valid already.
        keyring: the trusted keys.
        manifest: digest of the closure's manifest; where no cache has it, narinfos are walked.
        jobs: how many narinfos are asked for at once.
        progress: is told.
        cancel: stops it.

    Raises:
        SignatureError: a path is not signed by a trusted key.
        DamagedError: the manifest, or a narinfo, is malformed, incomplete, or of another path.
        NotFoundError: no cache has a path; or there is no such bucket.
        UsageError: no cache was given, or a NAR's compression is not supported.
    """
    if not caches:
        raise UsageError("no cache to pull from")
    wanted = list(dict.fromkeys(roots))
    read = None if manifest is None else read_manifest(caches, manifest)
    if read is not None:
        found, present = _of_manifest(*read, wanted, sink, keyring)
    else:
        if manifest is not None:
            progress(Note(f"no cache has the manifest {manifest}; asking for each path"))
        found, present = walk(caches, keyring, wanted, sink, jobs=jobs, cancel=cancel)
        found.sort(key=lambda each: -each.entry.info.nar_size)
    return PullPlan(
        missing=tuple(found),
        present=present,
        nar_bytes=sum(each.entry.info.nar_size for each in found),
        fetch_bytes=sum(each.entry.file_size or 0 for each in found),
        manifest=manifest if read is not None else None,
        caches=tuple(caches),
        keyring=keyring,
    )


def _of_manifest(
    manifest: Manifest,
    cache: Objects,
    roots: Sequence[StorePath],
    sink: Sink,
    keyring: Keyring,
) -> tuple[list[Found], int]:
    """Choose what is missing of the roots' closure, in the manifest's order."""
    entries = {entry.info.path: entry for entry in manifest.paths}
    needed: set[StorePath] = set()
    todo = list(roots)
    while todo:
        path = todo.pop()
        if path not in entries:
            raise VerificationError(
                f"the manifest of {manifest.toplevel} does not have {path}",
                place=cache.url,
                hint="it is the manifest of another system",
            )
        if path not in needed:
            needed.add(path)
            todo.extend(entries[path].info.references)
    ordered = [path for path in entries if path in needed]
    missing = [Found(entries[path], cache) for path in sink.missing(ordered)]
    for each in missing:
        verify(each.entry, keyring)
    return missing, len(ordered) - len(missing)


class _Fetcher:
    """Fetches paths; used by all threads of a pull."""

    def __init__(self, plan: PullPlan, sink: Sink, decoders: int, progress: Progress) -> None:
        self._plan = plan
        self._sink = sink
        self._gate = Semaphore(decoders)
        self._progress = progress
        self._lock = Lock()
        self._told = 0
        self.done_bytes = 0
        self.fetched_bytes = 0
        self.retries = 0

    def fetch(self, found: Found, cancel: Cancel) -> PathInfo:
        """Stage one path: from where the plan found it, else from wherever its narinfo, read again, says."""
        errors: list[CalveError] = []
        try:
            self._stage(found, cancel)
        except OTHER_MAY_HELP as error:
            errors.append(error)
        else:
            return found.entry.info
        others = [cache for cache in self._plan.caches if cache is not found.cache]
        if not isinstance(errors[0], TransientError | DeadlineError):
            others.append(found.cache)
        for cache in others:
            cancel.check()
            self._count(retries=1)
            try:
                again = self._again(found.entry.info, cache)
                self._stage(again, cancel)
            except OTHER_MAY_HELP as error:
                errors.append(error)
            else:
                return again.entry.info
        raise gravest(errors)

    def _again(self, info: PathInfo, cache: Objects) -> Found:
        """Read a path's narinfo again: its NAR may have moved, or another cache may have it."""
        found = find([cache], self._plan.keyring, info.path)
        fresh = found.entry.info
        if fresh.fingerprint != info.fingerprint:
            raise DamagedError(
                "the narinfo is that of another build of this path",
                place=f"{cache.url}: {info.path}",
            )
        return found

    def _stage(self, found: Found, cancel: Cancel) -> None:
        """Stage one path from one place; what fails leaves nothing staged."""
        entry, info = found.entry, found.entry.info
        place = f"{found.cache.url}/{entry.url}"
        try:
            with found.cache.open(entry.url, entry.file_size) as source:
                reader = _Prefetched(source, cancel, self, _most(info.nar_size), place)
                reader.prefetch()
                self._enter(cancel)
                try:
                    self._unpack(entry, reader, place, cancel)
                finally:
                    self._gate.release()
        except VerificationError as error:
            raise DamagedError(
                f"{error.message} ({info.path.basename})", place=place, hint=error.hint
            ) from error

    def _unpack(self, entry: NarInfo, reader: _Prefetched, place: str, cancel: Cancel) -> None:
        info = entry.info
        content = _Hashed(decompressor(entry.compression, reader.read, place=place), self, cancel)
        try:
            self._sink.stage(info, nar.read(content.read, limit=info.nar_size))
        except BaseException:
            self._count(done=-content.size)
            raise
        if content.size == info.nar_size and content.digest() == info.nar_hash.digest:
            return
        self._sink.discard(info.path)
        self._count(done=-content.size)
        raise DamagedError("the NAR is not the one that was signed", place=place)

    def _enter(self, cancel: Cancel) -> None:
        """Take one of the decoders' places."""
        while not self._gate.acquire(timeout=0.2):
            cancel.check()

    def _count(self, *, fetched: int = 0, done: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.fetched_bytes += fetched
            self.done_bytes += done
            self.retries += retries
            if abs(self.done_bytes - self._told) >= _PROGRESS_BYTES:
                self.tell()

    def tell(self) -> None:
        """Tell how many bytes of NARs are done."""
        self._told = self.done_bytes
        self._progress(Step("pull", self.done_bytes, self._plan.nar_bytes))


def _most(nar_bytes: int) -> int:
    """Return how long a compressed NAR may be: empty frames would go on for ever without a byte of NAR."""
    return 2 * nar_bytes + _SLACK_BYTES


class _Prefetched:
    """An object's bytes, the first of them ahead of their use."""

    def __init__(
        self, source: Readable, cancel: Cancel, owner: _Fetcher, left: int, place: str
    ) -> None:
        self._source = source
        self._cancel = cancel
        self._owner = owner
        self._left = left
        self._place = place
        self._ahead: list[bytes] = []
        self._ended = False

    def prefetch(self) -> None:
        size = 0
        while size < _PREFETCH_BYTES and (data := self._receive()):
            self._ahead.append(data)
            size += len(data)
        self._ended = size < _PREFETCH_BYTES
        self._ahead.reverse()

    def read(self, _size: int) -> bytes:
        """Return the next bytes, at most 64 KiB."""
        if self._ahead:
            return self._ahead.pop()
        return b"" if self._ended else self._receive()

    def _receive(self) -> bytes:
        self._cancel.check()
        data = self._source.read(_READ_BYTES)
        self._owner._count(fetched=len(data))  # noqa: SLF001  (one thing in two classes)
        self._left -= len(data)
        if self._left < 0:
            raise DamagedError("longer than any compression makes this NAR", place=self._place)
        return data


class _Hashed:
    """A NAR's bytes, hashed and counted on their way."""

    def __init__(self, source: Read, owner: _Fetcher, cancel: Cancel) -> None:
        self._source = source
        self._owner = owner
        self._cancel = cancel
        self._hash = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        data = self._source(size)
        self._hash.update(data)
        self.size += len(data)
        self._owner._count(done=len(data))  # noqa: SLF001
        self._cancel.check()
        return data

    def digest(self) -> bytes:
        return self._hash.digest()


def pull(
    plan: PullPlan,
    sink: Sink,
    *,
    jobs: int = 8,
    decoders: int = 3,
    progress: Progress = silent,
    cancel: Cancel | None = None,
) -> Pulled:
    """Fetch what is missing and commit it.

    Args:
        plan: what to fetch.
        sink: takes it; `stage` and `discard` are called by many threads, `commit` by this one.
        jobs: how many NARs are under way at once.
        decoders: how many of them are decompressed at once.
        progress: is told, by any thread, one at a time.
        cancel: stops it.

    Raises:
        DamagedError: a NAR is truncated, altered, or not what was signed, wherever it was fetched from.
        NotFoundError: a NAR is gone, and its narinfo, read again, does not help.
        TransientError, DeadlineError: a cache could not be reached.
    """
    fetcher = _Fetcher(plan, sink, decoders, progress)
    waiting = {found.entry.info.path for found in plan.missing}
    staged: dict[StorePath, PathInfo] = {}
    with Crew[PathInfo]("pull", jobs=jobs, cancel=cancel) as crew:
        for found in plan.missing:
            crew.add(partial(fetcher.fetch, found))
        size = 0
        for info in crew:
            staged[info.path] = info
            waiting.discard(info.path)
            size += info.nar_size
            if size >= _BATCH_BYTES:
                size = 0
                _commit(sink, staged, waiting)
    _commit(sink, staged, waiting)
    fetcher.tell()
    return Pulled(
        paths=len(plan.missing),
        nar_bytes=plan.nar_bytes,
        fetched_bytes=fetcher.fetched_bytes,
        retries=fetcher.retries,
    )


def _commit(sink: Sink, staged: dict[StorePath, PathInfo], waiting: set[StorePath]) -> None:
    """Commit those staged paths whose closure does not have one that is still waited for."""
    late = set(waiting)
    before = -1
    while len(late) != before:
        before = len(late)
        late.update(
            path for path, info in staged.items() if any(one in late for one in info.references)
        )
    batch = [info for path, info in staged.items() if path not in late]
    if batch:
        sink.commit(batch)
    for info in batch:
        del staged[info.path]
