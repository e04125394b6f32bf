"""A manifest's way into a cache: its body once and for all, its signatures joined with those that are there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from calve.cache import manifest as manifests
from calve.cache.manifest import Manifest
from calve.cache.objects import Objects
from calve.errors import ConflictError, DamagedError, NotFoundError
from calve.nix.narinfo import merge_signatures
from calve.nix.signing import Signature
from calve.nix.storepath import StorePath

__all__ = ["first_paths", "publish"]

_TRIES = 10


def publish(
    objects: Objects,
    manifest: Manifest,
    signatures: Iterable[Signature],
    met: Callable[[str], str | None] = lambda _key: None,
) -> str:
    """Have a manifest in the cache with these signatures beside others; one request where it is new.

    Args:
        objects: the cache.
        manifest: complete, and all that it names is there.
        signatures: of its digest.
        met: called with its key where it is there already; returns what shall make it another object, because a
            collection is about to remove the one that is there.

    Returns:
        Its digest.

    Raises:
        ConflictError: others keep writing to it.
    """
    body = manifest.dump()
    digest = manifests.digest_of(body)
    name = manifests.key(digest)
    ours = tuple(signatures)
    for _ in range(_TRIES):
        if objects.put(name, manifests.pack(body, ours), only_new=True):
            return digest
        nonce = met(name)
        try:
            data, tag = objects.get_tagged(name, manifests.MAX_OBJECT_BYTES)
        except NotFoundError:
            continue  # gone since
        merged = merge_signatures(ours)
        with suppress(DamagedError):  # then ours takes its place
            _, known = manifests.unpack(data, digest, f"{objects.url}/{name}")
            merged = merge_signatures(known, ours)
            if nonce is None and merged == known:
                return digest
        if objects.put(name, manifests.pack(body, merged, nonce), match=tag):
            return digest
    raise ConflictError("others keep writing to it", place=f"{objects.url}/{name}")


def first_paths(toplevel: Path) -> list[StorePath]:
    """Return the paths of a system's kernel and initrd, which a boot wants first; none where it is not a system."""
    found: list[StorePath] = []
    for name in ("kernel", "initrd"):
        with suppress(OSError, DamagedError):
            target = os.readlink(toplevel / name)
            found.append(StorePath.parse("/".join(target.split("/")[:4])))
    return found
