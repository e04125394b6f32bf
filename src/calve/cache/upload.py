"""One path's way into a cache: its NAR, made only where there is none, and its narinfo.

Used by all threads of a push. What a collection is about to remove is not relied on: such a NAR gets another key,
such a narinfo other bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock

from calve.cache.amend import amend, joined
from calve.cache.compression import Codec
from calve.cache.compressors import Compressors
from calve.cache.lookup import narinfo_key, read_narinfo
from calve.cache.objects import MissingCacheError, Objects, is_missing
from calve.cache.stream import NarStream
from calve.errors import AccessError, ConflictError, DamagedError, NotFoundError
from calve.nix.hashes import encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import SecretKey
from calve.nix.storepath import StorePath
from calve.progress import Progress, Step
from calve.tasks import Budget, Cancel
from calve.transport.retry import Policy, retry

__all__ = ["KEPT", "Meter", "Uploader", "check_size"]

KEPT = "Calve-Kept"
"""A narinfo's extra line: what makes a doomed one another object."""
# From this size on it is cheaper to ask whether the NAR is there than to send it in vain, where some of it may be.
_ASK_BYTES = 256 << 10
# What one object that is being sent holds of it at most (a part of an upload), and all of a push together.
_PART_BYTES = 16 << 20
_BUDGET_BYTES = 20 << 20
_HEAD_BYTES = 4096
_TRIES = 5
_MANY_REFERENCES = 200
_ROOM_BYTES = 2048
_PROGRESS_BYTES = 1 << 20
_TWICE = Policy(attempts=2)


