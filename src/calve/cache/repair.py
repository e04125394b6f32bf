"""Repair: put back what `verify` finds missing or corrupt, out of a local store or another cache.

Nothing is made up: what cannot be put back as it was is told, with what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from calve.cache import manifest as manifests
from calve.cache.amend import ensure_info
from calve.cache.findings import Finding, Kind
from calve.cache.judge import INFO_KEY
from calve.cache.lookup import narinfo_key
from calve.cache.mend import PUSH_AGAIN, Mender
from calve.cache.objects import Objects
from calve.cache.rebuild import good_signatures, rebuild, salvage
from calve.cache.scope import ALL, Scope, each
from calve.cache.sources import Source
from calve.cache.verify import Check, Verified, is_narinfo
from calve.clock import SYSTEM, Clock
from calve.errors import DamagedError, NotFoundError
from calve.nix.narinfo import MAX_NARINFO_BYTES, NarInfo, merge_signatures
from calve.nix.signing import Keyring, Signature
from calve.nix.storepath import StorePath
from calve.progress import Progress, silent
from calve.tasks import Cancel

__all__ = ["Left", "Repaired", "repair"]


@dataclass(frozen=True, slots=True)
class Left:
    """What could not be repaired, and why or what to do."""

    finding: Finding
    why: str


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was found, what was (with `dry_run`: would be) put right, and what was not; `sent_bytes` is of NARs."""

    verified: Verified
    repaired: tuple[Finding, ...]
    left: tuple[Left, ...]
    sent_bytes: int


def repair(
    objects: Objects,
    keyring: Keyring,
    sources: Sequence[Source],
    chosen: Scope = ALL,
    *,
    deep: bool = False,
    dry_run: bool = False,
    jobs: int = 8,
    progress: Progress = silent,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
) -> Repaired:
    """Verify, and put right what can be.

    Args:
        objects: the cache.
        keyring: the trusted keys; nothing else is believed.
        sources: where lost NARs, narinfos and manifests come from, in order.
        chosen: which closures; by default all that the cache has.
        deep: read every NAR too.
        dry_run: write nothing.
        jobs: how many paths are under way at once.
        progress: is told.
        cancel: stops it.
        clock: stamps the pending record.

    Raises:
        CalveError: the cache could not be read or written to. What a source fails to give is no such error.
    """
    run = _Repair(objects, keyring, sources, jobs, progress, cancel, clock, dry_run=dry_run)
    check, verified = run.check(chosen, deep=deep)
    todo = run.copy_manifests(verified.errors)
    if len(todo) < len(verified.errors) and not dry_run:
        # What these manifests name was not looked at before.
        check, again = run.check(chosen, deep=deep)
        fresh = tuple(one for one in again.findings if one not in verified.findings)
        verified = replace(verified, findings=verified.findings + fresh)
        todo = again.errors
    run.mend(check, todo)
    return Repaired(verified, tuple(run.repaired), tuple(run.left), run.sent_bytes)


