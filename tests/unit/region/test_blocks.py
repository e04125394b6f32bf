"""Snapshots on disk: what survives, what is freed, and the volumes made of them."""

from __future__ import annotations

import datetime as dt
import hashlib
import threading

import pytest

from calve.errors import DamagedError, NotFoundError
from calve.region.blocks import Snapshots
from calve.region.signature import Refusal
from calve.region.snapshot import BLOCK_BYTES, Entry, Start, State


class Clock:
    """Time that a test lets pass."""

    def __init__(self):
        self.seconds = 1e6

    def monotonic(self):
        return self.seconds

    def now(self):
        return dt.datetime.fromtimestamp(self.seconds, dt.UTC)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def snapshots(tmp_path, clock):
    return Snapshots(tmp_path / "ebs", clock=clock)


def block(seed):
    return hashlib.shake_128(str(seed).encode()).digest(BLOCK_BYTES)


def put(snapshots, snapshot_id, index, data):
    digest = hashlib.sha256(data).digest()
    with snapshots.flight(snapshot_id, index, digest.hex()):
        entry = Entry(digest, snapshots.blobs.put(digest, data), snapshot_id)
        snapshots.write(snapshot_id, index, digest, entry)


def make(snapshots, clock, blocks, **ask):
    made = snapshots.start(Start(**{"gib": 1} | ask)).id
    for index, data in blocks.items():
        put(snapshots, made, index, data)
    snapshots.complete(made, len(blocks))
    clock.seconds += 1
    assert snapshots.get(made).state is State.COMPLETED
    return made


def files(directory):
    return sorted(path.name for path in (directory / "ebs" / "blocks").iterdir())


# On disk


def test_what_was_completed_is_there_again(snapshots, clock, tmp_path):
    parent = make(snapshots, clock, {0: block(0), 1: block(1)}, tags=(("k", "v"),))
    child = make(snapshots, clock, {1: block(2)}, parent_id=parent)
    pending = snapshots.start(Start(1)).id
    put(snapshots, pending, 0, block("lost"))
    kept = {one: dict(snapshots.blocks(one)) for one in (parent, child)}
    facts = [snapshots.get(one) for one in (parent, child)]
    again = Snapshots(tmp_path / "ebs", clock=clock)
    assert {one: dict(again.blocks(one)) for one in (parent, child)} == kept
    assert [again.get(one).dump() for one in (parent, child)] == [one.dump() for one in facts]
    assert again.find(pending) is None
    assert len(files(tmp_path)) == 3
    assert again.start(Start(1)).id not in kept
    again.delete(parent)
    again.delete(child)
    assert files(tmp_path) == []
    assert Snapshots(tmp_path / "ebs", clock=clock).all() == []


def test_a_record_that_is_none_is_named(snapshots, clock, tmp_path):
    made = make(snapshots, clock, {})
    path = tmp_path / "ebs" / f"{made}.json"
    for text in ("", "[]", "{}", '{"blocks": [[1]]}', '{"blocks": [], "shared_with": []}'):
        path.write_text(text)
        with pytest.raises(DamagedError, match=made):
            Snapshots(tmp_path / "ebs", clock=clock)


def test_a_block_that_is_replaced_is_freed(snapshots, clock, tmp_path):
    made = snapshots.start(Start(1)).id
    put(snapshots, made, 0, block(0))
    put(snapshots, made, 0, block(1))
    put(snapshots, made, 1, block(1))
    assert len(files(tmp_path)) == 1
    snapshots.delete(made)
    snapshots.delete(made)
    assert files(tmp_path) == []


def test_a_write_that_comes_too_late_is_refused_and_freed(snapshots, clock, tmp_path):
    made = snapshots.start(Start(1)).id
    digest = hashlib.sha256(block(0)).digest()
    with snapshots.flight(made, 0, "x"):
        entry = Entry(digest, snapshots.blobs.put(digest, block(0)), made)
        snapshots.complete(made, 0)
        with pytest.raises(Refusal, match="ValidationException"):
            snapshots.write(made, 0, digest, entry)
    assert files(tmp_path) == []


def test_a_flight_s_end_is_counted(snapshots, clock):
    made = snapshots.start(Start(1)).id
    with snapshots.flight(made, 0, "a"):
        with snapshots.flight(made, 0, "a"):
            pass
        with pytest.raises(Refusal, match="in progress"), snapshots.flight(made, 0, "b"):
            pass
    with snapshots.flight(made, 0, "b"):
        pass


def test_an_open_block_is_read_though_it_is_deleted(snapshots, clock):
    made = make(snapshots, clock, {0: block(0)})
    with snapshots.blobs.open(snapshots.blocks(made)[0].blob) as file:
        snapshots.delete(made)
        assert file.read() == block(0)


def test_threads_that_store_and_drop_one_content_lose_nothing(snapshots, tmp_path):
    data, digest = block(0), hashlib.sha256(block(0)).digest()
    name = snapshots.blobs.put(digest, data)

    def work():
        for _ in range(50):
            again = snapshots.blobs.put(digest, data)
            with snapshots.blobs.open(again) as file:
                assert file.read(16) == data[:16]
            snapshots.blobs.drop([again])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    snapshots.blobs.drop([name])
    for thread in threads:
        thread.join()
    assert files(tmp_path) == []


# Volumes


def export(snapshots, made, path, **options):
    snapshots.export(made, path, **options)
    with path.open("rb") as file:
        return [file.read(BLOCK_BYTES) for _ in range(5)]


def test_omitted_blocks_are_zeros_or_noise_by_the_key(snapshots, clock, tmp_path):
    parent = make(snapshots, clock, {0: block(0), 1: block(1)})
    child = make(snapshots, clock, {1: bytes(BLOCK_BYTES), 3: block(3)}, parent_id=parent)
    zeros = bytes(BLOCK_BYTES)
    plain = export(snapshots, child, tmp_path / "a")
    assert plain == [block(0), zeros, zeros, block(3), zeros]
    assert (tmp_path / "a").stat().st_size == 1 << 30
    assert (tmp_path / "a").stat().st_blocks * 512 < 3 * BLOCK_BYTES
    noise = export(snapshots, child, tmp_path / "b", omitted="random", key=b"one")
    assert noise[:2] == [block(0), zeros]
    assert noise[3] == block(3)
    assert len({zeros, noise[2], noise[4]}) == 3
    (tmp_path / "b").unlink()  # it has no holes
    pad = hashlib.shake_128(b"one").digest(2 * BLOCK_BYTES)
    assert noise[2] in pad
    assert noise[4] in pad


def test_only_what_is_completed_is_exported(snapshots, clock, tmp_path):
    made = snapshots.start(Start(1)).id
    with pytest.raises(NotFoundError, match="completed"):
        snapshots.export(made, tmp_path / "a")
    with pytest.raises(NotFoundError, match="malformed"):
        snapshots.export("snap-1", tmp_path / "a")
    assert not (tmp_path / "a").exists()
