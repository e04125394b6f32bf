from __future__ import annotations

import datetime
import errno
import fcntl
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from calve.errors import (
    CalveError,
    ConflictError,
    DamagedError,
    NotFoundError,
    SpaceError,
    UsageError,
    VerificationError,
)
from calve.nix import database as module
from calve.nix.database import Database
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.storepath import StorePath, text_path

KEY = SecretKey.generate("k-1")
OTHER = SecretKey.generate("a-1")


class Clock:
    def monotonic(self) -> float:
        return 0.0

    def now(self) -> datetime.datetime:
        return datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)

    def wait(self, event: threading.Event, seconds: float) -> bool:
        raise NotImplementedError


def info(name: str, *references: str) -> PathInfo:
    return PathInfo(
        path(name), Hash.sha256(name.encode()), 112, tuple(sorted(path(one) for one in references))
    )


def path(name: str) -> StorePath:
    return text_path(name, Hash.sha256(name.encode()))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path, create=True, clock=Clock()) as opened:
        yield opened


def rows(state: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(state / "db/db.sqlite")) as connection:
        return connection.execute(query).fetchall()


def test_created_like_nix(database: Database, tmp_path: Path) -> None:
    assert (tmp_path / "db/schema").read_bytes() == b"10"
    for name in ("gcroots/auto", "gcroots/per-user", "profiles/per-user", "temproots"):
        assert (tmp_path / name).is_dir()
    assert (tmp_path / "gc.lock").exists()
    assert os.readlink(tmp_path / "gcroots/profiles") == str(tmp_path / "profiles")
    assert rows(tmp_path, "pragma journal_mode") == [("wal",)]
    assert rows(tmp_path, "select * from ValidPaths") == []


def test_opened_again_and_side_by_side(database: Database, tmp_path: Path) -> None:
    with Database(tmp_path, create=True) as again:
        database.register([info("a")])
        assert again.valid([path("a")]) == {path("a")}
    with Database(tmp_path) as again:
        assert again.valid([path("a")]) == {path("a")}
    again.close()


def test_registered_and_read_back(database: Database, tmp_path: Path) -> None:
    a = (
        replace(info("a", "a", "b"), deriver=path("a.drv"), ca="fixed:r:x")
        .signed(KEY)
        .signed(OTHER)
    )
    b = info("b")
    database.register([a, b])
    assert database.path_info(a.path) == a
    assert database.path_info(b.path) == b
    assert database.path_info(path("c")) is None
    assert database.valid([path("c"), a.path, b.path]) == {a.path, b.path}
    query = (
        "select path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca from ValidPaths"
    )
    now = int(Clock().now().timestamp())
    signatures = " ".join(made.dump() for made in a.signatures)
    assert rows(tmp_path, query) == [
        (str(a.path), a.nar_hash.hex, now, str(a.deriver), 112, None, signatures, "fixed:r:x"),
        (str(b.path), b.nar_hash.hex, now, None, 112, None, None, None),
    ]
    assert rows(tmp_path, "select referrer, reference from Refs order by 1, 2") == [(1, 1), (1, 2)]


def test_twice_is_once(database: Database, tmp_path: Path) -> None:
    database.register([info("a", "a"), info("a", "a")])
    database.register([info("a", "a"), info("b", "a")])
    assert rows(tmp_path, "select count(*) from ValidPaths") == [(2,)]
    assert rows(tmp_path, "select count(*) from Refs") == [(2,)]


def test_signatures_are_merged(database: Database) -> None:
    database.register([info("a").signed(KEY)])
    database.register([info("a").signed(OTHER)])
    database.register([info("a")])
    found = database.path_info(path("a"))
    assert found is not None
    assert [made.name for made in found.signatures] == ["a-1", "k-1"]


def test_another_hash_is_refused_and_nothing_is_registered(
    database: Database, tmp_path: Path
) -> None:
    database.register([info("a")])
    changed = replace(info("a"), nar_hash=Hash.sha256(b"other"))
    with pytest.raises(VerificationError) as caught:
        database.register([info("b"), changed])
    assert caught.value.place == str(path("a"))
    assert database.valid([path("b")]) == set()
    assert rows(tmp_path, "select count(*) from ValidPaths") == [(1,)]
    database.register([info("b")])


def test_a_missing_reference_is_refused_and_nothing_is_registered(database: Database) -> None:
    with pytest.raises(DamagedError, match=r"refers to .*-b, which is not valid"):
        database.register([info("c"), info("a", "b")])
    assert database.valid([path("a"), path("c")]) == set()


def test_outputs_of_derivations(database: Database, tmp_path: Path) -> None:
    database.register([info("a.drv")], {path("a.drv"): {"out": path("a"), "dev": path("a-dev")}})
    database.register([info("a.drv")], {path("a.drv"): {"other": path("b")}})
    assert rows(tmp_path, "select drv, id, path from DerivationOutputs order by id") == [
        (1, "dev", str(path("a-dev"))),
        (1, "out", str(path("a"))),
    ]


def test_self_references_do_not_hinder_deletion(database: Database, tmp_path: Path) -> None:
    """As Nix deletes: the trigger takes the self-reference away, others hold the path."""
    database.register([info("a", "a"), info("b", "a")])
    with closing(sqlite3.connect(tmp_path / "db/db.sqlite", isolation_level=None)) as connection:
        connection.execute("pragma foreign_keys = 1")
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute("delete from ValidPaths where path = ?", (str(path("a")),))
        connection.execute("delete from ValidPaths where path = ?", (str(path("b")),))
        connection.execute("delete from ValidPaths where path = ?", (str(path("a")),))
    assert rows(tmp_path, "select * from Refs") == []


