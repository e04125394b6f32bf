"""`calve diff`: what changes between two closures, from their manifests; nothing is fetched but those."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from calve.cli import cache_options as shared
from calve.cli import common
from calve.cli.session import Session
from calve.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.cache.manifest import Manifest
    from calve.cache.objects import Objects
    from calve.fleet.config import Config
    from calve.fleet.difference import Difference, Kind, Package, Part, Unit
    from calve.nix.storepath import StorePath

__all__ = ["CHANGES", "Closures", "Named", "add_exit_code", "arguments", "grew", "run", "show"]

CHANGES = 3
"""The exit code that says so, where it was asked for."""

_RELEASE = re.compile(r"[0-9]{1,8}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PATHS = ("/", "./", "../")
_MOST_UNITS = 40


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    for name, text in (("before", "the earlier closure: "), ("after", "the later one: ")):
        parser.add_argument(
            name,
            metavar=name.upper(),
            help=f"{text}the number of a release, a manifest's digest, a root (OWNER/NAME or NAME),"
            " or a store path or a link to one",
        )
    parser.add_argument(
        "--fleet",
        metavar="NAME",
        help="whose releases the numbers are (default: the fleet file's, where it has one)",
    )
    add_exit_code(parser, "the two differ")
    shared.add_cache(parser)
    common.add_store(parser, more="; what is valid there is not asked of the cache")
    common.add_json(parser)
    common.add_config(parser)


def add_exit_code(parser: argparse.ArgumentParser, when: str) -> None:
    """Declare --exit-code."""
    parser.add_argument(
        "--exit-code", action="store_true", help=f"exit with {CHANGES} where {when}"
    )


def run(options: argparse.Namespace, session: Session) -> int:
    """Compare."""
    from calve.fleet.difference import difference

    with Closures(options, session) as closures:
        before = closures.find(options.before)
        after = closures.find(options.after)
    found = difference(before.manifest, after.manifest)
    if options.json:
        session.document(found.document())
    else:
        session.result(f"before   {before.title}")
        session.result(f"after    {after.title}")
        show(found, session.out)
    return CHANGES if options.exit_code and not found.same else 0


# Closures


@dataclass(frozen=True, slots=True)
class Named:
    """A closure, and what to call it."""

    title: str
    manifest: Manifest


class Closures:
    """Finds closures by what a user calls them; cache and fleet file are looked at when one needs them.

    Args:
        options: with `cache`, `store` and `config`; `fleet` for the numbers of releases.
        session: the command's.
        config: the fleet file, where it was read already.
        objects: the cache, where it is open already.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        session: Session,
        *,
        config: Config | None = None,
        objects: Objects | None = None,
    ) -> None:
        self._options = options
        self._session = session
        self._stack = contextlib.ExitStack()
        self._root: Path = options.store or Path("/")
        self._opened = objects
        self._config = config

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def config(self) -> Config | None:
        """Return the fleet file; None where there is none and none was named."""
        from calve.fleet.config import load

        if self._config is None:
            self._config = load(self._options.config)
        return self._config

    @property
    def objects(self) -> Objects:
        """Return the cache; UsageError where none is named."""
        if self._opened is None:
            cache = None
            if self._options.config is not None or not self._options.cache:
                cache = None if self.config is None else self.config.cache
            url = shared.target(self._options, cache)
            (self._opened,) = self._stack.enter_context(common.caches(self._session, [url]))
        return self._opened

    def find(self, text: str) -> Named:
        """Find a closure.

        Raises:
            UsageError: the text means nothing, or several things.
            NotFoundError: there is no such release, manifest, root or path.
        """
        from calve.cache import manifest as manifests

        if _RELEASE.fullmatch(text):
            return self._release(int(text))
        if _DIGEST.fullmatch(text):
            return self._named(f"manifest {text[:12]}", manifests.read(self.objects, text))
        if text.startswith(_PATHS):
            path = common.resolve(text, self._root)
            return self._named("", self.stored(path) or self.cached(path))
        return self._kept(text)

    def _named(self, what: str, manifest: Manifest) -> Named:
        return Named(f"{what}  {manifest.toplevel}".strip(), manifest)

    def _release(self, number: int) -> Named:
        from calve.cache import manifest as manifests
        from calve.fleet import release

        fleet = self._fleet()
        found = release.read(self.objects, fleet, number)
        return self._named(
            f"{fleet} release {number}", manifests.read(self.objects, found.manifest)
        )

    def _fleet(self) -> str:
        if self._options.fleet is not None:
            return str(self._options.fleet)
        fleets = [] if self.config is None else list(self.config.fleets)
        if len(fleets) != 1:
            raise UsageError(
                "the number of a release says nothing without its fleet",
                hint=f"give --fleet, one of {', '.join(fleets)}" if fleets else "give --fleet NAME",
            )
        return fleets[0]

    def _kept(self, name: str) -> Named:
        from calve.cache import manifest as manifests
        from calve.cache.scope import read_root, scope

        keys = scope(self.objects, [name]).roots
        if len(keys) != 1:
            names = [key.removeprefix("roots/").removesuffix(".json") for key in keys]
            raise UsageError("several roots have this name", place=name, hint=", ".join(names))
        root = read_root(self.objects, keys[0])
        return self._named(
            f"root {root.owner}/{root.name}", manifests.read(self.objects, root.manifest)
        )

    def stored(self, path: StorePath) -> Manifest | None:
        """Return the closure of a path as the local store has it; None where it is not valid there."""
        from calve.cache.manifest import Manifest, boot_order
        from calve.cache.publish import first_paths
        from calve.nix.narinfo import NarInfo
        from calve.nix.store import LocalStore

        try:
            with LocalStore(self._root) as store:
                entries = [NarInfo(info, "", "none") for info in store.closure([path])]
                first = first_paths(store.real(path))
        except NotFoundError:
            return None
        return Manifest(path, boot_order(entries, path, first))

    def cached(self, path: StorePath) -> Manifest:
        """Return the manifest of a path's closure that a root keeps; NotFoundError where none does."""
        from calve.cache import manifest as manifests
        from calve.cache.pins import manifest_of

        found = self.pushed(path)
        if found is not None:
            return found
        digest = manifest_of(self.objects, path)
        if digest is None:
            raise NotFoundError(
                "neither is it valid in the local store, nor does a root of the cache keep it",
                place=path,
                hint=f"{self.objects.url}: calve cache ls lists the roots; --store ROOT names a store",
            )
        return manifests.read(self.objects, digest)

    def pushed(self, path: StorePath) -> Manifest | None:
        """Return a path's manifest where it is the last push of its name; None else. Two requests."""
        from calve.cache.keep import Keep, root_name

        kept = Keep.read(self.objects, path, root_name(path)).manifest
        return kept if kept is not None and kept.toplevel == path else None


