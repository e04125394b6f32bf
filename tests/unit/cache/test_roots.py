from __future__ import annotations

import datetime

import pytest

from calve.cache import roots
from calve.cache.roots import Pending, Root
from calve.errors import DamagedError, NotFoundError, UsageError
from calve.nix.storepath import StorePath

NOW = datetime.datetime(2026, 11, 23, 6, 0, 0, tzinfo=datetime.UTC)
ROOT = Root("web", "release-00000001", "a" * 64, NOW)


def _paths(count: int) -> list[StorePath]:
    return [StorePath(f"{n:032}", "x") for n in range(count)]


def test_a_root_is_written_read_and_replaced(memory) -> None:
    cache = memory()
    assert roots.read_root(cache, "web", "release-00000001") is None
    roots.write_root(cache, ROOT)
    assert list(cache.data) == ["roots/web/release-00000001.json"]
    assert roots.read_root(cache, "web", "release-00000001") == ROOT
    later = Root("web", "release-00000001", "b" * 64, NOW)
    roots.write_root(cache, later)
    assert roots.read_root(cache, "web", "release-00000001") == later


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "a b", "ä", "x" * 101])
def test_names_that_are_no_keys_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Root("web", name, "a" * 64, NOW)
    with pytest.raises(UsageError):
        Root(name, "web", "a" * 64, NOW)
    with pytest.raises(UsageError):
        Root("web", "x", name, NOW)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"web"', b'"../x"'),
        (b'"web"', b"7"),
        (b"a" * 64, b"a" * 63),
        (b"2026-11-23T", b"yesterday "),
        (b'{"version":1', b'{"version":-1'),
        (b"}", b"]"),
        (b"{", b"{" + b" " * 5000),
    ],
)
def test_malformed_roots_are_damage(old: bytes, new: bytes) -> None:
    with pytest.raises(DamagedError):
        Root.parse(ROOT.dump().replace(old, new))


def test_unknown_versions_are_refused_and_unknown_fields_ignored() -> None:
    data = ROOT.dump()
    assert Root.parse(data.replace(b"{", b'{"later":1,')) == ROOT
    with pytest.raises(UsageError, match="version 2"):
        Root.parse(data.replace(b'"version":1', b'"version":2'))


@pytest.mark.parametrize(("count", "objects"), [(0, 1), (90, 1), (1000, 2)])
def test_pending_paths_stand_apart_where_they_are_many(memory, count: int, objects: int) -> None:
    cache = memory()
    pending = Pending.of("id-1", _paths(count), now=NOW, lasts_s=3600, previous="b" * 64)
    assert pending.expires - pending.created == datetime.timedelta(hours=1)
    roots.write_pending(cache, pending)
    assert len(cache.data) == objects
    assert cache.keys("put")[-1] == "pending/id-1.json"  # whoever sees it finds its paths
    assert len(cache.data["pending/id-1.json"]) <= 4096
    assert roots.read_pending(cache, "id-1") == pending
    roots.remove_pending(cache, pending)
    assert cache.data == {}
    assert cache.keys("delete")[0] == "pending/id-1.json"
    with pytest.raises(NotFoundError):
        roots.read_pending(cache, "id-1")


def test_malformed_pending_paths_are_damage(memory) -> None:
    cache = memory()
    roots.write_pending(cache, Pending.of("id-1", _paths(1000), now=NOW, lasts_s=1))
    cache.data["pending/id-1.paths"] = b"../x\n"
    with pytest.raises(DamagedError):
        roots.read_pending(cache, "id-1")
