"""NAR write, read and unpack against `nix-store --dump` and `--restore`, on tmpfs, in user CPU.

Trees: 40,000 small files (where a Python writer pays per file) and one of 512 MB (where it does not). Each side runs
as a process of its own; our interpreter's start is part of our figure.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks._rows import Row, child, environment, finish, pairs, python

_DUMP = """
import sys
from pathlib import Path
from calve.nix import nar
with open(sys.argv[2], "wb", buffering=1 << 18) as out:
    nar.dump(Path(sys.argv[1]), out.write)
"""
_READ = """
import sys, os
from calve.nix import nar
with open(sys.argv[1], "rb", buffering=0) as source:
    for _ in nar.read(source.read, limit=os.path.getsize(sys.argv[1])): pass
"""
_UNPACK = """
import sys, os
from calve.nix import nar
from calve.nix.unpack import unpack
fd = os.open(sys.argv[2], os.O_RDONLY | os.O_DIRECTORY)
with open(sys.argv[1], "rb", buffering=0) as source:
    unpack(nar.read(source.read, limit=os.path.getsize(sys.argv[1])), fd, "tree")
"""


def _small(root: Path) -> None:
    source = random.Random(1)
    for directory in range(400):
        folder = root / f"d{directory:03d}"
        folder.mkdir(parents=True)
        for number in range(100):
            (folder / f"f{number:02d}").write_bytes(source.randbytes(source.randrange(0, 4096)))


def _large(root: Path) -> None:
    root.mkdir()
    block = random.Random(2).randbytes(1 << 20)
    with (root / "large").open("wb") as file:
        for _ in range(512):
            file.write(block)


def _remove(path: Path) -> None:
    if path.exists():
        subprocess.run(["chmod", "-R", "u+w", path], check=True)
        shutil.rmtree(path)


def _measure(name: str, work: Path, tree: Path) -> list[Row]:
    archive, other = str(work / f"{name}.nar"), str(work / "peer.nar")
    target, restored = work / "unpacked", work / "restored"
    env = environment(str(work / "nix"))

    def nix_dump() -> None:
        with open(other, "wb") as out:
            subprocess.run(["nix-store", "--dump", str(tree)], check=True, stdout=out, env=env)

    def nix_restore() -> None:
        _remove(restored)
        with open(archive, "rb") as source:
            subprocess.run(
                ["nix-store", "--restore", str(restored)], check=True, stdin=source, env=env
            )

    def unpack() -> None:
        _remove(target)
        target.mkdir()
        child(python(_UNPACK, archive, str(target)))()

    dump = child(python(_DUMP, str(tree), archive))
    rows = []
    for figure, ours, peer in (
        ("write", dump, nix_dump),
        ("read (peer: restore)", child(python(_READ, archive)), nix_restore),
        ("unpack", unpack, nix_restore),
    ):
        mine, theirs, ratio, spread = pairs(ours, peer)
        rows.append(Row(f"{name}: {figure}", mine, "s", theirs, ratio, spread))
    same = Path(archive).read_bytes() == Path(other).read_bytes()
    rows.append(Row(f"{name}: bytes differ", float(not same), "", required="0", met=same))
    _remove(target)
    _remove(restored)
    os.unlink(archive)
    return rows


def main() -> None:
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as name:
        work = Path(name)
        _small(work / "small")
        rows = _measure("40,000 small files", work, work / "small")
        shutil.rmtree(work / "small")
        _large(work / "big")
        rows += _measure("one file of 512 MB", work, work / "big")
        version = subprocess.run(
            ["nix-store", "--version"],
            check=True,
            capture_output=True,
            text=True,
            env=environment(str(work / "nix")),
        )
    finish("nar (user CPU, ours / peer)", rows, [version.stdout.strip()])


if __name__ == "__main__":
    main()
