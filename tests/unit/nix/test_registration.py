from __future__ import annotations

import pytest

from calve.errors import DamagedError
from calve.nix import registration
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.storepath import StorePath

A = PathInfo(StorePath("a" * 32, "a"), Hash.sha256(b"a"), 120)
B = PathInfo(
    StorePath("b" * 32, "b"),
    Hash.sha256(b"b"),
    240,
    (A.path, StorePath("b" * 32, "b")),
    StorePath("d" * 32, "b.drv"),
)
TEXT = (
    f"{A.path}\n{A.nar_hash.digest.hex()}\n120\n\n0\n"
    f"{B.path}\n{B.nar_hash.digest.hex()}\n240\n{B.deriver}\n2\n{A.path}\n{B.path}\n"
).encode()


def test_form() -> None:
    assert b"".join(registration.dump([A, B])) == TEXT
    assert len(list(registration.dump([A, B]))) == 2
    assert registration.parse(TEXT) == [A, B]
    assert registration.parse(b"") == []
    assert b"".join(registration.dump([])) == b""


def test_signatures_are_left_out() -> None:
    signed = A.signed(SecretKey.generate("k"))
    assert b"".join(registration.dump([signed])) == TEXT[: TEXT.index(str(B.path).encode())]


def test_hashes_of_images() -> None:
    """`closureInfo` writes `sha256:` and base 32."""
    text = TEXT.replace(A.nar_hash.digest.hex().encode(), A.nar_hash.nix32.encode())
    assert registration.parse(text) == [A, B]


def without(line: int) -> bytes:
    lines = TEXT.splitlines(keepends=True)
    return b"".join(lines[: line - 1] + lines[line:])


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (TEXT[:-1], 12),
        (without(1), 1),
        (without(2), 2),
        (without(3), 3),
        (without(5), 5),
        (without(12), 10),
        (TEXT + b"\n", 13),
        (TEXT + str(A.path).encode() + b"\n", 13),
        (TEXT.replace(b"\n120\n", b"\n-1\n"), 3),
        (TEXT.replace(b"\n120\n", b"\n" + b"9" * 30 + b"\n"), 3),
        (TEXT.replace(b"\n2\n", b"\n3\n"), 10),
        (TEXT.replace(b"\n2\n", b"\n1000000000000\n"), 10),
        (TEXT.replace(A.nar_hash.digest.hex().encode(), b"sha1:" + b"0" * 40), 2),
        (b"\xff\xfe\n", 1),
        (b"\0" * 4096, 1),
    ],
)
def test_damage(data: bytes, line: int) -> None:
    with pytest.raises(DamagedError) as caught:
        registration.parse(data, "/nix-path-registration")
    assert caught.value.place == f"/nix-path-registration:{line}"
