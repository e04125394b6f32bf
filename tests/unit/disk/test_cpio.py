"""cpio archives, held against a reader of our own and against busybox."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from dataclasses import dataclass

import pytest

from calve.disk import cpio


@dataclass
class Member:
    name: str
    mode: int
    uid: int
    gid: int
    nlink: int
    mtime: int
    rdev: tuple[int, int]
    data: bytes
    ino: int
    check: int


def read(data):
    """Read "newc" as buffer-format.rst of the kernel says: 110 bytes of hexadecimal, name, data, each padded to 4."""
    members = []
    at = 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        ino, mode, uid, gid, nlink, mtime, size, _, _, major, minor, name_size, check = fields
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at += 110 + name_size
        assert not any(data[at : at + -at % 4])
        at += -at % 4
        content = data[at : at + size]
        assert len(content) == size
        at += size
        assert not any(data[at : at + -at % 4])
        at += -at % 4
        text = name[:-1].decode()
        if text == "TRAILER!!!":
            assert at == len(data)
            return members
        members.append(
            Member(text, mode, uid, gid, nlink, mtime, (major, minor), content, ino, check)
        )


def packed(*entries):
    return b"".join(cpio.archive(entries))


def test_every_kind(tmp_path):
    big = tmp_path / "big"
    big.write_bytes(random.Random(0).randbytes(600_001))
    members = read(
        packed(
            cpio.file("bin/sh", b"#!", executable=True),
            cpio.file("etc/secret", b"s", mode=0o600),
            cpio.file("big", big),
            cpio.file("empty", b""),
            cpio.link("bin/a", "sh"),
            cpio.directory("proc"),
            cpio.device("dev/console", 5, 1),
        )
    )
    found = {member.name: member for member in members}
    assert list(found) == [
        "big", "bin", "bin/a", "bin/sh", "dev", "dev/console", "empty", "etc", "etc/secret", "proc",
    ]  # fmt: skip
    assert found["bin/sh"].mode == stat.S_IFREG | 0o755
    assert found["etc/secret"].mode == stat.S_IFREG | 0o600
    assert found["big"].data == big.read_bytes()
    assert (found["bin/a"].mode, found["bin/a"].data) == (stat.S_IFLNK | 0o777, b"sh")
    assert (found["proc"].mode, found["proc"].nlink) == (stat.S_IFDIR | 0o755, 2)
    console = found["dev/console"]
    assert (console.mode, console.rdev) == (stat.S_IFCHR | 0o600, (5, 1))
    assert {(m.uid, m.gid, m.mtime, m.check) for m in members} == {(0, 0, 0, 0)}
    # The kernel makes hard links of equal inode numbers.
    assert len({member.ino for member in members}) == len(members)


def test_parents_come_first_and_are_made():
    names = [member.name for member in read(packed(cpio.file("a/b/c/d", b"x")))]
    assert names == ["a", "a/b", "a/b/c", "a/b/c/d"]
    mixed = [member.name for member in read(packed(cpio.file("a.b", b""), cpio.file("a/c", b"")))]
    assert mixed.index("a") < mixed.index("a/c")


def test_a_later_entry_wins_and_the_order_does_not_matter():
    one, two = cpio.file("f", b"1"), cpio.file("f", b"2")
    assert [member.data for member in read(packed(one, two))] == [b"2"]
    entries = [cpio.file(f"d{n}/f", b"%d" % n) for n in range(9)]
    assert packed(*entries) == packed(*reversed(entries))


def test_an_empty_archive_has_its_trailer():
    assert read(packed()) == []


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 262_143, 262_144, 262_145])
def test_paddings(tmp_path, size):
    place = tmp_path / "f"
    place.write_bytes(b"x" * size)
    for name in ("n", "nn", "nnn", "nnnn"):
        members = read(packed(cpio.file(name, place), cpio.file("z", b"after")))
        assert [len(member.data) for member in members] == [size, 5]
        assert packed(cpio.file(name, place)) == packed(cpio.file(name, b"x" * size))


def test_a_file_that_changes_while_it_is_read(tmp_path):
    place = tmp_path / "f"
    place.write_bytes(b"x" * 600_000)
    chunks = cpio.archive([cpio.file("f", place)])
    next(chunks)
    os.truncate(place, 10)
    with pytest.raises(OSError, match="shorter"):
        list(chunks)
    with pytest.raises(FileNotFoundError):
        packed(cpio.file("f", tmp_path / "gone"))


def test_busybox_reads_it(tmp_path):
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")
    data = packed(cpio.file("a/f", b"content", executable=True), cpio.link("a/l", "f"))
    subprocess.run(
        [busybox, "cpio", "-i", "-d"], input=data, cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "a/f").read_bytes() == b"content"
    assert os.access(tmp_path / "a/f", os.X_OK)
    assert os.readlink(tmp_path / "a/l") == "f"
