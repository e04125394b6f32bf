"""ext4: what mke2fs made, as Nix hashes it; and each way in which it can be wrong."""

from __future__ import annotations

import re
import shutil
import struct

import pytest

from calve.disk import ext4 as ours
from calve.disk.inspect.crc32c import crc32c
from calve.disk.inspect.ext4 import Ext4
from calve.disk.inspect.findings import FlawError
from calve.disk.inspect.tree import Kind, find, nar_hash

STORE = "/nix/store"
HELLO = f"{STORE}/{'a' * 32}-hello-2.12"
FORMS = [
    ("-b", "4096"),
    ("-b", "1024"),
    ("-b", "4096", "-O", "^metadata_csum,^has_journal"),
    ("-b", "2048", "-O", "^64bit"),
    ("-b", "4096", "-O", "metadata_csum_seed"),
    ("-b", "4096", "-I", "128"),
    ("-b", "1024", "-O", "^metadata_csum,uninit_bg"),
    ("-b", "4096", "-O", "^dir_index"),
    ("-b", "1024", "-O", "bigalloc"),
]


@pytest.fixture(params=["1024", "4096"])
def image(tools, request):
    return tools.memory(tools.ext4("-b", request.param).read_bytes())


@pytest.fixture
def plain(tools):
    """Without checksums: what is changed is not found by them."""
    return tools.memory(tools.ext4("-b", "1024", "-O", "^metadata_csum").read_bytes())


def flaw(image, findings, path=HELLO):
    with pytest.raises(FlawError) as raised:
        nar_hash(Ext4(image, findings), path)
    return raised.value.check, raised.value.place


def inode_at(image, findings, path):
    """Return where an inode is, by the descriptors' word."""
    tree = Ext4(image, findings)
    number = find(tree, path).number
    layout = tree.layout
    group, index = divmod(number - 1, layout.inodes_per_group)
    return layout._table(group) * layout.block_size_bytes + index * layout.inode_bytes


def seal(image):
    """Make the superblock's checksum right again."""
    struct.pack_into("<I", image.data, 2044, crc32c(bytes(image.data[1024:2044])))


@pytest.mark.parametrize("options", FORMS, ids=" ".join)
def test_what_mke2fs_made(tools, findings, options):
    tree = Ext4(tools.memory(tools.ext4(*options).read_bytes()), findings)
    assert (tree.format, tree.block_size_bytes) == ("ext4", int(options[1]))
    for path, wanted in tools.closure.items():
        assert nar_hash(tree, str(path)) == wanted
    assert not list(findings)
    names = [node.name.decode() for node in tree.entries(find(tree, STORE))]
    assert names == sorted(path.basename for path in tools.closure)


def test_what_we_make(tools, findings, tmp_path):
    ours.make(tmp_path / "disk", 64 << 20, tree=tools.root)
    tree = Ext4(tools.memory((tmp_path / "disk").read_bytes()), findings)
    for path, wanted in tools.closure.items():
        assert nar_hash(tree, str(path)) == wanted
    assert not list(findings)


@pytest.mark.parametrize("size", ["1024", "4096"])
def test_hashed_directories(tools, findings, tmp_path, size):
    """e2fsck -D writes the indexes that Linux would."""
    root = tmp_path / "root"
    (root / "many").mkdir(parents=True)
    for number in range(1500):
        (root / f"many/and a rather long name {'n' * 100} {number}").touch()
    image = tmp_path / "image"
    tools.run("mke2fs", "-q", "-t", "ext4", "-b", size, "-N", "2000", "-d", root, image, "8m")
    tools.run("sh", "-c", f"e2fsck -fyD {image}; test $? -le 1")
    shown = tools.run("debugfs", "-R", "htree_dump /many", image).decode()
    assert f"Indirect levels: {1 if size == '1024' else 0}" in shown
    tree = Ext4(tools.memory(image.read_bytes()), findings)
    assert nar_hash(tree, "/many") == tools.nix_hash(root / "many")
    assert not list(findings)


def test_what_is_allocated_and_not_written_is_zeros(tools, findings, tmp_path):
    image = tmp_path / "image"
    shutil.copy(tools.ext4("-b", "1024"), image)
    before = Ext4(tools.memory(image.read_bytes()), findings)
    extents = list(before._extents(before.layout.inode(find(before, f"{HELLO}/sparse").number)))
    tools.run("debugfs", "-w", "-R", f"fallocate {HELLO}/sparse 0 639", image)
    tree = Ext4(tools.memory(image.read_bytes()), findings)
    after = list(tree._extents(tree.layout.inode(find(tree, f"{HELLO}/sparse").number)))
    assert len(extents) >= 40
    assert sum(1 for _, _, place in after if place is None) >= 39
    assert nar_hash(tree, HELLO) == nar_hash(before, HELLO)


