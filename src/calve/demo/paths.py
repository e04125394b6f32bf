"""Packages into store paths: one per component, its references those that it depends on.

A path holds `usr` and `etc` of its packages, and `nix-support/propagated-user-env-packages`: the store paths of the
components it depends on, which have to stand in the same farm. So its references are what a scan of its content
finds, as with every path that Nix builds.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path

from calve.demo.components import Component, Package, components
from calve.demo.imports import Importer, temporary
from calve.demo.index import Index
from calve.demo.packages import Packages
from calve.demo.unpack_deb import Unpacker, control
from calve.errors import NotFoundError
from calve.nix.storepath import StorePath
from calve.progress import Note, Step

__all__ = ["DEPENDENCIES", "add_packages", "one"]

DEPENDENCIES = "nix-support/propagated-user-env-packages"


def add_packages(
    importer: Importer,
    packages: Packages,
    names: Sequence[str],
    omitted: Container[str] = (),
) -> dict[str, StorePath]:
    """Fetch packages and add them, unless they are there; return the paths by component, dependencies first.

    Args:
        importer: where to; valid when this returns.
        packages: where from, with the index of what was built before.
        names: all of them: a dependency that is not named is left out.
        omitted: dependencies that are left out on purpose; others are noted.
    """
    debs = packages.fetch(names)
    graph = components([Package.of(deb, control(deb.path)) for deb in debs])
    for name, lacking in graph.unmet:
        if lacking not in omitted:
            packages.progress(Note(f"{name} depends on {lacking}, which is left out"))
    index = Index.beside(packages)
    paths: dict[str, StorePath] = {}
    for done, component in enumerate(graph.components):
        packages.cancel.check()
        packages.progress(Step("store paths", done, len(graph.components), "paths"))
        references = [paths[name] for name in component.references]
        key = index.key([*(it.deb.sha256 for it in component.packages), *map(str, references)])
        paths[component.name] = index.once(
            importer, key, partial(_add, importer, packages, component, references)
        )
    importer.flush()
    packages.progress(
        Step("store paths", len(graph.components), len(graph.components), unit="paths")
    )
    return paths


def _add(
    importer: Importer, packages: Packages, component: Component, references: Sequence[StorePath]
) -> StorePath:
    with temporary(importer.store) as work:
        tree = work / "tree"
        tree.mkdir()
        unpacker = Unpacker(tree, cancel=packages.cancel)
        for package in component.packages:
            unpacker.add(package.deb.path)
        if references:
            _write(tree / DEPENDENCIES, " ".join(map(str, sorted(references))) + "\n")
        return importer.add(tree, component.store_name, references)


def _write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")


def one(paths: Mapping[str, StorePath], name: str) -> StorePath:
    """Return the path of a component that has to be there."""
    try:
        return paths[name]
    except KeyError:
        raise NotFoundError(f"no store path was made of the package {name}") from None
