"""Store paths of a cache that are not what they should be, put right: their NARs, then their narinfos.

What a path must be is what the manifests say, else its own narinfo, else a source's; always as a trusted key signed
it. A NAR that is damaged is written again under its key, verified on its way; narinfos come after all NARs,
references first. A pending record keeps all of it from a collection meanwhile.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

from calve.cache import roots as records
from calve.cache.amend import amend
from calve.cache.content import measure
from calve.cache.crew import Crew
from calve.cache.judge import Claim
from calve.cache.lookup import OTHER_MAY_HELP, narinfo_key, read_narinfo
from calve.cache.objects import MissingCacheError, Objects
from calve.cache.scope import each
from calve.cache.sources import Source, Stream
from calve.clock import Clock
from calve.errors import (
    CalveError,
    CancelledError,
    ConflictError,
    DamagedError,
    NotFoundError,
    SignatureError,
    UsageError,
    VerificationError,
)
from calve.nix.closure import closure
from calve.nix.hashes import encode32
from calve.nix.narinfo import NarInfo, PathInfo, merge_signatures
from calve.nix.signing import Keyring, Signature
from calve.nix.storepath import StorePath
from calve.progress import Progress, Step
from calve.tasks import Cancel
from calve.transport.retry import Policy, retry

__all__ = ["PUSH_AGAIN", "Mended", "Mender"]

PUSH_AGAIN = "calve push --check of the closure writes it again"
_PENDING_S = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class Mended:
    """What came of some paths.

    Attributes:
        done: paths that are, or with a dry run would be, as they should be.
        errors: why the others are not.
        sent_bytes: of NARs.
    """

    done: frozenset[StorePath]
    errors: Mapping[StorePath, str]
    sent_bytes: int


class _SourceError(CalveError):
    """A source failed while its bytes were being written."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a path must be.

    Attributes:
        path: which.
        now: its narinfo, where that can be read.
        places: the facts, with where the NAR may lie; a manifest's last.
        others: the same of other builds, which older manifests name.
        error: why it is not known.
    """

    path: StorePath
    now: NarInfo | None = None
    places: tuple[NarInfo, ...] = ()
    others: tuple[NarInfo, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class _Result:
    """What came of a path's NAR: the narinfo to write; or why there is none."""

    path: StorePath
    entry: NarInfo | None = None
    sent_bytes: int = 0
    error: str = ""


