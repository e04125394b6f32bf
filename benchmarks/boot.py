"""The boot of a 512 MB machine, against its first version and against a stock image's unit that pulls with Nix.

    python -m benchmarks.boot [--json] [--part answer] [--part memory] [--part initrd]

Machines are booted one at a time, in turns, under software emulation, which makes CPU 20 to 50 times as dear as it is
on the processor itself: what computes looks longer beside what waits than it is. `CALVE_BENCH_PAIRS` is the number of
turns, 3 by default.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import _boot_first, _boot_peer, _closure, _nix
from benchmarks._boot_rig import DISK_BYTES, Booted, Rig
from benchmarks._rows import (
    Row,
    Run,
    at_least,
    at_most,
    beside,
    compared,
    finish,
    interleaved,
    load,
)
from calve.boot.policy import Policy
from calve.demo.imports import Importer, temporary
from calve.demo.system import Boot
from calve.demo.tiny import build_tiny
from calve.demo.workshop import Workshop
from calve.disk import ext4, initrd, payload
from calve.errors import CalveError, NotFoundError
from calve.image.seedtree import SeedTree
from calve.image.source import StoreSource
from calve.image.start import start_of
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.process import which
from calve.region.qemu import MachineImage

PAIRS = int(os.environ.get("CALVE_BENCH_PAIRS", "3"))
PAGE = "calve demo release 1"

_FIRST = "the first version"
_SEEDED = "calve on a base image"
_LEVEL = 9  # of the initrds that boot: the workshop's
_PACKED = 19  # of those that are weighed: `calve image initrd`'s
_RANGE = 0.2  # above it, CPU seconds decide
_FILE_BYTES = 600 << 20
_CLOSURE_BYTES = 2_000_000_000
_LARGE_DISK_BYTES = 4 << 30


class Bench:
    """All parts, and what they found.

    Args:
        work: a directory for what is made.
    """

    def __init__(self, work: Path) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._work = work
        self._workshop = Workshop(Path(".calve/demo").absolute())

    # From the kernel's start to the first answer

    def answer(self) -> None:
        """Boot ours, the first version and the peers in turns, all with the same closure."""
        with Rig(self._workshop, self._work / "answer") as rig:
            with self._workshop.store() as store:
                system = self._workshop.system(store, "webserver", 1)
                nar_bytes = sum(info.nar_size for info in store.closure([system]))
                images = self._images(rig, store, system)
                data = rig.push(store, system)
            boots: dict[str, list[Booted]] = {name: [] for name in images}

            def case(name: str, image: MachineImage, options: Mapping[str, str] | None) -> Run:
                user_data = data
                if options is not None:
                    key = self._workshop.key().public.dump()
                    user_data = _boot_peer.user_data(system, rig.plain_cache, key, options)
                booted = rig.boot(image, user_data, page=PAGE)
                boots[name].append(booted)
                return booted.run

            cases = {name: partial(case, name, *image) for name, image in images.items()}
            runs = interleaved(cases, PAIRS)
        self.rows.append(at_least("the closure's NARs", nar_bytes / 1e6, "MB", 100))
        for name in [one for one in runs if one not in {"calve", _SEEDED}]:
            least = 1 / 0.7 if name == _FIRST else 2.0
            self.rows += _faster(f"against {name}", runs["calve"], runs[name], least)
            self.rows += _faster(
                f"on a base image, against {name}", runs[_SEEDED], runs[name], least
            )
        self.rows += _phases(boots["calve"], boots.get(_FIRST, ()))
        self._memory_rows("the webserver", boots["calve"])
        self.notes += beside(runs, "boot")
        self._tell(boots)

    def _images(
        self, rig: Rig, store: LocalStore, system: StorePath
    ) -> dict[str, tuple[MachineImage, Mapping[str, str] | None]]:
        """Return the machines by their names, ours first, and Nix's options of those that have it."""
        empty = self._workshop.disk(DISK_BYTES)
        images: dict[str, tuple[MachineImage, Mapping[str, str] | None]] = {
            "calve": (rig.image(self._workshop.initrd(hold_s=1), empty), None),
            _SEEDED: (
                rig.image(self._workshop.initrd(hold_s=1), self._seeded(store, system)),
                None,
            ),
        }
        old = self._first(_LEVEL)
        if old is not None:
            images[_FIRST] = (rig.image(old, empty), None)
        nixes, notes = _nix.peers()
        self.notes += notes
        if nixes:
            self.notes.append(f"amazon-init has {nixes[0].name}, tuned with {_boot_peer.TUNED}")
            disk = _boot_peer.make_disk(store, system, nixes[0], self._work, DISK_BYTES)
            image = rig.image(_boot_peer.bare_initrd(self._workshop, self._work / "bare.img"), disk)
            images["amazon-init"] = (image, _boot_peer.DEFAULTS)
            images["amazon-init tuned"] = (image, _boot_peer.TUNED)
        return images

    def _seeded(self, store: LocalStore, system: StorePath) -> Path:
        """Make the root disk that `calve image build --base` makes: it has its own kernel and initrd."""
        source, disk = StoreSource(store), self._work / "seeded.raw"
        with tempfile.TemporaryDirectory(dir=self._work) as name:
            seeds = start_of(source, system, Path(name)).seeds
            tree = Path(name) / "tree"
            tree.mkdir(mode=0o755)
            with SeedTree(tree) as sink:
                source.fill(sink, seeds)
            ext4.make(disk, DISK_BYTES, tree=tree)
        return disk

    def _first(self, level: int, bare: Path | None = None) -> Path | None:
        """Pack the first version's initrd; None, with a note, where it cannot be had."""
        out = self._work / f"first-{level}.img"
        try:
            _boot_first.pack(self._workshop, out, level=level, bare=bare)
        except NotFoundError as error:
            self.notes.append(f"SKIPPED {_FIRST}: {error.message}")
            return None
        self.notes.append(f"{_FIRST} is {_boot_first.COMMIT}")
        return out

    def _tell(self, boots: Mapping[str, Sequence[Booted]]) -> None:
        """Note each peer's phases, and the end of a machine that did not answer."""
        for name, each in boots.items():
            self.notes.append(f"{name}: {_line(each)}")
            for booted in each:
                if booted.seconds is None:
                    self.notes.append(f"{name} did not answer within {booted.run.wall_s:.0f} s:")
                    self.notes += [f"  {line[:160]}" for line in booted.last_lines]

    # Memory

    def memory(self) -> None:
        """Boot with a closure of 2 GB, and with a single file of 600 MB, until the system is committed."""
        makers: dict[str, Callable[[], tuple[LocalStore, list[StorePath]]]] = {
            "2 GB": self._large,
            "one file of 600 MB": self._file,
        }
        with Rig(self._workshop, self._work / "memory") as rig:
            for name, make in makers.items():
                store, paths = make()
                with store:
                    system = self._system(store, paths)
                    closure = store.closure([system])
                    data = rig.push(store, system)
                disk = self._workshop.disk(_LARGE_DISK_BYTES)
                booted = rig.boot(rig.image(self._workshop.initrd(hold_s=1), disk), data)
                if booted.seconds is None:
                    raise SystemExit(f"{name}: not committed: {' | '.join(booted.last_lines)}")
                size = sum(info.nar_size for info in closure) / 1e6
                self._memory_rows(f"{name} ({len(closure)} paths, {size:.0f} MB)", [booted])
                pull_s = dict(booted.phases)["pull"]
                self.rows.append(Row(f"{name}: pull, emulated", pull_s, "s"))

    def _large(self) -> tuple[LocalStore, list[StorePath]]:
        """Return the closure that pulls are measured with, filled up to 2 GB."""
        whole = _closure.realistic()["whole"]
        store = LocalStore(Path(whole.root))
        filler = _random_file(store, "filler", max(1 << 20, _CLOSURE_BYTES - whole.nar_bytes))
        return store, [whole.path, filler]

    def _file(self) -> tuple[LocalStore, list[StorePath]]:
        store = LocalStore(self._work / "file", create=True)
        return store, [_random_file(store, "big", _FILE_BYTES)]

    def _system(self, store: LocalStore, paths: Sequence[StorePath]) -> StorePath:
        """Add a system that has these paths beside the tiny one."""
        boot = Boot(self._workshop.kernel())
        tiny = build_tiny(store, self._workshop.packages, release=1, boot=boot)
        importer = Importer(store)
        with temporary(store) as work:
            tree = work / "top"
            tree.mkdir()
            (tree / "init").symlink_to(f"{tiny}/init")
            for number, path in enumerate(paths):
                (tree / f"more-{number}").symlink_to(str(path))
            system = importer.add(tree, "nixos-system-large-1", [tiny, *paths])
        importer.flush()
        return system

    def _memory_rows(self, name: str, boots: Sequence[Booted]) -> None:
        ready = [fields for booted in boots if (fields := booted.event("ready"))]
        if not ready:
            self.rows.append(Row(f"{name}: agent's peak", 0, "MB", required="commits", met=False))
            return
        peak = max(fields["agent_peak_mb"] for fields in ready)
        lowest = min(fields["lowest_available_mb"] for fields in ready)
        self.rows += [
            at_most(f"{name}: agent's peak", peak, "MB", 40),
            at_least(f"{name}: lowest MemAvailable", lowest, "MB", 300),
        ]

    # The initrd

    def initrd(self) -> None:
        """Weigh what the agent adds to an initrd: with it, less one with nothing in its place."""
        busybox = Path(which("busybox", package="busybox-static"))
        modules = self._workshop.kernel().modules
        policy = Policy(keys=(self._workshop.key().public.dump(),), hold_s=1).dump()
        agent = payload.build()
        nothing = payload.Payload(agent.version, Path("/dev/null"), (), ())
        whole, bare = (
            initrd.write(
                initrd.Initrd(busybox, modules, part, policy),
                self._work / f"{name}.img",
                level=_PACKED,
            ).compressed_bytes
            for name, part in (("whole", agent), ("none", nothing))
        )
        added = at_most("initrd, added by the agent", (whole - bare) / 1e6, "MB", 8.1)
        old_bare = self._work / "first-none.img"
        old = self._first(_PACKED, old_bare)
        if old is not None:
            old_added = old.stat().st_size - old_bare.stat().st_size
            added = dataclasses.replace(
                added, peer=old_added / 1e6, ratio=old_added / (whole - bare)
            )
        self.rows += [Row("initrd, whole", whole / 1e6, "MB"), added]


