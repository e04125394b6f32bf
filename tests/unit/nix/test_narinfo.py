from __future__ import annotations

from dataclasses import replace

import pytest

from calve.errors import DamagedError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo, PathInfo, merge_signatures
from calve.nix.signing import SecretKey
from calve.nix.storepath import StorePath

KEY = SecretKey.generate("k-1", random=bytes)
LATER = SecretKey.generate("z-1", random=lambda n: bytes([1]) * n)
A = StorePath("a" * 32, "a")
B = StorePath("b" * 32, "b-1.0")
HASH = Hash.sha256(b"nar")
CA = f"fixed:r:{HASH.nix32}"
INFO = PathInfo(B, HASH, 120, (A, B), StorePath("c" * 32, "b.drv"), (KEY.sign(b"x"),), CA)
FULL = NarInfo(
    INFO, "nar/x.nar.zst", "zstd", Hash.sha256(b"file"), 99, (("System", "x86_64-linux"), ("X", ""))
)


def lines(**changes: str | None) -> bytes:
    """Give a narinfo with some lines changed, or taken out."""
    fields: dict[str, str | None] = {
        "StorePath": str(B),
        "URL": "nar/x.nar",
        "NarHash": HASH.nix32,
        "NarSize": "120",
        "References": "",
        **changes,
    }
    return "".join(
        f"{key}: {value}\n" for key, value in fields.items() if value is not None
    ).encode()


def test_order_and_form() -> None:
    assert FULL.dump().decode().splitlines() == [
        f"StorePath: {B}",
        "URL: nar/x.nar.zst",
        "Compression: zstd",
        f"FileHash: {Hash.sha256(b'file').nix32}",
        "FileSize: 99",
        f"NarHash: {HASH.nix32}",
        "NarSize: 120",
        f"References: {A.basename} {B.basename}",
        f"Deriver: {'c' * 32}-b.drv",
        f"Sig: {KEY.sign(b'x').dump()}",
        f"CA: {CA}",
        "System: x86_64-linux",
        "X: ",
    ]
    assert FULL.dump().endswith(b"\n")
    assert NarInfo.parse(FULL.dump()) == FULL


def test_smallest() -> None:
    parsed = NarInfo.parse(lines(References=None))
    assert parsed == NarInfo(PathInfo(B, HASH, 120), "nar/x.nar", "bzip2")
    assert b"References: \n" in parsed.dump()
    for absent in (b"Sig", b"CA", b"Deriver", b"FileHash", b"FileSize"):
        assert absent not in parsed.dump()


def test_lenient_where_nix_is() -> None:
    assert NarInfo.parse(lines(Compression="")).compression == "bzip2"
    assert NarInfo.parse(lines(Deriver="unknown-deriver")).info.deriver is None
    assert NarInfo.parse(lines(NarHash=HASH.hex)).info.nar_hash == HASH
    assert NarInfo.parse(lines(NarHash=HASH.sri)).info.nar_hash == HASH
    mixed = f"{B.basename} {A.basename} {B.basename}"
    assert NarInfo.parse(lines(References=mixed)).info.references == (A, B)
    assert NarInfo.parse(lines().replace(b"References: ", b"References:")).info.references == ()
    url = "https://example.org/x?y=z: w"
    assert NarInfo.parse(lines(URL=url)).url == url


def test_unknown_fields_are_kept_in_order_even_twice() -> None:
    data = b"Z: 1\nA: \xff\xfe\n" + lines() + b"Z: 2\n"
    parsed = NarInfo.parse(data)
    assert [key for key, _ in parsed.extra] == ["Z", "A", "Z"]
    assert parsed.dump().endswith(b"Z: 1\nA: \xff\xfe\nZ: 2\n")


