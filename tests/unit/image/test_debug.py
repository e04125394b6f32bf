"""The debug variant of a disk: a word more on the command line, a block or two, and all else as it was."""

from __future__ import annotations

import struct
import uuid
from array import array

import pytest

from calve.disk import assemble, fat, gpt, uki
from calve.disk.arch import X86_64
from calve.disk.disk import BLOCK_BYTES
from calve.disk.inspect.fat import FatFile
from calve.disk.inspect.findings import Findings
from calve.disk.inspect.report import inspect
from calve.disk.inspect.source import FileSource
from calve.disk.inspect.uki import read as read_uki
from calve.errors import DamagedError, UsageError
from calve.image import debug

SEED = uuid.UUID(int=17)
LINE = "console=ttyS0 init=/init"
CLUSTER = 512
ESP_AT = 1 << 20


class Bytes:
    """Bytes as a source, and as a disk that can be written to."""

    def __init__(self, data):
        self.data = bytearray(data)

    @property
    def size(self):
        return len(self.data)

    def read(self, at, count):
        assert at + count <= len(self.data)
        return bytes(self.data[at : at + count])

    def put(self, blocks):
        for index, block in blocks.items():
            assert len(block) == BLOCK_BYTES
            self.data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] = block


@pytest.fixture(name="loader", scope="module")
def _loader(tmp_path_factory):
    """Return a function: a command line in, a unified kernel image out; the kernel is the stub itself."""
    folder = tmp_path_factory.mktemp("uki")
    (folder / "initrd").write_bytes(b"initrd")
    stub = uki.find_stub(X86_64)

    def make(line=LINE):
        made = uki.Uki(X86_64, stub, stub, folder / "initrd", line, "ID=x\n", "6.1.0")
        return uki.write(made, folder / "loader.efi").path

    return make


def make_disk(folder, loader, kind=gpt.Kind.ESP):
    for name in ("esp", "disk.raw"):
        (folder / name).unlink(missing_ok=True)
    fat.make(folder / "esp", loader, arch=X86_64, seed=SEED)
    (folder / "root").write_bytes(b"root")
    parts = [
        assemble.Part("esp", kind, folder / "esp"),
        assemble.Part("root", gpt.Kind.ROOT, folder / "root", fill=True),
    ]
    assemble.build(parts, folder / "disk.raw", arch=X86_64, seed=SEED)
    return folder / "disk.raw"


def test_the_word_is_added_and_nothing_else_changes(tmp_path, loader):
    path = make_disk(tmp_path, loader())
    with FileSource(path) as source:
        variant = debug.with_debug(source, "ami-1")
        before = inspect(source)
    assert variant.command_lines == (f"{LINE} {debug.WORD}",)
    assert 1 <= len(variant.blocks) <= 2
    differ = 0
    with path.open("r+b") as file:
        for index, block in variant.blocks.items():
            file.seek(index * BLOCK_BYTES)
            old = file.read(BLOCK_BYTES)
            differ += sum(one != two for one, two in zip(old, block, strict=True))
            file.seek(index * BLOCK_BYTES)
            file.write(block)
    assert differ <= len(debug.WORD) + 1 + 4  # the word and a blank, the section's size
    with FileSource(path) as source:
        after = inspect(source)
        again = debug.with_debug(source, "ami-1")
    (old,), (new,) = before.ukis, after.ukis
    assert (old.image.cmdline, new.image.cmdline) == (LINE, f"{LINE} {debug.WORD}")
    assert (new.image.initrd_bytes, new.image.linux_bytes, new.image.uname) == (
        old.image.initrd_bytes,
        old.image.linux_bytes,
        old.image.uname,
    )
    assert after.findings == before.findings
    assert after.esp == before.esp
    assert (again.blocks, again.command_lines) == ({}, variant.command_lines)


