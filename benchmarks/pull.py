"""Pull against Nix's copy and substitution, and against the machine's floor; memory, requests, kill -9.

Each client is a process of its own that pulls into a fresh store, in turns. nginx serves the cache, each request
after the same delay. Which parts to run may be named: `latency local ext4 old memory cgroup kill`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import _closure, _floor, _nix
from benchmarks._closure import Closure, Published
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
from benchmarks._server import Nginx
from calve.errors import CalveError

_DELAY_S = 0.02
_TUNED = {"max_substitution_jobs": 32, "http_connections": 50}
_CGROUP_MB = 64
_KILLS = 5
_JOBS = 8  # calve pull's default: how many NARs are under way at once

Cases = Mapping[str, Callable[[], Run]]


class Target:
    """Where stores are made anew for every run: a directory on one file system."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.root = directory / "root"
        self.home = directory / "home"

    def clear(self) -> None:
        for path in (self.root, self.home):
            if path.exists():
                if os.geteuid() != 0:
                    subprocess.run(["chmod", "-R", "u+w", path], check=True)
                shutil.rmtree(path)
        os.sync()

    def pull(
        self, server: Nginx, closure: Closure, argv: Sequence[str], *, env: Mapping[str, str]
    ) -> Run:
        """Run a client into a fresh store; what it says is believed only where all paths are there."""
        self.clear()
        self.home.mkdir()
        before = server.requests()
        run = measure(argv, env)
        time.sleep(0.05)
        run.requests = server.requests() - before
        if not run.failed:
            names = [name for name in os.listdir(self.root / "nix/store") if name[0] != "."]
            if len(names) != closure.paths:
                run.failed = f"0: {len(names)} paths of {closure.paths}"
        self.clear()
        return run

    def calve(self, server: Nginx, closure: Closure, published: Published) -> list[str]:
        """Return the command of our pull."""
        argv = [sys.executable, "-m", "calve", "pull", closure.top, "--from", server.url]
        argv += ["--trusted", published.trusted, "--manifest", published.manifest]
        return [*argv, "--store", str(self.root)]

    def cases(
        self, server: Nginx, closure: Closure, published: Published, peers: Sequence[Nix]
    ) -> Cases:
        """Return the clients by their names; ours first."""
        key, top = published.trusted, closure.top

        def case(argv: Sequence[str], *, nix: bool = True) -> Callable[[], Run]:
            env = _nix.environment(self.home) if nix else dict(os.environ)
            return lambda: self.pull(server, closure, argv, env=env)

        found = {"calve": case(self.calve(server, closure, published), nix=False)}
        for nix in peers:
            copy = nix.copy(server.url, f"local?root={self.root}", top, key)
            found[f"{nix.name} copy"] = case(copy)
            plain = nix.substitute(server.url, self.root, top, key)
            found[f"{nix.name} substitution"] = case(plain)
            tuned = nix.substitute(server.url, self.root, top, key, **_TUNED)
            found[f"{nix.name} tuned"] = case(tuned)
        return found


@contextlib.contextmanager
def _target(kind: str) -> Iterator[Target]:
    if kind == "tmpfs" and not os.access("/dev/shm", os.W_OK):
        raise SystemExit("no tmpfs at /dev/shm")
    place = "/dev/shm" if kind == "tmpfs" else str(_closure.HOME.absolute())
    with tempfile.TemporaryDirectory(prefix="calve-pull-", dir=place) as name:
        target = Target(Path(name))
        try:
            yield target
        finally:
            target.clear()


