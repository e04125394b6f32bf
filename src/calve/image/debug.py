"""The variant of an image that one can log in to: `calve.debug=1` on the kernel command line of its unified kernel images.

Pure: a disk to read in, the changed blocks out. A command line stands in a room of a fixed size (`disk.uki`), so that
nothing moves: its text changes, and the section's size in the header, a block or two of the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from calve.disk import pe
from calve.disk.disk import BLOCK_BYTES
from calve.disk.inspect import fat, gpt
from calve.disk.inspect.findings import Findings
from calve.disk.inspect.report import BOOT_FILES
from calve.disk.inspect.source import Slice, Source
from calve.disk.uki import COMMAND_LINE_BYTES
from calve.errors import DamagedError, UsageError

__all__ = ["WORD", "Variant", "with_debug"]

WORD: Final = "calve.debug=1"

_HEAD_BYTES: Final = 64 << 10
_SECTION: Final = ".cmdline"
_SECTION_BYTES: Final = (
    40  # of a section's header; its size in memory stands behind 8 bytes of name
)
_SIZE_AT: Final = 8


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs: blocks by their index, whole; none where the word is there. And the new command lines."""

    blocks: Mapping[int, bytes]
    command_lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Patch:
    """Bytes, and where in a file they go."""

    at: int
    data: bytes


def with_debug(disk: Source, place: object) -> Variant:
    """Add the word to the command line of every unified kernel image that firmware starts.

    Args:
        disk: the whole disk.
        place: where it is, for errors.

    Raises:
        UsageError: it has no such image, or the room does not suffice.
        DamagedError: it has no EFI system partition, or that is damaged.
    """
    blocks: dict[int, bytearray] = {}
    lines = []
    for start, file in _boot_files(disk, place):
        found = _patches(file, place)
        if found is None:
            continue
        patches, line = found
        lines.append(line)
        for patch in patches:
            for at, data in _pieces(file, patch):
                _apply(disk, blocks, start + at, data)
    if not lines:
        raise UsageError(
            "its boot files have no kernel command line of their own",
            place=place,
            hint="only images with a unified kernel image have a debug variant",
        )
    changed = {index: bytes(data) for index, data in sorted(blocks.items())}
    return Variant(changed, tuple(lines))


def _boot_files(disk: Source, place: object) -> Iterator[tuple[int, fat.FatFile]]:
    """Yield the files that firmware starts, and where on the disk their file system begins."""
    findings = Findings()
    table = gpt.read(disk, findings)
    partitions = () if table is None else table.partitions
    esp = next((one for one in partitions if one.type == "esp"), None)
    if esp is None:
        raise DamagedError("the disk has no EFI system partition", place=place)
    system = fat.read(Slice(disk, esp.start_bytes, esp.size_bytes), findings)
    if system is None or len(findings):
        first = next(iter(findings), None)
        raise DamagedError(f"its EFI system partition is damaged: {first}", place=place)
    for path in BOOT_FILES.values():
        file = system.find(path)
        if file is not None:
            yield esp.start_bytes, file


def _patches(file: fat.FatFile, place: object) -> tuple[list[_Patch], str] | None:
    """Say what of a program is to be changed, and its new command line; None where it has none."""
    head = file.read(0, min(_HEAD_BYTES, file.size))
    image = pe.parse(head, f"{place}: {file.path}")
    found = [one for one in enumerate(image.sections) if one[1].name == _SECTION]
    if not found:
        return None
    (number, section) = found[0]
    raw = file.read(section.offset, min(section.size_bytes, section.room_bytes))
    line = _text(raw, place)
    if WORD in line.split():
        return [], line
    line = f"{line} {WORD}"
    room = min(_room(image, section), COMMAND_LINE_BYTES)
    if len(line) > room:
        raise UsageError(
            f"the command line would have {len(line)} bytes, and there is room for {room}",
            place=place,
            hint="build the image with --debug instead",
        )
    size_at = image.table + number * _SECTION_BYTES + _SIZE_AT
    size = len(line).to_bytes(4, "little")
    return [_Patch(size_at, size), _Patch(section.offset, line.encode())], line


def _text(raw: bytes, place: object) -> str:
    """Read a command line: to its first NUL, without white space at its end."""
    try:
        return raw.partition(b"\0")[0].decode("ascii").rstrip()
    except UnicodeDecodeError as error:
        raise DamagedError("the command line is not ASCII", place=place) from error


def _room(image: pe.Image, section: pe.Section) -> int:
    """Return how long a section may become: in the file, and in memory up to the next one."""
    behind = [one.address for one in image.sections if one.address > section.address]
    return min(section.room_bytes, min(behind, default=image.image_bytes) - section.address)


def _pieces(file: fat.FatFile, patch: _Patch) -> Iterator[tuple[int, bytes]]:
    """Yield a patch cut where the file is: places in the file system, and bytes."""
    done = 0
    while done < len(patch.data):
        at = patch.at + done
        run = max(number for number, start in enumerate(file.starts) if start <= at)
        end = file.starts[run + 1] if run + 1 < len(file.starts) else file.size
        piece = patch.data[done : done + end - at]
        yield file.places[run] + at - file.starts[run], piece
        done += len(piece)


def _apply(disk: Source, blocks: dict[int, bytearray], at: int, data: bytes) -> None:
    """Write bytes into copies of the disk's blocks."""
    while data:
        index, skip = divmod(at, BLOCK_BYTES)
        if index not in blocks:
            blocks[index] = bytearray(disk.read(index * BLOCK_BYTES, BLOCK_BYTES))
        piece = data[: BLOCK_BYTES - skip]
        blocks[index][skip : skip + len(piece)] = piece
        at, data = at + len(piece), data[len(piece) :]
