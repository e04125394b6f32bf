"""What is the matter with one object: a root, a manifest, a narinfo, a NAR. Every method may be called by any thread.

What seems to be missing is asked for again before it is reported: a push or a collection may run beside us.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from calve.cache import manifest as manifests
from calve.cache.content import measure
from calve.cache.findings import Finding, Kind
from calve.cache.lookup import narinfo_key
from calve.cache.lookup import verify as check_entry
from calve.cache.manifest import Manifest
from calve.cache.objects import MissingCacheError, Objects, check_key
from calve.cache.roots import Root
from calve.cache.scope import read_root
from calve.errors import (
    DamagedError,
    NotFoundError,
    SignatureError,
    UsageError,
    VerificationError,
)
from calve.nix.narinfo import MAX_NARINFO_BYTES, NarInfo
from calve.nix.signing import Keyring, Signature
from calve.nix.storepath import STORE_DIR, StorePath
from calve.tasks import Cancel

__all__ = ["INFO_KEY", "Claim", "Judge", "Looked", "ReadManifest"]

INFO_KEY = "nix-cache-info"


@dataclass(frozen=True, slots=True)
class Claim:
    """What a manifest says of a path, and which manifest."""

    entry: NarInfo
    manifest: str


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look at a narinfo, or at a NAR (`key` is empty), gave.

    Attributes:
        key: of the narinfo.
        path: where it is known.
        entry: where it can be used; it may have findings all the same.
        gone: it is not there.
        findings: what is the matter.
    """

    key: str = ""
    path: StorePath | None = None
    entry: NarInfo | None = None
    gone: bool = False
    findings: tuple[Finding, ...] = ()


@dataclass(slots=True)
class ReadManifest:
    """What reading a manifest gave; `wrong` has the paths whose NARs it says are outside of the cache."""

    digest: str
    manifest: Manifest | None = None
    findings: list[Finding] = field(default_factory=list)
    wrong: set[StorePath] = field(default_factory=set)


