"""Push: closures from a store into a cache, so that no reader ever sees a reference that leads nowhere.

The order: a pending record; what exists, from the previous manifest and then by asking for each unknown path; NARs;
a narinfo once its NAR and the narinfos of all its references are there; the manifest; its signature; the root; then
the pending record is removed. The bucket is never listed.

A NAR's key is its hash, which the store knows beforehand: so one pass suffices, dump → SHA-256 → zstd → SHA-256 →
object, without a temporary file, and the object is made only where there is none. What the file system gives is
held against the store's hash before the object becomes visible.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock, Semaphore
from typing import Protocol

from calve.cache import manifest as manifests
from calve.cache import roots as records
from calve.cache.amend import amend, ensure_info, joined
from calve.cache.compression import compressor
from calve.cache.crew import Crew
from calve.cache.lookup import narinfo_key, read_narinfo
from calve.cache.manifest import Manifest, boot_order
from calve.cache.objects import MissingCacheError, Objects
from calve.cache.order import Waits
from calve.cache.stream import NarStream
from calve.clock import SYSTEM, Clock
from calve.errors import (
    AccessError,
    ConflictError,
    DamagedError,
    NotFoundError,
    UsageError,
)
from calve.nix.closure import closure
from calve.nix.hashes import encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import SecretKey
from calve.nix.storepath import StorePath
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel
from calve.transport.retry import Policy, retry

__all__ = ["Pushed", "Store", "push"]

_PENDING_S = 6 * 3600.0
# From this size on it is cheaper to ask whether the NAR is there (an interrupted push left it) than to send it.
_ASK_BYTES = 1 << 20
_PROGRESS_BYTES = 1 << 20
# A NAR of this size or more may fill a part of an upload in memory, and keeps a processor busy: few at once.
_LARGE_BYTES = 4 << 20
_LARGE_JOBS = 3


class Store(Protocol):
    """Where paths are pushed from: a local store."""

    def closure(self, roots: Iterable[StorePath]) -> Sequence[PathInfo]:
        """Return the roots' closure, references first; NotFoundError names a path that is not valid."""

    def real(self, path: StorePath) -> Path:
        """Return where a path's files are."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did, or with `dry_run` would do.

    Attributes:
        paths: of the closures.
        new_paths: of them, those that the cache did not have.
        nar_bytes: of the new paths.
        compressed_bytes: of the NARs that were sent; 0 for a dry run.
        manifests: digest by root; empty for a dry run.
    """

    paths: int
    new_paths: int
    nar_bytes: int
    compressed_bytes: int
    manifests: Mapping[StorePath, str] = field(default_factory=dict)


def push(
    store: Store,
    roots: Sequence[StorePath],
    objects: Objects,
    key: SecretKey,
    *,
    level: int = 3,
    jobs: int = 8,
    previous: Manifest | None = None,
    root: tuple[str, str] | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
) -> Pushed:
    """Push the closures of some paths, each with a manifest.

    Args:
        store: has them.
        roots: whose closures; a manifest is written for each.
        objects: the cache.
        key: signs every path and every manifest.
        level: of zstd, 1 to 19.
        jobs: how many NARs are under way at once, at most 3 of them large ones.
        previous: a manifest in this cache that something keeps: what it names is taken to be there. By default
            that of `root`.
        root: owner and name of the root that is to keep the (only) manifest.
        dry_run: only find out what is new; nothing is written.
        progress: is told, by any thread, one at a time.
        cancel: stops it.
        clock: stamps records.

    Raises:
        DamagedError: a store path changed on disk; nothing is published of it, nor what refers to it.
        NotFoundError: a root is not valid in the store; or there is no such bucket.
        UsageError: the cache is of another store directory, or the arguments make no sense.
    """
    if not roots or (root is not None and len(set(roots)) != 1):
        raise UsageError("a push needs a store path, and a root keeps exactly one")
    compressor(level)
    infos = {info.path: info for info in store.closure(roots)}
    kept = None if root is None else records.read_root(objects, *root)
    if previous is None and kept is not None:
        previous = _read_previous(objects, kept.manifest)
    run = _Push(store, objects, key, level, jobs, progress, cancel)
    run.learn(infos, previous)
    if dry_run:
        run.probe()
        return run.report()
    pending = None
    if run.unknown:
        pending = _pending(run.unknown, previous, clock)
        records.write_pending(objects, pending)
        run.probe()
        if previous is None:
            ensure_info(objects)
        run.publish()
    digests = {path: run.write_manifest(path, previous) for path in dict.fromkeys(roots)}
    if root is not None and (kept is None or kept.manifest != digests[roots[0]]):
        made = records.Root(*root, manifest=digests[roots[0]], created=clock.now())
        records.write_root(objects, made)
    if pending is not None:
        records.remove_pending(objects, pending)
    return replace(run.report(), manifests=digests)


