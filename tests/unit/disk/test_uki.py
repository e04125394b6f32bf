"""Unified kernel images: what objcopy would make of the same parts, and small where the change is small."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess

import pytest

from calve.disk import pe, uki
from calve.disk.arch import AARCH64, X86_64
from calve.errors import CalveError, DamagedError, NotFoundError, UsageError
from calve.tasks import Cancel

BLOCK = 512 << 10
OS_RELEASE = 'ID=calve\nPRETTY_NAME="Calve 1"\n'

needs_stub = pytest.mark.skipif(
    not (uki.STUBS[0] / X86_64.stub).is_file(), reason="systemd-boot-efi is not installed"
)


@pytest.fixture(name="parts")
def _parts(tmp_path, pe_file):
    return make_parts(tmp_path, pe_file)


def make_parts(folder, pe_file, arch=X86_64):
    (folder / "stub").write_bytes(pe_file(arch.machine))
    (folder / "kernel").write_bytes(pe_file(arch.machine) + os.urandom(700_001))
    (folder / "initrd").write_bytes(os.urandom(300_003))
    return uki.Uki(
        arch=arch,
        stub=folder / "stub",
        kernel=folder / "kernel",
        initrd=folder / "initrd",
        command_line="root=LABEL=nixos init=/nix/store/x/init quiet",
        os_release=OS_RELEASE,
        uname="6.12.1",
    )


def contents(path):
    """Return the sections of a file by name, as a loader would have them in memory."""
    data = path.read_bytes()
    image = pe.parse(data, path)
    return {one.name: data[one.offset :][: one.size_bytes] for one in image.sections}


def blocks(path):
    data = path.read_bytes()
    return [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]


def changed(before, after):
    """Return the blocks that differ; both files have the same size."""
    one, other = blocks(before), blocks(after)
    assert len(one) == len(other)
    return [
        number for number, pair in enumerate(zip(one, other, strict=True)) if len(set(pair)) > 1
    ]


@pytest.mark.parametrize("arch", [X86_64, AARCH64], ids=lambda arch: arch.name)
def test_what_is_in_it(tmp_path, pe_file, arch):
    parts = make_parts(tmp_path, pe_file, arch)
    written = uki.write(parts, tmp_path / "out/linux.efi")
    assert written.size_bytes == written.path.stat().st_size
    assert written.size_bytes % (1 << 20) == 0
    assert pe.machine(written.path.read_bytes(), "x") == arch.machine
    found = contents(written.path)
    assert found.pop(".text") + found.pop(".sdmagic")
    assert list(found) == [".osrel", ".uname", ".cmdline", ".linux", ".initrd"]
    assert list(found.values()) == [
        OS_RELEASE.encode(),
        b"6.12.1",
        parts.command_line.encode(),
        parts.kernel.read_bytes(),
        parts.initrd.read_bytes(),
    ]


@needs_stub
def test_its_sections_are_objcopy_s(tmp_path, parts):
    stub = uki.find_stub(X86_64)
    parts = dataclasses.replace(parts, stub=stub)
    written = uki.write(parts, tmp_path / "linux.efi")
    texts = {".osrel": OS_RELEASE, ".uname": "6.12.1", ".cmdline": parts.command_line}
    files = {".linux": parts.kernel, ".initrd": parts.initrd}
    for name, text in texts.items():
        files[name] = tmp_path / f"text{name}"
        files[name].write_text(text)
    argv = ["objcopy"]
    for section in written.sections:
        argv += ["--add-section", f"{section.name}={files[section.name]}"]
        argv += ["--change-section-vma", f"{section.name}={section.address:#x}"]
    subprocess.run([*argv, stub, tmp_path / "theirs.efi"], check=True)
    ours, theirs = (objdump(path) for path in (written.path, tmp_path / "theirs.efi"))
    assert ours == theirs
    assert len(ours) == 13
    assert contents(written.path) == contents(tmp_path / "theirs.efi")


def objdump(path):
    """Return name, size and address of each section."""
    out = subprocess.run(["objdump", "-h", path], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^ *\d+ (\S+) +(\w+)  (\w+)  \w+  \w+  2", out, re.MULTILINE)


def test_the_same_inputs_give_the_same_bytes(tmp_path, parts):
    one, two = (uki.write(parts, tmp_path / name).path for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "change",
    [
        {"command_line": "x"},
        {"command_line": "debug " + "y" * 2041},
        {"os_release": "ID=other\n" * 400},
        {"uname": "6.12.1-a-longer-name"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_small_change_stays_in_the_first_block(tmp_path, parts, change):
    before = uki.write(parts, tmp_path / "before").path
    after = uki.write(dataclasses.replace(parts, **change), tmp_path / "after").path
    assert changed(before, after) == [0]


def test_another_initrd_changes_neither_the_kernel_nor_the_size(tmp_path, parts):
    before = uki.write(parts, tmp_path / "before")
    parts.initrd.write_bytes(os.urandom(301_000))
    after = uki.write(parts, tmp_path / "after")
    assert after.size_bytes == before.size_bytes
    assert [one.offset for one in after.sections] == [one.offset for one in before.sections]
    # Size and content of the initrd: the headers, and the blocks that it has.
    first = after.sections[-1].offset // BLOCK
    assert changed(before.path, after.path) == [0, *range(first, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command_line": ""}, "empty"),
        ({"command_line": "a" * 2048}, "2048 bytes, of which a kernel reads 2047"),
        ({"command_line": "a\0b"}, "NUL"),
        ({"command_line": "a\nb"}, "printable ASCII"),
        ({"command_line": "ünit"}, "printable ASCII"),
        ({"os_release": ""}, "os-release is empty"),
        ({"arch": AARCH64}, "no stub for aarch64"),
    ],
)
def test_what_cannot_go_in(tmp_path, parts, change, message):
    with pytest.raises(UsageError, match=message):
        uki.write(dataclasses.replace(parts, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_release_that_nobody_knows_is_left_out(tmp_path, parts):
    written = uki.write(dataclasses.replace(parts, uname=""), tmp_path / "out")
    assert list(contents(written.path))[-4:] == [".osrel", ".cmdline", ".linux", ".initrd"]


@pytest.mark.parametrize(
    ("at", "text", "release"),
    [
        (0x3000, b"6.12.1 (build@host) #1 SMP\0rest", "6.12.1"),
        (0x3000, b"6.12.1\0", "6.12.1"),
        (0x3000, b"\xff\0", ""),
        (0x3000, b"a\nb\0", ""),
        (0, b"6.12.1\0", ""),
        (0xFFFF, b"6.12.1\0", ""),
    ],
)
def test_a_bzimage_says_its_release(tmp_path, at, text, release):
    kernel = bytearray(0x4000)
    kernel[0x202:0x206] = b"HdrS"
    kernel[0x20E:0x210] = at.to_bytes(2, "little")
    kernel[0x3200 : 0x3200 + len(text)] = text
    (tmp_path / "bzImage").write_bytes(kernel)
    assert uki.kernel_release(tmp_path / "bzImage") == release


def test_no_other_kernel_says_it(tmp_path, parts):
    assert uki.kernel_release(parts.kernel) == ""


def test_a_command_line_that_just_fits(tmp_path, parts):
    line = "a" * 2047
    written = uki.write(dataclasses.replace(parts, command_line=line), tmp_path / "out")
    assert contents(written.path)[".cmdline"] == line.encode()


@pytest.mark.parametrize("part", ["stub", "kernel", "initrd"])
def test_a_part_that_is_not_there_or_empty(tmp_path, parts, part):
    place = getattr(parts, part)
    place.write_bytes(b"")
    with pytest.raises(UsageError, match="empty"):
        uki.write(parts, tmp_path / "out")
    place.unlink()
    with pytest.raises(UsageError, match="No such file") as caught:
        uki.write(parts, tmp_path / "out")
    assert caught.value.place == str(place)


def test_a_kernel_for_another_processor(tmp_path, parts, pe_file):
    parts.kernel.write_bytes(pe_file(AARCH64.machine))
    with pytest.raises(UsageError, match="no kernel for x86_64"):
        uki.write(parts, tmp_path / "out")
    parts.kernel.write_bytes(b"\x7fELF" + bytes(1000))
    with pytest.raises(DamagedError, match="no PE file"):
        uki.write(parts, tmp_path / "out")


def test_a_stub_that_is_none(tmp_path, parts, pe_file):
    parts.stub.write_bytes(pe_file(sections=((".text", b"x"),)))
    with pytest.raises(UsageError, match="not systemd's stub"):
        uki.write(parts, tmp_path / "out")
    parts.stub.write_bytes(pe_file(tail=bytes(5 << 20)))
    with pytest.raises(UsageError, match="too large"):
        uki.write(parts, tmp_path / "out")


def test_what_was_there_stays_where_it_fails(tmp_path, parts):
    (tmp_path / "out").write_bytes(b"older")
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CalveError, match="interrupted"):
        uki.write(parts, tmp_path / "out", cancel=cancel)
    assert (tmp_path / "out").read_bytes() == b"older"
    assert not list(tmp_path.glob(".*"))


def test_a_stub_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(uki, "STUBS", (tmp_path,))
    with pytest.raises(NotFoundError) as caught:
        uki.find_stub(AARCH64)
    assert "linuxaa64.efi.stub" in caught.value.message
    assert "systemd-boot-efi" in caught.value.hint


@needs_stub
@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils is not installed")
def test_the_installed_stub_has_room():
    image = pe.parse(uki.find_stub(X86_64).read_bytes(), "stub")
    assert image.table + (len(image.sections) + 5) * 40 <= image.headers_bytes
