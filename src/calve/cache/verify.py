"""Verify: find what is missing, corrupt or dangling in a cache, by its metadata alone or by every byte.

One listing says which objects there are and how large; each root, manifest and narinfo is read once, and with `deep`
each NAR. What no manifest names is told, and is no error: the next collection removes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

from calve.cache.crew import Crew
from calve.cache.findings import Finding, Kind, sort
from calve.cache.judge import Claim, Judge, Looked, ReadManifest
from calve.cache.lookup import narinfo_key
from calve.cache.objects import Objects
from calve.cache.roots import Root
from calve.cache.scope import ALL, Scope, each
from calve.errors import UsageError
from calve.nix.narinfo import NarInfo
from calve.nix.signing import Keyring
from calve.nix.storepath import StorePath
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["Check", "Verified", "is_narinfo", "verify"]

_NARINFO = ".narinfo"
_MANIFEST = ".json.zst"
_NARINFO_KEY_LENGTH = 32 + len(_NARINFO)
_PROGRESS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """How many were looked at, and what was found; `read_bytes` is of NARs, compressed."""

    roots: int
    manifests: int
    narinfos: int
    nars: int
    read_bytes: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Return the findings that are errors."""
        return tuple(one for one in self.findings if not one.harmless)


def verify(
    objects: Objects,
    keyring: Keyring,
    chosen: Scope = ALL,
    *,
    deep: bool = False,
    jobs: int = 8,
    progress: Progress = silent,
    cancel: Cancel | None = None,
) -> Verified:
    """Find what is missing, corrupt or dangling.

    Args:
        objects: the cache.
        keyring: the trusted keys.
        chosen: which closures; by default all that the cache has.
        deep: read every NAR too.
        jobs: how many requests are under way at once.
        progress: is told.
        cancel: stops it.

    Raises:
        UsageError: the cache cannot be listed, and nothing was named.
        TransientError, DeadlineError, AccessError: the cache could not be read.
    """
    check = Check(objects, keyring, deep=deep, jobs=jobs, progress=progress, cancel=cancel)
    return check.run(chosen)


