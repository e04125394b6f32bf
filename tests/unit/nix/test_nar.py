from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from calve.errors import CalveError, ConflictError, DamagedError, NotFoundError, UsageError
from calve.nix import nar
from calve.nix.nar import Directory, End, Event, File, Symlink


def s(*texts: bytes) -> bytes:
    """Write strings of a NAR."""
    return b"".join(struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8) for text in texts)


MAGIC = s(b"nix-archive-1")
EMPTY_FILE = s(b"(", b"type", b"regular", b"contents", b"", b")")


def archive(node: bytes) -> bytes:
    return MAGIC + node


def directory(*entries: tuple[bytes, bytes]) -> bytes:
    inner = b"".join(
        s(b"entry", b"(", b"name", name, b"node") + node + s(b")") for name, node in entries
    )
    return s(b"(", b"type", b"directory") + inner + s(b")")


def symlink(target: bytes) -> bytes:
    return s(b"(", b"type", b"symlink", b"target", target, b")")


def read(data: bytes, limit: int | None = None, step: int = 1 << 30) -> list[Event]:
    stream = io.BytesIO(data)
    return list(
        nar.read(lambda n: stream.read(min(n, step)), limit=len(data) if limit is None else limit)
    )


def emitted(events: Iterable[Event]) -> bytes:
    out = io.BytesIO()
    assert nar.emit(events, out.write) == out.tell()
    return out.getvalue()


TREE: list[Event] = [
    Directory(b""),
    File(b"A", 3, executable=True),
    b"abc",
    Directory(b"a"),
    Directory(b"empty"),
    End(),
    File(b"nothing", 0, executable=False),
    End(),
    Symlink(b"link", b"../else where"),
    File(b"\xff", 8, executable=False),
    b"12345678",
    End(),
]


@pytest.mark.parametrize("step", [1, 7, 16, 100, 1 << 20])
def test_tree_there_and_back(step: int) -> None:
    data = emitted(TREE)
    events = read(data, step=step)
    joined: list[Event] = []
    for event in events:
        if isinstance(event, bytes) and isinstance(joined[-1], bytes):
            joined[-1] += event
        else:
            joined.append(event)
    assert joined == TREE
    assert emitted(events) == data


@pytest.mark.parametrize(
    ("node", "events"),
    [
        (EMPTY_FILE, [File(b"", 0, executable=False)]),
        (symlink(b"x"), [Symlink(b"", b"x")]),
        (directory(), [Directory(b""), End()]),
        (
            s(b"(", b"type", b"regular", b"executable", b"", b"contents", b"hello", b")"),
            [File(b"", 5, executable=True), b"hello"],
        ),
    ],
)
def test_roots(node: bytes, events: list[Event]) -> None:
    assert read(archive(node)) == events
    assert emitted(events) == archive(node)


def test_big_file_comes_in_chunks() -> None:
    content = os.urandom(1_000_003)
    data = archive(s(b"(", b"type", b"regular", b"contents", content, b")"))
    asked: list[int] = []
    stream = io.BytesIO(data)

    def source(n: int) -> bytes:
        asked.append(n)
        return stream.read(n)

    chunks = [event for event in nar.read(source, limit=len(data)) if isinstance(event, bytes)]
    assert b"".join(chunks) == content
    assert max(map(len, chunks)) <= 256 * 1024
    assert max(asked) <= 256 * 1024


