"""What differs between two closures, from their manifests alone: packages, units, kernel, sizes, what is fetched.

It knows how NixOS names the paths of units, kernel and initrd (systemd-lib.nix, top-level.nix). `nix store
diff-closures` and nvd show the same; their rules are followed where both agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from calve.cache.manifest import Manifest
from calve.fleet.versions import divide, package_of, version_key, without_output
from calve.nix.narinfo import NarInfo
from calve.nix.storepath import StorePath

__all__ = [
    "Difference",
    "Fetch",
    "Kind",
    "Package",
    "Part",
    "Unit",
    "difference",
    "fetched",
]

NOTABLE_BYTES = (
    8 * 1024
)  # what is merely rebuilt is worth a line from here on, as for diff-closures

_UNIT = re.compile(
    r"unit-(.+\.(?:automount|device|mount|path|scope|service|slice|socket|swap|target|timer))"
    r"(?:-disabled)?"
)


class Kind(StrEnum):
    """How a package or a unit differs."""

    ADDED = "added"
    REMOVED = "removed"
    UPGRADED = "upgraded"
    DOWNGRADED = "downgraded"
    CHANGED = "changed"
    """Of a package: other versions, neither all newer nor all older. Of a unit: another text."""
    REBUILT = "rebuilt"
    """Of a package: the same versions, other paths. Of a unit: the same but for the paths in it, as far as sizes and
    names can tell."""


@dataclass(frozen=True, slots=True)
class Package:
    """All paths of one name; versions ascend, "" is a path without one, () is none at all."""

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    before_bytes: int
    after_bytes: int
    before_paths: int
    after_paths: int

    @property
    def change_bytes(self) -> int:
        """Return by how much its NARs grew."""
        return self.after_bytes - self.before_bytes

    @property
    def kind(self) -> Kind:
        """Return how it differs."""
        if not self.before:
            return Kind.ADDED
        if not self.after:
            return Kind.REMOVED
        gone = [version_key(one) for one in self.before if one not in self.after]
        new = [version_key(one) for one in self.after if one not in self.before]
        if not gone and not new:
            return Kind.REBUILT
        if gone and new and max(gone) < min(new):
            return Kind.UPGRADED
        if gone and new and max(new) < min(gone):
            return Kind.DOWNGRADED
        return Kind.CHANGED

    @property
    def notable(self) -> bool:
        """Say whether it is worth a line: other versions, or at least 8 KiB more or less."""
        return self.kind is not Kind.REBUILT or abs(self.change_bytes) >= NOTABLE_BYTES

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "name": self.name,
            "kind": self.kind.value,
            "before": list(self.before),
            "after": list(self.after),
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "before_paths": self.before_paths,
            "after_paths": self.after_paths,
        }


@dataclass(frozen=True, slots=True)
class Unit:
    """A systemd unit that differs; `name` is that of its file, with `-` where NixOS does not take a letter."""

    name: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Part:
    """The kernel or the initrd: their paths; None where a closure has none, or none can be told."""

    before: StorePath | None
    after: StorePath | None

    @property
    def changed(self) -> bool:
        """Say whether it is another path: then machines start another one."""
        return self.before != self.after

    @property
    def versions(self) -> tuple[str, str]:
        """Return the versions before and after; "" where there is none."""
        before, after = (
            "" if path is None else divide(path.name)[1] for path in (self.before, self.after)
        )
        return before, after

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        before, after = self.versions
        return {
            "changed": self.changed,
            "before": None if self.before is None else str(self.before),
            "after": None if self.after is None else str(self.after),
            "before_version": before,
            "after_version": after,
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two closures.

    Attributes:
        before, after: the toplevels.
        kernel, initrd: the systems' own.
        units: those that differ, by name.
        packages: those that differ, units left out; the largest change of size first.
        before_paths, after_paths: how many paths the closures have.
        before_bytes, after_bytes: of their NARs.
        new_paths, new_bytes: what only the later one has, and its NARs.
        gone_paths: what only the earlier one has.
    """

    before: StorePath
    after: StorePath
    kernel: Part
    initrd: Part
    units: tuple[Unit, ...]
    packages: tuple[Package, ...]
    before_paths: int
    after_paths: int
    before_bytes: int
    after_bytes: int
    new_paths: int
    new_bytes: int
    gone_paths: int

    @property
    def same(self) -> bool:
        """Say whether the two are the same system with the same paths."""
        return self.before == self.after and not self.new_paths and not self.gone_paths

    @property
    def rebuilt(self) -> tuple[Package, ...]:
        """Return the packages that are not worth a line."""
        return tuple(one for one in self.packages if not one.notable)

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "before": str(self.before),
            "after": str(self.after),
            "same": self.same,
            "kernel": self.kernel.document(),
            "initrd": self.initrd.document(),
            "units": [{"name": one.name, "kind": one.kind.value} for one in self.units],
            "packages": [one.document() for one in self.packages],
            "before_paths": self.before_paths,
            "after_paths": self.after_paths,
            "before_bytes": self.before_bytes,
            "after_bytes": self.after_bytes,
            "new_paths": self.new_paths,
            "new_bytes": self.new_bytes,
            "gone_paths": self.gone_paths,
        }