class Check:
    """One run; for its owner's thread.

    Attributes:
        claims: what manifests say of each path; one for each build.
        roots: those that could be read, by key.
    """

    def __init__(
        self,
        objects: Objects,
        keyring: Keyring,
        *,
        deep: bool = False,
        jobs: int = 8,
        progress: Progress = silent,
        cancel: Cancel | None = None,
    ) -> None:
        self._objects = objects
        self._keyring = keyring
        self._deep = deep
        self._jobs = jobs
        self._cancel = cancel
        self._meter = _Meter(progress)
        self._findings: list[Finding] = []
        self._sizes: dict[str, int] | None = {}
        self._elsewhere: set[StorePath] = set()
        self.claims: dict[StorePath, list[Claim]] = {}
        self.roots: dict[str, Root] = {}

    def run(self, chosen: Scope = ALL) -> Verified:
        """Look at everything that was chosen; see `verify`."""
        self._list(chosen)
        judge = Judge(self._objects, self._keyring, self._sizes, self.claims)
        if chosen.whole:
            self._findings += judge.info()
        read = self._read_manifests(judge, chosen, self._read_roots(judge, chosen))
        walk = self._walk(judge, chosen)
        if chosen.whole:
            self._findings += self._unreferenced(walk)
        self._meter.tell()
        return Verified(
            roots=len(self.roots),
            manifests=read,
            narinfos=walk.narinfos,
            nars=len(walk.nars),
            read_bytes=self._meter.read_bytes,
            findings=sort(self._findings),
        )

    def _list(self, chosen: Scope) -> None:
        sizes: dict[str, int] = {}
        try:
            for one in self._objects.list("" if chosen.whole else "nar/"):
                if one.key.startswith(("nar/", "manifests/", "roots/")) or is_narinfo(one.key):
                    sizes[one.key] = one.size_bytes
        except UsageError:
            if chosen.whole:
                raise
            self._sizes = None  # a web server: each NAR is asked for
            return
        self._sizes = sizes
        if self._deep and chosen.whole:
            self._meter.total_bytes = sum(sizes[key] for key in self._listed("nar/", ""))

    def _listed(self, prefix: str, ending: str) -> list[str]:
        return [key for key in self._sizes or () if key.startswith(prefix) and key.endswith(ending)]

    def _read_roots(self, judge: Judge, chosen: Scope) -> dict[str, str]:
        """Read roots; return why manifests must be there, by their digests."""
        keepers: dict[str, str] = dict.fromkeys(chosen.manifests, "it was asked for")
        keys = self._listed("roots/", ".json") if chosen.whole else chosen.roots
        tasks = (partial(judge.root, key) for key in keys)
        for key, found in each("roots", tasks, jobs=self._jobs, cancel=self._cancel):
            if isinstance(found, Finding):
                self._findings.append(found)
            elif found is not None:  # else it was removed since
                self.roots[key] = found
                text = f"the root {found.owner}/{found.name} keeps it"
                keepers[found.manifest] = min(text, keepers.get(found.manifest, text))
        return keepers

    def _read_manifests(self, judge: Judge, chosen: Scope, keepers: dict[str, str]) -> int:
        """Read manifests and take down what they say; return how many could be read."""
        digests = dict.fromkeys(keepers)
        for key in self._listed("manifests/", _MANIFEST) if chosen.whole else ():
            digest = key.removeprefix("manifests/").removesuffix(_MANIFEST)
            if len(digest) == 64 and not digest.strip("0123456789abcdef"):
                digests[digest] = None
        tasks = (partial(judge.manifest, digest, keepers.get(digest)) for digest in digests)
        count = 0
        for read in each("manifests", tasks, jobs=self._jobs, cancel=self._cancel):
            self._findings += read.findings
            if read.manifest is not None:
                count += 1
                self._claim(read)
        return count

    def _claim(self, read: ReadManifest) -> None:
        for entry in read.manifest.paths if read.manifest is not None else ():
            path = entry.info.path
            if not entry.url:
                self._elsewhere.add(path)
            if not entry.url or path in read.wrong:
                continue
            claims = self.claims.setdefault(path, [])
            fingerprint = entry.info.fingerprint
            same = [one for one in claims if one.entry.info.fingerprint == fingerprint]
            if same and same[0].manifest < read.digest:
                continue  # always the same manifest of several, in whatever order they came
            claims[:] = [one for one in claims if one not in same] + [Claim(entry, read.digest)]
            claims.sort(key=lambda one: one.manifest)

    def _walk(self, judge: Judge, chosen: Scope) -> _Walk:
        todo: dict[str, StorePath | None] = {
            narinfo_key(path): path for path in (*self.claims, *chosen.paths)
        }
        for key in self._listed("", _NARINFO):
            todo.setdefault(key, None)
        walk = _Walk(judge, self.claims, todo, self._elsewhere, self._meter, deep=self._deep)
        self._findings += walk.run(frozenset(chosen.paths), self._jobs, self._cancel)
        return walk

    def _unreferenced(self, walk: _Walk) -> list[Finding]:
        """Return the narinfos and NARs that no manifest leads to."""
        named = {narinfo_key(path) for path in self.claims}
        kept = {claim.entry.url for claims in self.claims.values() for claim in claims}
        found = [
            Finding(Kind.UNREFERENCED, key, "no manifest names it")
            for key in self._listed("", _NARINFO)
            if key not in named
        ]
        return found + [
            Finding(Kind.UNREFERENCED, key, "no narinfo and no manifest names it")
            for key in self._listed("nar/", "")
            if key not in walk.nars and key not in kept
        ]


