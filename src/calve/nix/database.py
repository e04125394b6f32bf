"""The store's database, as Nix 2 keeps it: schema 10, SQLite.

Source: ../shared/reference/cache.md, section 3; compared with a database of Nix 2.8 in tests/interop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calve.clock import SYSTEM, Clock
from calve.errors import (
    CalveError,
    ConflictError,
    DamagedError,
    NotFoundError,
    SpaceError,
    UsageError,
    VerificationError,
)
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo, merge_signatures
from calve.nix.signing import Signature
from calve.nix.storepath import StorePath
from calve.nix.unpack import storage_error

__all__ = ["SCHEMA_VERSION", "Database", "create_state"]

SCHEMA_VERSION = 10

_BUSY_S = 60.0
_POLL_S = 0.05
_READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_STATE_DIRECTORIES = (
    "db",
    "gcroots/auto",
    "gcroots/per-user",
    "profiles/per-user",
    "temproots",
)
_SCHEMA = """
create table if not exists ValidPaths (
    id               integer primary key autoincrement not null,
    path             text unique not null,
    hash             text not null,
    registrationTime integer not null,
    deriver          text,
    narSize          integer,
    ultimate         integer,
    sigs             text,
    ca               text
);
create table if not exists Refs (
    referrer  integer not null,
    reference integer not null,
    primary key (referrer, reference),
    foreign key (referrer) references ValidPaths(id) on delete cascade,
    foreign key (reference) references ValidPaths(id) on delete restrict
);
create index if not exists IndexReferrer on Refs(referrer);
create index if not exists IndexReference on Refs(reference);
create trigger if not exists DeleteSelfRefs before delete on ValidPaths
begin
    delete from Refs where referrer = old.id and reference = old.id;
