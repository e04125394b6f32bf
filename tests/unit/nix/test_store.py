from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest

from calve.errors import CalveError, ConflictError, DamagedError, NotFoundError, VerificationError
from calve.nix import database, nar
from calve.nix.hashes import Hash
from calve.nix.nar import Directory, End, Event, File, Symlink
from calve.nix.narinfo import PathInfo
from calve.nix.sink import Sink
from calve.nix.staging import Staging
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath, fixed_output


def made(name: str, content: bytes, *references: PathInfo) -> tuple[PathInfo, list[Event]]:
    events: list[Event] = [
        Directory(b""),
        File(b"file", len(content), executable=False),
        content,
        End(),
    ]
    digest = hashlib.sha256()
    size = nar.emit(events, digest.update)
    value = Hash("sha256", digest.digest())
    paths = tuple(sorted(one.path for one in references))
    return PathInfo(fixed_output(name, value, paths), value, size, paths), events


A, A_EVENTS = made("a", b"A")
B, B_EVENTS = made("b", b"B", A)


def pulled(store: Sink) -> None:
    """Pull as the engine does."""
    wanted = {info.path: (info, events) for info, events in ((A, A_EVENTS), (B, B_EVENTS))}
    for path in store.missing(wanted):
        store.stage(wanted[path][0], iter(wanted[path][1]))
    store.commit([A, B])


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "nix/store").iterdir()}


def test_pull(tmp_path: Path) -> None:
    with LocalStore(tmp_path, create=True) as store:
        assert store.missing([B.path, A.path]) == [B.path, A.path]
        pulled(store)
        assert store.missing([B.path, A.path]) == []
        assert store.contains(B.path)
        assert store.path_info(B.path) == B
        assert store.closure([B.path]) == [A, B]
        assert store.real(A.path) == tmp_path / "nix/store" / A.path.basename
        out = io.BytesIO()
        assert nar.dump(store.real(A.path), out.write) == A.nar_size
        assert Hash.sha256(out.getvalue()) == A.nar_hash
        pulled(store)
    store.close()
    assert names(tmp_path) == {".links", A.path.basename, B.path.basename}
    with LocalStore(tmp_path) as store:
        assert store.closure([B.path]) == [A, B]


def test_reading_writes_nothing(tmp_path: Path) -> None:
    with LocalStore(tmp_path, create=True) as store:
        pulled(store)
    before = names(tmp_path)
    with LocalStore(tmp_path) as store:
        store.closure([B.path])
        assert names(tmp_path) == before


def test_existing_is_not_valid(tmp_path: Path) -> None:
    """What a power cut left under its final name is replaced."""
    with LocalStore(tmp_path, create=True) as store:
        store.real(A.path).mkdir()
        (store.real(A.path) / "file").touch()
        store.real(A.path).chmod(0o555)
        assert not store.contains(A.path)
        pulled(store)
        assert (store.real(A.path) / "file").read_bytes() == b"A"


def test_not_valid(tmp_path: Path) -> None:
    with LocalStore(tmp_path, create=True) as store:
        with pytest.raises(NotFoundError):
            store.path_info(A.path)
        with pytest.raises(NotFoundError):
            store.closure([A.path])


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        LocalStore(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CalveError):
        LocalStore(tmp_path / "file", create=True)


def test_commit_of_what_was_not_staged(tmp_path: Path) -> None:
    with LocalStore(tmp_path, create=True) as store:
        store.stage(A, iter(A_EVENTS))
        with pytest.raises(CalveError, match="without being staged"):
            store.commit([A, B])
        assert not store.contains(A.path)


def test_a_valid_path_is_never_touched(tmp_path: Path) -> None:
    """Another that pulls at the same time was first: the same is dropped, another hash is refused."""
    with LocalStore(tmp_path, create=True) as store, LocalStore(tmp_path) as other:
        store.stage(A, iter(A_EVENTS))
        other.stage(A, iter(A_EVENTS))
        other.commit([A])
        inode = other.real(A.path).stat().st_ino
        store.commit([A])
        assert store.real(A.path).stat().st_ino == inode
        store.stage(A, iter(B_EVENTS))
        with pytest.raises(VerificationError):
            store.commit([replace(A, nar_hash=B.nar_hash)])
        assert (store.real(A.path) / "file").read_bytes() == b"A"


def test_missing_reference_registers_nothing(tmp_path: Path) -> None:
    with LocalStore(tmp_path, create=True) as store:
        store.stage(B, iter(B_EVENTS))
        with pytest.raises(DamagedError):
            store.commit([B])
        assert store.missing([B.path]) == [B.path]


