from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os

import pytest

from calve.cache.compression import NAMES, SUFFIXES, Codec, compressor, decompressor
from calve.errors import DamagedError, UsageError
from calve.nix import zstd


def _zstd(data: bytes) -> bytes:
    made = compressor(3, len(data))
    return made.compress(data) + made.flush()


PACK = {"zstd": _zstd, "xz": lzma.compress, "bzip2": bz2.compress, "gzip": gzip.compress}
DATA = os.urandom(100_000) + b"calve " * 200_000


def _all(name: str, packed: bytes, size: int = 100_000) -> bytes:
    read = decompressor(name, io.BytesIO(packed).read, place="here")
    parts = []
    while part := read(size):
        assert len(part) <= min(size, 256 * 1024)
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_what_was_packed_comes_out(name: str, size: int) -> None:
    assert _all(name, PACK[name](DATA), size) == DATA


@pytest.mark.parametrize("name", PACK)
def test_several_frames_are_one_stream(name: str) -> None:
    pack = PACK[name]
    assert _all(name, pack(DATA) + pack(b"") + pack(b"end")) == DATA + b"end"


@pytest.mark.parametrize("name", PACK)
def test_a_stream_of_nothing_is_empty(name: str) -> None:
    assert _all(name, PACK[name](b"")) == b""


def test_none_is_the_bytes_themselves() -> None:
    assert _all("none", DATA) == DATA


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("cut", [0, 1, 100, -9, -1])
def test_a_stream_that_is_cut_off_is_damaged(name: str, cut: int) -> None:
    packed = PACK[name](DATA)
    with pytest.raises(DamagedError, match="early") as caught:
        _all(name, packed[:cut])
    assert caught.value.place == "here"


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("rest", [b"x", b"garbage" * 100])
def test_other_bytes_behind_the_end_are_damage(name: str, rest: bytes) -> None:
    with pytest.raises(DamagedError):
        _all(name, PACK[name](DATA) + rest)


@pytest.mark.parametrize("name", PACK)
def test_altered_bytes_never_come_out_as_if_whole(name: str) -> None:
    packed = bytearray(PACK[name](DATA))
    packed[0] ^= 0xFF
    with pytest.raises(DamagedError):
        _all(name, bytes(packed))


def test_skippable_frames_of_zstd_are_skipped() -> None:
    skip = bytes.fromhex("502a4d18 05000000") + b"hello"
    assert _all("zstd", skip + _zstd(DATA) + skip) == DATA


def test_windows_that_are_too_large_are_refused_with_a_hint() -> None:
    made = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    packed = made.compress(b"x" * 1000, made.FLUSH_BLOCK) + made.compress(DATA) + made.flush()
    with pytest.raises(DamagedError, match="16 MiB") as caught:
        _all("zstd", packed)
    assert "level 19" in str(caught.value.hint)
    with pytest.raises(DamagedError, match="16 MiB"):
        _all("xz", lzma.compress(DATA, preset=9))


@pytest.mark.parametrize("level", [1, 3, 19])
def test_every_level_that_we_write_is_read(level: int) -> None:
    data = os.urandom(1 << 14) * 576
    made = compressor(level, len(data))
    assert _all("zstd", made.compress(data) + made.flush()) == data


def test_nixs_default_xz_is_read() -> None:
    assert _all("xz", lzma.compress(DATA, preset=6)) == DATA


@pytest.mark.parametrize("name", ["br", "lzip", "", "ZSTD"])
def test_other_compressions_are_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}'"):
        decompressor(name, io.BytesIO(b"").read)


@pytest.mark.parametrize("level", [0, 20, -1])
def test_levels_that_an_agent_could_not_read_are_refused(level: int) -> None:
    with pytest.raises(UsageError, match="1 to 19"):
        compressor(level)


@pytest.mark.parametrize(
    ("name", "level"), [("zstd", 1), ("zstd", 4), ("zstd", 9), ("zstd", 12), ("xz", 0), ("xz", 6)]
)
def test_frames_in_a_row_are_read(name: str, level: int) -> None:
    codec = Codec(name, level)
    data = (os.urandom(1 << 14) + bytes(1 << 14)) * 257
    size = codec.frame_bytes
    encode = codec.encoder()
    frames = [encode(memoryview(data)[at : at + size]) for at in range(0, len(data), size)]
    assert len(frames) > 1
    assert _all(name, b"".join(frames)) == data


def test_a_frame_of_zstd_tells_its_size() -> None:
    codec = Codec("zstd", 3)
    frame = codec.encoder()(memoryview(DATA))
    assert _frame_size(frame) == len(DATA)


def test_a_frame_of_xz_needs_no_more_memory_than_a_frame() -> None:
    frame = Codec("xz", 6).encoder()(memoryview(DATA))
    assert lzma.LZMADecompressor(memlimit=6 << 20).decompress(frame) == DATA


def _frame_size(frame: bytes) -> int:
    """Read a frame's content size: RFC 8878, 3.1.1.1; of a single segment, and 4 bytes."""
    assert frame[4] >> 5 == 0b101
    return int.from_bytes(frame[5:9], "little")


def test_what_is_written_has_an_ending_and_is_read() -> None:
    assert set(SUFFIXES) <= set(NAMES)
    assert [Codec(name, 3).suffix for name in ("zstd", "xz", "none")] == [
        ".nar.zst",
        ".nar.xz",
        ".nar",
    ]


@pytest.mark.parametrize(
    ("name", "level"), [("zstd", 0), ("zstd", 20), ("xz", -1), ("xz", 7), ("gzip", 6), ("", 3)]
)
def test_codecs_that_are_not_written(name: str, level: int) -> None:
    with pytest.raises(UsageError):
        Codec(name, level)
