"""FAT: what mkfs.vfat and mtools made, and each way in which it can be wrong."""

from __future__ import annotations

import random
import struct

import pytest

from calve.disk.inspect import fat
from calve.errors import DamagedError

RNG = random.Random(5)
MIB = 1 << 20
FILES = {
    "EFI/BOOT/BOOTX64.EFI": RNG.randbytes(100_001),
    "EFI/Linux/a long name, with spaces and ünïcode.efi": RNG.randbytes(5000),
    "EFI/Linux/lower.efi": b"x",
    "EFI/Linux/empty": b"",
    "loader/loader.conf": b"timeout 0\n",
    **{f"many/file number {number}.txt": b"%d" % number for number in range(60)},
}
FORMS = [
    (32, 40, ()),
    (32, 80, ("-S", "1024", "-s", "1")),
    (32, 64, ("-s", "1", "-f", "1")),
    (16, 40, ()),
    (16, 20, ("-s", "8", "-r", "128")),
]


@pytest.fixture(scope="module")
def made(tools):
    """Make a file system once for each form."""
    images = {}

    def make(form):
        if form not in images:
            bits, size, options = form
            esp = tools.esp(FILES, bits=bits, size=size * MIB, options=options)
            images[form] = esp.read_bytes()
        return tools.memory(images[form])

    return make


@pytest.fixture(params=[FORMS[0], FORMS[4]], ids=["fat32", "fat16"])
def esp(made, request):
    return made(request.param)


@pytest.fixture
def fat32(made):
    return made(FORMS[0])