def test_none_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Database(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["9", "11", "", "ten"])
def test_another_schema(tmp_path: Path, text: str) -> None:
    Database(tmp_path, create=True).close()
    (tmp_path / "db/schema").write_text(text)
    with pytest.raises(UsageError):
        Database(tmp_path, create=True)


def test_not_a_database(tmp_path: Path) -> None:
    Database(tmp_path, create=True).close()
    (tmp_path / "db/db.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(DamagedError):
        Database(tmp_path)


def test_rows_that_make_no_sense(database: Database, tmp_path: Path) -> None:
    good: dict[str, object] = {
        "hash": info("a").nar_hash.hex,
        "narSize": 1,
        "deriver": None,
        "sigs": None,
    }
    damage: list[dict[str, object]] = [
        {"hash": "sha256:x"},
        {"narSize": None},
        {"narSize": 0},
        {"narSize": "many"},
        {"deriver": "/etc/passwd"},
        {"sigs": "nobody"},
    ]
    for number, change in enumerate(damage):
        name = f"p{number}"
        values = {**good, **change}
        with closing(sqlite3.connect(tmp_path / "db/db.sqlite")) as connection, connection:
            connection.execute(
                "insert into ValidPaths (path, registrationTime, hash, narSize, deriver, sigs)"
                " values (?, 0, ?, ?, ?, ?)",
                (str(path(name)), *values.values()),
            )
        with pytest.raises(DamagedError) as caught:
            database.path_info(path(name))
        assert str(path(name)) in caught.value.message


def test_locked_by_another(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_S", 0.01)
    with (
        closing(sqlite3.connect(tmp_path / "db/db.sqlite", isolation_level=None)) as holder,
        Database(tmp_path) as waiting,
    ):
        holder.execute("begin immediate")
        with pytest.raises(ConflictError):
            waiting.register([info("a")])
        holder.execute("rollback")
        waiting.register([info("a")])


def test_holds_the_big_lock_shared(database: Database, tmp_path: Path) -> None:
    with (tmp_path / "db/big-lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        database.close()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_many_threads(database: Database) -> None:
    def work(number: int) -> None:
        database.register([info(f"p{number}")])
        assert database.path_info(path(f"p{number}")) is not None

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [path(f"p{number}") for number in range(8)]
    assert database.valid(names) == set(names)


@pytest.fixture
def users_state() -> Iterator[Path]:
    """A store's state that is not ours: root's, and we are a normal user; or read-only."""
    with tempfile.TemporaryDirectory(dir="/tmp") as top:
        Path(top).chmod(0o755)
        state = Path(top) / "state"
        with Database(state, create=True) as database:
            database.register([info("a")])
        (state / "db/big-lock").chmod(0)
        (state / "db/db.sqlite").chmod(0o444)
        (state / "db").chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield state
        finally:
            if root:
                os.seteuid(0)
            (state / "db").chmod(0o755)


def test_read_by_who_may_not_write(users_state: Path) -> None:
    """No lock, and no index of the journal, which cannot be made."""
    with Database(users_state) as database:
        assert database.valid([path("a"), path("b")]) == {path("a")}
        with pytest.raises(CalveError):
            database.register([info("b")])


class Passing(Clock):
    """Time that passes by waiting."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.at_s = 0.0
        self.then = then

    def monotonic(self) -> float:
        return self.at_s

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.at_s += seconds
        if self.at_s > 1:
            self.then()
        return False


def test_a_big_lock_that_another_keeps(database: Database, tmp_path: Path) -> None:
    database.close()
    with (tmp_path / "db/big-lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConflictError, match="lock for 60 s"):
            Database(tmp_path, clock=Passing())
        Database(tmp_path, clock=Passing(lambda: fcntl.flock(lock, fcntl.LOCK_UN))).close()


def test_a_disk_that_is_full(database: Database, tmp_path: Path) -> None:
    pages = rows(tmp_path, "pragma page_count")[0][0]
    database._connection.execute(f"pragma max_page_count = {pages}")
    many = [info(f"p{number}") for number in range(500)]
    with pytest.raises(SpaceError, match="full"):
        database.register(many)
    assert not database.valid(one.path for one in many)
    database._connection.execute("pragma max_page_count = 100000")
    database.register(many)
    assert len(database.valid(one.path for one in many)) == 500


def test_a_commit_that_fails_can_be_tried_again(database: Database) -> None:
    class Failing:
        def __init__(self, inner: sqlite3.Connection) -> None:
            self.inner = inner
            self.failed = False

        @property
        def in_transaction(self) -> bool:
            return self.inner.in_transaction

        def execute(self, text: str, *more: object) -> sqlite3.Cursor:
            if text == "commit" and not self.failed:
                self.failed = True
                raise sqlite3.OperationalError("disk I/O error")
            return self.inner.execute(text, *more)

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

    database._connection = Failing(database._connection)  # type: ignore[assignment]
    with pytest.raises(CalveError, match="disk I/O error"):
        database.register([info("a")])
    assert not database._connection.in_transaction
    assert not database.valid([path("a")])
    database.register([info("a")])
    assert database.valid([path("a")])


def test_the_schema_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Path, text: str) -> None:
        self.open("w").close()
        raise OSError(errno.EIO, "killed")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(CalveError):
            Database(tmp_path, create=True)
    Database(tmp_path, create=True).close()
