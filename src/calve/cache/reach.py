"""What a garbage collection keeps: everything that roots, pushes under way and young manifests lead to.

What is kept follows from manifests alone: of each of their paths the narinfo, and the NAR under its `url`. A narinfo
may name another NAR than a manifest does: another push amended it, or built the path anew. So every narinfo that
stays keeps the NAR that it names. Most are known without being read: a manifest's entry gives their very bytes, and
the tag of what S3 lists is the MD5 of these; the few others are read. A pending record keeps every NAR of its hashes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from calve.cache import manifest as manifests
from calve.cache import roots
from calve.cache.crew import Crew
from calve.cache.manifest import Manifest
from calve.cache.objects import Listed, Objects
from calve.cache.roots import Pending
from calve.errors import DamagedError, NotFoundError
from calve.nix.narinfo import MAX_NARINFO_BYTES, NarInfo
from calve.progress import Progress, Step, silent
from calve.tasks import Cancel

__all__ = ["Kind", "Reach", "Survey", "Tally", "kind_of", "survey"]

_DIGIT = "[0-9abcdfghijklmnpqrsvwxyz]"
_NARINFO = re.compile(rf"({_DIGIT}{{32}})\.narinfo")
_MANIFEST = re.compile(r"manifests/([0-9a-f]{64})\.json\.zst")
_NAR = re.compile(r"nar/[!-~]{1,1020}")  # of other keys there are no tombstones
_HASHED = re.compile(rf"nar/({_DIGIT}{{52}})(?!{_DIGIT})")
_STEP = 1000


class Kind(Enum):
    """What may be removed, in the order in which it is: nothing is left that leads to what is gone."""

    MANIFEST = "manifests"
    NARINFO = "narinfos"
    NAR = "nars"


def kind_of(key: str) -> Kind | None:
    """Return what an object is; None for what garbage collection never touches."""
    if _NAR.fullmatch(key):
        return Kind.NAR
    if _NARINFO.fullmatch(key):
        return Kind.NARINFO
    return Kind.MANIFEST if _MANIFEST.fullmatch(key) else None


@dataclass(slots=True)
class Tally:
    """Objects and bytes, by kind."""

    objects: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    bytes: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))

    def add(self, kind: Kind, size_bytes: int) -> None:
        """Count one."""
        self.objects[kind] += 1
        self.bytes[kind] += size_bytes

    @property
    def total(self) -> int:
        """Return how many objects."""
        return sum(self.objects.values())

    @property
    def total_bytes(self) -> int:
        """Return how many bytes."""
        return sum(self.bytes.values())


def _tag(entry: NarInfo) -> bytes:
    """Return the tag that S3 gives to an entry's narinfo, but for encryption by KMS."""
    return hashlib.md5(entry.dump(), usedforsecurity=False).digest()


def _tag_digest(tag: str) -> bytes | None:
    try:
        return bytes.fromhex(tag.strip('"'))
    except ValueError:
        return None


