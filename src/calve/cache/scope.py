"""Which closures a command is about: all that a cache has, or those that a user named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from calve.cache import roots as records
from calve.cache.crew import Crew, Task
from calve.cache.lookup import read_narinfo
from calve.cache.manifest import check_digest
from calve.cache.objects import MissingCacheError, Objects
from calve.cache.roots import Root
from calve.errors import DamagedError, NotFoundError, UsageError
from calve.nix.narinfo import NarInfo
from calve.nix.storepath import STORE_DIR, StorePath
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["ALL", "Scope", "each", "read_root", "scope", "walk_narinfos"]

T = TypeVar("T")

_ROOTS = "roots/"
_JSON = ".json"


@dataclass(frozen=True, slots=True)
class Scope:
    """What was chosen.

    Attributes:
        whole: nothing was named: all that the cache has.
        roots: keys of roots.
        manifests: digests.
        paths: their closures, as narinfos tell them.
    """

    whole: bool
    roots: tuple[str, ...] = ()
    manifests: tuple[str, ...] = ()
    paths: tuple[StorePath, ...] = ()


ALL = Scope(whole=True)


def scope(objects: Objects, names: Iterable[str]) -> Scope:
    """Find what names stand for: store paths, digests of manifests, and roots by OWNER/NAME or by NAME alone.

    Raises:
        UsageError: a name is none of these.
        NotFoundError: there is no such root.
    """
    roots: dict[str, None] = {}
    manifests: dict[str, None] = {}
    paths: dict[StorePath, None] = {}
    known: list[str] | None = None
    for name in names:
        if name.startswith(f"{STORE_DIR}/"):
            paths[_path(name)] = None
        elif _is_digest(name):
            manifests[name] = None
        else:
            if known is None:
                known = [one.key for one in objects.list(_ROOTS) if one.key.endswith(_JSON)]
            end = f"/{name}{_JSON}"
            found = [key for key in known if f"/{key}".endswith(f"/{_ROOTS[:-1]}{end}")]
            found = found or [key for key in known if key.endswith(end)]
            if not found:
                raise NotFoundError(
                    f"there is no root {name}",
                    place=objects.url,
                    hint="calve cache ls lists them; a store path or a manifest's digest will do too",
                )
            roots.update(dict.fromkeys(found))
    if not roots and not manifests and not paths:
        return ALL
    return Scope(whole=False, roots=tuple(roots), manifests=tuple(manifests), paths=tuple(paths))


def _path(text: str) -> StorePath:
    try:
        return StorePath.parse(text.rstrip("/"))
    except DamagedError as error:
        raise UsageError(error.message, hint=error.hint) from error


def _is_digest(text: str) -> bool:
    try:
        check_digest(text)
    except DamagedError:
        return False
    return True


def read_root(objects: Objects, key: str) -> Root:
    """Read the root that lies under a key.

    Raises:
        NotFoundError: there is none.
        DamagedError: it is malformed, or the record of another root.
        UsageError: its version is not known.
    """
    owner, _, name = key.removeprefix(_ROOTS).removesuffix(_JSON).partition("/")
    root = records.read_root(objects, owner, name)
    place = f"{objects.url}/{key}"
    if root is None:
        raise NotFoundError("there is no such root", place=place)
    if root.key != key:
        raise DamagedError(
            f"it is the record of another root, {root.owner}/{root.name}", place=place
        )
    return root


def each(
    name: str, tasks: Iterable[Task[T]], *, jobs: int, cancel: Cancel | None = None
) -> Iterator[T]:
    """Do tasks in parallel and give their results as they come."""
    with Crew[T](name, jobs=jobs, cancel=cancel) as crew:
        for task in tasks:
            crew.add(task)
        yield from crew


def walk_narinfos(
    objects: Objects,
    paths: Iterable[StorePath],
    *,
    closure: bool,
    jobs: int = 8,
    progress: Progress = silent,
    cancel: Cancel | None = None,
) -> dict[StorePath, NarInfo]:
    """Read the narinfos of paths, or of all that they refer to; their signatures are not judged.

    Raises:
        NotFoundError: the cache does not have a path; it says who refers to it.
        DamagedError: a narinfo is malformed, or that of another path.
    """
    found: dict[StorePath, NarInfo] = {}
    wanted = dict.fromkeys(paths)
    seen = set(wanted)
    with Crew[NarInfo]("narinfo", jobs=jobs, cancel=cancel) as crew:
        for path in wanted:
            crew.add(partial(_read, objects, path, None))
        for entry in crew:
            found[entry.info.path] = entry
            progress(Step("narinfos", len(found), None, "paths"))
            for reference in entry.info.references if closure else ():
                if reference not in seen:
                    seen.add(reference)
                    crew.add(partial(_read, objects, reference, entry.info.path))
    return {path: found[path] for path in (*wanted, *sorted(seen - wanted.keys()))}


def _read(objects: Objects, path: StorePath, behind: StorePath | None, cancel: Cancel) -> NarInfo:
    cancel.check()
    try:
        return read_narinfo(objects, path)
    except MissingCacheError:
        raise
    except NotFoundError as error:
        why = "" if behind is None else f", which {behind.basename} refers to"
        raise NotFoundError(f"the cache does not have {path}{why}", place=objects.url) from error
