"""ed25519 keys and signatures as Nix writes them: `name:base64`.

A secret key is 64 bytes, the seed and the public key; a public key 32; a signature 64.
Source: https://nix.dev/manual/nix/latest/command-ref/nix-store/generate-binary-cache-key
"""

from __future__ import annotations

import binascii
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

from calve.errors import CalveError, DamagedError, SignatureError, UsageError

__all__ = ["Keyring", "PublicKey", "SecretKey", "Signature"]

_SEED_BYTES = 32
_PUBLIC_BYTES = 32
_SECRET_BYTES = 64
_SIGNATURE_BYTES = 64


def _join(name: str, value: bytes) -> str:
    return f"{name}:{binascii.b2a_base64(value, newline=False).decode('ascii')}"


def _is_name(text: str) -> bool:
    """Say whether this can name a key: it is shown to people, and stands in lists divided by blanks."""
    return bool(text) and text.isprintable() and " " not in text and ":" not in text


def _split(text: str, size: int, refuse: Callable[[str], CalveError]) -> tuple[str, bytes]:
    """Take `name:base64` apart; `refuse` makes the error, and is never given the value."""
    name, colon, encoded = text.strip().partition(":")
    if not colon or not _is_name(name):
        raise refuse("it has no name before a colon")
    try:
        value = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError:
        raise refuse("what follows the colon is not base 64") from None
    if len(value) != size:
        raise refuse(f"it holds {len(value)} bytes instead of {size}")
    return name, value


def _key_error(kind: str) -> Callable[[str], UsageError]:
    return lambda why: UsageError(
        f"not a {kind} key: {why}",
        hint=f"a {kind} key is one line, NAME:BASE64, as nix-store --generate-binary-cache-key writes it",
    )


@dataclass(frozen=True, slots=True, order=True)
class Signature:
    """A signature, and the name of the key that made it."""

    name: str
    value: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name:base64`; DamagedError where it is not that."""
        return cls(
            *_split(text, _SIGNATURE_BYTES, lambda why: DamagedError(f"not a signature: {why}"))
        )

    def dump(self) -> str:
        """Write `name:base64`."""
        return _join(self.name, self.value)


@dataclass(frozen=True, slots=True, order=True)
class PublicKey:
    """A key that verifies; `key` is its 32 bytes."""

    name: str
    key: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name:base64`.

        Raises:
            UsageError: it is not a public key; a secret key is named as such.
        """
        return cls(*_split(text, _PUBLIC_BYTES, _key_error("public")))

    def dump(self) -> str:
        """Write `name:base64`."""
        return _join(self.name, self.key)

    def verifies(self, message: bytes, signature: Signature) -> bool:
        """Say whether this key made the signature of the message."""
        from nacl.bindings import crypto_sign_open
        from nacl.exceptions import CryptoError

        try:
            crypto_sign_open(signature.value + message, self.key)
        except CryptoError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A key that signs; `secret` is seed and public key, and never shown."""

    name: str
    secret: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `name:base64`; UsageError where it is not a secret key, without showing it."""
        from nacl.bindings import crypto_sign_seed_keypair

        refuse = _key_error("secret")
        name, secret = _split(text, _SECRET_BYTES, refuse)
        if crypto_sign_seed_keypair(secret[:_SEED_BYTES])[0] != secret[_SEED_BYTES:]:
            raise refuse("its halves do not belong together")
        return cls(name, secret)

    @classmethod
    def generate(cls, name: str, random: Callable[[int], bytes] = os.urandom) -> Self:
        """Make a new key; UsageError where the name is empty, or has a colon, a blank or what no terminal shows."""
        from nacl.bindings import crypto_sign_seed_keypair

        if not _is_name(name):
            raise UsageError(
                f"{name!r} cannot name a key", hint="names look like cache.example.org-1"
            )
        return cls(name, crypto_sign_seed_keypair(random(_SEED_BYTES))[1])

    def dump(self) -> str:
        """Write `name:base64`: the secret itself, for a file that only its owner reads."""
        return _join(self.name, self.secret)

    @property
    def public(self) -> PublicKey:
        """Return the key that verifies what this one signs."""
        return PublicKey(self.name, self.secret[_SEED_BYTES:])

    def sign(self, message: bytes) -> Signature:
        """Sign; the same message gives the same signature."""
        from nacl.bindings import crypto_sign

        return Signature(self.name, crypto_sign(message, self.secret)[:_SIGNATURE_BYTES])


@dataclass(frozen=True, slots=True)
class Keyring:
    """The public keys that are trusted."""

    keys: tuple[PublicKey, ...]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Read public keys; UsageError names the first that is none."""
        return cls(tuple(PublicKey.parse(text) for text in texts))

    def verify(self, message: bytes, signatures: Iterable[Signature], place: object = None) -> str:
        """Return the name of a trusted key that signed the message.

        Args:
            message: the signed bytes.
            signatures: those that came with it; by unknown keys too.
            place: what is verified, for the error.

        Raises:
            SignatureError: no trusted key signed; it says which keys did, and which are trusted.
        """
        made = list(signatures)
        for signature in made:
            for key in self.keys:
                if key.name == signature.name and key.verifies(message, signature):
                    return key.name
        trusted = sorted({key.name for key in self.keys})
        wrong = sorted({signature.name for signature in made} & set(trusted))
        names = ", ".join(sorted({signature.name for signature in made})) or "nobody"
        raise SignatureError(
            f"the signature of {', '.join(wrong)} is wrong"
            if wrong
            else f"no trusted key signed this; signed by {names}",
            place=place,
            hint=f"trusted keys: {', '.join(trusted) or 'none'}",
        )
