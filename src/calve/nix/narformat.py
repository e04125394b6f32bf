"""What reader and writer of NARs share: the events, and the tokens that every NAR is made of.

Every string is a little-endian 64-bit length, the bytes, and zeros up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import TypeAlias

__all__ = [
    "CHUNK_BYTES",
    "CLOSE",
    "CLOSE_ENTRY",
    "CONTENTS",
    "DIRECTORY",
    "END",
    "ENTRY",
    "EXECUTABLE",
    "MAGIC",
    "MAX_DATA_BYTES",
    "MAX_DEPTH",
    "MAX_NAME_BYTES",
    "MAX_TARGET_BYTES",
    "NODE",
    "NODE_OF_ENTRY",
    "REGULAR",
    "SYMLINK",
    "TARGET",
    "U64",
    "ZEROS",
    "Directory",
    "End",
    "Event",
    "File",
    "Source",
    "Symlink",
    "Write",
    "check_name",
    "check_target",
    "string",
]

MAX_DEPTH = 64  # names in the longest path; Nix refuses more
CHUNK_BYTES = 128 * 1024
MAX_DATA_BYTES = 256 * 1024  # at most so many in one event, or in one read
MAX_NAME_BYTES = 255  # NAME_MAX of Linux
MAX_TARGET_BYTES = 4095  # PATH_MAX of Linux, without the NUL

Source: TypeAlias = Callable[[int], bytes]
"""Gives at least one and at most so many bytes; none at the end."""
Write: TypeAlias = Callable[[bytes], object]
"""Takes the next bytes, all of them; may keep them."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory begins; its entries follow, then `End`."""

    name: bytes


@dataclass(frozen=True, slots=True)
class File:
    """A regular file; `size` bytes of content follow in chunks, none where it is empty."""

    name: bytes
    size: int
    executable: bool


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symbolic link."""

    name: bytes
    target: bytes


@dataclass(frozen=True, slots=True)
class End:
    """The directory that began last is complete."""


Event: TypeAlias = Directory | File | Symlink | End | bytes

END = End()
U64 = Struct("<Q")
ZEROS = bytes(8)
_NO_NAMES = frozenset({b".", b".."})


def string(data: bytes) -> bytes:
    """Write a string with its length and padding."""
    return U64.pack(len(data)) + data + ZEROS[: -len(data) % 8]


def _strings(*texts: bytes) -> bytes:
    return b"".join(map(string, texts))


MAGIC = _strings(b"nix-archive-1")
NODE = _strings(b"(", b"type")
REGULAR = _strings(b"regular")
EXECUTABLE = _strings(b"executable", b"")
CONTENTS = _strings(b"contents")
SYMLINK = _strings(b"symlink")
TARGET = _strings(b"target")
DIRECTORY = _strings(b"directory")
ENTRY = _strings(b"entry", b"(", b"name")
NODE_OF_ENTRY = _strings(b"node") + NODE
CLOSE = _strings(b")")
CLOSE_ENTRY = CLOSE + CLOSE


def check_name(name: bytes) -> bool:
    """Say whether a name can stand in a directory: not empty, `.`, `..`, no `/`, no NUL, not too long."""
    return (
        0 < len(name) <= MAX_NAME_BYTES
        and b"/" not in name
        and b"\0" not in name
        and name not in _NO_NAMES
    )


def check_target(target: bytes) -> bool:
    """Say whether a symlink can have this target: not empty, no NUL, not too long."""
    return 0 < len(target) <= MAX_TARGET_BYTES and b"\0" not in target