class Map:
    """Where things are, by the boot sector's own numbers."""

    def __init__(self, data):
        sector, self.per, reserved, fats, root = struct.unpack_from("<HBHBH", data, 11)
        self.bits = 32 if struct.unpack_from("<H", data, 22)[0] == 0 else 16
        sectors = struct.unpack_from("<I", data, 36)[0] or 0
        if self.bits == 16:
            sectors = struct.unpack_from("<H", data, 22)[0]
        self.data = data
        self.fats = [(reserved + n * sectors) * sector for n in range(fats)]
        self.root = (reserved + fats * sectors) * sector
        self.first = self.root + root * 32
        self.cluster_bytes = self.per * sector

    def cluster(self, number):
        return self.first + (number - 2) * self.cluster_bytes

    def set(self, cluster, value):
        form = "<I" if self.bits == 32 else "<H"
        for start in self.fats:
            struct.pack_into(form, self.data, start + cluster * self.bits // 8, value)

    def get(self, cluster):
        form = "<I" if self.bits == 32 else "<H"
        return struct.unpack_from(form, self.data, self.fats[0] + cluster * self.bits // 8)[0]

    def entry(self, short):
        """Return where the directory entry with a short name is."""
        at = self.data.index(short, self.root)
        assert at % 32 == 0
        return at

    def first_cluster(self, short):
        at = self.entry(short)
        low, high = struct.unpack_from("<H", self.data, at + 26)[0], 0
        high = struct.unpack_from("<H", self.data, at + 20)[0]
        return low | high << 16


BOOT = b"BOOTX64 EFI"


def found(esp, findings):
    result = fat.read(esp, findings)
    return result, [finding.check for finding in findings]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_the_tools_made(made, findings, form):
    result, names = found(made(form), findings)
    assert names == []
    assert (result.bits, result.label) == (form[0], "ESP")
    assert {file.path: file.size for file in result.files} == {
        path: len(content) for path, content in FILES.items()
    }
    for file in result.files:
        assert file.read(0, file.size) == FILES[file.path]
    boot = result.find("efi/boot/bootx64.efi")
    assert boot.path == "EFI/BOOT/BOOTX64.EFI"
    assert boot.read(70_000, 5000) == FILES[boot.path][70_000:75_000]
    assert result.find("EFI/BOOT/BOOTAA64.EFI") is None
    for at, count in ((0, boot.size + 1), (-1, 1), (boot.size, 1)):
        with pytest.raises(DamagedError, match="outside"):
            boot.read(at, count)


def test_a_fat32_that_its_size_makes_fat16(tools, findings):
    """mkfs.vfat makes FAT32 of any size on demand; firmware that counts clusters reads it wrongly."""
    image = tools.esp({}, size=20 * MIB, options=("-s", "8"))
    result, names = found(tools.memory(image.read_bytes()), findings)
    assert (result.bits, names) == (32, ["fat-type"])


def test_files_in_pieces(tools, findings):
    """Files written into the gaps that others left lie in many runs."""
    image = tools.esp({f"f{n}": bytes([n]) * 600 for n in range(100)}, bits=16)
    for number in range(0, 100, 2):
        tools.run("mdel", "-i", image, f"::f{number}")
    content = RNG.randbytes(200_000)
    (tools.base / "large").write_bytes(content)
    tools.run("mcopy", "-i", image, tools.base / "large", "::large")
    result, names = found(tools.memory(image.read_bytes()), findings)
    assert names == []
    large = result.find("large")
    assert len(large.starts) > 10
    assert large.read(0, large.size) == content
    for _ in range(50):
        at, end = sorted(RNG.sample(range(large.size + 1), 2))
        assert large.read(at, end - at) == content[at:end]


@pytest.mark.parametrize(
    ("form", "at", "value"),
    [
        ("<H", 510, 0),
        ("<H", 11, 500),
        ("<H", 11, 0),
        ("<B", 13, 0),
        ("<B", 13, 3),
        ("<H", 14, 0),
        ("<B", 16, 0),
        ("<B", 16, 200),
        ("<H", 17, 7),
        ("<I", 32, 0xFFFFFFFF),
        ("<I", 32, 100),
        ("<I", 32, 0),
        ("<I", 36, 3),
        ("<I", 36, 0),
        ("<H", 42, 1),
        ("<H", 48, 500),
        ("<H", 50, 32),
    ],
)
def test_boot_sectors_that_cannot_be(fat32, findings, form, at, value):
    struct.pack_into(form, fat32.data, at, value)
    assert found(fat32, findings) == (None, ["fat-damaged"])


def test_fat12_and_giants_are_refused(tools, findings):
    esp = tools.memory(tools.esp({}, bits=12, size=2 * MIB).read_bytes())
    assert found(esp, findings) == (None, ["fat-damaged"])

    class Giant:
        size = 1 << 43

        def read(self, at, count):
            head = struct.pack(
                "<3s8sHBHBHHBHHHII", b"", b"", 512, 1, 32, 1, 0, 0, 0, 0, 0, 0, 0, 0xFFFFFFF0
            )
            return (head + struct.pack("<IHHIHH", 1 << 25, 0, 0, 2, 1, 6)).ljust(
                510, b"\0"
            ) + b"\x55\xaa"

    assert found(Giant(), type(findings)()) == (None, ["fat-damaged"])


def test_the_copy_of_the_boot_sector(fat32, findings):
    fat32.data[6 * 512 + 3] ^= 1
    assert found(fat32, findings)[1] == ["fat-backup-differs"]


@pytest.mark.parametrize("at", [0, 484, 510, 488, 492])
def test_fsinfo(fat32, findings, at):
    struct.pack_into("<I" if at != 510 else "<H", fat32.data, 512 + at, 0x1234)
    names = found(fat32, findings)[1]
    assert names == (["fat-fsinfo"] if at != 492 else [])


def test_fsinfo_may_not_know(fat32, findings):
    struct.pack_into("<II", fat32.data, 512 + 488, 0xFFFFFFFF, 0xFFFFFFFF)
    assert found(fat32, findings)[1] == []
    struct.pack_into("<I", fat32.data, 512 + 492, 0x0FFFFFFF)
    assert found(fat32, findings)[1] == ["fat-fsinfo"]


def test_copies_of_the_table_differ(esp, findings):
    where = Map(esp.data)
    esp.data[where.fats[1] + 4000] ^= 1
    assert found(esp, findings)[1] == ["fat-copies-differ"]


@pytest.mark.parametrize("value", [0xFFFFFFF8 ^ 1, 0, 0xFFFFFF00])
def test_a_table_of_another_medium(esp, findings, value):
    """As where the boot sector says a place that is none: an empty file system otherwise."""
    Map(esp.data).set(0, value & (0xFFFFFFF if Map(esp.data).bits == 32 else 0xFFFF))
    assert found(esp, findings)[1] == ["fat-damaged"]


def test_a_file_system_that_was_not_unmounted(esp, findings):
    where = Map(esp.data)
    start = 37 if where.bits == 16 else 65
    for at in (start, 6 * 512 + start):
        if where.bits == 32 or at == start:
            esp.data[at] |= 1
    assert found(esp, findings)[1] == ["fat-not-clean"]
    esp.data[start] &= 0xFE
    if where.bits == 32:
        esp.data[6 * 512 + start] &= 0xFE
    for bit in (1, 2):
        value = where.get(1)
        where.set(1, value & ~(1 << (where.bits - (0 if where.bits == 16 else 4) - bit)))
        other = type(findings)()
        assert found(esp, other)[1] == ["fat-not-clean"]
        where.set(1, value)


def test_the_upper_half_of_a_cluster_s_number(esp, findings):
    """It is another field in FAT16."""
    where = Map(esp.data)
    struct.pack_into("<H", esp.data, where.entry(BOOT) + 20, 1)
    names = found(esp, findings)[1]
    assert (names == []) == (where.bits == 16)


def test_two_chains_meet(esp, findings):
    where = Map(esp.data)
    first = where.first_cluster(BOOT)
    second = where.first_cluster(b"LOWER   EFI")
    struct.pack_into("<I", esp.data, where.entry(b"LOWER   EFI") + 28, 3 * where.cluster_bytes)
    where.set(second, first + 1)
    names = found(esp, findings)[1]
    assert "fat-chain-crossed" in names
    place = next(finding.place for finding in findings if "crossed" in finding.check)
    assert place == "EFI/Linux/lower.efi"


def test_a_chain_that_ends_nowhere(esp, findings):
    where = Map(esp.data)
    first = where.first_cluster(BOOT)
    where.set(first + 1, first)
    assert found(esp, findings)[1][0] == "fat-chain-crossed"


@pytest.mark.parametrize("value", [0, 1, 0x0FFFFFF7, 0x0FFFFFF0, 200_000])
def test_a_chain_that_leads_outside(fat32, findings, value):
    where = Map(fat32.data)
    where.set(where.first_cluster(BOOT), value)
    names = found(fat32, findings)[1]
    assert names[0] == "fat-chain-damaged"


@pytest.mark.parametrize("size", [0, 1, 90_000, 110_000, 1 << 31])
def test_a_size_that_the_chain_does_not_have(esp, findings, size):
    where = Map(esp.data)
    struct.pack_into("<I", esp.data, where.entry(BOOT) + 28, size)
    assert found(esp, findings)[1][0] == "fat-chain-length"
    if size < len(FILES["EFI/BOOT/BOOTX64.EFI"]):  # it is not followed any further
        wanted = -(-size // where.cluster_bytes)
        message = f"more than the {wanted} clusters that it may have"
        assert next(iter(findings)).message == message


def test_clusters_that_nobody_has(esp, findings):
    where = Map(esp.data)
    last = 4500
    assert where.get(last) == 0
    where.set(last, 0xFFFFFFF if where.bits == 32 else 0xFFFF)
    names = found(esp, findings)[1]
    assert names[0] == "fat-clusters-lost"
    assert "1 clusters" in next(iter(findings)).message
    assert names[1:] == (["fat-fsinfo"] if where.bits == 32 else [])


@pytest.mark.parametrize("fewer", range(8))
def test_the_last_cluster_of_any_number(esp, findings, fewer):
    where = Map(esp.data)
    at = 19 if struct.unpack_from("<H", esp.data, 19)[0] else 32
    form = "<H" if at == 19 else "<I"
    (total,) = struct.unpack_from(form, esp.data, at)
    total -= fewer * where.per
    for start in (0, 6 * 512)[: 1 if where.bits == 16 else 2]:
        struct.pack_into(form, esp.data, start + at, total)
    last = (total * 512 - where.first) // where.cluster_bytes + 1
    where.set(last, 0xFFFFFFF if where.bits == 32 else 0xFFFF)
    assert found(esp, findings)[1][0] == "fat-clusters-lost"
    assert f"from cluster {last} on" in next(iter(findings)).message


def test_directories_too_deep_and_too_many(tools, findings, monkeypatch):
    image = tools.esp({"/".join("d" * depth) + "/f": b"x" for depth in (15, 17)}, bits=16)
    esp = tools.memory(image.read_bytes())
    result, names = found(esp, findings)
    assert names[0] == "fat-directory-damaged"
    assert [file.path.count("/") for file in result.files] == [15]
    monkeypatch.setattr(fat, "_MAX_NODES", 10)
    other = type(findings)()
    assert "fat-directory-damaged" in found(esp, other)[1]
    assert next(iter(other)).message == "more than 10 files and directories"


def test_broken_clusters_are_not_lost(esp, findings):
    where = Map(esp.data)
    where.set(4500, 0xFFFFFF7 if where.bits == 32 else 0xFFF7)
    assert found(esp, findings)[1] == (["fat-fsinfo"] if where.bits == 32 else [])


def test_a_directory_that_contains_itself(esp, findings):
    where = Map(esp.data)
    inside = where.first_cluster(b"LINUX      ")
    at = where.entry(b"LOWER   EFI")
    esp.data[at + 11] = 0x10
    struct.pack_into("<H", esp.data, at + 26, inside)
    struct.pack_into("<I", esp.data, at + 28, 0)
    assert "fat-chain-crossed" in found(esp, findings)[1]


def test_dots_that_lead_elsewhere(esp, findings):
    where = Map(esp.data)
    inside = where.cluster(where.first_cluster(b"LINUX      "))
    assert esp.data[inside : inside + 2] == b". "
    struct.pack_into("<H", esp.data, inside + 26, 9)
    struct.pack_into("<H", esp.data, inside + 32 + 26, 9)
    assert found(esp, findings)[1] == ["fat-directory-damaged"] * 2


def test_a_directory_without_dots(esp, findings):
    where = Map(esp.data)
    inside = where.cluster(where.first_cluster(b"LINUX      "))
    esp.data[inside] = esp.data[inside + 32] = 0xE5
    assert found(esp, findings)[1] == ["fat-directory-damaged"]
    assert next(iter(findings)).message == "it has no entry . and no .."


def test_two_of_one_name(esp, findings):
    where = Map(esp.data)
    at = where.entry(b"EMPTY      ")
    esp.data[at : at + 11] = b"LOWER   EFI"
    assert "fat-directory-damaged" in found(esp, findings)[1]


@pytest.mark.parametrize("name", [b"A/B     EFI", b"A\x01B     EFI", b'A"B     EFI'])
def test_names_that_are_none(esp, findings, name):
    where = Map(esp.data)
    at = where.entry(BOOT)
    esp.data[at : at + 11] = name
    names = found(esp, findings)[1]
    assert names[0] == "fat-directory-damaged"


@pytest.mark.parametrize(("back", "offset"), [(32, 0), (32, 13), (32, 27), (64, 0), (64, 13)])
def test_long_names_that_are_not_their_own(esp, findings, back, offset):
    where = Map(esp.data)
    (short,) = [at for at in _entries(where, b"LINUX      ") if esp.data[at : at + 6] == b"ALONGN"]
    esp.data[short - back + offset] ^= 0x20
    result, names = found(esp, findings)
    assert names == ["fat-long-name"]
    assert any(file.path.startswith("EFI/Linux/ALONGN~1") for file in result.files)


def _entries(where, directory):
    at = where.cluster(where.first_cluster(directory))
    return range(at, at + 4096, 32)


def test_a_long_name_at_the_end(esp, findings):
    where = Map(esp.data)
    at = where.entry(BOOT)
    esp.data[at + 11] = 0x0F
    assert "fat-long-name" in found(esp, findings)[1]


@pytest.mark.parametrize("size", [0, 100, 512, 30_000, MIB])
def test_a_file_system_that_is_cut(esp, findings, size):
    del esp.data[size:]
    assert found(esp, findings) == (None, ["fat-damaged"])
