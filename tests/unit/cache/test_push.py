from __future__ import annotations

import datetime
import json
import threading
from dataclasses import replace

import pytest

from calve.cache import manifest as manifests
from calve.cache import roots
from calve.cache.directory import DirectoryObjects
from calve.cache.push import push
from calve.errors import CancelledError, DamagedError, NotFoundError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo
from calve.nix.signing import SecretKey
from calve.progress import Step
from calve.tasks import Cancel


def _narinfo(world, path) -> NarInfo:
    return NarInfo.parse(world.cache.data[f"{path.digest}.narinfo"])


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
    done = push(world.store, [world.top], world.cache, world.key, root=("web", "live"))
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
    kept = roots.read_root(world.cache, "web", "live")
    assert kept is not None
    assert kept.manifest == done.manifests[world.top]
    beside = world.cache.data[manifests.signatures_key(kept.manifest)]
    world.ring.verify(
        manifests.signed_bytes(kept.manifest), manifests.parse_signatures(beside, "here")
    )
    assert not [key for key in world.cache.data if key.startswith("pending/")]


def test_the_order_of_writes(world) -> None:
    push(world.store, [world.top], world.cache, world.key, root=("web", "live"))
    kinds = _kinds(world)
    assert kinds[0] == "pending"
    assert kinds[-4:] == ["manifests", "manifests", "roots", "-pending"]
    assert world.cache.calls[2][0] == "get"  # root, pending; then it looks at what exists
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
    push(world.store, [world.top], world.cache, world.key, root=("web", "live"))
    # per path: narinfo asked for, NAR, narinfo; root, pending, cache-info, manifest, signature, root, pending
    assert len(world.cache.calls) == 3 * 3 + 2 + 2 + 2 + 1 + 1
    world.cache.calls.clear()
    again = push(world.store, [world.top], world.cache, world.key, root=("web", "live"))
    assert (again.paths, again.new_paths, again.compressed_bytes) == (3, 0, 0)
    assert [method for method, _ in world.cache.calls] == ["get", "get"]


def test_one_changed_path_is_all_that_is_sent(world) -> None:
    first = push(world.store, [world.top], world.cache, world.key, root=("web", "live"))
    newer = world.store.add("top-2", b"2", [world.lib, world.tool])
    world.cache.calls.clear()
    done = push(world.store, [newer], world.cache, world.key, root=("web", "live"))
    assert (done.paths, done.new_paths) == (3, 1)
    assert world.cache.count("put", "nar/") == 1
    assert world.cache.count("put", ".narinfo") == 1
    assert world.cache.count("get", ".narinfo") == 1
    assert roots.read_root(world.cache, "web", "live").manifest == done.manifests[newer]
    assert manifests.key(first.manifests[world.top]) in world.cache.data


def test_a_previous_manifest_saves_the_questions(world) -> None:
    done = push(world.store, [world.lib], world.cache, world.key)
    previous = manifests.read(world.cache, done.manifests[world.lib])
    world.cache.calls.clear()
    push(world.store, [world.top], world.cache, world.key, previous=previous)
    assert world.cache.count("get", f"{world.lib.digest}.narinfo") == 0
    assert world.cache.count("get", ".narinfo") == 2


def test_a_dry_run_writes_nothing(world) -> None:
    done = push(world.store, [world.top], world.cache, world.key, dry_run=True)
    assert (done.paths, done.new_paths, done.compressed_bytes) == (3, 3, 0)
    assert world.cache.data == {}
    push(world.store, [world.tool], world.cache, world.key)
    assert push(world.store, [world.top], world.cache, world.key, dry_run=True).new_paths == 1


def test_a_path_that_changed_on_disk_is_not_published(world) -> None:
    (world.store.real(world.tool) / "file").write_bytes(b"evil" * 50_000)
    with pytest.raises(DamagedError, match="changed on disk") as caught:
        push(world.store, [world.top], world.cache, world.key, root=("web", "live"))
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
    done = push(world.store, [world.top], world.cache, world.key)
    assert (done.new_paths, done.compressed_bytes) == (1, 0)
    again = _narinfo(world, world.lib)
    assert again.file_hash is None
    assert again.file_size == entry.file_size + len(b"another level")


def test_a_large_nar_that_is_there_is_not_compressed_again(world) -> None:
    big = world.store.add("big", bytes(2_000_000))
    push(world.store, [big], world.cache, world.key)
    del world.cache.data[f"{big.digest}.narinfo"]
    world.cache.calls.clear()
    push(world.store, [big], world.cache, world.key)
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
    push(world.store, [world.top], world.cache, world.key)
    assert _narinfo(world, world.lib).info == NarInfo.parse(good).info


def test_two_pushers_at_once_lose_nothing(world, tmp_path) -> None:
    cache = DirectoryObjects(tmp_path / "cache")
    keys = [SecretKey.generate(f"k-{n}") for n in range(4)]
    errors: list[Exception] = []

    def run(key: SecretKey, level: int) -> None:
        try:
            push(world.store, [world.top], cache, key, level=level)
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
        lambda: push(world.store, [world.top, world.lib], world.cache, world.key, root=("a", "b")),
        lambda: push(world.store, [world.top], world.cache, world.key, level=22),
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
    assert len(json.loads(world.cache.data[pending[0]])["paths"]) == 3
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
    assert seen[0].expires - seen[0].created == datetime.timedelta(hours=6)
    assert set(seen[0].paths) == {path.digest for path in world.store.infos}
