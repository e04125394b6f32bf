"""EFI programs: systemd's stub with sections that objcopy added, and sections that lie wrong."""

from __future__ import annotations

import struct

import pytest

from calve.disk.inspect import pe, uki
from calve.disk.inspect.findings import FlawError


@pytest.fixture(scope="module")
def pristine(tools):
    return tools.program()


@pytest.fixture
def image(tools, pristine):
    return tools.memory(pristine)


def found(image, findings):
    result = uki.read(image, findings)
    return result, [(finding.check, finding.place) for finding in findings]


def header_at(image):
    return struct.unpack_from("<I", image.data, 60)[0]


def section_at(image, name):
    return image.data.index(name.encode().ljust(8, b"\0"), header_at(image))


def patch(image, name, form, at, *values):
    struct.pack_into(form, image.data, section_at(image, name) + at, *values)


def test_what_objcopy_made(image, findings, tools):
    result, names = found(image, findings)
    assert names == []
    assert result.machine == "x86_64"
    assert result.cmdline == tools.CMDLINE
    assert result.os_release == {
        "ID": "nixos",
        "PRETTY_NAME": "NixOS 26.11 (Yarara)",
        "VERSION_ID": "26.11",
    }
    assert result.uname == "6.12.0"
    assert (result.linux_bytes, result.initrd_bytes) == (100_070, 50_000)
    assert {".text", ".sdmagic", ".linux"} < {section.name for section in result.sections}
    listed = tools.run("objdump", "-h", tools.base / "uki.efi").decode()
    for section in result.sections:
        (line,) = [line.split() for line in listed.splitlines() if f" {section.name} " in line]
        assert int(line[2], 16) == section.content_bytes
        assert int(line[5], 16) == section.file_at


def test_a_stub_without_a_kernel_is_no_image(tools, findings):
    with open("/usr/lib/systemd/boot/efi/systemd-bootx64.efi", "rb") as file:
        image = tools.memory(file.read())
    assert found(image, findings) == (None, [])


def test_a_command_line_that_is_padded(image, findings):
    at = struct.unpack_from("<I", image.data, section_at(image, ".cmdline") + 20)[0]
    image.data[at : at + 12] = b"quiet\n".ljust(12, b"\0")
    patch(image, ".cmdline", "<I", 8, 12)
    result, names = found(image, findings)
    assert (result.cmdline, names) == ("quiet", [])
    image.data[at + 9] = 0x41
    assert found(image, findings)[1] == [("uki-text-damaged", ".cmdline")]


def test_texts_that_are_none(image, findings):
    at = struct.unpack_from("<I", image.data, section_at(image, ".cmdline") + 20)[0]
    image.data[at] = 0xFF
    at = struct.unpack_from("<I", image.data, section_at(image, ".osrel") + 20)[0]
    image.data[at] = ord("\n")
    image.data[at + 12] = ord('"')
    result, names = found(image, findings)
    assert set(names) == {("uki-text-damaged", ".cmdline"), ("uki-text-damaged", ".osrel")}
    assert result.cmdline is None
    assert result.os_release["VERSION_ID"] == "26.11"


def test_a_text_too_long(tools, findings):
    image = tools.memory(tools.program("x" * 70_000, addresses={".uname": 0x50000}))
    result, names = found(image, findings)
    assert (result.cmdline, names) == (None, [("uki-text-damaged", ".cmdline")])


@pytest.mark.parametrize("missing", [".initrd", ".cmdline", ".osrel"])
def test_a_section_that_is_missing(tools, findings, missing):
    names = {".osrel", ".cmdline", ".uname", ".linux", ".initrd"} - {missing}
    result, noted = found(tools.memory(tools.program(names=sorted(names))), findings)
    assert noted == [("uki-section-missing", missing)]
    assert result is not None


def test_a_section_twice(image, findings):
    at = section_at(image, ".uname")
    image.data[at : at + 8] = b".linux\0\0"
    _, names = found(image, findings)
    assert ("uki-section-twice", ".linux") in names