def _random_file(store: LocalStore, name: str, size: int) -> StorePath:
    """Add a file that does not compress."""
    source = random.Random(3)
    importer = Importer(store)
    with temporary(store) as work:
        (work / "tree").mkdir()
        with (work / "tree" / "file").open("wb") as file:
            for at in range(0, size, 1 << 20):
                file.write(source.randbytes(min(1 << 20, size - at)))
        path = importer.add(work / "tree", name)
    importer.flush()
    return path


# Rows


def _faster(name: str, ours: Sequence[Run], peer: Sequence[Run], least: float) -> list[Row]:
    """Return rows of wall time and of CPU, the ratios in pairs: how many times as long the peer takes.

    One of them decides: wall time, or CPU where the ratios of wall time range too far.
    """
    rows = []
    for what, of in (("", "wall_s"), (", CPU", "cpu_s")):
        figures = [[getattr(run, of) for run in each] for each in (ours, peer)]
        rows.append(compared(name + what, "s", *figures))
    ratios = [b.wall_s / a.wall_s for a, b in zip(ours, peer, strict=True)]
    steady = max(ratios) - min(ratios) <= _RANGE * (rows[0].ratio or 0.0)
    judge = rows[0] if steady else rows[1]
    judge.required, judge.met = f">= {least:.2f} x", (judge.ratio or 0.0) >= least
    return rows


