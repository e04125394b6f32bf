from __future__ import annotations

import bz2
import gzip
import lzma
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from calve.cache import manifest as manifests
from calve.cache.lookup import Found
from calve.cache.pull import plan, pull
from calve.cache.push import push
from calve.errors import (
    AccessError,
    CancelledError,
    DamagedError,
    NotFoundError,
    SignatureError,
    SpaceError,
    TransientError,
    UsageError,
    VerificationError,
)
from calve.nix import nar, narwriter
from calve.nix.narinfo import NarInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.storepath import StorePath
from calve.progress import Note, Step
from calve.tasks import Cancel


@pytest.fixture
def pushed(world):
    """Push the closure; give the manifest's digest."""
    done = push(world.store, [world.top], world.cache, world.key)
    world.cache.calls.clear()
    return done.manifests[world.top]


def _paths(world) -> set[StorePath]:
    return {world.lib, world.tool, world.top}


def _narinfo(world, path) -> NarInfo:
    return NarInfo.parse(world.cache.data[f"{path.digest}.narinfo"])


def _write(world, entry: NarInfo) -> None:
    world.cache.data[f"{entry.info.path.digest}.narinfo"] = entry.dump()


def _nar(world, path) -> bytes:
    parts: list[bytes] = []
    narwriter.dump(world.store.real(path), parts.append)
    return b"".join(parts)


def _nothing_valid(sink) -> bool:
    return not sink.valid and not sink.staged


@pytest.mark.parametrize("by_manifest", [True, False])
@pytest.mark.parametrize("jobs", [1, 8])
def test_a_closure_is_pulled(world, pushed, fake_sink, by_manifest: bool, jobs: int) -> None:
    sink = fake_sink()
    made = plan(
        [world.cache], [world.top], sink, world.ring, manifest=pushed if by_manifest else None
    )
    assert {found.entry.info.path for found in made.missing} == _paths(world)
    assert made.present == 0
    assert made.nar_bytes == sum(info.nar_size for info in world.store.infos.values())
    assert made.fetch_bytes == sum(
        len(data) for key, data in world.cache.data.items() if key.startswith("nar/")
    )
    events: list[Step] = []
    done = pull(made, sink, jobs=jobs, decoders=1, progress=events.append)
    assert sink.valid == _paths(world)
    assert (done.paths, done.nar_bytes, done.retries) == (3, made.nar_bytes, 0)
    assert done.fetched_bytes == made.fetch_bytes
    assert events[-1] == Step("pull", made.nar_bytes, made.nar_bytes)


def test_what_is_staged_is_what_was_pushed(world, pushed, fake_sink) -> None:
    class Keeping(fake_sink):
        def discard(self, path):
            raise AssertionError("nothing is wrong here")

        def commit(self, batch):
            self.kept = dict(self.staged)
            super().commit(batch)

    sink = Keeping()
    pull(plan([world.cache], [world.top], sink, world.ring), sink)
    for path in _paths(world):
        parts: list[bytes] = []
        nar.emit(iter(sink.kept[path]), parts.append)
        assert b"".join(parts) == _nar(world, path)


def test_requests(world, pushed, fake_sink) -> None:
    sink = fake_sink()
    pull(plan([world.cache], [world.top], sink, world.ring, manifest=pushed), sink)
    assert len(world.cache.calls) == 1 + 3
    world.cache.calls.clear()
    sink = fake_sink()
    pull(plan([world.cache], [world.top], sink, world.ring), sink)
    assert len(world.cache.calls) == 3 + 3


@pytest.mark.parametrize("by_manifest", [True, False])
def test_what_is_valid_is_not_fetched(world, pushed, fake_sink, by_manifest: bool) -> None:
    sink = fake_sink([world.lib])
    digest = pushed if by_manifest else None
    made = plan([world.cache], [world.top], sink, world.ring, manifest=digest)
    assert (len(made.missing), made.present) == (2, 1)
    pull(made, sink)
    assert world.cache.count("open") == 2
    world.cache.calls.clear()
    made = plan([world.cache], [world.top], sink, world.ring, manifest=digest)
    assert (len(made.missing), made.nar_bytes) == (0, 0)
    assert pull(made, sink).fetched_bytes == 0
    assert len(world.cache.calls) == (1 if by_manifest else 0)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("none", bytes),
        ("xz", lzma.compress),
        ("bzip2", bz2.compress),
        ("gzip", gzip.compress),
    ],
)
def test_compressions_of_other_caches(world, pushed, fake_sink, name: str, pack) -> None:
    for path in _paths(world):
        entry = replace(_narinfo(world, path), url=f"nar/{path.digest}", compression=name)
        _write(world, replace(entry, file_hash=None, file_size=None))
        world.cache.data[entry.url] = pack(_nar(world, path))
    sink = fake_sink()
    pull(plan([world.cache], [world.top], sink, world.ring), sink)
    assert sink.valid == _paths(world)


