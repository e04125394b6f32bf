"""ELF: which shared objects a program or library needs, and where the loader finds them.

Source: System V ABI, chapter 5; ld.so(8). 64-bit little-endian only: x86_64 and aarch64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calve.errors import DamagedError, NotFoundError

__all__ = ["Dynamic", "closure", "read"]

_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Dynamic:
    """What the loader reads: the interpreter, the names needed, and where else to look ($ORIGIN kept)."""

    interpreter: str | None
    needed: tuple[str, ...]
    paths: tuple[str, ...]


def read(path: Path) -> Dynamic | None:
    """Return the dynamic section of an ELF file; None where the file is not ELF or is static."""
    data = path.read_bytes()
    if data[:4] != b"\x7fELF":
        return None
    if data[4:6] != b"\x02\x01":
        raise DamagedError("only 64-bit little-endian ELF files are understood", place=path)
    try:
        return _read(data)
    except (struct.error, IndexError, ValueError) as error:
        raise DamagedError("damaged ELF file", place=path) from error


def _read(data: bytes) -> Dynamic | None:
    offset, size, count = (
        struct.unpack_from("<Q", data, 32)[0],
        *struct.unpack_from("<HH", data, 54),
    )
    loads: list[tuple[int, int, int]] = []
    dynamic: bytes | None = None
    interpreter = None
    for at in range(offset, offset + size * count, size):
        kind, _flags, file_at, address, _paddr, file_size = struct.unpack_from("<IIQQQQ", data, at)
        if kind == _PT_LOAD:
            loads.append((address, file_at, file_size))
        elif kind == _PT_DYNAMIC:
            dynamic = data[file_at : file_at + file_size]
        elif kind == _PT_INTERP:
            interpreter = data[file_at : file_at + file_size].rstrip(b"\0").decode()
    if dynamic is None:
        return None
    tags = list(struct.iter_unpack("<QQ", dynamic[: len(dynamic) // 16 * 16]))
    strings = next((_file_offset(loads, v) for t, v in tags if t == _DT_STRTAB), 0)

    def text(at: int) -> str:
        return data[strings + at : data.index(b"\0", strings + at)].decode()

    needed = tuple(text(value) for tag, value in tags if tag == _DT_NEEDED)
    paths = [
        part
        for tag, value in tags
        if tag in {_DT_RPATH, _DT_RUNPATH}
        for part in text(value).split(":")
    ]
    return Dynamic(interpreter, needed, tuple(paths))


def _file_offset(loads: Sequence[tuple[int, int, int]], address: int) -> int:
    for start, file_at, size in loads:
        if start <= address < start + size:
            return file_at + address - start
    raise IndexError(address)


def _search_path() -> list[Path]:
    """Return the loader's directories: those of /etc/ld.so.conf, then its built-in ones."""
    found: list[Path] = []

    def add(conf: Path) -> None:
        if not conf.is_file():
            return
        for raw in conf.read_text().splitlines():
            line = raw.partition("#")[0].strip()
            if line.startswith("include"):
                pattern = line.split(None, 1)[1].lstrip("/")
                for more in sorted(Path("/").glob(pattern)):
                    add(more)
            elif line:
                found.append(Path(line))

    add(Path("/etc/ld.so.conf"))
    return [*found, Path("/lib64"), Path("/usr/lib64"), Path("/lib"), Path("/usr/lib")]


def closure(files: Iterable[Path]) -> list[Path]:
    """Return the shared objects that the files need, directly or not, the interpreter first among them.

    Raises:
        NotFoundError: a library is nowhere to be found.
    """
    search = _search_path()
    todo = list(files)
    seen: set[Path] = set(todo)
    found: list[Path] = []
    while todo:
        current = todo.pop(0)
        dynamic = read(current)
        if dynamic is None:
            continue
        origin = str(current.resolve().parent)
        own = [Path(part.replace("$ORIGIN", origin)) for part in dynamic.paths]
        wanted = [Path(dynamic.interpreter)] if dynamic.interpreter else []
        for name in dynamic.needed:
            places = (place / name for place in [*own, *search])
            library = next((place for place in places if place.is_file()), None)
            if library is None:
                raise NotFoundError(f"the library {name} is not installed", place=current)
            wanted.append(library)
        for library in wanted:
            if library not in seen:
                seen.add(library)
                found.append(library)
                todo.append(library)
    return found