class Mender:
    """Puts paths right.

    Args:
        objects: the cache.
        keyring: the trusted keys.
        sources: where lost NARs and narinfos come from, in order.
        claims: what the cache's manifests say.
        jobs: how many paths are under way at once.
        progress: is told.
        cancel: stops it.
        clock: stamps the pending record.
        dry_run: write nothing.
    """

    def __init__(
        self,
        objects: Objects,
        keyring: Keyring,
        sources: Sequence[Source],
        claims: Mapping[StorePath, Sequence[Claim]],
        *,
        jobs: int,
        progress: Progress,
        cancel: Cancel | None,
        clock: Clock,
        dry_run: bool,
    ) -> None:
        self._objects = objects
        self._keyring = keyring
        self._sources = sources
        self._claims = claims
        self._jobs = jobs
        self._progress = progress
        self._cancel = cancel
        self._clock = clock
        self._dry_run = dry_run
        self._lock = Lock()
        self._nar_locks: dict[bytes, Lock] = {}

    def mend(self, paths: Iterable[StorePath]) -> Mended:
        """Put paths right, and what they refer to where the cache lacks it."""
        facts = self._resolve(paths)
        errors = {path: one.error for path, one in facts.items() if one.error}
        good = [one for one in facts.values() if not one.error]
        pending = self._pending(good)
        entries: dict[StorePath, NarInfo] = {}
        sent_bytes = 0
        tasks = [partial(self._mend, one) for one in good]
        for result in each("repair", tasks, jobs=self._jobs, cancel=self._cancel):
            sent_bytes += result.sent_bytes
            if result.entry is None:
                errors[result.path] = result.error
            else:
                entries[result.path] = result.entry
            self._progress(Step("repair", len(entries) + len(errors), len(facts), "paths"))
        for path in _ordered(entries):
            self._write_narinfo(entries[path], facts[path].now)
        if pending is not None:
            records.remove_pending(self._objects, pending)
        return Mended(frozenset(entries), errors, sent_bytes)

    def _pending(self, facts: Sequence[_Facts]) -> records.Pending | None:
        """Keep what will be written from a collection."""
        if self._dry_run or not facts:
            return None
        infos = [one.places[0].info for one in facts]
        name = f"repair-{secrets.token_hex(12)}"
        pending = records.Pending.of(name, infos, now=self._clock.now(), lasts_s=_PENDING_S)
        records.write_pending(self._objects, pending)
        return pending

    # What a path must be

    def _resolve(self, paths: Iterable[StorePath]) -> dict[StorePath, _Facts]:
        facts: dict[StorePath, _Facts] = {}
        seen = set(paths)
        with Crew[tuple[_Facts, list[StorePath]]](
            "facts", jobs=self._jobs, cancel=self._cancel
        ) as crew:
            for path in sorted(seen):
                crew.add(partial(self._facts, path))
            for found, lacking in crew:
                facts[found.path] = found
                for path in lacking:
                    if path not in seen:
                        seen.add(path)
                        crew.add(partial(self._facts, path))
        return facts

    def _facts(self, path: StorePath, cancel: Cancel) -> tuple[_Facts, list[StorePath]]:
        """Return what a path must be, and what it refers to and the cache lacks."""
        cancel.check()
        now = self._current(path)
        claimed = [claim.entry for claim in self._claims.get(path, ())]
        builds = {entry.info.fingerprint: entry for entry in claimed if self._trusts(entry.info)}
        try:
            base = self._choose(path, now, builds)
        except CancelledError:
            raise
        except CalveError as error:
            return _Facts(path, error=error.message), []
        fingerprint = base.info.fingerprint
        known = claimed if now is None else [now, *claimed]
        same = [entry for entry in known if entry.info.fingerprint == fingerprint]
        info = replace(base.info, signatures=self._kept((base, *same)))
        places = tuple(replace(entry, info=info) for entry in same or [base])
        others = tuple(entry for made, entry in builds.items() if made != fingerprint)
        lacking = [
            one
            for one in base.info.references
            if not claimed and one not in {path, *self._claims} and self._lacks(one)
        ]
        return _Facts(path, now, places, others), lacking

    def _current(self, path: StorePath) -> NarInfo | None:
        try:
            return read_narinfo(self._objects, path)
        except MissingCacheError:
            raise
        except (NotFoundError, DamagedError):
            return None

    def _lacks(self, path: StorePath) -> bool:
        return self._objects.head(narinfo_key(path)) is None

    def _trusts(self, info: PathInfo) -> bool:
        try:
            self._keyring.verify(info.fingerprint, info.signatures, info.path)
        except SignatureError:
            return False
        return True

    def _choose(
        self, path: StorePath, now: NarInfo | None, builds: Mapping[bytes, NarInfo]
    ) -> NarInfo:
        """Return what a path must be: as the manifests say, else as it is, else as a source has it."""
        if len(builds) == 1:
            return next(iter(builds.values()))
        fits = now is not None and (not builds or now.info.fingerprint in builds)
        if now is not None and fits and self._trusts(now.info):
            return now
        if builds:
            raise ConflictError(f"manifests name different builds of it; {PUSH_AGAIN}")
        for source in self._sources:
            with suppress(*OTHER_MAY_HELP, UsageError):
                info = source.facts(path)
                if self._trusts(info):
                    return NarInfo(info, _key(info), "zstd")
        raise NotFoundError(
            "no manifest names it, and no source has it signed by a trusted key;"
            " calve push --check of the path signs it"
        )

    def _kept(self, entries: Iterable[NarInfo]) -> tuple[Signature, ...]:
        """Return the signatures of entries of one build, but for those that a trusted key did not make."""
        trusted = {key.name for key in self._keyring.keys}
        kept: list[Signature] = []
        for entry in entries:
            for one in entry.info.signatures:
                with suppress(SignatureError):
                    if one.name in trusted:
                        self._keyring.verify(entry.info.fingerprint, [one])
                    kept.append(one)
        return merge_signatures(tuple(kept))

    # NARs

    def _mend(self, facts: _Facts, cancel: Cancel) -> _Result:
        """See that the NARs of a path are there and right, from wherever; return its narinfo."""
        try:
            entry, sent_bytes = self._nar(facts.places, cancel)
            for other in facts.others:
                sent_bytes += self._nar((other,), cancel)[1]
        except CancelledError:
            raise
        except NotFoundError as error:
            return _Result(facts.path, error=error.message)
        return _Result(facts.path, entry, sent_bytes)

    def _nar(self, places: Sequence[NarInfo], cancel: Cancel) -> tuple[NarInfo, int]:
        """Find a NAR where it may lie, else write it again; return where it is, and how much was sent."""
        with self._lock:
            lock = self._nar_locks.setdefault(places[0].info.nar_hash.digest, Lock())
        with lock:  # two paths may have one NAR
            for entry in places:
                with suppress(NotFoundError, VerificationError, UsageError):
                    found = measure(self._objects, entry, cancel=cancel)
                    made = replace(entry, file_hash=found.file_hash, file_size=found.file_size)
                    return made, 0
            return self._restore(places[-1], cancel)

    def _restore(self, base: NarInfo, cancel: Cancel) -> tuple[NarInfo, int]:
        """Write a NAR again, from the first source that has it; NotFoundError says why none has."""
        reasons: list[str] = []
        for source in self._sources:
            try:
                _, compression = _opened(source, base)
                key = base.url if compression == base.compression else _key(base.info)
                made = replace(base, url=key, compression=compression)
                if self._dry_run:
                    return made, 0
                stream = self._send(key, lambda: _opened(source, base)[0], cancel)  # noqa: B023
            except CancelledError:
                raise
            except (_SourceError, NotFoundError, VerificationError, UsageError) as error:
                reasons.append(f"{source.name}: {error.message}")
            else:
                made = replace(made, file_hash=stream.file_hash, file_size=stream.file_size)
                return made, stream.file_size
        raise NotFoundError(
            "; ".join(reasons) or "its NAR has to come from somewhere: give --store or --from"
        )

    def _send(self, key: str, make: Callable[[], Stream], cancel: Cancel) -> Stream:
        def send() -> Stream:
            stream = make()
            with closing(_told_apart(stream, cancel)) as chunks:
                self._objects.put_stream(key, chunks)
            return stream

        # Two tries: a large object's upload that conflicts with another cannot go on, only begin anew.
        return retry(send, Policy(attempts=2), cancel=cancel)

    # Narinfos

    def _write_narinfo(self, entry: NarInfo, now: NarInfo | None) -> None:
        """Write a narinfo, with every good signature that stands there by then."""
        if self._dry_run or entry == now:
            return
        key = narinfo_key(entry.info.path)

        def make(old: bytes | None) -> bytes:
            made = entry
            with suppress(DamagedError):
                there = None if old is None else NarInfo.parse(old)
                if there is not None and there.info.fingerprint == entry.info.fingerprint:
                    info = replace(entry.info, signatures=self._kept((entry, there)))
                    made = replace(entry, info=info, extra=there.extra)
            return made.dump()

        try:
            amend(self._objects, key, make, fresh=False)
        except DamagedError:  # longer than a narinfo can be
            self._objects.put(key, entry.dump())


def _key(info: PathInfo) -> str:
    """Return the key that a push gives a path's NAR."""
    return f"nar/{encode32(info.nar_hash.digest)}.nar.zst"


def _opened(source: Source, base: NarInfo) -> tuple[Stream, str]:
    """Open a source's NAR; what it fails to give is its error, and another may give it."""
    try:
        return source.nar(base.info, base.compression)
    except CancelledError:
        raise
    except CalveError as error:
        raise _SourceError(error.message, place=error.place) from error


def _told_apart(stream: Stream, cancel: Cancel) -> Generator[bytes, None, None]:
    """Give a stream's chunks; its errors as ones that no writer of the cache raises."""
    with closing(stream.chunks(cancel)) as chunks:
        while True:
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            except CancelledError:
                raise
            except CalveError as error:
                raise _SourceError(error.message, place=error.place) from error
            yield chunk


def _ordered(entries: Mapping[StorePath, NarInfo]) -> list[StorePath]:
    """Put paths into an order in which narinfos may be written: references first."""

    def lookup(path: StorePath) -> PathInfo:
        info = entries[path].info
        return replace(info, references=tuple(one for one in info.references if one in entries))

    return [info.path for info in closure(sorted(entries), lookup)]
