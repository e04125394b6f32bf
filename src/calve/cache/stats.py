"""Stats: what takes the space in a cache, by kind and by root, and what a garbage collection could remove.

One listing, one request for each root and each record of a push, and one for each manifest that something keeps.
What a collection could remove is told by what it would find if every grace were over but that of manifests.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from calve.cache import manifest as manifests
from calve.cache import roots as records
from calve.cache.amend import check_there
from calve.cache.lookup import narinfo_key
from calve.cache.manifest import Manifest
from calve.cache.objects import Listed, MissingCacheError, Objects
from calve.cache.roots import Pending, Root
from calve.cache.scope import each, read_root
from calve.cache.verify import is_narinfo
from calve.clock import SYSTEM, Clock
from calve.errors import DamagedError, NotFoundError, UsageError, VerificationError
from calve.nix.hashes import encode32
from calve.nix.narinfo import NarInfo
from calve.nix.storepath import StorePath
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["GRACE_S", "USD_PER_GIB_MONTH", "RootStats", "Stats", "Usage", "stats"]

USD_PER_GIB_MONTH = 0.023
"""S3 Standard's storage, the first 50 TB, in us-east-1; other regions cost up to twice that, requests and traffic come
on top. Source: https://aws.amazon.com/s3/pricing/"""
GRACE_S = 86_400.0
"""Manifests that are younger keep what they name: the default of `calve cache gc --grace`."""

_HASH_LENGTH = 52
_LISTED_STEP = 1000
_KINDS = ("nar", "manifests", "roots", "pending", "gc", "fleets", "boot-reports")


@dataclass(frozen=True, slots=True)
class RootStats:
    """What one root keeps.

    Attributes:
        key: of the root.
        root: None where it cannot be read.
        toplevel: of its manifest; None where that cannot be read.
        paths: that the manifest names and this cache has.
        nar_bytes: of them.
        stored_bytes: of their NARs as they lie there.
        own_bytes: of these, what no other root keeps.
        problem: empty, or what cannot be read.
    """

    key: str
    root: Root | None
    toplevel: StorePath | None = None
    paths: int = 0
    nar_bytes: int = 0
    stored_bytes: int = 0
    own_bytes: int = 0
    problem: str = ""

    @property
    def shared_bytes(self) -> int:
        """Return how much other roots keep too."""
        return self.stored_bytes - self.own_bytes


@dataclass(frozen=True, slots=True)
class Usage:
    """Objects and their bytes."""

    objects: int = 0
    size_bytes: int = 0

    def plus(self, size_bytes: int) -> Usage:
        """Return it with one object more."""
        return Usage(self.objects + 1, self.size_bytes + size_bytes)


@dataclass(frozen=True, slots=True)
class Stats:
    """What takes the space.

    Attributes:
        roots: by key.
        kinds: by kind: "nar", "narinfo", "manifests", …
        total: of everything.
        unreferenced: what nothing keeps; None where a root or its manifest cannot be read, for then nobody knows.
    """

    roots: tuple[RootStats, ...]
    kinds: Mapping[str, Usage]
    total: Usage
    unreferenced: Usage | None

    @property
    def usd_per_month(self) -> float:
        """Return what S3 Standard asks for storing it, without requests and traffic."""
        return self.total.size_bytes / (1 << 30) * USD_PER_GIB_MONTH


def stats(
    objects: Objects,
    *,
    jobs: int = 8,
    progress: Progress = silent,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
) -> Stats:
    """Find out what takes the space.

    Args:
        objects: the cache.
        jobs: how many requests are under way at once.
        progress: is told.
        cancel: stops it.
        clock: says which manifests are young, and which pushes are over.

    Raises:
        UsageError: the cache cannot be listed.
        MissingCacheError: there is no such cache.
    """
    found = _Stats(objects, jobs, progress, cancel, clock.now()).run()
    if not found.total.objects:
        check_there(objects)
    return found


