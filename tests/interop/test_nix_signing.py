"""Keys, signatures and narinfos of Nix."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calve.errors import SignatureError
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo
from calve.nix.signing import Keyring, PublicKey, SecretKey

BUILT = """
let dep = derivation { name = "dep"; system = builtins.currentSystem; builder = "/bin/sh";
      args = [ "-c" "echo dep > $out" ]; };
in derivation { name = "x"; system = builtins.currentSystem; builder = "/bin/sh";
  args = [ "-c" "echo hi ${dep} $out > $out" ]; }
"""


@pytest.fixture
def keys(nix: Any) -> tuple[SecretKey, PublicKey]:
    secret, public = nix.home / "secret", nix.home / "public"
    nix.run("nix-store", "--generate-binary-cache-key", "test.example.org-1", secret, public)
    return SecretKey.parse(secret.read_text()), PublicKey.parse(public.read_text())


def narinfos(nix: Any, compression: str, cache: Path) -> dict[str, bytes]:
    secret = nix.home / "secret"
    (path,) = nix.lines("nix-build", "--no-out-link", "-E", BUILT)
    url = f"file://{cache}?secret-key={secret}&compression={compression}"
    nix.run("nix", "copy", "--to", url, path)
    return {file.name: file.read_bytes() for file in sorted(cache.glob("*.narinfo"))}


def test_generated_keys_parse(nix: Any, keys: tuple[SecretKey, PublicKey]) -> None:
    secret, public = keys
    assert secret.name == public.name == "test.example.org-1"
    assert secret.public == public
    assert secret.dump() == (nix.home / "secret").read_text().strip()
    assert public.dump() == (nix.home / "public").read_text().strip()


def test_nix_accepts_our_key(nix: Any, tmp_path: Path) -> None:
    key = SecretKey.generate("ours-1")
    file = nix.home / "ours"
    file.write_text(key.dump())
    public = nix.run("nix", "key", "convert-secret-to-public", stdin=file.read_bytes())
    assert PublicKey.parse(public.decode()) == key.public


@pytest.mark.parametrize("compression", ["none", "xz"])
def test_narinfo_of_nix(
    nix: Any, keys: tuple[SecretKey, PublicKey], compression: str, tmp_path: Path
) -> None:
    """Read, verified, signed to the same signature, and written to the same bytes."""
    secret, public = keys
    found = narinfos(nix, compression, tmp_path / "cache")
    assert len(found) == 2
    for name, data in found.items():
        parsed = NarInfo.parse(data, name)
        info = parsed.info
        assert name == f"{info.path.digest}.narinfo"
        assert parsed.compression == compression
        assert parsed.dump() == data
        (made,) = info.signatures
        assert Keyring((public,)).verify(info.fingerprint, info.signatures, name) == public.name
        assert secret.sign(info.fingerprint) == made
        assert replace(info, signatures=()).signed(secret) == info
        assert parsed.file_hash == Hash.sha256((tmp_path / "cache" / parsed.url).read_bytes())
        changed = replace(info, nar_size=info.nar_size + 1)
        with pytest.raises(SignatureError):
            Keyring((public,)).verify(changed.fingerprint, info.signatures, name)


def test_nix_accepts_what_we_sign(
    nix: Any, keys: tuple[SecretKey, PublicKey], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    ours = SecretKey.generate("ours-1", random=os.urandom)
    for name, data in narinfos(nix, "none", cache).items():
        parsed = NarInfo.parse(data, name)
        info = replace(parsed.info, signatures=()).signed(ours)
        (cache / name).write_bytes(replace(parsed, info=info).dump())
        path = str(info.path)
    nix.root = tmp_path / "other"
    trusted = ["--option", "trusted-public-keys", ours.public.dump()]
    nix.run("nix", "copy", *trusted, "--from", f"file://{cache}", path)
    assert nix.real(path).exists()
