"""What was built from what, so that a second build is quick: a small JSON file beside the packages.

A key is the sha256 of everything that decides about a store path: package files, references, and the code that
unpacks. The index is a hint: a path counts only where the store has it, and a damaged index is an empty one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path

from calve.demo.imports import Importer
from calve.demo.packages import Packages
from calve.errors import DamagedError
from calve.nix.storepath import StorePath

__all__ = ["Index"]


class Index:
    """Store paths by the key of what they were made of.

    Args:
        file: the JSON file; made when it is first needed.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._paths = _read(file)
        self._recipe = _recipe()

    def key(self, parts: Iterable[str]) -> str:
        """Return the key of some inputs; the code that makes paths is one of them."""
        return hashlib.sha256("\0".join([self._recipe, *parts]).encode()).hexdigest()

    @classmethod
    def beside(cls, packages: Packages) -> Index:
        """Open the index in the packages' cache directory."""
        return cls(packages.cache_dir / "index.json")

    def once(self, importer: Importer, key: str, make: Callable[[], StorePath]) -> StorePath:
        """Return the path known for this key, where the store has it; else make it and remember it."""
        known = self._paths.get(key)
        if known is not None and importer.contains(known):
            return known
        path = make()
        self._put(key, path)
        return path

    def _put(self, key: str, path: StorePath) -> None:
        """Remember a path, in the file too."""
        self._paths[key] = path
        text = json.dumps({key: path.basename for key, path in sorted(self._paths.items())})
        handle, name = tempfile.mkstemp(prefix=".index-", dir=self._file.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(self._file)


def _read(file: Path) -> dict[str, StorePath]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {key: StorePath.from_basename(name) for key, name in stored.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError, DamagedError):
        return {}


def _recipe() -> str:
    """Hash this room's code and data: whatever changes there makes every path anew."""
    digest = hashlib.sha256()
    todo = [resources.files("calve.demo")]
    while todo:
        entry = todo.pop()
        if entry.is_dir():
            todo += sorted(entry.iterdir(), key=lambda child: child.name)
        elif not entry.name.endswith(".pyc"):
            digest.update(entry.name.encode() + b"\0" + entry.read_bytes() + b"\0")
    return digest.hexdigest()