class Reach:
    """What is kept; it only grows.

    Args:
        objects: the cache.
        now_s: the time of the store's clock, epoch.
        grace_s: manifests that are younger, and pending records that were written since, keep things.
        cancel: stops reading.
    """

    def __init__(
        self, objects: Objects, now_s: float, grace_s: float, cancel: Cancel | None = None
    ) -> None:
        self._objects = objects
        self._now_s = now_s
        self._young_s = now_s - grace_s
        self._cancel = cancel or Cancel()
        self._manifests: set[str] = set()
        self._paths: set[str] = set()
        self._hashes: set[str] = set()
        self._urls: set[str] = set()
        self._tags: set[bytes] = set()
        self._seen: set[str] = set()  # tags of pending records
        self.roots = 0
        self.pending = 0
        self.over: list[Listed] = []
        """What pushes left that are long over: their records and paths."""

    @property
    def manifests(self) -> int:
        """Return how many manifests are kept."""
        return len(self._manifests)

    # Reading. In this order: a push has its manifest and its root before it removes its pending record.

    def read(self) -> None:
        """Read all that keeps something.

        Raises:
            DamagedError: a root, a pending record or a manifest that is kept is damaged or missing: what is
                reachable cannot be known.
            UsageError: one of them has a version that we do not read.
        """
        self.read_pending()
        for root, _ in roots.list_roots(self._objects):
            self.roots += 1
            self.add_manifest(root.manifest, f"{self._objects.url}/{root.key}")
        for listed in self._objects.list("manifests/"):
            if self._young(listed):
                self.add_manifest_at(listed.key)

    def _young(self, listed: Listed) -> bool:
        return listed.modified_s >= self._young_s

    def _is_over(self, pending: Pending, listed: Listed) -> bool:
        """Say whether a push is: its own clock may be wrong, the store's says when it last gave a sign of life."""
        return pending.expires.timestamp() < self._now_s and not self._young(listed)

    def read_pending(self) -> None:
        """Read the pending records that are new or changed, and keep what they name."""
        for pending, listed in roots.list_pending(
            self._objects, known=self._seen, over=self._is_over
        ):
            self._cancel.check()
            self._seen.add(listed.tag)
            if self._is_over(pending, listed):
                self.over.append(listed)
                continue
            self.pending += 1
            for digits in pending.paths:
                (self._paths if len(digits) == 32 else self._hashes).add(digits)
            if pending.previous is not None:
                self.add_manifest(pending.previous, f"{self._objects.url}/{listed.key}")

    def add_manifest(self, digest: str, place: str) -> None:
        """Keep a manifest and all that it names; `place` is what keeps it."""
        if digest in self._manifests:
            return
        self._cancel.check()
        try:
            manifest = manifests.read(self._objects, digest)
        except NotFoundError as error:
            if type(error) is not NotFoundError:
                raise
            raise DamagedError(
                f"the manifest {digest} that it keeps is missing: what is reachable cannot be known",
                place=place,
                hint="push the closure again, or remove what keeps the manifest",
            ) from error
        except DamagedError as error:
            raise DamagedError(
                f"the manifest that it keeps is damaged: {error}",
                place=place,
                hint="push the closure again, or remove what keeps the manifest",
            ) from error
        self._manifests.add(digest)
        self._add_entries(manifest)

    def add_manifest_at(self, key: str) -> None:
        """Keep the manifest that lies there, and all that it names."""
        found = _MANIFEST.fullmatch(key)
        if found and key == manifests.key(found[1]):
            self.add_manifest(found[1], f"{self._objects.url}/{key}")

    def _add_entries(self, manifest: Manifest) -> None:
        for entry in manifest.paths:
            if entry.url:
                self._paths.add(entry.info.path.digest)
                self._urls.add(entry.url)
                self._tags.add(_tag(entry))

    # Deciding

    def keeps(self, key: str) -> bool:
        """Say whether an object is kept; True for all that garbage collection never touches."""
        if found := _MANIFEST.fullmatch(key):
            return found[1] in self._manifests
        if found := _NARINFO.fullmatch(key):
            return found[1] in self._paths
        if not _NAR.fullmatch(key) or key in self._urls:
            return True
        hashed = _HASHED.match(key)
        return hashed is not None and hashed[1] in self._hashes

    def knows(self, narinfo: Listed) -> bool:
        """Say whether a narinfo is, to the byte, that of a manifest's entry: its NAR is kept."""
        return _tag_digest(narinfo.tag) in self._tags

    def add_narinfos(self, keys: Iterable[str], jobs: int) -> None:
        """Keep the NARs that some narinfos name; one that is gone or unreadable names none."""
        with Crew[str]("narinfo", jobs=jobs, cancel=self._cancel) as crew:
            for key in keys:
                crew.add(partial(self._nar_of, key))
            self._urls.update(crew)

    def _nar_of(self, key: str, cancel: Cancel) -> str:
        cancel.check()
        try:
            return NarInfo.parse(self._objects.get(key, MAX_NARINFO_BYTES), key).url
        except (NotFoundError, DamagedError):
            return ""


@dataclass(slots=True)
class Survey:
    """What a look at the whole cache found: everything, and what may be removed."""

    listed: Tally
    found: dict[Kind, list[Listed]]

    @property
    def tally(self) -> Tally:
        """Count what may be removed."""
        tally = Tally()
        for kind, some in self.found.items():
            for one in some:
                tally.add(kind, one.size_bytes)
        return tally

    def sorted(self) -> list[Listed]:
        """Return what may be removed, sorted by the bytes of the keys."""
        return sorted((one for some in self.found.values() for one in some), key=_key)


def _key(listed: Listed) -> str:
    return listed.key


def survey(
    objects: Objects,
    reach: Reach,
    removable: Callable[[Listed], bool],
    *,
    jobs: int,
    progress: Progress = silent,
    cancel: Cancel | None = None,
) -> Survey:
    """List the whole cache and find what is removable and not kept, by a manifest or by a narinfo that stays.

    Args:
        objects: the cache.
        reach: what is kept; the NARs of narinfos that stay are added.
        removable: says whether this version of an object may be removed where nothing keeps it.
        jobs: how many narinfos are read at once.
        progress: is told how many objects there were.
        cancel: stops it.
    """
    made = Survey(Tally(), {kind: [] for kind in Kind})
    unknown: list[str] = []
    for count, listed in enumerate(objects.list("")):
        if count % _STEP == 0:
            progress(Step("list", count, unit="objects"))
            if cancel is not None:
                cancel.check()
        kind = kind_of(listed.key)
        if kind is None:
            continue
        made.listed.add(kind, listed.size_bytes)
        if not reach.keeps(listed.key) and removable(listed):
            made.found[kind].append(listed)
        elif kind is Kind.NARINFO and not reach.knows(listed):
            unknown.append(listed.key)
    nars = made.found[Kind.NAR]
    if nars and unknown:
        reach.add_narinfos(unknown, jobs)
        made.found[Kind.NAR] = [one for one in nars if not reach.keeps(one.key)]
    return made
