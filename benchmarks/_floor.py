"""The machine's floor of a pull: decompress, one SHA-256, write the files; a process per processor, nothing else.

No network, no parsing, no verification, no metadata, no database. `python -m benchmarks._floor PLAN PART TARGET`
does one part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._closure import Closure, Published
from benchmarks._rows import Run, busy_s
from calve.cache.compression import decompressor
from calve.cache.lookup import narinfo_key
from calve.nix.narinfo import NarInfo
from calve.nix.store import LocalStore

_READ_BYTES = 256 * 1024


def plan(closure: Closure, published: Published, file: Path) -> None:
    """Write which NARs there are, and what files they hold; large ones first, shared out by their size."""
    processors = os.cpu_count() or 1
    parts: list[list[Any]] = [[] for _ in range(processors)]
    sizes = [0] * processors
    with LocalStore(Path(closure.root)) as store:
        for info in sorted(store.closure([closure.path]), key=lambda info: -info.nar_size):
            narinfo = Path(published.root) / narinfo_key(info.path)
            nar = Path(published.root) / NarInfo.parse(narinfo.read_bytes(), narinfo).url
            least = sizes.index(min(sizes))
            sizes[least] += info.nar_size
            parts[least].append([str(nar), info.path.basename, *_tree(store.real(info.path))])
    file.write_text(json.dumps(parts))


def _tree(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    directories, files = [], []
    for here, below, names in os.walk(root):
        below.sort()
        place = os.path.relpath(here, root)
        directories.append(place)
        for name in sorted(names):
            path = os.path.join(here, name)
            if not os.path.islink(path):
                files.append((os.path.normpath(os.path.join(place, name)), os.path.getsize(path)))
    return directories, files


def run(file: Path, target: Path) -> Run:
    """Do all parts at once."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    begin, before, busy_before_s = time.monotonic(), os.times(), busy_s()
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks._floor", str(file), str(part), str(target)]
        )
        for part in range(os.cpu_count() or 1)
    ]
    failed = [child.args for child in children if child.wait()]
    wall_s, after = time.monotonic() - begin, os.times()
    cpu_s = after[2] + after[3] - before[2] - before[3]
    others_s = max(0.0, busy_s() - busy_before_s - cpu_s)
    shutil.rmtree(target)
    return Run(wall_s, cpu_s, 0.0, failed=str(failed) if failed else "", others_s=others_s)


def _write(nar: str, root: str, directories: list[str], files: list[tuple[str, int]]) -> None:
    for name in directories:
        os.mkdir(os.path.join(root, name) if name != "." else root)
    digest = hashlib.sha256()
    todo = iter(files)
    fd, left = -1, 0
    with open(nar, "rb", buffering=0) as source:
        read = decompressor("zstd", source.read)
        while data := read(_READ_BYTES):
            digest.update(data)
            rest = memoryview(data)
            while rest and left >= 0:  # a NAR has more bytes than its files
                if not left:
                    if fd >= 0:
                        os.close(fd)
                    name, left = next(todo, ("", -1))
                    if left < 0:
                        fd = -1
                        break
                    fd = os.open(os.path.join(root, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                    continue
                count = os.write(fd, rest[:left])
                left -= count
                rest = rest[count:]
    if left > 0 or next(todo, None) is not None:
        raise SystemExit(f"{nar} ended before its files did")
    if fd >= 0:
        os.close(fd)


def main() -> None:
    file, part, target = sys.argv[1:]
    for nar, name, directories, files in json.loads(Path(file).read_text())[int(part)]:
        _write(nar, os.path.join(target, name), directories, files)


if __name__ == "__main__":
    main()
