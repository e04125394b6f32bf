from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from calve.errors import (
    CalveError,
    CancelledError,
    ConflictError,
    DamagedError,
    SpaceError,
    TransientError,
)
from calve.nix import leftover as left_module
from calve.nix import nar
from calve.nix import staging as module
from calve.nix import tree as removal
from calve.nix.hashes import Hash
from calve.nix.nar import Directory, End, Event, File
from calve.nix.narinfo import PathInfo
from calve.nix.staging import Staging, sync
from calve.nix.storepath import StorePath, text_path
from calve.nix.tree import remove_tree


def info(name: str) -> PathInfo:
    return PathInfo(text_path(name, Hash.sha256(name.encode())), Hash.sha256(b""), 1)


def tree(content: bytes = b"new") -> list[Event]:
    return [
        Directory(b""),
        Directory(b"d"),
        File(b"f", len(content), executable=False),
        content,
        End(),
        End(),
    ]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


@pytest.fixture
def users_store() -> Iterator[Path]:
    """A store of a normal user; we are that user meanwhile."""
    top = Path(tempfile.mkdtemp(dir="/tmp"))
    (top / "store").mkdir()
    root = os.geteuid() == 0
    try:
        if root:
            os.chown(top, 65534, 65534)
            os.chown(top / "store", 65534, 65534)
            os.seteuid(65534)
        yield top / "store"
    finally:
        if root:
            os.seteuid(0)
        fd = os.open(top.parent, os.O_RDONLY)
        remove_tree(fd, top.name)
        os.close(fd)


def hidden(store: Path) -> list[Path]:
    return [path for path in store.iterdir() if path.name.startswith(".")]


def check_published(path: Path, content: bytes = b"new") -> None:
    assert (path / "d/f").read_bytes() == content
    for some in (path, path / "d"):
        assert stat.S_IMODE(some.stat().st_mode) == 0o555
        assert some.stat().st_mtime == 1


def test_staged_is_out_of_sight_published_is_in_place(store: Path) -> None:
    a = info("a")
    with Staging(store) as staging:
        staging.stage(a, tree())
        assert staging.staged(a.path)
        (mine,) = hidden(store)
        assert stat.S_IMODE(mine.stat().st_mode) == 0o700
        assert list(store.iterdir()) == [mine]
        staging.publish(a.path)
        assert not staging.staged(a.path)
        staging.sync()
    assert list(store.iterdir()) == [store / a.path.basename]
    check_published(store / a.path.basename)
    staging.close()


def test_as_a_normal_user(users_store: Path) -> None:
    """Read-only directories are renamed, replaced and removed without root's rights."""
    a, b = info("a"), info("b")
    with Staging(users_store) as staging:
        for content in (b"old", b"new"):
            staging.stage(a, tree(content))
            staging.publish(a.path)
            check_published(users_store / a.path.basename, content)
        staging.stage(b, tree())
        staging.discard(b.path)
        staging.stage(b, tree())
    assert list(users_store.iterdir()) == [users_store / a.path.basename]


@pytest.mark.parametrize("kind", ["empty file", "read-only tree", "symlink"])
def test_a_leftover_is_replaced(store: Path, tmp_path: Path, kind: str) -> None:
    a = info("a")
    place = store / a.path.basename
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    if kind == "empty file":
        place.touch()
    elif kind == "symlink":
        place.symlink_to(outside)
    else:
        (place / "x").mkdir(parents=True)
        (place / "link").symlink_to(outside)
        (place / "x").chmod(0o555)
        place.chmod(0o555)
    with Staging(store) as staging:
        staging.stage(a, tree())
        staging.publish(a.path)
    check_published(place)
    assert (outside / "kept").exists()


def test_what_fails_leaves_nothing_and_can_be_tried_again(store: Path) -> None:
    a = info("a")

    def broken() -> Iterator[Event]:
        yield from tree()[:3]
        raise DamagedError("cut off")

    with Staging(store) as staging:
        with pytest.raises(DamagedError):
            staging.stage(a, broken())
        assert not staging.staged(a.path)
        with pytest.raises(CalveError, match="without being staged"):
            staging.publish(a.path)
        staging.stage(a, tree())
        staging.publish(a.path)
    check_published(store / a.path.basename)


