"""The manifest: the facts of every path of one closure in one object, so that a pull knows all before it begins.

Version 1 is a JSON object on one line:

    {"version": 1, "toplevel": BASENAME, "paths": [
        {"path": BASENAME, "narHash": "sha256:NIX32", "narSize": N, "references": [BASENAME, …],
         "url": "nar/….nar.zst", "compression": "zstd", "signatures": ["NAME:BASE64", …],
         and where known: "fileHash", "fileSize", "deriver", "ca"}, …]}

`paths` stand in the order in which a boot wants them; one without `url` is not in this cache (`push
--skip-signed-by`): its narinfo says where. A manifest never changes: it is addressed by the SHA-256 of this text, in
base 16, and stored compressed as `manifests/<sha256>.json.zst`. Its signatures, of the bytes
`calve-manifest-1;<sha256>`, may be added to: `{"version": 1, "signatures": […]}` in a skippable frame (RFC 8878,
magic 0x184D2A5C) at the object's beginning. Every zstd decoder passes over it, and one request brings both.
A manifest is trusted by its digest; each of its paths by its own signature over Nix's fingerprint, as in a narinfo.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve import record
from calve.cache.compression import compressor, decompressor
from calve.errors import DamagedError, UsageError
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo, PathInfo, check_ca, merge_signatures
from calve.nix.signing import Signature
from calve.nix.storepath import StorePath

if TYPE_CHECKING:
    from calve.cache.objects import Objects

__all__ = [
    "MAX_BYTES",
    "MAX_OBJECT_BYTES",
    "MAX_PATHS",
    "Manifest",
    "boot_order",
    "check_digest",
    "key",
    "pack",
    "read",
    "read_signed",
    "signed_bytes",
    "unpack",
]

VERSION = 1
MAX_BYTES = 64 << 20
MAX_PATHS = 100_000
_MAX_SIGNATURES_BYTES = 64 * 1024
_LEVEL = 9  # written once, read by every machine
_SKIPPABLE = 0x184D2A5C.to_bytes(4, "little")
MAX_OBJECT_BYTES = MAX_BYTES + 8 + _MAX_SIGNATURES_BYTES
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A closure: its toplevel, and every path in the order in which a boot wants them."""

    toplevel: StorePath
    paths: tuple[NarInfo, ...]

    def dump(self) -> bytes:
        """Write it; the same manifest gives the same bytes.

        Raises:
            UsageError: it has more paths or bytes than a reader takes.
        """
        body = record.dump(
            {
                "version": VERSION,
                "toplevel": self.toplevel.basename,
                "paths": [_dump_path(entry) for entry in self.paths],
            }
        )
        if len(self.paths) > MAX_PATHS or len(body) > MAX_BYTES:
            raise UsageError(
                f"the closure is too large for a manifest: {len(self.paths)} paths, {len(body)} bytes",
                place=self.toplevel,
                hint=f"a manifest has at most {MAX_PATHS} paths and {MAX_BYTES >> 20} MiB",
            )
        return body

    @classmethod
    def parse(cls, body: bytes, place: str = "manifest") -> Manifest:
        """Read a manifest.

        Raises:
            DamagedError: it is malformed, or not complete: it names the path that is missing.
            UsageError: its version is one that we do not read.
        """
        fields = record.parse(body, what="manifest", version=VERSION, limit=MAX_BYTES, place=place)
        items = fields.items("paths")
        if len(items) > MAX_PATHS:
            raise DamagedError(f"more than {MAX_PATHS} paths", place=place)
        names = _Names()
        paths = tuple(_parse_path(item, f"{place}: path {at}", names) for at, item in _taken(items))
        manifest = cls(fields.text("toplevel", StorePath.from_basename), paths)
        manifest.check(place)
        return manifest

    def check(self, place: object = None) -> None:
        """Raise DamagedError unless every path is there once, with all that it refers to."""
        named = {entry.info.path for entry in self.paths}
        if len(named) != len(self.paths):
            raise DamagedError("the manifest has a path twice", place=place)
        if self.toplevel not in named:
            raise DamagedError(f"the manifest lacks its toplevel {self.toplevel}", place=place)
        for entry in self.paths:
            for reference in entry.info.references:
                if reference not in named:
                    raise DamagedError(
                        f"the manifest lacks {reference}, which {entry.info.path.basename} refers to",
                        place=place,
                    )


def _dump_path(entry: NarInfo) -> dict[str, Any]:
    info = entry.info
    fields = {
        "path": info.path.basename,
        "narHash": info.nar_hash.nix32,
        "narSize": info.nar_size,
        "references": [path.basename for path in sorted(info.references)],
        "url": entry.url or None,
        "compression": entry.compression if entry.url else None,
        "fileHash": None if entry.file_hash is None else entry.file_hash.nix32,
        "fileSize": entry.file_size,
        "deriver": None if info.deriver is None else info.deriver.basename,
        "signatures": [signature.dump() for signature in merge_signatures(info.signatures)],
        "ca": info.ca,
    }
    return {name: value for name, value in fields.items() if value is not None}


class _Names(dict[str, StorePath]):
    """Store paths by their base names: one object for each, however many refer to it."""

    def __missing__(self, name: str) -> StorePath:
        path = self[name] = StorePath.from_basename(name)
        return path


def _taken(items: list[Any]) -> Iterator[tuple[int, Any]]:
    """Enumerate a list and let go of each item: the agent has no room for both forms of all of them."""
    for at, item in enumerate(items):
        items[at] = None
        yield at, item


