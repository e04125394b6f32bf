"""Pull: paths of a closure from caches into a sink, many at once, with bounded memory.

A plan is made first: it knows every path that is missing, where its NAR is and how large, and that a trusted key
signed it. What an interrupted pull had verified, the sink adopts. Then NARs are fetched, `jobs` at once (see
`fetch`), and once all are there the owner's thread commits them together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from calve.cache.crew import Crew
from calve.cache.fetch import Fetcher
from calve.cache.lookup import Found, locate, read_manifest, verify, walk
from calve.cache.manifest import Manifest
from calve.cache.objects import Objects
from calve.clock import SYSTEM, Clock
from calve.errors import UsageError, VerificationError
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring
from calve.nix.sink import Sink
from calve.nix.storepath import StorePath
from calve.progress import Note, Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["PullPlan", "Pulled", "plan", "pull"]

_FLUSH_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What a pull will do.

    Attributes:
        missing: paths to fetch, in that order.
        adopted: paths that an interrupted pull had verified; they are only to be committed.
        present: how many paths of the closure (where its manifest was read; else of those met) are valid already.
        nar_bytes: of all that is missing.
        fetch_bytes: of its compressed NARs, as far as caches say.
        manifest: the digest of the manifest that was read; None where narinfos were walked.
    """

    missing: tuple[Found, ...]
    adopted: tuple[PathInfo, ...]
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
    resume: bool = True,
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
        resume: have the sink adopt what interrupted pulls left; else nothing is written.
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
        entries = {entry.info.path: entry for entry in _wanted(*read, wanted)}
        missing = [entries[path] for path in sink.missing(entries)]
        present = len(entries) - len(missing)
        found = _found(missing, read[1], caches, keyring, jobs=jobs, cancel=cancel)
    else:
        if manifest is not None:
            progress(Note(f"no cache has the manifest {manifest}; asking for each path"))
        found, present = walk(caches, keyring, wanted, sink, jobs=jobs, cancel=cancel)
        found.sort(key=lambda each: -each.entry.info.nar_size)
    adopted: set[StorePath] = set()
    if resume:
        adopted = sink.adopt([each.entry.info for each in found])
    taken = tuple(each.entry.info for each in found if each.entry.info.path in adopted)
    found = [each for each in found if each.entry.info.path not in adopted]
    return PullPlan(
        missing=tuple(found),
        adopted=taken,
        present=present,
        nar_bytes=sum(each.entry.info.nar_size for each in found),
        fetch_bytes=sum(each.entry.file_size or 0 for each in found),
        manifest=manifest if read is not None else None,
        caches=tuple(caches),
        keyring=keyring,
    )


def _wanted(manifest: Manifest, cache: Objects, roots: Sequence[StorePath]) -> list[NarInfo]:
    """Choose the entries of the roots' closure, in the manifest's order."""
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
    return [entry for path, entry in entries.items() if path in needed]


def _found(
    entries: Iterable[NarInfo],
    cache: Objects,
    caches: Sequence[Objects],
    keyring: Keyring,
    *,
    jobs: int,
    cancel: Cancel | None,
) -> list[Found]:
    """Say where paths of a manifest are: those without a URL are not in its cache, and looked for in all."""
    known = [Found(entry, cache) for entry in entries]
    elsewhere = [each.entry.info for each in known if not each.entry.url]
    places = locate(caches, keyring, elsewhere, jobs=jobs, cancel=cancel)
    for each in known:
        if each.entry.url:
            verify(each.entry, keyring)
    return [places.get(each.entry.info.path, each) for each in known]


def pull(
    plan: PullPlan,
    sink: Sink,
    *,
    jobs: int = 8,
    decoders: int = 3,
    progress: Progress = silent,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
) -> Pulled:
    """Fetch what is missing and commit it.

    Args:
        plan: what to fetch.
        sink: takes it; `stage` and `discard` are called by many threads, the rest by this one.
        jobs: how many NARs are under way at once.
        decoders: how many large ones of them are decompressed at once.
        progress: is told, by any thread, one at a time.
        cancel: stops it.
        clock: measures the network.

    Raises:
        DamagedError: a NAR is truncated, altered, or not what was signed, wherever it was fetched from.
        NotFoundError: a NAR is gone, and its narinfo, read again, does not help.
        TransientError, DeadlineError: a cache could not be reached.
    """

    def tell(done: int) -> None:
        progress(Step("pull", done, plan.nar_bytes))

    fetcher = Fetcher(
        plan.missing,
        plan.caches,
        plan.keyring,
        sink,
        decoders=decoders,
        clock=clock,
        tell=tell,
    )
    unflushed = 0
    with Crew[PathInfo]("pull", jobs=jobs, cancel=cancel) as crew:
        for _ in plan.missing:
            crew.add(fetcher.fetch)
        for info in crew:
            unflushed += info.nar_size
            if unflushed >= _FLUSH_BYTES:
                unflushed = 0
                sink.flush()
    batch = [*plan.adopted, *(found.entry.info for found in plan.missing)]
    if batch:
        sink.commit(batch)
    tell(fetcher.done_bytes)
    return Pulled(
        paths=len(plan.missing),
        nar_bytes=plan.nar_bytes,
        fetched_bytes=fetcher.fetched_bytes,
        retries=fetcher.retries,
    )
