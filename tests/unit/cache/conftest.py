"""A cache in memory that logs its calls, a store of small trees, and a sink that checks its contract."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from calve.cache.objects import Listed, check_key
from calve.errors import DamagedError, NotFoundError
from calve.nix import narwriter
from calve.nix.closure import closure
from calve.nix.hashes import Hash, encode32
from calve.nix.nar import Event
from calve.nix.narinfo import PathInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.storepath import StorePath


class _Open:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, size: int) -> bytes:
        data, self._data = self._data[:size], self._data[size:]
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Memory:
    """Objects in memory; `calls` has (method, key), `before` is run ahead of each."""

    def __init__(self, url: str = "mem://one") -> None:
        self.url = url
        self.data: dict[str, bytes] = {}
        self.written: dict[str, float] = {}  # when, by `now_s`
        self.now_s: Callable[[], float] = lambda: 0
        self.calls: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda _method, _key: None
        self._lock = threading.RLock()

    def _call(self, method: str, key: str) -> None:
        check_key(key.rstrip("/") if method == "list" else key)
        with self._lock:
            self.calls.append((method, key))
        self.before(method, key)

    def count(self, method: str, part: str = "") -> int:
        return sum(one == method and part in key for one, key in self.calls)

    def keys(self, method: str) -> list[str]:
        return [key for one, key in self.calls if one == method]

    def _load(self, key: str) -> bytes:
        try:
            return self.data[key]
        except KeyError:
            raise NotFoundError("there is no such object", place=f"{self.url}/{key}") from None

    def get(self, key: str, limit: int) -> bytes:
        self._call("get", key)
        data = self._load(key)
        if len(data) > limit:
            raise DamagedError("too long", place=key)
        return data

    def get_tagged(self, key: str, limit: int) -> tuple[bytes, str]:
        data = self.get(key, limit)
        return data, hashlib.sha256(data).hexdigest()

    def open(
        self, key: str, size: int | None = None, *, start: int = 0, end: int | None = None
    ) -> _Open:
        self._call("open", key)
        return _Open(self._load(key)[start:end])

    def head(self, key: str) -> int | None:
        self._call("head", key)
        return len(self.data[key]) if key in self.data else None

    def put(self, key, data, *, only_new=False, match=None, content_type=None) -> bool:
        self._call("put", key)
        with self._lock:
            old = self.data.get(key)
            if only_new and old is not None:
                return False
            if match is not None and (old is None or hashlib.sha256(old).hexdigest() != match):
                return False
            self.data[key] = data
            self.written[key] = self.now_s()
            return True

    def put_stream(self, key, chunks: Iterator[bytes], *, only_new=False, content_type=None):
        return self.put(key, b"".join(chunks), only_new=only_new)

    def delete(self, key: str, *, match: str | None = None) -> bool:
        self._call("delete", key)
        return self._delete(key, match)

    def _delete(self, key: str, match: str | None) -> bool:
        with self._lock:
            old = self.data.get(key)
            if old is not None and match not in (None, hashlib.sha256(old).hexdigest()):
                return False
            self.data.pop(key, None)
            return True

    def delete_many(self, listed: Iterable[Listed]) -> list[Listed]:
        chosen = list(listed)
        self._call("delete_many", chosen[0].key if chosen else "x")
        return [one for one in chosen if not self._delete(one.key, one.tag)]

    def list(self, prefix: str) -> Iterator[Listed]:
        self._call("list", prefix or "x")
        for key in sorted(key for key in self.data if key.startswith(prefix)):
            data = self.data.get(key)
            if data is None:
                continue  # removed since
            yield Listed(key, len(data), hashlib.sha256(data).hexdigest(), self.written.get(key, 0))


class Trees:
    """A store: paths that are directories, with hashes and references as a database would have them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.infos: dict[StorePath, PathInfo] = {}

    def add(
        self, name: str, content: bytes = b"text", references: Iterable[StorePath] = ()
    ) -> StorePath:
        path = StorePath(encode32(hashlib.sha256(name.encode()).digest()[:20]), name)
        tree = self.root / path.basename
        tree.mkdir(parents=True)
        (tree / "file").write_bytes(content)
        (tree / "link").symlink_to("file")
        return self.register(path, references)

    def register(self, path: StorePath, references: Iterable[StorePath] = ()) -> StorePath:
        digest = hashlib.sha256()
        size = narwriter.dump(self.real(path), digest.update)
        digest_hash = Hash("sha256", digest.digest())
        self.infos[path] = PathInfo(path, digest_hash, size, tuple(sorted(references)))
        return path

    def real(self, path: StorePath) -> Path:
        return self.root / path.basename

    def closure(self, roots: Iterable[StorePath]) -> list[PathInfo]:
        def lookup(path: StorePath) -> PathInfo:
            try:
                return self.infos[path]
            except KeyError:
                raise NotFoundError("not valid", place=path) from None

        return closure(roots, lookup)


class FakeSink:
    """Keeps events; refuses what breaks the contract of `Sink`."""

    def __init__(self, valid: Iterable[StorePath] = ()) -> None:
        self.valid = set(valid)
        self.staged: dict[StorePath, list[Event]] = {}
        self.left: dict[StorePath, PathInfo] = {}  # what an interrupted run verified
        self.batches: list[list[StorePath]] = []
        self.owner = threading.get_ident()

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        return [path for path in paths if path not in self.valid]

    def adopt(self, infos: Sequence[PathInfo]) -> set[StorePath]:
        found = {info.path for info in infos if self.left.get(info.path) == info}
        self.staged.update((path, []) for path in found)
        self.left.clear()
        return found

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        taken = list(events)
        assert info.path not in self.staged, "staged twice"
        self.staged[info.path] = taken

    def discard(self, path: StorePath) -> None:
        self.staged.pop(path, None)

    def flush(self) -> None:
        assert threading.get_ident() == self.owner, "flushed by another thread"

    def commit(self, batch: Sequence[PathInfo]) -> None:
        assert threading.get_ident() == self.owner, "committed by another thread"
        names = {info.path for info in batch}
        for info in batch:
            assert set(info.references) <= self.valid | names, "committed before its references"
            del self.staged[info.path]
        self.valid |= names
        self.batches.append([info.path for info in batch])


@dataclass
class World:
    store: Trees
    cache: Memory
    key: SecretKey
    ring: Keyring
    lib: StorePath
    tool: StorePath
    top: StorePath


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Make a closure of three: top → tool → lib, top → lib, and tool → tool."""
    store = Trees(tmp_path / "store")
    lib = store.add("lib", os.urandom(300_000))
    tool = store.add("tool", b"tool" * 50_000, [lib])
    store.register(tool, [lib, tool])
    top = store.add("top", b"top", [lib, tool])
    key = SecretKey.generate("test-1")
    return World(store, Memory(), key, Keyring((key.public,)), lib, tool, top)


@pytest.fixture
def memory() -> type[Memory]:
    return Memory


@pytest.fixture
def fake_sink() -> type[FakeSink]:
    return FakeSink
