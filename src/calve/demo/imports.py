"""Trees of files into a store, content-addressed as `nix-store --add` does it, with references.

A path's digest follows from its NAR hash and its references ("source" paths of Nix: recursive, sha256), so it can be
verified by anyone and needs no signature: `ca` is `fixed:r:sha256:…`. What refers to itself is hashed with its own
digest zeroed, followed by where that stood.
Source: `makeFixedOutputPath`, `hashCAPath` and `HashModuloSink` of Nix 2.8; the Nix manual, "store path".
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from calve.errors import UsageError
from calve.nix import nar
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath, fixed_output
from calve.nix.unpack import storage_error

__all__ = ["SELF", "Importer", "add_tree", "modulo", "temporary"]

SELF = "calve-demo-placeholder-for-self-"
"""Stands for the own digest in the files of a tree that refers to itself; as long as a digest."""

_SELF_LIMIT_BYTES = 1 << 20


class Importer:
    """Adds trees to a store: staged one by one, made valid together by `flush`.

    One commit for many paths: each commit waits for the disk.
    """

    def __init__(self, store: LocalStore) -> None:
        self.store = store
        self._pending: dict[StorePath, PathInfo] = {}

    def contains(self, path: StorePath) -> bool:
        """Say whether a path is valid, or will be with the next `flush`."""
        return path in self._pending or self.store.contains(path)

    def add(
        self,
        tree: Path,
        name: str,
        references: Iterable[StorePath] = (),
        *,
        self_reference: bool = False,
    ) -> StorePath:
        """Add a file or directory, unless it is there; return its path.

        Args:
            tree: what; only types, names, contents and the executable bit count.
            name: of the store path, behind the digest.
            references: what it refers to, itself not among them; valid, or added before.
            self_reference: replace `SELF` by the digest, wherever it stands; such a tree has at most 1 MiB.

        Raises:
            UsageError: a tree that should refer to itself and does not, or is too large for it.
        """
        others = sorted(set(references))
        with tempfile.TemporaryFile(prefix="calve-nar-", dir=tree.parent) as file:
            digest = hashlib.sha256()

            def write(data: bytes) -> None:
                digest.update(data)
                file.write(data)

            size = nar.dump(tree, write)
            content_hash = nar_hash = Hash("sha256", digest.digest())
            path = fixed_output(name, content_hash, others)
            if self_reference:
                content_hash, nar_hash, path = _refer_to_itself(file, size, name, others)
            if not self.contains(path):
                info = PathInfo(
                    path=path,
                    nar_hash=nar_hash,
                    nar_size=size,
                    references=tuple(sorted([*others, path] if self_reference else others)),
                    ca=f"fixed:r:{content_hash.nix32}",
                )
                file.seek(0)
                self.store.stage(info, nar.read(file.read, limit=size))
                self._pending[path] = info
        return path

    def add_file(self, source: Path, name: str, file_name: str) -> StorePath:
        """Add a directory that holds a copy of one file under `file_name`; return its path."""
        with temporary(self.store) as work:
            (work / "tree").mkdir()
            shutil.copyfile(source, work / "tree" / file_name)
            return self.add(work / "tree", name)

    def flush(self) -> None:
        """Make everything that was added valid."""
        if self._pending:
            self.store.commit(list(self._pending.values()))
            self._pending.clear()


def add_tree(
    store: LocalStore, tree: Path, name: str, references: Iterable[StorePath] = ()
) -> StorePath:
    """Add one tree to a store and make it valid at once; see `Importer.add`."""
    importer = Importer(store)
    path = importer.add(tree, name, references)
    importer.flush()
    return path


@contextmanager
def temporary(store: LocalStore) -> Iterator[Path]:
    """Make a directory beside the store, on its file system, and remove it in the end.

    Raises:
        SpaceError, CalveError: what the block did there failed for want of space, or else.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".calve-demo-", dir=store.root) as name:
            yield Path(name)
    except OSError as error:
        raise storage_error(error, store.root) from error


def modulo(data: bytes, digest: bytes) -> Hash:
    """Hash a NAR with each occurrence of `digest` zeroed, then `|` and its offset for each."""
    zeroed = hashlib.sha256(data.replace(digest, bytes(len(digest))))
    at = data.find(digest)
    while at >= 0:
        zeroed.update(b"|%d" % at)
        at = data.find(digest, at + len(digest))
    return Hash("sha256", zeroed.digest())


def _refer_to_itself(
    file: IO[bytes], size: int, name: str, references: list[StorePath]
) -> tuple[Hash, Hash, StorePath]:
    """Replace the placeholder in a NAR by the digest that follows.

    Returns:
        the hash that gives the path, the hash of the NAR as it is now, the path.
    """
    if size > _SELF_LIMIT_BYTES:
        raise UsageError(f"{name} refers to itself and has {size} bytes; keep such trees small")
    file.seek(0)
    data = file.read()
    if SELF.encode() not in data:
        raise UsageError(f"{name} does not refer to itself")
    content_hash = modulo(data, SELF.encode())
    path = fixed_output(name, content_hash, references, self_reference=True)
    final = data.replace(SELF.encode(), path.digest.encode())
    file.seek(0)
    file.write(final)
    return content_hash, Hash.sha256(final), path
