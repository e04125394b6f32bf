"""EROFS images against mkfs.erofs, in the same run: a first one of some 300 MB, and one onto it.

The closure: the demo's web server, and a path of random files, 300 MB and 16,000 files in all. mkfs.erofs reads the
same trees, hard-linked below one directory; it has no incremental mode, its second image is a whole one. Ours comes
from the store, every path's NAR hash checked; a process of its own each time.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import _closure
from benchmarks._closure import Closure
from benchmarks._rows import Row, Run, beside, finish, interleaved, load, measure, median, python
from benchmarks._rows import times as row_of_times
from calve.demo.imports import Importer, temporary
from calve.demo.workshop import Workshop
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.process import which

_BYTES, _FILES = 300_000_000, 16_000
_CHANGED_BYTES = 416_000
_BUILD = """
import sys
from pathlib import Path
from calve.disk.erofs import Writer
from calve.disk.layout import Layout
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.nix.walk import checked, walk
root, top, out, parent = sys.argv[1:5]
before = Layout.parse(Path(parent).read_bytes()) if parent else None
with LocalStore(Path(root)) as store, Writer(Path(out), before) as writer:
    infos = store.closure([StorePath.parse(top)])
    missing = set(writer.missing(info.path for info in infos))
    batch = [info for info in infos if info.path in missing]
    for info in batch:
        writer.stage(info, checked(walk(store.real(info.path)), info))
    writer.commit(batch)
    layout = writer.finish(StorePath.parse(top))
    Path(out + ".json").write_bytes(layout.dump())
    Path(out + ".dirty").write_text(str(len(writer.dirty)))
"""


def _add_random(
    importer: Importer, name: str, source: random.Random, size: int, count: int
) -> StorePath:
    with temporary(importer.store) as work:
        tree = work / "tree"
        tree.mkdir()
        for number in range(count):
            folder = tree / f"d{number % 100:02d}"
            folder.mkdir(exist_ok=True)
            wanted = min(int(source.expovariate(count / size)), 40 * size // count)
            (folder / f"f{number:05d}").write_bytes(source.randbytes(wanted))
        return importer.add(tree, name)


def _measured() -> dict[str, Closure]:
    """Return `first`, and `second`: one path of 416 KB is another."""

    def make(directory: Path) -> Mapping[str, Closure]:
        source = random.Random(16)
        workshop = Workshop(_closure.HOME.absolute() / "workshop")
        with LocalStore(directory, create=True) as store:
            system = workshop.system(store, "webserver", 1)
            infos = store.closure([system])
            files = sum(
                len(names) for info in infos for _, _, names in os.walk(store.real(info.path))
            )
            left = _BYTES - sum(info.nar_size for info in infos)
            importer = Importer(store)
            more = _add_random(importer, "random", source, left, _FILES - files)
            tops = {}
            for name in ("first", "second"):
                small = _add_random(importer, "small", source, _CHANGED_BYTES, 30)
                with temporary(store) as work:
                    (work / "top").write_text(f"{system}\n{more}\n{small}\n")
                    tops[name] = importer.add(work / "top", "system", [system, more, small])
            importer.flush()
            return {name: _closure.describe(store, top) for name, top in tops.items()}

    return _closure.once("erofs", make)


def _linked(closure: Closure, work: Path, name: str) -> Path:
    """Return a directory with the closure's trees below nix/store, as links to their files."""
    place = work / name / "nix" / "store"
    place.mkdir(parents=True)
    with LocalStore(Path(closure.root)) as store:
        for info in store.closure([closure.path]):
            real, target = store.real(info.path), place / info.path.basename
            if real.is_dir() and not real.is_symlink():
                shutil.copytree(real, target, symlinks=True, copy_function=os.link)
            else:
                os.link(real, target, follow_symlinks=False)
    return work / name


def _ours(closure: Closure, out: Path, parent: str) -> Callable[[], Run]:
    def case() -> Run:
        out.unlink(missing_ok=True)
        return measure(python(_BUILD, closure.root, closure.top, str(out), parent), os.environ)

    return case


def _peer(tree: Path, out: Path) -> Callable[[], Run]:
    def case() -> Run:
        out.unlink(missing_ok=True)
        mkfs = which("mkfs.erofs", package="erofs-utils")
        return measure(
            [mkfs, "-T1", "-U", "00000000-0000-4000-8000-000000000001", str(out), str(tree)],
            os.environ,
        )

    return case


def _differing(one: Path, two: Path) -> int:
    """Return how many groups of 512 KiB of an image differ from another's."""
    size = 1 << 19
    count = 0
    with one.open("rb") as left, two.open("rb") as right:
        while mine := left.read(size):
            count += mine != right.read(size)
    return count


def main() -> None:
    closures = _measured()
    first, second = closures["first"], closures["second"]
    home = _closure.HOME.absolute()
    with tempfile.TemporaryDirectory(dir=home) as name:
        work = Path(name)
        trees = [
            _linked(closure, work, closure.path.name + str(at))
            for at, closure in enumerate(closures.values())
        ]
        layout = str(work / "1.json")
        runs = interleaved(
            {"calve": _ours(first, work / "1", ""), "mkfs.erofs": _peer(trees[0], work / "p1")}
        )
        more = interleaved(
            {"calve": _ours(second, work / "2", layout), "mkfs.erofs": _peer(trees[1], work / "p2")}
        )
        dirty = int((work / "2.dirty").read_text())
        peer_dirty = _differing(work / "p2", work / "p1")
        sizes = [(work / each).stat().st_size / 1e6 for each in ("1", "p1")]
    cpu, peak = median(runs["calve"], "cpu_s"), max(run.peak_mb for run in runs["calve"])
    least = median(more["calve"], "cpu_s")
    theirs = [median(each["mkfs.erofs"], "cpu_s") for each in (runs, more)]
    rows = [
        row_of_times("a first image", runs["calve"], runs["mkfs.erofs"]),
        row_of_times("one path of 416 KB is another", more["calve"], more["mkfs.erofs"]),
        Row("a first image, CPU", cpu, "s", theirs[0], required="<= 4 s", met=cpu <= 4),
        Row("one path, CPU", least, "s", theirs[1], required="<= 1 s", met=least <= 1),
        Row("peak memory", peak, "MB", required="<= 64 MB", met=peak <= 64),
        Row("size", sizes[0], "MB", sizes[1], sizes[1] / sizes[0]),
        Row(
            "blocks of 512 KiB that change", dirty, "", peer_dirty, required="<= 4", met=dirty <= 4
        ),
    ]
    notes = [str(first), load(), *beside(runs, "first"), *beside(more, "one path")]
    finish("benchmarks.erofs", rows, notes)


if __name__ == "__main__":
    main()
