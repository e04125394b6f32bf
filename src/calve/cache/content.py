"""One NAR of a cache, read to its end and held against what was signed: to judge it, or to copy it elsewhere.

Memory stays bounded: one decoder's window and a few chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from dataclasses import dataclass

from calve.cache.compression import compressor, decompressor
from calve.cache.objects import Objects, Readable, check_key
from calve.errors import DamagedError
from calve.nix import nar
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo, PathInfo
from calve.tasks import Cancel

__all__ = ["Measured", "NarCopy", "measure"]

_READ_BYTES = 64 * 1024
_CONTENT_BYTES = 256 * 1024
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Measured:
    """What an object is, whatever its narinfo says."""

    file_hash: Hash
    file_size: int


class _Raw:
    """An object's bytes, hashed and counted on their way; `taken` has those that nobody took yet."""

    def __init__(
        self,
        source: Readable,
        entry: NarInfo,
        place: str,
        tell: Callable[[int], object],
        cancel: Cancel | None,
    ) -> None:
        self._source = source
        self._most = 2 * entry.info.nar_size + _SLACK_BYTES  # empty frames would go on for ever
        self._place = place
        self._tell = tell
        self._cancel = cancel
        self._hash = hashlib.sha256()
        self.size = 0
        self.taken: list[bytes] | None = None

    def read(self, _size: int) -> bytes:
        """Return the next bytes, at most 64 KiB."""
        if self._cancel is not None:
            self._cancel.check()
        data = self._source.read(_READ_BYTES)
        self._hash.update(data)
        self.size += len(data)
        if self.size > self._most:
            raise DamagedError("longer than any compression makes this NAR", place=self._place)
        if self.taken is not None:
            self.taken.append(data)
        self._tell(len(data))
        return data

    @property
    def measured(self) -> Measured:
        return Measured(Hash("sha256", self._hash.digest()), self.size)


class _Content:
    """A NAR's bytes, held against its size and, at the end, its hash."""

    def __init__(self, source: Callable[[int], bytes], info: PathInfo, place: str) -> None:
        self._source = source
        self._info = info
        self._place = place
        self._hash = hashlib.sha256()
        self._size = 0

    def read(self, size: int) -> bytes:
        """Return the next bytes; none at the end."""
        data = self._source(size)
        self._hash.update(data)
        self._size += len(data)
        if self._size > self._info.nar_size:
            raise self._wrong()
        return data

    def check(self) -> None:
        """Raise DamagedError unless what was read is the NAR."""
        if self._size != self._info.nar_size or self._hash.digest() != self._info.nar_hash.digest:
            raise self._wrong()

    def _wrong(self) -> DamagedError:
        return DamagedError("the NAR is not the one that was signed", place=self._place)


def measure(
    objects: Objects,
    entry: NarInfo,
    *,
    tell: Callable[[int], object] = lambda _size: None,
    cancel: Cancel | None = None,
) -> Measured:
    """Read a NAR and hold it against its path's facts: well-formed, NarSize, NarHash.

    Args:
        objects: the cache.
        entry: the path, and where its NAR lies; what it says of the file is not looked at.
        tell: called with the size of each piece that was read.
        cancel: stops it.

    Raises:
        NotFoundError: there is no such object.
        DamagedError: it is not the NAR, or not one at all.
        UsageError: its compression is not supported.
    """
    key = check_key(entry.url, entry.info.path)
    place = f"{objects.url}/{key}"
    with objects.open(key) as source:
        raw = _Raw(source, entry, place, tell, cancel)
        content = _Content(
            decompressor(entry.compression, raw.read, place=place), entry.info, place
        )
        try:
            for _ in nar.read(content.read, limit=entry.info.nar_size):
                pass
        except DamagedError as error:
            raise DamagedError(error.message, place=place, hint=error.hint) from error
        content.check()
    return raw.measured


class NarCopy:
    """The compressed NAR of another cache, verified on its way: as it is there, or compressed anew.

    Args:
        objects: the other cache.
        entry: what it says of the path.
        level: of zstd, to compress anew; None to leave it as it is.
        tell: called with the size of each piece that was read.

    Attributes:
        file_hash: of what `chunks` gave, once it has ended.
        file_size: likewise, bytes.
    """

    def __init__(
        self,
        objects: Objects,
        entry: NarInfo,
        level: int | None,
        tell: Callable[[int], object] = lambda _size: None,
    ) -> None:
        self._objects = objects
        self._entry = entry
        self._level = level
        self._tell = tell
        self._hash = hashlib.sha256()
        self.file_size = 0

    @property
    def file_hash(self) -> Hash:
        """Return the hash of what `chunks` gave."""
        return Hash("sha256", self._hash.digest())

    def chunks(self, cancel: Cancel | None = None) -> Generator[bytes, None, None]:
        """Give the compressed NAR; it ends only after the whole was held against its hash.

        Raises:
            DamagedError: it is not the NAR that was signed: what was given must not be kept.
            NotFoundError: there is no such object.
        """
        entry = self._entry
        key = check_key(entry.url, entry.info.path)
        place = f"{self._objects.url}/{key}"
        made = None if self._level is None else compressor(self._level, entry.info.nar_size)
        with self._objects.open(key) as source:
            raw = _Raw(source, entry, place, self._tell, cancel)
            read = decompressor(entry.compression, raw.read, place=place)
            content = _Content(read, entry.info, place)
            if made is None:
                raw.taken = []
            while data := content.read(_CONTENT_BYTES):
                if made is not None:
                    yield from self._count(made.compress(data))
                elif raw.taken:
                    pieces, raw.taken = raw.taken, []
                    for piece in pieces:
                        yield from self._count(piece)
            content.check()
            for piece in (made.flush(),) if made is not None else raw.taken or ():
                yield from self._count(piece)

    def _count(self, data: bytes) -> Generator[bytes, None, None]:
        if data:
            self._hash.update(data)
            self.file_size += len(data)
            yield data