def test_an_unknown_compression_is_named_before_anything_is_fetched(
    world, pushed, fake_sink
) -> None:
    _write(world, replace(_narinfo(world, world.lib), compression="lzip"))
    with pytest.raises(UsageError, match="'lzip'"):
        plan([world.cache], [world.top], fake_sink(), world.ring)
    assert world.cache.count("open") == 0


# Signatures


@pytest.mark.parametrize("by_manifest", [True, False])
def test_a_key_that_is_not_trusted(world, pushed, fake_sink, by_manifest: bool) -> None:
    sink = fake_sink()
    wrong = Keyring((SecretKey.generate("test-1").public,))
    strange = Keyring((SecretKey.generate("other-1").public,))
    for ring in (wrong, strange, Keyring(())):
        with pytest.raises(SignatureError):
            plan(
                [world.cache],
                [world.top],
                sink,
                ring,
                manifest=pushed if by_manifest else None,
            )
    assert world.cache.count("open") == 0
    assert _nothing_valid(sink)


@pytest.mark.parametrize("what", ["unsigned", "of another path", "of other facts"])
def test_signatures_that_are_not_of_this_path(world, pushed, fake_sink, what: str) -> None:
    entry = _narinfo(world, world.lib)
    info = entry.info
    if what == "unsigned":
        info = replace(info, signatures=())
    elif what == "of another path":
        info = replace(info, signatures=_narinfo(world, world.tool).info.signatures)
    else:
        info = replace(info, nar_size=info.nar_size + 8)
    _write(world, replace(entry, info=info))
    with pytest.raises(SignatureError) as caught:
        plan([world.cache], [world.top], fake_sink(), world.ring)
    assert f"{world.lib.digest}.narinfo" in str(caught.value.place)
    assert world.cache.count("open") == 0


def test_a_content_addressed_path_needs_a_signature_too(world, pushed, fake_sink) -> None:
    entry = _narinfo(world, world.lib)
    ca = f"fixed:r:{entry.info.nar_hash.nix32}"
    _write(world, replace(entry, info=replace(entry.info, signatures=(), ca=ca)))
    with pytest.raises(SignatureError):
        plan([world.cache], [world.top], fake_sink(), world.ring)


def test_the_narinfo_of_another_path(world, pushed, fake_sink) -> None:
    world.cache.data[f"{world.lib.digest}.narinfo"] = _narinfo(world, world.tool).dump()
    with pytest.raises(DamagedError, match=f"that of another path, {world.tool}"):
        plan([world.cache], [world.top], fake_sink(), world.ring)


def test_a_nar_key_that_leads_out_of_the_cache(world, pushed, fake_sink) -> None:
    _write(world, replace(_narinfo(world, world.lib), url="../../etc/passwd"))
    with pytest.raises(DamagedError, match="not the key"):
        plan([world.cache], [world.top], fake_sink(), world.ring)


# Manifests


def test_without_the_manifest_narinfos_are_walked(world, pushed, fake_sink) -> None:
    del world.cache.data[manifests.key(pushed)]
    sink, notes = fake_sink(), []
    made = plan(
        [world.cache], [world.top], sink, world.ring, manifest=pushed, progress=notes.append
    )
    assert made.manifest is None
    assert [type(note) for note in notes] == [Note]
    pull(made, sink)
    assert sink.valid == _paths(world)


def test_a_manifest_that_is_altered_is_an_error(world, pushed, fake_sink) -> None:
    other = push(world.store, [world.tool], world.cache, world.key).manifests[world.tool]
    world.cache.data[manifests.key(pushed)] = world.cache.data[manifests.key(other)]
    with pytest.raises(DamagedError, match="not the one of this digest"):
        plan([world.cache], [world.top], fake_sink(), world.ring, manifest=pushed)


def test_a_manifest_of_another_system_is_an_error(world, pushed, fake_sink) -> None:
    other = push(world.store, [world.tool], world.cache, world.key).manifests[world.tool]
    with pytest.raises(VerificationError, match=f"does not have {world.top}"):
        plan([world.cache], [world.top], fake_sink(), world.ring, manifest=other)


