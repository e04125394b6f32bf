from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from calve.cache import directory
from calve.cache.directory import DirectoryObjects
from calve.cache.objects import Listed, MissingCacheError
from calve.errors import CalveError, DamagedError, NotFoundError


@pytest.fixture
def cache(tmp_path: Path) -> DirectoryObjects:
    return DirectoryObjects(tmp_path / "cache")


def _files(cache: DirectoryObjects) -> list[str]:
    root = Path(cache.url.removeprefix("file://"))
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_objects_are_put_got_and_deleted(cache: DirectoryObjects) -> None:
    assert cache.put("nar/x.nar", b"data")
    assert cache.get("nar/x.nar", 4) == b"data"
    assert cache.head("nar/x.nar") == 4
    with cache.open("nar/x.nar", 4) as file:
        assert (file.read(3), file.read(3), file.read(3)) == (b"dat", b"a", b"")
    cache.delete("nar/x.nar")
    cache.delete("nar/x.nar")
    assert cache.head("nar/x.nar") is None
    assert _files(cache) == []


def test_only_new_creates_once(cache: DirectoryObjects) -> None:
    assert cache.put("x", b"one", only_new=True)
    assert not cache.put("x", b"two", only_new=True)
    assert not cache.put_stream("x", iter([b"t", b"wo"]), only_new=True)
    assert cache.get("x", 10) == b"one"
    assert cache.put("x", b"three")
    assert cache.get("x", 10) == b"three"
    assert _files(cache) == ["x"]


def test_of_many_creators_one_wins(cache: DirectoryObjects) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        if cache.put("x", b"%d" % number, only_new=True):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert cache.get("x", 10) == b"%d" % won[0]


def test_match_replaces_only_the_version_that_was_read(cache: DirectoryObjects) -> None:
    cache.put("x", b"one")
    data, tag = cache.get_tagged("x", 10)
    assert data == b"one"
    assert cache.put("x", b"two", match=tag)
    assert not cache.put("x", b"three", match=tag)
    assert not cache.put("gone", b"three", match=tag)
    assert cache.get("x", 10) == b"two"


def test_no_update_is_lost_between_threads(cache: DirectoryObjects) -> None:
    cache.put("x", b"")

    def append() -> None:
        for _ in range(10):
            while True:
                data, tag = cache.get_tagged("x", 1000)
                if cache.put("x", data + b".", match=tag):
                    break

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get("x", 1000) == b"." * 40


def test_a_stream_that_fails_leaves_nothing(cache: DirectoryObjects) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise DamagedError("changed on disk")

    for only_new in (True, False):
        with pytest.raises(DamagedError, match="changed"):
            cache.put_stream("nar/x", chunks(), only_new=only_new)
    assert _files(cache) == []


def test_nothing_of_a_stream_is_visible_before_its_end(cache: DirectoryObjects) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a" * 100
        assert cache.head("nar/x") is None
        assert list(cache.list("")) == []
        yield b"b"

    assert cache.put_stream("nar/x", chunks(), only_new=True)
    assert cache.head("nar/x") == 101


def test_missing_objects_and_a_missing_cache_are_told_apart(cache: DirectoryObjects) -> None:
    with pytest.raises(MissingCacheError, match="no such directory"):
        cache.get("x", 1)
    assert cache.head("x") is None
    assert list(cache.list("")) == []
    cache.put("y", b"")
    with pytest.raises(NotFoundError, match="no such object") as caught:
        cache.get("x", 1)
    assert not isinstance(caught.value, MissingCacheError)
    with pytest.raises(NotFoundError):
        cache.open("y/z")


def test_what_is_too_long_is_damage(cache: DirectoryObjects) -> None:
    cache.put("x", b"12345")
    assert cache.get("x", 5) == b"12345"
    with pytest.raises(DamagedError, match="longer than 4"):
        cache.get("x", 4)


def test_listing_is_sorted_by_bytes_and_prefixed(cache: DirectoryObjects) -> None:
    for key in ("b", "a/z", "a/B", "nar/1"):
        cache.put(key, b"")
    assert [one.key for one in cache.list("")] == ["a/B", "a/z", "b", "nar/1"]
    assert [one.key for one in cache.list("a/")] == ["a/B", "a/z"]
    assert [one.key for one in cache.list("a/B")] == ["a/B"]
    assert list(cache.list("none/")) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./x",
        "a b",
        "a\nb",
        "ä",
        "a\\b",
        "http://h/x",
        "x#y",
        "x" * 1025,
    ],
)
def test_keys_that_lead_elsewhere_are_refused(cache: DirectoryObjects, key: str) -> None:
    for call in (
        lambda: cache.get(key, 1),
        lambda: cache.put(key, b""),
        lambda: cache.head(key),
        lambda: cache.delete(key),
        lambda: cache.open(key),
    ):
        with pytest.raises(DamagedError, match="not the key"):
            call()


def test_what_cannot_be_written_says_why(cache: DirectoryObjects) -> None:
    cache.put("x", b"a file, not a directory")
    for only_new in (True, False):
        with pytest.raises(CalveError, match=r"Not a directory|File exists") as caught:
            cache.put("x/y", b"", only_new=only_new)
        assert caught.value.place == f"{cache.url}/x/y"
        assert caught.value.exit_code == 1
    assert _files(cache) == ["x"]


def test_what_is_no_file_is_no_object(cache: DirectoryObjects, tmp_path: Path) -> None:
    cache.put("nar/x", b"")
    os.mkfifo(tmp_path / "cache/fifo")  # which would be waited for
    (tmp_path / "cache/zero").symlink_to("/dev/zero")
    for key in ("fifo", "zero", "nar"):
        for act in (lambda key: cache.get(key, 10), cache.open, cache.head):
            with pytest.raises(DamagedError, match="not a file"):
                act(key)


