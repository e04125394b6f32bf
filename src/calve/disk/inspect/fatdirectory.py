"""A directory of FAT: short entries, and the long names before them.

Source: Microsoft's FAT32 File System Specification (fatgen103).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from calve.disk.inspect.findings import Check, Findings

__all__ = ["MAX_DIRECTORY_BYTES", "Entry", "entries"]

MAX_DIRECTORY_BYTES = 65536 * 32

_ENTRY = struct.Struct("<11sBBBHHHHHHHI")
_END, _DELETED, _KANJI = 0x00, 0xE5, 0x05
_LABEL, _DIRECTORY, _LONG, _KINDS = 0x08, 0x10, 0x0F, 0x3F
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10
_LAST, _MAX_PARTS = 0x40, 20
_FORBIDDEN = frozenset('"*/:<>?\\|') | {chr(code) for code in range(32)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: the long name where it has one, else the short; its first cluster and its size in bytes."""

    name: str
    is_directory: bool
    is_label: bool
    cluster: int
    size: int


def entries(data: bytes, bits: int, place: str, findings: Findings) -> Iterator[Entry]:
    """Yield what is in a directory, `.` and `..` among it; what cannot be an entry goes to `findings`.

    Args:
        data: the whole directory.
        bits: 16 or 32, of the file system: only in FAT32 a cluster's number has an upper half.
        place: the directory's path.
        findings: takes what is wrong.
    """
    parts: list[bytes] = []
    for at in range(0, len(data) - 31, 32):
        raw = data[at : at + 32]
        if raw[0] == _END:
            break
        if raw[0] == _DELETED:
            parts.clear()
        elif raw[11] & _KINDS == _LONG:
            parts.append(raw)
        else:
            entry = _entry(raw, bits, parts, place, findings)
            parts.clear()
            if entry is not None:
                yield entry
    if parts:
        findings.add(Check.FAT_LONG_NAME, place, "a long name without an entry")


def _entry(
    raw: bytes, bits: int, parts: list[bytes], place: str, findings: Findings
) -> Entry | None:
    short, kind, case, _, _, _, _, high, _, _, low, size = _ENTRY.unpack(raw)
    name = _short_name(short, case, is_label=bool(kind & _LABEL))
    if parts:
        long_name = _long_name(parts, short)
        if long_name is None:
            message = f"the long name before {name} is not its own, or is not whole"
            findings.add(Check.FAT_LONG_NAME, place, message)
        else:
            name = long_name
    is_directory = bool(kind & _DIRECTORY)
    if not name or _FORBIDDEN & set(name) or (is_directory and size):
        message = f"an entry {name!r} of {size} bytes with attributes {kind:#04x}"
        findings.add(Check.FAT_DIRECTORY_DAMAGED, place, message)
        return None
    cluster = high << 16 | low if bits == 32 else low
    return Entry(name, is_directory, bool(kind & _LABEL), cluster, size)


def _short_name(short: bytes, case: int, *, is_label: bool) -> str:
    raw = bytes([_DELETED]) + short[1:] if short[0] == _KANJI else short
    text = raw.decode("cp437")
    if is_label:
        return text.rstrip(" ")
    base, extension = text[:8].rstrip(" "), text[8:].rstrip(" ")
    base = base.lower() if case & _LOWER_BASE else base
    extension = extension.lower() if case & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base


def _checksum(short: bytes) -> int:
    value = 0
    for byte in short:
        value = ((value & 1) << 7) + (value >> 1) + byte & 0xFF
    return value


def _long_name(parts: list[bytes], short: bytes) -> str | None:
    """Join the parts of a long name, which stand in reverse order; None where they do not belong together."""
    checksum = _checksum(short)
    count = len(parts)
    numbers = [part[0] for part in parts]
    wanted = [count | _LAST, *range(count - 1, 0, -1)]
    own = all(part[13] == checksum and not any(part[26:28]) for part in parts)
    if count > _MAX_PARTS or numbers != wanted or not own:
        return None
    units = b"".join(part[1:11] + part[14:26] + part[28:32] for part in reversed(parts))
    text = units.decode("utf-16-le", "replace").partition("\0")[0]
    return text or None
