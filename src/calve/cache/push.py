"""Push: closures from a store into a cache, so that no reader ever sees a reference that leads nowhere.

The order: what exists, from the manifest that the root of the same name keeps; where that does not say it all, a
pending record, and then a look (`cache.lease`); NARs; a narinfo once its NAR and the narinfos of all its references
are there; the manifest, signed; the root; then the pending record is removed. What exists is never learnt by listing.

A NAR's key is its hash, which the store knows beforehand: so one pass suffices, dump → SHA-256 → zstd → SHA-256 →
object, without a temporary file, and the object is made only where there is none. What the file system gives is
held against the store's hash before the object becomes visible.

Nobody asks for what is most likely new: objects are made only where there is none, and the first one that is there
after all makes the rest of the push look before it sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Literal, Protocol, TypeAlias

from calve.cache import manifest as manifests
from calve.cache.amend import ensure_info
from calve.cache.compression import Codec
from calve.cache.compressors import Compressors
from calve.cache.crew import Crew
from calve.cache.keep import Keep, root_names
from calve.cache.lease import ExpiredError, Lease
from calve.cache.lookup import narinfo_key
from calve.cache.manifest import Manifest, boot_order
from calve.cache.objects import Objects
from calve.cache.order import Waits
from calve.cache.publish import first_paths, publish
from calve.cache.upload import Meter, Uploader, check_size
from calve.clock import SYSTEM, Clock
from calve.errors import SignatureError, UsageError
from calve.nix.closure import closure
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.storepath import StorePath
from calve.progress import Note, Progress, silent
from calve.tasks import Cancel

__all__ = ["Pushed", "Store", "push"]

_Done: TypeAlias = tuple[Literal["sent", "there", "written"], NarInfo]
_CODEC = Codec()
_TRIES = 3
# Fewer new paths than these are sent without a pending record: they take seconds.
_FEW_PATHS = 32
_FEW_BYTES = 256 << 20
_SAMPLES = 3
_QUESTIONS = 4  # small requests under way for each job


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
        skipped_paths: of them, those that another cache has.
        nar_bytes: of the new paths.
        compressed_bytes: of the NARs that were sent; 0 for a dry run.
        manifests: digest by root; empty for a dry run.
    """

    paths: int
    new_paths: int
    skipped_paths: int
    nar_bytes: int
    compressed_bytes: int
    manifests: Mapping[StorePath, str] = field(default_factory=dict)


def push(
    store: Store,
    roots: Sequence[StorePath],
    objects: Objects,
    key: SecretKey,
    *,
    codec: Codec = _CODEC,
    jobs: int = 8,
    check: bool = False,
    skip: Keyring | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
) -> Pushed:
    """Push the closures of some paths, each with a manifest and a root that keeps it.

    Args:
        store: has them.
        roots: whose closures.
        objects: the cache.
        key: signs every path and every manifest.
        codec: how NARs are compressed.
        jobs: how many NARs are under way at once, as far as memory for what is sent allows.
        check: look at everything, whatever the last push saw, and put back what is gone.
        skip: paths that one of these keys signed are in another cache, and stay there.
        dry_run: only find out what is new; nothing is written.
        progress: is told, by any thread, one at a time.
        cancel: stops it.
        clock: stamps records.

    Raises:
        DamagedError: a store path changed on disk; nothing is published of it, nor what refers to it.
        NotFoundError: a root is not valid in the store; or there is no such bucket.
        UsageError: the cache is of another store directory, a path has too many references for a narinfo, or the
            arguments make no sense.
        ConflictError: others keep changing the same objects.
    """
    if not roots:
        raise UsageError("a push needs a store path")
    wanted = root_names(dict.fromkeys(roots))
    infos = {info.path: info for info in store.closure(list(wanted))}
    if len(infos) > manifests.MAX_PATHS:
        raise UsageError(
            f"{len(infos)} paths are more than the {manifests.MAX_PATHS} of one push",
            hint="push fewer closures at once",
        )
    for info in infos.values():
        check_size(info, key)
    turns = 0
    with Compressors() as compressors:
        while True:
            upload = Uploader(objects, key, codec, compressors, store.real)
            run = _Push(store, infos, upload, jobs, progress, cancel, clock)
            keeps = [Keep.read(objects, path, name) for path, name in wanted.items()]
            try:
                return run.push(keeps, skip, check=check or turns > 0, dry_run=dry_run)
            except ExpiredError:
                turns += 1
                if turns == _TRIES:
                    raise
                progress(Note("the push took too long to be sure; looking again"))