@dataclass(frozen=True, slots=True)
class Fetch:
    """What a machine fetches.

    Attributes:
        paths: how many.
        nar_bytes: of their NARs, unpacked.
        file_bytes: of their NARs as the cache has them.
        exact: False where the manifest lacks sizes, and `file_bytes` is partly an estimate.
    """

    paths: int
    nar_bytes: int
    file_bytes: int
    exact: bool = True

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "paths": self.paths,
            "nar_bytes": self.nar_bytes,
            "file_bytes": self.file_bytes,
            "exact": self.exact,
        }


# Differences


@dataclass(slots=True)
class _Group:
    """What is known of one package while paths are counted."""

    differs: bool = False
    before: set[str] = field(default_factory=set)
    after: set[str] = field(default_factory=set)
    before_bytes: int = 0
    after_bytes: int = 0
    before_paths: int = 0
    after_paths: int = 0

    def leave(self, version: str, size: int) -> None:
        self.before.add(version)
        self.before_bytes += size
        self.before_paths += 1

    def come(self, version: str, size: int) -> None:
        self.after.add(version)
        self.after_bytes += size
        self.after_paths += 1

    def package(self, name: str) -> Package:
        return Package(
            name,
            tuple(sorted(self.before, key=version_key)),
            tuple(sorted(self.after, key=version_key)),
            self.before_bytes,
            self.after_bytes,
            self.before_paths,
            self.after_paths,
        )


def difference(before: Manifest, after: Manifest) -> Difference:
    """Compare two closures; nothing is fetched."""
    old = {entry.info.path: entry for entry in before.paths}
    kept, new = [], []
    for entry in after.paths:
        earlier = old.get(entry.info.path)
        if earlier is not None and earlier.info.nar_hash == entry.info.nar_hash:
            kept.append(old.pop(entry.info.path))
        else:
            new.append(entry)
    gone = list(old.values())
    return Difference(
        before=before.toplevel,
        after=after.toplevel,
        kernel=Part(_kernel(before), _kernel(after)),
        initrd=Part(_initrd(before), _initrd(after)),
        units=_units(kept, gone, new),
        packages=_packages(kept, gone, new),
        before_paths=len(before.paths),
        after_paths=len(after.paths),
        before_bytes=_nar_bytes(before.paths),
        after_bytes=_nar_bytes(after.paths),
        new_paths=len(new),
        new_bytes=_nar_bytes(new),
        gone_paths=len(gone),
    )


def _nar_bytes(entries: Iterable[NarInfo]) -> int:
    return sum(entry.info.nar_size for entry in entries)


