"""Disks of any parts: others' tools read back what was written, nothing lies over anything, foreign bytes are refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import struct
import subprocess
import tempfile
import uuid
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.disk import assemble, fat, gpt, pe, uki, verity
from calve.disk.arch import ARCHES, X86_64
from calve.disk.disk import BLOCK_BYTES, Disk
from calve.disk.esp import FileSystem
from calve.disk.gpt import Kind, Room
from calve.errors import CalveError, DamagedError, NotFoundError

some = settings(deadline=None, max_examples=25)
many = settings(deadline=None, max_examples=200)

SBIN = "/usr/sbin:/sbin:/usr/bin"
TOOLS = ("sfdisk", "mcopy", "mkfs.vfat", "objdump", "veritysetup")
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool, path=SBIN) is None for tool in TOOLS),
    reason="fdisk, mtools, dosfstools, binutils or cryptsetup-bin are not installed",
)

SEED = uuid.UUID(int=17)
name = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=18)
rooms = st.lists(
    st.builds(Room, name, st.sampled_from(Kind), st.integers(1, 3 << 30)),
    min_size=1,
    max_size=9,
    unique_by=lambda room: room.name,
)


def run(tool, *argv):
    path = shutil.which(tool, path=SBIN)
    return subprocess.run([path, *argv], capture_output=True, text=True, check=True).stdout


@needs_tools
@some
@given(rooms, st.uuids(), st.sampled_from(ARCHES), st.booleans())
def test_tables(wanted, seed, arch, fill):
    if fill:
        last = wanted[-1]
        wanted = [*wanted[:-1], Room(last.name, last.kind, last.size_bytes, fill=True)]
    layout = gpt.lay_out(wanted, arch=arch, seed=seed)
    assert gpt.parse(layout.head(), size_bytes=layout.size_bytes, place="x") == layout
    end = 1 << 20
    for room, one in zip(wanted, layout.partitions, strict=True):
        assert one.start_bytes == end
        assert one.size_bytes >= room.size_bytes
        end += one.size_bytes
    assert end <= layout.size_bytes - BLOCK_BYTES
    assert layout.size_bytes % (1 << 30) == 0
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(layout.size_bytes)
        file.write(layout.head())
        file.seek(layout.size_bytes - 33 * gpt.SECTOR_BYTES)
        file.write(layout.tail())
        file.flush()
        assert "No errors" in run("sfdisk", "--verify", file.name)
        table = json.loads(run("sfdisk", "--json", file.name))["partitiontable"]
    assert [
        (one["start"] * 512, one["size"] * 512, uuid.UUID(one["type"]), uuid.UUID(one["uuid"]))
        for one in table["partitions"]
    ] == [(one.start_bytes, one.size_bytes, one.type, one.guid) for one in layout.partitions]


additions = st.lists(
    st.tuples(st.integers(1, 300_000), st.integers(0, 600_000)), min_size=1, max_size=12
)


@needs_tools
@pytest.mark.skipif(
    not (uki.STUBS[0] / X86_64.stub).is_file(), reason="systemd-boot-efi is not installed"
)
@some
@given(additions)
def test_sections(sizes):
    stub = uki.find_stub(X86_64).read_bytes()
    wanted = [pe.Addition(f".s{number}", *size) for number, size in enumerate(sizes)]
    try:
        head, added = pe.extend(stub, wanted, "stub")
    except CalveError as error:
        assert len(wanted) > 5
        assert "no room" in error.message
        return
    for one, section in zip(wanted, added, strict=True):
        assert section.size_bytes == one.size_bytes
        assert section.room_bytes >= max(one.size_bytes, one.room_bytes)
        assert section.address % 4096 == 0
    with tempfile.NamedTemporaryFile() as file:
        file.write(head)
        file.truncate(added[-1].offset + added[-1].room_bytes)
        file.flush()
        out = run("objdump", "-h", file.name)
    found = re.findall(r"^ *\d+ (\S+) +(\w+)  (\w+)  \w+  (\w+)  2", out, re.MULTILINE)
    theirs = [(one[0], *(int(number, 16) for number in one[1:])) for one in found]
    assert theirs[-len(added) :] == [
        (one.name, one.size_bytes, one.address, one.offset) for one in added
    ]
    in_memory = sorted((address, address + size) for _, size, address, _ in theirs)
    in_file = sorted((offset, offset + size) for _, size, _, offset in theirs)
    for spans in (in_memory, in_file):
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


@needs_tools
@settings(deadline=None, max_examples=8)
@given(st.integers(1, 12 << 20), st.integers(64, 256), st.sampled_from(ARCHES), st.uuids())
def test_file_systems(size, mib, arch, seed):
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        loader, image = work / "loader", work / "esp"
        with loader.open("xb") as file:
            file.truncate(size)
            file.write(seed.bytes[:size])
        fat.make(image, loader, arch=arch, seed=seed, size_bytes=mib << 20)
        run("mcopy", "-i", image, f"::/EFI/BOOT/{arch.loader}", work / "copy")
        run("fsck.vfat", "-n", image)
        assert (work / "copy").stat().st_size == size
        assert (work / "copy").read_bytes() == loader.read_bytes()
        with image.open("rb") as file:

            def read(offset, count):
                file.seek(offset)
                return file.read(count)

            files = FileSystem(read, image)
            found = files.find(f"EFI/BOOT/{arch.loader}")
            assert (found.size_bytes, found.cluster) == (size, 5)
            assert files.head(found, 16) == loader.read_bytes()[:16]


pieces = st.lists(st.integers(0, 255), min_size=1, max_size=4)


@some
@given(st.data(), pieces, pieces)
def test_generations_of_a_disk(data, esp, root):
    """Each generation changes some blocks; overlays, one upon the other, are the disk that is made in one."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parent, stack = None, {}
        for number in range(data.draw(st.integers(1, 3))):
            dirty = None
            if number:
                dirty = data.draw(st.sets(st.integers(0, len(root) - 1)))
                root = [byte ^ 1 if at in dirty else byte for at, byte in enumerate(root)]
                more = data.draw(st.lists(st.integers(0, 255), max_size=2))
                dirty |= set(range(len(root), len(root) + len(more)))
                root += more
                esp = data.draw(pieces)
            generation(work / f"{number}", esp, root, dirty)
            parent = build(work / f"{number}", parent, dirty)
            with (work / f"{number}" / "disk.raw").open("rb") as file:
                for block in parent.present:
                    file.seek(block.index * BLOCK_BYTES)
                    stack[block.index] = file.read(BLOCK_BYTES)
            generation(work / f"whole-{number}", esp, root, None)
            whole = build(work / f"whole-{number}", None, None)
            assert parent.blocks == whole.blocks
            assert parent.digest == whole.digest
            assert Disk.parse(parent.dump(), "x") == parent
        with (work / f"whole-{number}" / "disk.raw").open("rb") as file:
            for block in whole.blocks:
                file.seek(block.index * BLOCK_BYTES)
                assert file.read(BLOCK_BYTES) == stack[block.index]