def _parse_path(item: object, place: str, names: _Names) -> NarInfo:
    fields = record.Fields(item, place)
    nar_size = fields.number("narSize")
    if nar_size == 0:
        raise DamagedError("narSize is 0", place=place)
    return NarInfo(
        info=PathInfo(
            path=fields.text("path", names.__getitem__),
            nar_hash=fields.text("narHash", _sha256),
            nar_size=nar_size,
            references=tuple(sorted(set(fields.texts("references", names.__getitem__)))),
            deriver=fields.optional("deriver", StorePath.from_basename),
            signatures=fields.texts("signatures", Signature.parse),
            ca=fields.optional("ca", check_ca),
        ),
        url=fields.optional("url", str) or "",
        compression=fields.text("compression", str) if fields.has("url") else "none",
        file_hash=fields.optional("fileHash", Hash.parse),
        file_size=fields.optional_number("fileSize"),
    )


def _sha256(text: str) -> Hash:
    value = Hash.parse(text)
    if value.algorithm != "sha256":
        raise DamagedError(f"a {value.algorithm} hash instead of sha256")
    return value


def boot_order(
    entries: Iterable[NarInfo], toplevel: StorePath, first: Sequence[StorePath] = ()
) -> tuple[NarInfo, ...]:
    """Put paths into the order in which a boot wants them.

    The toplevel, then `first` (its kernel and initrd: a machine may have to leave for another kernel), then the
    largest, so that no long one is left for the end.
    """
    head = {path: place for place, path in enumerate(dict.fromkeys((toplevel, *first)))}
    last = len(head)

    def rank(entry: NarInfo) -> tuple[int, int, str]:
        path = entry.info.path
        return head.get(path, last), -entry.info.nar_size, path.basename

    return tuple(sorted(entries, key=rank))


def check_digest(text: str) -> str:
    """Return a manifest's digest; DamagedError unless it is 64 digits of base 16."""
    if not _DIGEST.fullmatch(text):
        raise DamagedError(f"{text[:100]!r} is not the digest of a manifest")
    return text


def key(digest: str) -> str:
    """Return where the manifest of this digest lies."""
    return f"manifests/{check_digest(digest)}.json.zst"


def signed_bytes(digest: str) -> bytes:
    """Return what is signed of the manifest of this digest."""
    return f"calve-manifest-1;{check_digest(digest)}".encode("ascii")


def digest_of(body: bytes) -> str:
    """Return the digest of a manifest's text."""
    return hashlib.sha256(body).hexdigest()


def pack(body: bytes, signatures: Iterable[Signature] = (), nonce: str | None = None) -> bytes:
    """Return the object for a manifest's text.

    Args:
        body: the text.
        signatures: of it.
        nonce: makes it another object with the same meaning.
    """
    texts = [signature.dump() for signature in merge_signatures(tuple(signatures))]
    front = {"version": VERSION, "signatures": texts}
    beside = record.dump(front if nonce is None else {**front, "nonce": nonce})
    made = compressor(_LEVEL, len(body))
    head = _SKIPPABLE + len(beside).to_bytes(4, "little") + beside
    return head + bytes(made.compress(body)) + bytes(made.flush())


def unpack(data: bytes, digest: str, place: str) -> tuple[bytes, tuple[Signature, ...]]:
    """Return a manifest's text and its signatures, which are not verified.

    Raises:
        DamagedError: it is malformed, too long, or not the one of this digest.
    """
    signatures: tuple[Signature, ...] = ()
    at = 0
    if data[:4] == _SKIPPABLE:
        at = 8 + int.from_bytes(data[4:8], "little")
        signatures = _signatures(data[8:at], f"{place}: signatures")

    def source(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    # Twice: nothing is kept of what is not the one of this digest, however much it would be.
    begin = at
    digester = hashlib.sha256()
    total = 0
    content = decompressor("zstd", source, place=place)
    while chunk := content(1 << 18):
        digester.update(chunk)
        total += len(chunk)
        if total > MAX_BYTES:
            raise DamagedError(f"the manifest is longer than {MAX_BYTES} bytes", place=place)
    if digester.hexdigest() != digest:
        raise DamagedError("the manifest is not the one of this digest", place=place)
    at = begin
    content = decompressor("zstd", source, place=place)
    body = b"".join(iter(lambda: content(1 << 18), b""))
    return body, signatures


def _signatures(data: bytes, place: str) -> tuple[Signature, ...]:
    what = "manifest's signatures"
    limit = _MAX_SIGNATURES_BYTES
    fields = record.parse(data, what=what, version=VERSION, limit=limit, place=place)
    return fields.texts("signatures", Signature.parse)


def read(objects: Objects, digest: str) -> Manifest:
    """Fetch a manifest: one request.

    Raises:
        NotFoundError: the cache does not have it.
        DamagedError: it is malformed, incomplete, or not the one of this digest.
        UsageError: its version is one that we do not read.
    """
    name = key(digest)
    place = f"{objects.url}/{name}"
    body, _ = unpack(objects.get(name, MAX_OBJECT_BYTES), digest, place)
    return Manifest.parse(body, place)


def read_signed(objects: Objects, digest: str) -> tuple[Manifest, tuple[Signature, ...], str]:
    """Fetch a manifest with its signatures and its object's tag; errors as those of `read`."""
    name = key(digest)
    place = f"{objects.url}/{name}"
    data, tag = objects.get_tagged(name, MAX_OBJECT_BYTES)
    body, signatures = unpack(data, digest, place)
    return Manifest.parse(body, place), signatures, tag
