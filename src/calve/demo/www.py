"""The page of a release: the one small path that makes two releases differ."""

from __future__ import annotations

from calve.demo.imports import Importer, temporary
from calve.nix.storepath import StorePath

__all__ = ["add_www"]


def add_www(importer: Importer, release: int, *, broken: bool = False) -> StorePath:
    """Add index.html and healthz, both with the release's name; a broken page has the web server answer 500."""
    body = f"calve demo release {release}\n"
    with temporary(importer.store) as work:
        tree = work / "tree"
        tree.mkdir()
        for name in ("index.html", "healthz"):
            (tree / name).write_text(body, encoding="utf-8")
        if broken:
            (tree / "broken").touch()
        return importer.add(tree, f"www-{release}")
