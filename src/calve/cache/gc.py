"""Garbage collection of a cache: mark, wait, look again, remove. Safe beside pushes, readers and other collectors.

Each run does what is due. **Mark**: everything is listed; what nothing keeps (`cache.reach`) and is older than the
grace gets a tombstone, `gc.json` says so (`cache.tombstones`), and every root under `roots/push/` is told. **Wait**:
for the grace, an hour at least. A push that looks at what exists writes its pending record first and reads the
tombstones then; it relies on none of what has one. **Sweep**: the record says `sweeping`; from then on no push begins
to rely on what has a tombstone, and whoever did so before has a pending record, a root or a young manifest. These are
read anew, everything is listed anew, and what is still not kept, in the version that got the tombstone, is removed:
manifests, then narinfos, then NARs. Before each batch the sweeper renews its lease on the record, so that there is
one, and reads the pending records that are new.

All times are the store's: a run writes `gc/clock` and sees when that was. Only tombstones are believed while
removing; only `manifests/`, `nar/` and narinfos ever get one.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from calve.cache import roots, tombstones
from calve.cache.objects import Listed, Objects
from calve.cache.reach import Kind, Reach, Survey, Tally, survey
from calve.cache.tombstones import DONE, MARKED, SWEEPING, Collection
from calve.cache.turns import StoreTime, SweepLease, time_of, write_record
from calve.clock import SYSTEM, Clock
from calve.errors import ConflictError, UsageError
from calve.progress import Note, Progress, silent
from calve.progress import Step as Done
from calve.tasks import Cancel

__all__ = ["DAY_S", "LEAST_GRACE_S", "Collected", "Step", "next_step", "run"]

DAY_S = 86_400
LEAST_GRACE_S = 3600
_BATCH = 1000  # of one DeleteObjects
_PUSHED = "roots/push/"
_TRIES = 10
_TOMBSTONES = re.compile(r"gc/(.+)\.tombstones\.zst")


class Step(Enum):
    """What a run has to do next."""

    MARK = "mark"
    TELL = "tell"
    WAIT = "wait"
    SWEEP = "sweep"
    YIELD = "yield"


@dataclass(frozen=True, slots=True)
class Collected:
    """What a run did, or with `dry_run` would do.

    Attributes:
        dry_run: nothing was written.
        collection: the one under way, or the last; None where there never was one.
        due: when its sweep may begin; None where none is waited for.
        listed: what the cache has.
        marked: what got tombstones, or would; None where this run did not mark.
        removed: None where this run did not sweep.
        spared: of the objects that had tombstones, how many were not removed: kept again, changed, or gone.
        kept_roots: how many roots were read.
        kept_pending: how many pushes under way.
        kept_manifests: how many manifests are kept, by these or because they are young.
    """

    dry_run: bool
    collection: Collection | None = None
    due: datetime.datetime | None = None
    listed: Tally | None = None
    marked: Tally | None = None
    removed: Tally | None = None
    spared: int = 0
    kept_roots: int = 0
    kept_pending: int = 0
    kept_manifests: int = 0


def next_step(
    collection: Collection | None, written_s: float, now_s: float, grace_s: float
) -> Step:
    """Decide what to do.

    Args:
        collection: of `gc.json`; None where there is none.
        written_s: when that was written, by the store's clock.
        now_s: by the same clock.
        grace_s: that is wanted now; the collection's own counts where it is longer.
    """
    if collection is None or collection.state == DONE:
        return Step.MARK
    if collection.state == SWEEPING:
        lease = collection.expires
        return Step.SWEEP if lease is None or lease.timestamp() <= now_s else Step.YIELD
    if not collection.told:
        return Step.TELL
    return Step.SWEEP if _due_s(collection, written_s, grace_s) <= now_s else Step.WAIT


def _due_s(collection: Collection, written_s: float, grace_s: float) -> float:
    return max(collection.marked.timestamp(), written_s) + max(collection.grace_s, grace_s)


def run(
    objects: Objects,
    *,
    grace_s: int = DAY_S,
    dry_run: bool | None = None,
    wait: bool = False,
    jobs: int = 8,
    progress: Progress = silent,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
) -> Collected:
    """Do what is due: sweep what was marked before the grace, and mark what nothing keeps now.

    Args:
        objects: the cache.
        grace_s: how old something must be before it gets a tombstone, and how long it has one before it is removed.
        dry_run: write nothing, only say what would get tombstones. By default for a cache without a `gc.json`.
        wait: until what has a tombstone may be removed, and remove it.
        jobs: how many narinfos are read at once.
        progress: is told.
        cancel: stops it; the next run goes on.
        clock: measures how long it lasts, and waits.

    Raises:
        UsageError: the grace is too short, or a record is of another version.
        DamagedError: what is reachable cannot be known: a root, a pending record, or a manifest that is kept is
            damaged or missing; the place names it. Nothing was removed since that was found.
        ConflictError: another collector is removing objects.
    """
    if grace_s < LEAST_GRACE_S:
        raise UsageError(
            f"a grace of {grace_s} s is too short",
            hint=f"pushes count on {LEAST_GRACE_S} s at least",
        )
    collector = _Collector(objects, grace_s, jobs, progress, cancel or Cancel(), clock)
    if dry_run or (dry_run is None and tombstones.read(objects) is None):
        return collector.rehearse()
    return collector.run(wait=wait)


class _Collector:
    """One run."""

    def __init__(
        self,
        objects: Objects,
        grace_s: int,
        jobs: int,
        progress: Progress,
        cancel: Cancel,
        clock: Clock,
    ) -> None:
        self._objects = objects
        self._grace_s = grace_s
        self._jobs = jobs
        self._progress = progress
        self._cancel = cancel
        self._clock = clock
        self._result = Collected(dry_run=False)

    # What is due

    def rehearse(self) -> Collected:
        """Say what a run would give tombstones; this machine's clock has to do."""
        now_s = self._clock.now().timestamp()
        found = tombstones.read(self._objects)
        collection = None if found is None else found[0]
        _, seen = self._survey(now_s)
        return replace(
            self._result,
            dry_run=True,
            collection=collection,
            due=self._due(collection),
            marked=seen.tally,
        )

    def run(self, *, wait: bool) -> Collected:
        """Do all that is due."""
        waited = False
        time = StoreTime(self._objects, self._clock)
        while True:
            self._cancel.check()
            found = tombstones.read(self._objects)
            collection, tag = (None, None) if found is None else found
            written_s = self._written_s() if collection is not None else 0.0
            match next_step(collection, written_s, time.now_s(), self._grace_s), collection, tag:
                case Step.MARK, _, _:
                    if waited or self._result.marked is not None:
                        break
                    self._mark(time, collection, tag)
                case Step.TELL, Collection(), str():
                    self._tell(collection, tag)
                case Step.SWEEP, Collection(), str():
                    self._sweep(time, collection, tag)
                case Step.WAIT, Collection(), _ if wait:
                    waited = True
                    left_s = _due_s(collection, written_s, self._grace_s) - time.now_s()
                    self._progress(
                        Note(f"waiting {left_s / 60:.0f} min before anything is removed")
                    )
                    self._cancel.wait(left_s, self._clock)
                    time = StoreTime(self._objects, self._clock)
                case Step.YIELD, Collection(expires=datetime.datetime() as expires), _:
                    raise ConflictError(
                        "another collector is removing objects",
                        place=f"{self._objects.url}/{tombstones.RECORD}",
                        hint=f"if it was killed, a run after {expires:%Y-%m-%dT%H:%M:%SZ} goes on",
                    )
                case _:
                    break
        return replace(self._result, collection=collection, due=self._due(collection))

    def _written_s(self) -> float:
        for one in self._objects.list(tombstones.RECORD):
            if one.key == tombstones.RECORD:
                return one.modified_s
        return 0.0

    def _due(self, collection: Collection | None) -> datetime.datetime | None:
        if collection is None or collection.state != MARKED or not collection.told:
            return None
        return time_of(_due_s(collection, self._written_s(), self._grace_s))

    # What both marking and sweeping do

    def _survey(
        self, now_s: float, chosen: dict[str, str] | None = None, before_s: float | None = None
    ) -> tuple[Reach, Survey]:
        """Find what nothing keeps and is older than the grace; of `chosen`, by keys, only versions of these tags."""
        reach = Reach(self._objects, now_s, self._grace_s, self._cancel)
        reach.read()
        old_s = now_s - self._grace_s if before_s is None else before_s

        def removable(one: Listed) -> bool:
            return one.modified_s < old_s and (chosen is None or chosen.get(one.key) == one.tag)

        seen = survey(
            self._objects,
            reach,
            removable,
            jobs=self._jobs,
            progress=self._progress,
            cancel=self._cancel,
        )
        self._result = replace(
            self._result,
            listed=seen.listed,
            kept_roots=reach.roots,
            kept_pending=reach.pending,
            kept_manifests=reach.manifests,
        )
        return reach, seen

    # Marking

    def _mark(self, time: StoreTime, last: Collection | None, tag: str | None) -> None:
        """Give tombstones to what nothing keeps; a collection without any is done at once."""
        now_s = time.now_s()
        reach, seen = self._survey(now_s)
        self._tidy(reach, now_s, None if last is None else last.id)
        tally = seen.tally
        marked = time_of(time.now_s())
        name = f"{marked:%Y%m%d%H%M%S}-{secrets.token_hex(4)}"
        made = Collection(name, DONE, marked, self._grace_s, 0, 0, told=True, swept=marked)
        if tally.total:
            made = Collection(name, MARKED, marked, self._grace_s, tally.total, tally.total_bytes)
            tombstones.write_tombstones(self._objects, name, seen.sorted())
        self._cancel.check()
        write_record(self._objects, made, tag)
        self._result = replace(self._result, marked=tally)

    def _tidy(self, reach: Reach, now_s: float, last: str | None) -> None:
        """Remove what pushes and collections that are long over left."""
        for listed in reach.over:
            self._objects.delete(listed.key, match=listed.tag)
        old_s = now_s - self._grace_s
        there = {one.key: one for one in self._objects.list("pending/")}
        for key, one in there.items():
            record = f"{key.removesuffix('.paths')}.json"
            if key.endswith(".paths") and record not in there and one.modified_s < old_s:
                self._objects.delete(key, match=one.tag)
        for one in self._objects.list(tombstones.PREFIX):
            found = _TOMBSTONES.fullmatch(one.key)
            if found and found[1] != last and one.modified_s < old_s:
                self._objects.delete(one.key, match=one.tag)

    def _tell(self, collection: Collection, tag: str) -> None:
        """Have every push's root name the collection; the grace begins once all do."""
        self._name_in_roots(collection)
        write_record(self._objects, replace(collection, told=True), tag)

    def _name_in_roots(self, collection: Collection) -> None:
        self._change_roots(lambda root: replace(root, gc=collection.id))

    def _change_roots(self, change: Callable[[roots.Root], roots.Root]) -> None:
        for listed in self._objects.list(_PUSHED):
            self._cancel.check()
            _, owner, name = listed.key.split("/", 2)
            for _ in range(_TRIES):
                found = roots.tagged_root(self._objects, owner, name.removesuffix(".json"))
                if found is None or change(found[0]) == found[0]:
                    break
                if roots.write_root(self._objects, change(found[0]), match=found[1]):
                    break
            else:
                raise ConflictError(
                    "others keep writing to it", place=f"{self._objects.url}/{listed.key}"
                )

    # Sweeping

    def _sweep(self, time: StoreTime, collection: Collection, tag: str) -> None:
        """Remove what has a tombstone and still is not kept."""
        lease = SweepLease(self._objects, time, collection, tag)
        lease.renew()  # from here on, no push begins to rely on what has a tombstone
        self._name_in_roots(collection)  # those too that came since they were told
        chosen = {
            one.key: one.tag for one in tombstones.read_tombstones(self._objects, collection.id)
        }
        before_s = collection.marked.timestamp() - collection.grace_s
        reach, seen = self._survey(time.now_s(), chosen, before_s)
        total = seen.tally.total
        chosen.clear()
        removed = Tally()
        for kind, batch in _batches(seen.found):
            gone = self._remove(lease, reach, kind, batch)
            for one in gone:
                removed.add(kind, one.size_bytes)
            lease.count(len(gone), sum(one.size_bytes for one in gone))
            self._progress(Done("remove", removed.total, total, "objects"))
        # Where somebody was sweeping already and was stopped, nobody knows what he removed.
        if removed.total or collection.state == SWEEPING:
            self._change_roots(lambda root: replace(root, checked=False))
        lease.finish()
        self._result = replace(
            self._result, removed=removed, spared=collection.objects - removed.total
        )

    def _remove(
        self, lease: SweepLease, reach: Reach, kind: Kind, batch: Sequence[Listed]
    ) -> list[Listed]:
        """Remove a batch but for what is kept by now; return what is gone."""
        while True:
            self._cancel.check()
            lease.renew()
            reach.read_pending()
            todo = [one for one in batch if not reach.keeps(one.key)]
            if lease.fresh:
                break
        if (
            kind is Kind.NARINFO
        ):  # those that a push wants by now keep their NARs, whatever they are
            reach.add_narinfos([one.key for one in batch if reach.keeps(one.key)], self._jobs)
        if not todo:
            return []
        stayed = self._objects.delete_many(todo)
        # What changed at the last moment is somebody's: what it names stays with it.
        if stayed and kind is Kind.MANIFEST:
            for one in stayed:
                reach.add_manifest_at(one.key)
        if stayed and kind is Kind.NARINFO:
            reach.add_narinfos([one.key for one in stayed], self._jobs)
        there = {one.key for one in stayed}
        return [one for one in todo if one.key not in there]


def _batches(found: Mapping[Kind, Sequence[Listed]]) -> Iterator[tuple[Kind, Sequence[Listed]]]:
    """Cut what may be removed into batches of one kind, in the order of kinds."""
    for kind in Kind:
        some = found[kind]
        for start in range(0, len(some), _BATCH):
            yield kind, some[start : start + _BATCH]