def _read_previous(objects: Objects, digest: str) -> Manifest | None:
    """Read the manifest that a root keeps; None where it is gone or of no use: then every path is asked for."""
    try:
        return manifests.read(objects, digest)
    except (NotFoundError, DamagedError, UsageError):
        return None


def _pending(
    paths: Iterable[StorePath], previous: Manifest | None, clock: Clock
) -> records.Pending:
    digest = None if previous is None else manifests.digest_of(previous.dump())
    return records.Pending.of(
        secrets.token_hex(16), paths, now=clock.now(), lasts_s=_PENDING_S, previous=digest
    )


class _Push:
    """One run: what is unknown, what is new, and the manifest's entries so far. Used by the owner's thread."""

    def __init__(
        self,
        store: Store,
        objects: Objects,
        key: SecretKey,
        level: int,
        jobs: int,
        progress: Progress,
        cancel: Cancel | None,
    ) -> None:
        self._store = store
        self._objects = objects
        self._key = key
        self._level = level
        self._jobs = jobs
        self._cancel = cancel
        self._meter = _Meter(progress)
        self._large = Semaphore(_LARGE_JOBS)
        self._infos: Mapping[StorePath, PathInfo] = {}
        self.unknown: dict[StorePath, PathInfo] = {}
        self._new: dict[StorePath, PathInfo] = {}
        self._entries: dict[StorePath, NarInfo] = {}

    def report(self) -> Pushed:
        """Return what was, or would be, done."""
        return Pushed(
            paths=len(self._infos),
            new_paths=len(self._new),
            nar_bytes=sum(info.nar_size for info in self._new.values()),
            compressed_bytes=self._meter.sent_bytes,
        )

    # What exists

    def learn(self, infos: Mapping[StorePath, PathInfo], previous: Manifest | None) -> None:
        """Take what the previous manifest names, with our signature, as known; the rest is unknown."""
        self._infos = infos
        named = {} if previous is None else {entry.info.path: entry for entry in previous.paths}
        for path, info in infos.items():
            entry = named.get(path)
            if entry is not None and self._same(entry, info):
                self._entries[path] = entry
            else:
                self.unknown[path] = info

    def _same(self, entry: NarInfo, info: PathInfo) -> bool:
        """Say whether a cache's entry is of our build of a path, with our signature."""
        return (
            entry.info.fingerprint == info.fingerprint
            and self._key.sign(info.fingerprint) in entry.info.signatures
        )

    def probe(self) -> None:
        """Ask for the narinfo of every unknown path."""
        with Crew[tuple[PathInfo, NarInfo | None]](
            "probe", jobs=self._jobs, cancel=self._cancel
        ) as crew:
            for info in self.unknown.values():
                crew.add(partial(self._ask, info))
            for info, entry in crew:
                if entry is None:
                    self._new[info.path] = info
                else:
                    self._entries[info.path] = entry

    def _ask(self, info: PathInfo, cancel: Cancel) -> tuple[PathInfo, NarInfo | None]:
        """Read a narinfo; None where there is none, none that is whole, or one of another build."""
        cancel.check()
        try:
            entry = read_narinfo(self._objects, info.path)
        except (NotFoundError, AccessError, DamagedError) as error:
            if isinstance(error, MissingCacheError) and not self._objects.url.startswith("file:"):
                raise  # a directory is made by the first write, a bucket is not
            if isinstance(error, AccessError) and error.service_code not in {"", "AccessDenied"}:
                raise  # not a missing object that is denied to who may not list: wrong credentials
            return info, None
        return info, entry if entry.info.fingerprint == info.fingerprint else None

    # NARs and narinfos

    def publish(self) -> None:
        """Send the NARs that are new, and each narinfo once those of its references are there."""
        self._meter.total_bytes = sum(info.nar_size for info in self._new.values())
        waits = Waits(self._new)
        with Crew[tuple[bool, NarInfo]]("push", jobs=self._jobs, cancel=self._cancel) as crew:
            for entry in list(self._entries.values()):
                if not self._same(entry, self._infos[entry.info.path]):
                    crew.add(partial(self._write_narinfo, entry, fresh=False))
            for info in sorted(self._new.values(), key=lambda info: -info.nar_size):
                crew.add(partial(self._send, info))
            for written, entry in crew:
                path = entry.info.path
                self._entries[path] = entry
                ready = waits.written(path) if written else waits.sent(path)
                for each in ready:
                    task = partial(self._write_narinfo, self._entries[each], fresh=True)
                    crew.add(task, urgent=True)
        self._meter.tell()

    def _send(self, info: PathInfo, cancel: Cancel) -> tuple[bool, NarInfo]:
        """Make sure that a NAR is there; return its entry, not yet written."""
        name = f"nar/{encode32(info.nar_hash.digest)}.nar.zst"
        entry = NarInfo(info.signed(self._key), name, "zstd")
        size = self._there(name) if info.nar_size >= _ASK_BYTES else None
        if size is not None:
            self._meter.add(info.nar_size)
            return False, replace(entry, file_size=size)
        # Two tries: the upload of a large object that conflicts with another's cannot go on, only begin anew.
        stream = retry(lambda: self._stream(info, name, cancel), Policy(attempts=2), cancel=cancel)
        if stream is not None:
            self._meter.add(0, sent=stream.file_size)
            made = replace(entry, file_hash=stream.file_hash, file_size=stream.file_size)
            return False, made
        size = self._there(name)
        if size is None:
            raise ConflictError(
                "the object was there and is gone", place=f"{self._objects.url}/{name}"
            )
        return False, replace(entry, file_size=size)

    def _there(self, name: str) -> int | None:
        """Return a NAR's size, None where it is not there; who may not list is told "denied" of that too."""
        try:
            return self._objects.head(name)
        except AccessError as error:
            if error.service_code:
                raise
            return None

    def _stream(self, info: PathInfo, name: str, cancel: Cancel) -> NarStream | None:
        """Send a NAR; None where the object was there already."""
        stream = NarStream(self._store.real(info.path), info, self._level, self._meter.add)
        large = info.nar_size >= _LARGE_BYTES
        while large and not self._large.acquire(timeout=0.2):
            cancel.check()
        try:
            with closing(stream.chunks(cancel)) as chunks:
                return stream if self._objects.put_stream(name, chunks, only_new=True) else None
        finally:
            if large:
                self._large.release()

    def _write_narinfo(
        self, entry: NarInfo, cancel: Cancel, *, fresh: bool
    ) -> tuple[bool, NarInfo]:
        """Write a narinfo; one of the same build that is there keeps its NAR and its signatures."""
        cancel.check()
        ours = self._infos[entry.info.path].signed(self._key)
        made = entry

        def make(old: bytes | None) -> bytes:
            nonlocal made
            made = joined(entry, ours, self._key, old)
            return made.dump()

        amend(self._objects, narinfo_key(entry.info.path), make, fresh=fresh)
        return True, made

    # The manifest

    def write_manifest(self, root: StorePath, previous: Manifest | None) -> str:
        """Write the manifest of a root's closure, and our signature beside it; return its digest."""
        reached = closure([root], self._infos.__getitem__)
        entries = boot_order(
            (self._entries[info.path] for info in reached), root, _boots(self._store.real(root))
        )
        made = Manifest(root, entries)
        body = made.dump()
        digest = manifests.digest_of(body)
        if previous is not None and body == previous.dump():
            return digest
        fresh = self._objects.put(manifests.key(digest), manifests.compress(body), only_new=True)
        signature = self._key.sign(manifests.signed_bytes(digest))
        name = manifests.signatures_key(digest)

        def make(old: bytes | None) -> bytes:
            others = () if old is None else manifests.parse_signatures(old, name)
            return manifests.dump_signatures((*others, signature))

        amend(self._objects, name, make, fresh=fresh)
        return digest


class _Meter:
    """Counts bytes, for progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = Lock()
        self._done_bytes = 0
        self._told_bytes = 0
        self.total_bytes = 0
        self.sent_bytes = 0

    def add(self, done: int, *, sent: int = 0) -> None:
        """Count bytes of NARs that are done, and bytes that were sent."""
        with self._lock:
            self._done_bytes += done
            self.sent_bytes += sent
            if self._done_bytes - self._told_bytes >= _PROGRESS_BYTES:
                self.tell()

    def tell(self) -> None:
        """Tell how many bytes are done."""
        self._told_bytes = self._done_bytes
        self._progress(Step("push", min(self._done_bytes, self.total_bytes), self.total_bytes))


def _boots(toplevel: Path) -> list[StorePath]:
    """Return the paths of a system's kernel and initrd; none where it is not a system."""
    found: list[StorePath] = []
    for name in ("kernel", "initrd"):
        with suppress(OSError, DamagedError):
            target = os.readlink(toplevel / name)
            found.append(StorePath.parse("/".join(target.split("/")[:4])))
    return found