# Text


def show(found: Difference, out: IO[str]) -> None:
    """Print a difference: kernel, units, packages by how much they change, sizes."""
    from calve.ui.table import table

    if found.same:
        print("nothing differs", file=out)
        return
    for line in _system(found):
        print(line, file=out)
    rows = [_row(one) for one in found.packages if one.notable]
    if rows:
        print(file=out)
        table(rows, ("CHANGE", "PACKAGE", "BEFORE", "AFTER", " " * 7 + "SIZE"), out)
    print(file=out)
    for line in _sums(found):
        print(line, file=out)


def _system(found: Difference) -> Iterator[str]:
    for name, part in (("kernel", found.kernel), ("initrd", found.initrd)):
        if part.before is not None or part.after is not None:
            yield f"{name}   {_part(part)}"
    yield from _units(found.units)


def _part(part: Part) -> str:
    before, after = part.versions
    if not part.changed:
        return f"{after} unchanged".strip()
    if part.before is None or part.after is None:
        return f"{before or 'none'} -> {after or 'none'}"
    return f"{after} rebuilt".strip() if before == after else f"{before} -> {after}"


def _units(units: Sequence[Unit]) -> Iterator[str]:
    from calve.fleet.difference import Kind

    if not units:
        yield "units    unchanged"
    for kind in (Kind.ADDED, Kind.REMOVED, Kind.CHANGED, Kind.REBUILT):
        names = [one.name for one in units if one.kind is kind]
        if kind is Kind.REBUILT and names:
            yield f"units    {len(names)} rebuilt, the same but for the paths in them"
        elif names:
            more = f" and {len(names) - _MOST_UNITS} more" if len(names) > _MOST_UNITS else ""
            yield f"units    {kind.value}: {', '.join(names[:_MOST_UNITS])}{more}"


def _row(one: Package) -> tuple[str, ...]:
    return (
        one.kind.value,
        one.name,
        _versions(one.before, one.after, one.kind),
        _versions(one.after, one.before, one.kind),
        grew(one.change_bytes).rjust(11),
    )


def _versions(mine: Sequence[str], others: Sequence[str], kind: Kind) -> str:
    """Write versions; those that both sides have stand only where nothing else would."""
    from calve.fleet.difference import Kind

    shown = [one for one in mine if one not in others]
    if not shown or kind is Kind.REBUILT:
        shown = list(mine)
    return ", ".join(one or "-" for one in shown)


def grew(count: int) -> str:
    """Write a change of size."""
    if abs(count) < 1000:
        return f"{count:+d} B"
    return f"{count / 1000:+,.1f} kB" if abs(count) < 1_000_000 else f"{count / 1e6:+,.1f} MB"


def _sums(found: Difference) -> Iterator[str]:
    """Yield the sums of a difference, for people."""
    from calve.ui.text import mb

    if found.rebuilt:
        change = sum(one.change_bytes for one in found.rebuilt)
        yield f"rebuilt  {common.plural(len(found.rebuilt), 'package')} of the same version ({grew(change)})"
    yield (
        f"new      {common.plural(found.new_paths, 'path')}, {mb(found.new_bytes)};"
        f" {common.plural(found.gone_paths, 'path')} gone"
    )
    yield (
        f"closure  {found.before_paths} -> {common.plural(found.after_paths, 'path')},"
        f" {mb(found.before_bytes)} -> {mb(found.after_bytes)}"
        f" ({grew(found.after_bytes - found.before_bytes)})"
    )
