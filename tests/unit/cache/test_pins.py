from __future__ import annotations

import datetime
from dataclasses import replace

import pytest

from calve.cache import manifest, pins, roots, tombstones
from calve.cache.manifest import Manifest
from calve.cache.objects import Listed
from calve.cache.roots import Root
from calve.cache.tombstones import Collection
from calve.errors import ConflictError, DamagedError, NotFoundError, SignatureError, UsageError
from calve.nix.hashes import encode32
from calve.nix.narinfo import NarInfo
from calve.nix.signing import Keyring, SecretKey

NOW = datetime.datetime(2026, 11, 23, 6, 0, 0, tzinfo=datetime.UTC)


@pytest.fixture
def shop(world):
    """Make a cache that has the closure of three; return what is in it, without a root."""
    entries = []
    for info in world.store.closure([world.top]):
        url = f"nar/{encode32(info.nar_hash.digest)}.nar.zst"
        entry = NarInfo(info.signed(world.key), url, "zstd", file_size=70)
        world.cache.data[url] = b"nar"
        world.cache.data[f"{info.path.digest}.narinfo"] = entry.dump()
        entries.append(entry)
    body = Manifest(world.top, tuple(reversed(entries))).dump()
    digest = manifest.digest_of(body)
    world.cache.data[manifest.key(digest)] = manifest.pack(body)
    world.digest, world.entries = digest, entries
    return world


def _begin(cache, state: str, *keys: str) -> None:
    """Have a collection under way that dooms some keys."""
    made = Collection("gc-1", "marked", NOW, 3600, len(keys), 1, told=True)
    if state == "sweeping":
        made = replace(made, state="sweeping", sweeper="me", expires=NOW)
    tombstones.write_tombstones(cache, "gc-1", [Listed(key, 1, "t", 0) for key in sorted(keys)])
    tombstones.write(cache, made)


def _pin(shop) -> Root | None:
    return roots.read_root(shop.cache, "pin", "it")


def test_a_manifest_is_pinned_by_its_digest(shop) -> None:
    made = pins.pin(shop.cache, "it", shop.digest)
    assert (made.owner, made.name, made.manifest) == ("pin", "it", shop.digest)
    assert shop.cache.count("head") == 7
    assert shop.cache.calls[-1][0] == "head", "it is looked after the root is written"
    assert _pin(shop).manifest == shop.digest


def test_what_a_root_keeps_already_is_not_looked_at(shop) -> None:
    roots.write_root(shop.cache, Root("push", "x", shop.digest, NOW))
    pins.pin(shop.cache, "it", shop.top)
    assert shop.cache.count("head") == 0
    assert _pin(shop).manifest == shop.digest


def test_a_path_is_pinned_by_a_manifest_of_its_narinfos(shop) -> None:
    made = pins.pin(shop.cache, "it", shop.tool, keyring=shop.ring)
    found = manifest.read(shop.cache, made.manifest)
    assert found.toplevel == shop.tool
    assert {entry.info.path for entry in found.paths} == {shop.tool, shop.lib}


@pytest.mark.parametrize("fault", ["untrusted", "missing", "damaged", "no keys"])
def test_bad_narinfos_make_no_pin(shop, fault) -> None:
    keyring = shop.ring
    key = f"{shop.lib.digest}.narinfo"
    expected = DamagedError
    if fault == "untrusted":
        keyring, expected = Keyring((SecretKey.generate("x-1").public,)), SignatureError
    elif fault == "no keys":
        keyring, expected = None, UsageError
    elif fault == "missing":
        del shop.cache.data[key]
        expected = NotFoundError
    else:
        shop.cache.data[key] = b"x"
    before = dict(shop.cache.data)
    with pytest.raises(expected):
        pins.pin(shop.cache, "it", shop.tool, keyring=keyring)
    assert shop.cache.data == before


