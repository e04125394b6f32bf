"""NARs: events there and back, and what damage may do."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from calve.errors import CalveError, DamagedError
from calve.nix import nar
from calve.nix.nar import Directory, End, Event, File, Symlink
from calve.nix.unpack import unpack

NAMES = st.binary(min_size=1, max_size=12).filter(nar.check_name)
TARGETS = st.binary(min_size=1, max_size=40).filter(lambda target: b"\0" not in target)
LEAVES = st.one_of(
    st.tuples(st.just("file"), st.binary(max_size=40), st.booleans()),
    st.tuples(st.just("symlink"), TARGETS),
)
TREES = st.recursive(
    LEAVES,
    lambda children: st.tuples(st.just("directory"), st.dictionaries(NAMES, children, max_size=4)),
    max_leaves=12,
)


def events_of(tree: tuple[object, ...], name: bytes = b"") -> list[Event]:
    match tree:
        case ("file", bytes(content), bool(executable)):
            head: list[Event] = [File(name, len(content), executable)]
            return [*head, content] if content else head
        case ("symlink", bytes(target)):
            return [Symlink(name, target)]
        case ("directory", dict(children)):
            inner = [
                event for child in sorted(children) for event in events_of(children[child], child)
            ]
            return [Directory(name), *inner, End()]
        case _:
            raise AssertionError(tree)


def emitted(events: list[Event]) -> bytes:
    out = io.BytesIO()
    assert nar.emit(events, out.write) == out.tell()
    return out.getvalue()


def joined(events: list[Event]) -> list[Event]:
    result: list[Event] = []
    for event in events:
        if isinstance(event, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += event
        else:
            result.append(event)
    return result


@settings(deadline=None, max_examples=150)
@given(tree=TREES, step=st.integers(1, 200))
def test_events_there_and_back(tree: tuple[object, ...], step: int) -> None:
    events = events_of(tree)
    data = emitted(events)
    stream = io.BytesIO(data)
    read = list(nar.read(lambda n: stream.read(min(n, step)), limit=len(data)))
    assert joined(read) == events
    assert emitted(read) == data
    assert len(data) % 8 == 0


def names(path: Path | str) -> set[str]:
    return {child.name for child in Path(path).iterdir()}


def make_removable(top: str) -> None:
    """Let a normal user remove the read-only directories."""
    for directory, _, _ in os.walk(top):
        Path(directory).chmod(0o700)


def outcome(data: bytes, limit: int) -> bytes | None:
    """Read, unpack and hash; None where it is refused. Nothing is written outside, whatever happens."""
    digest = hashlib.sha256()
    stream = io.BytesIO(data)

    def source(n: int) -> bytes:
        chunk = stream.read(n)
        digest.update(chunk)
        return chunk

    with tempfile.TemporaryDirectory() as top:
        (Path(top) / "in").mkdir()
        fd = os.open(Path(top) / "in", os.O_RDONLY)
        try:
            unpack(nar.read(source, limit=limit), fd, "name")
        except DamagedError:
            return None
        finally:
            os.close(fd)
            assert names(top) == {"in"}
            assert names(Path(top) / "in") <= {"name"}
            make_removable(top)
    return digest.digest()


@settings(deadline=None, max_examples=60)
@given(tree=TREES, data=st.data())
def test_every_truncation_is_damage(tree: tuple[object, ...], data: st.DataObject) -> None:
    whole = emitted(events_of(tree))
    for cut in {0, len(whole) - 1, data.draw(st.integers(0, len(whole) - 1))}:
        assert outcome(whole[:cut], len(whole)) is None


@settings(deadline=None, max_examples=200)
@given(tree=TREES, data=st.data())
def test_every_flip_is_damage_or_another_hash(
    tree: tuple[object, ...], data: st.DataObject
) -> None:
    whole = emitted(events_of(tree))
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= data.draw(st.integers(1, 255))
    assert outcome(bytes(flipped), len(whole)) != hashlib.sha256(whole).digest()


@settings(deadline=None, max_examples=100)
@given(tree=TREES, more=st.binary(min_size=1, max_size=100))
def test_trailing_bytes_are_damage(tree: tuple[object, ...], more: bytes) -> None:
    whole = emitted(events_of(tree))
    assert outcome(whole + more, len(whole) + len(more)) is None
    assert outcome(whole + more, len(whole)) is None


@settings(deadline=None, max_examples=200)
@given(data=st.binary(max_size=300), whole=st.booleans())
def test_garbage_is_damage(data: bytes, whole: bool) -> None:
    head = emitted([Directory(b""), End()])[:72] if whole else b""
    assert outcome(head + data, 1 << 40) is None or (head + data).startswith(head)


TOKENS = [
    b"", b"(", b")", b"type", b"regular", b"executable", b"contents", b"symlink", b"target",
    b"directory", b"entry", b"name", b"node", b"a", b"b", b"..", b"/",
]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(words=st.lists(st.sampled_from(TOKENS), max_size=30))
def test_any_sequence_of_tokens(words: list[bytes]) -> None:
    """What is read at all is canonical: it is written to the same bytes."""
    data = emitted([Directory(b""), End()])[:24] + b"".join(
        len(word).to_bytes(8, "little") + word + bytes(-len(word) % 8) for word in words
    )
    stream = io.BytesIO(data)
    try:
        events = list(nar.read(stream.read, limit=len(data)))
    except DamagedError:
        return
    assert emitted(events) == data


@settings(deadline=None, max_examples=100)
@given(tree=TREES)
def test_unpack_then_dump(tree: tuple[object, ...]) -> None:
    data = emitted(events_of(tree))
    with tempfile.TemporaryDirectory() as top:
        fd = os.open(top, os.O_RDONLY)
        try:
            unpack(nar.read(io.BytesIO(data).read, limit=len(data)), fd, "name")
        finally:
            os.close(fd)
        out = io.BytesIO()
        nar.dump(Path(top) / "name", out.write)
        make_removable(top)
    assert out.getvalue() == data


EVENTS = st.one_of(
    st.builds(Directory, st.binary(max_size=4)),
    st.builds(File, st.binary(max_size=4), st.integers(0, 4), st.booleans()),
    st.builds(Symlink, st.binary(max_size=4), st.binary(max_size=4)),
    st.just(End()),
    st.binary(min_size=1, max_size=4),
)


@settings(deadline=None, max_examples=200)
@given(events=st.lists(EVENTS, max_size=12))
def test_events_in_any_order(events: list[Event]) -> None:
    """Both consumers refuse what makes no tree, with an error of ours; `emit` writes only what can be read."""
    out = io.BytesIO()
    try:
        nar.emit(events, out.write)
    except CalveError:
        pass
    else:
        assert joined(list(nar.read(io.BytesIO(out.getvalue()).read, limit=out.tell()))) == joined(
            events
        )
    with tempfile.TemporaryDirectory() as top:
        fd = os.open(top, os.O_RDONLY)
        try:
            unpack(events, fd, "name")
        except CalveError:
            pass
        finally:
            os.close(fd)
        assert names(top) <= {"name"}
        make_removable(top)