def test_interrupted_staging_is_removed(store: Path) -> None:
    def broken() -> Iterator[Event]:
        yield from tree()[:3]
        raise KeyboardInterrupt

    with Staging(store) as staging:
        with pytest.raises(KeyboardInterrupt):
            staging.stage(info("a"), broken())
        assert {one.name for one in (store / staging.name).iterdir()} == {"boot", "lock"}


def test_discard_of_what_was_not_staged(store: Path) -> None:
    with Staging(store) as staging:
        staging.discard(info("a").path)


def test_threads_stage_side_by_side(store: Path) -> None:
    infos = [info(f"p{number}") for number in range(8)]
    with Staging(store) as staging:
        threads = [
            threading.Thread(target=staging.stage, args=(one, tree(one.path.name.encode())))
            for one in infos
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in infos:
            staging.publish(one.path)
    for one in infos:
        check_published(store / one.path.basename, one.path.name.encode())


def leftover(store: Path, name: str = ".calve-0123456789abcdef") -> Path:
    """Make what a killed run leaves."""
    (store / name / "x" / "y").mkdir(parents=True)
    (store / name / "lock").touch()
    (store / name / "x").chmod(0o555)
    return store / name


def test_clean_removes_the_dead_and_spares_the_living(store: Path) -> None:
    dead = leftover(store)
    nameless = store / ".calve-x"
    nameless.mkdir()
    (store / ".links").mkdir()
    valid = store / info("v").path.basename
    valid.mkdir()
    with Staging(store) as living, Staging(store) as mine:
        living.stage(info("a"), tree())
        assert mine.clean() == 2
        assert not dead.exists()
        assert not nameless.exists()
        assert living.staged(info("a").path)
        assert mine.clean() == 0
        living.publish(info("a").path)
    assert {path.name for path in store.iterdir()} == {
        ".links",
        valid.name,
        info("a").path.basename,
    }


def test_clean_skips_a_file_and_what_another_user_keeps(store: Path) -> None:
    (store / ".calve-file").touch()
    (store / ".calve-link").symlink_to("/")
    with Staging(store) as staging:
        assert staging.clean() == 0
    assert (store / ".calve-file").exists()


def test_a_clean_between_making_and_locking(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's `clean` takes our directory for a dead run's before we lock it: another is made."""
    lock = module.lock
    calls = 0

    def interrupted(directory_fd: int) -> int | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            for path in hidden(store):
                shutil.rmtree(path)
        return lock(directory_fd)

    monkeypatch.setattr(module, "lock", interrupted)
    with Staging(store) as staging:
        assert calls == 2
        staging.stage(info("a"), tree())
        assert len(hidden(store)) == 1


def test_a_clean_just_before_the_lock_is_taken(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is ours, but on a file that has no name any more."""
    flock = fcntl.flock
    calls = 0

    def interrupted(fd: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            for path in hidden(store):
                shutil.rmtree(path)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", interrupted)
    with Staging(store) as staging:
        assert calls == 2
        assert hidden(store) == [store / staging.name]


def test_a_clean_that_holds_the_lock(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = module.lock
    held: list[int] = []

    def slower(directory_fd: int) -> int | None:
        if not held:
            (path,) = hidden(store)
            held.append(os.open(path / "lock", os.O_RDWR | os.O_CREAT))
            fcntl.flock(held[0], fcntl.LOCK_EX)
        return lock(directory_fd)

    monkeypatch.setattr(module, "lock", slower)
    with Staging(store) as staging:
        assert len(hidden(store)) == 2
        assert staging.clean() == 0
    os.close(held[0])


# What interrupted runs left


def promised(name: str) -> PathInfo:
    """Return the facts of a path whose tree is `tree(name)`."""
    digest = hashlib.sha256()
    size = nar.emit(tree(name.encode()), digest.update)
    return PathInfo(
        text_path(name, Hash.sha256(name.encode())), Hash("sha256", digest.digest()), size
    )


def interrupted(store: Path, *infos: PathInfo, partly: PathInfo | None = None) -> Path:
    """Do what a run does that is killed: nothing is closed but its descriptors."""
    staging = Staging(store)
    for one in infos:
        staging.stage(one, tree(one.path.name.encode()))
    if partly is not None:
        (store / staging.name / partly.path.basename).mkdir()
    for fd in (staging._lock_fd, staging._fd, staging._store_fd):
        os.close(fd)
    return store / staging.name


@pytest.fixture(params=["root", "user"])
def anyones(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue("store" if request.param == "root" else "users_store")


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that names the boot."""
    file = tmp_path / "boot_id"
    file.write_text("first\n")
    monkeypatch.setattr(left_module, "_BOOT_ID", file)
    return file


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was hashed again."""
    names: list[str] = []
    whole = module.whole

    def noted(fd: int, place: Path, one: PathInfo) -> bool:
        names.append(one.path.name)
        return whole(fd, place, one)

    monkeypatch.setattr(module, "whole", noted)
    return names


def test_what_was_verified_is_adopted(anyones: Path, hashed: list[str]) -> None:
    a, b, c, d = map(promised, "abcd")
    dead = interrupted(anyones, a, b, partly=c)
    with Staging(anyones) as staging:
        assert staging.adopt([a, c, d]) == {a.path}
        assert not dead.exists()
        assert not staging.staged(c.path)
        staging.publish(a.path)
        check_published(anyones / a.path.basename, b"a")
    assert hashed == []
    assert list(anyones.iterdir()) == [anyones / a.path.basename]


def test_of_several_runs_that_live_and_are_dead(store: Path) -> None:
    a, b, c = map(promised, "abc")
    interrupted(store, a)
    interrupted(store, a, b)
    with Staging(store) as living, Staging(store) as mine:
        living.stage(c, tree(b"c"))
        assert mine.adopt([a, b, c]) == {a.path, b.path}
        assert living.staged(c.path)
        assert len(hidden(store)) == 2


def test_a_path_of_another_hash_is_not_adopted(store: Path) -> None:
    a = promised("a")
    interrupted(store, replace(a, nar_hash=Hash.sha256(b"another build")))
    with Staging(store) as staging:
        assert staging.adopt([a]) == set()
        assert hidden(store) == [store / staging.name]


@pytest.mark.parametrize("damage", ["none", "empty file", "mode", "time", "more", "less"])
def test_what_another_boot_left_is_hashed(
    store: Path, boots: Path, hashed: list[str], damage: str
) -> None:
    """A power cut leaves files of 0 bytes under good names."""
    a, b = promised("a"), promised("b")
    dead = interrupted(store, a, b)
    boots.write_text("second\n")
    (place,) = (one for one in dead.iterdir() if a.path.digest in one.name)
    if damage == "empty file":
        (place / "d/f").chmod(0o644)
        (place / "d/f").write_bytes(b"")
        (place / "d/f").chmod(0o444)
        os.utime(place / "d/f", ns=(10**9, 10**9))
    elif damage == "mode":
        (place / "d/f").chmod(0o644)
    elif damage == "time":
        os.utime(place / "d", (2, 2))
    elif damage == "more":
        (place / "d").chmod(0o755)
        (place / "d/g").touch()
    elif damage == "less":
        shutil.rmtree(place / "d")
    with Staging(store) as staging:
        found = staging.adopt([a, b])
        assert found == ({a.path, b.path} if damage == "none" else {b.path})
        assert hashed == ["a", "b"]
        assert staging.staged(a.path) == (damage == "none")
        staging.discard(a.path)
        staging.stage(a, tree(b"a"))


@pytest.mark.parametrize("boot", [b"", None])
def test_where_the_boot_is_not_known_all_is_hashed(
    store: Path, boots: Path, hashed: list[str], boot: bytes | None
) -> None:
    if boot is None:
        boots.unlink()
    a = promised("a")
    dead = interrupted(store, a)
    if boot is not None:
        (dead / "boot").write_bytes(boot)
    with Staging(store) as staging:
        assert staging.adopt([a]) == {a.path}
    assert hashed == ["a"]


def test_what_others_could_write_to_is_not_adopted(store: Path) -> None:
    a = promised("a")
    interrupted(store, a).chmod(0o777)
    with Staging(store) as staging:
        assert staging.adopt([a]) == set()
        assert hidden(store) == [store / staging.name]


def test_a_run_that_is_interrupted_while_it_adopts_loses_nothing(store: Path) -> None:
    infos = [promised(name) for name in "abc"]
    interrupted(store, *infos)

    def cut() -> Iterator[PathInfo]:
        yield infos[0]
        raise KeyboardInterrupt

    staging = Staging(store)
    with pytest.raises(KeyboardInterrupt):
        staging.adopt(cut())
    staging.close(keep=True)
    with Staging(store) as another:
        assert another.adopt(infos) == {one.path for one in infos}


@pytest.mark.parametrize("error", [CancelledError(), TransientError("reset"), KeyboardInterrupt()])
def test_what_passes_leaves_what_is_verified_and_nothing_else(
    store: Path, error: BaseException
) -> None:
    a, b = promised("a"), promised("b")
    with pytest.raises(type(error)), Staging(store) as staging:
        staging.stage(a, tree(b"a"))
        (store / staging.name / b.path.basename).mkdir()
        raise error
    (left,) = hidden(store)
    assert len(list(left.iterdir())) == 3
    with Staging(store) as staging:
        assert staging.adopt([a, b]) == {a.path}


@pytest.mark.parametrize("error", [SpaceError("full"), DamagedError("bad"), CancelledError(), None])
def test_what_does_not_pass_or_nothing_to_keep_leaves_nothing(
    store: Path, error: BaseException | None
) -> None:
    with contextlib.suppress(CalveError), Staging(store) as staging:
        if not isinstance(error, CancelledError):
            staging.stage(promised("a"), tree(b"a"))
        if error is not None:
            raise error
    assert list(store.iterdir()) == []


def test_what_was_published_and_not_registered_is_recognised(
    store: Path, hashed: list[str]
) -> None:
    a, b, c = map(promised, "abc")
    with Staging(store) as staging:
        for one, content in ((a, b"a"), (b, b"x")):
            staging.stage(one, tree(content))
            staging.publish(one.path)
    with Staging(store) as staging:
        assert staging.adopt([a, b, c]) == {a.path}
        assert hashed == ["a", "b"]
        assert (store / a.path.basename).exists()
        staging.publish(a.path)
        assert not staging.staged(a.path)
    check_published(store / a.path.basename, b"a")
    assert (store / b.path.basename).exists()


def test_what_was_recognised_is_left_alone_or_staged_anew(store: Path) -> None:
    a = promised("a")
    with Staging(store) as staging:
        staging.stage(a, tree(b"a"))
        staging.publish(a.path)
    with Staging(store) as staging:
        assert staging.adopt([a]) == {a.path}
        staging.discard(a.path)
        assert not staging.staged(a.path)
    check_published(store / a.path.basename, b"a")


def test_what_was_recognised_and_replaced_since_is_a_conflict(store: Path) -> None:
    a = promised("a")
    for _ in range(2):
        with Staging(store) as staging:
            staging.stage(a, tree(b"a"))
            staging.publish(a.path)
    with Staging(store) as staging, Staging(store) as other:
        assert staging.adopt([a]) == {a.path}
        other.stage(a, tree(b"x"))
        other.publish(a.path)
        with pytest.raises(ConflictError):
            staging.publish(a.path)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(CalveError):
        Staging(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(CalveError):
        Staging(tmp_path / "file")


def test_sync_reports_what_the_disk_says(store: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        sync(-1)
    staging = Staging(store)
    with staging:
        staging.sync()


def test_remove_tree(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        remove_tree(fd, "nothing")
        path: StorePath = info("x").path
        (tmp_path / path.basename).touch()
        remove_tree(fd, path.basename)
        assert not list(tmp_path.iterdir())
    finally:
        os.close(fd)


def test_a_directory_of_many_entries_is_removed_a_few_at_a_time(tmp_path: Path) -> None:
    crowd = tmp_path / "crowd"
    for number in range(5):
        (crowd / f"d{number}").mkdir(parents=True)
        for each in range(600):
            (crowd / f"d{number}" / f"f{each}").touch()
    for each in range(2500):
        (crowd / f"f{each}").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    most = 0

    def some(at: int) -> list[tuple[str, bool]]:
        nonlocal most
        found = real(at)
        most = max(most, len(found))
        return found

    real = removal._some
    removal._some = some
    try:
        remove_tree(fd, "crowd")
    finally:
        removal._some = real
        os.close(fd)
    assert not list(tmp_path.iterdir())
    assert most == 1024