@pytest.mark.parametrize("name", ["", "a/b", "..", "x" * 101])
def test_names_are_checked_first(shop, name) -> None:
    with pytest.raises(UsageError):
        pins.pin(shop.cache, name, shop.digest)
    assert not shop.cache.calls


def test_there_must_be_such_a_manifest(shop) -> None:
    with pytest.raises(NotFoundError):
        pins.pin(shop.cache, "it", "0" * 64)
    assert _pin(shop) is None


@pytest.mark.parametrize("before", [None, "0" * 64])
@pytest.mark.parametrize("what", ["nar", "narinfo"])
def test_what_is_missing_is_not_pinned(shop, what, before) -> None:
    entry = shop.entries[0]
    if before is not None:
        roots.write_root(shop.cache, Root("pin", "it", before, NOW))
    key = entry.url if what == "nar" else f"{entry.info.path.digest}.narinfo"
    del shop.cache.data[key]
    with pytest.raises(NotFoundError, match="1 of the 7 objects"):
        pins.pin(shop.cache, "it", shop.digest)
    found = _pin(shop)
    assert (found and found.manifest) == before


def test_what_is_being_removed_is_not_pinned(shop) -> None:
    _begin(shop.cache, "sweeping", shop.entries[0].url, "nar/other")
    with pytest.raises(ConflictError, match="1 of its 7"):
        pins.pin(shop.cache, "it", shop.digest)
    assert _pin(shop) is None


def test_what_is_only_marked_is_pinned(shop) -> None:
    _begin(shop.cache, "marked", *(entry.url for entry in shop.entries))
    pins.pin(shop.cache, "it", shop.digest)
    assert _pin(shop) is not None


def test_a_sweep_of_other_things_does_not_matter(shop) -> None:
    _begin(shop.cache, "sweeping", "nar/other")
    pins.pin(shop.cache, "it", shop.digest)
    assert _pin(shop) is not None


def test_a_pin_that_another_wrote_meanwhile_is_not_taken_back(shop) -> None:
    del shop.cache.data[shop.entries[0].url]
    theirs = Root("pin", "it", "1" * 64, NOW)

    def write(method: str, _key: str) -> None:
        if method == "head":
            shop.cache.before = lambda _method, _key: None
            roots.write_root(shop.cache, theirs)

    shop.cache.before = write
    with pytest.raises(NotFoundError):
        pins.pin(shop.cache, "it", shop.digest)
    assert _pin(shop) == theirs


def test_a_pin_is_removed(shop) -> None:
    pins.pin(shop.cache, "it", shop.digest)
    changed = []

    def change(method: str, key: str) -> None:
        if method == "delete" and not changed:
            changed.append(key)
            roots.write_root(shop.cache, Root("pin", "it", "1" * 64, NOW))

    shop.cache.before = change
    assert pins.unpin(shop.cache, "it").manifest == "1" * 64
    assert _pin(shop) is None
    with pytest.raises(NotFoundError, match="no such pin"):
        pins.unpin(shop.cache, "it")


def test_the_list_has_every_root_and_what_it_keeps(shop) -> None:
    roots.write_root(shop.cache, Root("web", "b", shop.digest, NOW))
    roots.write_root(shop.cache, Root("pin", "z", shop.digest, NOW))
    roots.write_root(shop.cache, Root("web", "a", "0" * 64, NOW))
    shop.cache.calls.clear()
    found = list(pins.kept(shop.cache))
    assert [(one.root.owner, one.root.name) for one in found] == [
        ("pin", "z"),
        ("web", "a"),
        ("web", "b"),
    ]
    first, gone, second = found
    assert (first.toplevel, first.paths, first.file_bytes) == (shop.top, 3, 210)
    assert first.nar_bytes == sum(entry.info.nar_size for entry in shop.entries)
    assert replace(second, root=first.root) == first
    assert gone.toplevel is None
    assert gone.problem
    assert shop.cache.count("get", "manifests/") == 2, "each is read once"
