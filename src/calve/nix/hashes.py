"""Hashes as Nix writes them: base 32 of its own, base 16, base 64 and SRI.

Source: https://nix.dev/manual/nix/latest/protocols/nix32 and `nix-hash --help`.
"""

from __future__ import annotations

import binascii
import hashlib
from dataclasses import dataclass
from typing import Self

from calve.errors import DamagedError

__all__ = ["SIZES_BYTES", "Hash", "compress", "decode32", "encode32"]

ALPHABET = "0123456789abcdfghijklmnpqrsvwxyz"  # no e, o, u, t
SIZES_BYTES = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}

_VALUES = {letter: value for value, letter in enumerate(ALPHABET)}


def _length32(size_bytes: int) -> int:
    return (size_bytes * 8 + 4) // 5


def encode32(data: bytes) -> str:
    """Write bytes in Nix's base 32: a little-endian number, its most significant digit first."""
    number = int.from_bytes(data, "little")
    return "".join(
        ALPHABET[number >> 5 * place & 31] for place in range(_length32(len(data)) - 1, -1, -1)
    )


def decode32(text: str) -> bytes:
    """Read Nix's base 32.

    Raises:
        DamagedError: a letter that is not a digit, or a length that no number of bytes has.
    """
    size = len(text) * 5 // 8
    number = 0
    try:
        for letter in text:
            number = number << 5 | _VALUES[letter]
        if _length32(size) == len(text):
            return number.to_bytes(size, "little")
    except (KeyError, OverflowError):
        pass
    raise DamagedError(f"{text!r} is not base 32 as Nix writes it")


def compress(digest: bytes, size: int = 20) -> bytes:
    """Fold a digest to `size` bytes by exclusive or, as Nix does for store paths."""
    folded = bytearray(size)
    for index, byte in enumerate(digest):
        folded[index % size] ^= byte
    return bytes(folded)


def _decode(text: str, size: int) -> bytes | None:
    """Read a digest of `size` bytes; its length tells base 16, 32 and 64 apart."""
    try:
        if len(text) == 2 * size:
            return binascii.unhexlify(text)
        if len(text) == _length32(size):
            return decode32(text)
        if len(text) == (size + 2) // 3 * 4:
            digest = binascii.a2b_base64(text, strict_mode=True)
            if _base64(digest).rstrip("=") == text.rstrip("="):
                return digest
    except (DamagedError, ValueError):
        pass
    return None


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


@dataclass(frozen=True, slots=True, order=True)
class Hash:
    """A digest and the name of its algorithm ("sha256")."""

    algorithm: str
    digest: bytes

    def __post_init__(self) -> None:
        if SIZES_BYTES.get(self.algorithm) != len(self.digest):
            raise DamagedError(f"{len(self.digest)} bytes are no digest of {self.algorithm!r}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `sha256:` with base 16, 32 or 64, or SRI: `sha256-` with base 64.

        Raises:
            DamagedError: an algorithm that Nix does not have, or digits that are not its digest.
        """
        for mark in ":-":
            algorithm, found, digits = text.partition(mark)
            if found and algorithm in SIZES_BYTES:
                size = SIZES_BYTES[algorithm]
                digest = _decode(digits, size)
                if digest is None or (mark == "-" and len(digits) != (size + 2) // 3 * 4):
                    break
                return cls(algorithm, digest)
        raise DamagedError(
            f"{text[:200]!r} is not a hash", hint="a hash looks like sha256:… or sha256-…"
        )

    @classmethod
    def sha256(cls, data: bytes) -> Self:
        """Hash some bytes."""
        return cls("sha256", hashlib.sha256(data).digest())

    @property
    def nix32(self) -> str:
        """Return `sha256:` and 52 digits of base 32, the form of narinfos."""
        return f"{self.algorithm}:{encode32(self.digest)}"

    @property
    def hex(self) -> str:
        """Return `sha256:` and 64 digits of base 16, the form of the database."""
        return f"{self.algorithm}:{self.digest.hex()}"

    @property
    def sri(self) -> str:
        """Return `sha256-` and base 64, the form of Nix expressions."""
        return f"{self.algorithm}-{_base64(self.digest)}"

    def __str__(self) -> str:
        """Return the form of narinfos."""
        return self.nix32
