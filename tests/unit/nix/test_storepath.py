from __future__ import annotations

import hashlib

import pytest

from calve.errors import DamagedError, UsageError
from calve.nix.hashes import Hash
from calve.nix.storepath import StorePath, fixed_output, text_path

DIGEST = "z9ziz7ipnh5x6xdw46pb1wdlw0ss1m78"


def test_parts() -> None:
    path = StorePath.parse(f"/nix/store/{DIGEST}-hello-2.12.1")
    assert (path.digest, path.name) == (DIGEST, "hello-2.12.1")
    assert path.basename == f"{DIGEST}-hello-2.12.1"
    assert str(path) == f"/nix/store/{DIGEST}-hello-2.12.1"
    assert StorePath.from_basename(path.basename) == path


def test_order_is_that_of_the_base_name() -> None:
    names = ["0" * 32 + "-b", "0" * 32 + "-a.b", "1" * 32 + "-a", "0" * 32 + "-a"]
    assert [path.basename for path in sorted(map(StorePath.from_basename, names))] == sorted(names)


@pytest.mark.parametrize("name", ["a", "a" * 211, "A+b-c._?=9", "-", "a..", "_"])
def test_names(name: str) -> None:
    assert StorePath(DIGEST, name).name == name


@pytest.mark.parametrize(
    "name", ["", "a" * 212, ".a", ".", "a/b", "a b", "a\n", "\u00e9", "a:b", "a\0", "a~", "a*"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(DamagedError):
        StorePath(DIGEST, name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/nix/store",
        "/nix/store/",
        f"{DIGEST}-x",
        f"/nix/store/{DIGEST}",
        f"/nix/store/{DIGEST}-",
        f"/nix/store/{DIGEST}-x/bin",
        f"/nix/store/{DIGEST}-x/",
        f"/nix/store//{DIGEST}-x",
        f"/nix/store/{DIGEST[:-1]}-xy",
        f"/nix/store/{DIGEST[:-1]}e-x",
        f"/nix/store/{DIGEST[:-1].upper()}A-x",
        f"/gnu/store/{DIGEST}-x",
        f"/nix/store/../nix/store/{DIGEST}-x",
        f"/nix/store/{DIGEST}_x",
        f" /nix/store/{DIGEST}-x",
    ],
)
def test_what_is_no_store_path(text: str) -> None:
    with pytest.raises(DamagedError):
        StorePath.parse(text)


def test_content_addresses_known_to_nix() -> None:
    """The paths that Nix 2.8 gave."""
    value = Hash.parse("sha256:878832cd22b5e038e117b701378558f8a9b6cad7381a0e6d57a9e865d34f85a6")
    assert str(fixed_output("t", value)) == f"/nix/store/{DIGEST}-t"
    a = text_path("a", Hash.sha256(b"hello"))
    assert str(a) == "/nix/store/vmg5na96ajnh1v932j9jdzfc3022vbh9-a"
    b = text_path("b", Hash.sha256(f"see {a}".encode()), [a, a])
    assert str(b) == "/nix/store/w7k2a24kg47knwpw5xc8k0q116j1x2ma-b"


def test_references_change_the_path_their_order_does_not() -> None:
    value = Hash.sha256(b"")
    a, b = text_path("a", value), text_path("b", value)
    assert fixed_output("x", value, [a, b]) == fixed_output("x", value, [b, a, b])
    assert len({fixed_output("x", value, refs) for refs in ([], [a], [b], [a, b])}) == 4
    assert fixed_output("x", value, self_reference=True) != fixed_output("x", value)


def test_only_sha256_addresses() -> None:
    with pytest.raises(UsageError):
        fixed_output("x", Hash("sha1", hashlib.sha1(b"").digest()))