def _packages(
    kept: Iterable[NarInfo], gone: Iterable[NarInfo], new: Iterable[NarInfo]
) -> tuple[Package, ...]:
    groups: dict[str, _Group] = {}
    for entry in gone:
        if not _UNIT.fullmatch(entry.info.path.name):
            name, version = package_of(entry.info)
            groups.setdefault(name, _Group()).leave(version, entry.info.nar_size)
    for entry in new:
        if not _UNIT.fullmatch(entry.info.path.name):
            name, version = package_of(entry.info)
            groups.setdefault(name, _Group()).come(version, entry.info.nar_size)
    for entry in kept:
        name, version = package_of(entry.info)
        group = groups.get(name)
        if group is not None:
            group.leave(version, entry.info.nar_size)
            group.come(version, entry.info.nar_size)
    found = [group.package(name) for name, group in groups.items()]
    return tuple(sorted(found, key=lambda one: (-abs(one.change_bytes), one.name)))


def _units(
    kept: Iterable[NarInfo], gone: Iterable[NarInfo], new: Iterable[NarInfo]
) -> tuple[Unit, ...]:
    """Compare units by name; a name may be there twice, of the system's manager and the users'."""
    stay = _by_unit(kept)
    left, came = _by_unit(gone), _by_unit(new)
    found = []
    for name in sorted({*left, *came}):
        before, after = left.get(name, []), came.get(name, [])
        if not before and name not in stay:
            kind = Kind.ADDED
        elif not after and name not in stay:
            kind = Kind.REMOVED
        else:
            alike = sorted(map(_look, before)) == sorted(map(_look, after))
            kind = Kind.REBUILT if alike else Kind.CHANGED
        found.append(Unit(name, kind))
    return tuple(found)


def _by_unit(entries: Iterable[NarInfo]) -> Mapping[str, Sequence[NarInfo]]:
    units: dict[str, list[NarInfo]] = {}
    for entry in entries:
        match = _UNIT.fullmatch(entry.info.path.name)
        if match is not None:
            units.setdefault(match[1], []).append(entry)
    return units


def _look(entry: NarInfo) -> tuple[str, int, list[str]]:
    """Return what is left of a path when the digests of store paths in it do not count."""
    info = entry.info
    return info.path.name, info.nar_size, sorted(path.name for path in info.references)


# Kernel and initrd


def _kernel(manifest: Manifest) -> StorePath | None:
    """Return the system's kernel: `linux-6.12.58`, `linux-hardened-6.12.58`; its modules are named like outputs."""
    for path in _own(manifest):
        name, version = divide(path.name)
        if version and (name == "linux" or name.startswith("linux-")):
            return path
    return None


def _initrd(manifest: Manifest) -> StorePath | None:
    return next((path for path in _own(manifest) if path.name.split("-")[0] == "initrd"), None)


def _own(manifest: Manifest) -> Iterable[StorePath]:
    """Yield what the toplevel itself refers to, in boot order: a push puts kernel and initrd first."""
    top = next(entry for entry in manifest.paths if entry.info.path == manifest.toplevel)
    wanted = set(top.info.references) - {manifest.toplevel}
    for entry in manifest.paths:
        path = entry.info.path
        if path in wanted and without_output(path.name) == path.name:
            yield path


# Fetching


def fetched(after: Manifest, have: frozenset[StorePath]) -> Fetch:
    """Return what a machine fetches of a closure that has some paths already.

    The manifest lacks the compressed size of what an interrupted push sent, and of what is in another cache; there it
    is estimated by the ratio of all others.
    """
    wanted = [entry for entry in after.paths if entry.info.path not in have]
    known_bytes = sum(entry.file_size or 0 for entry in after.paths)
    of_bytes = _nar_bytes(entry for entry in after.paths if entry.file_size is not None)
    ratio = known_bytes / of_bytes if of_bytes else 1.0
    unknown_bytes = _nar_bytes(entry for entry in wanted if entry.file_size is None)
    file_bytes = sum(entry.file_size or 0 for entry in wanted) + round(ratio * unknown_bytes)
    return Fetch(len(wanted), _nar_bytes(wanted), file_bytes, exact=not unknown_bytes)