def test_nodes(image, findings):
    tree = Ext4(image, findings)
    program = find(tree, f"{HELLO}/bin/hello")
    assert (program.kind, program.size_bytes, program.executable) == (Kind.FILE, 700_001, True)
    assert max(len(chunk) for chunk in tree.content(program)) == 262_144
    for name, target in (("short", b"bin/hello"), ("long", b"/nix/store/" + b"x" * 150)):
        link = find(tree, f"{HELLO}/{name}")
        assert (link.kind, b"".join(tree.content(link))) == (Kind.SYMLINK, target)


@pytest.mark.parametrize(
    "options",
    [("-O", "inline_data"), ("-O", "meta_bg,^resize_inode"), ("-O", "encrypt"), ("-O", "casefold")],
    ids=" ".join,
)
def test_features_that_are_not_understood(tools, findings, options):
    image = tools.memory(tools.ext4("-b", "4096", *options).read_bytes())
    assert flaw(image, findings) == ("ext4-unsupported", "superblock")


def test_lists_of_blocks_are_not_read(tools, findings):
    image = tools.memory(tools.ext4("-O", "^extents,^64bit").read_bytes())
    assert flaw(image, findings)[0] == "ext4-unsupported"


def test_a_journal_that_must_be_replayed(image, findings):
    image.data[1024 + 96] |= 4
    seal(image)
    assert nar_hash(Ext4(image, findings), HELLO)
    assert [finding.check for finding in findings] == ["ext4-recovery-needed"]


@pytest.mark.parametrize("state", [0, 3])
def test_a_file_system_that_is_not_clean(image, findings, state):
    image.data[1024 + 58] = state
    seal(image)
    assert nar_hash(Ext4(image, findings), HELLO)
    assert [finding.check for finding in findings] == ["ext4-not-clean"]


def test_checksums(image, findings):
    """Of the superblock, the descriptors, the inodes, the nodes of extents, the directories."""
    tree = Ext4(image, findings)
    inode = inode_at(image, findings, f"{HELLO}/bin/hello")
    many = tree.layout.inode(find(tree, f"{HELLO}/many").number)
    (_, _, block), *_ = tree._extents(many)
    size = tree.block_size_bytes
    spots = {
        1024 + 120: "superblock",
        tree.layout.descriptors_at + 12: "group ",
        inode + 8: "inode ",
        inode + 200: "inode ",
        block * size + size - 20: f"inode {many.number}",
        block * size + size - 1: f"inode {many.number}",
    }
    leaf = tree.layout.inode(find(tree, f"{HELLO}/sparse").number)
    assert struct.unpack_from("<H", leaf.block, 6)[0] == 1
    node = struct.unpack_from("<I", leaf.block, 16)[0] * size
    spots[node + 12 + 12 * 3 + 10] = f"inode {leaf.number}"
    for at, wanted in spots.items():
        image.data[at] ^= 0x10
        check, place = flaw(image, findings)
        assert check == "ext4-checksum", at
        assert place.startswith(wanted)
        image.data[at] ^= 0x10
    assert nar_hash(Ext4(image, findings), HELLO)


def test_a_block_of_entries_without_a_checksum(image, findings):
    """The tail with the checksum overwritten by an entry of no file."""
    tree = Ext4(image, findings)
    directory = tree.layout.inode(find(tree, HELLO).number)
    (_, _, block), *_ = tree._extents(directory)
    at = (block + 1) * tree.block_size_bytes - 12
    image.data[at + 7] = 0
    assert flaw(image, findings) == ("ext4-checksum", f"inode {directory.number}")


@pytest.mark.parametrize(
    ("form", "at", "value", "check"),
    [
        ("<H", 56, 0, "ext4-damaged"),
        ("<I", 24, 6, "ext4-damaged"),
        ("<I", 24, 1 << 31, "ext4-damaged"),
        ("<I", 40, 0, "ext4-damaged"),
        ("<I", 32, 0, "ext4-damaged"),
        ("<I", 0, 0, "ext4-damaged"),
        ("<H", 88, 100, "ext4-damaged"),
        ("<H", 254, 48, "ext4-damaged"),
        ("<I", 4, 1 << 31, "ext4-damaged"),
        ("<I", 336, 1, "ext4-damaged"),
        ("<I", 0, 1, "ext4-inode-damaged"),
        ("<I", 40, 1, "ext4-inode-damaged"),
    ],
)
def test_superblocks_that_cannot_be(plain, findings, form, at, value, check):
    struct.pack_into(form, plain.data, 1024 + at, value)
    assert flaw(plain, findings)[0] == check


