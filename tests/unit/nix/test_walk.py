"""A tree's events without a NAR, held against those of its NAR."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest

from calve.errors import ConflictError, DamagedError, NotFoundError, UsageError
from calve.nix import nar
from calve.nix.hashes import Hash
from calve.nix.nar import Event, File
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath
from calve.nix.walk import checked, walk


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "d" / "e").mkdir(parents=True)
    (top / "empty").write_bytes(b"")
    (top / "d" / "f").write_bytes(os.urandom(300_000))
    (top / "p").write_bytes(b"#!")
    (top / "p").chmod(0o555)
    (top / "l").symlink_to("nowhere")
    for name in (b"B", b"a", b"\xff", b"d-"):
        (Path(os.fsdecode(os.path.join(os.fsencode(top), name)))).write_bytes(name)
    return top


def joined(events: list[Event]) -> list[Event]:
    result: list[Event] = []
    for event in events:
        if isinstance(event, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += event
        else:
            result.append(event)
    return result


def dumped(tree: Path) -> bytes:
    out = io.BytesIO()
    nar.dump(tree, out.write)
    return out.getvalue()


@pytest.mark.parametrize("part", ["", "p", "l", "empty", "d/e"])
def test_the_events_are_those_of_the_nar(tree: Path, part: str) -> None:
    data = dumped(tree / part)
    read = nar.read(io.BytesIO(data).read, limit=len(data))
    assert joined(list(walk(tree / part))) == joined(list(read))
    assert all(len(event) <= 256 * 1024 for event in walk(tree) if isinstance(event, bytes))


def test_what_has_no_nar(tree: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        list(walk(tree / "no"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "s"))
        with pytest.raises(UsageError, match="neither a file") as caught:
            list(walk(tree))
        assert str(tree / "s") in str(caught.value)


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_file_that_changes(tree: Path, size: int) -> None:
    events = walk(tree / "d" / "f")
    assert isinstance(next(events), File)
    os.truncate(tree / "d" / "f", size)
    with pytest.raises(ConflictError, match="changed"):
        list(events)


def test_no_descriptor_is_left(tree: Path) -> None:
    before = os.listdir("/proc/self/fd")
    events = walk(tree)
    next(events)
    next(events)
    events.close()
    list(walk(tree))
    assert os.listdir("/proc/self/fd") == before


def test_a_tree_that_is_not_the_one_that_was_registered(tree: Path) -> None:
    data = dumped(tree)
    path = StorePath("a" * 32, "a")
    info = PathInfo(path, Hash.sha256(data), len(data))
    assert list(checked(walk(tree), info)) == list(walk(tree))
    (tree / "p").write_bytes(b"##")
    for wrong in (info, PathInfo(path, Hash.sha256(dumped(tree)), len(data) + 8)):
        with pytest.raises(DamagedError, match="registered") as caught:
            list(checked(walk(tree), wrong))
        assert caught.value.place == str(path)
