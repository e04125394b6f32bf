"""The boot store: what is valid and what is not, registration, generations, roots."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from calve.boot import served
from calve.boot.agent import _concurrency
from calve.boot.record import Record
from calve.boot.store import BootStore
from calve.errors import DamagedError
from calve.nix import nar, registration
from calve.nix.hashes import Hash, encode32
from calve.nix.nar import Directory, End, File
from calve.nix.narinfo import PathInfo
from calve.nix.sink import Sink
from calve.nix.storepath import StorePath


def made(name, *references):
    content = name.encode() * 10
    events = [Directory(b""), File(b"init", len(content), executable=True), content, End()]
    digest = hashlib.sha256()
    size = nar.emit(events, digest.update)
    path = StorePath(encode32(hashlib.sha256(name.encode()).digest()[:20]), name)
    info = PathInfo(
        path,
        Hash("sha256", digest.digest()),
        size,
        tuple(sorted(path if one == "self" else one.path for one in references)),
    )
    EVENTS[path] = events
    return info


EVENTS: dict[StorePath, list[nar.Event]] = {}
LIB = made("lib")
APP = made("app", LIB, "self")
ONE = made("one", APP)
NEW = made("new")
TWO = made("two", APP, NEW)
ALONE = made("alone")


def pulled(store, *infos):
    for info in infos:
        store.stage(info, iter(EVENTS[info.path]))
    store.commit(infos)


def booted(root, system, *infos):
    with BootStore(root) as store:
        if infos:
            pulled(store, *infos)
        return store.finish(system.path)


def missing(root, *infos):
    with BootStore(root) as store:
        return [path.name for path in store.missing(info.path for info in infos)]


def registered(root):
    place = root / "nix-path-registration"
    return {info.path.name: info for info in registration.parse(place.read_bytes())}


def record(root):
    return Record.parse((root / "nix/var/calve/committed.json").read_bytes())


def link(root, name):
    return os.readlink(root / "nix/var/nix/profiles" / name)


def test_it_is_a_sink(tmp_path):
    with BootStore(tmp_path) as store:
        sink: Sink = store
        assert sink.missing([LIB.path, APP.path]) == [LIB.path, APP.path]
        store.stage(LIB, iter(EVENTS[LIB.path]))
        assert sink.missing([LIB.path]) == [LIB.path]
        store.discard(LIB.path)
        pulled(store, LIB)
        assert sink.missing([LIB.path, APP.path]) == [APP.path]


def test_a_whole_boot(tmp_path):
    (tmp_path / "nix/store/.calve-0123456789abcdef/x").mkdir(parents=True)
    assert booted(tmp_path, ONE, LIB, APP, ONE) == 1
    assert link(tmp_path, "system") == "system-1-link"
    assert link(tmp_path, "system-1-link") == str(ONE.path)
    assert registered(tmp_path) == {info.path.name: info for info in (LIB, APP, ONE)}
    assert set(record(tmp_path).committed) == {LIB.path, APP.path, ONE.path}
    assert record(tmp_path).fetched == {}
    assert not list((tmp_path / "nix/store").glob(".*"))
    assert missing(tmp_path, LIB, APP, ONE) == []
    with BootStore(tmp_path) as store:
        assert store.current() == ONE.path
        assert store.whole(ONE.path)
        assert not store.whole(TWO.path)


def test_what_nothing_names_is_fetched_again_and_replaced(tmp_path):
    """A power cut leaves files of 0 bytes under final names: existing is no proof."""
    place = tmp_path / "nix/store" / LIB.path.basename
    place.mkdir(parents=True)
    (place / "init").write_bytes(b"")
    (place / "more").write_bytes(b"")
    assert missing(tmp_path, LIB) == ["lib"]
    with BootStore(tmp_path) as store:
        pulled(store, LIB)
    assert sorted(child.name for child in place.iterdir()) == ["init"]
    assert (place / "init").read_bytes() == b"lib" * 10


def test_a_named_path_that_is_not_there_is_not_valid(tmp_path):
    booted(tmp_path, ONE, LIB, APP, ONE)
    place = tmp_path / "nix/store" / LIB.path.basename
    place.chmod(0o755)
    (place / "init").unlink()
    place.rmdir()
    assert missing(tmp_path, LIB, APP, ONE) == ["lib"]
    with BootStore(tmp_path) as store:
        assert not store.whole(ONE.path)
        with pytest.raises(DamagedError, match="not complete"):
            store.finish(ONE.path)
    assert link(tmp_path, "system") == "system-1-link"
    assert booted(tmp_path, ONE, LIB) == 1
    assert "lib" in registered(tmp_path)


def test_a_commit_cut_after_the_names_and_before_the_record(tmp_path, monkeypatch):
    with BootStore(tmp_path) as store:
        pulled(store, LIB)
        monkeypatch.setattr(store, "_write_record", lambda _record: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pulled(store, APP)
    assert (tmp_path / "nix/store" / APP.path.basename).exists()
    assert missing(tmp_path, LIB, APP) == ["app"]


def test_bytes_are_on_the_disk_before_names_and_names_before_the_record(tmp_path, monkeypatch):
    log = []

    def note(target, name, what):
        real = getattr(target, name)

        def noted(*arguments, **options):
            log.append(what)
            return real(*arguments, **options)

        monkeypatch.setattr(target, name, noted)

    with BootStore(tmp_path) as store:
        note(store._staging, "sync", "sync")
        note(store._staging, "publish", "name")
        note(store, "_write_record", "record")
        pulled(store, LIB, APP, ONE)
        assert log == ["sync", "name", "name", "name", "record"]
        log.clear()
        from calve.boot import store as room

        note(room.durable, "symlink", "link")
        note(room.durable, "replace", "file")
        store.finish(ONE.path)
    # Registration and record, flushed; the generation, flushed; the profile, flushed.
    assert log == ["file", "record", "file", "sync", "link", "sync", "link", "sync"]


def test_an_unfinished_pull_is_kept(tmp_path):
    with BootStore(tmp_path) as store:
        pulled(store, LIB, APP)
    assert set(record(tmp_path).fetched) == {LIB.path, APP.path}
    assert not (tmp_path / "nix-path-registration").exists()
    assert missing(tmp_path, LIB, APP, ONE) == ["one"]
    assert booted(tmp_path, ONE, ONE) == 1
    assert record(tmp_path).fetched == {}


def test_after_the_registration_was_loaded_roots_decide(tmp_path):
    booted(tmp_path, ONE, LIB, APP, ONE, ALONE)
    # Until stage 2 has loaded it, everything registered is valid.
    assert missing(tmp_path, LIB, APP, ONE, ALONE) == []
    (tmp_path / "nix-path-registration").unlink()
    # The collector may have been at what nothing roots, even where it still stands there.
    assert missing(tmp_path, LIB, APP, ONE, ALONE) == ["alone"]
    booted(tmp_path, TWO, NEW, TWO)
    assert "alone" not in registered(tmp_path)
    assert set(registered(tmp_path)) == {"lib", "app", "one", "new", "two"}


@pytest.mark.parametrize("root", ["profile", "generation", "last-good"])
def test_each_root_keeps_its_closure_valid(tmp_path, root):
    booted(tmp_path, ONE, LIB, APP, ONE)
    booted(tmp_path, TWO, NEW, TWO)
    (tmp_path / "nix-path-registration").unlink()
    profiles = tmp_path / "nix/var/nix/profiles"
    last_good = tmp_path / "nix/var/nix/gcroots/calve/last-good"
    served.confirm(tmp_path, ONE.path)
    assert os.readlink(last_good) == str(ONE.path)
    if root != "last-good":
        last_good.unlink()
    if root != "generation":
        (profiles / "system-1-link").unlink()
    expected = ["one"] if root == "profile" else []
    assert missing(tmp_path, ONE, TWO, NEW, LIB) == expected


def test_a_damaged_or_newer_record_means_fetching_again(tmp_path):
    booted(tmp_path, ONE, LIB, APP, ONE)
    (tmp_path / "nix-path-registration").unlink()
    place = tmp_path / "nix/var/calve/committed.json"
    good = place.read_bytes()
    for bad in (b"", good[:50], json.dumps({"version": 2}).encode()):
        place.write_bytes(bad)
        assert missing(tmp_path, LIB, APP, ONE) == ["lib", "app", "one"]
    place.write_bytes(good)
    assert missing(tmp_path, LIB) == []


@pytest.mark.parametrize("data", [b"junk", b"/nix/store/x\n", b"\xff\n" * 9])
def test_a_damaged_registration_vouches_for_nothing(tmp_path, data):
    (tmp_path / "nix/store" / LIB.path.basename).mkdir(parents=True)
    (tmp_path / "nix-path-registration").write_bytes(data)
    assert missing(tmp_path, LIB) == ["lib"]


def test_an_image_s_registration_vouches(tmp_path):
    with BootStore(tmp_path) as store:
        pulled(store, LIB, APP, ONE)
    (tmp_path / "nix/var/calve/committed.json").unlink()
    (tmp_path / "nix-path-registration").write_bytes(b"".join(registration.dump([LIB, APP, ONE])))
    assert missing(tmp_path, LIB, APP, ONE, NEW) == ["new"]
    assert booted(tmp_path, ONE) == 1
    assert set(record(tmp_path).committed) == {LIB.path, APP.path, ONE.path}


def test_the_registration_is_closed_under_references(tmp_path):
    """`nix-store --load-db` refuses a list with a reference that is not in it."""
    with BootStore(tmp_path) as store:
        pulled(store, LIB, APP, ONE)
        orphan = made("orphan", NEW)
        child = made("child", orphan)
        pulled(store, orphan, child)
        store.register()
    assert set(registered(tmp_path)) == {"lib", "app", "one"}


def test_generations_count_up(tmp_path):
    assert booted(tmp_path, ONE, LIB, APP, ONE) == 1
    assert booted(tmp_path, ONE) == 1
    assert booted(tmp_path, TWO, NEW, TWO) == 2
    assert booted(tmp_path, TWO) == 2
    assert booted(tmp_path, ONE) == 3
    assert served.read(tmp_path) == served.Served()  # what is good, stage 2 says
    # Numbers are not used again where a generation between was deleted.
    (tmp_path / "nix/var/nix/profiles/system-2-link").unlink()
    assert booted(tmp_path, TWO) == 4


def test_other_links_in_the_folder_of_profiles_do_not_disturb(tmp_path):
    profiles = tmp_path / "nix/var/nix/profiles"
    profiles.mkdir(parents=True)
    for name in ("system-x-link", "system--link", "default", "system-9-link-old"):
        (profiles / name).symlink_to("/nowhere")
    (profiles / "system-7-link").symlink_to("/nix/store/short")
    assert booted(tmp_path, ONE, LIB, APP, ONE) == 8


def test_leftovers_of_a_dead_run_are_removed_and_a_live_one_s_are_not(tmp_path):
    store_dir = tmp_path / "nix/store"
    dead = store_dir / ".calve-0123456789abcdef"
    (dead / LIB.path.basename).mkdir(parents=True)
    with BootStore(tmp_path) as live:
        assert live.adopt([LIB]) == set()
        assert not dead.exists()
        live.stage(LIB, iter(EVENTS[LIB.path]))
        with BootStore(tmp_path) as other:
            assert other.adopt([LIB]) == set()
            assert len([name for name in os.listdir(store_dir) if name[0] == "."]) == 2
        live.commit([LIB])
    assert os.listdir(store_dir) == [LIB.path.basename]


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_cut_off_boot_had_verified_is_not_fetched_again(tmp_path, damaged):
    """LIB was staged, APP published and not recorded; not even this kernel's word is taken for it."""
    store = BootStore(tmp_path)
    for info in (LIB, APP):
        store.stage(info, iter(EVENTS[info.path]))
    store.flush()
    store._staging.publish(APP.path)
    store.close(keep=True)
    if damaged:
        for file in tmp_path.rglob("init"):
            file.chmod(0o755)
            file.write_bytes(b"")
            file.chmod(0o555)
            os.utime(file, (1, 1))
    with BootStore(tmp_path) as store:
        assert store.missing([LIB.path, APP.path]) == [LIB.path, APP.path]
        assert store.adopt([LIB, APP]) == (set() if damaged else {LIB.path, APP.path})
        if not damaged:
            store.commit([LIB, APP])
            assert store.missing([LIB.path, APP.path]) == []


