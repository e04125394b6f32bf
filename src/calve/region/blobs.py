"""Blocks on disk: a file per content, named by its SHA-256, kept as long as somebody counts on it.

Many snapshots share a block without a copy of it, a parent can be deleted before its children, and what nobody
counts on any more is freed at once.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import uuid
from collections import Counter
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Blobs"]


class Blobs:
    """Contents by name; thread-safe.

    Args:
        root: A directory of its own. Its files are kept until `keep_only` says which of them count.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def __len__(self) -> int:
        with self._lock:
            return len(self._counts)

    def put(self, digest: bytes, data: bytes) -> str:
        """Store a content, or find it stored; return its name, counted once for the caller.

        Args:
            digest: Its SHA-256, which the caller has computed.
            data: The content.
        """
        name = digest.hex()
        with self._lock:
            if name in self._counts:
                self._counts[name] += 1
                return name
        return self._write(name, data)

    def alter(self, name: str, bit: int) -> str:
        """Store a copy of a content with one bit flipped; return its name, counted once."""
        data = bytearray((self._root / name).read_bytes())
        data[bit // 8 % len(data)] ^= 1 << bit % 8
        return self._write(f"{name}.{uuid.uuid4().hex}", bytes(data))

    def _write(self, name: str, data: bytes) -> str:
        temporary = self._root / f"{uuid.uuid4().hex}.new"
        try:
            temporary.write_bytes(data)
            with self._lock:
                temporary.replace(self._root / name)
                self._counts[name] += 1
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return name

    def adopt(self, other: Blobs, name: str) -> None:
        """Take a content over from another region, counted once; the caller holds it there."""
        with self._lock:
            if self._counts[name] == 0:
                source, target = other._root / name, self._root / name
                try:
                    target.hardlink_to(source)  # contents never change
                except OSError:  # another file system
                    shutil.copyfile(source, target)
            self._counts[name] += 1

    def hold(self, names: Iterable[str]) -> None:
        """Count each name once more; the caller knows that they are there."""
        with self._lock:
            self._counts.update(names)

    def drop(self, names: Iterable[str]) -> None:
        """Count each name once less; what reaches nought is deleted."""
        with self._lock:
            for name in names:
                self._counts[name] -= 1
                if self._counts[name] <= 0:
                    del self._counts[name]
                    with contextlib.suppress(FileNotFoundError):
                        (self._root / name).unlink()

    def open(self, name: str) -> IO[bytes]:
        """Open a content; it stays readable though it is dropped meanwhile."""
        return (self._root / name).open("rb", buffering=0)

    def keep_only(self, names: Iterable[str]) -> None:
        """Count these, found in the records of an earlier life; delete every other file."""
        with self._lock:
            self._counts = Counter(names)
            for path in self._root.iterdir():
                if path.name not in self._counts:
                    path.unlink()
