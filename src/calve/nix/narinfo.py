"""What Nix knows of a store path, and the `.narinfo` text of a binary cache that says it.

Source: `NarInfo::NarInfo` and `ValidPathInfo::fingerprint` of Nix; ../shared/reference/cache.md, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from calve.errors import DamagedError, UsageError
from calve.nix.hashes import Hash
from calve.nix.signing import SecretKey, Signature
from calve.nix.storepath import StorePath

__all__ = ["MAX_NARINFO_BYTES", "NarInfo", "PathInfo", "check_ca", "merge_signatures"]

MAX_NARINFO_BYTES = 64 * 1024
_UNKNOWN_DERIVER = "unknown-deriver"
_SIZE = re.compile(r"[0-9]{1,19}")
_CA_METHOD = re.compile(r"text:|fixed:(?:r:|git:)?")
_MAX_SIZE = 2**63 - 1
_ONCE = frozenset(
    {
        "StorePath",
        "URL",
        "Compression",
        "FileHash",
        "FileSize",
        "NarHash",
        "NarSize",
        "References",
        "Deriver",
        "CA",
    }
)
_REQUIRED = ("StorePath", "URL", "NarHash", "NarSize")

T = TypeVar("T")


def merge_signatures(*sets: tuple[Signature, ...]) -> tuple[Signature, ...]:
    """Join signatures: each once, sorted by the key's name."""
    return tuple(sorted({signature for some in sets for signature in some}))


def check_ca(text: str) -> str:
    """Return a content address; DamagedError where Nix would choke on it.

    No signature covers it and it goes into the store's database, which Nix cannot read with a wrong one in it.
    """
    method = _CA_METHOD.match(text)
    if method is None:
        raise DamagedError(f"{text[:100]!r} is not a content address")
    Hash.parse(text[method.end() :])
    return text


@dataclass(frozen=True, slots=True)
class PathInfo:
    """What Nix knows of a valid store path.

    Attributes:
        path: which.
        nar_hash: of its NAR, sha256.
        nar_size: of its NAR, bytes; more than 0.
        references: what it refers to, itself included where it does; sorted.
        deriver: the .drv that made it.
        signatures: of its fingerprint.
        ca: how its content gives its path, as Nix writes it; None where its inputs do.
    """

    path: StorePath
    nar_hash: Hash
    nar_size: int
    references: tuple[StorePath, ...] = ()
    deriver: StorePath | None = None
    signatures: tuple[Signature, ...] = ()
    ca: str | None = None

    @property
    def fingerprint(self) -> bytes:
        """Return the bytes that are signed."""
        references = ",".join(map(str, sorted(self.references)))
        return f"1;{self.path};{self.nar_hash.nix32};{self.nar_size};{references}".encode()

    def signed(self, key: SecretKey) -> PathInfo:
        """Return the same with this key's signature in place of an older one of the same name."""
        kept = tuple(made for made in self.signatures if made.name != key.name)
        return replace(self, signatures=merge_signatures(kept, (key.sign(self.fingerprint),)))


