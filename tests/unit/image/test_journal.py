from __future__ import annotations

import errno
import json
import os
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calve.errors import CalveError
from calve.image import journal
from calve.image.journal import Begun, Journal

BEGUN = Begun("p" * 64, "eu-central-1", 2, "snap-0123456789abcdef0", frozenset({3, 70, 131071}))
HEAD = {"version": 1, "plan": "p", "region": "r", "attempt": 0, "snapshot": "s"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "disk.raw.upload"


def written(path, begun=BEGUN, more=()):
    taken = Journal.open(path, begun)
    for index in more:
        taken.done(index)
    taken.close()
    return path.read_bytes()


def test_what_was_taken_down_is_read(path):
    data = written(path, more=[5, 4])
    assert journal.read(path) == Begun(
        BEGUN.plan, BEGUN.region, 2, BEGUN.snapshot, frozenset({3, 4, 5, 70, 131071})
    )
    head, *lines = data.decode().splitlines()
    assert json.loads(head) == {
        "version": 1,
        "plan": BEGUN.plan,
        "region": "eu-central-1",
        "attempt": 2,
        "snapshot": BEGUN.snapshot,
    }
    assert lines == ["3", "70", "131071", "5", "4"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_a_new_one_replaces_what_was_there(path):
    written(path, more=[9])
    other = Begun("q", "r", 0, "snap-1")
    written(path, other)
    assert journal.read(path) == other


def test_what_a_killed_one_left_beside_it_is_no_hindrance(path):
    path.with_name(f".{path.name}.new").write_bytes(b"half")
    written(path)
    assert journal.read(path) == BEGUN


def test_a_line_is_there_as_soon_as_it_is_taken_down(path):
    taken = Journal.open(path, BEGUN)
    try:
        taken.done(11)
        assert journal.read(path).done == BEGUN.done | {11}
    finally:
        taken.close()


def test_lines_of_many_threads_do_not_mix(path):
    taken = Journal.open(path, Begun("p", "r", 0, "s"))
    threads = [
        threading.Thread(target=lambda n=n: [taken.done(n * 1000 + i) for i in range(200)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken.close()
    assert journal.read(path).done == {n * 1000 + i for n in range(8) for i in range(200)}


def test_cut_at_any_byte_it_says_less_and_nothing_else(path):
    data = written(path, more=[5, 123456])
    end_of_head = data.index(b"\n")
    order = [3, 70, 131071, 5, 123456]
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        found = journal.read(path)
        if size < end_of_head:
            assert found is None, size
            continue
        complete = data[:size].count(b"\n") - 1
        assert found.done == frozenset(order[: max(0, complete)]), size
        assert (found.plan, found.attempt, found.snapshot) == (BEGUN.plan, 2, BEGUN.snapshot)


def test_going_on_after_a_cut_line_does_not_glue(path):
    data = written(path, more=[5])
    path.write_bytes(data + b"12")
    assert 123 not in journal.read(path).done
    written(path, journal.read(path), more=[3456])
    assert journal.read(path).done == BEGUN.done | {5, 3456}


@given(st.binary(max_size=200))
@example(b"[" * 200_000)
@example(b"\n\n")
@example(b'{"version": 1}\n')
@example(b'"version"\n')
@example(b"[1]\n1\n")
@example(b"\xff\xfe{\n")
@example(json.dumps(HEAD | {"attempt": 1e400}).encode())
@example(json.dumps(HEAD | {"attempt": None}).encode())
@example(b'{"version": 1, "plan": "p", "region": "r", "attempt": Infinity, "snapshot": "s"}')
def test_garbage_is_none(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "garbage"
    path.write_bytes(data)
    assert journal.read(path) is None


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_none(path, version):
    path.write_text(json.dumps(HEAD | {"version": version}) + "\n1\n")
    assert journal.read(path) is None


@pytest.mark.parametrize("attempt", [-1, 1.5, "1", 1 << 40])
def test_an_attempt_that_cannot_be_is_none(path, attempt):
    path.write_text(json.dumps(HEAD | {"attempt": attempt}) + "\n1\n")
    assert journal.read(path) is None


def test_lines_that_are_no_index_are_left_out(path):
    path.write_bytes(json.dumps(HEAD).encode() + b"\n-1\nx\n 7\n8 \n\n" + b"9" * 12 + b"\n6\n")
    assert journal.read(path).done == {6}


def test_there_is_none(path, tmp_path):
    assert journal.read(path) is None
    assert journal.read(tmp_path) is None
    journal.forget(path)


def test_it_is_forgotten(path):
    written(path)
    journal.forget(path)
    assert not path.exists()


def test_where_none_can_be_written(tmp_path):
    with pytest.raises(CalveError, match=r"cannot be written: No such file") as caught:
        Journal.open(tmp_path / "none" / "disk", BEGUN)
    assert caught.value.place == str(tmp_path / "none" / "disk")


class Full:
    """A file on a disk that is full."""

    def write(self, _data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_an_error_of_ours(path):
    with pytest.raises(CalveError, match=r"cannot be written: No space left on device") as caught:
        Journal(Full(), path).done(1)
    assert caught.value.place == str(path)
