from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from calve.cache import manifest as manifests
from calve.cache.compression import decompressor
from calve.cache.manifest import Manifest, boot_order
from calve.errors import DamagedError, NotFoundError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import SecretKey, Signature
from calve.nix.storepath import StorePath

LIB = StorePath("0" * 32, "lib")
KERNEL = StorePath("1" * 32, "kernel")
TOP = StorePath("2" * 32, "top")


def _entry(path: StorePath, size: int, *references: StorePath) -> NarInfo:
    info = PathInfo(
        path,
        Hash.sha256(path.basename.encode()),
        size,
        references,
        signatures=(Signature("k-1", bytes(64)),),
    )
    return NarInfo(info, f"nar/{path.digest}.nar.zst", "zstd", None, size // 2)


def _manifest() -> Manifest:
    return Manifest(
        TOP, (_entry(TOP, 96, LIB, KERNEL), _entry(LIB, 1000, LIB), _entry(KERNEL, 200))
    )


def _changed(**changes: object) -> bytes:
    return json.dumps(json.loads(_manifest().dump()) | changes).encode()


def _changed_path(at: int, **changes: object) -> bytes:
    paths = json.loads(_manifest().dump())["paths"]
    paths[at] |= changes
    return _changed(paths=paths)


def test_dump_and_parse_agree_and_are_deterministic() -> None:
    body = _manifest().dump()
    assert Manifest.parse(body) == _manifest()
    assert Manifest.parse(body).dump() == body
    assert b"fileHash" not in body
    assert b"deriver" not in body


def test_optional_facts_are_kept() -> None:
    entry = _manifest().paths[2]
    info = replace(
        entry.info, deriver=StorePath("3" * 32, "k.drv"), ca=f"fixed:r:{Hash.sha256(b'x').nix32}"
    )
    whole = replace(entry, info=info, file_hash=Hash.sha256(b"x"))
    made = Manifest(KERNEL, (whole,))
    assert Manifest.parse(made.dump()) == made


def test_unknown_fields_are_ignored() -> None:
    assert Manifest.parse(_changed(later=[1, {"x": 2}])) == _manifest()
    assert Manifest.parse(_changed_path(0, later=True)) == _manifest()


def test_an_unknown_major_version_is_refused_as_such() -> None:
    with pytest.raises(UsageError, match="version 2; this Calve reads version 1") as caught:
        Manifest.parse(_changed(version=2), "s3://x/manifests/y")
    assert caught.value.place == "s3://x/manifests/y"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"\xff\xfe{", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "object"),
        (_changed(version=None), "version"),
        (_changed(version="1"), "version"),
        (_changed(version=True), "version"),
        (_changed(toplevel=1), "toplevel"),
        (_changed(toplevel="x"), "toplevel"),
        (_changed(toplevel=f"{'4' * 32}-gone"), "lacks its toplevel .*-gone"),
        (_changed(paths={}), "list"),
        (_changed(paths=[1]), "object"),
        (_changed(paths=[]), "lacks its toplevel"),
        (_changed_path(1, path="../../etc"), "path"),
        (_changed_path(1, narSize=0), "narSize"),
        (_changed_path(1, narSize=-1), "narSize"),
        (_changed_path(1, narSize=1.5), "narSize"),
        (_changed_path(1, narSize=10**30), "narSize"),
        (_changed_path(1, narHash="sha1:" + "0" * 32), "sha1"),
        (_changed_path(1, narHash=None), "narHash"),
        (_changed_path(1, references="x"), "references"),
        (_changed_path(1, references=[1]), "references"),
        (_changed_path(1, signatures=["x"]), "signatures"),
        (_changed_path(1, url=7), "url"),
        (_changed_path(1, path=TOP.basename), "twice"),
    ],
)
def test_malformed_manifests_are_damage(body: bytes, word: str) -> None:
    with pytest.raises(DamagedError, match=word):
        Manifest.parse(body)


def test_a_missing_path_is_named() -> None:
    broken = Manifest(TOP, _manifest().paths[:2])
    with pytest.raises(DamagedError, match=f"lacks {KERNEL}, which {TOP.basename} refers to"):
        Manifest.parse(broken.dump())


def test_more_paths_than_the_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    body = _manifest().dump()
    monkeypatch.setattr(manifests, "MAX_PATHS", 2)
    with pytest.raises(DamagedError, match="more than 2 paths"):
        Manifest.parse(body)
    with pytest.raises(UsageError, match="too large"):
        _manifest().dump()
    monkeypatch.setattr(manifests, "MAX_BYTES", 10)
    with pytest.raises(DamagedError, match="longer than 10"):
        Manifest.parse(body)


