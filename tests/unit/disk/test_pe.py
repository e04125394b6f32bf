"""PE files: what is added lies apart from what is there, and damage is an error that names the file."""

from __future__ import annotations

import struct

import pytest

from calve.disk import pe
from calve.errors import DamagedError, UsageError


def built(stub, *additions):
    head, sections = pe.extend(stub, additions, "stub")
    end = sections[-1].offset + sections[-1].room_bytes
    return head.ljust(end, b"\0"), sections


def test_reading(pe_file):
    image = pe.parse(pe_file(), "stub")
    assert image.machine == pe.machine(pe_file(), "stub") == 0x8664
    assert [(one.name, one.size_bytes, one.room_bytes) for one in image.sections] == [
        (".text", 1200, 1536),
        (".sdmagic", 34, 512),
    ]
    assert (image.headers_bytes, image.section_alignment, image.file_alignment) == (1024, 512, 512)


def test_additions_come_behind_what_is_there(pe_file):
    stub = pe_file(tail=b"symbols", certificate=(3072, 7))
    data, added = built(stub, pe.Addition(".a", 5, 4096), pe.Addition(".b", 600))
    before = pe.parse(stub, "stub")
    after = pe.parse(data, "new")
    assert after.sections == (*before.sections, *added)
    assert [(one.name, one.size_bytes, one.room_bytes) for one in added] == [
        (".a", 5, 4096),
        (".b", 600, 1024),
    ]
    assert added[0].offset == 3072
    assert added[1].offset == added[0].offset + 4096
    assert all(one.address % 4096 == 0 for one in added)
    assert added[0].address >= before.image_bytes
    assert after.image_bytes == added[1].address + 4096
    # Content of the old sections is as it was; symbols, signature and checksum are gone.
    assert data[1024:3072] == stub[1024:3072]
    assert b"symbols" not in data
    assert struct.unpack_from("<II", data, after.coff + 8) == (0, 0)
    assert struct.unpack_from("<I", data, after.optional + 64) == (0,)
    assert struct.unpack_from("<II", data, after.optional + 112 + 32) == (0, 0)
    assert struct.unpack_from("<I", data, after.optional + 8) == (1024 + 5120,)


def test_a_room_is_one_in_memory_too(pe_file):
    _, added = built(pe_file(), pe.Addition(".a", 5, 3 * 4096), pe.Addition(".b", 5))
    assert added[1].address - added[0].address == 3 * 4096


def test_alignment_of_the_file_s_own(pe_file):
    data, added = built(pe_file(alignment=16384), pe.Addition(".a", 5), pe.Addition(".b", 5))
    assert added[1].address - added[0].address == 16384
    assert pe.parse(data, "x").image_bytes % 16384 == 0


def test_headers_without_room(pe_file):
    small = pe_file(headers=512)
    used = 64 + 24 + 240 + 2 * 40
    count = (512 - used) // 40
    additions = [pe.Addition(f".{number}", 1) for number in range(count)]
    assert len(pe.parse(built(small, *additions)[0], "x").sections) == 2 + count
    with pytest.raises(UsageError, match="no room") as caught:
        pe.extend(small, [*additions, pe.Addition(".more", 1)], "stub")
    assert caught.value.place == "stub"


@pytest.mark.parametrize(
    ("additions", "message"),
    [
        ([pe.Addition(".text", 1)], "has a section .text already"),
        ([pe.Addition(".a", 1), pe.Addition(".a", 1)], "has a section .a already"),
        ([pe.Addition(".123456789", 1)], "cannot be a section"),
        ([pe.Addition(".a", 0)], "cannot be a section"),
        ([pe.Addition(".a", 1 << 32)], "4 GiB"),
    ],
)
def test_additions_that_cannot_be(pe_file, additions, message):
    with pytest.raises(UsageError, match=message):
        pe.extend(pe_file(), additions, "stub")


def changed(pe_file, at, new):
    data = bytearray(pe_file())
    data[at : at + len(new)] = new
    return bytes(data)


COFF = 68
OPTIONAL = COFF + 20
TABLE = OPTIONAL + 240


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"ZM", "no PE file"),
        (60, b"\xff\xff\xff\xff", "no PE file"),
        (64, b"NE", "no PE file"),
        (COFF + 2, b"\xff\xff", "more than a PE file has"),
        (OPTIONAL, b"\x0b\x01", "no PE32"),
        (COFF + 16, b"\x20\0", "no PE32"),
        (OPTIONAL + 108, b"\xff\0\0\0", "no PE32"),
        (OPTIONAL + 32, b"\0\0", "power of two"),
        (OPTIONAL + 36, b"\x01\x02", "power of two"),
        (OPTIONAL + 60, b"\x80\x01", "no room"),
        (OPTIONAL + 56, b"\0\x10\0\0", "beyond the end of the image"),
        (TABLE, b"/4\0\0\0", "string table"),
        (TABLE + 12, b"\0\0\0\0", ".text lies over"),
        (TABLE + 40 + 12, b"\0\x10\0\0", "lies over"),
        (TABLE + 40 + 20, b"\0\x04\0\0", "lies over"),
    ],
)
def test_damage(pe_file, at, new, message):
    with pytest.raises(DamagedError, match=message) as caught:
        pe.parse(changed(pe_file, at, new), "the file")
    assert caught.value.place == "the file"


def test_files_that_are_cut_short(pe_file):
    whole = pe_file()
    for size in (0, 1, 2, 62, 65, 70, 100, 330, 400):
        with pytest.raises(DamagedError):
            pe.parse(whole[:size], "x")
    with pytest.raises(DamagedError, match="cut short"):
        pe.machine(whole[:68], "x")
    with pytest.raises(DamagedError, match="cut short"):
        pe.extend(whole[:-100], [pe.Addition(".a", 1)], "x")
