from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from calve.errors import CalveError, DamagedError, SpaceError
from calve.nix.nar import Directory, End, Event, File, Symlink
from calve.nix.unpack import Unpacked, canonical, unpack


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "store").mkdir()
    fd = os.open(tmp_path / "store", os.O_RDONLY)
    yield fd
    os.close(fd)


def open_fds() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o011])
def test_tree_with_canonical_metadata(parent: int, tmp_path: Path, umask: int) -> None:
    before = len(open_fds())
    mask = os.umask(umask)
    try:
        result = unpack(
            [
                Directory(b""),
                Directory(b"bin"),
                File(b"run", 4, executable=True),
                b"#!",
                b"/x",
                End(),
                File(b"data\xff", 0, executable=False),
                File(b"data\xffb", 1, executable=False),
                b"x",
                Symlink(b"link", b"/nowhere"),
                End(),
            ],
            parent,
            "name",
        )
    finally:
        os.umask(mask)
    assert result == Unpacked(files=3, bytes=5)
    assert canonical(parent, "name")
    assert len(open_fds()) == before
    top = tmp_path / "store/name"
    assert (top / "bin/run").read_bytes() == b"#!/x"
    assert os.readlink(top / "link") == "/nowhere"
    modes = {
        os.fsencode(path.relative_to(top)): stat.S_IMODE(path.lstat().st_mode)
        for path in [top, *top.rglob("*")]
        if not path.is_symlink()
    }
    assert modes == {
        b".": 0o555,
        b"bin": 0o555,
        b"bin/run": 0o555,
        b"data\xff": 0o444,
        b"data\xffb": 0o444,
    }
    assert {path.lstat().st_mtime_ns for path in [top, *top.rglob("*")]} == {1_000_000_000}


@pytest.mark.parametrize(
    "event", [File(b"", 0, executable=False), Symlink(b"", b"x")], ids=["file", "symlink"]
)
def test_roots_that_are_no_directory(parent: int, tmp_path: Path, event: Event) -> None:
    unpack([event], parent, "name")
    assert (tmp_path / "store/name").lstat().st_mtime == 1


@pytest.mark.parametrize("name", [b"", b".", b"..", b"../x", b"/etc/x", b"a/b", b"a\0b"], ids=repr)
def test_never_leaves_its_directory(parent: int, tmp_path: Path, name: bytes) -> None:
    for event in (Directory(name), File(name, 0, executable=False), Symlink(name, b"x")):
        with pytest.raises(DamagedError):
            unpack([Directory(b""), event, End(), End()], parent, "name")
        assert list(tmp_path.iterdir()) == [tmp_path / "store"]
        assert list((tmp_path / "store/name").iterdir()) == []
        (tmp_path / "store/name").rmdir()


@pytest.mark.parametrize("target", [b"", b"a\0b", b"a" * 4096], ids=["empty", "NUL", "long"])
def test_targets_that_no_symlink_has(parent: int, target: bytes) -> None:
    with pytest.raises(DamagedError):
        unpack([Symlink(b"", target)], parent, "name")


def test_does_not_follow_a_symlink_of_its_own(parent: int, tmp_path: Path) -> None:
    """A link, then a directory of the same name: the reader refuses it; so does the writer."""
    (tmp_path / "outside").mkdir()
    for event in (Directory(b"a"), File(b"a", 0, executable=False)):
        with pytest.raises(CalveError):
            unpack(
                [Directory(b""), Symlink(b"a", b"../../outside"), event, End(), End()],
                parent,
                f"name-{type(event).__name__}",
            )
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "dangling", "directory"])
def test_never_overwrites(parent: int, tmp_path: Path, kind: str) -> None:
    there = tmp_path / "store/name"
    if kind == "file":
        there.write_text("mine")
    elif kind == "dangling":
        there.symlink_to(tmp_path / "elsewhere")
    else:
        there.mkdir()
    for event in (File(b"", 1, executable=False), Directory(b""), Symlink(b"", b"x")):
        with pytest.raises(CalveError, match="exists"):
            unpack([event], parent, "name")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "events",
    [
        [],
        [Directory(b"")],
        [End()],
        [File(b"", 2, executable=False), b"a"],
        [File(b"", 1, executable=False), b"ab"],
        [File(b"", 0, executable=False), b"a"],
        [Symlink(b"", b"x"), Symlink(b"", b"x")],
        [Directory(b""), End(), Directory(b"")],
        [Directory(b""), File(b"a", 1, executable=False), End()],
        [Directory(b""), b"a", End()],
    ],
)
def test_events_that_make_no_tree(parent: int, events: list[Event]) -> None:
    before = len(open_fds())
    with pytest.raises(DamagedError):
        unpack(events, parent, "name")
    assert len(open_fds()) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(parent: int, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def write(fd: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", write)
    before = len(open_fds())
    with pytest.raises(SpaceError) as caught:
        unpack([Directory(b""), File(b"a", 1, executable=False), b"a", End()], parent, "name")
    assert caught.value.hint
    assert len(open_fds()) == before


def test_short_writes_are_completed(
    parent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    unpack([File(b"", 10, executable=False), b"0123456789"], parent, "name")
    monkeypatch.undo()
    assert (tmp_path / "store/name").read_bytes() == b"0123456789"


def test_errors_of_the_events_pass(parent: int) -> None:
    def events() -> Iterator[Event]:
        yield Directory(b"")
        raise DamagedError("cut off")

    with pytest.raises(DamagedError, match="cut off"):
        unpack(events(), parent, "name")
