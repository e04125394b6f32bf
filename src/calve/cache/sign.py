"""Sign: add a key's signature to what a trusted key has signed already, so that keys can be changed without a push.

Signatures are only ever added, beside others who may be adding theirs. A manifest's text does not change: the
signatures of paths in it stay as they were, and only its own grow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

from calve.cache import manifest as manifests
from calve.cache import tombstones
from calve.cache.amend import amend
from calve.cache.crew import Crew
from calve.cache.findings import Finding, Kind, sort
from calve.cache.lookup import narinfo_key
from calve.cache.manifest import Manifest
from calve.cache.objects import MissingCacheError, Objects
from calve.cache.scope import ALL, Scope, each, read_root
from calve.cache.verify import is_narinfo
from calve.errors import (
    ConflictError,
    DamagedError,
    NotFoundError,
    SignatureError,
    UsageError,
    VerificationError,
)
from calve.nix.narinfo import MAX_NARINFO_BYTES, NarInfo, merge_signatures
from calve.nix.signing import Keyring, SecretKey
from calve.nix.storepath import StorePath
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["Signed", "sign"]

_TRIES = 10
_ENDING = ".json.zst"

_State: TypeAlias = Literal["signed", "known", "gone"]


@dataclass(frozen=True, slots=True)
class Signed:
    """How many were, or with `dry_run` would be, signed; how many had the signature; what was refused, and why."""

    narinfos: int
    manifests: int
    known: int
    refused: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class _Done:
    """What came of one object; `leads_to` are the paths that it names."""

    state: _State | Finding
    leads_to: tuple[StorePath, ...] = ()


def sign(
    objects: Objects,
    keyring: Keyring,
    key: SecretKey,
    chosen: Scope = ALL,
    *,
    dry_run: bool = False,
    jobs: int = 8,
    progress: Progress = silent,
    cancel: Cancel | None = None,
) -> Signed:
    """Add a key's signature to narinfos and manifests that a trusted key has signed.

    Args:
        objects: the cache.
        keyring: the trusted keys.
        key: signs.
        chosen: which closures; by default all that the cache has, but for what a collection is about to remove.
        dry_run: write nothing.
        jobs: how many objects are under way at once.
        progress: is told.
        cancel: stops it.

    Raises:
        UsageError: another key of the same name is trusted: its signatures would be replaced.
        NotFoundError, DamagedError: a root that was named is not there, or damaged.
        ConflictError: others keep writing to an object.
    """
    clash = [one for one in keyring.keys if one.name == key.name]
    if clash and key.public not in clash:
        raise UsageError(
            f"another key named {key.name} is trusted, and its signatures would be replaced",
            hint="give the new key a name of its own: calve keys generate NAME",
        )
    run = _Sign(objects, keyring, key, dry_run=dry_run)
    digests, narinfos = _expand(objects, chosen)
    counts: dict[_State, int] = {"signed": 0, "known": 0, "gone": 0}
    refused: list[Finding] = []
    tasks = [partial(run.manifest, digest, chosen.whole) for digest in digests]
    for done in each("manifests", tasks, jobs=jobs, cancel=cancel):
        narinfos |= {narinfo_key(path): path for path in done.leads_to}
        _count(done, counts, refused)
    signed_manifests = counts["signed"]
    walk = set() if chosen.whole else {narinfo_key(path) for path in chosen.paths}
    with Crew[tuple[str, _Done]]("sign", jobs=jobs, cancel=cancel) as crew:
        for name, path in narinfos.items():
            crew.add(partial(run.narinfo, name, path))
        for number, (name, done) in enumerate(crew, 1):
            _count(done, counts, refused)
            for path in done.leads_to if name in walk else ():
                new = narinfo_key(path)
                walk.add(new)
                if new not in narinfos:
                    narinfos[new] = path
                    crew.add(partial(run.narinfo, new, path))
            progress(Step("sign", number, len(narinfos), "paths"))
    return Signed(
        narinfos=counts["signed"] - signed_manifests,
        manifests=signed_manifests,
        known=counts["known"],
        refused=sort(refused),
    )


def _count(done: _Done, counts: dict[_State, int], refused: list[Finding]) -> None:
    if isinstance(done.state, Finding):
        refused.append(done.state)
    else:
        counts[done.state] += 1


def _expand(objects: Objects, chosen: Scope) -> tuple[list[str], dict[str, StorePath | None]]:
    """Return the digests of manifests, and the keys of narinfos that are known beforehand."""
    if not chosen.whole:
        digests = [read_root(objects, key).manifest for key in chosen.roots]
        named = {narinfo_key(path): path for path in chosen.paths}
        return list(dict.fromkeys((*digests, *chosen.manifests))), dict(named)
    keys = [
        one.key
        for one in objects.list("")
        if is_narinfo(one.key) or one.key.startswith("manifests/")
    ]
    going = tombstones.doomed(objects, keys).keys
    return (
        [digest for key in keys if key not in going and (digest := _digest(key)) is not None],
        {key: None for key in keys if key not in going and is_narinfo(key)},
    )


def _digest(key: str) -> str | None:
    name = key.removeprefix("manifests/").removesuffix(_ENDING)
    try:
        return name if key == manifests.key(name) else None
    except DamagedError:
        return None


class _Sign:
    """Signs one object at a time; called by any thread."""

    def __init__(
        self, objects: Objects, keyring: Keyring, key: SecretKey, *, dry_run: bool
    ) -> None:
        self._objects = objects
        self._keyring = keyring
        self._key = key
        self._dry_run = dry_run

    def manifest(self, digest: str, listed: bool, cancel: Cancel) -> _Done:  # noqa: FBT001
        """Sign a manifest, all of whose paths are signed; where it was only listed, it may be gone by now."""
        cancel.check()
        name = manifests.key(digest)
        try:
            return self._manifest(digest, name)
        except MissingCacheError:
            raise
        except NotFoundError as error:
            state: _State | Finding = Finding(Kind.MISSING, name, error.message)
            return _Done("gone" if listed else state)
        except SignatureError as error:
            where = None if error.place is None else error.place.rpartition(": ")[2]
            why = error.message if where is None else f"{error.message} ({where})"
            return _Done(Finding(Kind.UNSIGNED, name, why))
        except VerificationError as error:
            return _Done(Finding(Kind.CORRUPT, name, error.message))
        except UsageError as error:
            return _Done(Finding(Kind.UNSUPPORTED, name, error.message))

    def _manifest(self, digest: str, name: str) -> _Done:
        message = manifests.signed_bytes(digest)
        ours = self._key.sign(message)
        for _ in range(_TRIES):
            data, tag = self._objects.get_tagged(name, manifests.MAX_OBJECT_BYTES)
            body, signatures = manifests.unpack(data, digest, name)
            paths = self._checked(Manifest.parse(body, name))
            if ours in signatures:
                return _Done("known", paths)
            self._keyring.verify(message, signatures, "the manifest itself")
            kept = tuple(one for one in signatures if one.name != self._key.name)
            new = manifests.pack(body, merge_signatures(kept, (ours,)))
            if self._dry_run or self._objects.put(name, new, match=tag):
                return _Done("signed", paths)
        raise ConflictError("others keep writing to it", place=f"{self._objects.url}/{name}")

    def _checked(self, manifest: Manifest) -> tuple[StorePath, ...]:
        """Return a manifest's paths in this cache; SignatureError unless trusted keys signed all that it names."""
        for entry in manifest.paths:
            info = entry.info
            self._keyring.verify(info.fingerprint, info.signatures, info.path.basename)
        return tuple(entry.info.path for entry in manifest.paths if entry.url)

    def narinfo(self, name: str, path: StorePath | None, cancel: Cancel) -> tuple[str, _Done]:
        """Sign a narinfo; `path` is whose it should be, None where it was only listed."""
        cancel.check()
        try:
            return name, self._narinfo(name, path)
        except MissingCacheError:
            raise
        except NotFoundError as error:
            gone = Finding(Kind.MISSING, name, error.message, path)
            return name, _Done("gone" if path is None else gone)
        except SignatureError as error:
            return name, _Done(Finding(Kind.UNSIGNED, name, error.message, path))
        except VerificationError as error:
            return name, _Done(Finding(Kind.CORRUPT, name, error.message, path))
        except UsageError as error:
            return name, _Done(Finding(Kind.UNSUPPORTED, name, error.message, path))

    def _narinfo(self, name: str, path: StorePath | None) -> _Done:
        done = _Done("gone")

        def make(old: bytes | None) -> bytes:
            nonlocal done
            if old is None:
                raise NotFoundError("there is no such object")
            entry = NarInfo.parse(old, name)
            info = entry.info
            if narinfo_key(info.path) != name or path not in {None, info.path}:
                raise DamagedError(f"it is that of another path, {info.path}")
            self._keyring.verify(info.fingerprint, info.signatures, name)
            if self._key.sign(info.fingerprint) in info.signatures:
                done = _Done("known", info.references)
                return old
            done = _Done("signed", info.references)
            return replace(entry, info=info.signed(self._key)).dump()

        if self._dry_run:
            make(self._objects.get(name, MAX_NARINFO_BYTES))
        else:
            amend(self._objects, name, make, fresh=False)
        return done
