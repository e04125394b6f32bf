"""Pins: roots that somebody sets by hand, `roots/pin/<name>.json`; and what every root keeps, for a list.

Order makes a pin safe beside garbage collection. The root is written first: a sweep that begins later sees it. Only
then is looked whether a sweep under way may remove what it keeps, and whether all of that is there; where not, the
root is taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from calve.cache import lookup, manifest, roots, tombstones
from calve.cache.amend import check_there
from calve.cache.crew import Crew
from calve.cache.manifest import Manifest
from calve.cache.objects import MissingCacheError, Objects
from calve.cache.roots import Root
from calve.cache.scope import walk_narinfos
from calve.clock import SYSTEM, Clock
from calve.errors import (
    ConflictError,
    DamagedError,
    NotFoundError,
    UsageError,
)
from calve.nix.signing import Keyring
from calve.nix.storepath import StorePath
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["OWNER", "Kept", "kept", "manifest_of", "pin", "read", "unpin"]

OWNER = "pin"


@dataclass(frozen=True, slots=True)
class Kept:
    """A root and what it keeps.

    Attributes:
        root: it.
        toplevel: of its manifest; None where that is missing or damaged, and `problem` says so.
        paths: how many it names, those that are in other caches included.
        nar_bytes: of the paths that are in this cache.
        file_bytes: of their NARs as they lie there, where that is known.
        problem: empty, or why its manifest cannot be read.
    """

    root: Root
    toplevel: StorePath | None = None
    paths: int = 0
    nar_bytes: int = 0
    file_bytes: int = 0
    problem: str = ""


def kept(objects: Objects) -> Iterator[Kept]:
    """Read every root, sorted by owner and name, and what it keeps; one manifest is held at a time."""
    read: dict[str, Kept] = {}
    for root, _ in roots.list_roots(objects):
        if root.manifest not in read:
            read[root.manifest] = _kept(objects, root)
        known = read[root.manifest]
        yield Kept(
            root, known.toplevel, known.paths, known.nar_bytes, known.file_bytes, known.problem
        )
    if not read:
        check_there(objects)


def _kept(objects: Objects, root: Root) -> Kept:
    try:
        found = manifest.read(objects, root.manifest)
    except MissingCacheError:
        raise
    except (NotFoundError, DamagedError, UsageError) as error:
        return Kept(root, problem=error.message)
    here = [entry for entry in found.paths if entry.url]
    return Kept(
        root,
        found.toplevel,
        len(found.paths),
        sum(entry.info.nar_size for entry in here),
        sum(entry.file_size or 0 for entry in here),
    )


def manifest_of(objects: Objects, path: StorePath) -> str | None:
    """Return the digest of a manifest of a path's closure that a root keeps; None where there is none."""
    for one in kept(objects):
        if one.toplevel == path:
            return one.root.manifest
    return None


def pin(
    objects: Objects,
    name: str,
    what: StorePath | str,
    *,
    keyring: Keyring | None = None,
    jobs: int = 8,
    progress: Progress = silent,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
) -> Root:
    """Keep a closure from garbage collection, under a name; a pin of that name keeps this one from now on.

    Args:
        objects: the cache.
        name: of the pin.
        what: the digest of a manifest; or a path, whose manifest is found by the roots, or is made of its narinfos.
        keyring: the keys that are trusted, for the latter.
        jobs: how many requests are under way at once.
        progress: is told.
        cancel: stops it.
        clock: stamps the root.

    Raises:
        NotFoundError: there is no such manifest, or the cache lacks something of the closure.
        UsageError: the name is not one; or a manifest would have to be made and no keys are trusted.
        SignatureError, DamagedError: a narinfo or the manifest is not good.
        ConflictError: garbage collection is removing some of it right now.
    """
    root = Root(OWNER, name, "0" * 64, clock.now())  # a wrong name is refused before anything else
    digest = what if isinstance(what, str) else manifest_of(objects, what)
    if digest is None and isinstance(what, StorePath):
        digest = _make_manifest(objects, what, keyring, jobs, progress, cancel)
    root = Root(OWNER, name, str(digest), clock.now())
    safe = any(other.manifest == digest for other, _ in roots.list_roots(objects))
    found = manifest.read(objects, root.manifest)
    before = roots.read_root(objects, OWNER, name)
    roots.write_root(objects, root)
    if not safe:
        try:
            _check(objects, found, root.manifest, jobs, progress, cancel)
        except BaseException:
            _take_back(objects, root, before)
            raise
    return root