BAD = {
    "nothing": b"",
    "other magic": s(b"nix-archive-2") + EMPTY_FILE,
    "no node": MAGIC,
    "trailing bytes": archive(EMPTY_FILE) + b"\0",
    "trailing node": archive(EMPTY_FILE) + EMPTY_FILE,
    "unknown type": archive(s(b"(", b"type", b"fifo", b")") + bytes(32)),
    "no contents": archive(s(b"(", b"type", b"regular", b")") + bytes(32)),
    "executable with a value": archive(
        s(b"(", b"type", b"regular", b"executable", b"1", b"contents", b"", b")")
    ),
    "executable behind contents": archive(
        s(b"(", b"type", b"regular", b"contents", b"", b"executable", b"", b")")
    ),
    "two contents": archive(s(b"(", b"type", b"regular", b"contents", b"", b"contents", b"", b")")),
    "name empty": archive(directory((b"", EMPTY_FILE))),
    "name dot": archive(directory((b".", EMPTY_FILE))),
    "name dot dot": archive(directory((b"..", EMPTY_FILE))),
    "name with slash": archive(directory((b"../x", EMPTY_FILE))),
    "name absolute": archive(directory((b"/etc", EMPTY_FILE))),
    "name with NUL": archive(directory((b"a\0b", EMPTY_FILE))),
    "name too long": archive(directory((b"a" * 256, EMPTY_FILE))),
    "names out of order": archive(directory((b"b", EMPTY_FILE), (b"a", EMPTY_FILE))),
    "names twice": archive(directory((b"a", EMPTY_FILE), (b"a", EMPTY_FILE))),
    "file above file": archive(directory((b"a", symlink(b"/")), (b"a", directory()))),
    "name behind node": archive(
        s(b"(", b"type", b"directory", b"entry", b"(", b"node")
        + EMPTY_FILE
        + s(b"name", b"a", b")", b")")
    ),
    "entry without node": archive(
        s(b"(", b"type", b"directory", b"entry", b"(", b"name", b"a", b")", b")") + bytes(64)
    ),
    "target empty": archive(symlink(b"")),
    "target with NUL": archive(symlink(b"a\0b")),
    "target too long": archive(symlink(b"a" * 4096)),
    "padding of a name": archive(directory((b"a", EMPTY_FILE))).replace(
        b"a\0\0\0\0\0\0\0", b"a\0\0\0\0\0\0\1"
    ),
    "padding of a file": archive(s(b"(", b"type", b"regular", b"contents", b"abc", b")")).replace(
        b"abc\0\0", b"abc\0\1"
    ),
    "length of 2^64-1": MAGIC + s(b"(", b"type", b"regular", b"contents") + b"\xff" * 8,
    "length of 2^63": MAGIC
    + s(b"(", b"type", b"regular", b"contents")
    + struct.pack("<Q", 1 << 63),
    "token's length": b"\x0e" + archive(EMPTY_FILE)[1:],
    "text": b"<html><body>503 Service Unavailable</body></html>" * 5,
}


@pytest.mark.parametrize("step", [3, 1 << 20])
@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
def test_damage(data: bytes, step: int) -> None:
    with pytest.raises(DamagedError, match="NAR"):
        read(data, limit=1 << 40, step=step)


def test_longest_target_name_and_depth_are_read() -> None:
    node = EMPTY_FILE
    for _ in range(64):
        node = directory((b"d", node))
    assert len(read(archive(node))) == 64 + 1 + 64
    read(archive(symlink(b"a" * 4095)))
    read(archive(directory((b"a" * 255, EMPTY_FILE))))
    with pytest.raises(DamagedError, match="64 deep"):
        read(archive(directory((b"d", node))))


def test_deep_nesting_needs_no_recursion() -> None:
    head = s(b"(", b"type", b"directory", b"entry", b"(", b"name", b"d", b"node")
    with pytest.raises(DamagedError):
        read(MAGIC + head * 100_000)


@pytest.mark.parametrize("cut", [0, 5, 8, 23, 24, 60, -1, -8, -17])
def test_truncation_names_the_byte(cut: int) -> None:
    data = emitted(TREE)
    with pytest.raises(DamagedError, match=r"at byte \d+"):
        read(data[:cut] if cut else b"", limit=len(data))


def test_truncation_in_a_big_file_names_the_byte() -> None:
    data = archive(s(b"(", b"type", b"regular", b"contents", bytes(500_000), b")"))[:400_000]
    with pytest.raises(DamagedError, match="at byte 400000"):
        read(data, limit=500_200)


def test_limit() -> None:
    data = emitted(TREE)
    assert read(data, limit=len(data))
    for limit in (len(data) - 1, 100, 8, 0):
        with pytest.raises(DamagedError):
            read(data, limit=limit)


def test_a_promised_size_beyond_the_limit_is_refused_before_it_is_read() -> None:
    head = MAGIC + s(b"(", b"type", b"regular", b"contents") + struct.pack("<Q", 1000)
    taken = 0

    def source(n: int) -> bytes:
        nonlocal taken
        taken += 1
        return head if taken == 1 else bytes(min(n, 1000))

    events = nar.read(source, limit=900)
    with pytest.raises(DamagedError, match="longer than the whole"):
        list(events)
    assert taken == 1


def test_an_endless_source_stops_at_the_limit() -> None:
    taken = 0

    def source(n: int) -> bytes:
        nonlocal taken
        taken += n
        return archive(EMPTY_FILE) if taken == n else bytes(n)

    with pytest.raises(DamagedError):
        list(nar.read(source, limit=10_000))
    assert taken < 1_000_000


