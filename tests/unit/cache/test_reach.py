from __future__ import annotations

import datetime
import hashlib
from dataclasses import replace

import pytest

from calve.cache import manifest, roots
from calve.cache.manifest import Manifest
from calve.cache.objects import Listed
from calve.cache.reach import Kind, Reach, kind_of, survey
from calve.cache.roots import Pending, Root
from calve.errors import DamagedError
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.storepath import StorePath

NOW = datetime.datetime(2026, 11, 23, 6, 0, 0, tzinfo=datetime.UTC)
NOW_S = NOW.timestamp()


def _entry(number: int) -> NarInfo:
    digest = hashlib.sha256(str(number).encode()).digest()
    path = StorePath(encode32(digest[:20]), f"p{number}")
    info = PathInfo(path, Hash("sha256", digest), 100)
    return NarInfo(info, f"nar/{encode32(digest)}.nar.zst", "zstd", file_size=9)


def _narinfo(entry: NarInfo) -> str:
    return f"{entry.info.path.digest}.narinfo"


def _put(cache, *entries: NarInfo) -> str:
    body = Manifest(entries[0].info.path, entries).dump()
    digest = manifest.digest_of(body)
    cache.data[manifest.key(digest)] = manifest.pack(body)
    for entry in entries:
        cache.data[_narinfo(entry)] = entry.dump()
        cache.data[entry.url] = b"nar"
    return digest


def _reach(cache, **more) -> Reach:
    reach = Reach(cache, NOW_S, 3600, **more)
    reach.read()
    return reach


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("0" * 32 + ".narinfo", Kind.NARINFO),
        ("u" * 32 + ".narinfo", None),
        ("0" * 33 + ".narinfo", None),
        ("x/" + "0" * 32 + ".narinfo", None),
        ("0" * 32 + ".narinfo\n", None),
        ("nar/x", Kind.NAR),
        ("nar/", None),
        ("nars/x", None),
        ("manifests/" + "0" * 64 + ".json.zst", Kind.MANIFEST),
        ("manifests/" + "0" * 64 + ".sig.json", None),
        ("manifests/" + "0" * 64, None),
        ("manifests/" + "g" * 64 + ".json.zst", None),
        ("gc.json", None),
        ("roots/push/web.json", None),
        ("fleets/web/nar/x", None),
    ],
)
def test_kinds(memory, key, kind) -> None:
    assert kind_of(key) is kind
    assert _reach(memory()).keeps(key) is (kind is None)


def test_a_manifest_keeps_its_paths_and_the_nars_that_it_names(memory) -> None:
    cache = memory()
    one, other = _entry(1), replace(_entry(2), url="nar/elsewhere.nar.xz")
    digest = _put(cache, one, other)
    roots.write_root(cache, Root("web", "x", digest, NOW))
    reach = _reach(cache)
    for key in (manifest.key(digest), _narinfo(one), _narinfo(other), one.url, other.url):
        assert reach.keeps(key)
    for key in (_entry(2).url, _entry(3).url, _narinfo(_entry(3)), f"{one.url}.more"):
        assert not reach.keeps(key)
    assert (reach.roots, reach.manifests, reach.pending) == (1, 1, 0)


def test_a_push_keeps_every_nar_of_its_hashes(memory) -> None:
    cache = memory()
    entry = _entry(1)
    roots.write_pending(cache, Pending.of("p", [entry.info], now=NOW, lasts_s=60))
    reach = _reach(cache)
    hashed = entry.url[:56]
    for key in (
        _narinfo(entry),
        *(f"{hashed}{end}" for end in (".nar.xz", ".nar", "-gc1.nar.zst")),
    ):
        assert reach.keeps(key)
    for key in (f"{hashed}0.nar.zst", f"{hashed[:-1]}.nar.zst", _entry(2).url):
        assert not reach.keeps(key)


def test_records_that_are_known_are_not_read_again(memory) -> None:
    cache = memory()
    first = Pending.of("p", [_entry(1).info], now=NOW, lasts_s=60)
    roots.write_pending(cache, first)
    reach = _reach(cache)
    cache.calls.clear()
    reach.read_pending()
    assert (cache.count("list"), cache.count("get")) == (1, 0)
    roots.write_pending(cache, first.renewed(NOW, 7200))
    roots.write_pending(cache, Pending.of("q", [_entry(2).info], now=NOW, lasts_s=60))
    reach.read_pending()
    assert cache.count("get") == 2
    assert reach.keeps(_narinfo(_entry(1)))
    assert reach.keeps(_narinfo(_entry(2)))


