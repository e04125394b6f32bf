from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from calve.cache import manifest as manifests
from calve.cache.directory import DirectoryObjects
from calve.cache.findings import Kind
from calve.cache.scope import scope
from calve.cache.sign import sign
from calve.cache.verify import verify
from calve.errors import ConflictError, NotFoundError, UsageError
from calve.nix.narinfo import NarInfo
from calve.nix.signing import Keyring, SecretKey

NEW = SecretKey.generate("new-1")
NEW_RING = Keyring((NEW.public,))


def info_key(path) -> str:
    return f"{path.digest}.narinfo"


def names(life, path) -> list[str]:
    return [one.name for one in life.entry(path).info.signatures]


def test_everything_gets_the_signature_beside_the_others(life) -> None:
    done = sign(life.cache, life.ring, NEW)
    assert (done.narinfos, done.manifests, done.known, done.refused) == (4, 2, 0, ())
    for path in life.store.infos:
        assert names(life, path) == ["new-1", "test-1"]
        assert NEW_RING.verify(life.entry(path).info.fingerprint, life.entry(path).info.signatures)
    manifest, signatures, _ = manifests.read_signed(life.cache, life.digest)
    assert [one.name for one in signatures] == ["new-1", "test-1"]
    assert {one.name for entry in manifest.paths for one in entry.info.signatures} == {"test-1"}
    assert verify(life.cache, life.ring, deep=True).errors == ()


def test_the_second_time_writes_nothing(life) -> None:
    sign(life.cache, life.ring, NEW)
    before = dict(life.cache.data)
    life.cache.calls.clear()
    done = sign(life.cache, life.ring, NEW)
    assert (done.narinfos, done.manifests, done.known) == (0, 0, 6)
    assert life.cache.count("put") == 0
    assert life.cache.data == before


def test_requests(life) -> None:
    life.cache.calls.clear()
    sign(life.cache, life.ring, NEW)
    # One listing, the record of collections, and each object once read and once written.
    assert len(life.cache.calls) == 1 + 1 + 2 * (4 + 2)


def test_a_dry_run_writes_nothing(life) -> None:
    before = dict(life.cache.data)
    life.cache.calls.clear()
    done = sign(life.cache, life.ring, NEW, dry_run=True)
    assert (done.narinfos, done.manifests) == (4, 2)
    assert life.cache.count("put") == 0
    assert life.cache.data == before


def test_what_no_trusted_key_signed_is_refused(life) -> None:
    entry = life.entry(life.lib)
    stranger = replace(entry.info, signatures=()).signed(SecretKey.generate("stranger-1"))
    life.put(replace(entry, info=stranger))
    key = manifests.key(life.digest)
    body, _ = manifests.unpack(life.cache.data[key], life.digest, "here")
    life.cache.data[key] = manifests.pack(body)
    before = dict(life.cache.data)
    done = sign(life.cache, life.ring, NEW)
    assert [(one.kind, one.key) for one in done.refused] == sorted(
        [(Kind.UNSIGNED, key), (Kind.UNSIGNED, info_key(life.lib))], key=lambda one: one[1]
    )
    assert (done.narinfos, done.manifests) == (3, 1)
    for one in (key, info_key(life.lib)):
        assert life.cache.data[one] == before[one]


def test_a_manifest_with_a_path_that_no_trusted_key_signed_is_refused(life) -> None:
    manifest = manifests.read(life.cache, life.digest)
    entries = [
        replace(one, info=replace(one.info, signatures=())) if one.info.path == life.lib else one
        for one in manifest.paths
    ]
    body = manifests.Manifest(life.top, tuple(entries)).dump()
    digest = manifests.digest_of(body)
    ours = life.key.sign(manifests.signed_bytes(digest))
    life.cache.data[manifests.key(digest)] = manifests.pack(body, [ours])
    done = sign(life.cache, life.ring, NEW, scope(life.cache, [digest]))
    (refused,) = done.refused
    assert (refused.kind, refused.key) == (Kind.UNSIGNED, manifests.key(digest))
    assert life.lib.basename in refused.why
    assert (done.narinfos, done.manifests) == (0, 0)


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: b"", lambda data: b"x"])
def test_damaged_objects_are_refused(life, change) -> None:
    for key in (manifests.key(life.digest), info_key(life.lib)):
        life.cache.data[key] = change(life.cache.data[key])
    done = sign(life.cache, life.ring, NEW)
    assert {(one.kind, one.key) for one in done.refused} == {
        (Kind.CORRUPT, manifests.key(life.digest)),
        (Kind.CORRUPT, info_key(life.lib)),
    }


