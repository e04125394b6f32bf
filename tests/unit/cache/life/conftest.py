"""A cache with two releases that share paths, and a cache beside it; made without `push`."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from calve.cache import manifest as manifests
from calve.cache.compression import compressor
from calve.cache.roots import Root, write_root
from calve.errors import NotFoundError
from calve.nix import narwriter
from calve.nix.closure import closure
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.storepath import StorePath

NOW = datetime.datetime(2026, 7, 1, 12, 0, 0, tzinfo=datetime.UTC)
INFO = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n"


@dataclass
class Life:
    store: object
    cache: object
    key: SecretKey
    ring: Keyring
    lib: StorePath
    tool: StorePath
    top: StorePath
    new: StorePath
    digest: str
    digest_new: str
    make: Callable[[], object]

    def entry(self, path: StorePath, cache=None) -> NarInfo:
        return NarInfo.parse((cache or self.cache).data[f"{path.digest}.narinfo"])

    def nar(self, path: StorePath) -> str:
        return self.entry(path).url

    def put(self, entry: NarInfo, cache=None) -> None:
        (cache or self.cache).data[f"{entry.info.path.digest}.narinfo"] = entry.dump()

    def send(self, path: StorePath, cache=None, key: SecretKey | None = None, level: int = 3):
        """Write a path's NAR and narinfo; return its entry."""
        cache = cache or self.cache
        info = self.store.infos[path]
        nar = bytearray()
        narwriter.dump(self.store.real(path), nar.extend)
        made = compressor(level, len(nar))
        data = bytes(made.compress(bytes(nar))) + bytes(made.flush())
        name = f"nar/{encode32(info.nar_hash.digest)}.nar.zst"
        cache.data[name] = data
        signed = info.signed(key or self.key)
        entry = NarInfo(signed, name, "zstd", Hash.sha256(data), len(data))
        self.put(entry, cache)
        return entry

    def keep(self, top: StorePath, root: tuple[str, str] | None, cache=None, first=()) -> str:
        """Write the manifest of a closure that is there, and its root; return the digest."""
        cache = cache or self.cache
        reached = closure([top], self.store.infos.__getitem__)
        entries = [self.entry(info.path, cache) for info in reached]
        body = manifests.Manifest(top, manifests.boot_order(entries, top, first)).dump()
        digest = manifests.digest_of(body)
        signature = self.key.sign(manifests.signed_bytes(digest))
        cache.data[manifests.key(digest)] = manifests.pack(body, [signature])
        if root is not None:
            write_root(cache, Root(*root, manifest=digest, created=NOW))
        return digest

    def fill(self, cache, paths: Iterable[StorePath] | None = None, level: int = 3) -> None:
        cache.data["nix-cache-info"] = INFO
        for path in paths or self.store.infos:
            self.send(path, cache, level=level)


class Database:
    """What a local store gives: facts by path, and where the files are."""

    def __init__(self, trees, signing: SecretKey | None = None) -> None:
        self._trees = trees
        self._signing = signing

    def path_info(self, path: StorePath) -> PathInfo:
        info = self._trees.infos.get(path)
        if info is None:
            raise NotFoundError("not a valid path of the store", place=path)
        return info if self._signing is None else info.signed(self._signing)

    def real(self, path: StorePath):
        return self._trees.real(path)


@pytest.fixture
def life(world, memory) -> Life:
    """Make web/1 = {top, tool, lib} and web/2 = {new, tool, lib}."""
    new = world.store.add("new", os.urandom(90_000), [world.lib, world.tool])
    made = Life(
        world.store, world.cache, world.key, world.ring,
        world.lib, world.tool, world.top, new, "", "", memory,
    )  # fmt: skip
    made.fill(world.cache)
    made.digest = made.keep(world.top, ("web", "1"))
    made.digest_new = made.keep(new, ("web", "2"))
    return made


@pytest.fixture
def database() -> type[Database]:
    return Database


@pytest.fixture
def now() -> datetime.datetime:
    return NOW