def test_a_manifest_that_names_a_missing_path(world, pushed, fake_sink) -> None:
    whole = manifests.read(world.cache, pushed)
    kept = tuple(entry for entry in whole.paths if entry.info.path != world.lib)
    body = replace(whole, paths=kept).dump()
    digest = manifests.digest_of(body)
    world.cache.data[manifests.key(digest)] = manifests.pack(body)
    sink = fake_sink()
    with pytest.raises(DamagedError, match=f"lacks {world.lib}"):
        plan([world.cache], [world.top], sink, world.ring, manifest=digest)
    assert _nothing_valid(sink)


def test_a_manifest_whose_narinfo_signature_is_wrong(world, pushed, fake_sink) -> None:
    whole = manifests.read(world.cache, pushed)
    bad = replace(whole.paths[1], info=replace(whole.paths[1].info, signatures=()))
    body = replace(whole, paths=(whole.paths[0], bad, whole.paths[2])).dump()
    digest = manifests.digest_of(body)
    world.cache.data[manifests.key(digest)] = manifests.pack(body)
    with pytest.raises(SignatureError):
        plan([world.cache], [world.top], fake_sink(), world.ring, manifest=digest)


# Damage and absence


def _flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], _flip, lambda data: data + b"x", lambda _data: b""],
    ids=["truncated", "altered", "longer", "empty"],
)
@pytest.mark.parametrize("by_manifest", [True, False])
def test_a_damaged_nar(world, pushed, fake_sink, damage, by_manifest: bool) -> None:
    entry = _narinfo(world, world.lib)
    world.cache.data[entry.url] = damage(world.cache.data[entry.url])
    sink = fake_sink()
    made = plan(
        [world.cache], [world.top], sink, world.ring, manifest=pushed if by_manifest else None
    )
    with pytest.raises(DamagedError) as caught:
        pull(made, sink)
    assert caught.value.place == f"{world.cache.url}/{entry.url}"
    assert world.lib.basename in caught.value.message
    assert world.lib in sink.missing([world.lib])
    assert world.lib not in sink.staged
    assert world.cache.count("open", entry.url) == 2  # once more, then no more


def test_another_nar_in_its_place(world, pushed, fake_sink) -> None:
    entry = _narinfo(world, world.lib)
    other = bytearray(_nar(world, world.lib))
    other[5000] ^= 1
    world.cache.data[entry.url] = lzma.compress(bytes(other))
    _write(world, replace(entry, compression="xz"))
    sink = fake_sink()
    with pytest.raises(DamagedError, match="not the one that was signed"):
        pull(plan([world.cache], [world.lib], sink, world.ring), sink)
    assert _nothing_valid(sink)


def test_a_bomb_stops_at_nar_size(world, pushed, fake_sink) -> None:
    entry = _narinfo(world, world.lib)
    world.cache.data[entry.url] = gzip.compress(_nar(world, world.lib) + bytes(50 << 20))
    _write(world, replace(entry, compression="gzip"))
    sink = fake_sink()
    with pytest.raises(DamagedError, match=r"longer|behind"):
        pull(plan([world.cache], [world.lib], sink, world.ring), sink)
    assert _nothing_valid(sink)


def test_a_nar_that_is_gone(world, pushed, fake_sink) -> None:
    entry = _narinfo(world, world.lib)
    del world.cache.data[entry.url]
    sink = fake_sink()
    made = plan([world.cache], [world.top], sink, world.ring, manifest=pushed)
    with pytest.raises(NotFoundError) as caught:
        pull(made, sink)
    assert caught.value.place == f"{world.cache.url}/{entry.url}"
    assert world.lib not in sink.valid


def test_a_nar_that_moved_is_found_by_its_narinfo(world, pushed, fake_sink) -> None:
    entry = _narinfo(world, world.lib)
    world.cache.data["nar/moved.nar.xz"] = lzma.compress(_nar(world, world.lib))
    del world.cache.data[entry.url]
    _write(world, replace(entry, url="nar/moved.nar.xz", compression="xz"))
    sink = fake_sink()
    made = plan([world.cache], [world.top], sink, world.ring, manifest=pushed)
    done = pull(made, sink)
    assert sink.valid == _paths(world)
    assert done.retries == 1