def test_swapped_and_missing_narinfos_are_refused(life) -> None:
    data = life.cache.data
    data[info_key(life.lib)] = data[info_key(life.tool)]
    del data[info_key(life.top)]
    done = sign(life.cache, life.ring, NEW)
    assert {(one.kind, one.key) for one in done.refused} == {
        (Kind.CORRUPT, info_key(life.lib)),
        (Kind.MISSING, info_key(life.top)),
    }
    assert info_key(life.top) not in data


def test_only_what_was_named(life) -> None:
    done = sign(life.cache, life.ring, NEW, scope(life.cache, ["web/1"]))
    assert (done.narinfos, done.manifests) == (3, 1)
    assert names(life, life.new) == ["test-1"]
    done = sign(life.cache, life.ring, NEW, scope(life.cache, [str(life.new)]))
    assert (done.narinfos, done.manifests, done.known) == (1, 0, 2)
    with pytest.raises(NotFoundError):
        sign(life.cache, life.ring, NEW, scope(life.cache, ["web/9"]))
    (refused,) = sign(life.cache, life.ring, NEW, scope(life.cache, ["0" * 64])).refused
    assert refused.kind is Kind.MISSING


def test_a_closure_is_walked_by_its_narinfos(life) -> None:
    extra = life.store.add("extra", b"x", [life.top])
    life.send(extra)
    done = sign(life.cache, life.ring, NEW, scope(life.cache, [str(extra)]))
    assert (done.narinfos, done.refused) == (4, ())
    assert names(life, life.lib) == ["new-1", "test-1"]
    assert names(life, life.new) == ["test-1"]


def test_a_name_that_a_trusted_key_has_is_refused(life) -> None:
    before = dict(life.cache.data)
    with pytest.raises(UsageError, match="another key named test-1"):
        sign(life.cache, life.ring, SecretKey.generate("test-1"))
    assert life.cache.data == before
    assert sign(life.cache, life.ring, life.key).known == 6


def test_extra_fields_and_strangers_signatures_are_kept(life) -> None:
    stranger = SecretKey.generate("stranger-1")
    entry = life.entry(life.lib)
    life.put(replace(entry, info=entry.info.signed(stranger), extra=(("Nonce", "1"),)))
    sign(life.cache, life.ring, NEW)
    assert names(life, life.lib) == ["new-1", "stranger-1", "test-1"]
    assert life.entry(life.lib).extra == (("Nonce", "1"),)


def test_two_who_sign_at_once_lose_nothing(life, tmp_path) -> None:
    cache = DirectoryObjects(tmp_path / "cache")
    for key, data in life.cache.data.items():
        cache.put(key, data)
    keys = [SecretKey.generate(f"k-{number}") for number in range(3)]
    errors: list[Exception] = []

    def run(key: SecretKey) -> None:
        try:
            sign(cache, life.ring, key)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for path in life.store.infos:
        entry = NarInfo.parse(cache.get(info_key(path), 1 << 16))
        assert [one.name for one in entry.info.signatures] == ["k-0", "k-1", "k-2", "test-1"]
    for digest in (life.digest, life.digest_new):
        _, signatures, _ = manifests.read_signed(cache, digest)
        assert [one.name for one in signatures] == ["k-0", "k-1", "k-2", "test-1"]


def test_others_who_never_stop_writing(life) -> None:
    key = manifests.key(life.digest)
    body, signatures = manifests.unpack(life.cache.data[key], life.digest, "here")
    count = 0

    def before(method: str, name: str) -> None:
        nonlocal count
        if (method, name) == ("put", key):
            count += 1
            life.cache.data[key] = manifests.pack(body, signatures, nonce=str(count))

    life.cache.before = before
    with pytest.raises(ConflictError):
        sign(life.cache, life.ring, NEW)


def test_what_a_collection_is_about_to_remove_is_left_alone(life, now) -> None:
    from calve.cache import tombstones

    extra = life.store.add("extra", b"x")
    life.send(extra)
    listed = [one for one in life.cache.list("") if one.key == info_key(extra)]
    tombstones.write_tombstones(life.cache, "g1", listed)
    tombstones.write(
        life.cache, tombstones.Collection("g1", "marked", now, 86_400, 1, listed[0].size_bytes)
    )
    done = sign(life.cache, life.ring, NEW)
    assert done.narinfos == 4
    assert names(life, extra) == ["test-1"]
