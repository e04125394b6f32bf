"""Closures of any shape, interrupted anywhere: no reader of the cache or the store sees a reference to nothing."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from calve.cache.directory import DirectoryObjects
from calve.cache.pull import plan, pull
from calve.cache.push import push
from calve.errors import CalveError
from calve.nix import narwriter
from calve.nix.closure import closure
from calve.nix.hashes import Hash, encode32
from calve.nix.nar import Event
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.storepath import StorePath

KEY = SecretKey.generate("test-1")
RING = Keyring((KEY.public,))
graphs = st.lists(st.sets(st.integers(0, 6), max_size=3), min_size=1, max_size=7)


class Store:
    """Path number n refers to some of those below n, and perhaps to itself."""

    def __init__(self, root: Path, graph: list[set[int]]) -> None:
        self.root = root
        self.infos: dict[StorePath, PathInfo] = {}
        names = [
            StorePath(encode32(hashlib.sha256(b"%d" % n).digest()[:20]), f"p{n}")
            for n in range(len(graph))
        ]
        for number, path in enumerate(names):
            self.real(path).write_bytes(b"%d" % number * 100)
            digest = hashlib.sha256()
            size = narwriter.dump(self.real(path), digest.update)
            references = tuple(sorted(names[n] for n in graph[number] if n <= number))
            self.infos[path] = PathInfo(path, Hash("sha256", digest.digest()), size, references)
        self.top = names[-1]

    def real(self, path: StorePath) -> Path:
        return self.root / path.basename

    def closure(self, roots: Iterable[StorePath]) -> list[PathInfo]:
        return closure(roots, self.infos.__getitem__)


class Failing(DirectoryObjects):
    """Fails for good at a given write, and checks after every one."""

    def __init__(self, path: Path, writes: int) -> None:
        super().__init__(path)
        self._left = writes
        self._lock = threading.Lock()

    def _write(self, key: str, chunks: Iterable[bytes], place: object) -> bool:
        with self._lock:
            if self._left == 0:
                raise CalveError("the power is cut")
            self._left -= 1
            done = super()._write(key, chunks, place)  # type: ignore[arg-type]
            check(self)
            return done


def check(cache: DirectoryObjects) -> None:
    for key in [one.key for one in cache.list("")]:
        if key.endswith(".narinfo"):
            entry = NarInfo.parse(cache.get(key, 65536))
            assert cache.head(entry.url) is not None
            for reference in entry.info.references:
                assert cache.head(f"{reference.digest}.narinfo") is not None


class Sink:
    def __init__(self) -> None:
        self.valid: set[StorePath] = set()
        self.staged: set[StorePath] = set()

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        return [path for path in paths if path not in self.valid]

    def adopt(self, _infos: Sequence[PathInfo]) -> set[StorePath]:
        return set()

    def flush(self) -> None:
        pass

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        for _ in events:
            pass
        self.staged.add(info.path)

    def discard(self, path: StorePath) -> None:
        self.staged.discard(path)

    def commit(self, batch: Sequence[PathInfo]) -> None:
        names = {info.path for info in batch}
        assert names <= self.staged
        for info in batch:
            assert set(info.references) <= self.valid | names
        self.valid |= names


@settings(deadline=None, max_examples=40)
@given(graphs, st.integers(0, 25), st.integers(1, 4))
def test_a_push_cut_anywhere_is_consistent_and_can_be_done_again(
    graph: list[set[int]], writes: int, jobs: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "store").mkdir()
        store = Store(root / "store", graph)
        cache = DirectoryObjects(root / "cache")
        try:
            push(store, [store.top], Failing(root / "cache", writes), KEY, jobs=jobs)
        except CalveError as error:
            assert error.message == "the power is cut"
        check(cache)
        done = push(store, [store.top], cache, KEY, jobs=jobs)
        check(cache)
        for manifest in (done.manifests[store.top], None):
            sink = Sink()
            pull(plan([cache], [store.top], sink, RING, manifest=manifest), sink, jobs=jobs)
            assert sink.valid == {info.path for info in store.closure([store.top])}