def test_objcopy_puts_sections_upon_each_other(tools, findings):
    """What happens where the addresses of the documentation are kept and the kernel has grown."""
    image = tools.program(addresses={".initrd": 0x2010000})
    _, names = found(tools.memory(image), findings)
    assert ("uki-section-overlaps", ".initrd") in names


def test_overlaps_in_the_file(image, findings):
    other = struct.unpack_from("<I", image.data, section_at(image, ".linux") + 20)[0]
    patch(image, ".initrd", "<I", 20, other + 512)
    assert ("uki-section-overlaps", ".initrd") in found(image, findings)[1]


def test_overlaps_of_the_stub_s_own(image, findings):
    text = struct.unpack_from("<I", image.data, section_at(image, ".text") + 12)[0]
    patch(image, ".reloc", "<I", 12, text)
    assert ("pe-section-overlaps", ".text") in found(image, findings)[1]


@pytest.mark.parametrize(
    ("form", "at", "value"),
    [
        ("<I", 16, 1 << 30),
        ("<I", 20, 1 << 30),
        ("<I", 20, 0),
        ("<I", 8, 1 << 30),
        ("<I", 12, 512),
        ("<I", 12, 0xFFFFFE00),
    ],
)
def test_sections_outside(image, findings, form, at, value):
    patch(image, ".initrd", form, at, value)
    assert ("pe-section-outside", ".initrd") in found(image, findings)[1]


@pytest.mark.parametrize("at", [12, 20])
def test_sections_that_are_not_aligned(image, findings, at):
    value = struct.unpack_from("<I", image.data, section_at(image, ".initrd") + at)[0]
    patch(image, ".initrd", "<I", at, value + 8)
    assert ("pe-section-unaligned", ".initrd") in found(image, findings)[1]


@pytest.mark.parametrize(
    "kernel",
    [b"", b"MZ", b"x" * 5000, b"MZ".ljust(5000, b"\0"), b"MZ".ljust(60, b"\0") + b"\xff" * 9],
)
def test_a_kernel_that_is_no_program(tools, findings, kernel):
    image = tools.program(kernel=kernel or b"\0")
    assert found(tools.memory(image), findings)[1] == [("uki-kernel", ".linux")]


def test_a_kernel_for_another_processor(image, findings):
    at = struct.unpack_from("<I", image.data, section_at(image, ".linux") + 20)[0]
    struct.pack_into("<H", image.data, at + 68, 0xAA64)
    assert found(image, findings)[1] == [("uki-kernel", ".linux")]
    message = next(iter(findings)).message
    assert message == "the kernel is for aarch64, the program around it for x86_64"


def test_other_processors(image, findings):
    struct.pack_into("<H", image.data, header_at(image) + 4, 0xAA64)
    assert pe.read(image, findings).machine == "aarch64"
    struct.pack_into("<H", image.data, header_at(image) + 4, 0x14C)
    assert pe.read(image, findings).machine == "0x014c"


@pytest.mark.parametrize(
    ("form", "at", "value"),
    [
        ("<I", 0, 0),
        ("<H", 6, 0),
        ("<H", 6, 97),
        ("<H", 20, 64),
        ("<H", 24, 0x10B),
        ("<H", 24 + 68, 3),
        ("<I", 24 + 32, 0),
        ("<I", 24 + 36, 3),
        ("<I", 24 + 60, 64),
        ("<I", 24 + 60, 1 << 30),
    ],
)
def test_headers_that_cannot_be(image, findings, form, at, value):
    struct.pack_into(form, image.data, header_at(image) + at, value)
    with pytest.raises(FlawError) as raised:
        uki.read(image, findings)
    assert raised.value.check == "pe-damaged"


@pytest.mark.parametrize(("at", "value"), [(0, 0), (60, 1), (60, 0x7FFFFFFF)])
def test_dos_headers_that_cannot_be(image, findings, at, value):
    struct.pack_into("<I", image.data, at, value)
    with pytest.raises(FlawError, match="no PE file"):
        uki.read(image, findings)


def test_an_entry_point_in_no_section(image, findings):
    struct.pack_into("<I", image.data, header_at(image) + 24 + 16, 0x10)
    assert found(image, findings)[1] == [("pe-damaged", "headers")]
