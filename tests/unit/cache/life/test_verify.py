from __future__ import annotations

import os
from dataclasses import replace

import pytest

from calve.cache import manifest as manifests
from calve.cache.findings import Kind
from calve.cache.scope import scope
from calve.cache.verify import verify
from calve.errors import CancelledError, NotFoundError, TransientError, UsageError
from calve.nix.hashes import Hash
from calve.nix.signing import Keyring, SecretKey, Signature
from calve.progress import Step
from calve.tasks import Cancel


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def found(life, *names: str, deep: bool = False, ring=None):
    """Return the errors, as (kind, key) pairs."""
    chosen = scope(life.cache, names)
    done = verify(life.cache, ring or life.ring, chosen, deep=deep)
    return [(str(one.kind), one.key) for one in done.errors]


def info_key(path) -> str:
    return f"{path.digest}.narinfo"


@pytest.mark.parametrize("deep", [False, True])
def test_a_good_cache_is_good(life, deep) -> None:
    done = verify(life.cache, life.ring, deep=deep)
    assert done.findings == ()
    assert (done.roots, done.manifests, done.narinfos, done.nars) == (2, 2, 4, 4)
    nars = sum(len(data) for key, data in life.cache.data.items() if key.startswith("nar/"))
    assert done.read_bytes == (nars if deep else 0)


def test_requests(life) -> None:
    life.cache.calls.clear()
    verify(life.cache, life.ring)
    calls = life.cache.calls
    # One listing; cache-info, 2 roots, 2 manifests, 4 narinfos; no NAR is asked for.
    assert life.cache.count("list") == 1
    assert life.cache.count("get") == 1 + 2 + 2 + 4
    assert len(calls) == 10
    calls.clear()
    verify(life.cache, life.ring, deep=True)
    assert life.cache.count("open") == 4
    assert len(calls) == 14


def test_a_nar_that_two_paths_have_is_read_once(life) -> None:
    twin = life.store.add("twin", (life.store.real(life.lib) / "file").read_bytes())
    life.send(twin)
    assert life.nar(twin) == life.nar(life.lib)
    done = verify(life.cache, life.ring, deep=True)
    assert life.cache.keys("open").count(life.nar(twin)) == 1
    assert done.nars == 4


def test_a_nar_that_is_gone(life) -> None:
    del life.cache.data[life.nar(life.lib)]
    assert found(life) == [("missing", life.nar(life.lib))]


@pytest.mark.parametrize("how", ["truncated", "longer", "empty"])
def test_a_nar_of_another_size(life, how) -> None:
    key = life.nar(life.lib)
    data = life.cache.data[key]
    life.cache.data[key] = {"truncated": data[:-1], "longer": data + b"x", "empty": b""}[how]
    assert found(life) == [("corrupt", key)]
    assert found(life, deep=True) == [("corrupt", key)]


@pytest.mark.parametrize("at", [0, 5, 1000, -1])
def test_a_flipped_bit_in_a_nar_is_found_by_reading(life, at) -> None:
    key = life.nar(life.lib)
    life.cache.data[key] = flip(life.cache.data[key], at % len(life.cache.data[key]))
    assert found(life) == []
    (finding,) = verify(life.cache, life.ring, deep=True).errors
    # The bit may lie in zstd's header, in its checksum, or where only the hash of the file tells.
    assert finding.kind is Kind.CORRUPT
    assert finding.key in {key, info_key(life.lib)}
    assert finding.path == life.lib


def test_swapped_nars_of_one_size(life) -> None:
    a = life.store.add("a", os.urandom(5_000))
    b = life.store.add("b", os.urandom(5_000))
    one, two = life.send(a), life.send(b)
    data = life.cache.data
    data[one.url], data[two.url] = data[two.url], data[one.url]
    life.put(replace(one, file_size=two.file_size))
    life.put(replace(two, file_size=one.file_size))
    assert found(life) == []
    assert found(life, deep=True) == sorted([("corrupt", one.url), ("corrupt", two.url)])


def test_signed_but_not_a_nar(life) -> None:
    from calve.cache.compression import compressor

    content = b"this is not a NAR, and its hash was signed all the same"
    info = replace(life.store.infos[life.lib], nar_hash=Hash.sha256(content), nar_size=len(content))
    made = compressor(3, len(content))
    packed = made.compress(content) + made.flush()
    path = life.store.add("odd")
    entry = replace(
        life.entry(life.lib), info=replace(info, path=path, references=()).signed(life.key),
        url="nar/odd.nar.zst", file_hash=Hash.sha256(packed), file_size=len(packed),
    )  # fmt: skip
    life.cache.data["nar/odd.nar.zst"] = packed
    life.put(entry)
    assert found(life) == []
    assert found(life, deep=True) == [("corrupt", "nar/odd.nar.zst")]