def test_signatures_repeat() -> None:
    data = lines() + b"".join(f"Sig: {key.sign(b'x').dump()}\n".encode() for key in (LATER, KEY))
    assert [made.name for made in NarInfo.parse(data).info.signatures] == ["z-1", "k-1"]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "StorePath is missing"),
        (lines(StorePath=None), "StorePath is missing"),
        (lines(URL=None), "URL is missing"),
        (lines(NarHash=None), "NarHash is missing"),
        (lines(NarSize=None), "NarSize is missing"),
        (lines(URL=""), "URL"),
        (lines(CA=""), "CA"),
        (lines(CA="anything"), "CA"),
        (lines(CA="fixed:r:x"), "CA"),
        (lines(CA=f"texts:{HASH.nix32}"), "CA"),
        (lines() + b"CA: \xff\xfe\n", "CA"),
        (lines() + b"Sig: k\xff:" + b"A" * 86 + b"==\n", "Sig"),
        (lines() + b"Sig: k\x1b[31m:" + b"A" * 86 + b"==\n", "Sig"),
        (lines() + b"Sig: k\0:" + b"A" * 86 + b"==\n", "Sig"),
        (lines(NarSize="0"), "NarSize"),
        (lines(NarSize="-1"), "NarSize"),
        (lines(NarSize="1e3"), "NarSize"),
        (lines(NarSize="\u0663"), "NarSize"),
        (lines(NarSize="9" * 19), "NarSize"),
        (lines(NarSize="9" * 10_000), "NarSize"),
        (lines(FileSize="x"), "FileSize"),
        (lines(FileHash="sha256:x"), "FileHash"),
        (lines(NarHash="sha1:" + "0" * 40), "NarHash"),
        (lines(NarHash=HASH.nix32[:-1]), "NarHash"),
        (lines(StorePath=B.basename), "StorePath"),
        (lines(StorePath="/gnu/store/" + B.basename), "StorePath"),
        (lines(StorePath=f"{B}/bin"), "StorePath"),
        (lines(References=str(A)), "References"),
        (lines(References=f"{A.basename},{B.basename}"), "References"),
        (lines(Deriver=str(A)), "Deriver"),
        (lines(Deriver=""), "Deriver"),
        (lines(Sig="k-1"), "Sig"),
        (lines(Sig="k-1:AAAA"), "Sig"),
        (lines()[:-1], "cut off"),
        (lines() + b"\n", "Key: value"),
        (lines() + b"no colon\n", "Key: value"),
        (lines() + b": x\n", "Key: value"),
        (lines() + b"Key:x\n", "Key: value"),
        (lines().replace(b"\n", b"\r\n"), "StorePath"),
        (lines() + b"NarSize: 120\n", "NarSize stands there twice"),
        (lines() + b"URL: other\n", "URL stands there twice"),
        (lines() + b"X: " + b"x" * 65536 + b"\n", "65536"),
        (b"<html>\n", "Key: value"),
    ],
)
def test_damage(data: bytes, what: str) -> None:
    with pytest.raises(DamagedError, match=what) as caught:
        NarInfo.parse(data, "cache/x.narinfo")
    assert (caught.value.place or "").startswith("cache/x.narinfo")


def test_damage_names_the_line() -> None:
    with pytest.raises(DamagedError) as caught:
        NarInfo.parse(lines(NarSize="x"), "f")
    assert caught.value.place == "f:4"


def test_dump_refuses_lines_in_values() -> None:
    with pytest.raises(UsageError):
        replace(FULL, url="x\nSig: forged").dump()
    with pytest.raises(UsageError):
        replace(FULL, extra=(("X", "y" * 65536),)).dump()


def test_fingerprint() -> None:
    assert INFO.fingerprint == f"1;{B};{HASH.nix32};120;{A},{B}".encode()
    assert replace(INFO, references=(B, A)).fingerprint == INFO.fingerprint
    assert PathInfo(B, HASH, 1).fingerprint.endswith(b";1;")


def test_signed() -> None:
    twice = replace(INFO, signatures=()).signed(LATER).signed(KEY).signed(KEY)
    assert [made.name for made in twice.signatures] == ["k-1", "z-1"]
    for key, made in zip((KEY, LATER), twice.signatures, strict=True):
        assert key.public.verifies(INFO.fingerprint, made)
    # What was signed under this name before, over other facts, goes.
    assert INFO.signed(KEY).signatures == (KEY.sign(INFO.fingerprint),)


def test_merge_signatures() -> None:
    a, b = KEY.sign(b"a"), LATER.sign(b"b")
    assert merge_signatures((b,), (a, b), ()) == (a, b)


@pytest.mark.parametrize("method", ["text:", "fixed:", "fixed:r:", "fixed:git:"])
def test_content_addresses_of_nix(method: str) -> None:
    for digest in (HASH.nix32, HASH.hex, HASH.sri):
        assert NarInfo.parse(lines(CA=f"{method}{digest}")).info.ca == f"{method}{digest}"