class _Stats:
    """One run."""

    def __init__(
        self,
        objects: Objects,
        jobs: int,
        progress: Progress,
        cancel: Cancel | None,
        now: datetime.datetime,
    ) -> None:
        self._objects = objects
        self._jobs = jobs
        self._progress = progress
        self._cancel = cancel
        self._now = now
        self._sizes: dict[str, int] = {}  # of narinfos, NARs and manifests
        self._nars: dict[str, str] = {}  # a NAR's key by the digits of its hash
        self._kinds: dict[str, Usage] = {}
        self._young: list[str] = []
        self._roots: list[str] = []
        self._pending: list[str] = []
        self._kept: set[str] = set()
        self._digits: set[str] = set()
        self._owners: dict[str, int] = {}  # which roots keep a NAR: a bit for each
        self._sure = True

    def run(self) -> Stats:
        for count, listed in enumerate(self._objects.list("")):
            if count % _LISTED_STEP == 0:
                self._progress(Step("list", count, None, "objects"))
            self._list(listed)
        self._keep_pending()
        rows = self._read_roots()
        total = Usage(
            sum(one.objects for one in self._kinds.values()),
            sum(one.size_bytes for one in self._kinds.values()),
        )
        return Stats(
            roots=tuple(rows),
            kinds=dict(sorted(self._kinds.items())),
            total=total,
            unreferenced=self._unreferenced() if self._sure else None,
        )

    def _list(self, listed: Listed) -> None:
        key = listed.key
        kind = _kind(key)
        self._kinds[kind] = self._kinds.get(kind, Usage()).plus(listed.size_bytes)
        if kind in {"nar", "narinfo", "manifests"}:
            self._sizes[key] = listed.size_bytes
        if kind == "nar":
            self._nars[_hash_digits(key)] = key
        elif kind == "manifests" and listed.modified_s > self._now.timestamp() - GRACE_S:
            self._young.append(key)
        elif kind == "roots" and key.endswith(".json"):
            self._roots.append(key)
        elif kind == "pending" and key.endswith(".json"):
            self._pending.append(key)

    def _keep_pending(self) -> None:
        """Note what pushes under way keep."""
        tasks = [partial(self._read_pending, key) for key in self._pending]
        for pending in each("pending", tasks, jobs=self._jobs, cancel=self._cancel):
            if pending is not None and pending.expires >= self._now:
                self._digits.update(pending.paths)
                if pending.previous is not None:
                    self._young.append(manifests.key(pending.previous))

    def _read_pending(self, key: str, cancel: Cancel) -> Pending | None:
        cancel.check()
        name = key.removeprefix("pending/").removesuffix(".json")
        try:
            return records.read_pending(self._objects, name)
        except MissingCacheError:
            raise
        except NotFoundError:
            return None
        except (VerificationError, UsageError):
            self._sure = False
            return None

    # Roots and manifests

    def _read_roots(self) -> Iterator[RootStats]:
        tasks = [partial(self._read_root, key) for key in self._roots]
        found = sorted(each("roots", tasks, jobs=self._jobs, cancel=self._cancel), key=_by_key)
        rows: dict[str, RootStats] = {}
        wanted: dict[str, list[int]] = {}
        for row in found:
            if row.problem or row.root is not None:  # else it was removed since
                if row.root is not None:
                    wanted.setdefault(row.root.manifest, []).append(len(rows))
                else:
                    self._sure = False
                rows[row.key] = row
        for key in self._young:
            wanted.setdefault(key.removeprefix("manifests/").removesuffix(".json.zst"), [])
        order = list(rows)
        closures: dict[int, list[str]] = {}
        reads = [partial(self._read_manifest, digest) for digest in wanted]
        done = each("manifests", reads, jobs=self._jobs, cancel=self._cancel)
        for number, (digest, manifest) in enumerate(done, 1):
            self._progress(Step("manifests", number, len(wanted), "manifests"))
            numbers = wanted[digest]
            if isinstance(manifest, str):
                self._sure &= not numbers
                for at in numbers:
                    old = rows[order[at]]
                    rows[order[at]] = RootStats(old.key, old.root, problem=manifest)
                continue
            nars = self._keep(digest, manifest, numbers)
            for at in numbers:
                old = rows[order[at]]
                closures[at] = nars
                rows[order[at]] = _row(old, manifest)
        for at, key in enumerate(order):
            yield self._weighed(rows[key], closures.get(at, []), 1 << at)

    def _read_root(self, key: str, cancel: Cancel) -> RootStats:
        cancel.check()
        try:
            return RootStats(key, read_root(self._objects, key))
        except MissingCacheError:
            raise
        except NotFoundError:
            return RootStats(key, None)
        except (VerificationError, UsageError) as error:
            return RootStats(key, None, problem=error.message)

    def _read_manifest(self, digest: str, cancel: Cancel) -> tuple[str, Manifest | str]:
        cancel.check()
        try:
            return digest, manifests.read(self._objects, digest)
        except MissingCacheError:
            raise
        except (NotFoundError, DamagedError, UsageError) as error:
            return digest, f"its manifest: {error.message}"

    def _keep(self, digest: str, manifest: Manifest, numbers: list[int]) -> list[str]:
        """Note what a manifest keeps; return the keys of its NARs, each once."""
        bits = sum(1 << at for at in numbers)
        self._kept.add(manifests.key(digest))
        nars: dict[str, None] = {}
        for entry in manifest.paths:
            if entry.url:
                self._kept.add(narinfo_key(entry.info.path))
                nars[self._nar(entry)] = None
        for nar in nars:
            self._kept.add(nar)
            self._owners[nar] = self._owners.get(nar, 0) | bits
        return list(nars)

    def _nar(self, entry: NarInfo) -> str:
        """Return where a path's NAR lies: another than its manifest says, where it was sent again."""
        digits = encode32(entry.info.nar_hash.digest)
        self._digits.add(digits)
        return entry.url if entry.url in self._sizes else self._nars.get(digits, entry.url)

    def _weighed(self, row: RootStats, nars: list[str], bit: int) -> RootStats:
        sizes = {nar: self._sizes.get(nar, 0) for nar in nars}
        own = sum(size for nar, size in sizes.items() if self._owners[nar] == bit)
        return RootStats(
            key=row.key,
            root=row.root,
            toplevel=row.toplevel,
            paths=row.paths,
            nar_bytes=row.nar_bytes,
            stored_bytes=sum(sizes.values()),
            own_bytes=own,
            problem=row.problem,
        )

    def _unreferenced(self) -> Usage:
        usage = Usage()
        for key, size_bytes in self._sizes.items():
            named = key[:32] if is_narinfo(key) else _hash_digits(key)
            if key not in self._kept and named not in self._digits:
                usage = usage.plus(size_bytes)
        return usage


def _row(old: RootStats, manifest: Manifest) -> RootStats:
    here = [entry for entry in manifest.paths if entry.url]
    nar_bytes = sum(entry.info.nar_size for entry in here)
    return RootStats(old.key, old.root, manifest.toplevel, len(here), nar_bytes)


def _by_key(row: RootStats) -> str:
    return row.key


def _kind(key: str) -> str:
    if is_narinfo(key):
        return "narinfo"
    first = key.partition("/")[0]
    if "/" in key and first in _KINDS:
        return first
    return "gc" if key == "gc.json" else "other"


def _hash_digits(key: str) -> str:
    """Return the digits of a NAR's hash, as a push names it; what they are for another key does not matter."""
    return key.removeprefix("nar/")[:_HASH_LENGTH]
