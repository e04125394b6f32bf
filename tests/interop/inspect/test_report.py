"""The inspection of whole disks: what is on them, and what is missing or more than was wanted."""

from __future__ import annotations

import dataclasses
import os
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path
from uuid import UUID

import pytest

from calve.disk.inspect.erofs import Erofs
from calve.disk.inspect.findings import MAX_FINDINGS, Check, Finding
from calve.disk.inspect.report import Expected, WantedPartition, inspect
from calve.disk.inspect.source import BLOCK_BYTES, BlockSource, FileSource, Slice
from calve.disk.inspect.tree import find
from calve.errors import DamagedError, TransientError
from calve.nix.hashes import Hash
from calve.nix.storepath import StorePath

MIB = 1 << 20
HELLO = StorePath("a" * 32, "hello-2.12")


def checks(inspection):
    return [finding.check for finding in inspection.findings]


def expecting(disk, **changes):
    return dataclasses.replace(disk.expected, **changes)


def part(disk, number):
    """Return where a partition begins."""
    return list(disk.parts.values())[number - 1][0]


def test_a_disk_that_is_right(disk, tools):
    with FileSource(disk.path) as source:
        result = inspect(source, disk.expected)
    assert result.findings == ()
    types = [partition.type for partition in result.table.partitions]
    assert types == ["esp", "root-x86-64", "root-x86-64-verity"]
    assert [one.path for one in result.ukis] == [
        "EFI/BOOT/BOOTX64.EFI",
        "EFI/Linux/A long name of a kernel.efi",
    ]
    assert all(one.image.cmdline == disk.expected.cmdline for one in result.ukis)
    (system,) = result.file_systems
    assert (system.partition, system.format, system.block_size_bytes) == (2, "erofs", 4096)
    assert system.paths == tools.closure
    assert result.verity.data_block_bytes == 4096


def test_an_ext4_root(disk_ext4, tools):
    result = inspect(disk_ext4.memory(), disk_ext4.expected)
    assert result.findings == ()
    (system,) = result.file_systems
    assert (system.format, system.paths) == ("ext4", tools.closure)
    assert (result.esp.bits, result.verity) == (16, None)


def test_without_expectations(disk):
    result = inspect(disk.memory())
    assert result.findings == ()
    assert set(result.file_systems[0].paths) == set(disk.expected.closure)


def test_block_by_block(disk):
    """As a snapshot is read back: each block is fetched, a few of them twice."""
    data = disk.path.read_bytes()
    fetched = []

    def fetch(index):
        fetched.append(index)
        return data[index * BLOCK_BYTES :][:BLOCK_BYTES]

    result = inspect(BlockSource(len(data), fetch), disk.expected)
    assert result == inspect(disk.memory(), disk.expected)
    assert len(fetched) < 2 * len(set(fetched))


def test_the_source_s_errors(disk):
    """A fault that may pass is no finding; a block that is not what was promised is one."""
    data = disk.path.read_bytes()
    bad = part(disk, 2) // BLOCK_BYTES

    def fetch(index, error):
        if index == bad:
            raise error
        return data[index * BLOCK_BYTES :][:BLOCK_BYTES]

    stall, damage = TransientError("a stall"), DamagedError("another checksum", place="block 82")
    with pytest.raises(TransientError):
        inspect(BlockSource(len(data), lambda index: fetch(index, stall)))
    found = inspect(BlockSource(len(data), lambda index: fetch(index, damage))).findings
    assert Finding("filesystem-unknown", "partition 2: block 82", "another checksum") in found


def test_memory_does_not_depend_on_the_size_of_files(tools, tmp_path):
    store = tmp_path / "root/nix/store"
    store.mkdir(parents=True)
    with (store / HELLO.basename).open("wb") as file:
        file.truncate(60 * MIB)
    tools.run("mkfs.erofs", "--quiet", "--chunksize=4096", tmp_path / "image", tmp_path / "root")
    disk = tools.disk("large", [(tools.ROOT, tmp_path / "image")])
    closure = {HELLO: tools.nix_hash(store / HELLO.basename)}
    memory = disk.memory()
    tracemalloc.start()
    result = inspect(memory, Expected(closure=closure))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert checks(result) == ["esp-missing"]
    assert peak < 4 * MIB


