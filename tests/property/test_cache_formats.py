"""Foreign bytes: whatever they are, they are read, or refused by an error of ours."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
from pathlib import Path
from urllib.parse import unquote

from hypothesis import given, settings
from hypothesis import strategies as st

from calve.cache.compression import compressor, decompressor
from calve.cache.manifest import Manifest, boot_order
from calve.cache.objects import check_key
from calve.cache.roots import Pending, Root
from calve.cache.url import parse
from calve.errors import DamagedError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Signature
from calve.nix.storepath import StorePath

some = settings(deadline=None, max_examples=60)


def _zstd(data: bytes) -> bytes:
    made = compressor(1, len(data))
    return made.compress(data) + made.flush()


PACK = {
    "zstd": _zstd,
    "xz": lambda data: lzma.compress(data, preset=0),
    "bzip2": bz2.compress,
    "gzip": gzip.compress,
}
content = st.builds(lambda data, times: data * times, st.binary(max_size=300), st.integers(1, 500))


def _dribble(data: bytes, sizes: list[int]) -> io.BytesIO:
    """Give the data in pieces of the sizes asked for, in turn."""
    source = io.BytesIO(data)
    turn = 0

    class Reader(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            nonlocal turn
            turn += 1
            return source.read(min(size, sizes[turn % len(sizes)]))

    return Reader()


@some
@given(
    st.sampled_from(sorted(PACK)),
    st.lists(content, min_size=1, max_size=4),
    st.lists(st.integers(1, 5000), min_size=1, max_size=4),
    st.integers(1, 300_000),
)
def test_frames_in_any_pieces_are_one_stream(
    name: str, frames: list[bytes], sizes: list[int], size: int
) -> None:
    packed = b"".join(map(PACK[name], frames))
    read = decompressor(name, _dribble(packed, sizes).read)
    parts = []
    while part := read(size):
        assert len(part) <= size
        parts.append(part)
    assert b"".join(parts) == b"".join(frames)


@some
@given(st.sampled_from(sorted(PACK)), content, st.data())
def test_altered_streams_end_or_are_refused(name: str, data: bytes, draw: st.DataObject) -> None:
    packed = bytearray(PACK[name](data))
    for _ in range(draw.draw(st.integers(1, 3))):
        packed[draw.draw(st.integers(0, len(packed) - 1))] = draw.draw(st.integers(0, 255))
    packed = packed[: draw.draw(st.integers(0, len(packed)))]
    read = decompressor(name, io.BytesIO(bytes(packed)).read)
    total = 0
    try:
        while part := read(65536):
            total += len(part)
            if total > 1 << 24:
                break
    except DamagedError:
        pass


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=60) | st.from_regex(r"(s3|https?|file)://[!-~]{0,40}", fullmatch=True))
def test_urls_are_read_or_refused(text: str) -> None:
    try:
        where = parse(text)
    except UsageError:
        return
    assert parse(str(where)) == where or "addressing-style" in text or "profile" in text


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30) | st.from_regex(r"([./a?#:\\%-]|%2e|%2F){1,12}", fullmatch=True))
def test_keys_never_lead_out_of_a_directory(key: str) -> None:
    try:
        check_key(key)
    except DamagedError:
        return
    root = Path("/base/cache")
    joined = root / key
    assert ".." not in joined.parts
    assert ".." not in unquote(key.partition("?")[0]).split("/")
    assert joined.is_relative_to(root)
    assert joined != root


paths = st.builds(
    StorePath,
    st.text("0123456789abcdfghijklmnpqrsvwxyz", min_size=32, max_size=32),
    st.text("abc-._?=+09", min_size=1, max_size=20).filter(lambda name: not name.startswith(".")),
)
signatures = st.builds(
    Signature, st.sampled_from(["a-1", "b-1"]), st.binary(min_size=64, max_size=64)
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    names = draw(st.lists(paths, min_size=1, max_size=6, unique=True))
    entries = [
        NarInfo(
            PathInfo(
                path,
                Hash("sha256", draw(st.binary(min_size=32, max_size=32))),
                draw(st.integers(1, 2**63 - 1)),
                tuple(sorted(draw(st.sets(st.sampled_from(names))))),
                draw(st.none() | paths),
                tuple(sorted(draw(st.sets(signatures, max_size=3)))),
                draw(st.none() | st.just(f"fixed:r:{Hash.sha256(b'x').nix32}")),
            ),
            draw(st.text(min_size=1, max_size=30)),
            draw(st.sampled_from(["zstd", "xz", "none"])),
            draw(st.none() | st.just(Hash.sha256(b"x"))),
            draw(st.none() | st.integers(0, 2**63 - 1)),
        )
        for path in names
    ]
    first = draw(st.lists(st.sampled_from(names), max_size=2))
    return Manifest(names[0], boot_order(entries, names[0], first))


@some
@given(manifests())
def test_manifests_survive_the_trip(manifest: Manifest) -> None:
    body = manifest.dump()
    assert Manifest.parse(body) == manifest
    assert Manifest.parse(body).dump() == body
    assert manifest.paths[0].info.path == manifest.toplevel


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200)
@given(manifests(), st.data())
def test_manifests_with_anything_in_them_are_read_or_refused(
    manifest: Manifest, draw: st.DataObject
) -> None:
    document = json.loads(manifest.dump())
    place = draw.draw(st.sampled_from([document, *document["paths"]]))
    place[draw.draw(st.sampled_from(sorted(place)))] = draw.draw(values)
    with contextlib.suppress(DamagedError, UsageError):
        Manifest.parse(json.dumps(document).encode())


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_no_record(data: bytes) -> None:
    for read in (Manifest.parse, Root.parse, Pending.parse):
        try:
            read(data)
        except (DamagedError, UsageError):
            continue
        raise AssertionError("this is no record")
