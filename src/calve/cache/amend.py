"""Small objects that several pushes may be writing at once: nobody's part of them is lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from calve.cache.objects import MissingCacheError, Objects, is_missing
from calve.errors import AccessError, ConflictError, DamagedError, NotFoundError, UsageError
from calve.nix.narinfo import MAX_NARINFO_BYTES, NarInfo, PathInfo, merge_signatures
from calve.nix.signing import SecretKey
from calve.nix.storepath import STORE_DIR

__all__ = ["amend", "check_there", "ensure_info", "joined"]

_INFO = "nix-cache-info"
_PRIORITY = 40  # cache.nixos.org's; Nix asks the lowest first
_TRIES = 10


def ensure_info(objects: Objects) -> bool:
    """Make it a binary cache, where it is none yet, and say so; UsageError where it is of another store directory."""
    try:
        text = objects.get(_INFO, MAX_NARINFO_BYTES).decode("utf-8", "replace")
    except (NotFoundError, AccessError):
        made = f"StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: {_PRIORITY}\n"
        return objects.put(_INFO, made.encode("ascii"), only_new=True)
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "StoreDir" and value.strip() != STORE_DIR:
            raise UsageError(
                f"the cache is of the store {value.strip()}, not {STORE_DIR}",
                place=f"{objects.url}/{_INFO}",
            )
    return False


def check_there(objects: Objects) -> None:
    """Raise MissingCacheError where there is no bucket, or no directory; a listing of it would only be empty."""
    try:
        objects.get(_INFO, MAX_NARINFO_BYTES)
    except MissingCacheError:
        raise
    except (NotFoundError, AccessError, DamagedError):
        return


def amend(
    objects: Objects, key: str, make: Callable[[bytes | None], bytes], *, fresh: bool
) -> None:
    """Write a small object that others may be writing too, so that nobody's part is lost.

    Args:
        objects: the cache.
        key: of the object.
        make: returns what it shall be, given what it is (None where it is not).
        fresh: it is believed not to be there.
    """
    for _ in range(_TRIES):
        if fresh and objects.put(key, make(None), only_new=True):
            return
        try:
            old, tag = objects.get_tagged(key, MAX_NARINFO_BYTES)
        except (NotFoundError, AccessError) as error:
            if isinstance(error, AccessError) and (fresh or not is_missing(error)):
                raise
            fresh = True
            continue
        except DamagedError:  # longer than any reader takes
            objects.put(key, make(None))
            return
        new = make(old)
        if new == old or objects.put(key, new, match=tag):
            return
    raise ConflictError("others keep writing to it", place=f"{objects.url}/{key}")


def joined(
    entry: NarInfo, ours: PathInfo, key: SecretKey, old: bytes | None, *, keep: bool = True
) -> NarInfo:
    """Return the narinfo to write in place of another.

    Args:
        entry: the one to write, where there is none.
        ours: what the store says of the path, with our signature.
        key: ours.
        old: what is there. Of the same build, its signatures stay; of the same NAR, what it says of its file does.
        keep: False where that is wrong.
    """
    base = entry
    signatures = entry.info.signatures
    with suppress(DamagedError):
        there = entry if old is None else NarInfo.parse(old)
        if there.info.fingerprint == ours.fingerprint:
            signatures = there.info.signatures
            if keep and there.url == entry.url and entry.file_hash is None:
                base = there
    kept = tuple(one for one in signatures if one.name != key.name)
    return replace(
        base, info=replace(base.info, signatures=merge_signatures(kept, ours.signatures))
    )
