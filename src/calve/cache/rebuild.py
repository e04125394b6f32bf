"""A manifest that was lost, made again out of narinfos: its digest says whether that succeeded.

Nothing in a digest tells the toplevel. So each path that no other refers to is tried; and as a manifest's order and
signatures are part of its text, those that a push may have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product

from calve import record
from calve.cache import manifest as manifests
from calve.cache.manifest import Manifest, boot_order
from calve.cache.objects import Objects
from calve.errors import DamagedError, NotFoundError, SignatureError, UsageError
from calve.nix.narinfo import NarInfo
from calve.nix.signing import Keyring, Signature
from calve.nix.storepath import StorePath

__all__ = ["good_signatures", "rebuild", "salvage"]

_MOST_GUESSES = 4
_HEADER_BYTES = 8


def rebuild(digests: frozenset[str], entries: Mapping[StorePath, NarInfo]) -> dict[str, bytes]:
    """Make manifests again; return the texts of those that succeeded, by digest.

    Args:
        digests: of the manifests that are wanted.
        entries: the narinfos of a cache.
    """
    referred = {
        reference
        for entry in entries.values()
        for reference in entry.info.references
        if reference != entry.info.path
    }
    found: dict[str, bytes] = {}
    for toplevel in sorted(entries.keys() - referred):
        if len(found) == len(digests):
            break
        closure = _closure(toplevel, entries)
        for body in _guesses(toplevel, closure):
            digest = manifests.digest_of(body)
            if digest in digests:
                found[digest] = body
    return found


def _closure(toplevel: StorePath, entries: Mapping[StorePath, NarInfo]) -> list[NarInfo]:
    """Return the entries of a closure; none where one is missing."""
    seen = {toplevel}
    todo = [toplevel]
    closure: list[NarInfo] = []
    while todo:
        entry = entries.get(todo.pop())
        if entry is None:
            return []
        closure.append(entry)
        fresh = set(entry.info.references) - seen
        seen |= fresh
        todo += fresh
    return closure


def _guesses(toplevel: StorePath, closure: list[NarInfo]) -> Iterator[bytes]:
    """Give the texts that a push may have written for a closure."""
    if not closure:
        return
    kernels = [entry.info.path for entry in closure if entry.info.path.name.startswith("linux-")]
    initrds = [entry.info.path for entry in closure if entry.info.path.name.startswith("initrd")]
    names = sorted({one.name for entry in closure for one in entry.info.signatures})
    for name in (None, *names[:_MOST_GUESSES]):
        signed = closure if name is None else [_signed_by(entry, name) for entry in closure]
        for boots in product(
            (None, *sorted(kernels)[:_MOST_GUESSES]), (None, *sorted(initrds)[:_MOST_GUESSES])
        ):
            first = [path for path in boots if path is not None]
            with suppress(UsageError):  # too large for a manifest
                yield Manifest(toplevel, boot_order(signed, toplevel, first)).dump()


def _signed_by(entry: NarInfo, name: str) -> NarInfo:
    kept = tuple(one for one in entry.info.signatures if one.name == name)
    return replace(entry, info=replace(entry.info, signatures=kept))


def salvage(objects: Objects, digest: str, keyring: Keyring) -> tuple[Signature, ...]:
    """Return those signatures of a damaged manifest that a trusted key made of its digest."""
    try:
        data = objects.get(manifests.key(digest), 2 * manifests.MAX_BYTES)
    except (NotFoundError, DamagedError):
        return ()
    magic = manifests.pack(b"")[:4]
    end = _HEADER_BYTES + int.from_bytes(data[4:_HEADER_BYTES], "little")
    if data[:4] != magic or end > len(data):
        return ()
    with suppress(DamagedError, UsageError):
        fields = record.parse(
            data[_HEADER_BYTES:end], what="signatures", version=1, limit=end, place=objects.url
        )
        return good_signatures(fields.texts("signatures", Signature.parse), digest, keyring)
    return ()


def good_signatures(
    signatures: tuple[Signature, ...], digest: str, keyring: Keyring
) -> tuple[Signature, ...]:
    """Return those signatures of a manifest that a trusted key made."""
    message = manifests.signed_bytes(digest)
    good: list[Signature] = []
    for one in signatures:
        with suppress(SignatureError):
            keyring.verify(message, [one])
            good.append(one)
    return tuple(good)
