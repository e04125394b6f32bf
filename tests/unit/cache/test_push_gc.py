"""Pushes beside garbage collection, interleaved at every request: what a push has published is there."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Iterator

import pytest

from calve.cache import gc, roots
from calve.cache import manifest as manifests
from calve.cache.lease import Lease
from calve.cache.lookup import narinfo_key
from calve.cache.push import push
from calve.clock import SystemClock
from calve.errors import NotFoundError
from calve.nix.narinfo import NarInfo
from calve.nix.storepath import StorePath

GRACE_S = gc.LEAST_GRACE_S
LATER = datetime.timedelta(seconds=GRACE_S + 60)


class Clock(SystemClock):
    """One time of day for the cache and all that use it."""

    def __init__(self) -> None:
        self.time = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)

    def now(self) -> datetime.datetime:
        return self.time

    def monotonic(self) -> float:
        return self.time.timestamp()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(min(seconds, 60))


class Play:
    """A cache with an old closure that nothing keeps, parts of which a push is about to want."""

    def __init__(self, world) -> None:
        self.world = world
        self.clock = Clock()
        world.cache.now_s = self._now_s
        self.old = world.store.add("part", b"old" * 70_000)
        self.gone = world.store.add("gone", b"gone")
        before = world.store.add("before", b"before", [self.old, self.gone])
        self.push(world.top)
        self.push(before)
        world.cache.delete(roots.root_key("push", "before"))
        self.clock.time += LATER
        self.want = world.store.add("top-2", b"2", [world.lib, world.tool, self.old])
        self.before = before

    def _now_s(self) -> float:
        return self.clock.time.timestamp()

    def push(self, path: StorePath) -> str:
        done = push(
            self.world.store, [path], self.world.cache, self.world.key, jobs=1, clock=self.clock
        )
        return done.manifests[path]

    def collect(self) -> gc.Collected:
        return gc.run(self.world.cache, grace_s=GRACE_S, dry_run=False, jobs=1, clock=self.clock)

    def later(self) -> None:
        self.clock.time += LATER

    def check(self, digest: str) -> None:
        """Hold the cache against what a push said of it."""
        data = self.world.cache.data
        for entry in manifests.read(self.world.cache, digest).paths:
            assert entry.url in data, f"{entry.info.path.name}: the NAR of the manifest is gone"
            found = NarInfo.parse(data[narinfo_key(entry.info.path)])
            assert found.url in data, f"{entry.info.path.name}: the NAR of the narinfo is gone"
        kept = roots.read_root(self.world.cache, "push", "top")
        assert kept is not None
        assert kept.manifest == digest

    def finish(self, digest: str) -> None:
        self.check(digest)
        for _ in range(2):
            self.later()
            self.collect()
        self.check(digest)
        assert not [key for key in self.world.cache.data if key.startswith("pending/")]
        assert narinfo_key(self.before) not in self.world.cache.data
        assert self.world.cache.count("delete_many") > 0


@pytest.fixture
def play(world) -> Play:
    return Play(world)


def _requests(cache, action: Callable[[], object]) -> int:
    before = len(cache.calls)
    action()
    return len(cache.calls) - before


def _at(cache, actions: dict[int, Callable[[], object]]) -> None:
    """Have things happen before the requests of these numbers, counted from now and without their own."""
    count = 0

    def before(_method: str, _key: str) -> None:
        nonlocal count
        action = actions.get(count)
        count += 1
        if action is not None:
            cache.before = lambda _method, _key: None
            action()
            cache.before = before

    cache.before = before


def _snapshots(play: Play) -> Callable[[], None]:
    """Return how to put everything back."""
    cache = play.world.cache
    data, written, time = dict(cache.data), dict(cache.written), play.clock.time

    def restore() -> None:
        cache.before = lambda _method, _key: None
        cache.data, cache.written = dict(data), dict(written)
        cache.calls.clear()
        play.clock.time = time

    return restore


def test_it_collects_what_nothing_keeps_and_a_push_brings_it_back(play: Play) -> None:
    cache = play.world.cache
    assert play.collect().marked.total > 0
    play.later()
    assert play.collect().removed.total > 0
    assert narinfo_key(play.old) not in cache.data
    play.finish(play.push(play.want))


def test_marking_and_sweeping_at_every_two_requests_of_a_push(play: Play) -> None:
    cache = play.world.cache
    restore = _snapshots(play)
    count = _requests(cache, lambda: play.push(play.want))
    restore()

    def sweep() -> None:
        play.later()
        play.collect()

    for first in range(count + 1):
        for second in range(first, count + 1):
            restore()
            actions: dict[int, Callable[[], object]] = {first: play.collect, second: sweep}
            if first == second:
                actions = {first: lambda: (play.collect(), sweep())}
            _at(cache, actions)
            digest = play.push(play.want)
            cache.before = lambda _method, _key: None
            play.finish(digest)


@pytest.mark.parametrize("marked", [False, True])
def test_a_push_at_every_request_of_a_collection(play: Play, marked: bool) -> None:
    cache = play.world.cache
    if marked:
        play.collect()
        play.later()
    restore = _snapshots(play)
    count = _requests(cache, play.collect)
    for at in range(count):
        restore()
        sent: list[str] = []
        _at(cache, {at: lambda sent=sent: sent.append(play.push(play.want))})
        play.collect()
        cache.before = lambda _method, _key: None
        play.finish(sent[0])


class Baton:
    """Two threads that make requests by turns: one until its turn is over, then the other to its end, then the rest."""

    def __init__(self, cache, turns: tuple[int, int]) -> None:
        self._left = {"collector": turns[0], "pusher": turns[1]}
        self._go = {name: threading.Event() for name in self._left}
        self._go["collector"].set()
        self._done: set[str] = set()
        self._lock = threading.Lock()
        cache.before = self._before
        self._cache = cache

    def _other(self, name: str) -> str:
        return "pusher" if name == "collector" else "collector"

    def _name(self) -> str:
        ours = threading.current_thread().name.startswith(("gc", "narinfo"))
        return "collector" if ours else "pusher"

    def _before(self, _method: str, _key: str) -> None:
        name = self._name()
        with self._lock:
            if self._left[name] == 0 and self._other(name) not in self._done:
                self._left[name] = -1
                self._go[name].clear()
                self._go[self._other(name)].set()
            elif self._left[name] > 0:
                self._left[name] -= 1
        assert self._go[name].wait(20)

    def over(self, name: str) -> None:
        with self._lock:
            self._done.add(name)
            self._go[self._other(name)].set()

    def run(self, collect: Callable[[], object], send: Callable[[], str]) -> str:
        sent: list[str | BaseException] = []
        collected: list[BaseException] = []

        def collector() -> None:
            try:
                collect()
            except BaseException as error:  # noqa: BLE001
                collected.append(error)
            finally:
                self.over("collector")

        def pusher() -> None:
            try:
                assert self._go["pusher"].wait(20)
                sent.append(send())
            except BaseException as error:  # noqa: BLE001
                sent.append(error)
            finally:
                self.over("pusher")

        threads = [
            threading.Thread(target=collector, name="gc"),
            threading.Thread(target=pusher, name="pusher"),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._cache.before = lambda _method, _key: None
        for error in [*collected, *sent]:
            if isinstance(error, BaseException):
                raise error
        assert isinstance(sent[0], str)
        return sent[0]


def _turns(collector: int, pusher: int) -> Iterator[tuple[int, int]]:
    """Pairs of numbers, of the collector's requests every other."""
    for first in range(1, collector + 1, 2):
        for second in range(1, pusher + 1):
            yield first, second


def test_a_sweep_and_a_push_that_are_both_half_done(play: Play) -> None:
    """The collector makes so many requests, then the push, then the collector the rest, then the push."""
    cache = play.world.cache
    play.collect()
    play.later()
    restore = _snapshots(play)
    collector = _requests(cache, play.collect)
    restore()
    pusher = _requests(cache, lambda: play.push(play.want))
    for turns in _turns(collector, pusher):
        restore()
        digest = Baton(cache, turns).run(play.collect, lambda: play.push(play.want))
        play.finish(digest)


def test_a_push_that_does_not_hold_to_it_loses(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without its pending record and a look at the tombstones, what a push relied on goes."""
    monkeypatch.setattr(Lease, "take", lambda *_: False)
    monkeypatch.setattr(Lease, "doomed", lambda *_: frozenset())
    cache = play.world.cache
    play.collect()
    play.later()
    restore = _snapshots(play)
    lost = 0
    for turns in _turns(30, 6):
        restore()
        digest = Baton(cache, turns).run(play.collect, lambda: play.push(play.want))
        try:
            play.check(digest)
        except (AssertionError, KeyError, NotFoundError):
            lost += 1
    assert lost > 0