def _phases(ours: Sequence[Booted], first: Sequence[Booted]) -> list[Row]:
    """Return a row per phase: medians, and its share of each whole."""
    mine, theirs = _medians(ours), _medians(first)
    whole, first_whole = sum(mine.values()), sum(theirs.values())
    return [
        Row(
            f"  {name}",
            seconds,
            "s",
            theirs.get(name),
            theirs[name] / seconds if seconds and name in theirs else None,
            f"{seconds / whole:.0%} of the whole"
            + (f"; of {_FIRST} {theirs[name] / first_whole:.0%}" if name in theirs else ""),
        )
        for name, seconds in mine.items()
    ]


def _medians(boots: Sequence[Booted]) -> dict[str, float]:
    """Return the median of each phase, over the boots that answered."""
    tables = [dict(booted.phases) for booted in boots if booted.seconds is not None]
    names = tables[0] if tables else ()
    return {name: statistics.median(table.get(name, 0.0) for table in tables) for name in names}


def _line(boots: Sequence[Booted]) -> str:
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in _medians(boots).items())


def main() -> None:
    parts = ("initrd", "answer", "memory")
    options = argparse.ArgumentParser(prog="python -m benchmarks.boot")
    options.add_argument("--json", action="store_true", help="print a document")
    options.add_argument(
        "--part", action="append", choices=parts, help="only this; may be given again"
    )
    chosen = options.parse_args().part or parts
    _closure.HOME.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="calve-bench-", dir=_closure.HOME.parent) as name:
        bench = Bench(Path(name).absolute())
        bench.notes.append(f"at the beginning: {load()}")
        try:
            for part in chosen:
                getattr(bench, part)()
        except CalveError as error:
            raise SystemExit(f"{error.message} {error.hint or ''}") from error
        bench.notes.append(f"at the end: {load()}")
    title = f"boot (512 MB machine, software emulation; peer / ours; {PAIRS} interleaved turns)"
    finish(title, bench.rows, bench.notes)


if __name__ == "__main__":
    main()
