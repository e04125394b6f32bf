"""Package files unpacked: what is written, what is refused."""

from __future__ import annotations

import tarfile

import pytest

from calve.demo.unpack_deb import Unpacker, control, merged, target, wanted
from calve.errors import CancelledError, DamagedError
from calve.tasks import Cancel


def tree_of(directory):
    return {
        str(path.relative_to(directory)): f"-> {path.readlink()}"
        if path.is_symlink()
        else path.read_text()
        for path in directory.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def tree(tmp_path):
    directory = tmp_path / "tree"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_every_compression(suffix, make, member, tree):
    big = "x" * 300_000
    deb = make(
        "a",
        [
            member("./", tarfile.DIRTYPE),
            member("./usr/", tarfile.DIRTYPE),
            ("./usr/share/big", big),
            ("./bin/tool", "t"),
            ("./etc/a.conf", "c"),
        ],
        suffix=suffix,
        Depends="b",
    )
    assert control(deb.path)["Depends"] == "b"
    assert Unpacker(tree).add(deb.path) == 300_002
    assert tree_of(tree) == {"usr/share/big": big, "usr/bin/tool": "t", "etc/a.conf": "c"}


def test_only_the_executable_bit_is_kept(make, member, tree):
    deb = make(
        "a",
        [
            (member("./bin/su", mode=0o4755), b"s"),
            (member("./bin/none", mode=0o000), b"n"),
            (member("./bin/group", mode=0o654), b"g"),
        ],
    )
    Unpacker(tree).add(deb.path)
    modes = {path.name: oct(path.stat().st_mode & 0o7777) for path in (tree / "usr/bin").iterdir()}
    assert modes == {"su": "0o755", "none": "0o644", "group": "0o755"}


def test_what_no_server_reads_is_left_out(make, tree):
    deb = make(
        "a",
        [
            (f"./{path}", "x")
            for path in (
                "usr/share/doc/a/copyright",
                "usr/share/man/man1/a.1",
                "usr/share/locale/de/a.mo",
                "usr/share/info/a",
                "lib/modules/6/a.ko",
                "var/lib/a",
                "boot/vmlinuz",
                "opt/a",
                "usr/share/documents",
                "etc/init.d/a",
                "etc/init.defs",
            )
        ],
    )
    Unpacker(tree).add(deb.path)
    assert sorted(tree_of(tree)) == ["etc/init.defs", "usr/share/documents"]


def test_links(make, member, tree):
    deb = make(
        "a",
        [
            (member("./bin/tool"), b"t"),
            member("./bin/hard", tarfile.LNKTYPE, "./bin/tool"),
            member("./bin/soft", tarfile.SYMTYPE, "tool"),
            member("./usr/lib/dangling", tarfile.SYMTYPE, "../nowhere/at/all"),
        ],
    )
    Unpacker(tree).add(deb.path)
    assert tree_of(tree) == {
        "usr/bin/tool": "t",
        "usr/bin/hard": "t",
        "usr/bin/soft": "-> tool",
        "usr/lib/dangling": "-> ../nowhere/at/all",
    }


@pytest.mark.parametrize(
    ("path", "link", "want"),
    [
        ("usr/lib/a", "b", "b"),
        ("usr/lib/a", "./b", "./b"),
        ("usr/lib/a", "../bin/b", "../bin/b"),
        ("usr/lib/a", "/usr/lib/b", "/usr/lib/b"),
        ("usr/bin/a", "/bin/b", "/usr/bin/b"),
        ("bin/a", "b", "b"),
        ("bin/a", "../usr/bin/b", "b"),
        ("lib/x/a", "../../usr/share/b", "../../share/b"),
        ("usr/lib/a", "../../lib/b", "b"),
        ("usr/lib/x/a", "../../../etc/b", "/etc/b"),
        ("etc/mtab", "../proc/mounts", "/proc/mounts"),
        ("etc/a", "../usr/lib/os-release", "/usr/lib/os-release"),
        ("etc/x/a", "../b", "../b"),
        ("usr/a", "../../../..", "/"),
        ("lib64/ld.so", "/lib/x86_64-linux-gnu/ld.so", "/usr/lib/x86_64-linux-gnu/ld.so"),
    ],
)
def test_link_targets(path, link, want):
    assert target(path, link) == want


@pytest.mark.parametrize(
    ("path", "want"),
    [
        ("bin/a", "usr/bin/a"),
        ("lib", "usr/lib"),
        ("library/a", "library/a"),
        ("usr/bin", "usr/bin"),
    ],
)
def test_merged(path, want):
    assert merged(path) == want


def test_wanted():
    assert wanted("usr/bin/a")
    assert not wanted("usr/share/doc")
    assert not wanted("var/a")
    assert not wanted("usrx")


@pytest.mark.parametrize("name", ["/usr/a", "../a", "./usr/../../a", "usr/x/.."])
def test_paths_that_leave_are_refused(name, make, member, tree):
    deb = make("a", [(member(name), b"x")])
    with pytest.raises(DamagedError, match="leaves the package"):
        Unpacker(tree, lambda _path: True).add(deb.path)
    assert tree_of(tree) == {}


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(kind, make, member, tree):
    deb = make("a", [member("./usr/dev", kind)])
    with pytest.raises(DamagedError, match="neither file"):
        Unpacker(tree).add(deb.path)


def test_nothing_is_written_through_a_symlink(make, member, tree, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    deb = make("a", [member("./usr/x", tarfile.SYMTYPE, str(outside)), (member("./usr/x/a"), b"x")])
    with pytest.raises(DamagedError, match="no directory"):
        Unpacker(tree).add(deb.path)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("name", ["../pool/secret", "/etc/passwd", "usr/missing", "usr/no/dir"])
def test_hard_links_stay_inside(name, make, member, tree):
    deb = make("a", [(member("./usr/a"), b"x"), member("./usr/b", tarfile.LNKTYPE, name)])
    with pytest.raises(DamagedError):
        Unpacker(tree).add(deb.path)


def test_a_hard_link_through_a_symlink_is_refused(make, member, tree, tmp_path):
    (tmp_path / "secret").write_text("s")
    deb = make(
        "a",
        [
            member("./usr/x", tarfile.SYMTYPE, str(tmp_path)),
            member("./usr/b", tarfile.LNKTYPE, "usr/x/secret"),
        ],
    )
    with pytest.raises(DamagedError, match="not here"):
        Unpacker(tree).add(deb.path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE])
def test_a_path_stands_once(kind, make, member, tree):
    unpacker = Unpacker(tree)
    unpacker.add(make("a", [("./usr/a", "1")]).path)
    with pytest.raises(DamagedError, match="exists already"):
        unpacker.add(make("b", [member("./usr/a", kind, "x" * (kind == tarfile.SYMTYPE))]).path)
    assert (tree / "usr/a").read_text() == "1"


def test_packages_share_directories(make, member, tree):
    unpacker = Unpacker(tree)
    unpacker.add(make("a", [member("./usr/share/", tarfile.DIRTYPE), ("./usr/share/a", "1")]).path)
    unpacker.add(make("b", [member("./usr/share/", tarfile.DIRTYPE), ("./usr/share/b", "2")]).path)
    assert tree_of(tree) == {"usr/share/a": "1", "usr/share/b": "2"}


def test_a_file_where_a_directory_should_be(make, member, tree):
    deb = make("a", [("./usr/a", "1"), member("./usr/a/", tarfile.DIRTYPE)])
    with pytest.raises(DamagedError, match="no directory"):
        Unpacker(tree).add(deb.path)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_truncated_packages_are_damaged(suffix, part, make, tree):
    noise = "".join(chr(32 + (7 * i * i + i // 95) % 95) for i in range(60_000))
    deb = make("a", [("./usr/a", noise)], suffix=suffix)
    data = deb.path.read_bytes()
    deb.path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(DamagedError):
        Unpacker(tree).add(deb.path)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_altered_packages_are_damaged(suffix, make, tree):
    deb = make("a", [("./usr/a", "x" * 1000)], suffix=suffix)
    data = deb.path.read_bytes()
    at = data.index(b"data.tar") + 60
    deb.path.write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
    with pytest.raises(DamagedError):
        Unpacker(tree).add(deb.path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"!<arch>\n",
        b"!<arch>\nshort",
        b"<!DOCTYPE html>",
        b"!<arch>\n" + b"debian-binary   " + b" " * 32 + b"x".ljust(10) + b"`\n",
        b"!<arch>\n" + b"data.tar.lz4    " + b" " * 32 + b"0".ljust(10) + b"`\n",
        b"!<arch>\n" + b"data.tar.xz     " + b" " * 32 + b"0".ljust(10) + b"`\n",
    ],
)
def test_what_is_no_package(data, tree, tmp_path):
    path = tmp_path / "x.deb"
    path.write_bytes(data)
    with pytest.raises(DamagedError):
        Unpacker(tree).add(path)
    with pytest.raises(DamagedError):
        control(path)


def test_cancelled(make, tree):
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CancelledError):
        Unpacker(tree, cancel=cancel).add(make("a", [("./usr/a", "1")]).path)
