"""cpio archives, format "newc": what Linux unpacks as its initial file system.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. The same entries give the same
bytes: times are 0, owners root, inode numbers count up.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Entry", "archive", "device", "directory", "file", "link"]

_CHUNK = 256 << 10


@dataclass(frozen=True, slots=True)
class Entry:
    """One member: a path without a leading slash, its mode, and its content or the file that has it."""

    path: str
    mode: int
    content: bytes | Path = b""
    rdev: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    """Make a directory, 0755."""
    return Entry(path, stat.S_IFDIR | 0o755)


def file(path: str, content: bytes | Path, *, executable: bool = False, mode: int = 0o644) -> Entry:
    """Make a regular file."""
    return Entry(path, stat.S_IFREG | (0o755 if executable else mode), content)


def link(path: str, target: str) -> Entry:
    """Make a symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def device(path: str, major: int, minor: int) -> Entry:
    """Make a character device, 0600."""
    return Entry(path, stat.S_IFCHR | 0o600, rdev=(major, minor))


def _header(number: int, entry: Entry, size: int) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        number, entry.mode, 0, 0, links, 0, size, 0, 0, *entry.rdev, len(name), 0,
    )  # fmt: skip
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + bytes(-len(head) % 4)


def archive(entries: Iterable[Entry]) -> Iterator[bytes]:
    """Yield the archive, in chunks; a later entry of the same path wins, missing parents are made.

    Raises:
        FileNotFoundError: an entry's file is gone.
    """
    members: dict[str, Entry] = {}
    for entry in entries:
        for parent in Path(entry.path).parents:
            if str(parent) != ".":
                members.setdefault(str(parent), directory(str(parent)))
        members[entry.path] = entry
    number = 0
    for number, path in enumerate(sorted(members), 1):
        yield from _member(number, members[path])
    yield _header(0, Entry("TRAILER!!!", 0), 0)


def _member(number: int, entry: Entry) -> Iterator[bytes]:
    if isinstance(entry.content, bytes):
        yield _header(number, entry, len(entry.content))
        yield entry.content + bytes(-len(entry.content) % 4)
        return
    with entry.content.open("rb") as source:
        size = entry.content.stat().st_size
        yield _header(number, entry, size)
        left = size
        while left:
            chunk = source.read(min(left, _CHUNK))
            if not chunk:
                raise OSError(f"{entry.content} became shorter while it was read")
            left -= len(chunk)
            yield chunk
    yield bytes(-size % 4)
