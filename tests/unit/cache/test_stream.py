"""Streams of NARs: what comes out, what it depends on, and what is left behind when it fails."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.cache.compression import Codec, decompressor
from calve.cache.compressors import Compressors
from calve.cache.stream import NarStream
from calve.errors import (
    CancelledError,
    ConflictError,
    DamagedError,
    NotFoundError,
    SpaceError,
    UsageError,
)
from calve.nix import narwriter
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath
from calve.tasks import Cancel

FRAME = 2 << 20
PATH = StorePath("a" * 32, "tree")


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def nar_of(source: Path) -> bytes:
    parts: list[bytes] = []
    narwriter.dump(source, parts.append)
    return b"".join(parts)


def info_of(source: Path) -> PathInfo:
    nar = nar_of(source)
    digest = hashlib.sha256(nar).digest()
    return PathInfo(PATH, Hash("sha256", digest), len(nar), (), None, (), None)


def content(size: int, seed: int = 0) -> bytes:
    """Give bytes of which half compress."""
    block = hashlib.shake_256(b"%d" % seed).digest(4096) + bytes(range(256)) * 16
    return (block * (size // len(block) + 1))[:size]


def file_of(directory: Path, size: int, seed: int = 0) -> Path:
    source = directory / f"file-{size}-{seed}"
    source.write_bytes(content(size, seed))
    return source


def ignore(_size: int) -> None:
    pass


def unpacked(name: str, packed: bytes) -> bytes:
    read = decompressor(name, io.BytesIO(packed).read)
    parts = []
    while part := read(1 << 18):
        parts.append(part)
    return b"".join(parts)


def packed(stream: NarStream, cancel: Cancel | None = None) -> bytes:
    return b"".join(stream.chunks(cancel))


@pytest.mark.parametrize("name", ["zstd", "xz", "none"])
@pytest.mark.parametrize("size", [0, 100_000, FRAME - 200, FRAME, 9_000_000])
def test_what_comes_out_is_the_nar(tmp_path: Path, name: str, size: int) -> None:
    source = file_of(tmp_path, size)
    info = info_of(source)
    told: list[int] = []
    stream = NarStream(source, info, 1, told.append, compression=name)
    made = packed(stream)
    assert unpacked(name, made) == nar_of(source)
    assert (stream.file_size, stream.file_hash.digest) == (
        len(made),
        hashlib.sha256(made).digest(),
    )
    assert sum(told) == info.nar_size


def test_a_nar_of_exactly_some_frames_has_no_empty_one(tmp_path: Path) -> None:
    head = len(nar_of(file_of(tmp_path, 8))) - 8
    told: list[int] = []
    source = file_of(tmp_path, 2 * FRAME - head)
    packed(NarStream(source, info_of(source), 3, told.append))
    assert told == [FRAME, FRAME]


def test_a_small_nar_takes_no_thread(tmp_path: Path) -> None:
    source = file_of(tmp_path, 1000)
    before = threading.active_count()
    with Compressors(2) as compressors:
        stream = NarStream(source, info_of(source), 3, ignore, compressors=compressors)
        with closing(stream.chunks()) as chunks:
            next(chunks)
            assert threading.active_count() == before


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 8, 70_000, 1_500_000, FRAME, 5_000_000]), max_size=4),
    seed=st.integers(0, 100),
    codec=st.sampled_from(
        [Codec("zstd", 1), Codec("zstd", 3), Codec("zstd", 9), Codec("xz", 0), Codec("none", 0)]
    ),
)
def test_the_bytes_depend_on_content_and_codec_alone(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int, codec: Codec
) -> None:
    tree = tmp_path_factory.mktemp("tree")
    for number, size in enumerate(sizes):
        (tree / f"{number}").write_bytes(content(size, seed + number))
    info = info_of(tree)
    made = []
    for threads in (1, 3):
        with Compressors(threads) as compressors:
            for _ in range(2):  # the second meets an encoder that was used
                stream = NarStream(
                    tree,
                    info,
                    codec.level,
                    ignore,
                    compression=codec.compression,
                    compressors=compressors,
                )
                made.append(packed(stream))
    made.append(packed(NarStream(tree, info, codec.level, ignore, compression=codec.compression)))
    assert len(set(made)) == 1
    assert unpacked(codec.compression, made[0]) == nar_of(tree)


def test_many_streams_at_once_stay_within_the_budget(tmp_path: Path) -> None:
    sources = [file_of(tmp_path, size, size) for size in (9_000_000, 100, 7_000_000, 300_000) * 2]
    infos = [info_of(source) for source in sources]
    made: dict[int, bytes] = {}
    most = 0
    with Compressors(2, budget=3) as compressors:

        def send(number: int) -> None:
            nonlocal most
            stream = NarStream(sources[number], infos[number], 3, ignore, compressors=compressors)
            parts = []
            for chunk in stream.chunks():
                parts.append(chunk)
                most = max(most, compressors.held_bytes)
            made[number] = b"".join(parts)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert compressors.held_bytes <= 3 * FRAME
    for number, source in enumerate(sources):
        assert unpacked("zstd", made[number]) == nar_of(source)
    assert most <= 5 * FRAME


def test_a_slow_consumer_bounds_what_is_read_ahead(tmp_path: Path) -> None:
    source = file_of(tmp_path, 20 * FRAME)
    info = info_of(source)
    with Compressors(2, budget=100) as compressors:
        stream = NarStream(source, info, 3, ignore, compressors=compressors)
        with closing(stream.chunks()) as chunks:
            next(chunks)
            for _ in range(50):
                threading.Event().wait(0.01)
            assert compressors.held_bytes <= 5 * FRAME
        next(NarStream(source, info, 3, ignore, compressors=compressors).chunks())


# What fails


@pytest.mark.parametrize("size", [1000, 9_000_000])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("change", [-8, 8, "content"])
def test_a_path_that_is_not_what_was_registered(
    tmp_path: Path, size: int, shared: bool, change: int | str
) -> None:
    source = file_of(tmp_path, size)
    info = info_of(source)
    if isinstance(change, int):
        source.write_bytes(content(size + change))
    else:
        source.write_bytes(b"x" + content(size)[1:])
    with Compressors(2) as compressors:
        stream = NarStream(source, info, 3, ignore, compressors=compressors if shared else None)
        given: list[bytes] = []
        with pytest.raises(DamagedError, match="changed on disk") as caught:
            given.extend(stream.chunks())
        assert caught.value.place == str(PATH)
        assert len(unpacked_so_far(given)) < info.nar_size
    assert compressors.held_bytes == 0


def unpacked_so_far(frames: list[bytes]) -> bytes:
    return b"".join(unpacked("zstd", frame) for frame in frames)


@pytest.mark.parametrize("size", [1000, 9_000_000])
def test_files_that_cannot_be_read(tmp_path: Path, size: int) -> None:
    source = file_of(tmp_path, size)
    info = info_of(source)
    source.unlink()
    with pytest.raises(NotFoundError):
        packed(NarStream(source, info, 3, ignore))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    source = file_of(tmp_path, 20 * FRAME)
    info = info_of(source)
    with (
        pytest.raises(ConflictError),
        closing(NarStream(source, info, 3, ignore).chunks()) as chunks,
    ):
        next(chunks)
        os.truncate(source, 10 * FRAME)
        for _ in chunks:
            pass


def test_a_registered_size_of_nothing(tmp_path: Path) -> None:
    source = file_of(tmp_path, 10)
    info = PathInfo(PATH, Hash("sha256", bytes(32)), 0, (), None, (), None)
    with pytest.raises(DamagedError):
        packed(NarStream(source, info, 3, ignore))


@pytest.mark.parametrize("size", [1000, 9_000_000])
def test_a_stream_that_was_cancelled_before(tmp_path: Path, size: int) -> None:
    source = file_of(tmp_path, size)
    cancel = Cancel()
    cancel.cancel()
    with Compressors(1) as compressors, pytest.raises(CancelledError):
        packed(NarStream(source, info_of(source), 3, ignore, compressors=compressors), cancel)


def test_a_cancel_in_the_middle(tmp_path: Path) -> None:
    source = file_of(tmp_path, 20 * FRAME)
    cancel = Cancel()
    with Compressors(2) as compressors:
        chunks = NarStream(source, info_of(source), 3, ignore, compressors=compressors).chunks(
            cancel
        )
        next(chunks)
        cancel.cancel()
        with pytest.raises(CancelledError):
            for _ in chunks:
                pass


@pytest.mark.parametrize("small", [False, True])
def test_a_cancel_wakes_who_waits_for_room(tmp_path: Path, small: bool) -> None:
    source = file_of(tmp_path, 1000 if small else 9_000_000)
    info = info_of(source)
    cancel = Cancel()
    with Compressors(1, budget=1) as compressors, compressors.buffer(FRAME, None):
        timer = threading.Timer(0.1, cancel.cancel)
        timer.start()
        with pytest.raises(CancelledError):
            packed(NarStream(source, info, 3, ignore, compressors=compressors), cancel)
        timer.join()


def test_a_consumer_that_leaves_early_leaves_room_for_others(tmp_path: Path) -> None:
    source = file_of(tmp_path, 20 * FRAME)
    info = info_of(source)
    with Compressors(2, budget=4) as compressors:
        for _ in range(5):
            with closing(
                NarStream(source, info, 3, ignore, compressors=compressors).chunks()
            ) as chunks:
                next(chunks)
        made = packed(NarStream(source, info, 3, ignore, compressors=compressors))
    assert unpacked("zstd", made) == nar_of(source)
    assert compressors.held_bytes == 0


def test_a_frame_that_is_done_when_nobody_wants_it_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, begun, calls = threading.Event(), threading.Event(), []
    encoder = Codec.encoder

    def slow(self: Codec) -> Callable[[memoryview], bytes]:
        encode = encoder(self)

        def later(data: memoryview) -> bytes:
            calls.append(1)
            if len(calls) > 1:
                begun.set()
                left.wait(10)
            return encode(data)

        return later

    monkeypatch.setattr(Codec, "encoder", slow)
    source = file_of(tmp_path, 5 * FRAME)
    with Compressors(1) as compressors:
        stream = NarStream(source, info_of(source), 3, ignore, compressors=compressors)
        with closing(stream.chunks()) as chunks:
            next(chunks)
            assert begun.wait(10)
        left.set()
    assert compressors.held_bytes == 0
    assert len(calls) == 2


@pytest.mark.parametrize("size", [1000, 9_000_000])
def test_memory_that_does_not_suffice(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encoder(self: Codec) -> Callable[[memoryview], bytes]:
        def encode(data: memoryview) -> bytes:
            raise MemoryError

        return encode

    monkeypatch.setattr(Codec, "encoder", encoder)
    source = file_of(tmp_path, size)
    with pytest.raises(SpaceError, match="level 3: not enough memory"):
        packed(NarStream(source, info_of(source), 3, ignore))


def test_there_are_as_many_encoders_as_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    encoder = Codec.encoder

    def counted(self: Codec) -> Callable[[memoryview], bytes]:
        nonlocal made
        made += 1
        return encoder(self)

    monkeypatch.setattr(Codec, "encoder", counted)
    with Compressors(2) as compressors:
        for size in (1000, 9_000_000, 2000, 9_000_000):
            source = file_of(tmp_path, size)
            packed(NarStream(source, info_of(source), 3, ignore, compressors=compressors))
    assert made <= 2
    assert compressors.held_bytes == 0


def test_an_error_of_the_listener_is_raised(tmp_path: Path) -> None:
    source = file_of(tmp_path, 9_000_000)

    def tell(_size: int) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        packed(NarStream(source, info_of(source), 3, tell))


@pytest.mark.parametrize(("name", "level"), [("bzip2", 3), ("", 3), ("zstd", 0), ("xz", 7)])
def test_codecs_that_there_are_not(tmp_path: Path, name: str, level: int) -> None:
    source = file_of(tmp_path, 10)
    with pytest.raises(UsageError):
        NarStream(source, info_of(source), level, ignore, compression=name)
