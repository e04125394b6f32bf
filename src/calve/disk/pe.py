"""PE files: sections read, and sections added behind those that are there.

Source: Microsoft's PE format specification. PE32+ only, as UEFI loads it: x86_64 and aarch64. A section has a place in
memory (address, size) and one in the file (offset, room); the room may be larger than what is in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from calve.errors import DamagedError, UsageError

__all__ = ["Addition", "Image", "Section", "extend", "machine", "parse"]

PAGE_BYTES = 4096

_COFF = struct.Struct("<HHIIIHH")
_SECTION = struct.Struct("<8sIIIIIIHHI")
_PE32_PLUS = 0x20B
_MAX_SECTIONS = 96
_LIMIT = (1 << 32) - 1
_READABLE_DATA = 0x40000040  # IMAGE_SCN_CNT_INITIALIZED_DATA | IMAGE_SCN_MEM_READ
# In the optional header, from its beginning.
_INITIALIZED_DATA = 8
_ALIGNMENTS = 32
_SIZE_OF_IMAGE = 56
_CHECKSUM = 64
_DIRECTORIES = 108
_CERTIFICATES = 4


@dataclass(frozen=True, slots=True)
class Section:
    """A section.

    Attributes:
        name: at most 8 characters.
        address: relative to where the image is loaded.
        size_bytes: in memory, and of what is meant of it.
        offset: in the file.
        room_bytes: in the file.
    """

    name: str
    address: int
    size_bytes: int
    offset: int
    room_bytes: int


@dataclass(frozen=True, slots=True)
class Image:
    """What a PE file's headers say.

    Attributes:
        machine: the processor, see `arch.Arch.machine`.
        sections: in the table's order.
        image_bytes: in memory, all of it.
        headers_bytes: room for the headers in the file.
        section_alignment: of addresses.
        file_alignment: of offsets and rooms.
        coff: where the COFF header is in the file.
        table: where the sections' headers are.
    """

    machine: int
    sections: tuple[Section, ...]
    image_bytes: int
    headers_bytes: int
    section_alignment: int
    file_alignment: int
    coff: int
    table: int

    @property
    def optional(self) -> int:
        """Return where the optional header is in the file."""
        return self.coff + _COFF.size


@dataclass(frozen=True, slots=True)
class Addition:
    """A section to add: its name, how long its content is, and the room that it gets in the file and in memory."""

    name: str
    size_bytes: int
    room_bytes: int = 0


def parse(data: bytes, place: object) -> Image:
    """Read the headers of a PE file.

    Args:
        data: the file, or its beginning; sections may lie beyond it.
        place: the file, for errors.

    Raises:
        DamagedError: it is no PE32+ file, or sections lie over each other.
    """
    try:
        image = _parse(data, place)
    except (struct.error, ValueError) as error:
        raise DamagedError("the PE file's headers are cut short", place=place) from error
    _check_apart(image, place)
    return image


def machine(data: bytes, place: object) -> int:
    """Return the processor that a PE file, or a kernel with an EFI stub, is for.

    Raises:
        DamagedError: it is no PE file.
    """
    try:
        return int(struct.unpack_from("<H", data, _coff(data, place))[0])
    except struct.error as error:
        raise DamagedError("the PE file's headers are cut short", place=place) from error


def _coff(data: bytes, place: object) -> int:
    at = struct.unpack_from("<I", data, 60)[0] if data[:2] == b"MZ" else 0
    if not at or data[at : at + 4] != b"PE\0\0":
        raise DamagedError("it is no PE file", place=place)
    return int(at) + 4


def _parse(data: bytes, place: object) -> Image:
    coff = _coff(data, place)
    processor, count, _, _, _, optional_bytes, _ = _COFF.unpack_from(data, coff)
    optional = coff + _COFF.size
    table = optional + optional_bytes
    (magic,) = struct.unpack_from("<H", data, optional)
    (directories,) = struct.unpack_from("<I", data, optional + _DIRECTORIES)
    if magic != _PE32_PLUS or optional_bytes < _DIRECTORIES + 4 + 8 * directories:
        raise DamagedError("it is no PE32+ file", place=place)
    if count > _MAX_SECTIONS:
        raise DamagedError(f"{count} sections are more than a PE file has", place=place)
    in_memory, in_file = struct.unpack_from("<II", data, optional + _ALIGNMENTS)
    if any(one == 0 or one & (one - 1) for one in (in_memory, in_file)):
        raise DamagedError("the PE file's alignment is no power of two", place=place)
    image_bytes, headers_bytes = struct.unpack_from("<II", data, optional + _SIZE_OF_IMAGE)
    sections = tuple(
        _section(data, table + number * _SECTION.size, place) for number in range(count)
    )
    if headers_bytes < table + count * _SECTION.size:
        raise DamagedError("the PE file's headers have no room", place=place)
    return Image(processor, sections, image_bytes, headers_bytes, in_memory, in_file, coff, table)


def _section(data: bytes, at: int, place: object) -> Section:
    name, size, address, room, offset, *_ = _SECTION.unpack_from(data, at)
    text = name.rstrip(b"\0").decode("ascii", "replace")
    if text.startswith("/"):
        raise DamagedError("a section's name stands in a string table", place=place)
    return Section(text, address, size or room, offset, room)


def _check_apart(image: Image, place: object) -> None:
    """Refuse sections that lie over each other or over the headers, in memory or in the file."""
    in_memory = [(one.address, one.size_bytes, one.name) for one in image.sections]
    in_file = [(one.offset, one.room_bytes, one.name) for one in image.sections if one.room_bytes]
    for spans in (in_memory, in_file):
        end = image.headers_bytes
        for start, size, name in sorted(spans):
            if start < end:
                raise DamagedError(f"the section {name} lies over what is before it", place=place)
            end = start + size
    if max((start + size for start, size, _ in in_memory), default=0) > image.image_bytes:
        raise DamagedError("a section lies beyond the end of the image", place=place)


def extend(
    stub: bytes, additions: Sequence[Addition], place: object
) -> tuple[bytes, tuple[Section, ...]]:
    """Add sections behind all that are there, each at a page of its own.

    Args:
        stub: a PE file. What lies behind its last section (symbols, a signature) is left out.
        additions: in their order, in memory and in the file.
        place: the file, for errors.

    Returns:
        The file's bytes up to the first of the new sections, and where these are: content goes to `offset`, and zeros
        up to `room_bytes`.

    Raises:
        DamagedError: see `parse`; or a section of the stub lies beyond its end.
        UsageError: the headers have no room for more, a name is taken or too long, or all is too large.
    """
    image = parse(stub, place)
    _check_room(image, additions, place)
    address = _up(image.image_bytes, PAGE_BYTES)
    end = max((one.offset + one.room_bytes for one in image.sections), default=0)
    if end > len(stub):
        raise DamagedError("it is cut short", place=place)
    offset = _up(max(end, image.headers_bytes), image.file_alignment)
    added = []
    for one in additions:
        room = _up(max(one.size_bytes, one.room_bytes), image.file_alignment)
        added.append(Section(one.name, address, one.size_bytes, offset, room))
        address += _up(room, max(PAGE_BYTES, image.section_alignment))
        offset += room
    if max(address, offset) > _LIMIT:
        raise UsageError("more than 4 GiB do not go into a PE file", place=place)
    head = bytearray(stub[:end].ljust(added[0].offset if added else end, b"\0"))
    _write_headers(head, image, added, _up(address, image.section_alignment))
    return bytes(head), tuple(added)


def _check_room(image: Image, additions: Sequence[Addition], place: object) -> None:
    names = [one.name for one in image.sections]
    for one in additions:
        if one.name in names:
            raise UsageError(f"it has a section {one.name} already", place=place)
        if len(one.name.encode()) > 8 or one.size_bytes <= 0:
            raise UsageError(f"{one.name!r} cannot be a section of {one.size_bytes} bytes")
        names.append(one.name)
    table_end = image.table + len(names) * _SECTION.size
    first = min((one.offset for one in image.sections if one.room_bytes), default=table_end)
    if table_end > min(image.headers_bytes, first):
        raise UsageError(
            f"its headers have no room for {len(additions)} more sections",
            place=place,
            hint="take the stub of a newer systemd",
        )


def _write_headers(
    head: bytearray, image: Image, added: Sequence[Section], image_bytes: int
) -> None:
    at = image.table + len(image.sections) * _SECTION.size
    for one in added:
        _SECTION.pack_into(
            *(head, at, one.name.encode(), one.size_bytes, one.address, one.room_bytes),
            *(one.offset, 0, 0, 0, 0, _READABLE_DATA),
        )
        at += _SECTION.size
    processor, count, time, _, _, *rest = _COFF.unpack_from(head, image.coff)
    _COFF.pack_into(head, image.coff, processor, count + len(added), time, 0, 0, *rest)
    optional = image.optional
    (data_bytes,) = struct.unpack_from("<I", head, optional + _INITIALIZED_DATA)
    data_bytes += sum(one.room_bytes for one in added)
    struct.pack_into("<I", head, optional + _INITIALIZED_DATA, data_bytes)
    struct.pack_into("<I", head, optional + _SIZE_OF_IMAGE, image_bytes)
    # Nobody checks an application's checksum; a wrong one would be worse than none.
    struct.pack_into("<I", head, optional + _CHECKSUM, 0)
    (directories,) = struct.unpack_from("<I", head, optional + _DIRECTORIES)
    if directories > _CERTIFICATES:
        struct.pack_into("<II", head, optional + _DIRECTORIES + 4 + 8 * _CERTIFICATES, 0, 0)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step
