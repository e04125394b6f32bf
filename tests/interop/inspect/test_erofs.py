"""EROFS: what mkfs.erofs made, as Nix hashes it; and each way in which it can be wrong."""

from __future__ import annotations

import os
import struct

import pytest

from calve.disk.inspect.crc32c import crc32c
from calve.disk.inspect.erofs import Erofs
from calve.disk.inspect.findings import FlawError
from calve.disk.inspect.source import FileSource
from calve.disk.inspect.tree import Kind, find, nar_hash
from calve.errors import NotFoundError

STORE = "/nix/store"
HELLO = f"{STORE}/{'a' * 32}-hello-2.12"
FORMS = [
    (),
    ("-Enoinline_data",),
    ("-Eforce-inode-extended",),
    ("-Eforce-inode-compact",),
    ("--chunksize=4096",),
    ("--chunksize=65536", "-Eforce-chunk-indexes"),
    ("-Eforce-chunk-indexes", "--chunksize=4096"),
]


@pytest.fixture
def image(tools):
    """Without the superblock's checksum, which is of the first inodes too."""
    image = tools.memory(tools.erofs().read_bytes())
    image.data[1024 + 8] &= 0xFE
    return image


def flaw(image, path=HELLO):
    """Read a path; return check and place of what is wrong."""
    with pytest.raises(FlawError) as raised:
        nar_hash(Erofs(image), path)
    return raised.value.check, raised.value.place


def inode_at(image, path):
    number = find(Erofs(image), path).number
    return 32 * number + 4096 * Erofs(image).superblock.meta_block


@pytest.mark.parametrize("options", FORMS, ids=" ".join)
def test_what_mkfs_made(tools, options):
    with FileSource(tools.erofs(*options)) as source:
        tree = Erofs(source)
        assert (tree.format, tree.block_size_bytes) == ("erofs", 4096)
        for path, wanted in tools.closure.items():
            assert nar_hash(tree, str(path)) == wanted
        store = find(tree, STORE)
        names = [node.name.decode() for node in tree.entries(store)]
        assert names == sorted(path.basename for path in tools.closure)