def _take_back(objects: Objects, root: Root, before: Root | None) -> None:
    """Undo the write of a pin, unless another came meanwhile."""
    now = roots.tagged_root(objects, OWNER, root.name)
    if now is None or now[0].dump() != root.dump():
        return
    if before is None:
        objects.delete(root.key, match=now[1])
    else:
        roots.write_root(objects, before, match=now[1])


def _check(
    objects: Objects,
    found: Manifest,
    digest: str,
    jobs: int,
    progress: Progress,
    cancel: Cancel | None,
) -> None:
    """Raise unless all that a manifest names is there, and stays: its root is written."""
    keys = {manifest.key(digest)}
    for entry in found.paths:
        if entry.url:
            keys |= {entry.url, lookup.narinfo_key(entry.info.path)}
    collection = tombstones.read(objects)
    if collection is not None and collection[0].state == tombstones.SWEEPING:
        going = tombstones.doomed(objects, keys).keys
        if going:
            raise ConflictError(
                f"garbage collection is removing {len(going)} of its {len(keys)} objects",
                place=f"{objects.url}/{min(going)}",
                hint="wait until it is done, then push the closure again",
            )
    missing: list[str] = []
    with Crew[tuple[str, bool]]("look", jobs=jobs, cancel=cancel) as crew:
        for key in keys:
            crew.add(partial(_there, objects, key))
        for count, (key, there) in enumerate(crew, 1):
            progress(Step("look", count, len(keys), "objects"))
            if not there:
                missing.append(key)
    if missing:
        raise NotFoundError(
            f"{len(missing)} of the {len(keys)} objects of the closure are missing",
            place=f"{objects.url}/{min(missing)}",
            hint="push the closure again",
        )


def _there(objects: Objects, key: str, cancel: Cancel) -> tuple[str, bool]:
    cancel.check()
    return key, objects.head(key) is not None


def _make_manifest(
    objects: Objects,
    path: StorePath,
    keyring: Keyring | None,
    jobs: int,
    progress: Progress,
    cancel: Cancel | None,
) -> str:
    """Make the manifest of a closure of its narinfos; return its digest."""
    if keyring is None:
        raise UsageError(
            "no root keeps a manifest of this path, and to make one its narinfos must be trusted",
            place=path,
            hint="give --trusted KEY, or the digest of a manifest",
        )
    entries = walk_narinfos(
        objects, [path], closure=True, jobs=jobs, progress=progress, cancel=cancel
    )
    for each, entry in entries.items():
        lookup.verify(entry, keyring, f"{objects.url}/{lookup.narinfo_key(each)}")
    made = Manifest(path, manifest.boot_order(entries.values(), path))
    body = made.dump()
    digest = manifest.digest_of(body)
    objects.put(manifest.key(digest), manifest.pack(body), only_new=True)
    return digest


def read(objects: Objects, name: str) -> Root:
    """Read a pin; NotFoundError where there is none."""
    return _tagged(objects, name)[0]


def unpin(objects: Objects, name: str) -> Root:
    """Remove a pin and return it; NotFoundError where there is none."""
    while True:
        root, tag = _tagged(objects, name)
        if objects.delete(root.key, match=tag):
            return root


def _tagged(objects: Objects, name: str) -> tuple[Root, str]:
    found = roots.tagged_root(objects, OWNER, name)
    if found is None:
        place = f"{objects.url}/{roots.root_key(OWNER, name)}"
        raise NotFoundError("there is no such pin", place=place)
    return found
