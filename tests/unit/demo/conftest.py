"""Package files of our own making, and an apt that serves them."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from calve.demo.packages import Deb
from calve.nix.zstd import ZstdCompressor


def tar(members: list[tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def ar(members: list[tuple[str, bytes]]) -> bytes:
    data = b"!<arch>\n"
    for name, content in members:
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        data += content + b"\n" * (len(content) % 2)
    return data


def zstd(data: bytes) -> bytes:
    compressor = ZstdCompressor()
    return compressor.compress(data) + compressor.flush()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstd,
}


def node(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


@dataclass
class Maker:
    """Makes package files below a directory."""

    directory: Path
    fields: dict[str, dict[str, str]] = field(default_factory=dict)

    def __call__(
        self,
        name: str,
        members: list | None = None,
        *,
        version: str = "1.0-1",
        suffix: str = ".xz",
        **fields: str,
    ) -> Deb:
        """Make a package; a member is a TarInfo, (TarInfo, bytes), or (path, text)."""
        nodes = [
            (node(it[0]), it[1].encode())
            if isinstance(it, tuple) and isinstance(it[0], str)
            else it
            for it in members or []
        ]
        said = {"Package": name, "Version": version, "Architecture": "amd64", **fields}
        text = "".join(f"{key.replace('_', '-')}: {value}\n" for key, value in said.items())
        control = tar([(node("./control"), text.encode())])
        data = ar(
            [
                ("debian-binary", b"2.0\n"),
                (f"control.tar{suffix}", COMPRESS[suffix](control)),
                (f"data.tar{suffix}", COMPRESS[suffix](tar(nodes))),
            ]
        )
        path = self.directory / f"{name}_{version.replace(':', '%3a')}_amd64.deb"
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.fields[name] = {**said, "Size": str(len(data)), "SHA256": sha256}
        return Deb(name, version, sha256, path)


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    pool = tmp_path / "pool"
    pool.mkdir()
    return Maker(pool)


@pytest.fixture
def member():
    return node


SHOW = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift
for name in "$@"; do
  if [ -e "$FAKE_APT/$name" ]; then cat "$FAKE_APT/$name"; else echo "N: Unable to locate package $name" >&2; code=100; fi
done
exit ${code:-0}
"""
DOWNLOAD = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift
for it in "$@"; do
  echo "$it" >>"$FAKE_APT/log"
  cp "$FAKE_APT"/../pool/"${it%%=*}"_*.deb . || exit 100
done
"""


@dataclass
class Apt:
    """An apt that knows what `publish` told it, and its downloads."""

    directory: Path
    make: Maker

    def publish(self, **changes: str) -> None:
        for name, fields in self.make.fields.items():
            text = "".join(f"{key}: {value}\n" for key, value in {**fields, **changes}.items())
            (self.directory / name).write_text(text + "Description: a\n  b\n\n")

    @property
    def downloads(self) -> list[str]:
        log = self.directory / "log"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def apt(tmp_path: Path, make: Maker, monkeypatch: pytest.MonkeyPatch) -> Apt:
    directory, programs = tmp_path / "apt", tmp_path / "bin"
    directory.mkdir()
    programs.mkdir()
    for name, script in (("apt-cache", SHOW), ("apt-get", DOWNLOAD)):
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_APT", str(directory))
    return Apt(directory, make)
