from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest

from calve.cache import manifest as manifests
from calve.cache import pull
from calve.cache.content import NarCopy
from calve.cache.findings import Kind
from calve.cache.repair import repair
from calve.cache.scope import scope
from calve.cache.sources import CacheSource, StoreSource
from calve.cache.verify import verify
from calve.errors import CancelledError, DamagedError, SpaceError, TransientError
from calve.nix.signing import Keyring, SecretKey, Signature
from calve.tasks import Cancel


def info_key(path) -> str:
    return f"{path.digest}.narinfo"


@pytest.fixture
def store(life, database):
    return StoreSource(database(life.store), "the store")


@pytest.fixture
def other(life):
    """Return another cache, with everything that this one has, compressed otherwise."""
    cache = life.make("mem://other")
    life.fill(cache, level=19)
    for key, data in life.cache.data.items():
        if key.startswith(("manifests/", "roots/")):
            cache.data[key] = data
    return cache


def pulls(life, sink_type, top=None, digest=None) -> None:
    sink = sink_type()
    plan = pull.plan([life.cache], [top or life.top], sink, life.ring, manifest=digest)
    pull.pull(plan, sink)
    assert len(sink.valid) == 3


def check(life, fake_sink, done) -> None:
    """After a repair all is well, and readers of both kinds get everything."""
    assert done.left == ()
    assert verify(life.cache, life.ring, deep=True).errors == ()
    pulls(life, fake_sink)
    pulls(life, fake_sink, life.top, life.digest)
    pulls(life, fake_sink, life.new, life.digest_new)
    assert not [key for key in life.cache.data if key.startswith("pending/")]


def drop(key):
    return lambda life: life.cache.data.pop(key(life))


def cut(key):
    return lambda life: life.cache.data.update({key(life): life.cache.data[key(life)][:-7]})