def test_a_wrong_file_hash_is_the_narinfos_fault(life) -> None:
    life.put(replace(life.entry(life.lib), file_hash=Hash.sha256(b"other")))
    assert found(life) == []
    assert found(life, deep=True) == [("corrupt", info_key(life.lib))]


def test_a_wrong_file_size(life) -> None:
    entry = life.entry(life.lib)
    life.put(replace(entry, file_size=entry.file_size + 1))
    assert found(life) == [("corrupt", entry.url)]
    life.put(replace(entry, file_size=None))
    assert found(life) == []


def test_a_narinfo_that_is_gone(life) -> None:
    del life.cache.data[info_key(life.tool)]
    assert found(life) == [("missing", info_key(life.tool))]
    del life.cache.data[life.entry(life.lib).url]
    del life.cache.data[info_key(life.lib)]
    assert [kind for kind, _ in found(life)] == ["missing"] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data + data,
        lambda data: b"x" * 70_000,
        lambda data: data.replace(b"NarSize: ", b"NarSize: -"),
        lambda data: data.replace(b"URL: nar/", b"URL: ../../nar/"),
        lambda data: data.replace(b"URL: nar/", b"URL: https://evil/nar/"),
    ],
)
def test_malformed_narinfos(life, change) -> None:
    key = info_key(life.lib)
    life.cache.data[key] = change(life.cache.data[key])
    assert found(life) == [("corrupt", key)]
    assert found(life, deep=True) == [("corrupt", key)]


def test_swapped_narinfos(life) -> None:
    data = life.cache.data
    one, two = info_key(life.lib), info_key(life.tool)
    data[one], data[two] = data[two], data[one]
    assert found(life) == sorted([("corrupt", one), ("corrupt", two)])


def test_a_forged_signature(life) -> None:
    entry = life.entry(life.lib)
    forged = replace(entry.info, signatures=(Signature("test-1", bytes(64)),))
    life.put(replace(entry, info=forged))
    assert found(life) == [("unsigned", info_key(life.lib))]
    life.put(replace(entry, info=replace(entry.info, signatures=())))
    assert found(life) == [("unsigned", info_key(life.lib))]


def test_a_narinfo_of_another_build(life) -> None:
    (life.store.real(life.lib) / "file").write_bytes(b"built again")
    life.store.register(life.lib)
    life.send(life.lib)
    assert found(life) == [("different", info_key(life.lib))]
    digest = life.keep(life.new, ("web", "2"))  # a release that has the new build
    assert digest != life.digest_new
    assert found(life, "web/2") == []
    del life.cache.data[manifests.key(life.digest_new)]
    assert found(life) == []  # web/1 still leads to the old NAR
    old = manifests.read(life.cache, life.digest)
    url = next(entry.url for entry in old.paths if entry.info.path == life.lib)
    life.cache.data[url] = flip(life.cache.data[url], 1000)
    assert found(life, deep=True) == [("corrupt", url)]
    del life.cache.data[url]
    assert found(life) == [("different", info_key(life.lib))]


def test_a_manifest_that_is_gone_or_damaged(life) -> None:
    key = manifests.key(life.digest)
    data = life.cache.data.pop(key)
    (finding,) = verify(life.cache, life.ring).errors
    assert (finding.kind, finding.key) == (Kind.MISSING, key)
    assert "web/1" in finding.why
    for damaged in (b"", data[:-1], flip(data, len(data) - 10), data[:30], b"{}"):
        life.cache.data[key] = damaged
        assert found(life) == [("corrupt", key)]


def test_a_manifest_that_nobody_signed(life) -> None:
    key = manifests.key(life.digest)
    body, _ = manifests.unpack(life.cache.data[key], life.digest, "here")
    life.cache.data[key] = manifests.pack(body)
    assert found(life) == [("unsigned", key)]
    wrong = SecretKey.generate("test-1").sign(manifests.signed_bytes(life.digest))
    life.cache.data[key] = manifests.pack(body, [wrong])
    assert found(life) == [("unsigned", key)]


def test_no_key_that_is_trusted_signed(life) -> None:
    ring = Keyring((SecretKey.generate("other-1").public,))
    kinds = found(life, ring=ring)
    assert {kind for kind, _ in kinds} == {"unsigned"}
    assert {key for _, key in kinds} >= {manifests.key(life.digest), info_key(life.lib)}


def test_roots(life) -> None:
    life.cache.data["roots/web/3.json"] = life.cache.data["roots/web/1.json"]
    life.cache.data["roots/web/4.json"] = b"{"
    life.cache.data["roots/web/5.json"] = life.cache.data["roots/web/1.json"].replace(
        b'"version":1', b'"version":9'
    )
    assert found(life) == [
        ("corrupt", "roots/web/3.json"),
        ("corrupt", "roots/web/4.json"),
        ("unsupported", "roots/web/5.json"),
    ]