def test_discard(tmp_path: Path) -> None:
    with LocalStore(tmp_path, create=True) as store:
        store.discard(A.path)
        store.stage(A, iter(B_EVENTS))
        store.discard(A.path)
        pulled(store)
        assert (store.real(A.path) / "file").read_bytes() == b"A"


def test_synced_before_publishing_and_before_registering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[bool, bool]] = []
    with LocalStore(tmp_path, create=True) as store:

        def sync(staging: Staging) -> None:
            steps.append((store.real(A.path).exists(), store.contains(A.path)))

        monkeypatch.setattr(Staging, "sync", sync)
        pulled(store)
        assert steps == [(False, False), (True, False)]


def test_nobody_registers_while_paths_are_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_S", 0.01)
    publish = Staging.publish
    with LocalStore(tmp_path, create=True) as store, LocalStore(tmp_path) as other:

        def meanwhile(staging: Staging, path: StorePath) -> None:
            with pytest.raises(ConflictError):
                other.database.register([A])
            publish(staging, path)

        monkeypatch.setattr(Staging, "publish", meanwhile)
        store.stage(A, iter(A_EVENTS))
        store.commit([A, A])
        assert other.contains(A.path)


def test_garbage_collection_and_pulls_exclude_each_other(tmp_path: Path) -> None:
    with (
        LocalStore(tmp_path, create=True) as store,
        (tmp_path / "nix/var/nix/gc.lock").open("r+") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        store.contains(A.path)
        with pytest.raises(ConflictError) as caught:
            store.missing([A.path])
        assert caught.value.hint
        with pytest.raises(ConflictError):
            store.stage(A, iter(A_EVENTS))
        fcntl.flock(lock, fcntl.LOCK_UN)
        store.missing([A.path])
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        store.close()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_clean(tmp_path: Path) -> None:
    with LocalStore(tmp_path, create=True) as store:
        (store.store_dir / ".calve-0123/x").mkdir(parents=True)
        assert store.clean() == 1


def test_what_a_killed_pull_staged_or_published_is_adopted(tmp_path: Path) -> None:
    """Killed while it commits: B is in its place, A not yet, and nothing is registered."""
    with LocalStore(tmp_path, create=True) as store:
        store.stage(A, iter(A_EVENTS))
        store.stage(B, iter(B_EVENTS))
        store._writable().publish(B.path)
        store.close(keep=True)
    with LocalStore(tmp_path) as store:
        assert store.missing([A.path, B.path]) == [A.path, B.path]
        assert store.adopt([A, B]) == {A.path, B.path}
        store.commit([A, B])
        assert store.closure([B.path]) == [A, B]
    assert not [path for path in store.store_dir.iterdir() if path.name.startswith(".calve")]


def test_what_another_run_has_registered_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    with LocalStore(tmp_path, create=True) as store:
        assert store.missing([A.path]) == [A.path]
        with LocalStore(tmp_path) as other:
            pulled(other)
        assert store.adopt([A, B]) == {A.path, B.path}
        store.commit([A, B])
        assert store.closure([B.path]) == [A, B]
        assert store.real(A.path).exists()
        store.flush()


def test_a_file_that_calls_itself_a_derivation(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"Derive(", b"Derive([(\xff\xff)])", b"\0" * 100)):
        events: list[Event] = [File(b"", len(content), executable=False)]
        if content:
            events.append(content)
        info = PathInfo(fixed_output("x.drv", Hash.sha256(content)), Hash.sha256(content), 200)
        with LocalStore(tmp_path / str(number), create=True) as store:
            store.stage(info, iter(events))
            with pytest.raises(DamagedError):
                store.commit([info])
            assert not store.contains(info.path)


def test_a_link_that_calls_itself_a_derivation_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real.drv").write_bytes(b'Derive([("out","","","")])')
    trees: list[list[Event]] = [
        [Symlink(b"", str(tmp_path / "real.drv").encode())],
        [Symlink(b"", b"/dev/zero")],
        [Directory(b""), End()],
    ]
    for number, events in enumerate(trees):
        info = PathInfo(fixed_output("x.drv", Hash.sha256(b"")), Hash.sha256(b""), 200)
        with LocalStore(tmp_path / str(number), create=True) as store:
            store.stage(info, iter(events))
            with pytest.raises(DamagedError, match="not a derivation"):
                store.commit([info])
            assert not store.contains(info.path)


def test_a_store_on_a_file_system_that_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalStore(tmp_path, create=True) as store:
        pulled(store)
    real = os.open

    def refuse(path: str | Path, flags: int, *more: int, **where: int) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *more, **where)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    with LocalStore(tmp_path) as store:
        assert store.closure([B.path]) == [A, B]
        assert store.missing([A.path]) == []
        with pytest.raises(CalveError, match="Read-only"):
            store.stage(A, iter(A_EVENTS))
