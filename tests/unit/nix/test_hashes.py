from __future__ import annotations

import hashlib

import pytest

from calve.errors import DamagedError
from calve.nix.hashes import Hash, compress, decode32, encode32

DIGEST = hashlib.sha256(b"hello").digest()
NIX32 = "094qif9n4cq4fdg459qzbhg1c6wywawwaaivx0k0x8xhbyx4vwic"
SRI = "sha256-LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ="


def test_known_forms() -> None:
    """As `nix-hash --to-base32` and `nix hash to-sri` write them."""
    value = Hash("sha256", DIGEST)
    assert value.nix32 == f"sha256:{NIX32}" == str(value)
    assert value.hex == f"sha256:{DIGEST.hex()}"
    assert value.sri == SRI
    assert Hash.sha256(b"hello") == value


@pytest.mark.parametrize(
    "text",
    [
        f"sha256:{NIX32}",
        f"sha256:{DIGEST.hex()}",
        f"sha256:{DIGEST.hex().upper()}",
        SRI,
        SRI.replace("-", ":"),
    ],
)
def test_every_form_is_read(text: str) -> None:
    assert Hash.parse(text) == Hash("sha256", DIGEST)


@pytest.mark.parametrize(("name", "digits"), [("md5", 26), ("sha1", 32), ("sha512", 103)])
def test_other_algorithms(name: str, digits: int) -> None:
    value = Hash(name, hashlib.new(name, b"x").digest())
    assert Hash.parse(value.nix32) == Hash.parse(value.hex) == Hash.parse(value.sri) == value
    assert len(value.nix32) == len(name) + 1 + digits


@pytest.mark.parametrize(
    "text",
    [
        "",
        NIX32,
        "sha256",
        "sha256:",
        "sha256-",
        f"sha1:{NIX32}",
        f"sha3:{NIX32}",
        f"sha256-{NIX32}",
        f"sha256:{NIX32[:-1]}",
        f"sha256:{NIX32}0",
        f"sha256:e{NIX32[1:]}",
        f"sha256:z{NIX32[1:]}",
        f"sha256:{'g' * 64}",
        f"sha256:{' ' * 64}",
        f"sha256:\u0663{DIGEST.hex()[1:]}",
        f"sha256-{'=' * 44}",
        f"{SRI[:-2]}R=",
        f"{SRI} ",
        f"sha256:{NIX32}\n",
    ],
)
def test_what_is_no_hash(text: str) -> None:
    with pytest.raises(DamagedError):
        Hash.parse(text)


def test_constructed_with_the_wrong_size() -> None:
    with pytest.raises(DamagedError):
        Hash("sha256", b"short")
    with pytest.raises(DamagedError):
        Hash("sha257", DIGEST)


@pytest.mark.parametrize("text", ["e", "0", "zz", "000", "\u0664\u0664", "A0"])
def test_what_is_no_base_32(text: str) -> None:
    with pytest.raises(DamagedError):
        decode32(text)


def test_base_32_of_nothing_and_of_one_byte() -> None:
    assert encode32(b"") == ""
    assert decode32("") == b""
    assert encode32(b"\xff") == "7z"
    assert decode32("7z") == b"\xff"


def test_compress_folds() -> None:
    assert compress(bytes(range(32)), 20) == bytes(
        [index ^ (index + 20 if index < 12 else 0) for index in range(20)]
    )
