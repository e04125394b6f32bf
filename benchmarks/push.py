"""Push to S3 against `nix copy`: cold, unchanged, one path changed; requests, memory.

The region's S3 is a process of its own that delays every request by 20 ms, checks signatures and hashes, and whose
bucket holds 100,000 other objects. It shares the processors with what is measured, for both sides alike.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import _closure, _nix
from benchmarks._closure import Closure
from benchmarks._nix import Nix
from benchmarks._rows import (
    PAIRS,
    Row,
    Run,
    beside,
    finish,
    interleaved,
    load,
    measure,
    median,
    times,
)
from benchmarks._server import BUCKET, REGION, S3, UNSIGNED
from calve.errors import CalveError

_DELAY_S = 0.02
_OTHERS = int(os.environ.get("CALVE_BENCH_OBJECTS", "100000"))
_CHANGES = ("cold", "unchanged", "one path changed")


class Bench:
    """A service, and clients that push to it in turns."""

    def __init__(self, s3: S3, work: Path, closures: Mapping[str, Closure]) -> None:
        self._s3 = s3
        self._home = work / "home"
        self._closures = closures
        self._turn = 0
        self.operations: dict[str, Counter[str]] = {}
        self.service_s = 0.0

    def _run(self, name: str, argv: list[str], env: Mapping[str, str]) -> Run:
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.mkdir()
        before, used = Counter(self._s3.counts()), _cpu_s(self._s3.pid)
        run = measure(argv, {**env, **self._s3.credentials})
        after = Counter(self._s3.counts())
        self.operations[name] = after - before
        run.requests = sum(self.operations[name].values())
        self.service_s = max(self.service_s, _cpu_s(self._s3.pid) - used)
        return run

    def _url(self, place: str, more: str = "") -> str:
        return f"s3://{place}?region={REGION}&endpoint={self._s3.endpoint}{more}"

    def calve(self, change: str) -> Run:
        """Push once; a cold push goes to a prefix of its own in the bucket that is full."""
        if change == "cold":
            self._s3.forget(BUCKET, "calve-")
            self._turn += 1
        closure = self._closures["changed" if change == _CHANGES[2] else "whole"]
        argv = [sys.executable, "-m", "calve", "push", closure.top, "--store", closure.root]
        argv += ["--to", self._url(f"{BUCKET}/calve-{self._turn}"), "--key"]
        return self._run(f"calve, {change}", [*argv, str(_closure.secret_key())], os.environ)

    def nix(self, nix: Nix, change: str) -> Run:
        """Push once; its S3 caches have no prefix, so that a cold push goes to a bucket of its own."""
        if change == "cold":
            if self._turn > 1:
                self._s3.forget(f"{UNSIGNED}{self._turn - 1}")
            self._s3.bucket(f"{UNSIGNED}{self._turn}")
        closure = self._closures["changed" if change == _CHANGES[2] else "whole"]
        more = f"&compression=zstd&secret-key={_closure.secret_key()}"
        argv = nix.argv(
            "nix",
            *("--extra-experimental-features", "nix-command", "copy"),
            *("--from", f"local?root={closure.root}", "--to"),
            *(self._url(f"{UNSIGNED}{self._turn}", more), "--option", "build-users-group", ""),
            closure.top,
        )
        return self._run(f"{nix.name}, {change}", argv, _nix.environment(self._home))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rows(runs: Mapping[str, list[Run]], peer: str | None, closure: Closure) -> list[Row]:
    cold, same, changed = (runs[f"calve, {change}"] for change in _CHANGES)
    allowed = 2 * closure.paths + 4

    def most(name: str, ours: list[Run], limit: int, change: str) -> Row:
        count = max(run.requests for run in ours)
        theirs = None if peer is None else max(run.requests for run in runs[f"{peer}, {change}"])
        return Row(name, count, "", theirs, required=f"<= {limit}", met=count <= limit)

    rows = [Row("cold, 20 ms", median(cold), "s", required="<= 17 s", met=median(cold) <= 17)]
    if peer is not None:
        rows += [
            times(
                f"{change}, against nix copy", runs[f"calve, {change}"], runs[f"{peer}, {change}"]
            )
            for change in _CHANGES
        ]
    peak = max(run.peak_mb for each in (cold, same, changed) for run in each)
    return [
        *rows,
        most("cold: requests", cold, allowed, _CHANGES[0]),
        most("unchanged: requests", same, 2, _CHANGES[1]),
        most("one path changed: requests", changed, 6, _CHANGES[2]),
        Row("peak", peak, "MB", required="<= 64 MB", met=peak <= 64),
    ]


def _peer(bench: Bench, nix: Nix) -> str:
    """Try a peer; return why it does not push to the service."""
    return bench.nix(nix, _CHANGES[0]).failed


def main() -> None:
    closures = _closure.realistic()
    peers, notes = _nix.peers()
    notes = [f"the closure: {closures['whole']}; {_OTHERS} other objects", *notes]
    notes.append(f"at the beginning: {load()}")
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with contextlib.ExitStack() as owner:
        work = Path(owner.enter_context(tempfile.TemporaryDirectory(dir=shm, prefix="calve-push-")))
        s3 = owner.enter_context(S3(work / "s3", _DELAY_S, _OTHERS))
        bench = Bench(s3, work, closures)
        cases: dict[str, Callable[[], Run]] = {
            f"calve, {it}": (lambda it=it: bench.calve(it)) for it in _CHANGES
        }
        peer = None
        for nix in peers:
            if why := _peer(bench, nix):
                notes.append(f"SKIPPED {nix.name}, which cannot push here: {why[-300:]}")
                continue
            peer = nix.name
            notes.append(
                f"{peer} pushes to a bucket that takes unsigned requests, and holds nothing"
            )
            cases |= {
                f"{peer}, {it}": (lambda it=it, nix=nix: bench.nix(nix, it)) for it in _CHANGES
            }
            break
        runs = interleaved(cases)
        notes += beside(runs, "20 ms")
        for name, counts in bench.operations.items():
            notes.append(f"{name}: {', '.join(f'{n} {what}' for what, n in counts.most_common())}")
        notes.append(f"the service used up to {bench.service_s:.1f} s of CPU for one push")
    notes.append(f"at the end: {load()}")
    rows = _rows(runs, peer, closures["whole"])
    finish(f"push (wall seconds, peer / ours; {PAIRS} interleaved pairs)", rows, notes)


if __name__ == "__main__":
    try:
        main()
    except CalveError as error:
        raise SystemExit(f"{error.message} {error.hint or ''}") from error