@pytest.mark.parametrize(
    ("magic", "what"),
    [
        (b"conectix", "a VHD"),
        (b"QFI\xfb", "a qcow2 image"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    ],
)
def test_disks_in_containers(disk, magic, what):
    memory = disk.memory()
    memory.data[: len(magic)] = magic
    (found,) = inspect(memory, disk.expected).findings
    assert found.check == "disk-foreign-format"
    assert what in found.message


@pytest.mark.parametrize("size", [0, 3, 512, 3072])
def test_next_to_nothing(tools, size):
    result = inspect(tools.memory(bytes(size)))
    assert result.table is None
    assert checks(result)[0] in {"disk-size", "mbr-missing"}


def test_a_disk_that_was_cut(disk):
    """A part of an image on a volume: what is there is still read."""
    memory = disk.memory()
    del memory.data[part(disk, 2) + MIB :]
    names = checks(inspect(memory, disk.expected))
    assert {"gpt-backup-misplaced", "gpt-backup-damaged", "gpt-partition-outside"} < set(names)
    assert {"erofs-damaged", "verity-damaged", "store-missing"} < set(names)


def test_paths_missing_and_unexpected(disk, tools):
    other = StorePath("d" * 32, "other")
    closure = dict(tools.closure)
    del closure[HELLO]
    closure[other] = Hash.sha256(b"")
    found = inspect(disk.memory(), expecting(disk, closure=closure)).findings
    assert [(one.check, one.place) for one in found] == [
        ("path-unexpected", f"partition 2: {HELLO}"),
        ("path-missing", f"partition 2: {other}"),
    ]


def test_what_is_in_the_store_and_no_path(tools, tmp_path):
    store = tmp_path / "root/nix/store"
    (store / ".links").mkdir(parents=True)
    tools.run("mkfs.erofs", "--quiet", tmp_path / "image", tmp_path / "root")
    disk = tools.disk("links", [(tools.ROOT, tmp_path / "image")])
    found = inspect(disk.memory(), Expected(closure={})).findings
    assert ("path-unexpected", "partition 1: .links") in {(one.check, one.place) for one in found}
    assert checks(inspect(disk.memory())) == ["esp-missing"]


@pytest.mark.parametrize("kind", ["disk", "disk_ext4"])
def test_a_changed_bit_in_a_file(kind, request, tools):
    disk = request.getfixturevalue(kind)
    memory = disk.memory()
    content = (tools.root / "nix/store" / HELLO.basename / "bin/hello").read_bytes()
    at = memory.data.index(content[300_000:300_100])
    memory.data[at] ^= 1
    names = checks(inspect(memory, disk.expected))
    assert names[0] == "path-hash-differs"
    assert set(names[1:]) <= {"verity-tree-differs", "verity-root-differs"}


def test_a_file_that_may_not_be_run(disk_ext4, tools):
    """What the content does not show: a permission."""
    image = tools.base / "mode"
    image.write_bytes(tools.ext4("-b", "4096").read_bytes())
    tools.run("debugfs", "-w", "-R", f"sif {HELLO}/bin/hello mode 0100444", image)
    disk = tools.disk("mode-disk", [(tools.ROOT, image)])
    assert checks(inspect(disk.memory(), disk.expected)) == ["esp-missing", "path-hash-differs"]


def test_damage_to_one_path_does_not_hide_the_others(disk, tools):
    memory = disk.memory()
    tree = Erofs(Slice(memory, part(disk, 2), 2 * MIB))
    number = find(tree, f"{HELLO}/bin/hello").number
    struct.pack_into("<H", memory.data, part(disk, 2) + number * 32, 0xFFFF)
    result = inspect(memory, disk.expected)
    found = {one.place: one.check for one in result.findings}
    assert found[f"partition 2: {HELLO}: nid {number}"] == "erofs-inode-damaged"
    assert "path-missing" not in checks(result)
    assert len(result.file_systems[0].paths) == 2


def test_damage_outside_of_the_store(tools, tmp_path):
    """The rest of the root is read too; devices and deep directories may stand there, unlike in a NAR."""
    root = tmp_path / "root"
    shutil.copytree(tools.root, root, symlinks=True)
    deep = root / "/".join("d" * 70)
    deep.mkdir(parents=True)
    tools.run("mkfifo", root / "pipe")
    (root / "etc").mkdir()
    (root / "etc/large").write_bytes(os.urandom(50_000))
    tools.run("mkfs.erofs", "--quiet", tmp_path / "image", root)
    disk = tools.disk("outside", [(tools.ROOT, tmp_path / "image")])
    memory = disk.memory()
    assert checks(inspect(memory, disk.expected)) == ["esp-missing"]
    tree = Erofs(Slice(memory, MIB, 3 * MIB))
    number = find(tree, "/etc/large").number
    struct.pack_into("<I", memory.data, MIB + number * 32 + 16, 1 << 30)
    result = inspect(memory, disk.expected)
    (_, found) = result.findings
    assert (found.check, found.place) == ("erofs-data-outside", f"partition 1: nid {number}")
    assert result.file_systems[0].paths == tools.closure


def test_a_place_that_many_partitions_share(disk):
    """It is read once, however many they are."""
    memory = disk.memory()
    inspect(memory, disk.expected)
    reads = memory.reads
    entry = memory.data[1024 + 128 : 1024 + 256]
    for number in range(3, 128):
        memory.data[1024 + 128 * number : 1024 + 128 * number + 128] = entry
    at = len(memory.data) - 33 * 512
    memory.data[at : at + 16384] = memory.data[1024 : 1024 + 16384]
    crc = zlib.crc32(memory.data[at : at + 16384])
    for header in (512, len(memory.data) - 512):
        struct.pack_into("<I", memory.data, header + 88, crc)
        struct.pack_into("<I", memory.data, header + 16, 0)
        crc_of_header = zlib.crc32(memory.data[header : header + 92])
        struct.pack_into("<I", memory.data, header + 16, crc_of_header)
    memory.reads = 0
    result = inspect(memory, disk.expected)
    assert len(result.table.partitions) == 128
    assert set(checks(result)) >= {"gpt-partitions-overlap", "gpt-guid-twice"}
    assert len(result.file_systems) == 1
    assert memory.reads <= reads


def test_no_store(disk):
    result = inspect(disk.memory(), expecting(disk, store="/elsewhere"))
    assert checks(result) == ["store-missing"]


def test_the_file_system_is_the_store(tools):
    image = tools.base / "store-image"
    tools.run("mkfs.erofs", "--quiet", image, tools.root / "nix/store")
    disk = tools.disk("store-disk", [(tools.ROOT, image)])
    result = inspect(disk.memory(), Expected(closure=tools.closure, store="/"))
    assert checks(result) == ["esp-missing"]


def test_file_systems_that_are_unknown(tools, tmp_path):
    (tmp_path / "root").write_bytes(bytes(MIB))
    root = tools.disk("empty", [(tools.ROOT, tmp_path / "root")])
    assert checks(inspect(root.memory())) == ["esp-missing", "filesystem-unknown"]
    data = tools.disk("data", [("0FC63DAF-8483-4772-8E79-3D69D8477DE4", tmp_path / "root")])
    assert checks(inspect(data.memory())) == ["esp-missing"]
    assert checks(inspect(data.memory(), Expected(closure={})))[-1] == "store-missing"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start_bytes", 2 * MIB),
        ("size_bytes", MIB),
        ("guid", UUID(int=1)),
        ("name", "store"),
        ("type_guid", UUID(int=2)),
    ],
)
def test_another_partition_table(disk, field, value):
    table = inspect(disk.memory()).table
    wanted = [
        WantedPartition(one.type_guid, one.start_bytes, one.size_bytes, one.guid, one.name)
        for one in table.partitions
    ]
    assert inspect(disk.memory(), expecting(disk, partitions=wanted)).findings == ()
    wanted[1] = dataclasses.replace(wanted[1], **{field: value})
    (found,) = inspect(disk.memory(), expecting(disk, partitions=wanted)).findings
    assert (found.check, found.place) == ("gpt-differs", "partition 2")
    assert field in found.message
    (found,) = inspect(disk.memory(), expecting(disk, partitions=wanted[:1])).findings
    assert found.message == "3 partitions, wanted are 1"


