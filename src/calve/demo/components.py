"""Packages that need each other as one: the strongly connected components of Debian's dependency graph.

Store paths cannot refer to each other in a circle, packages can (libc6 and libgcc-s1 do). So a store path is made of
a whole component, and its references are the components that it depends on.
Source: Debian policy 7 (relationships), 7.5 (virtual packages); Tarjan 1972.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from calve.demo.packages import Deb
from calve.errors import DamagedError, UsageError

__all__ = ["Component", "Graph", "Package", "components", "relation"]

_FORBIDDEN = re.compile(r"[^0-9A-Za-z+\-._?=]+")  # what a store path's name cannot have
_NAME = re.compile(r"([a-z0-9][a-z0-9+.-]*)(?::[a-z0-9-]+)?(?:\s*\([^()]*\))?$")


@dataclass(frozen=True, slots=True)
class Package:
    """A package file and what its control file says about others.

    `depends` holds a tuple of alternatives per relation, those of Pre-Depends included.
    """

    deb: Deb
    depends: tuple[tuple[str, ...], ...] = ()
    provides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the package's name."""
        return self.deb.name

    @classmethod
    def of(cls, deb: Deb, fields: Mapping[str, str]) -> Package:
        """Read a control file's fields.

        Raises:
            DamagedError: it is another package's, or a relation is malformed.
        """
        if fields.get("Package") != deb.name or fields.get("Version") != deb.version:
            raise DamagedError(f"the control file is not that of {deb.name}", place=deb.path)
        place = f"{deb.path}: control"
        return cls(
            deb,
            depends=(
                *relation(fields.get("Pre-Depends", ""), place),
                *relation(fields.get("Depends", ""), place),
            ),
            provides=tuple(
                name for names in relation(fields.get("Provides", ""), place) for name in names
            ),
        )


@dataclass(frozen=True, slots=True)
class Component:
    """Packages of one store path, and the names of the components that it refers to."""

    packages: tuple[Package, ...]
    references: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the member that names it: the shortest, libc6 before libgcc-s1."""
        return self._head.name

    @property
    def store_name(self) -> str:
        """Return name and version for a store path: no epoch, and no character that Nix refuses."""
        version = self._head.deb.version.rpartition(":")[2]
        return f"{self.name}-{_FORBIDDEN.sub('-', version)}"

    @property
    def _head(self) -> Package:
        return min(self.packages, key=lambda package: (len(package.name), package.name))


@dataclass(frozen=True, slots=True)
class Graph:
    """Components, each after those that it refers to; and what no package here provides.

    `unmet` holds (package, its alternatives) for the relations outside of the set.
    """

    components: tuple[Component, ...]
    unmet: tuple[tuple[str, str], ...]


def relation(text: str, place: object) -> tuple[tuple[str, ...], ...]:
    """Read a relationship field: alternatives by relation; versions and architectures are apt's business.

    Raises:
        DamagedError: a relation that is no package name.
    """
    relations = []
    for clause in filter(None, (part.strip() for part in text.split(","))):
        names = []
        for alternative in clause.split("|"):
            match = _NAME.match(alternative.strip())
            if match is None:
                raise DamagedError(f"{alternative.strip()[:80]!r} is no relation", place=place)
            names.append(match[1])
        relations.append(tuple(names))
    return tuple(relations)


def components(packages: Sequence[Package]) -> Graph:
    """Group packages into components, dependencies first; equal for equal sets in whatever order.

    Raises:
        UsageError: a package stands in the list twice.
    """
    by_name = {package.name: package for package in packages}
    if len(by_name) != len(packages):
        raise UsageError("a package stands in the list twice")
    edges, unmet = _edges(by_name)
    groups = _strongly_connected(edges)
    name_of: dict[str, str] = {}
    found = []
    for group in groups:
        members = tuple(by_name[name] for name in sorted(group))
        outside = {name_of[to] for name in group for to in edges[name] if to not in group}
        component = Component(members, tuple(sorted(outside)))
        name_of.update(dict.fromkeys(group, component.name))
        found.append(component)
    return Graph(tuple(found), tuple(unmet))


def _edges(
    by_name: Mapping[str, Package],
) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Resolve relations within the set: the first alternative that is here, by its name or by Provides."""
    providers: dict[str, str] = {}
    for name in sorted(by_name, reverse=True):
        providers.update(dict.fromkeys(by_name[name].provides, name))
    providers.update({name: name for name in by_name})
    edges: dict[str, list[str]] = {}
    unmet = []
    for name in sorted(by_name):
        to = set()
        for alternatives in by_name[name].depends:
            found = next((providers[it] for it in alternatives if it in providers), None)
            if found is None:
                unmet.append((name, " | ".join(alternatives)))
            else:
                to.add(found)
        edges[name] = sorted(to - {name})
    return edges, unmet


def _strongly_connected(edges: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """Tarjan's algorithm without recursion; a component comes after those that it reaches."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found: list[set[str]] = []
    for root in edges:
        if root in index:
            continue
        work = [(root, iter(edges[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, successors = work[-1]
            following = next(successors, None)
            if following is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    found.append(_pop(stack, on_stack, node))
            elif following not in index:
                index[following] = low[following] = len(index)
                stack.append(following)
                on_stack.add(following)
                work.append((following, iter(edges[following])))
            elif following in on_stack:
                low[node] = min(low[node], index[following])
    return found


def _pop(stack: list[str], on_stack: set[str], node: str) -> set[str]:
    group = set()
    while True:
        member = stack.pop()
        on_stack.discard(member)
        group.add(member)
        if member == node:
            return group
