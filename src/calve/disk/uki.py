"""A unified kernel image: systemd's stub, kernel, initrd and command line in one file that firmware starts.

Source: https://uapi-group.org/specifications/specs/unified_kernel_image/ and systemd-stub(7).

Made so that a small change stays small. What changes often and is short (command line, os-release, `uname -r`) stands
before kernel and initrd, each in a room of a fixed size, so that all of it lies in the first 512 KiB, beside the stub;
the file's size is rounded up, so that the file system around it does not change either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from calve.disk import pe
from calve.disk.arch import Arch
from calve.errors import CalveError, NotFoundError, UsageError
from calve.tasks import Cancel

__all__ = [
    "COMMAND_LINE_BYTES",
    "STUBS",
    "Uki",
    "Written",
    "find_stub",
    "kernel_release",
    "write",
]

COMMAND_LINE_BYTES = 2047
"""What a kernel reads of it: COMMAND_LINE_SIZE is 2048 on both processors, and the rest is cut off without a word."""

STUBS = (Path("/usr/lib/systemd/boot/efi"),)
"""Where distributions install the stub; on NixOS it is in the systemd package."""

_TEXT_ROOM_BYTES = (
    4096  # a page, the step of sections in memory; twice what a kernel reads of a command line
)
_UNAME_ROOM_BYTES = 512
_SIZE_STEP_BYTES = 1 << 20
_CHUNK_BYTES = 256 << 10
_STUB_LIMIT_BYTES = 4 << 20
_KERNEL_HEAD_BYTES = 64 << 10
_SECTOR_BYTES = 512
_MAGIC_AT, _VERSION_AT = 0x202, 0x20E


@dataclass(frozen=True, slots=True)
class Uki:
    """What goes into one.

    Attributes:
        arch: the processor.
        stub: systemd's, see `find_stub`.
        kernel: with an EFI stub of its own: bzImage, or `Image` on aarch64.
        initrd: its initial file system.
        command_line: what the kernel is told; Secure Boot aside, firmware may replace it.
        os_release: content of os-release(5); systemd's tools show it.
        uname: the kernel's release; empty where nobody knows it: the section is left out, as the specification allows.
    """

    arch: Arch
    stub: Path
    kernel: Path
    initrd: Path
    command_line: str
    os_release: str
    uname: str


@dataclass(frozen=True, slots=True)
class Written:
    """What a unified kernel image came to: its file, size, and where its sections are."""

    path: Path
    size_bytes: int
    sections: tuple[pe.Section, ...]


def find_stub(arch: Arch) -> Path:
    """Return the installed stub for a processor.

    Raises:
        NotFoundError: it is not installed.
    """
    for folder in STUBS:
        if (folder / arch.stub).is_file():
            return folder / arch.stub
    raise NotFoundError(
        f"systemd's stub {arch.stub} is not installed", hint="apt-get install systemd-boot-efi"
    )


def kernel_release(kernel: Path) -> str:
    """Return a kernel's release, as `uname -r` says it, out of its file; empty where it is no bzImage, or does not say it.

    Source: https://docs.kernel.org/arch/x86/boot.html, `kernel_version`. An `Image` of aarch64 says it nowhere.
    """
    with kernel.open("rb") as file:
        head = file.read(_KERNEL_HEAD_BYTES)
    if head[_MAGIC_AT : _MAGIC_AT + 4] != b"HdrS":
        return ""
    at = int.from_bytes(head[_VERSION_AT : _VERSION_AT + 2], "little")
    text, _, _ = head[at + _SECTOR_BYTES :].partition(b"\0") if at else (b"", b"", b"")
    word, _, _ = text[:_UNAME_ROOM_BYTES].partition(b" ")
    return word.decode("ascii") if word.isascii() and word.decode("ascii").isprintable() else ""


def write(uki: Uki, out: Path, *, cancel: Cancel | None = None) -> Written:
    """Write the file, under a temporary name first; the same inputs give the same bytes.

    Args:
        uki: what goes into it.
        out: the file; replaced where it is there.
        cancel: ends it.

    Raises:
        UsageError: a file that it needs is not there or empty; a text is too long, or cannot be written.
        DamagedError: the stub is no PE file.
    """
    texts = [
        (".osrel", _text("os-release", uki.os_release), _TEXT_ROOM_BYTES),
        *(
            (".uname", _text("the kernel's release", one), _UNAME_ROOM_BYTES)
            for one in [uki.uname]
            if one
        ),
        (".cmdline", _command_line(uki.command_line), _TEXT_ROOM_BYTES),
    ]
    files = [(".linux", uki.kernel), (".initrd", uki.initrd)]
    additions = [pe.Addition(name, len(text), room) for name, text, room in texts]
    additions += [pe.Addition(name, _size(path)) for name, path in files]
    head, sections = _lay_out(_stub(uki), additions, uki.stub)
    _check_machine(uki.kernel, uki.arch)
    contents: list[bytes | Path] = [*(text for _, text, _ in texts), uki.kernel, uki.initrd]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(head)
            for section, content in zip(sections, contents, strict=True):
                _copy(content, section, file, cancel)
            size_bytes = sections[-1].offset + sections[-1].room_bytes
            file.truncate(size_bytes)
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Written(out, size_bytes, sections)


def _lay_out(
    stub: bytes, additions: Sequence[pe.Addition], place: Path
) -> tuple[bytes, tuple[pe.Section, ...]]:
    """Add the sections; the last one's room brings the file to a multiple of 1 MiB."""
    _, sections = pe.extend(stub, additions, place)
    last = sections[-1]
    end = -(-(last.offset + last.size_bytes) // _SIZE_STEP_BYTES) * _SIZE_STEP_BYTES
    roomy = pe.Addition(last.name, last.size_bytes, end - last.offset)
    return pe.extend(stub, [*additions[:-1], roomy], place)


def _stub(uki: Uki) -> bytes:
    if _size(uki.stub) > _STUB_LIMIT_BYTES:
        raise UsageError("it is too large for a stub", place=uki.stub)
    data = uki.stub.read_bytes()
    if pe.machine(data, uki.stub) != uki.arch.machine:
        raise UsageError(f"it is no stub for {uki.arch.name}", place=uki.stub)
    if not any(section.name == ".sdmagic" for section in pe.parse(data, uki.stub).sections):
        raise UsageError("it is not systemd's stub", place=uki.stub)
    return data


def _check_machine(kernel: Path, arch: Arch) -> None:
    with kernel.open("rb") as file:
        if pe.machine(file.read(_KERNEL_HEAD_BYTES), kernel) != arch.machine:
            raise UsageError(f"it is no kernel for {arch.name}", place=kernel)


def _size(path: Path) -> int:
    """Return a file's size, which is not 0."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", place=path) from error
    if not size:
        raise UsageError("is empty", place=path)
    return size


def _text(what: str, text: str) -> bytes:
    data = text.encode()
    if not data or b"\0" in data:
        raise UsageError(f"{what} is empty, or has a NUL in it")
    return data


def _command_line(text: str) -> bytes:
    """Return it as the stub wants it: it makes a UTF-16 character of every byte."""
    data = _text("the command line", text)
    if not text.isascii() or not text.isprintable():
        raise UsageError("the command line must be of printable ASCII", place=repr(text))
    if len(data) > COMMAND_LINE_BYTES:
        raise UsageError(
            f"the command line has {len(data)} bytes, of which a kernel reads {COMMAND_LINE_BYTES}"
        )
    return data


def _copy(
    content: bytes | Path, section: pe.Section, file: IO[bytes], cancel: Cancel | None
) -> None:
    """Write a section's content to its place; what is left of its room becomes a hole, which reads as zeros."""
    file.seek(section.offset)
    if isinstance(content, bytes):
        file.write(content)
        return
    left = section.size_bytes
    with content.open("rb") as source:
        while chunk := source.read(min(left, _CHUNK_BYTES)):
            if cancel is not None:
                cancel.check()
            file.write(chunk)
            left -= len(chunk)
    if left:
        raise CalveError("became shorter while it was read", place=content)
