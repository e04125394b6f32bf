"""A Nix store on this machine: its files, its database, and no daemon."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from calve.clock import SYSTEM, Clock
from calve.errors import CalveError, ConflictError, DamagedError, NotFoundError
from calve.nix.closure import closure
from calve.nix.database import Database
from calve.nix.nar import Event
from calve.nix.narinfo import PathInfo
from calve.nix.staging import Staging, passes
from calve.nix.storepath import STORE_DIR, StorePath

__all__ = ["LocalStore"]

_STORE = STORE_DIR.lstrip("/")
_STATE = "nix/var/nix"
_READ_ONLY = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_MAX_DERIVATION_BYTES = 16 * 1024 * 1024
_OUTPUT = rb'\("([^"\\]+)","([^"\\]*)","[^"\\]*","[^"\\]*"\)'
_OUTPUTS = re.compile(rb"Derive\(\[(" + _OUTPUT + rb"(?:," + _OUTPUT + rb")*)?\]")


class LocalStore:
    """The store `<root>/nix/store`; a `Sink`. Use it as a context manager, or `close` it.

    From the first `missing` or `stage` to `close`, Nix's garbage collector waits: what a pull found to be there, or
    published and did not yet root, must not go.

    Args:
        root: "/" for the machine's own store.
        create: make an empty store where there is none.
        clock: stamps registrations.

    Raises:
        NotFoundError: no store is there, and `create` was not asked for.
        CalveError: it cannot be opened.
    """

    def __init__(self, root: Path, *, create: bool = False, clock: Clock = SYSTEM) -> None:
        self.root = root
        self.store_dir = root / _STORE
        self._state_dir = root / _STATE
        if create:
            try:
                (self.store_dir / ".links").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CalveError(
                    f"cannot create a store: {error.strerror}", place=self.store_dir
                ) from error
        self.database = Database(self._state_dir, create=create, clock=clock)
        self._turn = threading.Lock()
        self._staging: Staging | None = None
        self._gc_fd = -1

    # What is there.

    def real(self, path: StorePath) -> Path:
        """Return where a path's tree lies, the root in front."""
        return self.store_dir / path.basename

    def contains(self, path: StorePath) -> bool:
        """Say whether a path is valid; existing in the directory does not make it so."""
        return bool(self.database.valid([path]))

    def path_info(self, path: StorePath) -> PathInfo:
        """Return what is known of a valid path.

        Raises:
            NotFoundError: it is not valid.
        """
        info = self.database.path_info(path)
        if info is None:
            raise NotFoundError("not a valid path of the store", place=self.real(path))
        return info

    def closure(self, roots: Iterable[StorePath]) -> list[PathInfo]:
        """Return the closure of valid paths, references first; NotFoundError where one is not valid."""
        return closure(roots, self.path_info)

    # A sink.

    def missing(self, paths: Iterable[StorePath]) -> list[StorePath]:
        """Return those that are not valid here, in their order."""
        self._hold_garbage(reading=True)
        wanted = list(paths)
        valid = self.database.valid(wanted)
        return [path for path in wanted if path not in valid]

    def adopt(self, infos: Sequence[PathInfo]) -> set[StorePath]:
        """Stage what interrupted pulls had verified, or published and not registered, of invalid paths; see `Sink`."""
        return self._writable().adopt(infos)

    def stage(self, info: PathInfo, events: Iterator[Event]) -> None:
        """Unpack a path's tree, out of sight; see `Sink` and `Staging.stage`."""
        self._writable().stage(info, events)

    def discard(self, path: StorePath) -> None:
        """Forget a staged path; nothing happens where it was not staged."""
        if self._staging is not None:
            self._staging.discard(path)

    def flush(self) -> None:
        """Write what was staged to the disk."""
        self._writable().sync()

    def commit(self, batch: Sequence[PathInfo]) -> None:
        """Make staged paths valid: write them to the disk, move them into place, register them.

        Killed anywhere, it leaves at worst trees that no database names, which the next run replaces. A path that
        became valid since must be the same, and is not touched: while paths are moved nobody else registers any.

        Raises:
            VerificationError: a path is valid already with another NAR hash.
            DamagedError: a reference is neither in the batch nor valid.
            CalveError: a path was not staged, or the store cannot be written to.
        """
        staging = self._writable()
        staging.sync()
        with self.database.transaction():
            valid = self.database.valid(info.path for info in batch)
            fresh = {info.path for info in batch} - valid
            outputs = {}
            for path in sorted(fresh):
                staging.publish(path)
                if path.name.endswith(".drv"):
                    outputs[path] = _outputs(self.real(path))
            staging.sync()  # the data is there: only the renames
            self.database.register(batch, outputs)
        for path in valid:
            staging.discard(path)

    def clean(self) -> int:
        """Remove what interrupted pulls left unpublished; return how many they were."""
        return self._writable().clean()

    def _writable(self) -> Staging:
        """Return the staging directory, made when it is first asked for."""
        self._hold_garbage()
        with self._turn:
            if self._staging is None:
                self._staging = Staging(self.store_dir)
            return self._staging

    def _hold_garbage(self, *, reading: bool = False) -> None:
        """Share the lock that Nix's garbage collector takes for itself; who can only read asks without it."""
        with self._turn:
            if self._gc_fd >= 0:
                return
            place = self._state_dir / "gc.lock"
            fd = -1
            try:
                fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if fd >= 0:
                    os.close(fd)
                if isinstance(error, BlockingIOError):
                    raise ConflictError(
                        "Nix is collecting garbage in this store",
                        place=place,
                        hint="run again when it is done",
                    ) from error
                if reading and error.errno in _READ_ONLY:
                    return
                raise CalveError(f"cannot lock: {error.strerror}", place=place) from error
            self._gc_fd = fd

    def close(self, *, keep: bool = False) -> None:
        """Remove what was staged and not committed, close the database, let garbage be collected; idempotent.

        Args:
            keep: leave what was staged for a later run to adopt.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.database.close)
            if self._gc_fd >= 0:
                stack.callback(os.close, self._gc_fd)
                self._gc_fd = -1
            if self._staging is not None:
                stack.callback(self._staging.close, keep=keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(keep=passes(error))


def _open_itself(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _outputs(derivation: Path) -> dict[str, StorePath]:
    """Read the outputs' names and paths from a .drv file; those without a path are left out."""
    data = b""
    # A directory is none; nor is a symlink, which leads anywhere.
    with contextlib.suppress(OSError), open(derivation, "rb", opener=_open_itself) as file:
        data = file.read(_MAX_DERIVATION_BYTES)
    found = _OUTPUTS.match(data)
    if found is None:
        raise DamagedError("not a derivation", place=derivation)
    return {
        name.decode("utf-8", "replace"): StorePath.parse(path.decode("utf-8", "replace"))
        for name, path in re.findall(_OUTPUT, found.group(0))
        if path
    }
