"""PE files made up: enough of one for a stub or a kernel, of either processor."""

from __future__ import annotations

import struct

import pytest

ALIGN = 512


def pe_file(
    machine=0x8664,
    sections=((".text", b"code" * 300), (".sdmagic", b"#### LoaderInfo: systemd-stub ####")),
    headers=1024,
    tail=b"",
    alignment=ALIGN,
    certificate=(0, 0),
):
    """Return a PE32+ file; `tail` is what lies behind its last section."""
    at = max(headers, 4096)
    table, body = b"", b""
    for name, content in sections:
        room = -(-len(content) // ALIGN) * ALIGN
        table += struct.pack(
            "<8sIIIIIIHHI",
            *(name.encode(), len(content), at, room, headers + len(body)),
            *(0, 0, 0, 0, 0x60000020),
        )
        body += content.ljust(room, b"\0")
        at += -(-len(content) // 4096) * 4096
    optional = bytearray(240)
    struct.pack_into("<HBBIIIII", optional, 0, 0x20B, 2, 40, 512, 1024, 0, 4096, 4096)
    struct.pack_into("<QII", optional, 24, 0, alignment, ALIGN)
    struct.pack_into("<IIIH", optional, 56, at, headers, 0xBAD, 10)
    struct.pack_into("<I", optional, 108, 16)
    struct.pack_into("<II", optional, 112 + 8 * 4, *certificate)
    start = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + b"PE\0\0"
    coff = struct.pack("<HHIIIHH", machine, len(sections), 0, 9, 9, len(optional), 0x206)
    return (start + coff + optional + table).ljust(headers, b"\0") + body + tail


@pytest.fixture(name="pe_file", scope="session")
def _pe_file():
    return pe_file