@pytest.mark.parametrize(
    "events",
    [
        [],
        [Directory(b"")],
        [End()],
        [File(b"name", 0, executable=False)],
        [File(b"", 2, executable=False), b"a"],
        [File(b"", 1, executable=False), b"ab"],
        [File(b"", 0, executable=False), b"a"],
        [File(b"", 0, executable=False), File(b"", 0, executable=False)],
        [Directory(b""), b"a", End()],
        [Directory(b""), End(), End()],
        [Directory(b""), Symlink(b"a/b", b"x"), End()],
        [Directory(b""), Symlink(b"a", b""), End()],
        [Directory(b""), Symlink(b"b", b"x"), Symlink(b"a", b"x"), End()],
        [Directory(b"")] + [Directory(b"d")] * 65 + [End()] * 66,
    ],
)
def test_emit_refuses_what_is_no_tree(events: list[Event]) -> None:
    with pytest.raises(UsageError):
        nar.emit(events, bytes)


# From the file system.


def dumped(path: Path) -> bytes:
    out = io.BytesIO()
    assert nar.dump(path, out.write) == out.tell()
    return out.getvalue()


def test_dump(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a/empty").mkdir(parents=True)
    (top / "a/nothing").touch()
    (top / "A").write_bytes(b"abc")
    (top / "A").chmod(0o744)
    (top / "link").symlink_to("../else where")
    (top / "\udcff").write_bytes(b"12345678")
    (top / "\udcff").chmod(0o655)  # executable, but not by its owner
    assert dumped(top) == emitted(TREE)


@pytest.mark.parametrize("size", [0, 1, 262143, 262144, 262145, 1_000_000])
def test_dump_of_sizes(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "file").chmod(0o644)
    written: list[bytes] = []
    nar.dump(tmp_path / "file", written.append)
    assert b"".join(written) == archive(s(b"(", b"type", b"regular", b"contents", content, b")"))
    assert max(map(len, written)) <= 512 * 1024


def test_dump_orders_by_bytes(tmp_path: Path) -> None:
    """Not as letters, nor as Unicode: what is not UTF-8 comes behind U+FFFF."""
    names = [b"A", b"B", b"a", b"a.b", b"a0", b"b", b"\xef\xbf\xbf", b"\xff"]
    for name in names:
        (tmp_path / os.fsdecode(name)).touch(0o600)
    assert dumped(tmp_path) == archive(directory(*((name, EMPTY_FILE) for name in names)))


def test_dump_of_a_symlink_does_not_follow(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    assert dumped(tmp_path / "link") == archive(symlink(b"/etc"))


def test_dump_refuses_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    os.mkfifo(tmp_path / "top/pipe")
    for path in (tmp_path / "top", tmp_path / "top/pipe"):
        with pytest.raises(UsageError) as caught:
            dumped(path)
        assert caught.value.place == str(tmp_path / "top/pipe")


def test_dump_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        dumped(tmp_path / "no\udcff")
    assert caught.value.place is not None
    assert caught.value.place.endswith("no\\xff")
    (tmp_path / "file").touch()
    with pytest.raises(CalveError):
        dumped(tmp_path / "file/below")


def changing(path: Path, change: Callable[[], None]) -> None:
    """Dump; change the file once its first bytes were read."""
    done = False

    def write(data: bytes) -> None:
        nonlocal done
        if not done:
            done = True
            change()

    nar.dump(path, write)


@pytest.mark.parametrize("size", [0, 300_000, 2_000_000])
def test_dump_refuses_a_file_that_changes(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1_000_000))
    with pytest.raises(ConflictError) as caught:
        changing(file, lambda: os.truncate(file, size))
    assert caught.value.place == str(file)


def test_dump_passes_the_error_of_its_writer(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1_000_000))

    def write(data: bytes) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        nar.dump(tmp_path, write)


def test_dump_refuses_what_nix_would_not_read(tmp_path: Path) -> None:
    deep = tmp_path / "top"
    deep.joinpath(*["d"] * 64).mkdir(parents=True)
    assert dumped(deep)
    deep.joinpath(*["d"] * 65).mkdir()
    with pytest.raises(UsageError):
        dumped(deep)


def test_a_name_cannot_write_lines_of_its_own_into_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p\nhint: \x1b[31mrm -rf é")
    with pytest.raises(UsageError) as caught:
        nar.dump(tmp_path, lambda _: None)
    assert (caught.value.place or "").endswith("/p\\nhint: \\x1b[31mrm -rf é")