def test_the_superblock_is_dump_erofs_s(tools):
    with FileSource(tools.erofs()) as source:
        superblock = Erofs(source).superblock
    shown = tools.run("dump.erofs", "-s", tools.erofs()).decode()
    facts = dict(line.rsplit(":", 1) for line in shown.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    assert int(facts["Filesystem blocks"]) == superblock.blocks
    assert int(facts["Filesystem root nid"]) == superblock.root_nid
    assert int(facts["Filesystem inode count"]) == superblock.inodes
    assert facts["Filesystem UUID"].replace("-", "") == superblock.uuid.hex()
    assert superblock.has_checksum


def test_attributes_are_passed_over(tools, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(b"x" * 5000)
    wanted = tools.nix_hash(root)
    try:
        os.setxattr(root / "file", "user.a", b"b" * 100)
    except OSError:
        pytest.skip("the file system of the temporary directory has no attributes")
    os.setxattr(root, "user.a", b"b" * 100)
    tools.run("mkfs.erofs", "--quiet", tmp_path / "image", root)
    image = tools.memory((tmp_path / "image").read_bytes())
    assert b"b" * 100 in image.data
    assert nar_hash(Erofs(image), "/") == wanted


def test_nodes(tools):
    with FileSource(tools.erofs()) as source:
        tree = Erofs(source)
        program = find(tree, f"{HELLO}/bin/hello")
        assert (program.kind, program.size_bytes, program.executable) == (Kind.FILE, 700_001, True)
        assert max(len(chunk) for chunk in tree.content(program)) == 262_144
        assert not find(tree, f"{HELLO}/size-1").executable
        link = find(tree, f"{HELLO}/short")
        assert (link.kind, b"".join(tree.content(link))) == (Kind.SYMLINK, b"bin/hello")
        assert find(tree, "/").number == tree.superblock.root_nid
        for path in (f"{HELLO}/nothing", f"{HELLO}/short/x", f"{HELLO}/size-1/x", "/nix/.."):
            assert find(tree, path) is None


def test_a_path_that_is_not_there(image):
    with pytest.raises(NotFoundError, match="no such path"):
        nar_hash(Erofs(image), "/nix/nothing")


def test_compression_is_not_read(tools):
    image = tools.memory(tools.erofs("-zlz4").read_bytes())
    assert flaw(image)[0] == "erofs-unsupported"


def test_another_device_is_not_read(tools, tmp_path):
    image = tools.base / "devices"
    argv = ["--quiet", f"--blobdev={tmp_path / 'blob'}", "--chunksize=4096"]
    tools.run("mkfs.erofs", *argv, image, tools.root)
    assert flaw(tools.memory(image.read_bytes()))[0] == "erofs-unsupported"


def test_the_checksum(image):
    image.data[1024 + 24] ^= 1  # the time: nothing else looks at it
    assert not Erofs(image).superblock.has_checksum
    image.data[1024 + 8] |= 1
    assert flaw(image) == ("erofs-checksum", "superblock")
    image.data[1024 + 24] ^= 1
    assert nar_hash(Erofs(image), HELLO)


def test_the_checksum_of_the_standard():
    """RFC 3720, B.4: the CRC is inverted there at the end, here not."""
    assert crc32c(bytes(32)) ^ 0xFFFFFFFF == 0x8A9136AA
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283


@pytest.mark.parametrize(
    ("form", "at", "value", "check"),
    [
        ("<I", 0, 0, "erofs-damaged"),
        ("<B", 12, 8, "erofs-damaged"),
        ("<B", 12, 17, "erofs-damaged"),
        ("<B", 90, 1, "erofs-damaged"),
        ("<I", 36, 1 << 30, "erofs-damaged"),
        ("<I", 80, 0x80, "erofs-unsupported"),
        ("<I", 80, 0x2, "erofs-unsupported"),
        ("<H", 86, 1, "erofs-unsupported"),
        ("<H", 14, 0xFFFF, "erofs-inode-damaged"),
        ("<I", 40, 0xFFFFFFFF, "erofs-inode-damaged"),
        ("<I", 36, 1, "erofs-data-outside"),
    ],
)
def test_superblocks_that_cannot_be(image, form, at, value, check):
    struct.pack_into(form, image.data, 1024 + at, value)
    if (at, value) == (36, 1):
        check = flaw(image)[0]
        assert check in {"erofs-data-outside", "erofs-inode-damaged"}
    assert flaw(image)[0] == check


def test_a_root_that_is_no_directory(image):
    at = inode_at(image, "/")
    struct.pack_into("<H", image.data, at + 4, 0o100644)
    assert flaw(image)[0] == "erofs-inode-damaged"


@pytest.mark.parametrize(
    ("form", "at", "value", "check"),
    [
        ("<H", 0, 0x10, "erofs-inode-damaged"),
        ("<H", 0, 1 << 1, "erofs-unsupported"),
        ("<H", 0, 7 << 1, "erofs-unsupported"),
        ("<H", 2, 0xFFFF, "erofs-inode-damaged"),
        ("<H", 4, 0, "erofs-inode-damaged"),
        ("<H", 4, 0o120644, "erofs-dirent-type"),
        ("<I", 8, 10 << 20, "erofs-data-outside"),
        ("<I", 16, 1 << 30, "erofs-data-outside"),
    ],
)
def test_inodes_that_cannot_be(image, form, at, value, check):
    path = f"{HELLO}/bin/hello"
    start = inode_at(image, path)
    struct.pack_into(form, image.data, start + at, value)
    if value == 0xFFFF:  # attributes of 256 KiB reach outside only from the end of a small image
        blocks = start // 4096 + 1
        struct.pack_into("<I", image.data, 1024 + 36, blocks)
    found, place = flaw(image)
    assert found == check
    assert place.startswith("nid ")


def test_a_tail_beyond_its_block(image):
    start = inode_at(image, f"{HELLO}/size-60")
    struct.pack_into("<I", image.data, start + 8, 4096)
    assert flaw(image)[0] == "erofs-inode-damaged"


def test_a_file_with_more_than_an_image_can_hold(tools):
    image = tools.memory(tools.erofs("--chunksize=4096").read_bytes())
    start = inode_at(image, f"{HELLO}/zeros")
    struct.pack_into("<I", image.data, start + 8, 0xFFFFFFFF)
    check, place = flaw(image)
    assert check == "tree-too-large"
    assert place.endswith("(zeros)")
    assert image.reads < 20_000


@pytest.mark.parametrize(("at", "value"), [(16, 0x40), (16, 0x8000)])
def test_chunk_formats_that_are_unknown(tools, at, value):
    image = tools.memory(tools.erofs("--chunksize=4096").read_bytes())
    start = inode_at(image, f"{HELLO}/zeros")
    struct.pack_into("<H", image.data, start + at, value)
    assert flaw(image)[0] == "erofs-unsupported"


def test_chunks_elsewhere(tools):
    options = ("-Eforce-chunk-indexes", "--chunksize=4096")
    pristine = tools.erofs(*options).read_bytes()
    image = tools.memory(pristine)
    start = inode_at(image, f"{HELLO}/zeros")
    struct.pack_into("<H", image.data, start + (64 if image.data[start] & 1 else 32) + 2, 1)
    assert flaw(image)[0] == "erofs-unsupported"
    image = tools.memory(pristine)
    struct.pack_into("<I", image.data, start + (64 if image.data[start] & 1 else 32) + 4, 1 << 29)
    assert flaw(image)[0] == "erofs-data-outside"


def test_holes_are_zeros(tools):
    image = tools.memory(tools.erofs("--chunksize=4096").read_bytes())
    path = f"{HELLO}/size-8192"
    start = inode_at(image, path)
    struct.pack_into(
        "<II", image.data, start + (64 if image.data[start] & 1 else 32), *[2**32 - 1] * 2
    )
    tree = Erofs(image)
    assert b"".join(tree.content(find(tree, path))) == bytes(8192)


class Block:
    """A directory of one block, taken apart and put together with changes."""

    def __init__(self, image, path):
        self.image = image
        start = inode_at(image, path)
        form, size, raw = (
            struct.unpack_from("<H", image.data, start)[0],
            *struct.unpack_from("<I4xI", image.data, start + 8),
        )
        self.at = start + (64 if form & 1 else 32) if form >> 1 & 7 == 2 else raw * 4096
        self.size = size
        assert size < 4096

    def entry(self, name):
        """Return where the dirent of a name is."""
        data = self.image.data[self.at : self.at + self.size]
        count = struct.unpack_from("<H", data, 8)[0] // 12
        starts = [struct.unpack_from("<H", data, 12 * n + 8)[0] for n in range(count)]
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], self.size], strict=True)):
            if data[start:end].rstrip(b"\0") == name:
                return self.at + 12 * number, self.at + start
        raise AssertionError(name)


