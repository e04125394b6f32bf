"""Rows of figures: name, ours, peer, ratio, required; printed as a table or JSON, exit 1 where one is missed."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PAIRS = int(os.environ.get("CALVE_BENCH_PAIRS", "7"))
_POLL_S = 0.02
_QUIET_S = 20.0


@dataclasses.dataclass
class Row:
    """One figure; `required` is shown, `met` decides."""

    name: str
    ours: float
    unit: str
    peer: float | None = None
    ratio: float | None = None
    spread: str = ""
    required: str = ""
    met: bool = True


def finish(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Print the rows and leave."""
    if "--json" in sys.argv[1:]:
        print(
            json.dumps(
                {"name": title, "rows": [dataclasses.asdict(row) for row in rows], "notes": notes},
                indent=2,
            )
        )
    else:
        head = f"{'figure':<44} {'ours':>12} {'peer':>10} {'ratio':>7}  {'required':<16}"
        print(f"{title}\n{head}")
        for row in rows:
            peer = "" if row.peer is None else f"{row.peer:.2f}"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            verdict = "" if not row.required else ("" if row.met else "  MISSED")
            print(
                f"{row.name:<44} {row.ours:>9.2f} {row.unit:<4}{peer:>9} {ratio:>7}  "
                f"{row.required:<16} {row.spread}{verdict}"
            )
        for note in notes:
            print(f"  {note}")
    sys.exit(0 if all(row.met for row in rows) else 1)


def cpu_s(command: Callable[[], object]) -> float:
    """Return the user CPU seconds that a call took, in this process and its ended children."""

    def used() -> float:
        return sum(
            resource.getrusage(who).ru_utime
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )

    before = used()
    command()
    return used() - before


def child(argv: Sequence[str], **kwargs: object) -> Callable[[], object]:
    """Return a call that runs a command."""
    return lambda: subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, **kwargs)  # type: ignore[call-overload]


def pairs(
    ours: Callable[[], object], peer: Callable[[], object], count: int = 7
) -> tuple[float, float, float, str]:
    """Time interleaved pairs; return medians of ours and the peer's, the median ratio and its range."""
    mine, theirs = [], []
    for _ in range(count):
        mine.append(cpu_s(ours))
        theirs.append(cpu_s(peer))
    ratios = sorted(a / max(b, 1e-6) for a, b in zip(mine, theirs, strict=True))
    return (
        statistics.median(mine),
        statistics.median(theirs),
        statistics.median(ratios),
        f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
    )


def python(code: str, *arguments: str) -> list[str]:
    """Return the command of a fresh interpreter."""
    return [sys.executable, "-c", code, *arguments]


def environment(root: str) -> dict[str, str]:
    """Return an environment for Nix without a daemon or a configuration, whose store is below `root`, never /nix."""
    return {**os.environ, "NIX_REMOTE": f"local?root={root}", "HOME": root}


@dataclasses.dataclass
class Run:
    """One run of a command: what it took, and the end of what it said where it failed."""

    wall_s: float
    cpu_s: float
    peak_mb: float
    requests: int = 0
    failed: str = ""
    others_s: float = 0.0


