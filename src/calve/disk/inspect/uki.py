"""Unified kernel images: kernel, initrd, command line and os-release as sections of an EFI program.

Source: the UAPI group's Unified Kernel Image specification; os-release(5).
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from calve.disk.inspect import pe
from calve.disk.inspect.findings import Check, Findings, printable
from calve.disk.inspect.source import Slice, Source

__all__ = ["Uki", "digest", "read"]

_MAX_TEXT_BYTES = 64 << 10
_PIECE_BYTES = 256 << 10
_ONCE = (".linux", ".initrd", ".cmdline", ".osrel", ".uname")


@dataclass(frozen=True, slots=True)
class Uki:
    """What a unified kernel image holds.

    Attributes:
        machine: the processor, "x86_64" or "aarch64".
        cmdline: the kernel's command line, without what pads it; None where there is none.
        os_release: by key; empty where there is none.
        uname: the kernel's release; None where there is none.
        linux_bytes: size of the kernel.
        initrd_bytes: size of the initrd, 0 where there is none.
        sections: all of them, by name.
    """

    machine: str
    cmdline: str | None
    os_release: Mapping[str, str]
    uname: str | None
    linux_bytes: int
    initrd_bytes: int
    sections: tuple[pe.Section, ...]


def read(source: Source, findings: Findings) -> Uki | None:
    """Read an image; None where it is an EFI program without a kernel.

    What is wrong goes to `findings`.

    Raises:
        DamagedError: it is no 64-bit PE file.
    """
    program = pe.read(source, findings)
    sections: dict[str, pe.Section] = {}
    for section in program.sections:
        if section.name in _ONCE and section.name in sections:
            findings.add(Check.UKI_SECTION_TWICE, section.name, "there is more than one")
        sections.setdefault(section.name, section)
    linux = sections.get(".linux")
    if linux is None:
        return None
    for name in (".initrd", ".cmdline", ".osrel"):
        if name not in sections:
            findings.add(Check.UKI_SECTION_MISSING, name, "the image has no such section")
    _check_alignment(program, findings)
    _check_kernel(source, linux, program.machine, findings)
    initrd = sections.get(".initrd")
    release = _text(source, sections.get(".osrel"), findings)
    return Uki(
        machine=program.machine,
        cmdline=_text(source, sections.get(".cmdline"), findings),
        os_release=_os_release(release or "", findings),
        uname=_text(source, sections.get(".uname"), findings),
        linux_bytes=linux.content_bytes,
        initrd_bytes=0 if initrd is None else initrd.content_bytes,
        sections=program.sections,
    )


def digest(source: Source, image: Uki, name: str) -> bytes | None:
    """Return the SHA-256 of a section's content; None where there is no such section."""
    section = next((one for one in image.sections if one.name == name), None)
    if section is None:
        return None
    state = hashlib.sha256()
    for at in range(0, section.content_bytes, _PIECE_BYTES):
        count = min(_PIECE_BYTES, section.content_bytes - at)
        state.update(source.read(section.file_at + at, count))
    return state.digest()


def _text(source: Source, section: pe.Section | None, findings: Findings) -> str | None:
    """Return a section's text: to the first NUL, without white space at its end."""
    if section is None:
        return None
    with findings.catching(Check.UKI_TEXT_DAMAGED, section.name):
        if section.content_bytes > _MAX_TEXT_BYTES:
            message = f"{section.content_bytes} bytes of text"
            findings.add(Check.UKI_TEXT_DAMAGED, section.name, message)
            return None
        raw = source.read(section.file_at, section.content_bytes)
        text, _, rest = raw.partition(b"\0")
        if rest.strip(b"\0"):
            findings.add(Check.UKI_TEXT_DAMAGED, section.name, "text goes on behind a NUL")
        try:
            return text.decode().rstrip()
        except UnicodeDecodeError:
            findings.add(Check.UKI_TEXT_DAMAGED, section.name, "it is not UTF-8")
    return None


def _os_release(text: str, findings: Findings) -> dict[str, str]:
    """Read `KEY=value` lines, values quoted as a shell would."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        key, mark, value = line.strip().partition("=")
        if not key or key.startswith("#"):
            continue
        try:
            words = shlex.split(value)
        except ValueError:
            words = ["", ""]
        if not mark or len(words) > 1:
            message = f"not KEY=value: {printable(line)[:100]}"
            findings.add(Check.UKI_TEXT_DAMAGED, ".osrel", message)
            continue
        found[key] = "".join(words)
    return found


def _check_alignment(program: pe.Program, findings: Findings) -> None:
    """Check the sections that were added; the stub's own are not all aligned, and it starts."""
    memory, file = program.alignment_bytes, program.file_alignment_bytes
    for section in program.sections:
        unaligned = section.memory_at % memory or section.file_at % file
        if unaligned and section.name.startswith(pe.UKI_SECTIONS):
            message = (
                f"at {section.memory_at:#x} in memory, {section.file_at:#x} in the file; aligned "
                f"would be multiples of {memory:#x} and {file:#x}"
            )
            findings.add(Check.PE_SECTION_UNALIGNED, section.name, message)


def _check_kernel(source: Source, linux: pe.Section, machine: str, findings: Findings) -> None:
    """Check that the kernel is an EFI program too, for the same processor: the stub starts it as one."""
    kernel = Slice(source, linux.file_at, linux.content_bytes)
    with findings.catching(Check.UKI_KERNEL, ".linux"):
        head = kernel.read(0, 64)
        at = int.from_bytes(head[60:], "little")
        signature = kernel.read(at, 6)
        if head[:2] != b"MZ" or signature[:4] != b"PE\0\0":
            findings.add(Check.UKI_KERNEL, ".linux", "the kernel is no EFI program")
            return
        number = int.from_bytes(signature[4:], "little")
        own = pe.MACHINES.get(number, f"{number:#06x}")
        if own != machine:
            message = f"the kernel is for {own}, the program around it for {machine}"
            findings.add(Check.UKI_KERNEL, ".linux", message)
