"""Hostile disks: bytes flipped, overwritten and cut at every structure. Findings; never a traceback, never no end."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calve.disk.inspect.findings import MAX_FINDINGS
from calve.disk.inspect.report import Expected, inspect
from calve.errors import DamagedError
from calve.nix.storepath import StorePath

MIB = 1 << 20
PATHS = [StorePath("a" * 32, "one"), StorePath("b" * 32, "two")]


@dataclass
class Damaged:
    """A disk with changes laid over it; counts what is read."""

    data: bytes = field(repr=False)
    changes: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = -1
    reads: int = 0
    read_bytes: int = 0

    def __post_init__(self):
        self.size = len(self.data) if self.size < 0 else self.size

    def read(self, at, count):
        self.reads += 1
        self.read_bytes += count
        if at < 0 or count < 0 or at + count > self.size:
            raise DamagedError("outside")
        piece = bytearray(self.data[at : at + count])
        for start, change in self.changes:
            low, high = max(at, start), min(at + count, start + len(change))
            if low < high:
                piece[low - at : high - at] = change[low - start : high - start]
        return bytes(piece)


@dataclass
class Target:
    """A disk, what is expected of it, where its structures are, and what reading it costs."""

    data: bytes = field(repr=False)
    expected: Expected
    spots: list[tuple[int, int]]  # start, size
    content: int
    cost: tuple[int, int]


def make_tree(root):
    rng = random.Random(7)
    store = root / "nix/store"
    one = store / PATHS[0].basename
    (one / "bin").mkdir(parents=True)
    (one / "bin/program").write_bytes(rng.randbytes(30_000))
    (one / "bin/program").chmod(0o755)
    (one / "link").symlink_to("bin/program")
    (one / "long").symlink_to("x" * 100)
    for number in range(12):
        (one / f"file {number}").write_bytes(rng.randbytes(number * 50))
    with (one / "sparse").open("wb") as file:
        for number in range(8):
            file.seek(number * 16384)
            file.write(rng.randbytes(1000))
    (store / PATHS[1].basename).write_text("x")
    return (one / "bin/program").read_bytes()


@pytest.fixture(scope="module", params=["erofs", "chunks", "ext4", "ext4-checked"])
def target(tools, tmp_path_factory, request):
    base = tmp_path_factory.mktemp("damage")
    content = make_tree(base / "root")
    closure = {path: tools.nix_hash(base / f"root{path}") for path in PATHS}
    image = base / "image"
    if request.param in {"erofs", "chunks"}:
        options = ["--chunksize=4096"] if request.param == "chunks" else []
        tools.run("mkfs.erofs", "--quiet", *options, image, base / "root")
        data = bytearray(image.read_bytes())
        data[1024 + 8] &= 0xFE  # without the checksum, so that damage gets further
        image.write_bytes(data)
    else:
        features = (
            "^has_journal" if request.param == "ext4-checked" else "^has_journal,^metadata_csum"
        )
        argv = ["-q", "-t", "ext4", "-b", "1024", "-N", "64", "-O", features, "-d", base / "root"]
        tools.run("mke2fs", *argv, image, "1m")
    verity = tools.verity(image)
    program = tools.program(f"x roothash={verity.root_hash.hex()}")
    esp = tools.esp(
        {"EFI/BOOT/BOOTX64.EFI": program, "EFI/a longer name.txt": b"x"},
        bits=16,
        size=5 * MIB,
        options=("-s", "1"),
    )
    parts = [(tools.ESP, esp), (tools.ROOT, image), (tools.VERITY, verity.image)]
    disk = tools.disk(f"damage-{request.param}", parts)
    data = disk.path.read_bytes()
    expected = Expected(closure=closure)
    source = Damaged(data)
    assert inspect(source, expected).findings == ()
    (fat, _), (root, size), (hashes, _) = disk.parts.values()
    program_at = data.index(program[:512], fat)
    spots = [
        (446, 66), (512, 92), (1024, 384), (len(data) - 512, 92), (len(data) - 33 * 512, 384),
        (fat, 64), (fat, 512), (fat + 2048, 600), (fat, program_at - fat), (program_at, 1024),
        (program_at, len(program)), (root + 1024, 256), (root, size), (root, size // 8),
        (hashes, 512), (hashes + 4096, 512),
    ]  # fmt: skip
    found = data.index(content[:1000], root)
    return Target(data, expected, spots, found, (source.reads, source.read_bytes))


def check(target, source):
    """Inspect; what comes out is findings of ours, and it took no more than a few readings of the disk."""
    result = inspect(source, target.expected)
    assert len(result.findings) <= MAX_FINDINGS + 1
    assert source.reads < 20 * target.cost[0]
    assert source.read_bytes < 20 * target.cost[1]
    return result


def sign(source):
    """Make the checksums of both headers right for what the changes made of them."""
    for lba in (1, source.size // 512 - 1):
        head = bytearray(source.read(lba * 512, 92))
        entries, count, size = struct.unpack_from("<QII", head, 72)
        if count * size <= MIB and entries * 512 + count * size <= source.size:
            table = source.read(entries * 512, count * size)
            struct.pack_into("<I", head, 88, zlib.crc32(table))
        struct.pack_into("<I", head, 16, 0)
        struct.pack_into("<I", head, 16, zlib.crc32(head))
        source.changes.append((lba * 512, bytes(head)))
    source.reads = source.read_bytes = 0


SETTINGS = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BYTES = st.one_of(
    st.binary(min_size=1, max_size=4),
    st.sampled_from([b"\0", b"\xff", b"\xff\xff", b"\xff\xff\xff\xff", bytes(4), b"\xff" * 8]),
    st.binary(min_size=16, max_size=16),
)
# A spot by its number and a place in it, each modulo what the disk has.
PLACES = st.tuples(st.integers(0, 63), st.integers(0, (1 << 24) - 1))
CHANGES = st.lists(st.tuples(PLACES, BYTES), min_size=1, max_size=3)


def place(target, spot):
    start, size = target.spots[spot[0] % len(target.spots)]
    return start + spot[1] % size


def flipped(target, at, bit):
    return Damaged(target.data, [(at, bytes([target.data[at] ^ 1 << bit]))])


@SETTINGS
@given(changes=CHANGES, signed=st.booleans())
def test_bytes_overwritten(target, changes, signed):
    source = Damaged(target.data, [(place(target, spot), new) for spot, new in changes])
    if signed:
        sign(source)
    check(target, source)


@SETTINGS
@given(spot=PLACES, bit=st.integers(0, 7))
def test_a_bit_of_every_structure(target, spot, bit):
    check(target, flipped(target, place(target, spot), bit))


@settings(SETTINGS, max_examples=20)
@given(offset=st.integers(0, 999), bit=st.integers(0, 7))
def test_a_bit_of_a_file_is_found(target, offset, bit):
    result = check(target, flipped(target, target.content + offset, bit))
    names = {finding.check for finding in result.findings}
    assert names == {"path-hash-differs", "verity-tree-differs", "verity-root-differs"}


@settings(SETTINGS, max_examples=40)
@given(size=st.integers(0, (1 << 24) - 1), small=st.booleans())
def test_every_truncation(target, size, small):
    size %= 4096 if small else len(target.data)
    assert check(target, Damaged(target.data, size=size)).findings


@settings(SETTINGS, max_examples=40)
@given(
    spot=st.integers(0, 63), skip=st.integers(0, 64), seed=st.integers(0, 999), signed=st.booleans()
)
def test_garbage_over_a_structure(target, spot, skip, seed, signed):
    start, size = target.spots[spot % len(target.spots)]
    garbage = random.Random(seed).randbytes(size - skip)
    source = Damaged(target.data, [(start + skip, garbage)])
    if signed:
        sign(source)
    check(target, source)


@settings(deadline=None, max_examples=50)
@given(data=st.binary(max_size=9000))
def test_garbage_alone(data):
    source = Damaged(data)
    assert inspect(source).findings
    assert source.reads < 50