@pytest.fixture
def block(image):
    return Block(image, HELLO)


def test_names_out_of_order(image, block):
    _, name = block.entry(b"size-4095")
    image.data[name + 8] = ord("9")
    assert flaw(image) == (
        "erofs-dirent-unsorted",
        f"nid {find(Erofs(image), HELLO).number}, entry size-4096",
    )


def test_a_name_twice(image, block):
    _, name = block.entry(b"size-4095")
    image.data[name + 8] = ord("6")
    assert flaw(image)[0] == "erofs-dirent-unsorted"


@pytest.mark.parametrize("letter", [b"/", b"\0"])
def test_names_that_are_none(image, block, letter):
    _, name = block.entry(b"size-4095")
    image.data[name + 4 : name + 5] = letter
    assert flaw(image)[0] == "erofs-dirent-damaged"


@pytest.mark.parametrize("value", [0, 13, 5000, 0xFFFF])
def test_name_offsets_that_cannot_be(image, block, value):
    for entry in (0, 1):
        at = block.at + 12 * entry + 8
        kept = bytes(image.data[at : at + 2])
        struct.pack_into("<H", image.data, at, value)
        with pytest.raises(FlawError, match=r"names begin at|a name from byte") as raised:
            nar_hash(Erofs(image), HELLO)
        assert raised.value.check == "erofs-dirent-damaged"
        image.data[at : at + 2] = kept