def test_another_command_line(disk):
    found = inspect(disk.memory(), expecting(disk, cmdline="quiet")).findings
    assert [one.check for one in found] == ["uki-cmdline-differs"] * 2
    assert found[0].place == "partition 1: EFI/BOOT/BOOTX64.EFI: .cmdline"


def test_boot_files(tools, disk, tmp_path):
    def look(files, **wanted):
        esp = tools.esp(files, bits=16, size=8 * MIB, options=("-s", "2"))
        return inspect(tools.disk("boot", [(tools.ESP, esp)]).memory(), Expected(**wanted))

    assert checks(look({})) == ["boot-file-missing"]
    assert checks(look({}, cmdline="x")) == ["boot-file-missing", "uki-cmdline-differs"]
    program = tools.program()
    one = {"EFI/BOOT/BOOTX64.EFI": program}
    assert checks(look(one)) == []
    assert checks(look(one, machine="aarch64")) == ["boot-file-missing"]
    assert checks(look({"EFI/BOOT/BOOTAA64.EFI": program})) == ["pe-machine"]
    assert checks(look({"EFI/BOOT/BOOTX64.EFI": b"no program"})) == ["pe-damaged"]
    assert checks(look({"EFI/BOOT/BOOTX64.EFI": b"MZ" + bytes(90)})) == ["pe-damaged"]
    # A boot loader with its kernels beside it.
    loader = Path("/usr/lib/systemd/boot/efi/systemd-bootx64.efi").read_bytes()
    result = look({"EFI/BOOT/BOOTX64.EFI": loader, "EFI/Linux/nixos-1.efi": program})
    assert checks(result) == []
    assert [one.path for one in result.ukis] == ["EFI/Linux/nixos-1.efi"]