def test_checksums_of_another_kind(image, findings):
    image.data[1024 + 373] = 2
    assert flaw(image, findings)[0] == "ext4-unsupported"


@pytest.mark.parametrize("value", [0, 0xFFFFFF])
def test_a_group_that_leads_outside(plain, findings, value):
    at = Ext4(plain, findings).layout.descriptors_at
    struct.pack_into("<I", plain.data, at + 8, value)
    assert flaw(plain, findings) == ("ext4-damaged", "group 0")


def test_inodes_beyond_the_end(plain, findings):
    at = Ext4(plain, findings).layout.descriptors_at
    struct.pack_into("<I", plain.data, at + 8, Ext4(plain, findings).layout.blocks - 1)
    with pytest.raises(FlawError, match="outside") as raised:
        Ext4(plain, findings).layout.inode(30)
    assert raised.value.check == "ext4-inode-damaged"


@pytest.mark.parametrize(
    ("form", "at", "value", "check"),
    [
        ("<H", 0, 0o40755, "ext4-dirent-damaged"),
        ("<I", 32, 0x80000 | 0x800, "ext4-unsupported"),
        ("<I", 32, 0x80000 | 0x10000000, "ext4-unsupported"),
        ("<I", 32, 0, "ext4-unsupported"),
        ("<I", 108, 1, "tree-too-large"),
        ("<H", 40, 0, "ext4-extent-damaged"),
        ("<H", 42, 5, "ext4-extent-damaged"),
        ("<H", 44, 5, "ext4-extent-damaged"),
        ("<H", 46, 6, "ext4-extent-damaged"),
        ("<H", 56, 0, "ext4-extent-damaged"),
        ("<I", 60, 0, "ext4-extent-damaged"),
        ("<I", 60, 0xFFFFFF, "ext4-extent-damaged"),
        ("<H", 58, 1, "ext4-extent-damaged"),
    ],
)
def test_inodes_that_cannot_be(plain, findings, form, at, value, check):
    start = inode_at(plain, findings, f"{HELLO}/bin/hello")
    struct.pack_into(form, plain.data, start + at, value)
    assert flaw(plain, findings)[0] == check


def test_a_root_that_is_no_directory(plain, findings):
    struct.pack_into("<H", plain.data, inode_at(plain, findings, "/"), 0o100644)
    assert flaw(plain, findings) == ("ext4-inode-damaged", "inode 2")


@pytest.mark.parametrize("value", [0, 1 << 20])
def test_extents_out_of_order(plain, findings, value):
    tree = Ext4(plain, findings)
    inode = tree.layout.inode(find(tree, f"{HELLO}/sparse").number)
    node = struct.unpack_from("<I", inode.block, 16)[0] * 1024
    struct.pack_into("<I", plain.data, node + 12 + 12 * 5, value)
    with pytest.raises(FlawError, match="nodes out of order") as raised:
        nar_hash(Ext4(plain, findings), HELLO)
    assert raised.value.place == f"inode {inode.number}"


def test_extents_of_two_nodes_upon_each_other(plain, findings):
    start = inode_at(plain, findings, f"{HELLO}/sparse")
    node = struct.unpack_from("<I", plain.data, start + 56)[0] * 1024
    spare = Ext4(plain, findings).layout.blocks - 1
    assert not any(plain.data[spare * 1024 : spare * 1024 + 1024])
    plain.data[spare * 1024 : spare * 1024 + 24] = plain.data[node : node + 24]
    struct.pack_into("<H", plain.data, spare * 1024 + 2, 1)
    struct.pack_into("<I", plain.data, spare * 1024 + 12, 3)
    struct.pack_into("<IIHH", plain.data, start + 64, 3, spare, 0, 0)
    struct.pack_into("<H", plain.data, start + 42, 2)
    with pytest.raises(FlawError, match="extents out of order"):
        nar_hash(Ext4(plain, findings), HELLO)


