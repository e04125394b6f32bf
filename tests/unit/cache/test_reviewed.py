"""What a reading of the whole found wrong, so that it stays mended."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from calve.cache import gc, lookup, roots, sequences
from calve.cache.pull import plan, pull
from calve.cache.push import push
from calve.cache.repair import repair
from calve.cache.sources import CacheSource
from calve.clock import SystemClock
from calve.errors import AccessError, NotFoundError, TransientError
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo
from calve.nix.signing import SecretKey

DAY = datetime.timedelta(days=2)


class Clock(SystemClock):
    def __init__(self, world) -> None:
        self.time = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
        world.cache.now_s = self.now_s

    def now_s(self) -> float:
        return self.time.timestamp()

    def now(self) -> datetime.datetime:
        return self.time

    def monotonic(self) -> float:
        return self.now_s()


def pushed(world, **options):
    return push(world.store, [world.top], world.cache, world.key, **options)


def forget(cache, *beginnings: str) -> None:
    for key in [key for key in cache.data if key.startswith(beginnings)]:
        del cache.data[key]


def test_a_narinfo_that_a_sweep_spares_keeps_its_nar(world) -> None:
    """A push of another build of the path wants the narinfo by now: it still names the NAR of this one."""
    clock = Clock(world)
    pushed(world, clock=clock)
    forget(world.cache, "roots/")
    clock.time += DAY
    gc.run(world.cache, dry_run=False, clock=clock)
    clock.time += DAY
    url = NarInfo.parse(world.cache.data[lookup.narinfo_key(world.lib)]).url
    other = replace(world.store.infos[world.lib], nar_hash=Hash("sha256", bytes(32)))
    pending = roots.Pending.of("other-1", [other], now=clock.now(), lasts_s=3600)

    def before(method: str, _key: str) -> None:
        if method == "delete_many":
            world.cache.before = lambda _method, _key: None
            roots.write_pending(world.cache, pending)

    world.cache.before = before
    gc.run(world.cache, dry_run=False, clock=clock)
    assert lookup.narinfo_key(world.lib) in world.cache.data
    assert url in world.cache.data
    assert lookup.narinfo_key(world.tool) not in world.cache.data


def test_an_object_that_is_not_ours_below_nar_stops_no_collection(world) -> None:
    clock = Clock(world)
    pushed(world, clock=clock)
    forget(world.cache, "roots/")
    world.cache.data["nar/copy of x.nar.zst"] = b"x"
    clock.time += DAY
    assert gc.run(world.cache, dry_run=False, clock=clock).marked.total > 0
    clock.time += DAY
    gc.run(world.cache, dry_run=False, clock=clock)
    assert [key for key in world.cache.data if key.startswith("nar/")] == ["nar/copy of x.nar.zst"]


def test_the_third_cache_is_asked_though_the_second_is_of_no_use(world, memory, fake_sink) -> None:
    pushed(world)
    second, third = memory("mem://two"), memory("mem://three")
    third.data = dict(world.cache.data)
    second.data = {
        key: data.replace(b"Compression: zstd", b"Compression: br")
        for key, data in world.cache.data.items()
    }
    sink = fake_sink()
    made = plan([world.cache, second, third], [world.top], sink, world.ring)
    forget(world.cache, "nar/")
    assert pull(made, sink).paths == 3


@pytest.mark.parametrize("gone", ["manifests/", "narinfo"])
def test_a_push_mends_a_cache_whose_missing_objects_are_called_denied(
    world, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """So S3 calls them to who may not list."""
    pushed(world)
    forget(world.cache, gone if gone == "manifests/" else world.lib.digest)
    load = world.cache._load

    def denied(key: str) -> bytes:
        try:
            return load(key)
        except NotFoundError:
            error = AccessError("denied", place=key)
            error.service_code = "AccessDenied"
            raise error from None

    monkeypatch.setattr(world.cache, "_load", denied)
    push(world.store, [world.top], world.cache, SecretKey.generate("test-2"))
    assert lookup.narinfo_key(world.lib) in world.cache.data
    assert [key for key in world.cache.data if key.startswith("manifests/")]


@pytest.mark.parametrize("lost", ["nar", "narinfo"])
def test_a_source_that_is_down_does_not_hide_a_good_one(world, memory, lost: str) -> None:
    pushed(world)

    class Down(memory):
        def _load(self, key: str) -> bytes:
            raise TransientError("connection refused", place=key)

    good = memory("mem://good")
    good.data = dict(world.cache.data)
    if lost == "nar":
        forget(world.cache, NarInfo.parse(good.data[lookup.narinfo_key(world.lib)]).url)
    else:
        forget(world.cache, "roots/", "manifests/", world.lib.digest)
    sources = [CacheSource(Down("mem://down"), world.ring), CacheSource(good, world.ring)]
    done = repair(world.cache, world.ring, sources)
    assert (len(done.repaired), done.left) == (1, ())


def test_the_highest_sequence_stays_whoever_comes_last(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = sequences.Sequences(tmp_path), sequences.Sequences(tmp_path)
    real = ours.load
    first = []

    def load(url: str) -> int:
        found = real(url)
        if not first:
            first.append(found)
            theirs.save(url, 7)
        return found

    monkeypatch.setattr(ours, "load", load)
    ours.save("s3://nix", 5)
    assert theirs.load("s3://nix") == 7