class _Push:
    """One run: what is unknown, what is new, and the manifest's entries so far. Used by the owner's thread."""

    def __init__(
        self,
        store: Store,
        infos: Mapping[StorePath, PathInfo],
        upload: Uploader,
        jobs: int,
        progress: Progress,
        cancel: Cancel | None,
        clock: Clock,
    ) -> None:
        self._store = store
        self._infos = infos
        self._objects = upload.objects
        self._key = upload.key
        self._jobs = jobs
        self._cancel = cancel
        self._clock = clock
        self._meter = Meter(progress)
        self._upload = upload
        upload.tell = self._meter.add
        upload.met = self._met
        self._lock = Lock()
        self._previous: str | None = None
        self._unknown: dict[StorePath, PathInfo] = {}
        self._new: dict[StorePath, PathInfo] = {}
        self._broken: set[StorePath] = set()  # those whose NAR is there and not what it should be
        self._entries: dict[StorePath, NarInfo] = {}
        self._unsigned: list[NarInfo] = []  # those that are there without our signature
        self._hints: dict[StorePath, NarInfo] = {}  # what may be there
        self._skipped = 0
        self._lease: Lease | None = None

    def push(
        self, keeps: Sequence[Keep], skip: Keyring | None, *, check: bool, dry_run: bool
    ) -> Pushed:
        """Do it; ExpiredError where what was seen may be gone."""
        check = check or any(keep.root is not None and not keep.sure for keep in keeps)
        self._learn(keeps, skip, check=check)
        if dry_run:
            self._probe(check=check)
            return self._report({})
        with Lease(self._objects, keeps[0].path, self._clock) as lease:
            self._lease = lease
            if self._unknown:
                self._prepare(keeps, check=check)
            if self._new or self._unsigned:
                self._publish()
            digests = {keep.path: self._write_manifest(keep, check=check) for keep in keeps}
            lease.check()
            for keep in keeps:
                digest, gc = digests[keep.path], self._upload.gc
                keep.write(self._objects, digest, self._clock, asked=lease.asked, gc=gc)
            lease.check()  # a machine may have slept within the last request
            lease.release()
        return self._report(digests)

    def _report(self, digests: Mapping[StorePath, str]) -> Pushed:
        return Pushed(
            paths=len(self._infos),
            new_paths=len(self._new),
            skipped_paths=self._skipped,
            nar_bytes=sum(info.nar_size for info in self._new.values()),
            compressed_bytes=self._meter.sent_bytes,
            manifests=digests,
        )

    # What exists

    def _learn(self, keeps: Sequence[Keep], skip: Keyring | None, *, check: bool) -> None:
        """Take what manifests that roots keep name, with our signature, as known; the rest is unknown."""
        named: dict[StorePath, NarInfo] = {}
        for keep in keeps:
            if keep.manifest is not None and keep.root is not None:
                self._previous = keep.root.manifest
                named |= {entry.info.path: entry for entry in keep.manifest.paths if entry.url}
        if check:
            self._hints, named = named, {}
        for path, info in self._infos.items():
            entry = named.get(path)
            if skip is not None and _signed(info, skip):
                self._skipped += 1
                self._entries[path] = NarInfo(info.signed(self._key), "", "none")
            elif entry is not None and entry.info.fingerprint == info.fingerprint:
                self._take(entry)
            else:
                self._unknown[path] = info

    def _signed(self, entry: NarInfo) -> bool:
        """Say whether an entry has our signature."""
        return self._key.sign(entry.info.fingerprint) in entry.info.signatures

    def _prepare(self, keeps: Sequence[Keep], *, check: bool) -> None:
        """Find out which of the unknown paths are new, at the price of as few requests as is safe."""
        size = sum(info.nar_size for info in self._unknown.values())
        few = len(self._unknown) <= _FEW_PATHS and size <= _FEW_BYTES
        if few and not check and all(keep.sure for keep in keeps):
            if any(keep.root is not None and keep.root.gc for keep in keeps):
                self._ask_doomed()
            self._new = dict(self._unknown)
            return
        new_cache = any(keep.root is None for keep in keeps) and ensure_info(self._objects)
        self._met()
        if check or self._upload.asking or not (new_cache or self._all_new()):
            self._upload.asking = True
            self._probe(check=check)
        else:
            self._upload.asking = False
            self._new = dict(self._unknown)

    def _met(self) -> None:
        """From now on rely on what exists: have a pending record, and know what is doomed."""
        with self._lock:
            lease = self._lease
            if lease is None or lease.taken:
                return
            others = lease.take(self._infos.values(), self._previous)
            self._ask_doomed()
            self._upload.asking = others or self._upload.asking

    def _go_on(self, cancel: Cancel) -> None:
        """Raise where the push must not go on; have a pending record once it lasts."""
        cancel.check()
        if self._lease is not None:
            self._lease.check()
            if self._lease.late:
                self._met()

    def _ask_doomed(self) -> None:
        if self._lease is None:
            return
        keys = {narinfo_key(path) for path in self._unknown}
        keys |= {self._upload.plain_key(info) for info in self._unknown.values()}
        keys |= {self._entries[path].url for path in self._unknown if path in self._entries}
        self._upload.doomed = self._lease.doomed(keys)
        self._upload.gc = self._lease.gc

    def _all_new(self) -> bool:
        """Say whether some of the unknown paths, large and small ones, are all new."""
        ordered = sorted(self._unknown.values(), key=lambda info: -info.nar_size)
        last = len(ordered) - 1
        chosen = {at * last // (_SAMPLES - 1) for at in range(_SAMPLES)}
        return all(self._upload.find(ordered[at]) is None for at in chosen)

    def _probe(self, *, check: bool) -> None:
        """Ask for the narinfo of every unknown path; with `check` for its NAR too."""
        jobs = self._jobs * _QUESTIONS
        with Crew[tuple[PathInfo, NarInfo | None, bool]](
            "probe", jobs=jobs, cancel=self._cancel
        ) as crew:
            for info in self._unknown.values():
                crew.add(partial(self._ask, info, check=check))
            for info, entry, whole in crew:
                if entry is not None and whole:
                    self._take(entry)
                else:
                    self._new[info.path] = info
                    if entry is not None:
                        self._broken.add(info.path)
        if self._lease is not None and self._upload.gc is not None:
            self._ask_doomed()
        for path in [path for path, entry in self._entries.items() if self._is_doomed(entry)]:
            self._new[path] = self._infos[path]
            del self._entries[path]

    def _take(self, entry: NarInfo) -> None:
        """Have an entry that is there."""
        self._entries[entry.info.path] = entry
        if not self._signed(entry):
            self._unsigned.append(entry)

    def _is_doomed(self, entry: NarInfo) -> bool:
        doomed = self._upload.doomed
        return entry.url in doomed or narinfo_key(entry.info.path) in doomed

    def _ask(
        self, info: PathInfo, cancel: Cancel, *, check: bool
    ) -> tuple[PathInfo, NarInfo | None, bool]:
        cancel.check()
        entry = self._upload.find(info)
        whole = entry is not None and (not check or self._upload.whole(entry))
        return info, entry, whole

    # NARs and narinfos

    def _publish(self) -> None:
        """Send the NARs that are new, and each narinfo once those of its references are there."""
        self._meter.total_bytes = sum(info.nar_size for info in self._new.values())
        waits = Waits(self._new)
        there: set[StorePath] = set()  # met, narinfo and all
        with Crew[_Done]("push", jobs=self._jobs, cancel=self._cancel) as crew:
            for entry in self._unsigned:
                if entry.info.path not in self._new:
                    crew.add(partial(self._write_narinfo, entry, fresh=False))
            for info in sorted(self._new.values(), key=lambda info: -info.nar_size):
                crew.add(partial(self._send, info))
            for what, entry in crew:
                path = entry.info.path
                self._entries[path] = entry
                if what == "there":
                    there.add(path)
                    self._new.pop(path)
                ready = waits.written(path) if what == "written" else waits.sent(path)
                while ready:
                    each = ready.pop()
                    if each in there and self._signed(self._entries[each]):
                        ready += waits.written(each)
                        continue
                    task = partial(self._write_narinfo, self._entries[each], fresh=True)
                    crew.add(task, urgent=True)
        self._meter.tell()

    def _send(self, info: PathInfo, cancel: Cancel) -> _Done:
        self._go_on(cancel)
        entry, there = self._upload.send(info, cancel, replacing=info.path in self._broken)
        hint = self._hints.get(info.path)
        if hint is not None and (hint.url, hint.file_size) == (entry.url, entry.file_size):
            entry = replace(entry, file_hash=entry.file_hash or hint.file_hash)
        return ("there" if there else "sent"), entry

    def _write_narinfo(self, entry: NarInfo, cancel: Cancel, *, fresh: bool) -> _Done:
        self._go_on(cancel)
        path = entry.info.path
        replacing = path in self._broken
        made = self._upload.write_narinfo(
            entry, self._infos[path], fresh=fresh and not replacing, replacing=replacing
        )
        return "written", made

    # The manifest

    def _write_manifest(self, keep: Keep, *, check: bool) -> str:
        """Write the manifest of a root's closure with our signature, unless its root keeps it; return its digest."""
        root = keep.path
        reached = closure([root], self._infos.__getitem__)
        entries = boot_order(
            (self._entries[info.path] for info in reached),
            root,
            first_paths(self._store.real(root)),
        )
        made = Manifest(root, entries)
        digest = manifests.digest_of(made.dump())
        if not check and keep.sure and keep.root is not None and keep.root.manifest == digest:
            return digest
        signature = self._key.sign(manifests.signed_bytes(digest))
        return publish(self._objects, made, [signature], self._revive)

    def _revive(self, key: str) -> str | None:
        """Rely on a manifest that is there: return what shall make it another object, where it is doomed."""
        self._met()
        if self._lease is None or key not in self._lease.doomed({key}):
            return None
        return self._lease.gc


def _signed(info: PathInfo, keyring: Keyring) -> bool:
    with suppress(SignatureError):
        keyring.verify(info.fingerprint, info.signatures, info.path)
        return True
    return False