class Bench:
    """All parts, and what they found."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.closures = _closure.realistic()
        self.whole = self.closures["whole"]
        self.published = _closure.published(self.whole)
        self.peers, notes = _nix.peers()
        self.notes += [f"the closure: {self.whole}", *notes]

    def _versus(self, runs: Mapping[str, list[Run]], group: str, least: Sequence[float]) -> None:
        peer = self.peers[0].name if self.peers else ""
        for kind, ratio in zip(("copy", "substitution", "tuned"), least, strict=True):
            if f"{peer} {kind}" in runs:
                name = f"{group}, against {kind}"
                self.rows.append(times(name, runs["calve"], runs[f"{peer} {kind}"], ratio or None))
        self.notes += beside(runs, group)

    def latency(self) -> None:
        """At 20 ms into tmpfs, with the floor."""
        with _target("tmpfs") as target, Nginx(Path(self.published.root), _DELAY_S) as server:
            file = target.root.with_name("plan.json")
            _floor.plan(self.whole, self.published, file)
            cases = dict(target.cases(server, self.whole, self.published, self.peers[:1]))
            cases["floor"] = lambda: _floor.run(file, target.root.with_name("floor"))
            runs = interleaved(cases)
        self._versus(runs, "20 ms, tmpfs", (3.0, 1.4, 1.0))
        row = times("20 ms, tmpfs, against the floor", runs["floor"], runs["calve"])
        over = row.ratio or 0.0
        self.rows.append(
            Row(
                row.name,
                median(runs["calve"]),
                "s",
                median(runs["floor"]),
                over,
                row.spread,
                "<= 1.25 x",
                over <= 1.25,
            )
        )
        most = max(run.requests for run in runs["calve"])
        allowed = self.whole.paths + 3
        self.rows.append(Row("requests", most, "", required=f"<= {allowed}", met=most <= allowed))

    def local(self) -> None:
        """At 0 ms into tmpfs."""
        with _target("tmpfs") as target, Nginx(Path(self.published.root), 0) as server:
            cases = target.cases(server, self.whole, self.published, self.peers[:1])
            runs = interleaved(cases)
        self._versus(runs, "0 ms, tmpfs", (0, 0, 0))

    def ext4(self) -> None:
        """At 20 ms onto a disk."""
        with _target("disk") as target, Nginx(Path(self.published.root), _DELAY_S) as server:
            cases = target.cases(server, self.whole, self.published, self.peers[:1])
            runs = interleaved(cases)
        self._versus(runs, "20 ms, disk", (3.0, 1.4, 1.0))

    def old(self) -> None:
        """This machine's Nix beside the newer one, once."""
        if len(self.peers) < 2:
            return
        with _target("tmpfs") as target, Nginx(Path(self.published.root), _DELAY_S) as server:
            cases = target.cases(server, self.whole, self.published, self.peers[1:])
            runs = interleaved(cases, 1)
        self.notes += beside(runs, "20 ms, tmpfs")

    def memory(self) -> None:
        """Peak memory for three closures: small, whole, one large NAR."""
        closures = {
            "about 100 MB": self.closures["small"],
            "the whole closure": self.whole,
            "one NAR of 2 GB": _closure.single(),
        }
        peaks = {}
        for name, closure in closures.items():
            published = _closure.published(closure)
            with _target("tmpfs") as target, Nginx(Path(published.root), _DELAY_S) as server:
                ours = {"calve": target.cases(server, closure, published, ())["calve"]}
                runs = interleaved(ours, min(3, PAIRS))
            peak = peaks[name] = max(run.peak_mb for run in runs["calve"])
            self.rows.append(Row(f"peak, {name}", peak, "MB", required="<= 48 MB", met=peak <= 48))
            self.notes += beside(runs, f"{name} ({closure.nar_bytes / 1e6:.0f} MB)")
        small, *large = peaks.values()
        growth = max(large) / small
        self.rows.append(
            Row("peak, the two larger / small", growth, "", required="<= 1.25", met=growth <= 1.25)
        )

    def cgroup(self) -> None:
        """A memory cgroup, page cache counted, onto a disk."""
        group = _cgroup(_CGROUP_MB)
        if group is None:
            self.notes.append("SKIPPED memory cgroup: none can be made here")
            return
        within = ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(group)]
        try:
            with _target("disk") as target, Nginx(Path(self.published.root), _DELAY_S) as server:
                argv = target.calve(server, self.whole, self.published)
                env = dict(os.environ)

                def case(prefix: list[str]) -> Callable[[], Run]:
                    return lambda: target.pull(server, self.whole, [*prefix, *argv], env=env)

                limited = case(within)()
                name = f"disk, in a memory cgroup of {_CGROUP_MB} MB"
                if limited.failed:
                    self.notes.append(f"{name}: {limited.failed[:300]}")
                    self.rows.append(Row(name, 0, "s", required="survives", met=False))
                    return
                runs = interleaved({"cgroup": case(within), "free": case([])}, min(3, PAIRS))
        finally:
            group.rmdir()
        row = times(name, runs["free"], runs["cgroup"])
        slower = row.ratio or 0.0
        self.rows.append(
            Row(
                f"{name}, against none",
                median(runs["cgroup"]),
                "s",
                median(runs["free"]),
                slower,
                row.spread,
                "<= 1.30 x",
                slower <= 1.3,
            )
        )
        self.notes += beside(runs, "memory cgroup")

    def kill(self) -> None:
        """kill -9 at random instants, run again: NARs that were asked for twice, and what Nix says of the store."""
        chance = random.Random(11)
        worst, corrupt = 0, 0
        with _target("disk") as target, Nginx(Path(self.published.root), _DELAY_S) as server:
            argv = target.calve(server, self.whole, self.published)
            whole_s = target.pull(server, self.whole, argv, env=dict(os.environ)).wall_s
            for _ in range(min(_KILLS, PAIRS)):
                target.clear()
                target.home.mkdir()
                before = server.requests()
                after_s = chance.uniform(0.1, 0.95) * whole_s
                child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(after_s)
                child.kill()
                child.wait()
                first = _nars(server, before)
                between = server.requests()
                again = measure(argv, dict(os.environ))
                if again.failed:
                    raise SystemExit(f"the second pull failed with {again.failed}")
                twice = first & _nars(server, between)
                self.notes.append(
                    f"killed after {after_s:.1f} s: {len(first)} NARs, {len(twice)} of them again, "
                    f"second pull {again.wall_s:.1f} s"
                )
                worst = max(worst, len(twice))
            if self.peers:
                corrupt = self._verify(target)
        self.rows += [
            Row(
                "kill -9, run again: NARs fetched twice",
                worst,
                "",
                required=f"<= {_JOBS}",
                met=worst <= _JOBS,
            ),
            Row("kill -9, run again: Nix finds fault", corrupt, "", required="0", met=not corrupt),
        ]

    def _verify(self, target: Target) -> int:
        """Have Nix verify the store; return 1 where it finds fault."""
        nix = self.peers[-1]
        argv = nix.argv("nix-store", "--store", f"local?root={target.root}")
        argv += ["--option", "build-users-group", "", "--verify", "--check-contents"]
        run = measure(argv, _nix.environment(target.home))
        if run.failed:
            self.notes.append(f"nix-store --verify: {run.failed[-300:]}")
        return int(bool(run.failed))