@pytest.mark.parametrize("data", [None, b"", b"StoreDir: /gnu/store\n"])
def test_cache_info(life, data) -> None:
    if data is None:
        del life.cache.data["nix-cache-info"]
    else:
        life.cache.data["nix-cache-info"] = data
    assert found(life) == [("missing" if data is None else "corrupt", "nix-cache-info")]


def test_what_no_manifest_names_is_told_but_no_error(life) -> None:
    extra = life.store.add("extra", b"x", [life.lib])
    entry = life.send(extra)
    life.cache.data["nar/left-over.nar.zst"] = b"x"
    done = verify(life.cache, life.ring)
    assert done.errors == ()
    assert {(one.kind, one.key) for one in done.findings} == {
        (Kind.UNREFERENCED, info_key(extra)),
        (Kind.UNREFERENCED, "nar/left-over.nar.zst"),
    }
    life.cache.data[entry.url] = b"damaged"
    assert found(life) == [("corrupt", entry.url)]


def test_a_reference_that_leads_nowhere(life) -> None:
    gone = life.store.add("gone")
    extra = life.store.add("extra", b"x", [gone])
    life.send(extra)
    (finding,) = verify(life.cache, life.ring).errors
    assert (finding.kind, finding.key, finding.path) == (Kind.DANGLING, info_key(gone), gone)
    assert extra.basename in finding.why
    assert found(life, str(extra)) == [("dangling", info_key(gone))]


def test_what_a_collection_removes_meanwhile_is_not_reported(life) -> None:
    gone = life.store.add("gone")
    extra = life.store.add("extra", b"x", [gone])
    life.send(extra)
    keys = [info_key(extra), life.nar(extra)]

    def before(method: str, key: str) -> None:
        if (method, key) == ("get", info_key(gone)):
            for one in keys:
                life.cache.data.pop(one, None)

    life.cache.before = before
    assert found(life) == []


def test_what_a_push_writes_meanwhile_is_not_missing(life) -> None:
    data = life.cache.data
    late = {key: data.pop(key) for key in (life.nar(life.lib), info_key(life.tool))}

    def before(method: str, key: str) -> None:
        if method == "get" and key.startswith("manifests/"):
            data.update(late)

    life.cache.before = before
    assert found(life) == []


def test_paths_that_are_left_to_another_cache(life) -> None:
    manifest = manifests.read(life.cache, life.digest)
    entries = [
        replace(entry, url="", compression="none", file_hash=None, file_size=None)
        if entry.info.path == life.lib
        else entry
        for entry in manifest.paths
    ]
    body = manifests.Manifest(life.top, tuple(entries)).dump()
    digest = manifests.digest_of(body)
    sign = life.key.sign(manifests.signed_bytes(digest))
    for key in ("roots/web/1.json", "roots/web/2.json", info_key(life.lib), life.nar(life.lib)):
        del life.cache.data[key]
    for old in (life.digest, life.digest_new):
        del life.cache.data[manifests.key(old)]
    life.cache.data[manifests.key(digest)] = manifests.pack(body, [sign])
    assert found(life) == []
    assert found(life, digest) == []


def test_names_choose_what_is_looked_at(life) -> None:
    del life.cache.data[info_key(life.new)]
    life.cache.calls.clear()
    assert found(life, "web/1") == []
    assert life.cache.count("get") == 1 + 1 + 3
    assert life.cache.keys("list") == ["roots/", "nar/"]
    assert found(life, "1") == []
    assert found(life, life.digest) == []
    assert found(life, str(life.top)) == []
    for name in ("web/2", "2", life.digest_new, str(life.new)):
        assert found(life, name) == [("missing", info_key(life.new))]
    for name in ("3", "web", "web/3", "eb/1", "roots/web/1"):
        with pytest.raises(NotFoundError, match="no root"):
            found(life, name)
    with pytest.raises(UsageError):
        found(life, "/nix/store/short")
    assert found(life, "0" * 64) == [("missing", manifests.key("0" * 64))]


def test_a_cache_that_cannot_be_listed(life, monkeypatch) -> None:
    def refuse(prefix: str):
        raise UsageError("a web server cannot be listed")

    monkeypatch.setattr(life.cache, "list", refuse)
    with pytest.raises(UsageError):
        found(life)
    assert found(life, str(life.top)) == []
    del life.cache.data[life.nar(life.lib)]
    assert found(life, life.digest) == [("missing", life.nar(life.lib))]


def test_a_cache_that_cannot_be_read_is_no_finding(life) -> None:
    def before(method: str, key: str) -> None:
        if key == info_key(life.lib):
            raise TransientError("503")

    life.cache.before = before
    with pytest.raises(TransientError):
        found(life)


def test_cancelled(life) -> None:
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CancelledError):
        verify(life.cache, life.ring, cancel=cancel)


def test_progress(life) -> None:
    steps: list[Step] = []
    done = verify(life.cache, life.ring, deep=True, progress=steps.append)
    assert Step("verify", 4, 4, "paths") in steps
    assert steps[-1] == Step("read", done.read_bytes, done.read_bytes)