def test_keys_that_no_file_can_have_are_not_there(cache: DirectoryObjects, tmp_path: Path) -> None:
    cache.put("nar/x", b"")
    (tmp_path / "cache/loop").symlink_to("loop")
    for key in ("nar/" + "a" * 300, "loop", "nar/x/y"):
        with pytest.raises(NotFoundError):
            cache.get(key, 10)
        assert cache.head(key) is None


def test_a_key_with_a_query_does_not_lead_out(cache: DirectoryObjects, tmp_path: Path) -> None:
    (tmp_path / "cache/nar?x").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    for key in ("nar?x/../../secret", "nar?x/../../../etc/passwd", "%2e%2e/secret", "nar%2F..%2fx"):
        with pytest.raises(DamagedError, match="not the key"):
            cache.get(key, 10)


def test_a_listing_says_size_time_and_tag(cache: DirectoryObjects) -> None:
    before = time.time()
    cache.put("nar/x", b"12345")
    (one,) = cache.list("nar/")
    _, tag = cache.get_tagged("nar/x", 10)
    assert one == Listed("nar/x", 5, tag, one.modified_s)
    assert before <= one.modified_s <= time.time()


def test_a_listing_leaves_out_what_is_no_object(cache: DirectoryObjects, tmp_path: Path) -> None:
    for key in ("a", "b", "c"):
        cache.put(key, b"")
    os.mkfifo(tmp_path / "cache/fifo")
    (tmp_path / "cache/nowhere").symlink_to("none")
    (tmp_path / "cache/.calve-0011").write_bytes(b"of an interrupted write")
    listing = cache.list("")
    assert next(listing).key == "a"
    cache.delete("b")  # removed while we list
    assert [one.key for one in listing] == ["c"]


def test_a_prefix_does_not_lead_out(cache: DirectoryObjects) -> None:
    with pytest.raises(DamagedError, match="not the key"):
        list(cache.list("../"))


def test_versions_of_one_size_have_tags_of_their_own(
    cache: DirectoryObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tick of the kernel's clock too, where an inode is used again."""
    tags = set()
    for number in range(10):
        monkeypatch.setattr(time, "time_ns", lambda number=number: 10**18 + number)
        cache.put("x", b"%02d" % number)
        _, tag = cache.get_tagged("x", 10)
        tags.add(tag.partition("-")[2])  # but for the inode
    assert tags == {f"{10**18 + number}-2" for number in range(10)}


def test_a_version_is_removed_and_another_stays(cache: DirectoryObjects) -> None:
    assert cache.delete("x", match="none")  # nor is there a directory
    cache.put("x", b"one")
    _, old = cache.get_tagged("x", 10)
    cache.put("x", b"two")
    assert not cache.delete("x", match=old)
    assert cache.get("x", 10) == b"two"
    assert cache.delete("x", match=cache.get_tagged("x", 10)[1])
    assert cache.head("x") is None
    assert cache.delete("x", match=old)


def test_of_many_those_that_changed_stay(cache: DirectoryObjects) -> None:
    for key in ("a", "b", "c", "d"):
        cache.put(key, b"old")
    listed = list(cache.list(""))
    cache.put("b", b"new")
    cache.delete("c")
    assert [one.key for one in cache.delete_many(listed)] == ["b"]
    assert [one.key for one in cache.list("")] == ["b"]
    assert cache.delete_many([]) == []


@pytest.mark.parametrize("only_new", [True, False])
def test_what_is_written_while_an_older_version_is_removed_stays(
    cache: DirectoryObjects, monkeypatch: pytest.MonkeyPatch, *, only_new: bool
) -> None:
    cache.put("x", b"old")
    _, tag = cache.get_tagged("x", 10)
    look = directory._tag_of
    written: list[bool] = []

    def write() -> None:
        while not cache.put("x", b"new", only_new=only_new):
            pass
        written.append(True)

    writer = threading.Thread(target=write)

    def look_and_wait(path: Path) -> str | None:
        found = look(path)
        writer.start()
        writer.join(0.3)
        assert not written  # not between the look and the removal
        return found

    monkeypatch.setattr(directory, "_tag_of", look_and_wait)
    assert cache.delete("x", match=tag)
    writer.join()
    assert cache.get("x", 10) == b"new"


def test_a_range_is_read(cache: DirectoryObjects) -> None:
    cache.put("x", b"0123456789")

    def read(start: int, end: int | None) -> bytes:
        with cache.open("x", start=start, end=end) as file:
            return b"".join(iter(lambda: file.read(3), b""))

    assert read(0, 4) == b"0123"
    assert read(2, 9) == b"2345678"
    assert read(7, None) == b"789"
    assert (read(3, 3), read(10, 10), read(10, None)) == (b"", b"", b"")
    for start, end in ((0, 11), (11, None), (11, 12), (5, 4)):
        with pytest.raises(DamagedError, match="has 10 bytes"):
            cache.open("x", start=start, end=end)


def test_a_file_that_shrinks_under_a_reader_is_damage(
    cache: DirectoryObjects, tmp_path: Path
) -> None:
    cache.put("x", b"0123456789")
    with cache.open("x", start=1, end=9) as file:
        assert file.read(2) == b"12"
        os.truncate(tmp_path / "cache/x", 4)
        assert file.read(10) == b"3"
        with pytest.raises(DamagedError, match="ended early"):
            file.read(10)