class Judge:
    """Judges objects of one cache.

    Args:
        objects: the cache.
        keyring: the trusted keys.
        sizes: bytes by key, as listed; None where the cache cannot be listed.
        claims: what manifests say of each path; one for each build. The owner adds to it.
    """

    def __init__(
        self,
        objects: Objects,
        keyring: Keyring,
        sizes: dict[str, int] | None,
        claims: dict[StorePath, list[Claim]],
    ) -> None:
        self._objects = objects
        self._keyring = keyring
        self._sizes = sizes
        self._claims = claims
        self._good: set[tuple[bytes, tuple[Signature, ...]]] = set()

    def info(self) -> Iterator[Finding]:
        """Judge `nix-cache-info`."""
        try:
            text = self._objects.get(INFO_KEY, MAX_NARINFO_BYTES).decode("utf-8", "replace")
        except MissingCacheError:
            raise
        except NotFoundError:
            why = "Nix needs it to know that this is a binary cache"
            yield Finding(Kind.MISSING, INFO_KEY, why)
            return
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        found = fields.get("StoreDir", "").strip()
        if found != STORE_DIR:
            yield Finding(
                Kind.CORRUPT, INFO_KEY, f"StoreDir is {found[:100]!r} instead of {STORE_DIR}"
            )

    def root(self, key: str, cancel: Cancel) -> tuple[str, Root | Finding | None]:
        """Read a root; None where it is not there."""
        cancel.check()
        try:
            return key, read_root(self._objects, key)
        except MissingCacheError:
            raise
        except NotFoundError:
            return key, None
        except VerificationError as error:
            return key, Finding(Kind.CORRUPT, key, error.message)
        except UsageError as error:
            return key, Finding(Kind.UNSUPPORTED, key, error.message)

    def manifest(self, digest: str, keeper: str | None, cancel: Cancel) -> ReadManifest:
        """Read a manifest and judge its signatures, and those of its paths.

        Args:
            digest: which.
            keeper: why it must be there; None where it need not.
            cancel: stops it.
        """
        cancel.check()
        key = manifests.key(digest)
        read = ReadManifest(digest)
        try:
            read.manifest, signatures, _ = manifests.read_signed(self._objects, digest)
        except MissingCacheError:
            raise
        except NotFoundError:
            if keeper is not None:
                read.findings.append(Finding(Kind.MISSING, key, keeper))
            return read
        except VerificationError as error:
            read.findings.append(Finding(Kind.CORRUPT, key, error.message))
            return read
        except UsageError as error:
            read.findings.append(Finding(Kind.UNSUPPORTED, key, error.message))
            return read
        self._signed(read, key, manifests.signed_bytes(digest), signatures, None)
        for entry in read.manifest.paths:
            info = entry.info
            self._signed(read, key, info.fingerprint, info.signatures, info.path)
            with contextlib.suppress(DamagedError):
                if not entry.url or check_key(entry.url):
                    continue
            why = f"{entry.url[:200]!r} leads out of the cache"
            read.findings.append(Finding(Kind.CORRUPT, key, why, info.path))
            read.wrong.add(info.path)
        return read

    def _signed(
        self,
        read: ReadManifest,
        key: str,
        message: bytes,
        signatures: tuple[Signature, ...],
        path: StorePath | None,
    ) -> None:
        known = hashlib.sha256(message).digest(), signatures
        if known in self._good:  # most paths stand in many manifests
            return
        try:
            self._keyring.verify(message, signatures, key)
        except SignatureError as error:
            read.findings.append(Finding(Kind.UNSIGNED, key, error.message, path))
        else:
            self._good.add(known)

    def narinfo(self, key: str, path: StorePath | None, cancel: Cancel) -> Looked:
        """Read a narinfo and judge it, and the size of its NAR."""
        cancel.check()
        place = f"{self._objects.url}/{key}"
        try:
            entry = NarInfo.parse(self._objects.get(key, MAX_NARINFO_BYTES), place)
            found = entry.info.path
            if narinfo_key(found) != key or path not in {None, found}:
                raise DamagedError(f"it is that of another path, {found}")
            check_key(entry.url)
        except MissingCacheError:
            raise
        except NotFoundError:
            return Looked(key, path, gone=True)
        except VerificationError as error:
            finding = Finding(Kind.CORRUPT, key, _why(error, place), path)
            return Looked(key, path, findings=(finding,))
        findings: list[Finding] = []
        try:
            check_entry(entry, self._keyring, place)
        except SignatureError as error:
            findings.append(Finding(Kind.UNSIGNED, key, error.message, found))
        except UsageError as error:
            findings.append(Finding(Kind.UNSUPPORTED, key, error.message, found))
        findings += self._compare(entry, key)
        findings += self.weigh(entry)
        return Looked(key, found, entry, findings=tuple(findings))

    def _compare(self, entry: NarInfo, key: str) -> Iterator[Finding]:
        """Hold a narinfo against the manifests that name its path."""
        fingerprint = entry.info.fingerprint
        claims = self._claims.get(entry.info.path, ())
        others = [claim for claim in claims if claim.entry.info.fingerprint != fingerprint]
        agreed = len(others) < len(claims)
        for claim in others:
            # A path that was built again may have two NARs: then each manifest still leads to its own.
            if not agreed or self.weigh(claim.entry):
                why = f"the manifest {claim.manifest} has another build of this path"
                yield Finding(Kind.DIFFERENT, key, why, entry.info.path)

    def weigh(self, entry: NarInfo) -> list[Finding]:
        """Hold the size of a NAR, as listed, against what its narinfo says."""
        key = entry.url
        size = None if self._sizes is None else self._sizes.get(key)
        if size is None or entry.file_size not in {None, size}:
            try:
                size = self._objects.head(key)  # written since, perhaps
            except DamagedError as error:
                return [Finding(Kind.CORRUPT, key, error.message, entry.info.path)]
        if size is None:
            return [_missing(entry)]
        if entry.file_size not in {None, size}:
            why = f"it has {size} bytes, its narinfo says {entry.file_size}"
            return [Finding(Kind.CORRUPT, key, why, entry.info.path)]
        return []

    def weigh_claim(self, claim: Claim, cancel: Cancel) -> Looked:
        """See that the NAR that a manifest names is there, whatever its size: it may have been repaired since."""
        cancel.check()
        return Looked(findings=tuple(self.weigh(replace(claim.entry, file_size=None))))

    def nar(
        self, entry: NarInfo, key: str, tell: Callable[[int], object], cancel: Cancel
    ) -> Looked:
        """Read a NAR whole.

        Args:
            entry: its path and place.
            key: of the narinfo whose word on the file is judged too; empty where it is a manifest's.
            tell: called with the size of each piece that was read.
            cancel: stops it.
        """
        path = entry.info.path
        try:
            found = measure(self._objects, entry, tell=tell, cancel=cancel)
        except MissingCacheError:
            raise
        except NotFoundError:
            return Looked(findings=(_missing(entry),))
        except VerificationError as error:
            return Looked(findings=(Finding(Kind.CORRUPT, entry.url, error.message, path),))
        except UsageError as error:
            return Looked(findings=(Finding(Kind.UNSUPPORTED, entry.url, error.message, path),))
        if entry.file_hash in {None, found.file_hash} or not key:
            return Looked()
        why = "FileHash is wrong; the NAR itself is right"
        return Looked(findings=(Finding(Kind.CORRUPT, key, why, path),))

    def dangles(self, key: str, referrer: StorePath) -> bool:
        """Say whether a narinfo that is referred to is not there, and what refers to it still is."""
        head = self._objects.head
        return head(narinfo_key(referrer)) is not None and head(key) is None


def _missing(entry: NarInfo) -> Finding:
    path = entry.info.path
    return Finding(Kind.MISSING, entry.url, f"it is the NAR of {path.basename}", path)


def _why(error: VerificationError, place: str) -> str:
    """Return an error's message, with the line where it names one."""
    where = "" if error.place is None else error.place.removeprefix(place)
    return f"line {where[1:]}: {error.message}" if where[:1] == ":" else error.message
