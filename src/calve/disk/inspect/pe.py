"""PE/COFF: the headers of an EFI program and its sections, which must not lie upon each other.

Source: Microsoft's PE Format; the UEFI Specification 2.10, section 2.1.1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calve.disk.inspect.findings import Check, Findings, FlawError, printable
from calve.disk.inspect.source import Source

__all__ = ["MACHINES", "UKI_SECTIONS", "Program", "Section", "read"]

MACHINES = {0x8664: "x86_64", 0xAA64: "aarch64"}
UKI_SECTIONS = (".linux", ".initrd", ".cmdline", ".osrel", ".uname", ".dtb", ".splash", ".pcr")

_COFF = struct.Struct("<4sHHIIIHH")
_SECTION = struct.Struct("<8sIIIIIIHHI")
_PE32_PLUS = 0x20B
_OPTIONAL_BYTES = 112  # before the data directories
_EFI_APPLICATION = 10
_MAX_SECTIONS = 96
_MAX_HEADER_AT = 1 << 20


@dataclass(frozen=True, slots=True)
class Section:
    """A section: its name, where it goes in memory, where its bytes are in the file."""

    name: str
    memory_at: int
    memory_bytes: int
    file_at: int
    file_bytes: int

    @property
    def content_bytes(self) -> int:
        """Return how many of the file's bytes count: the rest pads."""
        return min(self.memory_bytes, self.file_bytes)


@dataclass(frozen=True, slots=True)
class Program:
    """An EFI program.

    Attributes:
        machine: the processor by its name in `MACHINES`, or its number.
        alignment_bytes: what a section's place in memory should be a multiple of.
        file_alignment_bytes: the same in the file.
        sections: in the order of their table.
    """

    machine: str
    alignment_bytes: int
    file_alignment_bytes: int
    sections: tuple[Section, ...]


def read(source: Source, findings: Findings) -> Program:
    """Read a program's headers; sections that lie wrong go to `findings`.

    Raises:
        DamagedError: it is no 64-bit PE file.
    """
    at = _header_at(source)
    magic, machine, count, _, _, _, optional, _ = _COFF.unpack(source.read(at, _COFF.size))
    if magic != b"PE\0\0":
        raise _flaw("the signature PE is missing")
    if optional < _OPTIONAL_BYTES or not 0 < count <= _MAX_SECTIONS:
        raise _flaw(f"{count} sections, an optional header of {optional} bytes")
    header = source.read(at + _COFF.size, _OPTIONAL_BYTES)
    kind, entry, alignment, file_alignment, image_bytes, headers_bytes, subsystem = (
        *struct.unpack_from("<H14xI12x", header),
        *struct.unpack_from("<II16xII4xH", header, 32),
    )
    if kind != _PE32_PLUS or subsystem != _EFI_APPLICATION:
        raise _flaw(f"magic {kind:#x}, subsystem {subsystem}: no 64-bit EFI application")
    if not _is_power(alignment) or not _is_power(file_alignment):
        raise _flaw(f"sections aligned to {alignment}, in the file to {file_alignment}")
    table_at = at + _COFF.size + optional
    table = source.read(table_at, count * _SECTION.size)
    sections = tuple(_section(*row) for row in _SECTION.iter_unpack(table))
    if headers_bytes < table_at + len(table) or headers_bytes > source.size:
        raise _flaw(
            f"headers of {headers_bytes} bytes, their sections' end at {table_at + len(table)}"
        )
    _check_sections(sections, source.size, image_bytes, headers_bytes, findings)
    if not any(0 <= entry - one.memory_at < one.memory_bytes for one in sections):
        findings.add(Check.PE_DAMAGED, "headers", f"its entry point {entry:#x} is in no section")
    machine_name = MACHINES.get(machine, f"{machine:#06x}")
    return Program(machine_name, alignment, file_alignment, sections)


def _flaw(message: str) -> FlawError:
    return FlawError(Check.PE_DAMAGED, message, place="headers")


def _is_power(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def _header_at(source: Source) -> int:
    head = source.read(0, 64)
    at = int.from_bytes(head[60:], "little")
    if head[:2] != b"MZ" or not 64 <= at <= _MAX_HEADER_AT:
        raise _flaw("no PE file: it does not begin with a DOS header")
    return at


def _section(name: bytes, memory: int, memory_at: int, size: int, at: int, *_rest: int) -> Section:
    return Section(printable(name.rstrip(b"\0")), memory_at, memory, at if size else 0, size)


def _check_sections(
    sections: Sequence[Section], size: int, image_bytes: int, headers_bytes: int, findings: Findings
) -> None:
    for section in sections:
        end = section.file_at + section.file_bytes
        if section.file_bytes and not headers_bytes <= section.file_at <= end <= size:
            message = (
                f"bytes {section.file_at} to {end} of {size}, behind {headers_bytes} of headers"
            )
            findings.add(Check.PE_SECTION_OUTSIDE, section.name, message)
        end = section.memory_at + section.memory_bytes
        if not headers_bytes <= section.memory_at <= end <= image_bytes:
            message = f"in memory {section.memory_at:#x} to {end:#x} of {image_bytes:#x}"
            findings.add(Check.PE_SECTION_OUTSIDE, section.name, message)
    in_memory = ((one.memory_at, max(one.memory_bytes, 1), one.name) for one in sections)
    _check_overlaps(in_memory, "in memory", findings)
    in_file = ((one.file_at, one.file_bytes, one.name) for one in sections if one.file_bytes)
    _check_overlaps(in_file, "in the file", findings)


def _check_overlaps(ranges: Iterable[tuple[int, int, str]], where: str, findings: Findings) -> None:
    end, last = 0, ""
    for start, size, name in sorted(ranges):
        if start < end:
            uki = any(one.startswith(UKI_SECTIONS) for one in (name, last))
            check = Check.UKI_SECTION_OVERLAPS if uki else Check.PE_SECTION_OVERLAPS
            findings.add(check, name, f"it lies upon {last} {where}, from {start:#x} on")
        if start + size > end:
            end, last = start + size, name
