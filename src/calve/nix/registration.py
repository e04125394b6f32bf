"""Registration: what `nix-store --dump-db` writes and `--load-db` reads, path after path.

The lines of a path: the path, its NAR hash (base 16, without algorithm), its NAR size, its deriver or nothing, how
many references it has, the references. `/nix-path-registration` in images is the same, with `sha256:` before a hash in
base 32; both are read.
Source: `decodeValidPathInfo` of Nix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from calve.errors import DamagedError
from calve.nix.hashes import SIZES_BYTES, Hash
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

__all__ = ["dump", "parse"]

_NUMBER = re.compile(r"[0-9]{1,19}")
_MAX_NUMBER = 2**63 - 1

T = TypeVar("T")


def dump(infos: Iterable[PathInfo]) -> Iterator[bytes]:
    """Write the registration of some paths, a chunk for each; without signatures, which it cannot carry."""
    for info in infos:
        lines = [
            str(info.path),
            info.nar_hash.digest.hex(),
            str(info.nar_size),
            "" if info.deriver is None else str(info.deriver),
            str(len(info.references)),
            *map(str, sorted(info.references)),
        ]
        yield "".join(line + "\n" for line in lines).encode()


def parse(data: bytes, place: object = None) -> list[PathInfo]:
    """Read a registration.

    Raises:
        DamagedError: it is not one; the place names the line.
    """
    lines = _Lines(data, str(place or "registration"))
    found = []
    while not lines.at_end:
        path = lines.take("a store path", StorePath.parse)
        nar_hash = lines.take("a hash", _hash)
        nar_size = lines.take("a size", _number)
        deriver = lines.take("a deriver", lambda text: StorePath.parse(text) if text else None)
        count = lines.take("a number of references", _number)
        if count > lines.left:
            raise lines.error(f"{count} references are promised")
        references = {lines.take("a reference", StorePath.parse) for _ in range(count)}
        found.append(PathInfo(path, nar_hash, nar_size, tuple(sorted(references)), deriver))
    return found


class _Lines:
    """Lines, one after another, with their number."""

    def __init__(self, data: bytes, place: str) -> None:
        self.lines = data.decode("utf-8", "surrogateescape").split("\n")
        self.place = place
        self.number = 0
        if self.lines.pop():
            self.number = len(self.lines) + 1
            raise self.error("the last line is cut off")

    @property
    def left(self) -> int:
        return len(self.lines) - self.number

    @property
    def at_end(self) -> bool:
        return not self.left

    def error(self, message: str) -> DamagedError:
        return DamagedError(message, place=f"{self.place}:{self.number}")

    def take(self, what: str, convert: Callable[[str], T]) -> T:
        if self.at_end:
            raise self.error(f"it ends where {what} should follow")
        self.number += 1
        try:
            return convert(self.lines[self.number - 1])
        except DamagedError as error:
            raise self.error(error.message) from error


def _hash(text: str) -> Hash:
    prefixed = text.partition(":")[0] in SIZES_BYTES or text.partition("-")[0] in SIZES_BYTES
    value = Hash.parse(text if prefixed else f"sha256:{text}")
    if value.algorithm != "sha256":
        raise DamagedError(f"a {value.algorithm} hash instead of sha256")
    return value


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > _MAX_NUMBER:
        raise DamagedError(f"{text[:40]!r} is not a number")
    return int(text)
