"""Store paths: their names, and how content gives a path its digest.

Source: https://nix.dev/manual/nix/latest/protocols/store-path
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from calve.errors import DamagedError, UsageError
from calve.nix.hashes import Hash, compress, encode32

__all__ = ["STORE_DIR", "StorePath", "fixed_output", "text_path"]

STORE_DIR = "/nix/store"

_PREFIX = STORE_DIR + "/"
_DIGEST_LENGTH = 32
_DIGEST = re.compile(r"[0-9abcdfghijklmnpqrsvwxyz]{32}")
_NAME = re.compile(r"[0-9a-zA-Z+\-_?=][0-9a-zA-Z+\-._?=]{0,210}")


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """A path directly in the store: 32 digits of base 32, `-`, and a name. Sorts as its basename.

    Raises:
        DamagedError: digest or name are not such.
    """

    digest: str
    name: str

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise DamagedError(f"{self.digest[:200]!r} is not the digest of a store path")
        if not _NAME.fullmatch(self.name):
            raise DamagedError(f"{self.name[:300]!r} is not the name of a store path")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a full path, `/nix/store/…`.

        Raises:
            DamagedError: it is not one, or lies deeper than directly in the store.
        """
        if not text.startswith(_PREFIX):
            raise DamagedError(
                f"{text[:300]!r} is not a store path",
                hint=f"a store path looks like {STORE_DIR}/<32 digits>-<name>",
            )
        return cls.from_basename(text[len(_PREFIX) :])

    @classmethod
    def from_basename(cls, text: str) -> Self:
        """Read `<32 digits>-<name>`; DamagedError where it is not that."""
        if text[_DIGEST_LENGTH : _DIGEST_LENGTH + 1] != "-":
            raise DamagedError(
                f"{text[:300]!r} is not the base name of a store path",
                hint="it looks like <32 digits>-<name>",
            )
        return cls(text[:_DIGEST_LENGTH], text[_DIGEST_LENGTH + 1 :])

    @property
    def basename(self) -> str:
        """Return `<32 digits>-<name>`."""
        return f"{self.digest}-{self.name}"

    def __str__(self) -> str:
        """Return the full path."""
        return f"{_PREFIX}{self.digest}-{self.name}"


def _make(kind: str, content_hash: Hash, name: str) -> StorePath:
    preimage = f"{kind}:{content_hash.hex}:{STORE_DIR}:{name}"
    return StorePath(encode32(compress(hashlib.sha256(preimage.encode()).digest())), name)


def _kind(kind: str, references: Iterable[StorePath], *, self_reference: bool = False) -> str:
    parts = [kind, *map(str, sorted(set(references)))]
    return ":".join([*parts, "self"] if self_reference else parts)


def fixed_output(
    name: str,
    nar_hash: Hash,
    references: Iterable[StorePath] = (),
    self_reference: bool = False,  # noqa: FBT001, FBT002  (the interface of the room)
) -> StorePath:
    """Return where Nix puts content of this NAR hash (sha256), as `nix-store --add` does.

    Args:
        name: the part after the digest.
        nar_hash: of the NAR, with the digest of a self-reference zeroed.
        references: what it refers to, itself not among them.
        self_reference: whether it refers to itself.

    Raises:
        UsageError: the hash is not sha256.
    """
    if nar_hash.algorithm != "sha256":
        raise UsageError(f"a {nar_hash.algorithm} hash does not address a store path's content")
    return _make(_kind("source", references, self_reference=self_reference), nar_hash, name)


def text_path(name: str, content_hash: Hash, references: Iterable[StorePath] = ()) -> StorePath:
    """Return where `builtins.toFile` and .drv files go; `content_hash` is of the file, not its NAR."""
    return _make(_kind("text", references), content_hash, name)
