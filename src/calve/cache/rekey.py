"""Changes of a cache's keyring: a key is added or revoked, and root keys sign the whole anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calve.cache import keyring
from calve.cache.keyring import Document
from calve.errors import ConflictError, NotFoundError, UsageError, VerificationError
from calve.nix.signing import Keyring, PublicKey, SecretKey

if TYPE_CHECKING:
    from calve.cache.objects import Objects

__all__ = ["Change", "rekey"]


@dataclass(frozen=True, slots=True)
class Change:
    """What the keyring is, and whether it had to be changed; in a dry run, what it would be."""

    document: Document
    changed: bool


def rekey(
    objects: Objects,
    roots: Keyring,
    signers: Sequence[SecretKey],
    *,
    add: Iterable[PublicKey] = (),
    revoke: Iterable[PublicKey | str] = (),
    sequence: int | None = None,
    seen: int = 0,
    dry_run: bool = False,
) -> Change:
    """Add keys to a cache's keyring and revoke some; a cache without one gets one.

    Args:
        objects: the cache.
        roots: those that readers have: the signers are among them.
        signers: secret root keys; no other signature outlives a change.
        add: keys that count from now on.
        revoke: keys that never count again; a name stands for the one root or added key that has it.
        sequence: of the new keyring, higher than any that was seen; None for the next. It is the way out where the
            keyring was lost, or replaced by an older one.
        seen: the highest sequence that was seen before.
        dry_run: write nothing.

    Raises:
        UsageError: a signer is no root key or revoked; a key to add is revoked; a name is not one key's; the
            sequence is not higher.
        VerificationError: the keyring that is there cannot be trusted, or no key would be left.
        ConflictError: somebody else changed it at the same time.
    """
    for key in signers:
        if key.public.key not in {root.key for root in roots.keys}:
            raise UsageError(
                f"the key {key.name} is not one of the root keys",
                hint=f"root keys are {', '.join(root.name for root in roots.keys) or 'not given'}",
            )
    current, tag = _current(objects, roots, 0 if sequence else seen)
    old = current or Document(0)
    gone = {key.key: key for key in old.revoked}
    gone |= {key.key: key for key in (_named(one, roots, old) for one in revoke)}
    added = list(add)
    for one in added:
        if one.key in gone:
            raise UsageError(f"the key {one.name} is revoked, and a key is revoked for ever")
    kept = {key.key: key for key in (*old.keys, *added) if key.key not in gone}
    keys, revoked = tuple(kept.values()), tuple(gone.values())
    same = Document(old.sequence, keys, revoked).signed(*signers)
    if current is not None and sequence is None and same.dump() == current.dump():
        return Change(current, changed=False)
    least = max(old.sequence, seen)
    number = least + 1 if sequence is None else sequence
    if number <= least:
        raise UsageError(f"the sequence {number} is not higher than {least}")
    new = Document(number, keys, revoked).signed(*signers)
    _check(new, roots, signers)
    if not dry_run:
        _write(objects, new.dump(), tag)
    return Change(new, changed=True)


def _current(objects: Objects, roots: Keyring, seen: int) -> tuple[Document | None, str | None]:
    """Return the keyring and its tag."""
    place = f"{objects.url}/{keyring.KEY}"
    try:
        data, tag = objects.get_tagged(keyring.KEY, keyring.MAX_BYTES)
    except NotFoundError as error:
        if seen:
            raise VerificationError(
                f"the keyring is gone: number {seen} was seen before",
                place=place,
                hint=f"--sequence {seen + 1} begins a new one: revoke again what was revoked",
            ) from error
        return None, None
    document = Document.parse(data, place)
    keyring.judge(document, roots, place, seen=seen)
    return document, tag


def _named(wanted: PublicKey | str, roots: Keyring, old: Document) -> PublicKey:
    if isinstance(wanted, PublicKey):
        return wanted
    known = {*roots.keys, *old.keys, *old.revoked}
    found = [key for key in known if key.name == wanted]
    if len(found) != 1:
        raise UsageError(
            f"{'several keys have' if found else 'no key has'} that name",
            hint="give the public key, NAME:BASE64; calve keys list shows them",
        )
    return found[0]


def _check(new: Document, roots: Keyring, signers: Sequence[SecretKey]) -> None:
    """Refuse what readers would refuse."""
    gone = {key.key for key in new.revoked}
    for key in signers:
        if key.public.key in gone:
            raise UsageError(
                f"the key {key.name} cannot sign: it is revoked", hint="sign with another root key"
            )
    new.verify(roots, keyring.KEY)
    keyring.effective(roots, [new])


def _write(objects: Objects, data: bytes, tag: str | None) -> None:
    if objects.put(keyring.KEY, data, only_new=tag is None, match=tag):
        return
    # An earlier attempt of ours, whose answer was lost, may have written it.
    if objects.get(keyring.KEY, keyring.MAX_BYTES) != data:
        raise ConflictError(
            "somebody else changed the keyring at the same time",
            place=f"{objects.url}/{keyring.KEY}",
            hint="look at calve keys list, then run this again",
        )
