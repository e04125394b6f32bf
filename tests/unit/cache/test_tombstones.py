from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from calve.cache import tombstones
from calve.cache.objects import Listed
from calve.cache.tombstones import Collection, Doomed
from calve.errors import DamagedError, NotFoundError, UsageError
from calve.nix.zstd import ZstdCompressor

NOW = datetime.datetime(2026, 11, 23, 6, 0, 0, tzinfo=datetime.UTC)
MARKED = Collection("gc-1", "marked", NOW, 3600, 3, 300, told=True)
SWEEPING = replace(MARKED, state="sweeping", sweeper="me", expires=NOW)
DONE = replace(MARKED, state="done", swept=NOW, removed_objects=3, removed_bytes=300)


def _listed(count: int) -> list[Listed]:
    return [Listed(f"nar/{n:052}.nar.zst", n, f'"{n:032x}"', 5.0) for n in range(count)]


@pytest.mark.parametrize("collection", [MARKED, SWEEPING, DONE])
def test_the_record_is_read_as_it_was_written(memory, collection) -> None:
    cache = memory()
    assert tombstones.read(cache) is None
    assert tombstones.write(cache, collection)
    found, tag = tombstones.read(cache)
    assert found == collection
    assert not tombstones.write(cache, collection), "there is one already"
    assert not tombstones.write(cache, DONE, match="another")
    assert tombstones.write(cache, DONE, match=tag)
    assert tombstones.read(cache)[0] == DONE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"marked"', b'"asleep"'),
        (b'"gc-1"', b'"../x"'),
        (b'"gc-1"', b"null"),
        (b"3600", b"-1"),
        (b"2026-", b"later "),
        (b'"told":true', b'"told":1'),
        (b'"sweeper":"me"', b'"sweeper":null'),
        (b"}", b"]"),
        (b"{", b"{" + b" " * 5000),
    ],
)
def test_a_malformed_record_is_damage(memory, old, new) -> None:
    cache = memory()
    data = SWEEPING.dump() if old == b'"sweeper":"me"' else MARKED.dump()
    assert old in data
    cache.data["gc.json"] = data.replace(old, new, 1)
    with pytest.raises(DamagedError, match=r"gc\.json"):
        tombstones.read(cache)


def test_a_record_of_another_version_is_refused(memory) -> None:
    cache = memory()
    cache.data["gc.json"] = MARKED.dump().replace(b'"version":1', b'"version":2')
    with pytest.raises(UsageError, match="version 2"):
        tombstones.read(cache)


@pytest.mark.parametrize("count", [0, 1, 20_000])
def test_tombstones_are_read_as_they_were_written(memory, count) -> None:
    cache = memory()
    listed = _listed(count)
    tombstones.write_tombstones(cache, "gc-1", iter(listed))
    assert list(cache.data) == ["gc/gc-1.tombstones.zst"]
    found = list(tombstones.read_tombstones(cache, "gc-1"))
    assert found == [replace(one, modified_s=0.0) for one in listed]


@pytest.mark.parametrize(
    "listed",
    [
        [Listed("b", 1, "t", 0), Listed("a", 1, "t", 0)],
        [Listed("a", 1, "t", 0), Listed("a", 1, "t", 0)],
        [Listed("a b", 1, "t", 0)],
        [Listed("a\nb", 1, "t", 0)],
        [Listed("a", 1, "", 0)],
        [Listed("a", -1, "t", 0)],
    ],
)
def test_what_cannot_be_read_again_is_not_written(memory, listed) -> None:
    cache = memory()
    with pytest.raises(DamagedError):
        tombstones.write_tombstones(cache, "gc-1", listed)
    assert not cache.data


@pytest.mark.parametrize(
    "text",
    [
        b"nar/x tag",
        b"nar/x tag 1",
        b"nar/x tag -1\n",
        b"nar/x tag 01\n",
        b"nar/x  1\n",
        b"nar/x tag 1 more\n",
        b"nar/x tag 1\r\n",
        b"\n",
        b"nar/y t 1\nnar/x t 1\n",
        b"nar/x t 1\nnar/x t 1\n",
        b"nar/\xc3\xa4 t 1\n",
        b"x" * 1_000_000,
    ],
)
def test_malformed_tombstones_are_damage(memory, text) -> None:
    cache = memory()
    packed = ZstdCompressor()
    cache.data["gc/gc-1.tombstones.zst"] = packed.compress(text) + packed.flush()
    with pytest.raises(DamagedError, match="gc-1"):
        list(tombstones.read_tombstones(cache, "gc-1"))


def test_cut_tombstones_are_damage(memory) -> None:
    cache = memory()
    tombstones.write_tombstones(cache, "gc-1", _listed(2000))
    cache.data["gc/gc-1.tombstones.zst"] = cache.data["gc/gc-1.tombstones.zst"][:-9]
    with pytest.raises(DamagedError):
        list(tombstones.read_tombstones(cache, "gc-1"))


# Doomed


@pytest.mark.parametrize("collection", [None, DONE])
def test_nothing_is_doomed_where_no_collection_is_under_way(memory, collection) -> None:
    cache = memory()
    if collection is not None:
        tombstones.write(cache, collection)
        tombstones.write_tombstones(cache, "gc-1", _listed(3))
    cache.calls.clear()
    assert tombstones.doomed(cache, [_listed(3)[1].key]) == Doomed(None, frozenset())
    assert len(cache.calls) == 1


@pytest.mark.parametrize("collection", [MARKED, SWEEPING, replace(MARKED, told=False)])
def test_doomed_is_what_has_a_tombstone(memory, collection) -> None:
    cache = memory()
    tombstones.write(cache, collection)
    tombstones.write_tombstones(cache, "gc-1", _listed(3))
    cache.calls.clear()
    key = _listed(3)[1].key
    assert tombstones.doomed(cache, [key, "nar/other"]) == Doomed("gc-1", frozenset({key}))
    assert len(cache.calls) == 2


def test_a_collection_that_ends_meanwhile_dooms_nothing(memory) -> None:
    cache = memory()
    tombstones.write(cache, SWEEPING)

    def end(method: str, key: str) -> None:
        if method == "open":
            cache.data["gc.json"] = DONE.dump()

    cache.before = end
    assert tombstones.doomed(cache, ["a"]) == Doomed(None, frozenset())


def test_the_next_collection_is_asked_where_one_ends_meanwhile(memory) -> None:
    cache = memory()
    tombstones.write(cache, SWEEPING)

    def end(method: str, key: str) -> None:
        if method == "open" and "gc-1" in key:
            cache.before = lambda _method, _key: None
            cache.data["gc.json"] = replace(MARKED, id="gc-2").dump()
            tombstones.write_tombstones(cache, "gc-2", _listed(1))

    cache.before = end
    key = _listed(1)[0].key
    assert tombstones.doomed(cache, {key}) == Doomed("gc-2", frozenset({key}))


def test_tombstones_that_are_gone_are_damage(memory) -> None:
    cache = memory()
    tombstones.write(cache, MARKED)
    with pytest.raises(DamagedError, match="gone"):
        tombstones.doomed(cache, ["a"])
    with pytest.raises(NotFoundError):
        list(tombstones.read_tombstones(cache, "gc-1"))
