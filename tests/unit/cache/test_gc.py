"""Garbage collection of a cache in memory, under a clock of its own."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest

from calve.cache import gc, manifest, roots, tombstones
from calve.cache.gc import Step, next_step
from calve.cache.manifest import Manifest
from calve.cache.reach import Kind
from calve.cache.roots import Pending, Root
from calve.cache.tombstones import Collection
from calve.errors import ConflictError, DamagedError, TransientError, UsageError
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.storepath import StorePath

BEGIN = datetime.datetime(2026, 11, 23, 6, 0, 0, tzinfo=datetime.UTC)
DAY, HOUR = 86_400, 3600


class Time:
    """The store's clock and the collector's, which is `skew_s` ahead of it."""

    def __init__(self, skew_s: float = 0) -> None:
        self.s = BEGIN.timestamp()
        self.skew_s = skew_s
        self.slept_s = 0.0

    def monotonic(self) -> float:
        return self.s - self.slept_s - 1e9

    def sleep(self, seconds: float) -> None:
        """Let the machine sleep: its monotonic clock stands still."""
        self.s += seconds
        self.slept_s += seconds

    def now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.s + self.skew_s, datetime.UTC)

    def wait(self, event, seconds: float) -> bool:
        self.s += seconds
        return event.is_set()


def entry(name: str, references=(), build: str = "") -> NarInfo:
    path = StorePath(encode32(hashlib.sha256(name.encode()).digest()[:20]), name)
    nar_hash = Hash("sha256", hashlib.sha256(f"{name}{build}".encode()).digest())
    info = PathInfo(path, nar_hash, 100, tuple(sorted(one.info.path for one in references)))
    return NarInfo(info, f"nar/{encode32(nar_hash.digest)}.nar.zst", "zstd", file_size=9)


def narinfo_key(one: NarInfo) -> str:
    return f"{one.info.path.digest}.narinfo"


class Shelf:
    """A cache, and how closures get into it without a push."""

    def __init__(self, memory, skew_s: float = 0) -> None:
        self.time = Time(skew_s)
        self.cache = memory()
        self.cache.now_s = lambda: self.time.s
        self.cache.data["nix-cache-info"] = b"StoreDir: /nix/store\n"

    def put(self, *entries: NarInfo) -> None:
        for one in entries:
            self.cache.put(one.url, f"nar of {one.info.path}".encode())
            self.cache.put(narinfo_key(one), one.dump())

    def manifest(self, *entries: NarInfo) -> str:
        """Put a closure with its manifest; the first entry is the toplevel."""
        self.put(*(one for one in entries if one.url))
        body = Manifest(entries[0].info.path, entries).dump()
        digest = manifest.digest_of(body)
        self.cache.put(manifest.key(digest), manifest.pack(body))
        return digest

    def root(self, digest: str, name: str = "web", owner: str = "push") -> None:
        roots.write_root(self.cache, Root(owner, name, digest, self.time.now(), checked=True))

    def pending(self, *entries: NarInfo, name: str = "p", lasts_s=HOUR, **more) -> None:
        infos = [one.info for one in entries]
        made = Pending.of(name, infos, now=self.time.now(), lasts_s=lasts_s, **more)
        roots.write_pending(self.cache, made)

    def gc(self, **more):
        return gc.run(self.cache, dry_run=False, clock=self.time, jobs=2, **more)

    def collect(self, **more):
        """Mark, wait and sweep."""
        return self.gc(wait=True, **more)

    def has(self, *entries: NarInfo) -> bool:
        there = [key in self.cache.data for one in entries for key in (one.url, narinfo_key(one))]
        assert len(set(there)) == 1, "half of it"
        return there[0]

    @property
    def record(self) -> Collection:
        return tombstones.read(self.cache)[0]


@pytest.fixture
def shelf(memory):
    return Shelf(memory)


LIB, TOOL, OLD, NEW = entry("lib"), entry("tool"), entry("old"), entry("new")
TOP = entry("top", [LIB, TOOL])


@pytest.fixture
def stock(shelf):
    """Make a cache with a closure that a root keeps and one that nothing keeps, two days old."""
    kept = shelf.manifest(TOP, LIB, TOOL)
    shelf.root(kept)
    gone = shelf.manifest(OLD)
    shelf.time.s += 2 * DAY
    return SimpleNamespace(shelf=shelf, kept=kept, gone=gone, cache=shelf.cache)


# Decisions


@pytest.mark.parametrize(
    ("collection", "now_s", "step"),
    [
        (None, 0, Step.MARK),
        ({"state": "done"}, 0, Step.MARK),
        ({"told": False}, 10**6, Step.TELL),
        ({}, 2000 + 7200 - 1, Step.WAIT),
        ({}, 2000 + 7200, Step.SWEEP),
        ({"grace_s": 9000}, 2000 + 9000 - 1, Step.WAIT),
        ({"state": "sweeping", "sweeper": "a", "expires": 5000}, 4999, Step.YIELD),
        ({"state": "sweeping", "sweeper": "a", "expires": 5000}, 5000, Step.SWEEP),
    ],
)
def test_each_run_does_what_is_due(collection, now_s, step) -> None:
    if collection is not None:
        at = datetime.datetime.fromtimestamp
        if "expires" in collection:
            collection = {**collection, "expires": at(collection["expires"], datetime.UTC)}
        base = Collection("id", "marked", at(1000, datetime.UTC), HOUR, 1, 1, told=True)
        collection = replace(base, **collection)
    assert next_step(collection, 2000, now_s, 7200) is step


# The life of a collection


def test_what_nothing_keeps_is_marked_and_removed_after_the_grace(stock) -> None:
    before = dict(stock.cache.data)
    marked = stock.shelf.gc()
    assert marked.marked.objects == {Kind.MANIFEST: 1, Kind.NARINFO: 1, Kind.NAR: 1}
    assert marked.removed is None
    assert marked.due == stock.shelf.time.now() + datetime.timedelta(days=1)
    assert set(before) <= set(stock.cache.data)
    assert stock.shelf.record.state == "marked"
    assert roots.read_root(stock.cache, "push", "web").gc == stock.shelf.record.id
    stock.shelf.time.s += DAY - 60
    assert stock.shelf.gc().removed is None, "the grace is not over"
    assert stock.shelf.has(OLD)
    stock.shelf.time.s += 120
    swept = stock.shelf.gc()
    assert swept.removed.objects == {Kind.MANIFEST: 1, Kind.NARINFO: 1, Kind.NAR: 1}
    assert swept.removed.total_bytes == marked.marked.total_bytes
    assert not stock.shelf.has(OLD)
    assert manifest.key(stock.gone) not in stock.cache.data
    assert stock.shelf.has(TOP, LIB, TOOL)
    assert manifest.read(stock.cache, stock.kept).paths
    assert not roots.read_root(stock.cache, "push", "web").checked
    assert swept.marked.total == 0, "and marked again"
    assert stock.shelf.record.state == "done"


def test_one_waits_and_removes_where_it_is_told_to(stock) -> None:
    swept = stock.shelf.collect(grace_s=HOUR)
    assert (swept.marked.total, swept.removed.total, swept.spared) == (3, 3, 0)
    assert stock.shelf.record.state == "done"
    assert stock.shelf.record.removed_objects == 3
    assert stock.shelf.record.removed_bytes == swept.removed.total_bytes
    assert not stock.shelf.has(OLD)


def test_manifests_go_first_and_nars_last(stock) -> None:
    gone = []
    whole = stock.cache.delete_many

    def delete_many(listed):
        gone.extend(one.key for one in listed)
        return whole(listed)

    stock.cache.delete_many = delete_many
    stock.shelf.collect()
    assert gone == [manifest.key(stock.gone), narinfo_key(OLD), OLD.url]


def test_the_first_run_only_says_what_it_would_do(stock) -> None:
    before = dict(stock.cache.data)
    told = gc.run(stock.cache, clock=stock.shelf.time)
    assert told.dry_run
    assert told.marked.total == 3
    assert (told.kept_roots, told.kept_manifests) == (1, 1)
    assert told.listed.total == 10
    assert stock.cache.data == before
    stock.shelf.collect()
    assert not gc.run(stock.cache, clock=stock.shelf.time).dry_run


def test_a_rehearsal_says_what_is_under_way(stock) -> None:
    stock.shelf.gc()
    before = dict(stock.cache.data)
    told = gc.run(stock.cache, dry_run=True, clock=stock.shelf.time)
    assert told.dry_run
    assert told.collection == stock.shelf.record
    assert told.due is not None
    assert stock.cache.data == before


def test_a_cache_without_garbage_is_done_at_once(shelf) -> None:
    shelf.root(shelf.manifest(TOP, LIB, TOOL))
    shelf.time.s += 2 * DAY
    assert shelf.collect().marked.total == 0
    assert shelf.record.state == "done"
    assert not [key for key in shelf.cache.data if "tombstones" in key]


def test_a_short_grace_is_refused(shelf) -> None:
    with pytest.raises(UsageError, match="too short"):
        shelf.gc(grace_s=3599)
    assert not shelf.cache.calls


# What is kept


@pytest.mark.parametrize("owner", ["push", "pin", "web"])
def test_a_root_of_any_owner_keeps(stock, owner) -> None:
    stock.shelf.root(stock.gone, "other", owner)
    assert stock.shelf.collect().marked.total == 0
    assert stock.shelf.has(OLD)


def test_what_is_young_is_kept(stock) -> None:
    digest = stock.shelf.manifest(NEW)
    del stock.cache.data[manifest.key(digest)]
    stock.shelf.collect()
    assert stock.shelf.has(NEW)
    assert not stock.shelf.has(OLD)


def test_a_young_manifest_keeps_what_is_old(stock) -> None:
    entries = [entry("young", [OLD]), OLD]
    body = Manifest(entries[0].info.path, tuple(entries)).dump()
    stock.shelf.put(entries[0])
    digest = manifest.digest_of(body)
    stock.cache.put(manifest.key(digest), manifest.pack(body))
    marked = stock.shelf.gc().marked
    assert marked.objects == {Kind.MANIFEST: 1, Kind.NARINFO: 0, Kind.NAR: 0}


@pytest.mark.parametrize("many", [0, 1000])
def test_a_push_under_way_keeps(stock, many) -> None:
    others = [entry(f"p{n}") for n in range(many)]
    stock.shelf.pending(OLD, *others, lasts_s=30 * DAY)
    marked = stock.shelf.gc().marked
    assert marked.objects == {Kind.MANIFEST: 1, Kind.NARINFO: 0, Kind.NAR: 0}
    stock.shelf.time.s += 2 * DAY
    stock.shelf.gc()
    assert stock.shelf.has(OLD)


def test_the_manifest_that_a_push_builds_on_is_kept(stock) -> None:
    stock.shelf.pending(NEW, previous=stock.gone, lasts_s=30 * DAY)
    assert stock.shelf.gc().marked.total == 0


def test_a_push_whose_clock_is_behind_keeps(memory) -> None:
    shelf = Shelf(memory)
    gone = shelf.manifest(OLD)
    shelf.time.s += 2 * DAY
    shelf.time.skew_s = -7 * DAY
    shelf.pending(OLD, lasts_s=HOUR)  # expired, by the store's clock; but it was written just now
    shelf.time.skew_s = 0
    assert shelf.gc().marked.objects[Kind.NAR] == 0
    assert manifest.key(gone) in shelf.cache.data


@pytest.mark.parametrize("many", [0, 1000])
def test_what_a_dead_push_left_goes(stock, many) -> None:
    stock.shelf.pending(OLD, *(entry(f"p{n}") for n in range(many)), lasts_s=HOUR)
    stock.shelf.time.s += 2 * DAY
    stock.cache.put("pending/young.paths", b"")
    stock.shelf.gc()
    assert [key for key in stock.cache.data if "pending/" in key] == ["pending/young.paths"]
    stock.shelf.time.s += 2 * DAY
    stock.shelf.gc()
    assert not [key for key in stock.cache.data if "pending/" in key]
    assert not stock.shelf.has(OLD)


def test_a_dead_push_whose_paths_are_gone_does_not_stop_it(stock) -> None:
    stock.shelf.pending(*(entry(f"p{n}") for n in range(1000)), lasts_s=HOUR)
    del stock.cache.data["pending/p.paths"]
    with pytest.raises(DamagedError, match="paths are missing"):
        stock.shelf.gc()
    stock.shelf.time.s += 2 * DAY
    stock.shelf.gc()
    assert "pending/p.json" not in stock.cache.data


def test_paths_that_are_elsewhere_keep_nothing(stock) -> None:
    elsewhere = replace(OLD, url="", compression="none", file_size=None)
    digest = stock.shelf.manifest(entry("skips", [OLD]), elsewhere)
    stock.shelf.root(digest, "other")
    stock.shelf.collect()
    assert not stock.shelf.has(OLD)


FOREIGN = [
    "nix-cache-info",
    "keyring.json",
    "fleets/web/release-00000001.json",
    "boot-reports/i-1/x.json",
    "manifests/readme.txt",
    "manifests/" + "a" * 63 + ".json.zst",
    "log/" + "a" * 32 + "-x.drv",
    "x/" + "a" * 32 + ".narinfo",
    "a" * 32 + ".ls",
    "a" * 31 + ".narinfo",
    "e" * 32 + ".narinfo",  # no digit of Nix's
    "narinfo",
    "nar",
    "other/nar/x.nar.zst",
    "realisations/sha256:x!out.doi",
]


def test_nothing_else_is_ever_touched(stock) -> None:
    for key in FOREIGN:
        stock.cache.data[key] = b"x"
        stock.cache.written[key] = 0
    stock.shelf.collect()
    assert set(FOREIGN) <= set(stock.cache.data)
    assert not stock.shelf.has(OLD)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_the_nar_that_a_kept_narinfo_names_is_kept(stock, rebuilt) -> None:
    """Another push amended the narinfo of a path that is kept, and its manifest is gone."""
    other = entry("lib", build="another") if rebuilt else replace(LIB, url=f"{LIB.url[:-3]}xz")
    stock.cache.data[other.url] = b"another nar"
    stock.cache.data[narinfo_key(LIB)] = other.dump()
    stock.shelf.collect()
    assert other.url in stock.cache.data
    assert LIB.url in stock.cache.data
    assert not stock.shelf.has(OLD)


def test_the_nar_of_a_young_narinfo_is_kept(stock) -> None:
    """An interrupted push, whose record is gone, found an old NAR and wrote the narinfo."""
    stock.cache.put(narinfo_key(NEW), NEW.dump())
    stock.cache.data[NEW.url] = b"nar"
    stock.shelf.gc()
    assert NEW.url not in [
        one.key for one in tombstones.read_tombstones(stock.cache, stock.shelf.record.id)
    ]


def test_two_nars_of_a_path_are_one_too_many(stock) -> None:
    """The plain key is left over where a push had to take another."""
    left = f"nar/{LIB.url[4:56]}-gc1.nar.zst"
    stock.cache.data[left] = b"nar"
    stock.shelf.collect()
    assert left not in stock.cache.data
    assert stock.shelf.has(LIB)


@pytest.mark.parametrize("text", [b"", b"StorePath: x\n"])
def test_a_narinfo_that_cannot_be_read_names_no_nar(stock, text) -> None:
    stock.cache.data[narinfo_key(LIB)] = text
    stock.shelf.collect()
    assert LIB.url in stock.cache.data  # the manifest does


# Second thoughts: between mark and sweep


def test_what_is_kept_again_is_spared(stock) -> None:
    stock.shelf.gc()
    stock.shelf.root(stock.gone, "again")
    stock.shelf.time.s += 2 * DAY
    swept = stock.shelf.gc()
    assert (swept.removed.total, swept.spared) == (0, 3)
    assert stock.shelf.has(OLD)
    assert roots.read_root(stock.cache, "push", "web").checked, "nothing was removed"


def test_a_version_that_came_later_is_spared(stock) -> None:
    stock.shelf.gc()
    stock.cache.put(narinfo_key(OLD), OLD.dump() + b"Calve-Kept: again\n")
    stock.shelf.time.s += 2 * DAY
    stock.shelf.gc()
    assert stock.shelf.has(OLD), "its narinfo stays, and so does its NAR"
    assert manifest.key(stock.gone) not in stock.cache.data


def test_another_version_is_spared_whatever_its_time_says(stock) -> None:
    """S3 gives an object that came in parts the time at which its upload began."""
    stock.shelf.gc()
    stock.cache.data[OLD.url] = b"other bytes"
    stock.shelf.time.s += 2 * DAY
    stock.shelf.gc()
    assert OLD.url in stock.cache.data


def test_a_sweep_is_announced_before_anything_is_read(stock) -> None:
    stock.shelf.gc()
    stock.shelf.time.s += 2 * DAY
    states = []

    def look(method: str, key: str) -> None:
        if method == "list" and key == "pending/" and not states:
            states.append(Collection.parse(stock.cache.data["gc.json"]).state)

    stock.cache.before = look
    stock.shelf.gc()
    assert states == ["sweeping"]


def test_the_same_bytes_written_later_are_spared(stock) -> None:
    """On S3 they have the tag of the tombstone."""
    stock.shelf.gc()
    for key in (OLD.url, narinfo_key(OLD)):
        stock.cache.put(key, stock.cache.data.pop(key))
    stock.shelf.time.s += 2 * DAY
    stock.shelf.gc()
    assert stock.shelf.has(OLD)


def test_a_push_that_begins_while_it_removes_is_heeded(stock) -> None:
    stock.shelf.gc()
    stock.shelf.time.s += 2 * DAY

    def begin(method: str, key: str) -> None:
        if (method, key) == ("delete_many", manifest.key(stock.gone)):
            stock.cache.before = lambda _method, _key: None
            stock.shelf.pending(OLD)

    stock.cache.before = begin
    stock.shelf.gc()
    assert stock.shelf.has(OLD)


@pytest.mark.parametrize("kind", ["manifest", "narinfo"])
def test_what_changes_at_the_last_moment_keeps_what_it_names(stock, kind) -> None:
    stock.shelf.gc()
    stock.shelf.time.s += 2 * DAY
    key = manifest.key(stock.gone) if kind == "manifest" else narinfo_key(OLD)

    def change(method: str, first: str) -> None:
        if (method, first) == ("delete_many", key):
            stock.cache.before = lambda _method, _key: None
            if kind == "manifest":
                body = Manifest(OLD.info.path, (OLD,)).dump()
                stock.cache.put(key, manifest.pack(body, nonce="later"))
            else:
                stock.cache.put(key, OLD.dump() + b"Later: 1\n")

    stock.cache.before = change
    stock.shelf.gc()
    assert stock.shelf.has(OLD)


# Refusals


def test_a_damaged_root_stops_it(stock) -> None:
    stock.cache.data["roots/web/x.json"] = b"{}"
    with pytest.raises(DamagedError, match=r"roots/web/x\.json"):
        stock.shelf.collect()
    assert stock.shelf.has(OLD)


def test_a_root_under_the_key_of_another_stops_it(stock) -> None:
    stock.cache.data["roots/web/x.json"] = stock.cache.data["roots/push/web.json"]
    with pytest.raises(DamagedError, match=r"roots/web/x\.json.*push/web"):
        stock.shelf.collect()


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_root_whose_manifest_is_damaged_stops_it(stock, damage) -> None:
    key = manifest.key(stock.kept)
    if damage == "missing":
        del stock.cache.data[key]
    elif damage == "cut":
        stock.cache.data[key] = stock.cache.data[key][:-5]
    else:
        stock.cache.data[key] = stock.cache.data[manifest.key(stock.gone)]
    with pytest.raises(DamagedError, match=r"roots/push/web\.json") as caught:
        stock.shelf.collect()
    assert caught.value.hint
    assert stock.shelf.has(OLD)


def test_damage_that_comes_after_marking_stops_the_sweep(stock) -> None:
    stock.shelf.gc()
    stock.shelf.time.s += 2 * DAY
    del stock.cache.data[manifest.key(stock.kept)]
    with pytest.raises(DamagedError):
        stock.shelf.gc()
    assert stock.shelf.has(OLD)
    assert stock.cache.count("delete_many") == 0


@pytest.mark.parametrize("data", [b"", b"{}", b'{"version":1,"id":"q"}'])
def test_a_damaged_pending_record_stops_it(stock, data) -> None:
    stock.cache.data["pending/q.json"] = data
    with pytest.raises(DamagedError, match=r"pending/q\.json"):
        stock.shelf.collect()


def test_records_of_another_version_stop_it(stock) -> None:
    later = stock.cache.data["roots/push/web.json"].replace(b'"version":1', b'"version":2')
    stock.cache.data["roots/push/web.json"] = later
    with pytest.raises(UsageError, match="version 2"):
        stock.shelf.collect()


def test_damaged_tombstones_stop_it(stock) -> None:
    stock.shelf.gc()
    stock.cache.data[tombstones.key(stock.shelf.record.id)] = b"nonsense"
    stock.shelf.time.s += 2 * DAY
    with pytest.raises(DamagedError, match="tombstones"):
        stock.shelf.gc()
    assert stock.shelf.has(OLD)


# Two at once, and clocks


def test_a_second_sweeper_leaves_it_to_the_first(stock) -> None:
    stock.shelf.gc()
    stock.shelf.time.s += 2 * DAY
    refused = []

    def second(method: str, _key: str) -> None:
        if method == "delete_many":
            stock.cache.before = lambda _method, _key: None
            with pytest.raises(ConflictError, match="another collector"):
                stock.shelf.gc()
            refused.append(method)

    stock.cache.before = second
    assert stock.shelf.gc().removed.total == 3
    assert refused


def test_a_sweeper_that_lost_its_lease_removes_nothing_more(stock) -> None:
    stock.shelf.gc()
    stock.shelf.time.s += 2 * DAY

    def sleep(method: str, key: str) -> None:
        if (method, key) == ("delete_many", narinfo_key(OLD)):
            stock.cache.before = lambda _method, _key: None
            stock.shelf.time.s += HOUR
            stock.shelf.gc()  # takes over, and ends
            stock.shelf.put(OLD)

    stock.cache.before = sleep
    with pytest.raises(ConflictError):
        stock.shelf.gc()
    assert OLD.url in stock.cache.data


def test_a_sweeper_whose_machine_slept_asks_again(stock) -> None:
    """Its own clock says that no time has passed; meanwhile another took over, and a push came after that."""
    stock.shelf.gc()
    stock.shelf.time.s += 2 * DAY
    lists = 0

    def sleep(method: str, key: str) -> None:
        nonlocal lists
        lists += (method, key) == ("list", "pending/")
        if lists == 2:  # for the first batch, its lease renewed
            stock.cache.before = lambda _method, _key: None
            stock.shelf.time.sleep(HOUR)
            stock.shelf.gc()
            stock.cache.calls.clear()

    stock.cache.before = sleep
    with pytest.raises(ConflictError):
        stock.shelf.gc()
    assert stock.cache.calls
    assert stock.cache.count("delete_many") == 0


def test_two_markers_make_one_collection(stock) -> None:
    def second(method: str, key: str) -> None:
        if method == "put" and key == "gc.json":
            stock.cache.before = lambda _method, _key: None
            stock.shelf.gc()

    stock.cache.before = second
    with pytest.raises(ConflictError):
        stock.shelf.gc()
    first = stock.shelf.record.id
    stock.shelf.time.s += 2 * DAY
    assert stock.shelf.gc().removed.total == 3
    assert tombstones.key(first) in stock.cache.data, "somebody may be reading it"
    assert len([key for key in stock.cache.data if "tombstones" in key]) == 1


@pytest.mark.parametrize("skew_s", [-HOUR, HOUR, -10 * DAY, 10 * DAY])
def test_only_the_clock_of_the_store_counts(memory, skew_s) -> None:
    shelf = Shelf(memory, skew_s)
    shelf.root(shelf.manifest(TOP, LIB, TOOL))
    shelf.manifest(OLD)
    shelf.time.s += 2 * HOUR
    shelf.put(NEW)
    assert shelf.gc(grace_s=HOUR).marked.total == 3
    shelf.time.s += HOUR - 60
    assert shelf.gc(grace_s=HOUR).removed is None
    shelf.time.s += 120
    assert shelf.gc(grace_s=HOUR).removed.total == 3
    assert shelf.has(TOP, LIB, TOOL, NEW)


def test_the_grace_begins_once_the_roots_are_told(stock) -> None:
    def stop(method: str, key: str) -> None:
        if method == "put" and key == "roots/push/web.json":
            raise TransientError("cut")

    stock.cache.before = stop
    with pytest.raises(TransientError):
        stock.shelf.gc()
    stock.cache.before = lambda _method, _key: None
    assert not stock.shelf.record.told
    stock.shelf.time.s += 2 * DAY
    assert stock.shelf.gc().removed is None
    assert roots.read_root(stock.cache, "push", "web").gc == stock.shelf.record.id
    stock.shelf.time.s += 2 * DAY
    assert stock.shelf.gc().removed.total == 3


def test_roots_that_came_since_are_told_before_anything_is_removed(stock) -> None:
    stock.shelf.gc()
    name = stock.shelf.record.id
    stock.shelf.root(stock.kept, "late")
    stock.shelf.time.s += 2 * DAY
    told = []

    def look(method: str, _key: str) -> None:
        if method == "delete_many":
            told.append(roots.read_root(stock.cache, "push", "late").gc)

    stock.cache.before = look
    stock.shelf.gc()
    assert set(told) == {name}


def test_what_a_push_writes_into_its_root_meanwhile_is_not_lost(stock) -> None:
    def push(method: str, key: str) -> None:
        if method == "put" and key == "roots/push/web.json":
            stock.cache.before = lambda _method, _key: None
            stock.shelf.root(stock.gone)

    stock.cache.before = push
    stock.shelf.gc()
    root = roots.read_root(stock.cache, "push", "web")
    assert (root.manifest, root.gc) == (stock.gone, stock.shelf.record.id)


# Crashes


def _run_cut(shelf: Shelf, at: int, lost: bool) -> bool:
    """Run; before (or after, its answer lost) the request number `at` the collector dies. Say whether it did."""
    count = 0

    def cut(_method: str, _key: str) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise TransientError("cut")

    real = {}
    if lost:
        for name in ("put", "put_stream", "delete", "delete_many"):
            real[name] = getattr(shelf.cache, name)

            def made(*args, _call=real[name], **kwargs):
                nonlocal count
                answer = _call(*args, **kwargs)
                count += 1
                if count == at:
                    raise TransientError("cut")
                return answer

            setattr(shelf.cache, name, made)
    else:
        shelf.cache.before = cut
    try:
        shelf.gc()
    except TransientError:
        return True
    finally:
        shelf.cache.before = lambda _method, _key: None
        for name in real:
            delattr(shelf.cache, name)
    return False


@pytest.mark.parametrize("phase", ["mark", "sweep"])
@pytest.mark.parametrize("lost", [False, True])
def test_after_a_crash_anywhere_the_next_run_goes_on(memory, phase, lost) -> None:
    at = 0
    died = True
    while died:
        at += 1
        shelf = Shelf(memory)
        kept = shelf.manifest(TOP, LIB, TOOL)
        shelf.root(kept)
        shelf.manifest(OLD)
        shelf.pending(NEW, lasts_s=HOUR)
        shelf.time.s += 2 * DAY
        if phase == "sweep":
            shelf.gc()
            shelf.time.s += 2 * DAY
        died = _run_cut(shelf, at, lost)
        assert shelf.has(TOP, LIB, TOOL), at
        shelf.time.s += 2 * DAY
        shelf.gc()
        shelf.time.s += 2 * DAY
        shelf.gc()
        shelf.time.s += 2 * DAY
        shelf.gc()
        assert shelf.has(TOP, LIB, TOOL), at
        assert not shelf.has(OLD), at
        assert shelf.record.state == "done", at
        assert not roots.read_root(shelf.cache, "push", "web").checked, at
        left = [key for key in shelf.cache.data if key.startswith(("pending/", "manifests/"))]
        assert left == [manifest.key(kept)], at
        assert len([key for key in shelf.cache.data if "tombstones" in key]) <= 1, at
    assert at > 7


def test_a_reader_beside_it_finds_all_that_a_root_keeps(stock) -> None:
    """Before every request of the collector, a reader follows the root."""
    reading = False
    looks = 0

    def read(_method: str, _key: str) -> None:
        nonlocal reading, looks
        if reading:
            return
        reading = True
        root = roots.read_root(stock.cache, "push", "web")
        for one in manifest.read(stock.cache, root.manifest).paths:
            assert stock.cache.get(narinfo_key(one), 10_000) == one.dump()
            assert stock.cache.head(one.url)
        looks += 1
        reading = False

    stock.cache.before = read
    stock.shelf.collect()
    assert looks > 20
    assert not stock.shelf.has(OLD)
