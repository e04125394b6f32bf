"""A binary cache is set up: its bucket's settings, `nix-cache-info`, a keyring; and its store is put to the proof.

What every push, keyring and garbage collection relies on is that the store honours conditions. One that takes the
headers and ignores them loses data silently, so `probe` looks, with an object of its own. Each step says what it
found; a second run changes nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from calve.cache import keyring
from calve.cache.amend import ensure_info
from calve.cache.objects import Listed
from calve.cache.rekey import rekey
from calve.errors import AccessError, CalveError, NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.cache.objects import Objects
    from calve.nix.signing import Keyring, SecretKey

__all__ = ["Bucket", "Done", "State", "init", "probe"]

_INFO = "nix-cache-info"
_INFO_BYTES = 64 * 1024
_OTHER = '"00000000000000000000000000000000"'  # a tag that no version has
_PROBE_BYTES = 64


class State(StrEnum):
    """What became of a step."""

    CHANGED = "changed"
    ALREADY = "already"
    WOULD_CHANGE = "would change"
    UNSUPPORTED = "unsupported"
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Done:
    """One step: its name, what it is for, and what became of it."""

    name: str
    text: str
    state: State


class Bucket(Protocol):
    """A bucket and its settings. A setting is in force, is not, or (None) is not known to this store."""

    def exists(self) -> bool:
        """Say whether it is there."""

    def create(self) -> None:
        """Make it."""

    def is_owner_enforced(self) -> bool | None:
        """Say whether ACLs are off."""

    def enforce_owner(self) -> None:
        """Turn them off."""

    def is_public_access_blocked(self) -> bool | None:
        """Say whether nothing in it can be made public."""

    def block_public_access(self) -> None:
        """Block it."""

    def is_encrypted(self) -> bool | None:
        """Say whether objects are encrypted by default."""

    def encrypt(self) -> None:
        """Encrypt them."""

    def aborts_uploads(self) -> bool | None:
        """Say whether parts of uploads that were never completed are removed."""

    def abort_uploads(self) -> None:
        """Have them removed."""

    def create_in_parts(self, key: str, data: bytes) -> bool:
        """Write an object by a multipart upload, only where there is none; say whether it was written."""


_Ask = Callable[[Bucket], bool | None]
_Set = Callable[[Bucket], None]
_SETTINGS: tuple[tuple[str, str, _Ask, _Set], ...] = (
    (
        "ownership",
        "the bucket's owner owns every object; ACLs are off",
        lambda bucket: bucket.is_owner_enforced(),
        lambda bucket: bucket.enforce_owner(),
    ),
    (
        "public-access-block",
        "nothing in it can be made public",
        lambda bucket: bucket.is_public_access_blocked(),
        lambda bucket: bucket.block_public_access(),
    ),
    (
        "encryption",
        "objects are encrypted by default",
        lambda bucket: bucket.is_encrypted(),
        lambda bucket: bucket.encrypt(),
    ),
    (
        "incomplete-uploads",
        "parts of uploads that were never completed are removed after days",
        lambda bucket: bucket.aborts_uploads(),
        lambda bucket: bucket.abort_uploads(),
    ),
)


def init(
    objects: Objects,
    bucket: Bucket | None,
    *,
    roots: Keyring | None = None,
    signers: Sequence[SecretKey] = (),
    seen: int = 0,
    dry_run: bool = False,
) -> Iterator[Done]:
    """Set a cache up, step by step; each is told once it is done.

    Args:
        objects: the cache.
        bucket: that holds it; None for a directory.
        roots: public root keys, the signers' among them.
        signers: secret root keys; where there are any, a cache without a keyring gets one.
        seen: the highest sequence of its keyring that was seen before.
        dry_run: write nothing, and say what differs; conditions are not probed.

    Raises:
        UsageError: the store ignores conditions, or the cache is of another store directory.
        VerificationError: the keyring that is there cannot be trusted.
        CalveError: the store refuses a step.
    """
    there = True
    if bucket is not None:
        there = bucket.exists()
        text = "the bucket is there"
        if there or dry_run:
            yield Done("bucket", text, State.ALREADY if there else State.WOULD_CHANGE)
        else:
            bucket.create()
            yield Done("bucket", text, State.CHANGED)
        yield _probed(objects, bucket, dry_run=dry_run)
        for name, meaning, ask, put in _SETTINGS:
            yield Done(
                name, meaning, _set(bucket, ask, put, dry_run=dry_run, there=there or not dry_run)
            )
    yield Done(_INFO, "it is a binary cache", _ensure_info(objects, dry_run=dry_run, there=there))
    if signers and roots is not None:
        yield _ensure_keyring(objects, roots, signers, seen, dry_run=dry_run)


def _set(bucket: Bucket, ask: _Ask, put: _Set, *, dry_run: bool, there: bool) -> State:
    if not there:
        return State.WOULD_CHANGE
    found = ask(bucket)
    if found is None:
        return State.UNSUPPORTED
    if found:
        return State.ALREADY
    if dry_run:
        return State.WOULD_CHANGE
    put(bucket)
    return State.CHANGED


def _ensure_info(objects: Objects, *, dry_run: bool, there: bool) -> State:
    found = there
    if there:
        try:
            objects.get(_INFO, _INFO_BYTES)
        except (NotFoundError, AccessError):
            found = False
    if dry_run and not found:
        return State.WOULD_CHANGE
    ensure_info(objects)
    return State.ALREADY if found else State.CHANGED


def _ensure_keyring(
    objects: Objects, roots: Keyring, signers: Sequence[SecretKey], seen: int, *, dry_run: bool
) -> Done:
    text = "keys can be added and revoked"
    if keyring.read(objects, roots, seen=seen) is not None:
        return Done(keyring.KEY, text, State.ALREADY)
    rekey(objects, roots, signers, seen=seen, dry_run=dry_run)
    return Done(keyring.KEY, text, State.WOULD_CHANGE if dry_run else State.CHANGED)


# The proof


def _probed(objects: Objects, bucket: Bucket, *, dry_run: bool) -> Done:
    text = "the store honours conditional writes"
    if dry_run:
        return Done("conditions", text, State.NOT_TRIED)
    broken = probe(objects, bucket)
    if broken:
        raise UsageError(
            f"the store ignores or does not know {', '.join(broken)}",
            place=objects.url,
            hint="pushes at the same time and garbage collection would lose data: use a store that honours "
            "conditional writes, such as Amazon S3",
        )
    return Done("conditions", text, State.ALREADY)


def probe(objects: Objects, bucket: Bucket) -> list[str]:
    """Return the conditions that the store does not honour; a probe object is written and removed."""
    key = f"calve-probe-{secrets.token_hex(8)}"
    try:
        return [name for name, holds in _PROOFS if not _proved(holds, objects, bucket, key)]
    finally:
        with suppress(CalveError):
            objects.delete(key)


def _proved(holds: _Proof, objects: Objects, bucket: Bucket, key: str) -> bool:
    try:
        objects.put(key, _data())
        return holds(objects, bucket, key)
    except UsageError:
        return False
    except CalveError as error:
        # Older stores refuse the header instead of ignoring it.
        if error.service_code in {"NotImplemented", "InvalidArgument", "InvalidRequest"}:
            return False
        raise


_Proof = Callable[["Objects", Bucket, str], bool]


def _data() -> bytes:
    return secrets.token_bytes(_PROBE_BYTES)


def _put_only_new(objects: Objects, _bucket: Bucket, key: str) -> bool:
    return not objects.put(key, _data(), only_new=True)


def _complete_only_new(_objects: Objects, bucket: Bucket, key: str) -> bool:
    return not bucket.create_in_parts(key, _data())


def _put_match(objects: Objects, _bucket: Bucket, key: str) -> bool:
    _, tag = objects.get_tagged(key, _PROBE_BYTES)
    if objects.put(key, _data(), match=_OTHER):
        return False
    data = _data()
    # Where the answer was lost, the second attempt finds the first one's object.
    return objects.put(key, data, match=tag) or objects.get(key, _PROBE_BYTES) == data


def _delete_match(objects: Objects, _bucket: Bucket, key: str) -> bool:
    _, tag = objects.get_tagged(key, _PROBE_BYTES)
    if objects.delete(key, match=_OTHER) or objects.head(key) is None:
        return False
    return objects.delete(key, match=tag) and objects.head(key) is None


def _delete_many_match(objects: Objects, _bucket: Bucket, key: str) -> bool:
    stale = Listed(key, _PROBE_BYTES, _OTHER, 0.0)
    return objects.delete_many([stale]) == [stale] and objects.head(key) is not None


_PROOFS: tuple[tuple[str, _Proof], ...] = (
    ("If-None-Match of PutObject", _put_only_new),
    ("If-None-Match of CompleteMultipartUpload", _complete_only_new),
    ("If-Match of PutObject", _put_match),
    ("If-Match of DeleteObject", _delete_match),
    ("ETag of DeleteObjects", _delete_many_match),
)