@dataclass(frozen=True, slots=True)
class NarInfo:
    """A narinfo: the path, and where its NAR lies.

    Attributes:
        info: the path.
        url: of the NAR, relative to the cache or absolute.
        compression: as Nix names it: "none", "zstd", "xz", "bzip2", …
        file_hash: of the compressed NAR; a hint that Nix does not check.
        file_size: of the compressed NAR, bytes.
        extra: fields that we do not know, in their order.
    """

    info: PathInfo
    url: str
    compression: str
    file_hash: Hash | None = None
    file_size: int | None = None
    extra: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, data: bytes, place: object = None) -> NarInfo:
        """Read a narinfo.

        Raises:
            DamagedError: it is not one; the place names the line.
        """
        fields = _Fields(data, str(place or "narinfo"))
        return cls(
            info=PathInfo(
                path=fields.required("StorePath", StorePath.parse),
                nar_hash=fields.required("NarHash", _sha256),
                nar_size=fields.required("NarSize", _positive),
                references=fields.optional("References", _references) or (),
                deriver=fields.optional("Deriver", _deriver),
                signatures=tuple(fields.signatures),
                ca=fields.optional("CA", check_ca),
            ),
            url=fields.required("URL", _filled),
            compression=fields.optional("Compression", str) or "bzip2",
            file_hash=fields.optional("FileHash", Hash.parse),
            file_size=fields.optional("FileSize", _size),
            extra=tuple(fields.extra),
        )

    def dump(self) -> bytes:
        """Write it as Nix does, unknown fields last.

        Raises:
            UsageError: a value has more than one line, or the whole is longer than a narinfo may be.
        """
        info = self.info
        lines = [
            ("StorePath", str(info.path)),
            ("URL", self.url),
            ("Compression", self.compression),
            ("FileHash", None if self.file_hash is None else self.file_hash.nix32),
            ("FileSize", None if self.file_size is None else str(self.file_size)),
            ("NarHash", info.nar_hash.nix32),
            ("NarSize", str(info.nar_size)),
            ("References", " ".join(path.basename for path in sorted(info.references))),
            ("Deriver", None if info.deriver is None else info.deriver.basename),
            *(("Sig", signature.dump()) for signature in info.signatures),
            ("CA", info.ca),
            *self.extra,
        ]
        kept = [f"{key}: {value}" for key, value in lines if value is not None]
        if any("\n" in line for line in kept):
            raise UsageError("a narinfo's field cannot have more than one line", place=info.path)
        data = "".join(line + "\n" for line in kept).encode("utf-8", "surrogateescape")
        if len(data) > MAX_NARINFO_BYTES:
            raise UsageError(
                f"the narinfo would have {len(data)} bytes, more than {MAX_NARINFO_BYTES}",
                place=info.path,
                hint=f"it has {len(info.references)} references: have it refer to paths that refer to some of them",
            )
        return data


class _Fields:
    """A narinfo's lines, sorted into what is known once, signatures, and the rest."""

    def __init__(self, data: bytes, place: str) -> None:
        self.place = place
        self.known: dict[str, tuple[int, str]] = {}
        self.signatures: list[Signature] = []
        self.extra: list[tuple[str, str]] = []
        if len(data) > MAX_NARINFO_BYTES:
            raise DamagedError(f"longer than {MAX_NARINFO_BYTES} bytes", place=place)
        lines = data.decode("utf-8", "surrogateescape").split("\n")
        if lines.pop():
            raise DamagedError("the last line is cut off", place=self._line(len(lines) + 1))
        for number, line in enumerate(lines, 1):
            self._take(number, line)

    def _line(self, number: int) -> str:
        return f"{self.place}:{number}"

    def _take(self, number: int, line: str) -> None:
        key, colon, value = line.partition(":")
        if not colon or not key or (value and value[0] != " "):
            raise DamagedError("a line that is not `Key: value`", place=self._line(number))
        value = value[1:]
        if key == "Sig":
            self.signatures.append(self._convert(number, key, value, Signature.parse))
        elif key not in _ONCE:
            self.extra.append((key, value))
        elif key in self.known:
            raise DamagedError(f"{key} stands there twice", place=self._line(number))
        else:
            self.known[key] = number, value

    def _convert(self, number: int, key: str, value: str, convert: Callable[[str], T]) -> T:
        try:
            return convert(value)
        except DamagedError as error:
            raise DamagedError(f"{key}: {error.message}", place=self._line(number)) from error

    def required(self, key: str, convert: Callable[[str], T]) -> T:
        """Return a field; DamagedError where it is missing or not such."""
        if key not in self.known:
            raise DamagedError(f"{key} is missing", place=self.place)
        number, value = self.known[key]
        return self._convert(number, key, value, convert)

    def optional(self, key: str, convert: Callable[[str], T]) -> T | None:
        """Return a field or None; DamagedError where it is not such."""
        return self.required(key, convert) if key in self.known else None


def _sha256(text: str) -> Hash:
    value = Hash.parse(text)
    if value.algorithm != "sha256":
        raise DamagedError(f"a {value.algorithm} hash instead of sha256")
    return value


def _size(text: str) -> int:
    if not _SIZE.fullmatch(text) or int(text) > _MAX_SIZE:
        raise DamagedError(f"{text[:40]!r} is not a size")
    return int(text)


def _positive(text: str) -> int:
    size = _size(text)
    if size == 0:
        raise DamagedError("0 is not the size of a NAR")
    return size


def _references(text: str) -> tuple[StorePath, ...]:
    return tuple(sorted({StorePath.from_basename(name) for name in text.split(" ") if name}))


def _deriver(text: str) -> StorePath | None:
    return None if text == _UNKNOWN_DERIVER else StorePath.from_basename(text)


def _filled(text: str) -> str:
    if not text:
        raise DamagedError("it is empty")
    return text