def test_each_manifest_is_read_once_however_many_keep_it(memory) -> None:
    cache = memory()
    digest = _put(cache, _entry(1))
    for name in ("a", "b", "c"):
        roots.write_root(cache, Root("web", name, digest, NOW))
    cache.written[manifest.key(digest)] = NOW_S  # and it is young
    cache.calls.clear()
    assert _reach(cache).manifests == 1
    assert cache.count("get", "manifests/") == 1


def test_pushes_are_read_before_roots_and_these_before_manifests(memory) -> None:
    """A push has its root before it removes its record: whoever reads in this order sees one of them."""
    cache = memory()
    _reach(cache)
    assert cache.keys("list") == ["pending/", "roots/", "manifests/"]


@pytest.mark.parametrize("place", ["list", "get"])
def test_records_that_go_meanwhile_are_passed_over(memory, place) -> None:
    cache = memory()
    digest = _put(cache, _entry(1))
    roots.write_root(cache, Root("web", "x", digest, NOW))
    roots.write_pending(cache, Pending.of("p", [_entry(2).info], now=NOW, lasts_s=60))
    many = Pending.of("q", [_entry(n).info for n in range(200)], now=NOW, lasts_s=60)
    roots.write_pending(cache, many)

    def go(method: str, key: str) -> None:
        if place == "get" and method == "get" and key == "pending/q.paths":
            roots.remove_pending(cache, many)
        elif place == "list" and method == "get" and key.startswith(("pending/", "roots/")):
            cache.data.pop(key, None)

    whole = cache.list
    cache.list = lambda prefix: iter(list(whole(prefix)))  # a page, as it was
    cache.before = go
    reach = _reach(cache)
    assert reach.roots == (0 if place == "list" else 1)
    assert reach.pending == (0 if place == "list" else 1)


def test_the_manifest_that_a_push_builds_on_must_be_there(memory) -> None:
    cache = memory()
    pending = Pending.of("p", [], now=NOW, lasts_s=60, previous="a" * 64)
    roots.write_pending(cache, pending)
    with pytest.raises(DamagedError, match=r"pending/p\.json.*missing"):
        _reach(cache)


# The survey


def test_a_narinfo_that_stays_is_read_where_no_manifest_says_its_bytes(memory) -> None:
    cache = memory()
    entries = [_entry(n) for n in range(20)]
    digest = _put(cache, *entries)
    roots.write_root(cache, Root("web", "x", digest, NOW))
    garbage = _entry(99)
    _put(cache, garbage)
    other = replace(entries[3], url="nar/other.nar.xz")
    cache.data[_narinfo(other)] = other.dump()
    cache.data[other.url] = b"nar"

    class Tags:
        """Gives tags as S3 does."""

        def __getattr__(self, name):
            return getattr(cache, name)

        def list(self, prefix):
            for one in cache.list(prefix):
                digest = hashlib.md5(cache.data[one.key]).hexdigest()
                yield replace(one, tag=f'"{digest}"')

    objects = Tags()
    reach = _reach(objects)
    cache.calls.clear()
    found = survey(objects, reach, lambda _one: True, jobs=2)
    assert [key for key in cache.keys("get") if "narinfo" in key] == [_narinfo(other)]
    assert [one.key for one in found.found[Kind.NAR]] == [garbage.url]
    assert [one.key for one in found.sorted()] == sorted(one.key for one in found.sorted())
    assert found.listed.objects == {Kind.MANIFEST: 2, Kind.NARINFO: 21, Kind.NAR: 22}
    assert cache.count("list") == 1


def test_no_narinfo_is_read_where_no_nar_would_go(memory) -> None:
    cache = memory()
    roots.write_root(cache, Root("web", "x", _put(cache, _entry(1)), NOW))
    reach = _reach(cache)
    cache.calls.clear()
    assert survey(cache, reach, lambda _one: True, jobs=2).tally.total == 0
    assert cache.count("get") == 0


@pytest.mark.parametrize("tag", ['"zz"', "", "123-456-789", '"0a-2"'])
def test_tags_that_are_no_md5_are_of_no_use(memory, tag) -> None:
    assert not _reach(memory()).knows(Listed("x", 1, tag, 0))
