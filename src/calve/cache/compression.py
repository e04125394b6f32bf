"""Compression by the names that narinfos use: every common one on the way in; zstd, xz and none on the way out.

A decoder holds one window and one chunk: 64 KiB of input, at most 256 KiB of output, and at most `MEMORY_BYTES`
inside the library. That covers zstd up to level 19 (windows of 8 MiB) and xz up to preset 6 (Nix's default; 9 MiB);
what was made with more is refused by a message that says so, because the agent has 512 MB for everything.
Several frames, members or streams in a row are one stream, as RFC 8878, RFC 1952 and the xz format say.

What is written is cut into frames of a size that `Codec` fixes, each compressed on its own and in one call. So the
bytes follow from the content and the codec alone: not from how many threads made them, nor from how the content
arrived. The price, measured on 1.8 GB of NARs: at level 3 frames of 2 MiB take 0.9 % more bytes than one frame of
any length (of the large NARs alone: 0.7 %; with 1 MiB 2.2 %). Higher levels look further back, so that their frames are larger.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from calve.errors import DamagedError, UsageError
from calve.nix import zstd

__all__ = ["NAMES", "SUFFIXES", "Codec", "Encode", "compressor", "decompressor"]

NAMES = ("none", "zstd", "xz", "bzip2", "gzip")
SUFFIXES = {"none": ".nar", "zstd": ".nar.zst", "xz": ".nar.xz"}
"""What can be written, and how the keys of such NARs end."""
MEMORY_BYTES = 16 << 20

_WINDOW_LOG = 23  # 8 MiB
_INPUT_BYTES = 64 * 1024
_OUTPUT_BYTES = 256 * 1024
_GZIP_BITS = 16 + zlib.MAX_WBITS
_MAX_ZSTD_LEVEL = 19
_MAX_XZ_LEVEL = 6
_XZ_FRAME_BYTES = 4 << 20
_LEVELS = {"zstd": range(1, _MAX_ZSTD_LEVEL + 1), "xz": range(_MAX_XZ_LEVEL + 1)}

Read: TypeAlias = Callable[[int], bytes]
"""Gives at least one and at most so many bytes; none at the end."""
Encode: TypeAlias = Callable[[memoryview], bytes]
"""Makes a whole frame of some content; may be called again, by one thread at a time."""


class _Decoder(Protocol):
    """What bz2, lzma and zstd have in common: one frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Gzip:
    """One member of gzip with the interface of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(_GZIP_BITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def _zstd() -> _Decoder:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})


def _xz() -> _Decoder:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY_BYTES)


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    "bzip2": bz2.BZ2Decompressor,
    "gzip": _Gzip,
    "xz": _xz,
    "zstd": _zstd,
}
_FAULTS = (OSError, EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError)


class _Stream:
    """Reads a sequence of frames as one stream."""

    def __init__(self, name: str, read: Read, place: object) -> None:
        self._name = name
        self._read = read
        self._place = place
        self._new = _DECODERS[name]
        self._decoder = self._new()
        self._begun = False  # the current frame had input
        self._frames = 0
        self._rest = b""

    def __call__(self, size: int) -> bytes:
        """Return at least one and at most `size` bytes; none at the end."""
        while True:
            if self._decoder.eof:
                self._rest = self._decoder.unused_data
                self._decoder = self._new()
                self._begun = False
                self._frames += 1
            data = b""
            if self._decoder.needs_input:
                data, self._rest = self._rest or self._read(_INPUT_BYTES), b""
                if not data:
                    return self._end()
                self._begun = True
            try:
                out = self._decoder.decompress(data, min(size, _OUTPUT_BYTES))
            except _FAULTS as error:
                raise self._damaged(error) from error
            if out:
                return out

    def _end(self) -> bytes:
        if self._begun or not self._frames:
            raise DamagedError(f"the {self._name} stream ends too early", place=self._place)
        return b""

    def _damaged(self, error: BaseException) -> DamagedError:
        text = str(error)
        if "memory" in text.lower():
            return DamagedError(
                f"the {self._name} stream needs more than {MEMORY_BYTES >> 20} MiB to read",
                place=self._place,
                hint="push it again with zstd at level 19 or lower, or xz at preset 6 or lower",
            )
        what = "has other bytes behind its end" if self._frames else "is damaged"
        return DamagedError(f"the {self._name} stream {what}: {text}", place=self._place)


def decompressor(name: str, read: Read, *, place: object = None) -> Read:
    """Return a reader of the content of a compressed stream.

    Args:
        name: as in a narinfo's `Compression:`.
        read: gives the compressed bytes.
        place: named by errors.

    Raises:
        UsageError: Calve does not read this compression.
        DamagedError: while reading: the stream is damaged, ends early, goes on behind its end, or needs a window
            that is too large.
    """
    if name == "none":
        return read
    if name not in _DECODERS:
        raise UsageError(
            f"the compression {name!r} is not supported",
            place=place,
            hint=f"supported are {', '.join(NAMES)}",
        )
    return _Stream(name, read, place)


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to write NARs: what decides about an object's bytes, next to its content.

    An encoder holds (measured): zstd at level 3 1 MB, at 9 11 MB, at 10 21 MB, at 19 83 MB; xz at preset 3 31 MB, at
    4 and above 48 MB. While it makes a frame, what comes out is there twice.

    Attributes:
        compression: "zstd", "xz" or "none".
        level: of zstd 1 to 19, of xz 0 to 6; beyond that, windows are larger than what the agent reads. Without
            a meaning for "none".

    Raises:
        UsageError: there is no such compression, or the level is out of range.
    """

    compression: str = "zstd"
    level: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be written."""
        if self.compression not in SUFFIXES:
            raise UsageError(
                f"nothing is written with the compression {self.compression!r}",
                hint=f"there are {', '.join(SUFFIXES)}",
            )
        levels = _LEVELS.get(self.compression)
        if levels is not None and self.level not in levels:
            raise UsageError(
                f"{self.level} is not a compression level of {self.compression}, "
                f"which are from {levels[0]} to {levels[-1]}"
            )

    @property
    def suffix(self) -> str:
        """Return how the key of a NAR ends."""
        return SUFFIXES[self.compression]

    @property
    def frame_bytes(self) -> int:
        """Return how much content goes into a frame; the last of a NAR has less."""
        if self.compression == "xz":
            return _XZ_FRAME_BYTES
        if self.compression == "none" or self.level <= 4:
            return 2 << 20
        return 4 << 20 if self.level <= 9 else 8 << 20

    def encoder(self) -> Encode:
        """Return a function that makes frames, and keeps the library's memory from one to the next."""
        if self.compression == "zstd":
            made = compressor(self.level)
            return lambda content: made.compress(content, made.FLUSH_FRAME)
        return self._xz if self.compression == "xz" else bytes

    def _xz(self, content: memoryview) -> bytes:
        # Presets 5 and 6 would take a dictionary of 8 MiB, and memory for it, that a frame cannot use.
        filters = [{"id": lzma.FILTER_LZMA2, "preset": self.level}]
        if self.level > 4:
            filters[0]["dict_size"] = _XZ_FRAME_BYTES
        return lzma.compress(content, filters=filters)


def compressor(level: int, size_bytes: int | None = None) -> zstd.ZstdCompressor:
    """Return a zstd compressor: `.compress(data)`, `.flush()`.

    Args:
        level: 1 to 19; beyond that, windows are larger than what the agent reads.
        size_bytes: how much will be written, where it is known: the frame says so, and the reader of a small one
            needs only a small window.

    Raises:
        UsageError: the level is out of range.
    """
    if level not in _LEVELS["zstd"]:
        raise UsageError(f"{level} is not a compression level from 1 to {_MAX_ZSTD_LEVEL}")
    made = zstd.ZstdCompressor(level=level)
    if size_bytes is not None:
        made.set_pledged_input_size(size_bytes)
    return made
