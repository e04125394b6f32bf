"""A cache in a directory: every object a file, written under a temporary name and put into place whole.

The tag of a version is what the file system says of its file. A version never changes in place, and is given the
time to the nanosecond: two of one inode and one size do not share a tag.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from calve.cache.objects import Listed, MissingCacheError, check_key
from calve.errors import AccessError, CalveError, DamagedError, NotFoundError, SpaceError

__all__ = ["DirectoryObjects"]

_TEMPORARY = ".calve-"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# A key is foreign: one that no file can have is one that is not there.
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})
# Not to wait for a writer where a pipe lies in the cache.
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


class _OtherVersionError(Exception):
    """A file is not of the version that was to be replaced or removed."""


class _File:
    """An open object, or a range of one: `left` bytes from where the descriptor stands, None for all."""

    def __init__(self, descriptor: int, place: str, left: int | None = None) -> None:
        self.descriptor = descriptor
        self._place = place
        self._left = left

    def read(self, size: int) -> bytes:
        """Return at least one and at most `size` bytes, none at the end."""
        try:
            if self._left is None:
                return os.read(self.descriptor, size)
            data = os.read(self.descriptor, min(size, self._left))
        except OSError as error:
            raise _translate(error, self._place) from error
        if not data and self._left and size:
            raise DamagedError("the object ended early", place=self._place)
        self._left -= len(data)
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.descriptor)


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
        return self.get_tagged(key, limit)[0]

    def get_tagged(self, key: str, limit: int) -> tuple[bytes, str]:
        """Return a small object and its tag."""
        parts: list[bytes] = []
        left = limit + 1
        with self.open(key) as file:
            tag = _tag(os.fstat(file.descriptor))
            while left and (data := file.read(min(left, 1 << 18))):
                parts.append(data)
                left -= len(data)
        if not left:
            raise DamagedError(f"longer than {limit} bytes", place=self._place(key))
        return b"".join(parts), tag

    def open(
        self,
        key: str,
        size: int | None = None,  # noqa: ARG002
        *,
        start: int = 0,
        end: int | None = None,
    ) -> _File:
        """Open an object for reading, or its bytes from `start` to before `end`."""
        descriptor = self._open(key)
        if not start and end is None:
            return _File(descriptor, self._place(key))
        there = os.fstat(descriptor).st_size
        stop = there if end is None else end
        if not start <= stop <= there:
            os.close(descriptor)
            raise DamagedError(
                f"the object has {there} bytes: it is shorter than it should be",
                place=self._place(key),
            )
        os.lseek(descriptor, start, os.SEEK_SET)
        return _File(descriptor, self._place(key), stop - start)

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

        def replace(temporary: Path, path: Path) -> None:
            if _tag_of(path) != match:
                raise _OtherVersionError
            temporary.replace(path)

        # Looked at before too: where there is another version already, nothing is written.
        return self._tag_now(key) == match and self._write(key, (data,), replace)

    def _tag_now(self, key: str) -> str | None:
        path = self._path(key)
        try:
            return _tag_of(path)
        except OSError as error:
            raise _translate(error, self._place(key), writing=True) from error

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
                now = time.time_ns()
                os.utime(file.fileno(), ns=(now, now))
                os.fsync(file.fileno())
            try:
                with self._locked():
                    place(temporary, path)
            except (FileExistsError, _OtherVersionError):
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
        """Keep other writers out, of this process and of others, while a name is given or taken."""
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def delete(self, key: str, *, match: str | None = None) -> bool:
        """Remove an object, or only its version `match`; nothing happens where there is none."""
        path = self._path(key)
        try:
            with self._locked():
                if match is not None and _tag_of(path) not in {None, match}:
                    return False
                path.unlink()
            _sync(path.parent)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise _translate(error, self._place(key), writing=True) from error
        return True

    def delete_many(self, listed: Iterable[Listed]) -> list[Listed]:
        """Remove objects unless they changed since they were listed; return those that changed and stay."""
        return [one for one in listed if not self.delete(one.key, match=one.tag)]

    def list(self, prefix: str) -> Iterator[Listed]:
        """Return the objects whose keys begin so, sorted by the bytes of their keys."""
        below = prefix.rpartition("/")[0]
        top = self._path(below) if below else self._root
        keys: list[str] = []
        for directory, _, names in os.walk(top):
            parent = os.path.relpath(directory, self._root)
            for name in names:
                key = name if parent == "." else f"{parent}/{name}"
                if key.startswith(prefix) and not name.startswith(_TEMPORARY):
                    keys.append(key)
        for key in sorted(keys, key=os.fsencode):
            try:
                status = (self._root / key).stat()
            except OSError as error:
                if error.errno in _ABSENT:  # removed meanwhile, or a link that leads nowhere
                    continue
                raise _translate(error, self._place(key)) from error
            if stat.S_ISREG(status.st_mode):
                yield Listed(key, status.st_size, _tag(status), status.st_mtime)


def _tag(status: os.stat_result) -> str:
    """Return the tag of the version that a file is."""
    return f"{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def _tag_of(path: Path) -> str | None:
    """Return the tag of what a file is now; None where there is none."""
    try:
        return _tag(path.stat())
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name unless there is one; raise FileExistsError."""
    path.hardlink_to(temporary)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