def generation(folder, esp, root, dirty):
    folder.mkdir()
    with (folder / "esp").open("xb") as file:
        for byte in esp:
            file.write(bytes([byte]) * BLOCK_BYTES)
    with (folder / "root").open("xb") as file:
        for at, byte in enumerate(root):
            wrong = dirty is not None and at not in dirty
            file.write((b"\xee" if wrong else bytes([byte])) * BLOCK_BYTES)


def build(folder, parent, dirty):
    parts = [
        assemble.Part("esp", Kind.ESP, folder / "esp", room_bytes=4 << 20),
        assemble.Part("root", Kind.ROOT, folder / "root", fill=True, dirty=dirty),
    ]
    return assemble.build(parts, folder / "disk.raw", arch=X86_64, seed=SEED, parent=parent)


@some
@given(st.data(), st.integers(2, 900), st.integers(2, 900))
def test_trees_of_generations(data, before, after):
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        blocks = [data.draw(st.integers(0, 3)) for _ in range(4)]
        (work / "a").write_bytes(b"".join(bytes([blocks[n % 4]]) * 4096 for n in range(before)))
        parent = verity.write(work / "a", work / "a.tree", seed=SEED)
        groups = range(-(-after // 128))
        # What grew is dirty, and of the rest what is drawn.
        dirty = {group for group in groups if min(after, group * 128 + 128) > before}
        dirty |= data.draw(st.sets(st.sampled_from(groups)))
        whole = bytearray((work / "a").read_bytes()[: after * 4096].ljust(after * 4096, b"\7"))
        for group in dirty:
            whole[group * verity.GROUP_BYTES] ^= 1
        (work / "b").write_bytes(whole)
        for group in set(groups) - dirty:
            start = group * verity.GROUP_BYTES
            end = min(len(whole), start + verity.GROUP_BYTES)
            whole[start:end] = b"\xee" * (end - start)
        (work / "c").write_bytes(whole)
        fresh = verity.write(work / "b", work / "b.tree", seed=SEED)
        child = verity.write(work / "c", work / "c.tree", seed=SEED, parent=parent, dirty=dirty)
        assert child.root_hash == fresh.root_hash
        assert child.path.read_bytes() == fresh.path.read_bytes()
        assert verity.read(child.path).root_hash == child.root_hash


TABLE = gpt.lay_out([Room("a", Kind.ROOT, 1)], arch=X86_64, seed=SEED).head()
STUB = struct.pack("<2s58xI4s", b"MZ", 64, b"PE\0\0")


@many
@given(st.binary(max_size=2000))
def test_foreign_bytes(data):
    with contextlib.suppress(DamagedError):
        gpt.parse(data, size_bytes=1 << 30, place="x")
    with contextlib.suppress(DamagedError):
        pe.parse(STUB + data, "x")
    with contextlib.suppress(CalveError):
        Disk.parse(data, "x")
    sector = data[:510].ljust(510, b"\0") + b"\x55\xaa" + data[510:]
    with contextlib.suppress(DamagedError, NotFoundError):
        files = FileSystem(lambda offset, size: sector[offset : offset + size], "x")
        files.head(files.find("EFI/BOOT/BOOTX64.EFI"), 1000)


@many
@given(st.integers(512, 512 + 91), st.binary(min_size=1, max_size=8))
def test_headers_that_are_signed_and_wrong(at, new):
    head = bytearray(TABLE)
    head[at : at + len(new)] = new
    struct.pack_into("<I", head, 528, 0)
    struct.pack_into("<I", head, 528, zlib.crc32(head[512:604]))
    with contextlib.suppress(DamagedError):
        gpt.parse(bytes(head), size_bytes=1 << 30, place="x")


@many
@given(st.dictionaries(st.sampled_from(range(512)), st.integers(0, 255), max_size=8))
def test_boot_sectors_that_are_wrong(changes):
    """A small file system whose boot sector says something else: an answer, or an error of ours, and not for long."""
    sector = bytearray(512)
    struct.pack_into("<11xHBHBHHBH8xII4xI", sector, 0, 512, 1, 1, 1, 16, 0, 0xF8, 8, 70_000, 0, 2)
    for at, byte in changes.items():
        sector[at] = byte
    sector[510:] = b"\x55\xaa"
    rest = bytes(range(256)) * 64
    asked = []

    def read(offset, size):
        asked.append(size)
        return bytes((sector + rest)[offset : offset + size])

    with contextlib.suppress(DamagedError, NotFoundError):
        FileSystem(read, "x").find("EFI/BOOT/BOOTX64.EFI")
    assert len(asked) < 20_000