@pytest.mark.parametrize("size", [1, 11])
def test_a_directory_too_short(image, size):
    struct.pack_into("<I", image.data, inode_at(image, HELLO) + 8, size)
    check, place = flaw(image)
    assert (check, place.endswith("byte 0")) == ("erofs-dirent-damaged", True)


def test_a_type_that_is_another(image, block):
    entry, _ = block.entry(b"size-4095")
    image.data[entry + 10] = 2
    assert flaw(image)[0] == "erofs-dirent-type"


def test_dots_that_lead_elsewhere(image, block):
    for name in (b".", b".."):
        entry, _ = block.entry(name)
        kept = image.data[entry]
        image.data[entry] ^= 1
        assert flaw(image)[0] == "erofs-dots"
        image.data[entry] = kept


def test_no_dots(image, block):
    """Renamed, they are missing."""
    _, name = block.entry(b"..")
    image.data[name + 1] = ord("/") - 2  # ".-": in order still
    tree = Erofs(image)
    with pytest.raises(FlawError, match=r"^nid \d+: \.\. is missing") as raised:
        list(tree.entries(find(tree, HELLO)))
    assert raised.value.check == "erofs-dots"


def test_a_circle_of_directories(image, block):
    """An entry that leads back up is found by the dots; one to a sibling, by being reached twice."""
    entry, _ = block.entry(b"empty")
    struct.pack_into("<Q", image.data, entry, find(Erofs(image), STORE).number)
    assert flaw(image)[0] == "erofs-dots"
    struct.pack_into("<Q", image.data, entry, find(Erofs(image), f"{HELLO}/many").number)
    assert flaw(image)[0] == "tree-damaged"


def test_a_nid_outside(image, block):
    entry, _ = block.entry(b"size-4095")
    struct.pack_into("<Q", image.data, entry, 1 << 63)
    assert flaw(image)[0] == "erofs-inode-damaged"


def test_a_directory_in_holes(tools):
    image = tools.memory(tools.erofs().read_bytes())
    start = inode_at(image, f"{HELLO}/many")
    image.data[start] = image.data[start] & 1 | 4 << 1
    struct.pack_into("<I", image.data, start + 16, 0)
    behind = start + (64 if image.data[start] & 1 else 32)
    struct.pack_into("<I", image.data, behind, 0xFFFFFFFF)
    assert flaw(image)[0] == "erofs-dirent-damaged"


def test_what_no_nar_can_hold(tools, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    tools.run("mkfifo", root / "pipe")
    (root / "deep").mkdir()
    here = root / "deep"
    for _ in range(65):
        here /= "d"
        here.mkdir()
    tools.run("mkfs.erofs", "--quiet", tmp_path / "image", root)
    image = tools.memory((tmp_path / "image").read_bytes())
    with pytest.raises(FlawError, match="neither a file"):
        nar_hash(Erofs(image), "/pipe")
    with pytest.raises(FlawError, match="more than 64 deep"):
        nar_hash(Erofs(image), "/deep")
    assert nar_hash(Erofs(image), "/deep/d")


@pytest.mark.parametrize("size", [9, 0])
def test_a_target_that_is_none(image, size):
    start = inode_at(image, f"{HELLO}/short")
    behind = start + (64 if image.data[start] & 1 else 32)
    image.data[behind] = 0
    struct.pack_into("<I", image.data, start + 8, size)
    assert flaw(image)[0] == "tree-damaged"


def test_a_target_too_long(image):
    start = inode_at(image, f"{HELLO}/short")
    struct.pack_into("<I", image.data, start + 8, 4096)
    assert flaw(image)[0] == "tree-damaged"