class _Walk:
    """Goes over narinfos, and what they refer to; `nars` has the keys of their NARs."""

    def __init__(
        self,
        judge: Judge,
        claims: dict[StorePath, list[Claim]],
        todo: dict[str, StorePath | None],
        elsewhere: set[StorePath],
        meter: _Meter,
        *,
        deep: bool,
    ) -> None:
        self._judge = judge
        self._claims = claims
        self._todo = todo
        self._elsewhere = elsewhere
        self._meter = meter
        self._deep = deep
        self._referrers: dict[StorePath, StorePath] = {}
        self._read: set[tuple[object, ...]] = set()
        self._done = 0
        self.nars: set[str] = set()
        self.narinfos = 0

    def run(self, wanted: frozenset[StorePath], jobs: int, cancel: Cancel | None) -> list[Finding]:
        """Look at all of them; those that are `wanted` must be there."""
        findings: list[Finding] = []
        gone: list[Looked] = []
        with Crew[Looked]("verify", jobs=jobs, cancel=cancel) as crew:
            for key, path in self._todo.items():
                crew.add(partial(self._judge.narinfo, key, path))
            for looked in crew:
                findings += looked.findings
                if looked.gone:
                    gone.append(looked)
                if looked.key:
                    self._take(looked, crew)
        findings += [one for looked in gone if (one := self._gone(looked, wanted)) is not None]
        return [
            replace(one, path=self._todo.get(one.key)) if one.path is None else one
            for one in findings
        ]

    def _take(self, looked: Looked, crew: Crew[Looked]) -> None:
        self._done += 1
        self.narinfos += not looked.gone
        self._meter.narinfos(self._done, len(self._todo))
        path, entry = looked.path, looked.entry
        claims = self._claims.get(path, ()) if path is not None else ()
        if entry is None:
            for claim in claims:
                crew.add(partial(self._judge.weigh_claim, claim), urgent=True)
                self._add_nar(claim.entry, "", crew)
            return
        self._add_nar(entry, looked.key, crew)
        for claim in claims:
            if claim.entry.info.nar_hash != entry.info.nar_hash:
                self._add_nar(claim.entry, "", crew)
        for reference in entry.info.references:
            key = narinfo_key(reference)
            if self._todo.get(key, reference) is None:
                self._todo[key] = reference  # now we know whose narinfo it is
            if reference in self._referrers:
                self._referrers[reference] = min(self._referrers[reference], entry.info.path)
            elif key not in self._todo and reference not in self._elsewhere:
                self._todo[key] = reference
                self._referrers[reference] = entry.info.path
                crew.add(partial(self._judge.narinfo, key, reference))

    def _add_nar(self, entry: NarInfo, key: str, crew: Crew[Looked]) -> None:
        """Note a NAR; have it read, once, where that is wanted."""
        self.nars.add(entry.url)
        what = (
            entry.url,
            entry.compression,
            entry.info.nar_hash,
            entry.info.nar_size,
            entry.file_hash if key else None,
        )
        if self._deep and what not in self._read:
            self._read.add(what)
            task = partial(self._judge.nar, entry, key, self._meter.add)
            crew.add(task, urgent=True)  # before more narinfos: what waits is held in memory

    def _gone(self, looked: Looked, wanted: frozenset[StorePath]) -> Finding | None:
        """Return what is to be said of a narinfo that is not there; nothing where it was removed since."""
        path, key = looked.path, looked.key
        if path is None:
            return None
        if claims := self._claims.get(path):
            why = f"the manifest {claims[0].manifest} names it"
            return Finding(Kind.MISSING, key, why, path)
        if path in wanted:
            return Finding(Kind.MISSING, key, "it was asked for", path)
        referrer = self._referrers[path]
        if not self._judge.dangles(key, referrer):
            return None
        return Finding(Kind.DANGLING, key, f"{referrer.basename} refers to it", path)


class _Meter:
    """Counts, for progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = Lock()
        self._told_bytes = 0
        self.read_bytes = 0
        self.total_bytes: int | None = None

    def narinfos(self, done: int, total: int) -> None:
        """Tell how many narinfos were looked at."""
        with self._lock:
            self._progress(Step("verify", done, total, "paths"))

    def add(self, size: int) -> None:
        """Count bytes of NARs that were read."""
        with self._lock:
            self.read_bytes += size
            if self.read_bytes - self._told_bytes >= _PROGRESS_BYTES:
                self._tell()

    def tell(self) -> None:
        """Tell how many bytes were read, if any."""
        with self._lock:
            if self.read_bytes:
                self._tell()

    def _tell(self) -> None:
        self._told_bytes = self.read_bytes
        self._progress(Step("read", self.read_bytes, self.total_bytes))


def is_narinfo(key: str) -> bool:
    """Say whether an object of this key is a narinfo."""
    return len(key) == _NARINFO_KEY_LENGTH and key.endswith(_NARINFO) and "/" not in key
