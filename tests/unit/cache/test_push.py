from __future__ import annotations

import datetime
import json
import threading
from dataclasses import replace

import pytest

from calve.cache import manifest as manifests
from calve.cache import roots
from calve.cache.compression import Codec
from calve.cache.directory import DirectoryObjects
from calve.cache.keep import root_name
from calve.cache.push import push
from calve.clock import SystemClock
from calve.errors import CancelledError, DamagedError, NotFoundError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.storepath import StorePath
from calve.progress import Step
from calve.tasks import Cancel


class _Clock(SystemClock):
    """The time of day as a test wants it."""

    def __init__(self) -> None:
        self.time = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)

    def now(self) -> datetime.datetime:
        return self.time


def _narinfo(world, path) -> NarInfo:
    return NarInfo.parse(world.cache.data[f"{path.digest}.narinfo"])


def _things(data: dict[str, bytes]) -> dict[str, bytes]:
    return {key: value for key, value in data.items() if not key.startswith("roots/")}


def _kinds(world) -> list[str]:
    """Return what was written, in order: pending, nar, narinfo, manifest, signature, root."""
    names = []
    for method, key in world.cache.calls:
        if method == "put" and key != "nix-cache-info":
            names.append(key.partition("/")[0] if "/" in key else "narinfo")
        elif method == "delete":
            names.append(f"-{key.partition('/')[0]}")
    return names


def test_everything_is_there_signed_and_in_order(world) -> None:
    done = push(world.store, [world.top], world.cache, world.key)
    assert (done.paths, done.new_paths) == (3, 3)
    assert done.nar_bytes == sum(info.nar_size for info in world.store.infos.values())
    nars = [key for key in world.cache.data if key.startswith("nar/")]
    assert done.compressed_bytes == sum(len(world.cache.data[key]) for key in nars)
    assert world.cache.data["nix-cache-info"].startswith(
        b"StoreDir: /nix/store\nWantMassQuery: 1\n"
    )
    for path in (world.lib, world.tool, world.top):
        entry = _narinfo(world, path)
        assert replace(entry.info, signatures=()) == world.store.infos[path]
        assert world.ring.verify(entry.info.fingerprint, entry.info.signatures) == "test-1"
        packed = world.cache.data[entry.url]
        assert entry.url == f"nar/{entry.info.nar_hash.nix32.partition(':')[2]}.nar.zst"
        assert entry.file_hash == Hash.sha256(packed)
        assert entry.file_size == len(packed)
    manifest = manifests.read(world.cache, done.manifests[world.top])
    assert manifest.toplevel == world.top
    assert manifest.paths[0] == _narinfo(world, world.top)
    assert {entry.info.path for entry in manifest.paths} == set(world.store.infos)
    kept = roots.read_root(world.cache, "push", "top")
    assert kept is not None
    assert kept.manifest == done.manifests[world.top]
    again, signatures, _ = manifests.read_signed(world.cache, kept.manifest)
    assert again == manifest
    world.ring.verify(manifests.signed_bytes(kept.manifest), signatures)
    assert (kept.checked, kept.gc) == (True, None)
    assert not [key for key in world.cache.data if key.startswith("pending/")]


