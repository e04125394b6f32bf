"""Where a repair takes what a cache lost: a local store, or another cache. Nothing is taken that is not verified."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from calve.cache import manifest as manifests
from calve.cache.content import NarCopy
from calve.cache.lookup import OTHER_MAY_HELP, find
from calve.cache.objects import Objects
from calve.cache.stream import NarStream
from calve.errors import DamagedError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import Keyring, Signature
from calve.nix.storepath import StorePath
from calve.tasks import Cancel

__all__ = ["CacheSource", "Source", "Store", "StoreSource", "Stream"]

_LEVEL = 3
"""Of zstd. It is what a push takes by default, so that most NARs come out as they were."""


class Stream(Protocol):
    """A compressed NAR; its hash and size are known once `chunks` has ended."""

    @property
    def file_hash(self) -> Hash:
        """Return the hash of what `chunks` gave."""

    @property
    def file_size(self) -> int:
        """Return how many bytes `chunks` gave."""

    def chunks(self, cancel: Cancel | None = None) -> Generator[bytes, None, None]:
        """Give the bytes; an error at the end says that they must not be kept."""


class Source(Protocol):
    """Has paths. Methods may be called by any thread."""

    @property
    def name(self) -> str:
        """Return what to call it in messages."""

    def facts(self, path: StorePath) -> PathInfo:
        """Return what it knows of a path; NotFoundError, and the errors of a cache."""

    def nar(self, info: PathInfo, compression: str) -> tuple[Stream, str]:
        """Return the NAR of a path, and how it is compressed: as asked, where that can be.

        Raises:
            NotFoundError: the path is not there.
            DamagedError: it is another build.
        """

    def manifest(self, digest: str) -> tuple[bytes, tuple[Signature, ...]] | None:
        """Return a manifest's text and signatures; None where it does not have it whole."""


class Store(Protocol):
    """A local store."""

    def path_info(self, path: StorePath) -> PathInfo:
        """Return what is known of a valid path; NotFoundError where it is not valid."""

    def real(self, path: StorePath) -> Path:
        """Return where a path's files are."""


def _same(found: PathInfo, wanted: PathInfo, name: str) -> None:
    """Raise unless two have the same NAR."""
    if (found.nar_hash, found.nar_size) != (wanted.nar_hash, wanted.nar_size):
        raise DamagedError(f"{name} has another build of it", place=wanted.path)


class StoreSource:
    """A store on this machine."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name

    def facts(self, path: StorePath) -> PathInfo:
        """Return what its database says."""
        return self._store.path_info(path)

    def nar(self, info: PathInfo, compression: str) -> tuple[Stream, str]:  # noqa: ARG002
        """Return the NAR of a path's files, as zstd."""
        found = self._store.path_info(info.path)
        _same(found, info, self.name)
        return NarStream(self._store.real(info.path), found, _LEVEL, lambda _size: None), "zstd"

    def manifest(self, digest: str) -> None:  # noqa: ARG002
        """Return nothing: a store has none."""
        return


class CacheSource:
    """Another cache; only what a trusted key signed is taken from it."""

    def __init__(self, objects: Objects, keyring: Keyring) -> None:
        self._objects = objects
        self._keyring = keyring
        self.name = objects.url

    def facts(self, path: StorePath) -> PathInfo:
        """Return what its narinfo says."""
        return find([self._objects], self._keyring, path).entry.info

    def nar(self, info: PathInfo, compression: str) -> tuple[Stream, str]:
        """Return the NAR as it is there, or compressed anew as zstd."""
        entry = find([self._objects], self._keyring, info.path).entry
        _same(entry.info, info, self.name)
        if entry.compression == compression:
            return NarCopy(self._objects, entry, None), compression
        return NarCopy(self._objects, entry, _LEVEL), "zstd"

    def manifest(self, digest: str) -> tuple[bytes, tuple[Signature, ...]] | None:
        """Return a manifest that it has."""
        with suppress(*OTHER_MAY_HELP, UsageError):
            manifest, signatures, _ = manifests.read_signed(self._objects, digest)
            body = manifest.dump()
            if manifests.digest_of(body) == digest:
                return body, signatures
        return None
