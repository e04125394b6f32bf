from __future__ import annotations

import datetime
import hashlib

import pytest

from calve.cache import roots
from calve.cache.roots import Pending, Root
from calve.errors import DamagedError, NotFoundError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

NOW = datetime.datetime(2026, 11, 23, 6, 0, 0, tzinfo=datetime.UTC)
ROOT = Root("web", "release-00000001", "a" * 64, NOW)


def _infos(count: int) -> list[PathInfo]:
    digests = [hashlib.sha256(b"%d" % n).digest() for n in range(count)]
    return [
        PathInfo(StorePath(f"{n:032}", "x"), Hash("sha256", digest), 8, ())
        for n, digest in enumerate(digests)
    ]


def test_a_root_is_written_read_and_replaced(memory) -> None:
    cache = memory()
    assert roots.read_root(cache, "web", "release-00000001") is None
    roots.write_root(cache, ROOT)
    assert list(cache.data) == ["roots/web/release-00000001.json"]
    assert roots.read_root(cache, "web", "release-00000001") == ROOT
    later = Root("web", "release-00000001", "b" * 64, NOW, checked=True, gc="gc-7")
    assert roots.write_root(cache, later)
    assert roots.read_root(cache, "web", "release-00000001") == later
    _, tag = roots.tagged_root(cache, "web", "release-00000001")
    assert roots.write_root(cache, ROOT, match=tag)
    assert not roots.write_root(cache, later, match=tag)


def test_a_root_of_before_there_were_collections_is_not_checked() -> None:
    data = ROOT.dump().replace(b',"checked":false,"gc":null', b"")
    assert b"checked" not in data
    assert Root.parse(data) == ROOT
    with pytest.raises(DamagedError, match="checked"):
        Root.parse(ROOT.dump().replace(b"false", b"7"))


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


@pytest.mark.parametrize(("count", "objects"), [(0, 1), (40, 1), (1000, 2)])
def test_pending_paths_stand_apart_where_they_are_many(memory, count: int, objects: int) -> None:
    cache = memory()
    pending = Pending.of("id-1", _infos(count), now=NOW, lasts_s=3600, previous="b" * 64)
    assert pending.expires - pending.created == datetime.timedelta(hours=1)
    roots.write_pending(cache, pending)
    assert len(cache.data) == objects
    assert cache.keys("put")[-1] == "pending/id-1.json"  # whoever sees it finds its paths
    assert len(cache.data["pending/id-1.json"]) <= 4096
    assert roots.read_pending(cache, "id-1") == pending
    assert len(pending.paths) == 2 * count  # store paths and NARs
    later = pending.renewed(NOW + datetime.timedelta(minutes=30), 3600)
    before = cache.count("put")
    roots.write_pending(cache, later, renew=True)
    assert cache.count("put") == before + 1
    read = roots.read_pending(cache, "id-1")
    assert (read.created, read.expires) == (NOW, NOW + datetime.timedelta(minutes=90))
    roots.remove_pending(cache, pending)
    assert cache.data == {}
    assert cache.keys("delete")[0] == "pending/id-1.json"
    with pytest.raises(NotFoundError):
        roots.read_pending(cache, "id-1")


def test_malformed_pending_paths_are_damage(memory) -> None:
    cache = memory()
    roots.write_pending(cache, Pending.of("id-1", _infos(1000), now=NOW, lasts_s=1))
    cache.data["pending/id-1.paths"] = b"../x\n"
    with pytest.raises(DamagedError):
        roots.read_pending(cache, "id-1")
