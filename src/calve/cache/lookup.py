"""What caches say of paths: narinfos and manifests, from the first cache that has good ones.

Every answer is checked before it is believed: it is of the path that was asked for, and a trusted key signed it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from calve.cache import manifest as manifests
from calve.cache.compression import NAMES
from calve.cache.crew import Crew
from calve.cache.manifest import Manifest
from calve.cache.objects import MissingCacheError, Objects, check_key
from calve.errors import (
    AccessError,
    CalveError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    RefusedError,
    SignatureError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.nix.narinfo import MAX_NARINFO_BYTES, NarInfo, PathInfo
from calve.nix.signing import Keyring
from calve.nix.sink import Sink
from calve.nix.storepath import StorePath
from calve.tasks import Cancel

__all__ = [
    "OTHER_MAY_HELP",
    "Found",
    "find",
    "find_same",
    "locate",
    "narinfo_key",
    "read_manifest",
    "read_narinfo",
    "verify",
    "walk",
]

T = TypeVar("T")

OTHER_MAY_HELP = (
    NotFoundError,
    AccessError,
    VerificationError,
    TransientError,
    DeadlineError,
    RefusedError,
)
"""Errors of one cache after which another is asked."""
_GRAVITY = (
    SignatureError,
    VerificationError,
    MissingCacheError,
    TransientError,
    DeadlineError,
    RefusedError,
    AccessError,
    NotFoundError,
)


@dataclass(frozen=True, slots=True)
class Found:
    """A path's facts, and the cache that has its NAR."""

    entry: NarInfo
    cache: Objects


def narinfo_key(path: StorePath) -> str:
    """Return where a path's narinfo lies."""
    return f"{path.digest}.narinfo"


def gravest(errors: Sequence[CalveError]) -> CalveError:
    """Return the error that says most: a wrong signature before a missing object."""
    for kind in _GRAVITY:
        for error in errors:
            if isinstance(error, kind):
                return error
    return errors[0]


def read_narinfo(cache: Objects, path: StorePath) -> NarInfo:
    """Read a path's narinfo from one cache; its signatures are not judged.

    Raises:
        NotFoundError: the cache does not have it.
        DamagedError: it is malformed, or that of another path.
    """
    key = narinfo_key(path)
    place = f"{cache.url}/{key}"
    entry = NarInfo.parse(cache.get(key, MAX_NARINFO_BYTES), place)
    if entry.info.path != path:
        raise DamagedError(f"the narinfo is that of another path, {entry.info.path}", place=place)
    return entry


def verify(entry: NarInfo, keyring: Keyring, place: object = None) -> None:
    """Raise unless a trusted key signed a path's facts and we can read its NAR.

    Raises:
        SignatureError: no trusted key signed.
        DamagedError: its NAR's key leads out of the cache.
        UsageError: its compression is not supported.
    """
    where = place or entry.info.path
    keyring.verify(entry.info.fingerprint, entry.info.signatures, where)
    check_key(entry.url, where)
    if entry.compression not in NAMES:
        raise UsageError(
            f"the compression {entry.compression!r} is not supported",
            place=where,
            hint=f"supported are {', '.join(NAMES)}",
        )


def _twice(read: Callable[[], T]) -> T:
    """Read; once more where it was damaged: on its way, or because somebody was writing it."""
    try:
        return read()
    except DamagedError:
        return read()


def find(caches: Sequence[Objects], keyring: Keyring, path: StorePath) -> Found:
    """Ask caches in their order for a path; the first good answer wins.

    Raises:
        CalveError: the gravest of their errors.
    """
    errors: list[CalveError] = []
    for cache in caches:
        try:
            entry = _twice(partial(read_narinfo, cache, path))
            verify(entry, keyring, f"{cache.url}/{narinfo_key(path)}")
        except (*OTHER_MAY_HELP, UsageError) as error:
            errors.append(error)
        else:
            return Found(entry, cache)
    worst = gravest(errors)
    if type(worst) is NotFoundError:
        raise NotFoundError(
            f"no cache has {path}", place=", ".join(cache.url for cache in caches)
        ) from worst
    raise worst


def find_same(caches: Sequence[Objects], keyring: Keyring, info: PathInfo) -> Found:
    """Ask caches in their order for a path of which all but its place is known.

    Raises:
        CalveError: the gravest of their errors; DamagedError where they have another build of the path.
    """
    errors: list[CalveError] = []
    for cache in caches:
        try:
            found = find([cache], keyring, info.path)
        except (*OTHER_MAY_HELP, UsageError) as error:
            errors.append(error)
            continue
        if found.entry.info.fingerprint == info.fingerprint:
            return found
        errors.append(
            DamagedError(
                "the narinfo is that of another build of this path",
                place=f"{cache.url}: {info.path}",
            )
        )
    raise gravest(errors)


def locate(
    caches: Sequence[Objects],
    keyring: Keyring,
    infos: Iterable[PathInfo],
    *,
    jobs: int,
    cancel: Cancel | None = None,
) -> dict[StorePath, Found]:
    """Find where paths are of which all else is known, in parallel; see `find_same`."""

    def one(info: PathInfo, cancel: Cancel) -> Found:
        cancel.check()
        return find_same(caches, keyring, info)

    with Crew[Found]("narinfo", jobs=jobs, cancel=cancel) as crew:
        for info in infos:
            crew.add(partial(one, info))
        return {found.entry.info.path: found for found in crew}


def walk(
    caches: Sequence[Objects],
    keyring: Keyring,
    roots: Iterable[StorePath],
    sink: Sink,
    *,
    jobs: int,
    cancel: Cancel | None = None,
) -> tuple[list[Found], int]:
    """Find all that is missing of a closure by its narinfos, in parallel; also say how many paths are present.

    What is valid in the sink is not asked for: its own references are valid with it.
    """
    seen: set[StorePath] = set()
    found: dict[StorePath, Found] = {}
    present = 0
    with Crew[Found]("narinfo", jobs=jobs, cancel=cancel) as crew:

        def want(paths: Iterable[StorePath]) -> int:
            fresh = list(dict.fromkeys(path for path in paths if path not in seen))
            seen.update(fresh)
            missing = sink.missing(fresh)
            for path in missing:
                crew.add(partial(_found, caches, keyring, path))
            return len(fresh) - len(missing)

        present += want(roots)
        for each in crew:
            found[each.entry.info.path] = each
            present += want(each.entry.info.references)
    return [found[path] for path in sorted(found)], present


def _found(caches: Sequence[Objects], keyring: Keyring, path: StorePath, cancel: Cancel) -> Found:
    cancel.check()
    return find(caches, keyring, path)


def read_manifest(caches: Sequence[Objects], digest: str) -> tuple[Manifest, Objects] | None:
    """Read a manifest from the first cache that has it whole; None where none has it.

    Raises:
        DamagedError: those that have it have it damaged.
        MissingCacheError: there is no cache at all.
        TransientError, DeadlineError: the last resort failed.
    """
    errors: list[CalveError] = []
    for cache in caches:
        try:
            return _twice(partial(manifests.read, cache, digest)), cache
        except OTHER_MAY_HELP as error:
            errors.append(error)
    worst = gravest(errors)
    if isinstance(worst, NotFoundError | AccessError) and not isinstance(worst, MissingCacheError):
        return None
    raise worst
