"""A cache in a directory: every object a file, written under a temporary name and put into place whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from calve.cache.objects import MissingCacheError, check_key
from calve.errors import AccessError, CalveError, DamagedError, NotFoundError, SpaceError

__all__ = ["DirectoryObjects"]

_TEMPORARY = ".calve-"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# A key is foreign: one that no file can have is one that is not there.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
# Not to wait for a writer where a pipe lies in the cache.
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class _File:
    """An open object."""

    def __init__(self, descriptor: int, place: str) -> None:
        self._descriptor = descriptor
        self._place = place

    def read(self, size: int) -> bytes:
        """Return at least one and at most `size` bytes, none at the end."""
        try:
            return os.read(self._descriptor, size)
        except OSError as error:
            raise _translate(error, self._place) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)


def _translate(error: OSError, place: str, *, writing: bool = False) -> CalveError:
    """Return the error of ours for one of the file system."""
    text = error.strerror or str(error)
    if error.errno in _ABSENT and not writing:
        return NotFoundError("there is no such object", place=place)
    if isinstance(error, PermissionError):
        return AccessError(text, place=place)
    if error.errno in _FULL:
        return SpaceError(text, place=place)
    return CalveError(text, place=place)


class DirectoryObjects:
    """Objects in a directory, which is made by the first write."""

    def __init__(self, path: str | Path) -> None:
        self._root = Path(path)

    @property
    def url(self) -> str:
        """Return where they are."""
        return f"file://{self._root}"

    def _path(self, key: str) -> Path:
        return self._root / check_key(key, self.url)

    def _place(self, key: str) -> str:
        return f"{self.url}/{key}"

    def _open(self, key: str) -> int:
        path = self._path(key)
        try:
            descriptor = os.open(path, _OPEN)
        except FileNotFoundError as error:
            if not self._root.is_dir():
                raise MissingCacheError("there is no such directory", place=self.url) from error
            raise _translate(error, self._place(key)) from error
        except OSError as error:
            raise _translate(error, self._place(key)) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedError("the object is not a file", place=self._place(key))
        return descriptor

    def get(self, key: str, limit: int) -> bytes:
        """Return a small object."""
        parts: list[bytes] = []
        left = limit + 1
        with self.open(key) as file:
            while left and (data := file.read(min(left, 1 << 18))):
                parts.append(data)
                left -= len(data)
        if not left:
            raise DamagedError(f"longer than {limit} bytes", place=self._place(key))
        return b"".join(parts)

    def get_tagged(self, key: str, limit: int) -> tuple[bytes, str]:
        """Return a small object and a tag: the hash of its bytes."""
        data = self.get(key, limit)
        return data, hashlib.sha256(data).hexdigest()

    def open(self, key: str, size: int | None = None) -> _File:  # noqa: ARG002
        """Open an object for reading."""
        return _File(self._open(key), self._place(key))

    def head(self, key: str) -> int | None:
        """Return an object's size in bytes; None where there is none."""
        try:
            status = self._path(key).stat()
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise _translate(error, self._place(key)) from error
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError("the object is not a file", place=self._place(key))
        return status.st_size

    def put(
        self,
        key: str,
        data: bytes,
        *,
        only_new: bool = False,
        match: str | None = None,
        content_type: str | None = None,  # noqa: ARG002
    ) -> bool:
        """Write a small object, whole or not at all."""
        if match is None:
            return self._write(key, (data,), _link if only_new else os.replace)
        with self._locked():
            try:
                _, tag = self.get_tagged(key, max(len(data), 1 << 24))
            except NotFoundError:
                return False
            return tag == match and self._write(key, (data,), os.replace)

    def put_stream(
        self,
        key: str,
        chunks: Iterator[bytes],
        *,
        only_new: bool = False,
        content_type: str | None = None,  # noqa: ARG002
    ) -> bool:
        """Write an object of unknown size, whole or not at all."""
        return self._write(key, chunks, _link if only_new else os.replace)

    def _write(
        self, key: str, chunks: Iterable[bytes], place: Callable[[Path, Path], object]
    ) -> bool:
        """Write a temporary file, make it durable and put it into place; say whether it got there."""
        path = self._path(key)
        temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb", buffering=0) as file:
                for chunk in chunks:
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
            try:
                place(temporary, path)
            except FileExistsError:
                return False
            _sync(path.parent)
        except OSError as error:
            raise _translate(error, self._place(key), writing=True) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other writers with a condition out, of this process and of others."""
        try:
            descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _translate(error, self.url) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        path = self._path(key)
        try:
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
                _sync(path.parent)
        except OSError as error:
            raise _translate(error, self._place(key)) from error

    def list(self, prefix: str) -> Iterator[str]:
        """Return the keys that begin so, sorted by their bytes."""
        keys: list[str] = []
        for directory, _, names in os.walk(self._root):
            below = os.path.relpath(directory, self._root)
            for name in names:
                key = name if below == "." else f"{below}/{name}"
                if key.startswith(prefix) and not name.startswith(_TEMPORARY):
                    keys.append(key)
        yield from sorted(keys, key=os.fsencode)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless there is one; raise FileExistsError."""
    path.hardlink_to(temporary)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