def test_boot_order_is_toplevel_then_kernel_then_the_largest() -> None:
    big, small = _entry(StorePath("5" * 32, "big"), 5000), _entry(StorePath("6" * 32, "small"), 1)
    entries = [small, *_manifest().paths, big]
    ordered = boot_order(entries, TOP, [KERNEL, StorePath("7" * 32, "not-there")])
    assert [entry.info.path.name for entry in ordered] == ["top", "kernel", "big", "lib", "small"]
    assert boot_order(reversed(entries), TOP, [KERNEL]) == ordered
    assert (
        boot_order(entries, TOP, [TOP, KERNEL, KERNEL]) == ordered
    )  # kernel and initrd in one path


def test_reading_checks_the_digest(memory) -> None:
    body = _manifest().dump()
    digest = manifests.digest_of(body)
    cache = memory()
    cache.data[manifests.key(digest)] = manifests.pack(body)
    assert manifests.read(cache, digest) == _manifest()
    assert cache.calls == [("get", f"manifests/{digest}.json.zst")]

    cache.data[manifests.key(digest)] = manifests.pack(body + b" ")
    with pytest.raises(DamagedError, match="not the one of this digest"):
        manifests.read(cache, digest)
    cache.data[manifests.key(digest)] = manifests.pack(body)[:-1]
    with pytest.raises(DamagedError, match="early"):
        manifests.read(cache, digest)
    with pytest.raises(NotFoundError):
        manifests.read(cache, "0" * 64)
    with pytest.raises(DamagedError, match="digest"):
        manifests.read(cache, "../" + "0" * 61)


def test_a_bomb_stops_at_the_bound(memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "MAX_BYTES", 1 << 20)
    cache = memory()
    cache.data[manifests.key("0" * 64)] = manifests.pack(bytes(5 << 20))
    with pytest.raises(DamagedError, match="longer"):
        manifests.read(cache, "0" * 64)


def test_signatures_come_with_it(memory) -> None:
    key = SecretKey.generate("ops-1")
    cache, body = memory(), _manifest().dump()
    digest = manifests.digest_of(body)
    message = manifests.signed_bytes(digest)
    assert message == b"calve-manifest-1;" + digest.encode()
    made = key.sign(message)
    cache.data[manifests.key(digest)] = manifests.pack(
        body, [made, Signature("a-1", bytes(64)), made]
    )
    manifest, signatures, tag = manifests.read_signed(cache, digest)
    assert manifest == manifests.read(cache, digest) == _manifest()
    assert [signature.name for signature in signatures] == ["a-1", "ops-1"]
    assert key.public.verifies(message, signatures[1])
    assert cache.put(manifests.key(digest), manifests.pack(body, [made], "again"), match=tag)
    again, signatures, other = manifests.read_signed(cache, digest)
    assert (again, signatures) == (manifest, (made,))
    assert other != tag


@pytest.mark.parametrize(
    "beside", [b"", b'{"version":1}', b'{"version":1,"signatures":[7]}', b"x" * 70_000]
)
def test_malformed_signatures_are_damage(beside: bytes) -> None:
    body = _manifest().dump()
    packed = manifests.pack(body)
    front = int.from_bytes(packed[4:8], "little") + 8
    data = packed[:4] + len(beside).to_bytes(4, "little") + beside + packed[front:]
    with pytest.raises(DamagedError):
        manifests.unpack(data, manifests.digest_of(body), "here")
    with pytest.raises(DamagedError):
        manifests.unpack(packed[: front // 2], manifests.digest_of(body), "here")


def test_any_zstd_decoder_reads_the_body() -> None:
    body = _manifest().dump()
    packed = io.BytesIO(manifests.pack(body, [SecretKey.generate("ops-1").sign(b"x")]))
    read = decompressor("zstd", packed.read)
    assert b"".join(iter(lambda: read(1 << 16), b"")) == body


def test_a_path_that_is_elsewhere_has_no_url() -> None:
    manifest = _manifest()
    first = replace(manifest.paths[0], url="", compression="none", file_hash=None, file_size=None)
    away = replace(manifest, paths=(first, *manifest.paths[1:]))
    assert b'"url"' not in Manifest(first.info.path, (first,)).dump()
    assert Manifest.parse(away.dump()) == away


def test_a_path_is_one_object_however_many_refer_to_it() -> None:
    """3,000 paths with 10 references each have to fit into the agent's memory."""
    paths = Manifest.parse(_manifest().dump()).paths
    known = {entry.info.path: entry.info.path for entry in paths}
    references = [each for entry in paths for each in entry.info.references]
    assert references
    assert all(known[each] is each for each in references)