class _Repair:
    """One run."""

    def __init__(
        self,
        objects: Objects,
        keyring: Keyring,
        sources: Sequence[Source],
        jobs: int,
        progress: Progress,
        cancel: Cancel | None,
        clock: Clock,
        *,
        dry_run: bool,
    ) -> None:
        self._objects = objects
        self._keyring = keyring
        self._sources = sources
        self._jobs = jobs
        self._progress = progress
        self._cancel = cancel
        self._clock = clock
        self._dry_run = dry_run
        self.repaired: list[Finding] = []
        self.left: list[Left] = []
        self.sent_bytes = 0

    def check(self, chosen: Scope, *, deep: bool) -> tuple[Check, Verified]:
        """Look at the cache."""
        check = Check(
            self._objects,
            self._keyring,
            deep=deep,
            jobs=self._jobs,
            progress=self._progress,
            cancel=self._cancel,
        )
        return check, check.run(chosen)

    def mend(self, check: Check, findings: Sequence[Finding]) -> None:
        """Put right what was found."""
        paths: dict[StorePath, list[Finding]] = {}
        lost: dict[str, Finding] = {}
        for finding in findings:
            digest = _digest(finding)
            if digest is not None:
                lost[digest] = finding
            elif finding.path is not None and not finding.key.startswith("manifests/"):
                paths.setdefault(finding.path, []).append(finding)
            else:
                self._other(finding)
        if paths:
            self._mend_paths(check, paths)
        if lost:
            self._remake_manifests(lost)

    def _mend_paths(self, check: Check, paths: dict[StorePath, list[Finding]]) -> None:
        mender = Mender(
            self._objects,
            self._keyring,
            self._sources,
            check.claims,
            jobs=self._jobs,
            progress=self._progress,
            cancel=self._cancel,
            clock=self._clock,
            dry_run=self._dry_run,
        )
        done = mender.mend(paths)
        self.sent_bytes += done.sent_bytes
        for path in sorted({*paths, *done.done, *done.errors}):
            findings = paths.get(path) or [_lacked(path)]
            if path in done.errors:
                self._leave(findings, done.errors[path])
            else:
                self.repaired += findings

    def _other(self, finding: Finding) -> None:
        """Deal with what is neither a path nor a manifest that can be put back."""
        if finding.key == INFO_KEY and finding.kind is Kind.MISSING:
            if not self._dry_run:
                ensure_info(self._objects)
            self.repaired.append(finding)
        elif finding.key == INFO_KEY:
            self._leave([finding], "it says that this is another store's cache")
        elif finding.key.startswith("roots/"):
            self._leave(
                [finding],
                "remove the object; then calve push --check or calve cache pin makes it anew",
            )
        elif finding.kind is Kind.UNSUPPORTED:
            self._leave([finding], "another version of Calve may read it")
        elif finding.key.startswith("manifests/"):
            self._leave([finding], f"a manifest does not change; {PUSH_AGAIN}")
        else:
            self._leave([finding], "nothing says which path it should be of; remove the object")

    def _leave(self, findings: Iterable[Finding], why: str) -> None:
        self.left += [Left(finding, why) for finding in findings]

    # Manifests

    def copy_manifests(self, findings: Sequence[Finding]) -> tuple[Finding, ...]:
        """Take manifests from other caches; return the findings that remain."""
        return tuple(one for one in findings if not self._copied(one))

    def _copied(self, finding: Finding) -> bool:
        digest = _digest(finding)
        for source in self._sources if digest is not None else ():
            found = source.manifest(digest or "")
            if digest is None or found is None:
                continue
            good = good_signatures(found[1], digest, self._keyring)
            if finding.kind is not Kind.UNSIGNED or good:
                self._put_manifest(digest, found[0], good)
                if self._dry_run:  # else the next look tells it
                    self._bare(finding, digest, good)
                self.repaired.append(finding)
                return True
        return False

    def _put_manifest(self, digest: str, body: bytes, good: tuple[Signature, ...]) -> None:
        if not self._dry_run:
            kept = salvage(self._objects, digest, self._keyring)
            data = manifests.pack(body, merge_signatures(kept, good))
            self._objects.put(manifests.key(digest), data)

    def _remake_manifests(self, lost: dict[str, Finding]) -> None:
        """Make manifests again out of narinfos, where that gives the same digest."""
        wanted = frozenset(digest for digest, one in lost.items() if one.kind is not Kind.UNSIGNED)
        bodies = rebuild(wanted, self._all_narinfos()) if wanted else {}
        for digest, finding in lost.items():
            if finding.kind is Kind.UNSIGNED:
                self._leave([finding], PUSH_AGAIN)
            elif digest not in bodies:
                self._leave([finding], f"the narinfos do not give this manifest; {PUSH_AGAIN}")
            else:
                signatures = salvage(self._objects, digest, self._keyring)
                self._put_manifest(digest, bodies[digest], signatures)
                self.repaired.append(finding)
                self._bare(finding, digest, signatures)

    def _bare(self, finding: Finding, digest: str, signatures: tuple[Signature, ...]) -> None:
        """Tell of a manifest that was put back without a signature."""
        if not signatures and not salvage(self._objects, digest, self._keyring):
            bare = Finding(Kind.UNSIGNED, finding.key, "its signatures are lost")
            self._leave([bare], PUSH_AGAIN)

    def _all_narinfos(self) -> dict[StorePath, NarInfo]:
        keys = [one.key for one in self._objects.list("") if is_narinfo(one.key)]
        tasks = [partial(self._read, key) for key in keys]
        found = each("narinfos", tasks, jobs=self._jobs, cancel=self._cancel)
        return {entry.info.path: entry for entry in found if entry is not None}

    def _read(self, key: str, cancel: Cancel) -> NarInfo | None:
        cancel.check()
        with suppress(NotFoundError, DamagedError):
            entry = NarInfo.parse(self._objects.get(key, MAX_NARINFO_BYTES), key)
            if narinfo_key(entry.info.path) == key:
                return entry
        return None


def _digest(finding: Finding) -> str | None:
    """Return the digest of a manifest that may be put back; None where the finding is not of one."""
    kinds = (Kind.MISSING, Kind.CORRUPT, Kind.UNSIGNED)
    if finding.path is not None or finding.kind not in kinds:
        return None
    if not finding.key.startswith("manifests/"):
        return None
    return finding.key.removeprefix("manifests/").removesuffix(".json.zst")


def _lacked(path: StorePath) -> Finding:
    return Finding(Kind.DANGLING, narinfo_key(path), "what was put back refers to it", path)