end;
create table if not exists DerivationOutputs (
    drv  integer not null,
    id   text not null,
    path text not null,
    primary key (drv, id),
    foreign key (drv) references ValidPaths(id) on delete cascade
);
create index if not exists IndexDerivationOutputs on DerivationOutputs(path);
"""


def create_state(state_dir: Path) -> None:
    """Create `/nix/var/nix` and what must exist below it, where it does not."""
    for name in _STATE_DIRECTORIES:
        (state_dir / name).mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (state_dir / "gcroots/profiles").symlink_to(state_dir / "profiles")
    (state_dir / "gc.lock").touch(0o600)


class Database:
    """A store's database, open; use it as a context manager, or `close` it. Threads take turns.

    Args:
        state_dir: the store's `/nix/var/nix`.
        create: make it where it does not exist.
        clock: stamps registrations.

    Raises:
        NotFoundError: there is none, and `create` was not asked for.
        UsageError: it is of another schema.
        CalveError: it cannot be opened.
    """

    def __init__(self, state_dir: Path, *, create: bool = False, clock: Clock = SYSTEM) -> None:
        self.path = state_dir / "db/db.sqlite"
        self._clock = clock
        self._turn = threading.RLock()
        self._schema = state_dir / "db/schema"
        self._lock_fd = -1
        with contextlib.ExitStack() as undo, self._translated():
            if not self._schema.exists():
                if not create:
                    raise NotFoundError("no Nix store has its database here", place=self.path)
                create_state(state_dir)
            undo.callback(self._unlock)
            self._lock(state_dir / "db/big-lock")
            self._connection = self._connect()
            undo.callback(self._connection.close)
            self._prepare()
            undo.pop_all()

    def _lock(self, path: Path) -> None:
        """Hold Nix's big lock: shared by all who use the database, exclusive for who makes its schema."""
        try:
            self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            return  # who may only read the database may not lock it
        if not self._schema.exists():
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass  # another makes it just now, and will then share the lock
        end_s = self._clock.monotonic() + _BUSY_S
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if self._clock.monotonic() >= end_s:
                    raise ConflictError(
                        f"another kept the store's lock for {_BUSY_S:.0f} s",
                        place=path,
                        hint="Nix holds it while it upgrades the store",
                    ) from error
            self._clock.wait(threading.Event(), _POLL_S)

    def _unlock(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _connect(self) -> sqlite3.Connection:
        uri = self.path.absolute().as_uri()
        if not self._schema.exists():
            mode = "rwc"
        elif all(
            os.access(path, os.W_OK, effective_ids=True) for path in (self.path, self.path.parent)
        ):
            mode = "rw"
        elif self.path.with_name("db.sqlite-wal").exists():
            mode = "ro"
        else:
            mode = "ro&immutable=1"  # else SQLite wants to write the journal's index
        connection = sqlite3.connect(
            f"{uri}?mode={mode}",
            uri=True,
            timeout=_BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.execute("pragma synchronous = normal")
        if mode.startswith("rw"):
            connection.execute("pragma journal_mode = wal")
        return connection

    def _prepare(self) -> None:
        """Make the schema where there is none; refuse another than ours."""
        if not self._schema.exists():
            self._connection.executescript(_SCHEMA)
            new = self._schema.with_name(f".schema-{os.getpid()}")
            new.write_text(str(SCHEMA_VERSION))
            new.replace(self._schema)  # else, killed in between, it would be empty for ever
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH)
        found = self._schema.read_text("utf-8", "replace").strip()
        if found != str(SCHEMA_VERSION):
            raise UsageError(
                f"the store's database has schema {found[:20]}, not {SCHEMA_VERSION}",
                place=self._schema,
                hint="Nix 2 of any version upgrades it when it next runs",
            )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the errors of SQLite and of files into ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ConflictError(
                    f"the store's database was locked for {_BUSY_S:.0f} s", place=self.path
                ) from error
            if "full" in str(error):
                raise SpaceError(
                    f"the store's database: {error}",
                    place=self.path,
                    hint="make room on the file system of the store",
                ) from error
            raise CalveError(f"the store's database: {error}", place=self.path) from error
        except sqlite3.DatabaseError as error:
            raise DamagedError(f"the store's database: {error}", place=self.path) from error
        except OSError as error:
            if isinstance(made := storage_error(error, self.path), SpaceError):
                raise made from error
            raise CalveError(f"the store's database: {error.strerror}", place=self.path) from error

    def valid(self, paths: Iterable[StorePath]) -> set[StorePath]:
        """Return those of the paths that are valid."""
        with self._turn, self._translated():
            return {path for path in paths if self._id(path) is not None}

    def path_info(self, path: StorePath) -> PathInfo | None:
        """Return what is known of a path; None where it is not valid.

        Raises:
            DamagedError: what is stored of it makes no sense.
        """
        with self._turn, self._translated():
            row = self._connection.execute(
                "select id, hash, narSize, deriver, sigs, ca from ValidPaths where path = ?",
                (str(path),),
            ).fetchone()
            if row is None:
                return None
            references = self._connection.execute(
                "select path from Refs join ValidPaths on id = reference where referrer = ?",
                (row[0],),
            ).fetchall()
        try:
            return _path_info(path, row, [text for (text,) in references])
        except DamagedError as error:
            raise DamagedError(f"{path}: {error.message}", place=self.path) from error

    def register(
        self,
        infos: Sequence[PathInfo],
        outputs: Mapping[StorePath, Mapping[str, StorePath]] | None = None,
    ) -> None:
        """Make paths valid, all or none; their trees must be on disk.

        A path that is valid already stays as it is and gains the signatures that it lacks.

        Args:
            infos: the paths; in any order.
            outputs: of the .drv files among them, the outputs by name.

        Raises:
            VerificationError: a path is valid already, with another NAR hash.
            DamagedError: a reference is neither among them nor valid.
            ConflictError: the database is locked by another.
        """
        with self.transaction():
            self._register(infos, outputs or {})

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep every other writer out for the length of a block; undo what it wrote where it fails."""
        with self._turn, self._translated():
            if self._connection.in_transaction:  # ours: the turn is
                yield
                return
            self._connection.execute("begin immediate")
            try:
                yield
                self._connection.execute("commit")
            except BaseException:
                self._roll_back()
                raise

    def _roll_back(self) -> None:
        if self._connection.in_transaction:  # SQLite has ended it itself where the disk is full
            self._connection.execute("rollback")

    def _register(
        self, infos: Sequence[PathInfo], outputs: Mapping[StorePath, Mapping[str, StorePath]]
    ) -> None:
        now = int(self._clock.now().timestamp())
        added: dict[StorePath, int] = {}
        for info in infos:
            if self._id(info.path) is None:
                added[info.path] = self._insert(info, now)
            else:
                self._merge(info)
        for info in infos:
            if info.path in added:
                self._refer(info, added)
        self._connection.executemany(
            "insert or replace into DerivationOutputs (drv, id, path) values (?, ?, ?)",
            (
                (added[drv], name, str(output))
                for drv, named in outputs.items()
                if drv in added
                for name, output in named.items()
            ),
        )

    def _id(self, path: StorePath) -> int | None:
        row = self._connection.execute(
            "select id from ValidPaths where path = ?", (str(path),)
        ).fetchone()
        return None if row is None else int(row[0])

    def _insert(self, info: PathInfo, now: int) -> int:
        cursor = self._connection.execute(
            "insert into ValidPaths (path, hash, registrationTime, deriver, narSize, sigs, ca)"
            " values (?, ?, ?, ?, ?, ?, ?)",
            (
                str(info.path),
                info.nar_hash.hex,
                now,
                None if info.deriver is None else str(info.deriver),
                info.nar_size,
                _signatures_text(info.signatures),
                info.ca,
            ),
        )
        return int(cursor.lastrowid or 0)

    def _merge(self, info: PathInfo) -> None:
        known, text = self._connection.execute(
            "select hash, sigs from ValidPaths where path = ?", (str(info.path),)
        ).fetchone()
        if Hash.parse(known) != info.nar_hash:
            raise VerificationError(
                f"it is valid already, with the NAR hash {known}, not {info.nar_hash.hex}",
                place=info.path,
            )
        merged = _signatures_text(merge_signatures(_signatures(text), info.signatures))
        if merged != text:
            self._connection.execute(
                "update ValidPaths set sigs = ? where path = ?", (merged, str(info.path))
            )

    def _refer(self, info: PathInfo, added: Mapping[StorePath, int]) -> None:
        for reference in info.references:
            number = added.get(reference) or self._id(reference)
            if number is None:
                raise DamagedError(f"it refers to {reference}, which is not valid", place=info.path)
            self._connection.execute(
                "insert or ignore into Refs (referrer, reference) values (?, ?)",
                (added[info.path], number),
            )

    def close(self) -> None:
        """Close it; idempotent."""
        with self._turn:
            self._connection.close()
            self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _signatures(text: str | None) -> tuple[Signature, ...]:
    return tuple(sorted({Signature.parse(one) for one in (text or "").split()}))


def _signatures_text(signatures: Iterable[Signature]) -> str | None:
    return " ".join(signature.dump() for signature in signatures) or None


def _path_info(path: StorePath, row: tuple[Any, ...], references: list[Any]) -> PathInfo:
    _, hash_text, nar_size, deriver, signatures, ca = row
    if not isinstance(nar_size, int) or nar_size <= 0:
        raise DamagedError("it has no NAR size")
    return PathInfo(
        path=path,
        nar_hash=Hash.parse(str(hash_text)),
        nar_size=nar_size,
        references=tuple(sorted(StorePath.parse(str(text)) for text in references)),
        deriver=StorePath.parse(str(deriver)) if deriver else None,
        signatures=_signatures(signatures),
        ca=str(ca) if ca else None,
    )
