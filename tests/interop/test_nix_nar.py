"""NARs, their hashes and their store paths, the same as Nix's."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from pathlib import Path
from typing import Any

from calve.nix import nar
from calve.nix.hashes import Hash
from calve.nix.storepath import StorePath, fixed_output
from calve.nix.unpack import unpack


def dumped(path: Path) -> bytes:
    out = io.BytesIO()
    assert nar.dump(path, out.write) == out.tell()
    return out.getvalue()


def unpacked(data: bytes, parent: Path, name: str) -> Path:
    fd = os.open(parent, os.O_RDONLY)
    try:
        unpack(nar.read(io.BytesIO(data).read, limit=len(data)), fd, name)
    finally:
        os.close(fd)
    return parent / name


def listing(top: Path, *, metadata: bool) -> dict[Path, Any]:
    """Describe a tree by relative path; `metadata`: with whole modes and times, else only what a NAR holds."""
    found: dict[Path, Any] = {}

    def visit(path: Path) -> None:
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        what: list[Any] = [kind, bool(kind == stat.S_IFREG and status.st_mode & 0o100)]
        if metadata:
            what += [status.st_mode, status.st_mtime_ns]
        if kind == stat.S_IFREG:
            what.append(path.read_bytes())
        elif kind == stat.S_IFLNK:
            what.append(path.readlink())
        else:
            for child in path.iterdir():
                visit(child)
        found[path.relative_to(top)] = what

    visit(top)
    return found


def test_same_bytes_hash_and_path(nix: Any, trees: list[Path]) -> None:
    ours = [dumped(path) for path in trees]
    for path, data in zip(trees, ours, strict=True):
        assert nix.run("nix-store", "--dump", path) == data, path
    digests = [Hash("sha256", hashlib.sha256(data).digest()) for data in ours]
    theirs = nix.lines("nix-hash", "--type", "sha256", "--base32", *trees)
    assert [digest.nix32 for digest in digests] == [f"sha256:{line}" for line in theirs]
    paths = nix.lines("nix-store", "--add-fixed", "--recursive", "sha256", *trees)
    assert paths == [
        str(fixed_output(path.name, digest)) for path, digest in zip(trees, digests, strict=True)
    ]
    assert paths[:3] == nix.lines("nix-store", "--add", *trees[:3])
    assert len(trees) >= 200


def test_nix_restores_what_we_dump(nix: Any, trees: list[Path], tmp_path: Path) -> None:
    for path in trees[:60]:
        target = tmp_path / path.name
        nix.run("nix-store", "--restore", target, stdin=dumped(path))
        assert listing(target, metadata=False) == listing(path, metadata=False)


def test_we_unpack_as_nix_does(nix: Any, trees: list[Path], tmp_path: Path) -> None:
    """Content, modes and times of our trees are those of the store that Nix wrote."""
    for text in nix.lines("nix-store", "--add-fixed", "--recursive", "sha256", *trees[:60]):
        data = nix.run("nix-store", "--dump", nix.real(text))
        ours = unpacked(data, tmp_path, StorePath.parse(text).basename)
        assert listing(ours, metadata=True) == listing(nix.real(text), metadata=True)


def test_nix_dumps_what_we_unpack(nix: Any, trees: list[Path], tmp_path: Path) -> None:
    for path in trees[60:100]:
        data = dumped(path)
        ours = unpacked(data, tmp_path, path.name)
        assert nix.run("nix-store", "--dump", ours) == data


def test_hashes_as_nix_hash_writes_them(nix: Any, trees: list[Path]) -> None:
    value = Hash("sha256", hashlib.sha256(dumped(trees[0])).digest())
    for form, text in (
        ("--to-base16", value.digest.hex()),
        ("--to-base32", value.nix32.partition(":")[2]),
    ):
        (line,) = nix.lines("nix-hash", "--type", "sha256", form, value.sri)
        assert line == text
    (line,) = nix.lines("nix", "hash", "to-sri", value.nix32)
    assert line == value.sri
    (line,) = nix.lines("nix", "hash", "to-base64", value.nix32)
    assert Hash.parse(f"sha256:{line}") == value