def test_the_order_of_writes(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    kinds = _kinds(world)
    assert kinds[0] == "pending"
    assert kinds[-3:] == ["manifests", "roots", "-pending"]
    seen: set[str] = set()
    for method, key in world.cache.calls:
        if method != "put":
            continue
        if key.endswith(".narinfo"):
            entry = NarInfo.parse(world.cache.data[key])
            assert entry.url in seen, "a narinfo before its NAR"
            for reference in entry.info.references:
                if reference != entry.info.path:
                    assert f"{reference.digest}.narinfo" in seen, "a reference that leads nowhere"
        seen.add(key)


def test_requests_of_a_first_push_and_of_one_that_changes_nothing(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    # cache-info asked and made, root asked and made, pending made, listed and removed, gc, manifest; NARs, narinfos
    assert len(world.cache.calls) == 2 + 2 + 3 + 1 + 1 + 2 * 3
    world.cache.calls.clear()
    again = push(world.store, [world.top], world.cache, world.key)
    assert (again.paths, again.new_paths, again.compressed_bytes) == (3, 0, 0)
    assert [method for method, _ in world.cache.calls] == ["get", "get"]


def test_one_changed_path_takes_six_requests(world) -> None:
    first = push(world.store, [world.top], world.cache, world.key)
    newer = world.store.add("top-2", b"2", [world.lib, world.tool])
    world.cache.calls.clear()
    done = push(world.store, [newer], world.cache, world.key)
    assert (done.paths, done.new_paths) == (3, 1)
    kinds = [key.partition("/")[0] for _, key in world.cache.calls]
    assert kinds == [
        "roots",
        "manifests",
        "nar",
        f"{newer.digest}.narinfo",
        "manifests",
        "roots",
    ]
    assert roots.read_root(world.cache, "push", "top").manifest == done.manifests[newer]
    assert manifests.key(first.manifests[world.top]) in world.cache.data


def _prefill(world, count: int = 40) -> tuple[object, object]:
    """Make a closure that is not small: pushed by somebody under one name, and to be pushed under another."""
    parts = [world.store.add(f"part-{n}", b"%d" % n) for n in range(count)]
    return (
        world.store.add("old", b"old", parts),
        world.store.add("new", b"new", parts),
    )


def test_a_large_push_looks_at_a_few_paths_and_then_knows_that_all_are_new(world) -> None:
    push(world.store, [world.lib], world.cache, world.key)
    old, _ = _prefill(world)
    world.cache.calls.clear()
    push(world.store, [old], world.cache, world.key)
    assert world.cache.count("get", ".narinfo") == 3
    assert world.cache.count("head") == 0
    assert world.cache.count("put", "nar/") == 41


def test_a_large_push_of_what_another_pushed_asks_for_each_and_sends_nothing_twice(world) -> None:
    old, new = _prefill(world)
    push(world.store, [old], world.cache, world.key)
    world.cache.calls.clear()
    done = push(world.store, [new], world.cache, world.key)
    assert (done.paths, done.new_paths) == (41, 1)
    assert world.cache.count("put", "nar/") == 1
    assert world.cache.count("put", ".narinfo") == 1


def test_what_is_there_after_all_is_met_by_a_pending_record(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    other = world.store.add("other", b"o" * 70_000)
    newer = world.store.add("top-2", b"2", [world.lib, world.tool, other])
    push(world.store, [other], world.cache, world.key)
    world.cache.calls.clear()
    done = push(world.store, [newer], world.cache, world.key)
    assert done.new_paths == 1
    names = [key for method, key in world.cache.calls if method == "put"]
    nars = [at for at, key in enumerate(names) if key.startswith("nar/")]
    pending = next(at for at, key in enumerate(names) if key.startswith("pending/"))
    assert nars[0] < pending  # it was not believed to be there
    assert not [key for key in world.cache.data if key.startswith("pending/")]
    assert manifests.read(world.cache, done.manifests[newer]).check() is None


def test_check_puts_back_what_is_gone_and_what_was_cut(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    whole = world.cache.data.copy()
    lib, tool = _narinfo(world, world.lib), _narinfo(world, world.tool)
    del world.cache.data[lib.url]
    world.cache.data[tool.url] = world.cache.data[tool.url][:-1]
    del world.cache.data[f"{world.top.digest}.narinfo"]
    assert push(world.store, [world.top], world.cache, world.key).new_paths == 0
    done = push(world.store, [world.top], world.cache, world.key, check=True)
    assert done.new_paths == 3
    assert _things(world.cache.data) == _things(whole)


def test_the_push_after_a_collection_looks_again(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    root = roots.read_root(world.cache, "push", "top")
    roots.write_root(world.cache, replace(root, checked=False, gc="gc-1"))
    del world.cache.data[_narinfo(world, world.lib).url]
    assert push(world.store, [world.top], world.cache, world.key).new_paths == 1
    assert _narinfo(world, world.lib).url in world.cache.data
    kept = roots.read_root(world.cache, "push", "top")
    assert (kept.checked, kept.gc) == (True, None)  # no collection is under way any more
    world.cache.calls.clear()
    push(world.store, [world.top], world.cache, world.key)
    assert len(world.cache.calls) == 2


def test_check_signs_a_manifest_again_that_lost_its_signatures(world) -> None:
    digest = push(world.store, [world.top], world.cache, world.key).manifests[world.top]
    name = manifests.key(digest)
    good = world.cache.data[name]
    body, _ = manifests.unpack(good, digest, "here")
    world.cache.data[name] = manifests.pack(body)
    push(world.store, [world.top], world.cache, world.key, check=True)
    assert world.cache.data[name] == good


def test_a_damaged_root_is_replaced(world) -> None:
    done = push(world.store, [world.top], world.cache, world.key)
    world.cache.data["roots/push/top.json"] = b"{"
    again = push(world.store, [world.top], world.cache, world.key)
    assert (again.manifests, again.new_paths) == (done.manifests, 0)
    assert roots.read_root(world.cache, "push", "top").manifest == done.manifests[world.top]
    world.cache.data["roots/push/top.json"] = b'{"version":2}'
    with pytest.raises(UsageError, match="version 2"):
        push(world.store, [world.top], world.cache, world.key)


def test_what_another_cache_has_is_left_to_it(world) -> None:
    theirs = SecretKey.generate("cache.nixos.org-1")
    world.store.infos[world.lib] = world.store.infos[world.lib].signed(theirs)
    skip = Keyring((theirs.public,))
    done = push(world.store, [world.top], world.cache, world.key, skip=skip)
    assert (done.paths, done.new_paths, done.skipped_paths) == (3, 2, 1)
    manifest = manifests.read(world.cache, done.manifests[world.top])
    entry = next(entry for entry in manifest.paths if entry.info.path == world.lib)
    assert entry.url == ""
    assert f"{world.lib.digest}.narinfo" not in world.cache.data
    world.cache.calls.clear()
    again = push(world.store, [world.top], world.cache, world.key, skip=skip)
    assert (again.manifests, len(world.cache.calls)) == (done.manifests, 2)
    # Whoever does not skip it sends it.
    assert push(world.store, [world.top], world.cache, world.key).new_paths == 1


def test_a_push_that_lasts_writes_its_pending_record(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    newer = world.store.add("top-2", b"2", [world.lib, world.tool])
    clock = _Clock()

    def before(method: str, key: str) -> None:
        if method == "put" and key.startswith("nar/"):
            clock.time += datetime.timedelta(minutes=6)

    world.cache.before = before
    world.cache.calls.clear()
    push(world.store, [newer], world.cache, world.key, clock=clock)
    assert _kinds(world) == ["nar", "pending", "narinfo", "manifests", "roots", "-pending"]


def test_a_push_that_slept_looks_again(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    newer = world.store.add("top-2", b"2", [world.lib, world.tool])
    clock = _Clock()

    def before(method: str, key: str) -> None:
        if method == "put" and key.startswith("manifests/"):
            clock.time += datetime.timedelta(days=2)
            world.cache.before = lambda _method, _key: None
            world.cache.data = {  # everything but the roots was collected
                key: data for key, data in world.cache.data.items() if key.startswith("roots/")
            }

    world.cache.before = before
    done = push(world.store, [newer], world.cache, world.key, clock=clock)
    assert done.new_paths == 3
    for path in (world.lib, world.tool, newer):
        assert _narinfo(world, path).url in world.cache.data
    assert manifests.key(done.manifests[newer]) in world.cache.data


def test_a_path_with_more_references_than_a_narinfo_takes_is_refused_at_once(world) -> None:
    many = [world.store.add(f"part-with-a-name-of-some-length-{n}", b"%d" % n) for n in range(1000)]
    wide = world.store.add("wide", b"w", many)
    with pytest.raises(UsageError, match="the narinfo would have") as caught:
        push(world.store, [wide], world.cache, world.key)
    assert caught.value.place == str(wide)
    assert world.cache.calls == []


def test_root_names_are_those_of_paths_without_versions() -> None:
    def name(text: str) -> str:
        return root_name(StorePath("0" * 32, text))

    assert name("nixos-system-web-25.11.20261123.abcdef") == "nixos-system-web"
    assert name("hello-2.12") == "hello"
    assert name("gtk+3-24") == "gtk_3"
    assert name("-7") == "_7"
    assert len(name("x" * 200)) == 100


def test_a_dry_run_writes_nothing(world) -> None:
    done = push(world.store, [world.top], world.cache, world.key, dry_run=True)
    assert (done.paths, done.new_paths, done.compressed_bytes) == (3, 3, 0)
    assert world.cache.data == {}
    push(world.store, [world.tool], world.cache, world.key)
    assert push(world.store, [world.top], world.cache, world.key, dry_run=True).new_paths == 1


def test_a_path_that_changed_on_disk_is_not_published(world) -> None:
    (world.store.real(world.tool) / "file").write_bytes(b"evil" * 50_000)
    with pytest.raises(DamagedError, match="changed on disk") as caught:
        push(world.store, [world.top], world.cache, world.key)
    assert caught.value.place == str(world.tool)
    for path in (world.tool, world.top):
        assert f"{path.digest}.narinfo" not in world.cache.data
    digest = world.store.infos[world.tool].nar_hash.nix32.partition(":")[2]
    assert f"nar/{digest}.nar.zst" not in world.cache.data
    assert not [key for key in world.cache.data if key.startswith(("manifests/", "roots/"))]


@pytest.mark.parametrize("change", ["longer", "shorter", "gone"])
def test_other_changes_on_disk(world, change: str) -> None:
    file = world.store.real(world.lib) / "file"
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(b"x" * (4_000_000 if change == "longer" else 10))
    with pytest.raises(DamagedError, match="changed on disk"):
        push(world.store, [world.top], world.cache, world.key)
    assert not [key for key in world.cache.data if key.endswith(".narinfo")]


def test_a_nar_that_is_there_already_is_used(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    entry = _narinfo(world, world.lib)
    del world.cache.data[f"{world.lib.digest}.narinfo"]
    world.cache.data[entry.url] += b"another level"
    done = push(world.store, [world.top], world.cache, world.key, check=True)
    assert (done.new_paths, done.compressed_bytes) == (1, 0)
    again = _narinfo(world, world.lib)
    assert again.file_hash is None
    assert again.file_size == entry.file_size + len(b"another level")


def test_a_large_nar_that_is_there_is_not_compressed_again(world) -> None:
    big = world.store.add("big", bytes(2_000_000))
    push(world.store, [big], world.cache, world.key)
    del world.cache.data[f"{big.digest}.narinfo"]
    world.cache.calls.clear()
    push(world.store, [big], world.cache, world.key, check=True)
    assert world.cache.count("put", "nar/") == 0
    assert f"{big.digest}.narinfo" in world.cache.data


def test_signatures_that_exist_are_kept(world) -> None:
    other = SecretKey.generate("other-1")
    info = world.store.infos[world.lib]
    upstream = SecretKey.generate("upstream-1")
    world.store.infos[world.lib] = info.signed(upstream)
    push(world.store, [world.top], world.cache, other)
    done = push(world.store, [world.top], world.cache, world.key)
    assert done.new_paths == 0
    names = [one.name for one in _narinfo(world, world.lib).info.signatures]
    assert names == ["other-1", "test-1", "upstream-1"]
    manifest = manifests.read(world.cache, done.manifests[world.top])
    assert {one.name for one in manifest.paths[0].info.signatures} == {"other-1", "test-1"}


def test_a_narinfo_of_another_build_is_replaced(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    (world.store.real(world.lib) / "file").write_bytes(b"built again, not the same")
    world.store.register(world.lib)
    done = push(world.store, [world.top], world.cache, world.key)
    assert done.new_paths == 1
    assert _narinfo(world, world.lib).info.nar_hash == world.store.infos[world.lib].nar_hash


def test_a_damaged_narinfo_is_replaced(world) -> None:
    push(world.store, [world.top], world.cache, world.key)
    good = world.cache.data[f"{world.lib.digest}.narinfo"]
    world.cache.data[f"{world.lib.digest}.narinfo"] = good[:50]
    push(world.store, [world.top], world.cache, world.key, check=True)
    assert _narinfo(world, world.lib).info == NarInfo.parse(good).info


def test_two_pushers_at_once_lose_nothing(world, tmp_path) -> None:
    cache = DirectoryObjects(tmp_path / "cache")
    keys = [SecretKey.generate(f"k-{n}") for n in range(4)]
    errors: list[Exception] = []

    def run(key: SecretKey, level: int) -> None:
        try:
            push(world.store, [world.top], cache, key, codec=Codec(level=level))
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(key, 1 + n)) for n, key in enumerate(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for path in (world.lib, world.tool, world.top):
        entry = NarInfo.parse(cache.get(f"{path.digest}.narinfo", 65536))
        assert [one.name for one in entry.info.signatures] == ["k-0", "k-1", "k-2", "k-3"]
    assert not list(cache.list("pending/"))


def test_several_roots_have_a_manifest_each(world) -> None:
    other = world.store.add("other", b"other", [world.lib])
    done = push(world.store, [world.top, other], world.cache, world.key)
    assert done.paths == 4
    assert len(manifests.read(world.cache, done.manifests[other]).paths) == 2
    assert len(manifests.read(world.cache, done.manifests[world.top]).paths) == 3


def test_kernel_and_initrd_stand_behind_the_toplevel(world) -> None:
    kernel = world.store.add("kernel", b"k")
    system = world.store.add("system", b"s", [kernel, world.lib, world.tool])
    (world.store.real(system) / "kernel").symlink_to(f"{kernel}/bzImage")
    (world.store.real(system) / "initrd").symlink_to("somewhere/else")
    world.store.register(system, [kernel, world.lib, world.tool])
    done = push(world.store, [system], world.cache, world.key)
    order = [entry.info.path for entry in manifests.read(world.cache, done.manifests[system]).paths]
    assert order == [system, kernel, world.lib, world.tool]


def test_a_cache_of_another_store_is_refused(world) -> None:
    world.cache.data["nix-cache-info"] = b"StoreDir: /gnu/store\n"
    with pytest.raises(UsageError, match="/gnu/store"):
        push(world.store, [world.top], world.cache, world.key)
    assert not [key for key in world.cache.data if key.startswith("nar/")]


def test_arguments_that_make_no_sense(world) -> None:
    for call in (
        lambda: push(world.store, [], world.cache, world.key),
        lambda: push(world.store, [world.top], world.cache, world.key, codec=Codec(level=22)),
    ):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(NotFoundError):
        push(world.store, [replace(world.top, name="gone")], world.cache, world.key)
    assert world.cache.data == {}


def test_an_interrupted_push_leaves_nothing_that_is_referred_to_and_is_not_done_twice(
    world,
) -> None:
    cancel = Cancel()

    def before(method: str, key: str) -> None:
        if method == "put" and key.startswith("nar/") and world.cache.count("put", "nar/") == 2:
            cancel.cancel()

    world.cache.before = before
    with pytest.raises(CancelledError):
        push(world.store, [world.top], world.cache, world.key, jobs=1, cancel=cancel)
    assert not [key for key in world.cache.data if key.startswith("manifests/")]
    pending = [key for key in world.cache.data if key.startswith("pending/")]
    assert len(json.loads(world.cache.data[pending[0]])["paths"]) == 6
    for key in list(world.cache.data):
        if key.endswith(".narinfo"):
            entry = NarInfo.parse(world.cache.data[key])
            for reference in entry.info.references:
                assert f"{reference.digest}.narinfo" in world.cache.data
    world.cache.before = lambda _method, _key: None
    sent = world.cache.count("put", "nar/")
    done = push(world.store, [world.top], world.cache, world.key)
    assert done.compressed_bytes > 0
    assert manifests.read(world.cache, done.manifests[world.top]).toplevel == world.top
    assert world.cache.count("put", "nar/") <= sent + 3


def test_progress_counts_up_to_the_whole(world) -> None:
    events: list[Step] = []
    done = push(world.store, [world.top], world.cache, world.key, progress=events.append)
    assert events[-1] == Step("push", done.nar_bytes, done.nar_bytes)


def test_pending_names_the_time_it_expires(world) -> None:
    seen: list[roots.Pending] = []

    def before(method: str, key: str) -> None:
        if method == "put" and key.startswith("nar/") and not seen:
            name = next(one for one in world.cache.data if one.startswith("pending/"))
            seen.append(roots.Pending.parse(world.cache.data[name]))

    world.cache.before = before
    push(world.store, [world.top], world.cache, world.key)
    assert seen[0].expires - seen[0].created == datetime.timedelta(hours=1)
    assert {path.digest for path in world.store.infos} < set(seen[0].paths)
