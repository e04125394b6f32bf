"""The keyring of a cache: keys that were added to the root keys, and keys that count no longer.

Version 1 is `keyring.json`, at most 64 KiB:

    {"version": 1, "sequence": N, "keys": ["NAME:BASE64", …], "revoked": ["NAME:BASE64", …],
     "signatures": ["ROOT:BASE64", …]}

A root key signs these bytes (UTF-8; the keys of each list sorted, each once):

    calve-keyring-1;N
    key NAME:BASE64                one line for each key that is added
    revoked NAME:BASE64            one line for each that is revoked

with a line feed after every line. What else the document has is not signed, and nothing is made of it. Root keys are
an image's or a user's own; a cache brings none. A key is revoked by its bytes, under whatever name, and for ever:
revoked wins over added and over root. One signature counts that a root key made which no document revokes. The
sequence grows with every change: whoever has seen one refuses a lower one, and the absence of any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from calve import record
from calve.cache.objects import MissingCacheError, is_missing
from calve.errors import (
    AccessError,
    CalveError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    RefusedError,
    SignatureError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.nix.signing import Keyring, PublicKey, SecretKey, Signature

if TYPE_CHECKING:
    from calve.cache.objects import Objects

__all__ = ["KEY", "MAX_BYTES", "Document", "Trusted", "effective", "judge", "read", "trusted"]

KEY = "keyring.json"
VERSION = 1
MAX_BYTES = 64 * 1024
_MAX_SEQUENCE = (1 << 63) - 1
_HINT = "someone may be hiding a revocation; calve keys add --sequence writes a newer one"
_NONE_SEEN: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Document:
    """A keyring as it is stored.

    Attributes:
        sequence: 1 and more; grows with every change.
        keys: that were added.
        revoked: that count no longer.
        signatures: by root keys.
    """

    sequence: int
    keys: tuple[PublicKey, ...] = ()
    revoked: tuple[PublicKey, ...] = ()
    signatures: tuple[Signature, ...] = ()

    @classmethod
    def parse(cls, data: bytes, place: str = KEY) -> Document:
        """Read a document; its signatures are not judged.

        Raises:
            DamagedError: it is malformed, or longer than 64 KiB.
            UsageError: its version is one that we do not read.
        """
        fields = record.parse(data, what="keyring", version=VERSION, limit=MAX_BYTES, place=place)
        sequence = fields.number("sequence")
        if sequence == 0:
            raise DamagedError("sequence is 0", place=place)
        return cls(
            sequence,
            _sorted(fields.texts("keys", _public)),
            _sorted(fields.texts("revoked", _public)),
            fields.texts("signatures", Signature.parse),
        )

    def dump(self) -> bytes:
        """Write it; UsageError where it is longer than a reader takes."""
        body = record.dump(
            {
                "version": VERSION,
                "sequence": self.sequence,
                "keys": [key.dump() for key in _sorted(self.keys)],
                "revoked": [key.dump() for key in _sorted(self.revoked)],
                "signatures": [signature.dump() for signature in self.signatures],
            }
        )
        if len(body) > MAX_BYTES or not 0 < self.sequence <= _MAX_SEQUENCE:
            raise UsageError(
                f"the keyring is too large: {len(body)} bytes, sequence {self.sequence}",
                hint=f"a keyring has at most {MAX_BYTES >> 10} KiB",
            )
        return body

    @property
    def signed_bytes(self) -> bytes:
        """Return what root keys sign."""
        lines = [f"calve-keyring-{VERSION};{self.sequence}"]
        lines += [f"key {key.dump()}" for key in _sorted(self.keys)]
        lines += [f"revoked {key.dump()}" for key in _sorted(self.revoked)]
        return "".join(f"{line}\n" for line in lines).encode("utf-8")

    def signed(self, *keys: SecretKey) -> Document:
        """Return it with the signatures of these keys alone."""
        return replace(self, signatures=tuple(key.sign(self.signed_bytes) for key in keys))

    def verify(self, roots: Keyring, place: object = None) -> str:
        """Return the name of a root key that signed and is not revoked here; SignatureError where none did."""
        return _without(roots, self.revoked).verify(self.signed_bytes, self.signatures, place)


@dataclass(frozen=True, slots=True)
class Trusted:
    """What caches made of root keys.

    Attributes:
        keyring: the keys that count.
        sequences: the highest sequence seen of each cache that has a keyring, by its URL: to be remembered.
        caches: those that answered, in their order; from the others nothing may be taken.
        revoked: keys that count no longer.
    """

    keyring: Keyring
    sequences: Mapping[str, int]
    caches: tuple[Objects, ...]
    revoked: tuple[PublicKey, ...] = ()


def effective(roots: Keyring, documents: Iterable[Document]) -> Keyring:
    """Return what roots and documents have and none revokes; no signature is judged here.

    Raises:
        SignatureError: no key is left.
    """
    known = list(documents)
    added = [key for document in known for key in document.keys]
    everything = Keyring(tuple(dict.fromkeys((*roots.keys, *added))))
    left = _without(everything, [key for document in known for key in document.revoked])
    if not left.keys:
        raise SignatureError(
            "every trusted key is revoked" if roots.keys else "no key is trusted",
            hint="trust a newer root key: by --trusted, cache.trusted, or an image that has it",
        )
    return left


def read(objects: Objects, roots: Keyring, *, seen: int = 0) -> Document | None:
    """Read a cache's keyring: one request.

    Args:
        objects: the cache.
        roots: the root keys.
        seen: the highest sequence of this cache that was seen before; 0 for none.

    Returns:
        None where the cache has no keyring: the root keys alone count.

    Raises:
        DamagedError: it is malformed.
        SignatureError: no root key that it does not revoke signed it.
        VerificationError: it is older than one that was seen, or gone since.
        UsageError: its version is one that we do not read.
        AccessError, TransientError, DeadlineError: it cannot be known whether there is one.
    """
    place = f"{objects.url}/{KEY}"
    try:
        document = Document.parse(objects.get(KEY, MAX_BYTES), place)
    except MissingCacheError:
        return None  # whoever looks for paths there says so
    except (NotFoundError, AccessError) as error:
        if not is_missing(error):
            raise
        if seen:
            raise VerificationError(
                f"the keyring is gone: number {seen} was seen before", place=place, hint=_HINT
            ) from error
        return None
    judge(document, roots, place, seen=seen)
    return document


def judge(document: Document, roots: Keyring, place: str, *, seen: int = 0) -> None:
    """Raise unless a root key that the document does not revoke signed it, and none that is newer was seen.

    Raises:
        SignatureError, VerificationError: see `read`.
    """
    document.verify(roots, place)
    if document.sequence < seen:
        raise VerificationError(
            f"the keyring is number {document.sequence}: number {seen} was seen before",
            place=place,
            hint=_HINT,
        )


def trusted(
    caches: Sequence[Objects], roots: Keyring, seen: Mapping[str, int] = _NONE_SEEN
) -> Trusted:
    """Read the keyrings of caches: one request for each.

    A cache that cannot be reached is left out, unless that leaves none. A key that one cache revokes counts in none.

    Args:
        caches: in order of priority.
        roots: the root keys.
        seen: the highest sequences seen before, by the caches' URLs.

    Raises:
        VerificationError: a keyring is damaged, not signed, or older than one that was seen; or no key is left.
        CalveError: no cache could be reached: the first one's error.
    """
    found: dict[str, Document] = {}
    answered: list[Objects] = []
    failures: list[CalveError] = []
    for cache in caches:
        try:
            document = read(cache, roots, seen=seen.get(cache.url, 0))
        except (AccessError, TransientError, DeadlineError, RefusedError) as error:
            failures.append(error)
            continue
        answered.append(cache)
        if document is not None:
            found[cache.url] = document
    if failures and not answered:
        raise failures[0]
    revoked = _sorted(key for document in found.values() for key in document.revoked)
    for url, document in found.items():
        document.verify(_without(roots, revoked), f"{url}/{KEY}")
    sequences = {**seen, **{url: document.sequence for url, document in found.items()}}
    return Trusted(effective(roots, found.values()), sequences, tuple(answered), revoked)


def _without(keyring: Keyring, revoked: Iterable[PublicKey]) -> Keyring:
    gone = {key.key for key in revoked}
    return Keyring(tuple(key for key in keyring.keys if key.key not in gone))


def _sorted(keys: Iterable[PublicKey]) -> tuple[PublicKey, ...]:
    return tuple(sorted(set(keys)))


def _public(text: str) -> PublicKey:
    try:
        return PublicKey.parse(text)
    except UsageError as error:
        raise DamagedError(error.message) from error