def _nars(server: Nginx, start: int) -> set[str]:
    """Return which NARs were asked for, in whole or in part, since so many requests."""
    time.sleep(0.2)  # nginx writes down what was cut off a little later
    asked = {line.split()[1] for line in server.log()[start:]}
    return {path for path in asked if path.startswith("/nar/")}


def _cgroup(limit_mb: int) -> Path | None:
    """Make a memory cgroup of version 1 or 2."""
    for base, name in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        group = Path(base) / f"calve-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit_mb << 20))
        except OSError:
            group.rmdir()
            continue
        with contextlib.suppress(OSError):
            (group / "memory.swap.max").write_text("0")
        return group
    return None


def main() -> None:
    parts = ("latency", "local", "ext4", "old", "memory", "cgroup", "kill")
    named = [word for word in sys.argv[1:] if not word.startswith("-")]
    if unknown := set(named) - set(parts):
        raise SystemExit(f"no such part: {', '.join(sorted(unknown))}")
    bench = Bench()
    bench.notes.append(f"at the beginning: {load()}")
    try:
        for part in named or parts:
            getattr(bench, part)()
    except CalveError as error:
        raise SystemExit(f"{error.message} {error.hint or ''}") from error
    bench.notes.append(f"at the end: {load()}")
    finish(f"pull (wall seconds, peer / ours; {PAIRS} interleaved pairs)", bench.rows, bench.notes)


if __name__ == "__main__":
    main()