def flip(key):
    def change(life) -> None:
        data = bytearray(life.cache.data[key(life)])
        data[len(data) // 2] ^= 4
        life.cache.data[key(life)] = bytes(data)

    return change


def nar(life) -> str:
    return life.nar(life.lib)


def narinfo(life) -> str:
    return info_key(life.lib)


def swap(life) -> None:
    data = life.cache.data
    one, two = info_key(life.lib), info_key(life.tool)
    data[one], data[two] = data[two], data[one]


def forge(life) -> None:
    entry = life.entry(life.lib)
    info = replace(entry.info, signatures=(Signature("test-1", bytes(64)),))
    life.put(replace(entry, info=info))


def lie(life) -> None:
    life.put(replace(life.entry(life.lib), file_size=7))


def lead_away(life) -> None:
    life.put(replace(life.entry(life.lib), url="nar/elsewhere.nar.zst"))


def rebuilt(life) -> None:
    entry = life.entry(life.lib)
    life.put(replace(entry, info=replace(entry.info, nar_size=8, signatures=()).signed(life.key)))


def swell(life) -> None:
    life.cache.data[info_key(life.lib)] = b"x" * 100_000


def both(life) -> None:
    drop(nar)(life)
    drop(narinfo)(life)


DAMAGES = {
    "nar gone": drop(nar),
    "nar truncated": cut(nar),
    "nar flipped": flip(nar),
    "narinfo gone": drop(narinfo),
    "narinfo truncated": cut(narinfo),
    "narinfo too long": swell,
    "narinfos swapped": swap,
    "forged signature": forge,
    "wrong file size": lie,
    "wrong url": lead_away,
    "another build": rebuilt,
    "nar and narinfo gone": both,
    "cache-info gone": drop(lambda _life: "nix-cache-info"),
}


@pytest.mark.parametrize("source", ["store", "other"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_put_right(life, store, other, fake_sink, damage, source) -> None:
    before = dict(life.cache.data)
    DAMAGES[damage](life)
    found = verify(life.cache, life.ring, deep=True)
    assert found.errors
    sources = [store if source == "store" else CacheSource(other, life.ring)]
    damaged = dict(life.cache.data)
    would = repair(life.cache, life.ring, sources, deep=True, dry_run=True)
    assert life.cache.data == damaged
    done = repair(life.cache, life.ring, sources, deep=True)
    assert (would.repaired, would.left, would.sent_bytes) == (done.repaired, done.left, 0)
    assert set(done.repaired) == set(found.errors)
    check(life, fake_sink, done)
    if source == "store":
        assert life.cache.data == before  # a NAR comes out as the push had made it


def test_nothing_to_do(life, store) -> None:
    before = dict(life.cache.data)
    life.cache.calls.clear()
    done = repair(life.cache, life.ring, [store])
    assert (done.repaired, done.left, done.sent_bytes) == ((), (), 0)
    assert life.cache.data == before
    assert life.cache.count("put") == 0


def test_requests_are_for_what_is_damaged(life, store) -> None:
    drop(nar)(life)
    life.cache.calls.clear()
    done = repair(life.cache, life.ring, [store])
    assert done.sent_bytes == len(life.cache.data[life.nar(life.lib)])
    assert [key for key in life.cache.keys("put") if not key.startswith("pending/")] == [
        life.nar(life.lib)
    ]


def test_without_a_source_what_can_be_is_repaired_and_the_rest_is_told(life, fake_sink) -> None:
    data = life.cache.data
    kept = data.pop(nar(life))
    del data[info_key(life.tool)]
    done = repair(life.cache, life.ring, [])
    assert [one.key for one in done.repaired] == [info_key(life.tool)]
    (left,) = done.left
    assert left.finding.kind is Kind.MISSING
    assert "--store" in left.why
    assert done.sent_bytes == 0
    data[nar(life)] = kept
    check(life, fake_sink, repair(life.cache, life.ring, []))


def test_a_damaged_source_is_not_believed(life, store, other, fake_sink) -> None:
    url = life.nar(life.lib)
    good = other.data[url]
    damaged = bytearray(good)
    damaged[5_000] ^= 1
    other.data[url] = bytes(damaged)
    (life.store.real(life.lib) / "file").write_bytes(b"somebody changed it")
    drop(nar)(life)
    done = repair(life.cache, life.ring, [CacheSource(other, life.ring), store])
    assert url not in life.cache.data
    (left,) = done.left
    assert "mem://other: " in left.why
    assert "the store: the store path changed on disk" in left.why
    other.data[url] = good
    check(life, fake_sink, repair(life.cache, life.ring, [store, CacheSource(other, life.ring)]))


def test_a_source_with_another_build_or_none(life, database) -> None:
    drop(nar)(life)
    (life.store.real(life.lib) / "file").write_bytes(b"built again")
    life.store.register(life.lib)
    done = repair(life.cache, life.ring, [StoreSource(database(life.store), "the store")])
    assert "another build" in done.left[0].why
    del life.store.infos[life.lib]
    done = repair(life.cache, life.ring, [StoreSource(database(life.store), "the store")])
    assert "not a valid path" in done.left[0].why


def test_a_source_whose_key_is_not_trusted(life, other) -> None:
    for path in life.store.infos:
        life.send(path, other, key=SecretKey.generate("other-1"))
    drop(nar)(life)
    done = repair(life.cache, life.ring, [CacheSource(other, life.ring)])
    assert "no trusted key" in done.left[0].why


def test_an_xz_source_is_compressed_anew(life, other, fake_sink) -> None:
    import lzma

    from calve.cache.compression import decompressor

    entry = life.entry(life.lib, other)
    rest = [other.data.pop(entry.url)]
    content = decompressor("zstd", lambda _size: rest.pop() if rest else b"")
    plain = b""
    while chunk := content(1 << 20):
        plain += chunk
    other.data["nar/lib.nar.xz"] = lzma.compress(plain)
    life.put(
        replace(entry, url="nar/lib.nar.xz", compression="xz", file_hash=None, file_size=None),
        other,
    )
    drop(nar)(life)
    check(life, fake_sink, repair(life.cache, life.ring, [CacheSource(other, life.ring)]))
    assert life.entry(life.lib).compression == "zstd"


def test_a_nar_of_another_compression_gets_a_key_of_its_own(life, store) -> None:
    """A cache that `nix copy` filled: no manifest, xz, keys by the hash of the file."""
    data = life.cache.data
    for key in [key for key in data if key.startswith(("manifests/", "roots/"))]:
        del data[key]
    entry = life.entry(life.lib)
    life.put(replace(entry, url="nar/0abc.nar.xz", compression="xz"))
    done = repair(life.cache, life.ring, [store])
    assert done.left == ()
    assert life.entry(life.lib) == entry
    assert verify(life.cache, life.ring, deep=True).errors == ()


def test_a_lost_nar_goes_where_manifests_lead(life, store, fake_sink) -> None:
    entry = life.entry(life.lib)
    life.put(replace(entry, url="nar/fresh.nar.zst"))
    drop(lambda _life: entry.url)(life)
    check(life, fake_sink, repair(life.cache, life.ring, [store]))
    assert life.entry(life.lib) == entry


def test_what_is_unsupported_is_compressed_anew(life, store, fake_sink) -> None:
    life.put(replace(life.entry(life.lib), compression="lzip"))
    (finding,) = verify(life.cache, life.ring).errors
    assert finding.kind is Kind.UNSUPPORTED
    check(life, fake_sink, repair(life.cache, life.ring, [store]))


def test_signatures_are_kept_but_for_forged_ones(life, store) -> None:
    other = SecretKey.generate("other-1").sign(b"whatever: it cannot be judged")
    forged = Signature("test-1", bytes(64))
    entry = life.entry(life.lib)
    good = entry.info.signatures[0]
    info = replace(entry.info, signatures=(forged, good, other))
    life.put(replace(entry, info=info, extra=(("Nonce", "1"),)))
    drop(nar)(life)
    cut(lambda _life: info_key(life.tool))(life)
    done = repair(life.cache, life.ring, [store])
    assert done.left == ()
    again = life.entry(life.lib)
    assert again.info.signatures == tuple(sorted((good, other)))
    assert again.extra == (("Nonce", "1"),)


def test_dangling_references_are_filled_with_all_that_they_need(life, other, store) -> None:
    base = life.store.add("base", os.urandom(9_000))
    gone = life.store.add("gone", b"x", [base])
    extra = life.store.add("extra", b"y", [gone])
    life.send(extra)
    life.send(base, other)
    life.send(gone, other)
    done = repair(life.cache, life.ring, [store])
    assert [left.finding.path for left in done.left] == [gone]
    assert "calve push" in done.left[0].why  # the store's paths are not signed
    done = repair(life.cache, life.ring, [CacheSource(other, life.ring)])
    assert {one.path for one in done.repaired} == {gone, base}
    assert done.left == ()
    assert verify(life.cache, life.ring, deep=True).errors == ()
    puts = [key for key in life.cache.keys("put") if key.endswith(".narinfo")]
    assert puts == [info_key(base), info_key(gone)]


def test_a_store_that_keeps_signatures_fills_dangling_references(life, database) -> None:
    gone = life.store.add("gone")
    life.send(life.store.add("extra", b"y", [gone]))
    source = StoreSource(database(life.store, life.key), "the store")
    assert repair(life.cache, life.ring, [source]).left == ()
    assert verify(life.cache, life.ring, deep=True).errors == ()


def test_two_builds_that_manifests_name(life, database) -> None:
    old = life.entry(life.lib)
    content = (life.store.real(life.lib) / "file").read_bytes()
    (life.store.real(life.lib) / "file").write_bytes(b"built again")
    life.store.register(life.lib)
    life.send(life.lib)
    life.digest_new = life.keep(life.new, ("web", "2"))
    kept = life.cache.data.pop(old.url)
    (finding,) = verify(life.cache, life.ring).errors
    assert finding.kind is Kind.DIFFERENT
    source = StoreSource(database(life.store), "the store")
    (left,) = repair(life.cache, life.ring, [source]).left
    assert "another build" in left.why
    (life.store.real(life.lib) / "file").write_bytes(content)
    life.store.register(life.lib)
    assert repair(life.cache, life.ring, [source]).left == ()
    assert life.cache.data[old.url] == kept
    assert verify(life.cache, life.ring, deep=True).errors == ()
    del life.cache.data[info_key(life.lib)]
    (left,) = repair(life.cache, life.ring, [source]).left
    assert "different builds" in left.why


@pytest.mark.parametrize("how", [drop, cut, flip])
def test_a_manifest_comes_from_another_cache_with_what_it_names(
    life, other, fake_sink, how
) -> None:
    how(lambda _life: manifests.key(life.digest))(life)
    drop(lambda _life: info_key(life.top))(life)
    done = repair(life.cache, life.ring, [CacheSource(other, life.ring)])
    assert {one.key for one in done.repaired} == {manifests.key(life.digest), info_key(life.top)}
    check(life, fake_sink, done)


@pytest.mark.parametrize("first", [False, True])
def test_a_damaged_manifest_is_made_again_out_of_narinfos(life, store, fake_sink, first) -> None:
    if first:
        kernel = life.store.add("linux-6.12", b"kernel")
        system = life.store.add("system", b"system", [kernel, life.lib, life.tool])
        for path in (kernel, system):
            life.send(path)
        key = manifests.key(life.keep(system, ("web", "3"), first=[kernel]))
    else:
        key = manifests.key(life.digest)
    before = life.cache.data[key]
    cut(lambda _life: key)(life)
    done = repair(life.cache, life.ring, [store])
    assert life.cache.data[key] == before  # its signatures were still readable
    check(life, fake_sink, done)


def test_a_manifest_that_is_gone_loses_its_signatures(life, store) -> None:
    key = manifests.key(life.digest)
    del life.cache.data[key]
    done = repair(life.cache, life.ring, [store])
    assert [one.key for one in done.repaired] == [key]
    (left,) = done.left
    assert left.finding.kind is Kind.UNSIGNED
    assert "calve push" in left.why
    manifest = manifests.read(life.cache, life.digest)
    assert manifest.toplevel == life.top
    (again,) = verify(life.cache, life.ring).errors
    assert (again.kind, again.key) == (Kind.UNSIGNED, key)


def test_a_manifest_with_fewer_signatures_than_the_narinfos_have(life, store) -> None:
    for path in life.store.infos:
        entry = life.entry(path)
        life.put(replace(entry, info=entry.info.signed(SecretKey.generate("later-1"))))
    cut(lambda _life: manifests.key(life.digest))(life)
    assert repair(life.cache, life.ring, [store]).left == ()
    assert verify(life.cache, life.ring).errors == ()


def test_a_manifest_that_cannot_be_made_again_is_told(life, store) -> None:
    del life.cache.data[manifests.key(life.digest)]
    life.put(replace(life.entry(life.top), file_hash=None))
    done = repair(life.cache, life.ring, [store])
    assert manifests.key(life.digest) not in life.cache.data
    assert [(one.finding.key, "calve push" in one.why) for one in done.left] == [
        (manifests.key(life.digest), True)
    ]


def test_a_forged_signature_does_not_outlive_a_repair(life, store) -> None:
    key = manifests.key(life.digest)
    body, _ = manifests.unpack(life.cache.data[key], life.digest, "here")
    life.cache.data[key] = manifests.pack(body, [Signature("test-1", bytes(64))])[:-7]
    (left,) = repair(life.cache, life.ring, [store]).left
    assert left.finding.kind is Kind.UNSIGNED
    assert manifests.read_signed(life.cache, life.digest)[1] == ()


def test_a_manifest_keeps_its_signatures_when_its_body_is_copied(life, other) -> None:
    key = manifests.key(life.digest)
    body, _ = manifests.unpack(life.cache.data[key], life.digest, "here")
    other.data[key] = manifests.pack(body)
    cut(lambda _life: key)(life)
    assert repair(life.cache, life.ring, [CacheSource(other, life.ring)]).left == ()
    assert verify(life.cache, life.ring).errors == ()
    del life.cache.data[key]
    for dry_run in (True, False):
        sources = [CacheSource(other, life.ring)]
        (left,) = repair(life.cache, life.ring, sources, dry_run=dry_run).left
        assert left.finding.kind is Kind.UNSIGNED


def test_an_unsigned_manifest_gets_its_signature_from_another_cache(life, other, store) -> None:
    key = manifests.key(life.digest)
    body, _ = manifests.unpack(life.cache.data[key], life.digest, "here")
    life.cache.data[key] = manifests.pack(body)
    (left,) = repair(life.cache, life.ring, [store]).left
    assert left.finding.kind is Kind.UNSIGNED
    assert repair(life.cache, life.ring, [CacheSource(other, life.ring)]).left == ()
    assert verify(life.cache, life.ring).errors == ()


def test_what_cannot_be_repaired(life, store) -> None:
    data = life.cache.data
    data["roots/web/3.json"] = b"{"
    data["nix-cache-info"] = b"StoreDir: /gnu/store\n"
    data[f"{'0' * 32}.narinfo"] = b"nobody knows"
    before = dict(data)
    done = repair(life.cache, life.ring, [store])
    assert done.repaired == ()
    assert {one.finding.key for one in done.left} == {
        "roots/web/3.json", "nix-cache-info", f"{'0' * 32}.narinfo",
    }  # fmt: skip
    assert all(one.why for one in done.left)
    assert data == before


def test_only_what_was_named(life, store) -> None:
    del life.cache.data[info_key(life.top)]
    del life.cache.data[info_key(life.new)]
    done = repair(life.cache, life.ring, [store], scope(life.cache, ["web/1"]))
    assert [one.path for one in done.repaired] == [life.top]
    assert info_key(life.new) not in life.cache.data


def test_a_pending_record_keeps_what_is_written(life, store) -> None:
    drop(nar)(life)
    seen = []

    def before(method: str, key: str) -> None:
        if method == "put" and key == life.nar(life.lib):
            seen.extend(one for one in life.cache.data if one.startswith("pending/"))

    life.cache.before = before
    repair(life.cache, life.ring, [store])
    assert len(seen) == 1
    assert not [one for one in life.cache.data if one.startswith("pending/")]


def test_two_paths_with_one_nar_are_sent_once(life, store) -> None:
    twin = life.store.add("twin", (life.store.real(life.lib) / "file").read_bytes())
    life.send(twin)
    assert life.nar(twin) == life.nar(life.lib)
    drop(nar)(life)
    life.cache.calls.clear()
    done = repair(life.cache, life.ring, [store])
    assert done.left == ()
    assert life.cache.count("put", "nar/") == 1


@pytest.mark.parametrize("error", [SpaceError("full"), TransientError("503")])
def test_a_cache_that_cannot_be_written_to_is_an_error(life, store, error) -> None:
    drop(nar)(life)

    def before(method: str, key: str) -> None:
        if method == "put" and key.startswith("nar/"):
            raise error

    life.cache.before = before
    with pytest.raises(type(error)):
        repair(life.cache, life.ring, [store])


def test_a_source_that_is_out_of_reach_is_no_error(life, other, store, fake_sink) -> None:
    drop(nar)(life)

    def before(method: str, key: str) -> None:
        if method == "open":
            raise TransientError("503")

    other.before = before
    done = repair(life.cache, life.ring, [CacheSource(other, life.ring)])
    assert "503" in done.left[0].why
    check(life, fake_sink, repair(life.cache, life.ring, [CacheSource(other, life.ring), store]))


def test_cancelled_while_a_nar_is_sent(life, store) -> None:
    drop(nar)(life)
    cancel = Cancel()

    def before(method: str, key: str) -> None:
        if method == "put" and key.startswith("pending/"):
            cancel.cancel()

    life.cache.before = before
    with pytest.raises(CancelledError):
        repair(life.cache, life.ring, [store], cancel=cancel)
    assert nar(life) not in life.cache.data
    assert threading.active_count() == 1


def test_a_copy_is_what_it_says(life) -> None:
    entry = life.entry(life.lib)
    for level in (None, 1):
        copy = NarCopy(life.cache, entry, level)
        data = b"".join(copy.chunks())
        assert copy.file_size == len(data)
        if level is None:
            assert (data, copy.file_hash) == (life.cache.data[entry.url], entry.file_hash)
    wrong = replace(entry, info=replace(entry.info, nar_size=entry.info.nar_size - 1))
    with pytest.raises(DamagedError, match="not the one that was signed"):
        list(NarCopy(life.cache, wrong, None).chunks())
    life.cache.data[entry.url] += b"\x50\x2a\x4d\x18\x00\x00\x20\x00" + bytes(1 << 21)
    with pytest.raises(DamagedError, match="longer than any compression"):
        list(NarCopy(life.cache, entry, None).chunks())


def test_the_keyring_decides(life, store) -> None:
    """A manifest and narinfos that only strangers signed are not taken for the truth."""
    ring = Keyring((SecretKey.generate("mine-1").public,))
    before = dict(life.cache.data)
    del life.cache.data[info_key(life.lib)]
    done = repair(life.cache, ring, [store])
    assert done.repaired == ()
    before.pop(info_key(life.lib))
    assert life.cache.data == before