def test_hashes_that_nobody_vouches_for(disk, tools):
    cmdline = disk.expected.cmdline
    without = cmdline.replace("roothash=", "somehash=").encode()
    memory = disk.memory()
    at = memory.data.find(cmdline.encode())
    while at >= 0:
        memory.data[at : at + len(without)] = without
        at = memory.data.find(cmdline.encode())
    assert checks(inspect(memory)) == ["verity-no-root-hash"]
    root_hash = bytes.fromhex(cmdline[-64:])
    assert checks(inspect(memory, Expected(root_hash=root_hash))) == []
    assert checks(inspect(memory, Expected(root_hash=bytes(32)))) == ["verity-root-differs"]
    alone = tools.disk("verity-alone", [(tools.VERITY, disk.path)])
    assert checks(inspect(alone.memory())) == ["esp-missing", "verity-no-root-hash"]


def test_there_is_an_end_to_findings(findings):
    for number in range(MAX_FINDINGS + 50):
        findings.under("here").add(Check.GPT_DAMAGED, f"{number}", "x")
    assert len(findings) == MAX_FINDINGS + 1
    assert [finding.check for finding in findings][-1] == "findings-left-out"


def test_foreign_text_is_made_printable(findings):
    findings.add(Check.FAT_DAMAGED, "a\x1b[31m\nb", "x" * 1000)
    (found,) = findings
    assert found.place == "a\\x1b[31m\\nb"
    assert len(found.message) == 401
    assert str(found).startswith("fat-damaged: a")


def test_the_names_of_checks_are_distinct_and_plain():
    names = [check.value for check in Check]
    assert len(names) == len(set(names))
    assert all(name.replace("-", "").isalnum() and name == name.lower() for name in names)


def test_more_paths_than_a_closure_has(disk, monkeypatch):
    monkeypatch.setattr("calve.disk.inspect.report._MAX_PATHS", 2)
    names = checks(inspect(disk.memory(), disk.expected))
    assert names == ["tree-too-large", "path-missing"]
