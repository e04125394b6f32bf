"""How push and pull grow with paths and with bytes: ten times as much shall take ten times as long, and no more memory.

A closure of so many paths of 16 KB each, and one path of so many MB, into a cache directory and out of it again, on
tmpfs. CPU seconds decide, less those of a closure of one small path: the interpreter's start.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import _closure
from benchmarks._closure import Closure
from benchmarks._rows import Row, Run, finish, load, measure
from calve.demo.imports import Importer, temporary
from calve.errors import CalveError
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath

_PATHS = (1, 100, 1_000, 10_000)
_MEGABYTES = (10, 100, 1_000)
_FILE_BYTES = 16 * 1024
_RUNS = 3
_SLACK = 1.25
_BATCH = 500


def _content(source: random.Random, size: int) -> bytes:
    """Return bytes that compress by half."""
    return source.randbytes(size // 2) + bytes(size - size // 2)


def _wide(count: int) -> Closure:
    """Return a closure of one path that refers to all others."""

    def make(directory: Path) -> Mapping[str, Closure]:
        source = random.Random(count)
        with LocalStore(directory, create=True) as store:
            importer = Importer(store)
            parts: list[StorePath] = []
            for number in range(count - 1):
                parts.append(_add(importer, f"part-{number}", source, _FILE_BYTES))
                if number % _BATCH == 0:
                    importer.flush()
            # Nix's narinfos are read up to 64 KiB: what refers to thousands does it by way of others.
            while len(parts) > _BATCH:
                groups = [parts[at : at + _BATCH] for at in range(0, len(parts), _BATCH)]
                parts = [
                    _add(importer, f"group-{at}", source, 64, some)
                    for at, some in enumerate(groups)
                ]
            top = _add(importer, "nixos-system-growth-1", source, 64, parts)
            importer.flush()
            return {"whole": _closure.describe(store, top)}

    return _closure.once(f"growth-{count}", make)["whole"]


def _large(megabytes: int) -> Closure:
    """Return a closure of one path with one file."""

    def make(directory: Path) -> Mapping[str, Closure]:
        source = random.Random(megabytes)
        with LocalStore(directory, create=True) as store:
            importer = Importer(store)
            top = _add(importer, "large", source, megabytes * 1_000_000)
            importer.flush()
            return {"whole": _closure.describe(store, top)}

    return _closure.once(f"growth-{megabytes}-mb", make)["whole"]


def _add(
    importer: Importer,
    name: str,
    source: random.Random,
    size: int,
    references: list[StorePath] | None = None,
) -> StorePath:
    with temporary(importer.store) as work:
        tree = work / "tree"
        tree.mkdir()
        with (tree / "file").open("wb") as file:
            for at in range(0, size, 1 << 20):
                file.write(_content(source, min(size - at, 1 << 20)))
        (tree / "references").write_text("".join(f"{path}\n" for path in references or ()))
        return importer.add(tree, name, sorted(references or ()))


class Bench:
    """Pushes and pulls through one directory."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def push(self, closure: Closure) -> Run:
        shutil.rmtree(self._work / "cache", ignore_errors=True)
        argv = ["push", closure.top, "--store", closure.root, "--to", f"{self._work}/cache"]
        return self._run([*argv, "--key", str(_closure.secret_key())])

    def pull(self, closure: Closure) -> Run:
        self._remove("machine")
        published = _closure.published(closure)
        argv = ["pull", closure.top, "--from", published.root, "--manifest", published.manifest]
        argv += ["--trusted", published.trusted, "--store", str(self._work / "machine")]
        run = self._run(argv)
        self._remove("machine")
        return run

    def _remove(self, name: str) -> None:
        for directory, _, _ in os.walk(self._work / name):
            os.chmod(directory, 0o755)
        shutil.rmtree(self._work / name, ignore_errors=True)

    def _run(self, argv: list[str]) -> Run:
        run = measure([sys.executable, "-m", "calve", *argv], os.environ)
        if run.failed:
            raise CalveError(run.failed[-500:])
        return run


def _rows(what: str, bench: Callable[[Closure], Run], sizes: Mapping[str, Closure]) -> list[Row]:
    runs = {name: [bench(closure) for _ in range(_RUNS)] for name, closure in sizes.items()}
    cpu = {name: statistics.median(run.cpu_s for run in some) for name, some in runs.items()}
    start, *_ = cpu.values()
    rows: list[Row] = []
    before = 0.0
    for name in list(sizes)[1:]:
        taken = cpu[name] - start
        ratio = taken / before if before > 0.15 else None
        limit = 10 * _SLACK
        rows.append(
            Row(
                f"{what}, {name}",
                taken,
                "s",
                ratio=ratio,
                spread=f"wall {statistics.median(run.wall_s for run in runs[name]):.2f} s, peak "
                f"{max(run.peak_mb for run in runs[name]):.0f} MB",
                required="" if ratio is None else f"<= {limit} x",
                met=ratio is None or ratio <= limit,
            )
        )
        before = taken
    return rows


def main() -> None:
    paths = {f"{count:,} paths": _wide(count) for count in _PATHS}
    sizes = {"1 path": _wide(1)} | {f"{count:,} MB": _large(count) for count in _MEGABYTES}
    notes = [f"at the beginning: {load()}", "the ratio is to the line above: a tenth of it"]
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm, prefix="calve-growth-") as name:
        bench = Bench(Path(name))
        rows = _rows("push", bench.push, paths) + _rows("push", bench.push, sizes)
        rows += _rows("pull", bench.pull, paths) + _rows("pull", bench.pull, sizes)
    notes.append(f"at the end: {load()}")
    finish("growth (CPU seconds, median of 3)", rows, notes)


if __name__ == "__main__":
    try:
        main()
    except CalveError as error:
        raise SystemExit(f"{error.message} {error.hint or ''}") from error