def test_extents_in_a_circle(plain, findings):
    """A node that is its own child has the wrong depth; two entries for one node come again in order."""
    start = inode_at(plain, findings, f"{HELLO}/sparse")
    node = struct.unpack_from("<I", plain.data, start + 56)[0] * 1024
    struct.pack_into("<H", plain.data, node + 6, 1)
    assert flaw(plain, findings)[0] == "ext4-extent-damaged"
    struct.pack_into("<H", plain.data, node + 6, 0)
    plain.data[start + 64 : start + 76] = plain.data[start + 52 : start + 64]
    struct.pack_into("<H", plain.data, start + 42, 2)
    assert flaw(plain, findings)[0] == "ext4-extent-damaged"
    struct.pack_into("<I", plain.data, start + 56, 0xFFFFFFF)
    assert flaw(plain, findings)[0] == "ext4-extent-damaged"


def test_nodes_without_an_extent_are_not_read_again_and_again(plain, findings):
    start = inode_at(plain, findings, f"{HELLO}/sparse")
    node = struct.unpack_from("<I", plain.data, start + 56)[0] * 1024
    struct.pack_into("<H", plain.data, node + 2, 0)
    assert flaw(plain, findings)[0] == "ext4-extent-damaged"


def test_entries_that_leave_four_bytes(plain, findings):
    tree = Ext4(plain, findings)
    inode = tree.layout.inode(find(tree, HELLO).number)
    (_, _, block), *_ = tree._extents(inode)
    empty = struct.pack("<IHBB4x", 0, 12, 0, 0)
    plain.data[block * 1024 + 24 : block * 1024 + 1020] = 83 * empty
    assert flaw(plain, findings) == ("ext4-dirent-damaged", f"inode {inode.number}")


def entry_at(image, findings, directory, name):
    tree = Ext4(image, findings)
    inode = tree.layout.inode(find(tree, directory).number)
    for _, count, block in tree._extents(inode):
        start, size = block * tree.block_size_bytes, count * tree.block_size_bytes
        match = re.search(re.escape(name), image.data[start : start + size])
        if match:
            return start + match.start() - 8, inode.number
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("form", "at", "value", "check"),
    [
        ("<I", 0, 1 << 30, "ext4-inode-damaged"),
        ("<H", 4, 0, "ext4-dirent-damaged"),
        ("<H", 4, 15, "ext4-dirent-damaged"),
        ("<H", 4, 4096, "ext4-dirent-damaged"),
        ("<B", 6, 200, "ext4-dirent-damaged"),
        ("<B", 7, 2, "ext4-dirent-damaged"),
        ("<B", 15, ord("/"), "tree-damaged"),
        ("<B", 15, 0, "tree-damaged"),
        ("<8s", 8, b"size-100", "ext4-dirent-damaged"),
    ],
)
def test_entries_that_cannot_be(plain, findings, form, at, value, check):
    start, _ = entry_at(plain, findings, HELLO, b"size-409")
    struct.pack_into(form, plain.data, start + at, value)
    if form == "<8s":  # what is now size-1005, made another size-1
        plain.data[start + 6] = 6
    found, _ = flaw(plain, findings)
    assert found == check


def test_dots_that_lead_elsewhere(plain, findings):
    tree = Ext4(plain, findings)
    inode = tree.layout.inode(find(tree, HELLO).number)
    (_, _, block), *_ = tree._extents(inode)
    for at in (0, 12):
        plain.data[block * 1024 + at] ^= 1
        assert flaw(plain, findings) == ("ext4-dots", f"inode {inode.number}")
        plain.data[block * 1024 + at] ^= 1
    plain.data[block * 1024 + 8] = ord(",")
    assert flaw(plain, findings)[0] == "ext4-dots"


def test_a_directory_reached_twice(plain, findings):
    start, _ = entry_at(plain, findings, HELLO, b"empty")
    struct.pack_into("<I", plain.data, start, find(Ext4(plain, findings), f"{HELLO}/many").number)
    assert flaw(plain, findings)[0] == "tree-damaged"


def test_a_hole_between_blocks_of_entries(plain, findings):
    start = inode_at(plain, findings, f"{HELLO}/many")
    node = struct.unpack_from("<I", plain.data, start + 56)[0] * 1024
    (logical,) = struct.unpack_from("<I", plain.data, node + 24)
    struct.pack_into("<I", plain.data, node + 24, logical + 1)
    with pytest.raises(FlawError, match=r"a hole$"):
        nar_hash(Ext4(plain, findings), HELLO)


@pytest.mark.parametrize(
    ("size", "check"), [(1 << 29, "ext4-inode-damaged"), (1 << 20, "ext4-dirent-damaged")]
)
def test_a_directory_longer_than_its_blocks(plain, findings, size, check):
    start = inode_at(plain, findings, f"{HELLO}/many")
    struct.pack_into("<I", plain.data, start + 4, size)
    assert flaw(plain, findings)[0] == check