def test_the_room_of_the_command_line(tmp_path, loader):
    most = uki.COMMAND_LINE_BYTES - len(debug.WORD) - 1
    with FileSource(make_disk(tmp_path, loader("x" * most))) as source:
        (line,) = debug.with_debug(source, "ami-1").command_lines
    assert len(line) == uki.COMMAND_LINE_BYTES
    with (
        FileSource(make_disk(tmp_path, loader("x" * (most + 1)))) as source,
        pytest.raises(UsageError, match="2048 bytes, and there is room for 2047") as caught,
    ):
        debug.with_debug(source, "ami-1")
    assert (caught.value.place, "--debug" in caught.value.hint) == ("ami-1", True)


def test_a_room_that_ends_in_memory_before_it_does_in_the_file(tmp_path, loader):
    data = bytearray(loader("x" * 500).read_bytes())
    at = data.index(b".linux\0\0")
    where = data.index(b".cmdline")
    address = int.from_bytes(data[where + 12 : where + 16], "little")
    data[at + 12 : at + 16] = (address + 512).to_bytes(4, "little")  # as if made by objcopy
    program = tmp_path / "tight.efi"
    program.write_bytes(data)
    with (
        FileSource(make_disk(tmp_path, program)) as source,
        pytest.raises(UsageError, match="514 bytes, and there is room for 512"),
    ):
        debug.with_debug(source, "ami-1")


def test_a_file_in_pieces_all_over_the_disk(loader, monkeypatch):
    line = "x" * (CLUSTER - 5)  # the word goes over the end of a cluster
    data = loader(line).read_bytes()
    data += bytes(-len(data) % CLUSTER)
    count = len(data) // CLUSTER
    # Clusters backwards, and the one where the text ends lies across two blocks.
    starts = array("Q", (number * CLUSTER for number in range(count)))
    places = array("Q", ((count - 1 - number) * CLUSTER for number in range(count)))
    text_at = data.index(line.encode()) // CLUSTER
    start = BLOCK_BYTES - (places[text_at] + CLUSTER - 2) % BLOCK_BYTES
    disk = Bytes(-(-(start + len(data)) // BLOCK_BYTES) * BLOCK_BYTES * b"\xee")
    for at, place in zip(starts, places, strict=True):
        disk.data[start + place : start + place + CLUSTER] = data[at : at + CLUSTER]

    class Inner:
        size = len(data)

        def read(self, at, size):
            return disk.read(start + at, size)

    file = FatFile("EFI/BOOT/BOOTX64.EFI", len(data), Inner(), starts, places)
    monkeypatch.setattr(debug, "_boot_files", lambda _disk, _place: [(start, file)])
    before = bytes(disk.data)
    variant = debug.with_debug(disk, "ami-1")
    assert len(variant.blocks) >= 2
    disk.put(variant.blocks)
    findings = Findings()
    image = read_uki(file, findings)
    assert (list(findings), image.cmdline) == ([], f"{line} {debug.WORD}")
    assert sum(a != b for a, b in zip(before, disk.data, strict=True)) <= len(debug.WORD) + 5


def test_what_has_no_command_line(tmp_path, loader):
    plain = uki.find_stub(X86_64)
    with (
        FileSource(make_disk(tmp_path, plain)) as source,
        pytest.raises(UsageError, match="no kernel command line of their own"),
    ):
        debug.with_debug(source, "ami-1")
    with (
        FileSource(make_disk(tmp_path, loader(), kind=gpt.Kind.STORE)) as source,
        pytest.raises(DamagedError, match="no EFI system partition"),
    ):
        debug.with_debug(source, "ami-1")


@pytest.mark.parametrize("what", ["boot sector", "second table"])
def test_a_damaged_disk(tmp_path, loader, what):
    path = make_disk(tmp_path, loader())
    with path.open("r+b") as file:
        file.seek(ESP_AT)
        head = file.read(512)
        reserved, size = (
            struct.unpack_from("<H", head, 14)[0],
            struct.unpack_from("<H", head, 22)[0],
        )
        size = size or struct.unpack_from("<I", head, 36)[0]
        file.seek(ESP_AT if what == "boot sector" else ESP_AT + (reserved + size) * 512 + 20)
        file.write(b"\xaa" * 8)
    with (
        FileSource(path) as source,
        pytest.raises(DamagedError, match="ami-1: its EFI system partition is damaged: fat"),
    ):
        debug.with_debug(source, "ami-1")