def test_a_system_that_is_not_complete_does_not_become_the_profile(tmp_path):
    with BootStore(tmp_path) as store:
        pulled(store, ONE)
        with pytest.raises(DamagedError, match="not complete"):
            store.finish(ONE.path)
        assert store.current() is None
    assert not (tmp_path / "nix/var/nix/profiles/system").is_symlink()


def test_a_path_of_another_build_is_not_confused(tmp_path):
    booted(tmp_path, ONE, LIB, APP, ONE)
    assert replace(LIB, nar_size=1) != registered(tmp_path)["lib"]
    assert registered(tmp_path)["lib"].nar_hash == LIB.nar_hash


@pytest.mark.parametrize(
    ("budget_mb", "jobs", "decoders"),
    [(0, 1, 1), (28, 1, 1), (35, 1, 1), (48, 8, 2), (64, 8, 3), (1000, 8, 3)],
)
def test_concurrency_follows_the_memory_budget(budget_mb, jobs, decoders):
    assert _concurrency(budget_mb) == (jobs, decoders)


def test_the_store_is_made_below_the_root_alone(tmp_path):
    with BootStore(tmp_path):
        pass
    assert {str(place.relative_to(tmp_path)) for place in Path(tmp_path).rglob("*")} == {
        "nix",
        "nix/store",
        "nix/var",
        "nix/var/calve",
        "nix/var/nix",
        "nix/var/nix/profiles",
    }