def busy_s() -> float:
    """Return the CPU seconds that all processes of the machine have used."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)
    user, nice, system, _, _, irq, softirq = map(int, fields[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _settle() -> None:
    """Wait, but not for long, until others leave the machine alone."""
    end = time.monotonic() + _QUIET_S
    while time.monotonic() < end:
        before = busy_s()
        time.sleep(1)
        if busy_s() - before < 0.2 * (os.cpu_count() or 1):
            return


def measure(argv: Sequence[str], env: Mapping[str, str], cwd: str | None = None) -> Run:
    """Run a command; its peak is the sum of VmHWM over the processes of its tree, looked at every 20 ms."""
    with tempfile.TemporaryFile() as said:
        begin, busy_before_s = time.monotonic(), busy_s()
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=dict(env),
            cwd=cwd,
        )
        peaks: dict[int, int] = {}
        over = threading.Event()
        watcher = threading.Thread(target=_watch, args=(child.pid, peaks, over))
        watcher.start()
        _, status, used = os.wait4(child.pid, 0)
        wall_s = time.monotonic() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        over.set()
        watcher.join()
        said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
        end = said.read().decode("utf-8", "replace").strip()
    failed = f"{child.returncode}: {end}" if child.returncode else ""
    cpu_s = used.ru_utime + used.ru_stime
    others_s = max(0.0, busy_s() - busy_before_s - cpu_s)
    return Run(wall_s, cpu_s, sum(peaks.values()) / 1024, failed=failed, others_s=others_s)


def _watch(root: int, peaks: dict[int, int], over: threading.Event) -> None:
    while not over.is_set():
        todo = [root]
        while todo:
            pid = todo.pop()
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                for task in os.listdir(f"/proc/{pid}/task"):
                    todo += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            peak = int(fields.get("VmHWM", "0 kB").split()[0])
            peaks[pid] = max(peaks.get(pid, 0), peak)
        over.wait(_POLL_S)


def interleaved(cases: Mapping[str, Callable[[], Run]], count: int = PAIRS) -> dict[str, list[Run]]:
    """Run all cases in turn, so many times, each once the machine is quiet (or will not become so).

    A run that failed ends the benchmark.
    """
    found: dict[str, list[Run]] = {name: [] for name in cases}
    for turn in range(count):
        for name, case in cases.items():
            _settle()
            run = case()
            if run.failed:
                raise SystemExit(f"{name} failed with {run.failed}")
            print(
                f"  {turn + 1}/{count} {name}: {run.wall_s:.2f} s, CPU {run.cpu_s:.2f} s, "
                f"{run.peak_mb:.0f} MB, {run.requests} requests, others' CPU {run.others_s:.2f} s",
                file=sys.stderr,
            )
            found[name].append(run)
    return found


def median(runs: Sequence[Run], of: str = "wall_s") -> float:
    """Return the median of one field."""
    return statistics.median(getattr(run, of) for run in runs)


def compared(
    name: str,
    unit: str,
    ours: Sequence[float],
    peer: Sequence[float],
    least: float | None = None,
    *,
    rates: bool = False,
) -> Row:
    """Return a row of medians, its ratio that of the pairs: how many times as much the peer takes.

    Args:
        name: of the row.
        unit: of the figures.
        ours: a figure for each pair.
        peer: likewise.
        least: the ratio that is required.
        rates: more is better: the ratio is how many times the peer's rate ours is.
    """
    pairs = zip(peer, ours, strict=True) if rates else zip(ours, peer, strict=True)
    ratios = sorted(b / a for a, b in pairs)
    ratio = statistics.median(ratios)
    spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
    required = "" if least is None else f">= {least:.2f} x"
    mine, theirs = statistics.median(ours), statistics.median(peer)
    return Row(name, mine, unit, theirs, ratio, spread, required, least is None or ratio >= least)


def times(name: str, ours: Sequence[Run], peer: Sequence[Run], least: float | None = None) -> Row:
    """Return a row of wall times; see `compared`."""
    return compared(name, "s", [run.wall_s for run in ours], [run.wall_s for run in peer], least)


def at_least(name: str, value: float, unit: str, least: float) -> Row:
    """Return a row of a figure that must be no less."""
    return Row(name, value, unit, required=f">= {least:g} {unit}".rstrip(), met=value >= least)


def at_most(name: str, value: float, unit: str, most: float) -> Row:
    """Return a row of a figure that must be no more."""
    return Row(name, value, unit, required=f"<= {most:g} {unit}".rstrip(), met=value <= most)


def beside(runs: Mapping[str, Sequence[Run]], group: str) -> list[str]:
    """Return notes of what stands beside wall times: CPU seconds, peak memory, requests."""
    notes = []
    for name, each in runs.items():
        walls = sorted(run.wall_s for run in each)
        notes.append(
            f"{group}, {name}: {median(each):.2f} s ({walls[0]:.2f}-{walls[-1]:.2f}), CPU "
            f"{median(each, 'cpu_s'):.2f} s, peak {max(run.peak_mb for run in each):.0f} MB, "
            f"{max(run.requests for run in each)} requests; CPU of all others, the server's too, "
            f"{median(each, 'others_s'):.2f} s"
        )
    return notes


def load() -> str:
    """Say how busy the machine is, now."""
    return (
        f"load {' '.join(f'{one:.2f}' for one in os.getloadavg())} on {os.cpu_count()} processors"
    )
