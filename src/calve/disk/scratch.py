"""A scratch file: what cannot stay in memory and has no address yet. It has no name: a killed run leaves nothing."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path

from calve.errors import CalveError, SpaceError
from calve.nix.unpack import storage_error

__all__ = ["Scratch", "storage", "write_all"]

# Between these file systems the kernel does not copy by itself.
_NO_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
_CHUNK_BYTES = 1 << 20


def storage(error: OSError, place: object) -> CalveError:
    """Say what a failed read or write means: SpaceError where the disk is full."""
    found = storage_error(error, place)
    if isinstance(found, SpaceError):
        found.hint = (
            "an image is staged beside itself: it needs its own size twice while it is built"
        )
    return found


def write_all(fd: int, data: bytes | bytearray | memoryview, at: int) -> None:
    """Write all bytes at a place of a file."""
    written = os.pwrite(fd, data, at)
    while written < len(data):  # a signal, or a disk that fills up
        written += os.pwrite(fd, memoryview(data)[written:], at + written)


class Scratch:
    """A file without a name in a directory; many threads may use it. Close it.

    Raises:
        SpaceError, CalveError: the directory cannot be written to, here and in all methods.
    """

    def __init__(self, directory: Path) -> None:
        self._place = directory
        self._lock = threading.Lock()
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise storage(error, directory) from error
        self._fd = self._file.fileno()

    def reserve(self, size: int) -> int:
        """Return where so many bytes may be written; a multiple of 4 KiB, as `size` should be."""
        with self._lock:
            at = self._end
            self._end = at + size + (-size & 4095)
            return at

    def write(self, data: bytes | bytearray | memoryview, at: int) -> None:
        """Write at a place that was reserved."""
        try:
            write_all(self._fd, data, at)
        except OSError as error:
            raise storage(error, self._place) from error

    def read(self, at: int, size: int) -> bytes:
        """Return what was written there."""
        try:
            data = os.pread(self._fd, size, at)
            while len(data) < size:
                more = os.pread(self._fd, size - len(data), at + len(data))
                if not more:
                    raise CalveError("a scratch file is shorter than it was", place=self._place)
                data += more
        except OSError as error:
            raise storage(error, self._place) from error
        return data

    def copy(self, at: int, size: int, fd: int, to: int) -> None:
        """Copy bytes into another file, by the kernel where it can."""
        end = at + size
        try:
            while at < end:
                done = os.copy_file_range(self._fd, fd, end - at, at, to)
                if not done:
                    raise CalveError("a scratch file is shorter than it was", place=self._place)
                at, to = at + done, to + done
        except OSError as error:
            if error.errno not in _NO_COPY:
                raise storage(error, self._place) from error
            self._copy_by_hand(at, end, fd, to)

    def _copy_by_hand(self, at: int, end: int, fd: int, to: int) -> None:
        while at < end:
            data = self.read(at, min(_CHUNK_BYTES, end - at))
            try:
                write_all(fd, data, to)
            except OSError as error:
                raise storage(error, self._place) from error
            at, to = at + len(data), to + len(data)

    def close(self) -> None:
        """Let go of it; idempotent."""
        self._file.close()
