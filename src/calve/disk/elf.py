"""ELF: which shared objects a program or library needs, and where the loader finds them.

Source: System V ABI, chapter 5; ld.so(8). 64-bit little-endian only: x86_64 and aarch64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calve.errors import DamagedError, NotFoundError

__all__ = ["Dynamic", "closure", "inside", "read"]

_DT_NEEDED, _DT_STRTAB, _DT_RPATH, _DT_RUNPATH = 1, 5, 15, 29
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_PARTS = 4096


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


def _search_path(root: Path) -> list[str]:
    """Return the loader's directories: those of /etc/ld.so.conf, then its built-in ones."""
    found: list[str] = []

    def add(conf: str) -> None:
        file = inside(root, conf)
        if not file.is_file():
            return
        for raw in file.read_text().splitlines():
            line = raw.partition("#")[0].strip()
            if line.startswith("include"):
                pattern = line.split(None, 1)[1].lstrip("/")
                for more in sorted(root.glob(pattern)):
                    add(f"/{more.relative_to(root)}")
            elif line:
                found.append(line)

    add("/etc/ld.so.conf")
    return [*found, "/lib64", "/usr/lib64", "/lib", "/usr/lib"]


def inside(root: Path, path: str) -> Path:
    """Return where a path of the system below `root` really is: no link, its last name included, leaves `root`.

    Raises:
        DamagedError: links that lead in a circle.
    """
    done: list[str] = []
    left = path.split("/")[::-1]
    for _ in range(_PARTS):
        while left and left[-1] in {"", "."}:
            left.pop()
        if not left:
            return root.joinpath(*done)
        part = left.pop()
        if part == "..":
            del done[-1:]
            continue
        place = root.joinpath(*done, part)
        if place.is_symlink():
            target = str(place.readlink())
            left += target.split("/")[::-1]
            if target.startswith("/"):
                done = []
        else:
            done.append(part)
    raise DamagedError("its links lead in a circle", place=root / path.lstrip("/"))


def closure(files: Iterable[Path], root: Path = Path("/")) -> list[Path]:
    """Return the shared objects that the files need, directly or not, the interpreter first among them.

    Args:
        files: programs and libraries, below `root`.
        root: of the system that they belong to, and that their libraries are looked for in.

    Returns:
        Each at the place where the loader of that system finds it, below `root`; it may be a link.

    Raises:
        NotFoundError: a library is nowhere to be found.
    """
    search = _search_path(root)
    todo = list(files)
    seen: set[Path] = set(todo)
    found: list[Path] = []
    while todo:
        current = todo.pop(0)
        file = inside(root, f"/{current.relative_to(root)}")
        dynamic = read(file)
        if dynamic is None:
            continue
        origin = f"/{file.parent.relative_to(root)}"
        own = [part.replace("$ORIGIN", origin) for part in dynamic.paths]
        wanted = [dynamic.interpreter] if dynamic.interpreter else []
        for name in dynamic.needed:
            # What is loaded already under this name is not looked for again, wherever it was found.
            loaded = [f"/{one.parent.relative_to(root)}" for one in found if one.name == name]
            places = (f"{place}/{name}" for place in [*own, *search, *loaded])
            library = next((place for place in places if inside(root, place).is_file()), None)
            if library is None:
                raise NotFoundError(f"the library {name} is not installed", place=current)
            wanted.append(library)
        for library in wanted:
            place = root / library.lstrip("/")
            if place not in seen:
                seen.add(place)
                found.append(place)
                todo.append(place)
    return found
