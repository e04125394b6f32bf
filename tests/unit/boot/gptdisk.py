"""GPT disks by sectors, made and read without the code under test: the reader asks what Linux's does (efi.c)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

LINUX_DATA = bytes.fromhex("af3dc60f838472478e793d69d8477de4")
ESP = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")
HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")


@dataclass
class Disk:
    """What is not in `data` is zero."""

    sectors: int
    sector_bytes: int = 512
    data: dict[int, bytes] = field(default_factory=dict)

    @property
    def size_bytes(self):
        return self.sectors * self.sector_bytes

    def read(self, offset, size):
        first, inner = divmod(offset, self.sector_bytes)
        last = min(self.sectors, -(-(offset + size) // self.sector_bytes))
        blank = bytes(self.sector_bytes)
        whole = b"".join(self.data.get(lba, blank) for lba in range(first, last))
        return whole[inner : inner + size]

    def pieces(self, write):
        """Cut a write into its sectors."""
        assert write.offset_bytes % self.sector_bytes == 0
        assert len(write.data) % self.sector_bytes == 0
        first = write.offset_bytes // self.sector_bytes
        for number in range(len(write.data) // self.sector_bytes):
            at = number * self.sector_bytes
            yield first + number, write.data[at : at + self.sector_bytes]

    def put(self, lba, data):
        padded = data.ljust(-(-len(data) // self.sector_bytes) * self.sector_bytes, b"\0")
        for number in range(len(padded) // self.sector_bytes):
            at = number * self.sector_bytes
            self.data[lba + number] = padded[at : at + self.sector_bytes]

    def write(self, writes):
        for write in writes:
            self.data.update(self.pieces(write))

    def copy(self):
        return Disk(self.sectors, self.sector_bytes, dict(self.data))

    def save(self, path):
        with path.open("xb") as file:
            file.truncate(self.size_bytes)
            for lba, data in self.data.items():
                file.seek(lba * self.sector_bytes)
                file.write(data)


def entry(first_lba, last_lba, *, kind=LINUX_DATA, mark=1):
    name = f"part {mark}".encode("utf-16-le").ljust(72, b"\0")
    return kind + bytes([mark]) * 16 + struct.pack("<QQQ", first_lba, last_lba, mark << 48) + name


def header(my_lba, alternate_lba, first, last, entries_lba, raw, *, guid=b"G" * 16, **changes):
    fields = {"signature": b"EFI PART", "revision": 0x10000, "size": 92, "entry_bytes": 128}
    fields |= changes
    count = len(raw) // 128

    def packed(crc):
        return HEADER.pack(
            *(fields["signature"], fields["revision"], fields["size"], crc, 0),
            *(my_lba, alternate_lba, first, last, guid, entries_lba),
            *(fields.get("count", count), fields["entry_bytes"], zlib.crc32(raw)),
        )

    return packed(zlib.crc32(packed(0)))


def mbr(sectors, *, kind=0xEE, first=1, boot_code=b"\xeb\x63"):
    record = struct.pack("<4sB3sII", b"\0\0\2\0", kind, b"\xff\xff\xff", first, sectors - 1)
    return boot_code.ljust(446, b"\x90") + record + bytes(48) + b"\x55\xaa"


def make(sectors, entries, *, sector_bytes=512, entries_lba=2, first_usable=None, **changes):
    """Make a disk; `entries` are 128 bytes each, in the order of their numbers."""
    raw = b"".join(entries)
    size = -(-len(raw) // sector_bytes)
    last = sectors - 1
    usable = (entries_lba + size if first_usable is None else first_usable, last - size - 1)
    disk = Disk(sectors, sector_bytes)
    disk.put(0, mbr(sectors))
    disk.put(1, header(1, last, *usable, entries_lba, raw, **changes))
    disk.put(entries_lba, raw)
    disk.put(last - size, raw)
    disk.put(last, header(last, 1, *usable, last - size, raw, **changes))
    return disk


def simple(sectors=65536, root_end=None, *, sector_bytes=512):
    """Make a disk as images have it: an ESP at 1 MiB, root behind it up to the end."""
    one = (1 << 20) // sector_bytes
    end = sectors - 16384 // sector_bytes - 3 if root_end is None else root_end
    entries = [entry(one, 9 * one - 1, kind=ESP, mark=1), entry(9 * one, end, mark=2)]
    return make(sectors, [*entries, *[bytes(128)] * 126], sector_bytes=sector_bytes)


def linux_reads(disk, lba=1):
    """Return the header's fields and the entries that Linux would take; an error where it would take none."""
    last = disk.sectors - 1
    sector = disk.read(lba * disk.sector_bytes, disk.sector_bytes)
    fields = HEADER.unpack_from(sector)
    signature, _, size, crc, _, my_lba, _, first, end, _, entries_lba, count, one, entries_crc = (
        fields
    )
    assert signature == b"EFI PART"
    assert 92 <= size <= disk.sector_bytes
    assert zlib.crc32(sector[:16] + bytes(4) + sector[20:size]) == crc
    assert my_lba == lba
    assert first <= end <= last
    assert one == 128
    raw = disk.read(entries_lba * disk.sector_bytes, count * one)
    assert zlib.crc32(raw) == entries_crc
    boot = disk.read(0, 512)
    assert (boot[510:], boot[450], boot[454:458]) == (b"\x55\xaa", 0xEE, b"\1\0\0\0")
    return fields, [raw[at : at + 128] for at in range(0, len(raw), 128)]