def test_a_path_that_no_cache_has(world, pushed, fake_sink) -> None:
    del world.cache.data[f"{world.lib.digest}.narinfo"]
    with pytest.raises(NotFoundError, match=f"no cache has {world.lib}"):
        plan([world.cache], [world.top], fake_sink(), world.ring)


# Several caches


def test_caches_are_asked_in_order_with_fallback_per_path(world, pushed, fake_sink, memory) -> None:
    near = memory("mem://near")
    near.data = {key: data for key, data in world.cache.data.items() if world.lib.digest not in key}
    sink = fake_sink()
    made = plan([near, world.cache], [world.top], sink, world.ring)
    sources = {found.entry.info.path: found.cache.url for found in made.missing}
    assert sources == {
        world.top: "mem://near",
        world.tool: "mem://near",
        world.lib: "mem://one",
    }
    pull(made, sink)
    assert sink.valid == _paths(world)


@pytest.mark.parametrize("fault", ["damaged", "gone", "denied", "down", "unsigned"])
def test_a_bad_cache_is_made_up_for_by_the_next(
    world, pushed, fake_sink, memory, fault: str
) -> None:
    near = memory("mem://near")
    near.data = dict(world.cache.data)
    entry = _narinfo(world, world.lib)
    errors = {
        "denied": AccessError("denied or missing"),
        "down": TransientError("reset"),
    }
    if fault in errors:

        def before(method: str, _key: str) -> None:
            if method == "open":
                raise errors[fault]

        near.before = before
    elif fault == "damaged":
        near.data[entry.url] = _flip(near.data[entry.url])
    elif fault == "gone":
        del near.data[entry.url]
    else:
        bare = replace(entry, info=replace(entry.info, signatures=()))
        near.data[f"{world.lib.digest}.narinfo"] = bare.dump()
    sink = fake_sink()
    done = pull(plan([near, world.cache], [world.top], sink, world.ring), sink)
    assert sink.valid == _paths(world)
    assert done.retries == {"denied": 3, "down": 3, "unsigned": 0}.get(fault, 1)


def test_another_build_in_the_next_cache_is_not_taken(world, pushed, fake_sink, memory) -> None:
    far = memory("mem://far")
    (world.store.real(world.lib) / "file").write_bytes(b"another build")
    kept = world.store.infos[world.lib]
    world.store.register(world.lib)
    push(world.store, [world.lib], far, world.key)
    world.store.infos[world.lib] = kept
    del world.cache.data[_narinfo(world, world.lib).url]
    sink = fake_sink()
    with pytest.raises(DamagedError, match="another build"):
        pull(plan([world.cache, far], [world.top], sink, world.ring, manifest=pushed), sink)


# The sink, threads, interruption