@dataclass(slots=True)
class Uploader:
    """How paths go into one cache.

    Attributes:
        objects: the cache.
        key: signs.
        codec: how NARs are compressed.
        compressors: who does it.
        real: where a path's files are.
        tell: told bytes of NAR that are done, and bytes that were sent.
        met: called when something is there that was believed not to be.
        asking: ask for larger NARs before they are sent.
        doomed: keys of what a collection may remove at any moment.
        gc: that collection.
        room: bytes of objects that may be held at once.
    """

    objects: Objects
    key: SecretKey
    codec: Codec
    compressors: Compressors
    real: Callable[[StorePath], Path]
    tell: Callable[[int, int], object] = lambda _done, _sent: None
    met: Callable[[], object] = lambda: None
    asking: bool = False
    doomed: frozenset[str] = frozenset()
    gc: str | None = None
    room: Budget = field(default_factory=lambda: Budget(_BUDGET_BYTES))

    # What is there

    def find(self, info: PathInfo) -> NarInfo | None:
        """Read a path's narinfo; None where there is none, none that is whole, or one of another build."""
        try:
            entry = read_narinfo(self.objects, info.path)
        except (NotFoundError, AccessError, DamagedError) as error:
            if isinstance(error, MissingCacheError) and not self.objects.url.startswith("file:"):
                raise  # a directory is made by the first write, a bucket is not
            if isinstance(error, AccessError) and not is_missing(error):
                raise
            return None
        return entry if entry.info.fingerprint == info.fingerprint else None

    def whole(self, entry: NarInfo) -> bool:
        """Say whether the NAR that a narinfo names is there, of the size that it names."""
        try:
            size = self.size(entry.url)
        except DamagedError:  # its key leads out of the cache
            return False
        return size is not None and entry.file_size in {None, size}

    def size(self, key: str) -> int | None:
        """Return a NAR's size, None where it is not there; who may not list is told "denied" of that too."""
        try:
            return self.objects.head(key)
        except AccessError as error:
            if not is_missing(error):
                raise
            return None

    # Sending

    def nar_key(self, info: PathInfo) -> str:
        """Return where a path's NAR goes."""
        plain = self.plain_key(info)
        if plain not in self.doomed:
            return plain
        return f"{plain.removesuffix(self.codec.suffix)}-{self.gc}{self.codec.suffix}"

    def plain_key(self, info: PathInfo) -> str:
        """Return where a path's NAR goes, unless it is doomed there."""
        return f"nar/{encode32(info.nar_hash.digest)}{self.codec.suffix}"

    def send(
        self, info: PathInfo, cancel: Cancel, *, replacing: bool = False
    ) -> tuple[NarInfo, bool]:
        """Make sure that a NAR is there.

        Args:
            info: of the path.
            cancel: stops it.
            replacing: what is there is damaged.

        Returns:
            Its entry, and whether its narinfo is there and says so; else that is to be written.
        """
        for _ in range(_TRIES):
            key = self.nar_key(info)
            entry = NarInfo(info.signed(self.key), key, self.codec.compression)
            asked = not replacing and self.asking and info.nar_size >= _ASK_BYTES
            size = self.size(key) if asked else None
            if size is None:
                # Two tries: an upload that conflicts with another's cannot go on, only begin anew.
                send = partial(self._stream, info, key, cancel, replacing=replacing)
                stream = retry(send, _TWICE, cancel=cancel)
                if stream is not None:
                    self.tell(0, stream.file_size)
                    made = replace(entry, file_hash=stream.file_hash, file_size=stream.file_size)
                    return made, False
                self.met()
                if self.nar_key(info) != key:
                    continue
                size = self.size(key)
            else:
                self.tell(info.nar_size, 0)
            if size is None:
                continue  # it was there, and is gone
            found = self.find(info)
            if found is not None and found.url == key and found.file_size in {None, size}:
                return found, narinfo_key(info.path) not in self.doomed
            return replace(entry, file_size=size), False
        raise ConflictError("it keeps coming and going", place=f"{self.objects.url}/{key}")

    def _stream(
        self, info: PathInfo, key: str, cancel: Cancel, *, replacing: bool
    ) -> NarStream | None:
        """Send a NAR; None where the object was there already."""
        stream = NarStream(
            self.real(info.path),
            info,
            self.codec.level,
            lambda size: self.tell(size, 0),
            compression=self.codec.compression,
            compressors=self.compressors,
        )
        with (
            self.room.held(min(info.nar_size + _HEAD_BYTES, _PART_BYTES), cancel),
            closing(stream.chunks(cancel)) as chunks,
        ):
            made = self.objects.put_stream(key, chunks, only_new=not replacing)
            return stream if made else None

    def write_narinfo(
        self, entry: NarInfo, info: PathInfo, *, fresh: bool, replacing: bool = False
    ) -> NarInfo:
        """Write a narinfo; one of the same build that is there keeps its signatures, and says more of the same NAR.

        Args:
            entry: what it shall say.
            info: what the store says of the path.
            fresh: it is believed not to be there.
            replacing: what is there says wrong things of the same NAR.
        """
        ours = info.signed(self.key)
        key = narinfo_key(info.path)
        made = entry

        def make(old: bytes | None) -> bytes:
            nonlocal made
            if old is not None:
                self.met()
            made = joined(entry, ours, self.key, old, keep=not replacing)
            if key in self.doomed and self.gc is not None:
                rest = tuple(one for one in made.extra if one[0] != KEPT)
                made = replace(made, extra=(*rest, (KEPT, self.gc)))
            return made.dump()

        amend(self.objects, key, make, fresh=fresh)
        return made


def check_size(info: PathInfo, key: SecretKey) -> None:
    """Raise UsageError unless readers take the narinfo of a path, with room for signatures of others."""
    if len(info.references) < _MANY_REFERENCES:
        return
    NarInfo(info.signed(key), "nar/", "zstd", extra=(("", " " * _ROOM_BYTES),)).dump()


class Meter:
    """Counts bytes of NARs, for progress and for the report."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = Lock()
        self._done_bytes = 0
        self._told_bytes = 0
        self.total_bytes = 0
        self.sent_bytes = 0

    def add(self, done: int, sent: int) -> None:
        """Count bytes of NARs that are done, and bytes that were sent."""
        with self._lock:
            self._done_bytes += done
            self.sent_bytes += sent
            if self._done_bytes - self._told_bytes >= _PROGRESS_BYTES:
                self.tell()

    def tell(self) -> None:
        """Tell how many bytes are done."""
        self._told_bytes = self._done_bytes
        self._progress(Step("push", min(self._done_bytes, self.total_bytes), self.total_bytes))