def test_large_closures_are_flushed_and_committed_once(
    world, pushed, fake_sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calve.cache.pull._FLUSH_BYTES", 1)

    class Counting(fake_sink):
        flushes = 0

        def flush(self) -> None:
            super().flush()
            self.flushes += 1

    sink = Counting()
    made = plan([world.cache], [world.top], sink, world.ring, manifest=pushed)
    assert [found.entry.info.path for found in made.missing] == [world.top, world.lib, world.tool]
    pull(made, sink, jobs=1)
    assert [set(batch) for batch in sink.batches] == [_paths(world)]
    assert sink.flushes == 3


@pytest.mark.parametrize("by_manifest", [True, False])
def test_what_an_interrupted_pull_verified_is_not_fetched(
    world, pushed, fake_sink, by_manifest: bool
) -> None:
    sink = fake_sink()
    other = replace(world.store.infos[world.tool], nar_size=1)
    sink.left = {world.lib: _narinfo(world, world.lib).info, world.tool: other}
    digest = pushed if by_manifest else None
    made = plan([world.cache], [world.top], sink, world.ring, manifest=digest)
    assert [info.path for info in made.adopted] == [world.lib]
    assert {found.entry.info.path for found in made.missing} == {world.top, world.tool}
    assert made.nar_bytes == sum(found.entry.info.nar_size for found in made.missing)
    done = pull(made, sink)
    assert (done.paths, sink.valid) == (2, _paths(world))
    assert world.cache.count("open") == 2


def test_what_is_adopted_is_committed_where_nothing_else_is_missing(
    world, pushed, fake_sink
) -> None:
    sink = fake_sink()
    sink.left = {path: _narinfo(world, path).info for path in _paths(world)}
    made = plan([world.cache], [world.top], sink, world.ring)
    assert pull(made, sink).fetched_bytes == 0
    assert sink.valid == _paths(world)


def test_a_plan_that_is_not_to_be_pulled_adopts_nothing(world, pushed, fake_sink) -> None:
    sink = fake_sink()
    sink.left = {world.lib: _narinfo(world, world.lib).info}
    made = plan([world.cache], [world.top], sink, world.ring, resume=False)
    assert (len(made.missing), made.adopted, len(sink.left)) == (3, (), 1)


def test_a_sink_never_takes_a_wrong_nar_for_whole(world, pushed, fake_sink) -> None:
    """The events fail before `stage` could return: what it returns from may be adopted by a later run."""
    returned = []

    class Noting(fake_sink):
        def stage(self, info, events):
            super().stage(info, events)
            returned.append(info.path)

        def discard(self, path):
            assert path not in self.staged

    entry = _narinfo(world, world.lib)
    wrong = bytearray(_nar(world, world.lib))
    wrong[5000] ^= 1
    world.cache.data[entry.url] = lzma.compress(bytes(wrong))
    _write(world, replace(entry, compression="xz"))
    with pytest.raises(DamagedError, match="not the one that was signed"):
        pull(plan([world.cache], [world.lib], fake_sink(), world.ring), Noting())
    assert returned == []


# What a manifest says is in another cache


def _elsewhere(world, pushed, *paths: StorePath) -> str:
    """Write the manifest again, without the places of some paths; return its digest."""
    whole = manifests.read(world.cache, pushed)
    entries = tuple(
        replace(entry, url="", compression="none", file_hash=None, file_size=None)
        if entry.info.path in paths
        else entry
        for entry in whole.paths
    )
    body = replace(whole, paths=entries).dump()
    digest = manifests.digest_of(body)
    world.cache.data[manifests.key(digest)] = manifests.pack(body)
    return digest


def test_a_path_without_a_url_is_looked_for_in_all_caches(world, pushed, fake_sink, memory) -> None:
    far = memory("mem://far")
    entry = _narinfo(world, world.lib)
    for key in (f"{world.lib.digest}.narinfo", entry.url):
        far.data[key] = world.cache.data.pop(key)
    digest = _elsewhere(world, pushed, world.lib)
    sink = fake_sink()
    made = plan([world.cache, far], [world.top], sink, world.ring, manifest=digest)
    assert [found.cache.url for found in made.missing] == ["mem://one", "mem://far", "mem://one"]
    assert made.fetch_bytes > len(far.data[entry.url])
    asked = world.cache.keys("get")
    assert asked[-2:] == [manifests.key(digest), f"{world.lib.digest}.narinfo"]
    pull(made, sink)
    assert sink.valid == _paths(world)
    assert plan([world.cache], [world.top], sink, world.ring, manifest=digest).missing == ()


def test_a_path_without_a_url_that_no_cache_has(world, pushed, fake_sink) -> None:
    del world.cache.data[f"{world.lib.digest}.narinfo"]
    digest = _elsewhere(world, pushed, world.lib)
    with pytest.raises(NotFoundError, match=f"no cache has {world.lib}"):
        plan([world.cache], [world.top], fake_sink(), world.ring, manifest=digest)


def test_a_path_without_a_url_is_not_taken_from_another_build(world, pushed, fake_sink) -> None:
    (world.store.real(world.lib) / "file").write_bytes(b"another build")
    entry = _narinfo(world, world.lib)
    other = world.store.register(world.lib) and world.store.infos[world.lib].signed(world.key)
    digest = _elsewhere(world, pushed, world.lib)
    _write(world, replace(entry, info=other))
    with pytest.raises(DamagedError, match="another build"):
        plan([world.cache], [world.top], fake_sink(), world.ring, manifest=digest)


# Which is next


def test_small_nars_are_fetched_beside_large_ones(world, pushed, fake_sink) -> None:
    """However many small ones wait, one decoder more than there are at once has a large one under way."""
    from calve.cache.fetch import _Turns

    entry = _narinfo(world, world.lib)
    large = [Found(replace(entry, file_size=(9 - n) << 20), world.cache) for n in range(5)]
    small = [Found(replace(entry, file_size=1 + n), world.cache) for n in range(4)]
    unknown = Found(replace(entry, file_size=None), world.cache)
    turns = _Turns([*large, *small, unknown], 1)
    assert [turns.take() for _ in range(4)] == [*large[:2], *small[:2]]
    turns.done(small[0])
    assert turns.take() is small[2]
    turns.done(large[0])
    assert [turns.take(), turns.take()] == [large[2], small[3]]
    assert not turns.none_left()
    assert [turns.take() for _ in range(3)] == [*large[3:], unknown]
    assert turns.none_left()


@pytest.mark.parametrize(("small_bytes", "allowed"), [(0, 1), (1 << 20, 2)])
def test_no_more_decoders_than_asked_for(
    world, pushed, fake_sink, monkeypatch: pytest.MonkeyPatch, small_bytes: int, allowed: int
) -> None:
    """One small NAR may be beside them."""
    monkeypatch.setattr("calve.cache.fetch._SMALL_NAR_BYTES", small_bytes)
    lock, active, most = threading.Lock(), 0, 0

    class Counting(fake_sink):
        def stage(self, info, events):
            nonlocal active, most
            with lock:
                active += 1
                most = max(most, active)
            super().stage(info, events)
            with lock:
                active -= 1

    sink = Counting()
    pull(plan([world.cache], [world.top], sink, world.ring), sink, jobs=3, decoders=1)
    assert most <= allowed


def test_an_error_of_the_sink_ends_it_at_once(world, pushed, fake_sink) -> None:
    class Full(fake_sink):
        def stage(self, info, events):
            raise SpaceError("no space left")

    sink = Full()
    with pytest.raises(SpaceError):
        pull(plan([world.cache], [world.top], sink, world.ring), sink, jobs=1)
    assert world.cache.count("open") == 1


def test_a_sink_that_stops_reading_early_is_noticed(world, pushed, fake_sink) -> None:
    class Lazy(fake_sink):
        def stage(self, info, events):
            next(events)
            self.staged[info.path] = []

    sink = Lazy()
    with pytest.raises(DamagedError):
        pull(plan([world.cache], [world.lib], sink, world.ring), sink)
    assert _nothing_valid(sink)


def test_cancelling_stops_it_and_leaves_nothing_valid(world, pushed, fake_sink) -> None:
    cancel = Cancel()

    def before(method: str, _key: str) -> None:
        if method == "open":
            cancel.cancel()

    sink = fake_sink()
    made = plan([world.cache], [world.top], sink, world.ring)
    world.cache.before = before
    with pytest.raises(CancelledError):
        pull(made, sink, cancel=cancel)
    assert sink.valid == set()
    assert not [each for each in threading.enumerate() if each.name.startswith("pull")]


def test_no_cache_is_a_usage_error(world, fake_sink) -> None:
    with pytest.raises(UsageError, match="no cache"):
        plan([], [world.top], fake_sink(), world.ring)


def test_what_the_agent_imports_is_lean() -> None:
    code = "import sys, calve.cache.pull, calve.cache.objects; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    for name in ("argparse", "asyncio", "sqlite3", "subprocess", "logging", "boto3", "msgspec"):
        assert name not in loaded
    assert "calve.process" not in loaded
    assert not {name for name in loaded if name.startswith("calve.nix.database")}
    assert not loaded & {"calve.cache.push", "calve.cache.roots", "calve.cache.stream"}


class Endless:
    """An object that goes on for ever, and never gives a byte of NAR."""

    def __init__(self, frame: bytes) -> None:
        self.frames = frame * (65536 // len(frame))
        self.given = 0

    def read(self, size: int) -> bytes:
        self.given += len(self.frames)
        assert self.given < 1 << 26, "read without an end"
        return self.frames

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("zstd", bytes.fromhex("28b52ffd2000010000")),  # a frame of nothing
        ("zstd", b"\x50\x2a\x4d\x18\x08\0\0\0" + bytes(8)),  # a frame to be skipped
        ("gzip", gzip.compress(b"", mtime=0)),
        ("xz", lzma.compress(b"")),
        ("bzip2", bz2.compress(b"")),
    ],
    ids=["zstd", "zstd-skip", "gzip", "xz", "bzip2"],
)
def test_a_stream_of_nothing_ends(world, pushed, fake_sink, name: str, frame: bytes) -> None:
    entry = _narinfo(world, world.lib)
    _write(world, replace(entry, compression=name))
    endless = Endless(frame)
    world.cache.open = lambda _key, _size=None, **_range: endless
    sink = fake_sink()
    with pytest.raises(DamagedError, match="longer than any compression"):
        pull(plan([world.cache], [world.lib], sink, world.ring), sink)
    assert endless.given < 2 * (2 * entry.info.nar_size + (2 << 20))
    assert _nothing_valid(sink)
