"""Rollouts: how soon a bad release is taken back, against AWS alone; what a killed operator leaves; a demo's requests.

    python -m benchmarks.rollout [--json] [--part verdict|killed|thousand|processes|demo]...

Parts verdict, killed and thousand run on the virtual clock: the region, its HTTP and the operator are real, machines
are scripts that boot in 20 s. AWS alone is the same region with auto rollback and nobody to judge. Part processes has
the real agent, in real time.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import itertools
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks._fleet import CONSOLE_LAG_S as REAL_LAG_S
from benchmarks._fleet import LOOK_S, Agents, room, until
from benchmarks._rows import Row, at_most, finish, load
from calve.aws.refreshes import ACTIVE
from calve.clock import SystemClock
from calve.demo.virtual import NAME, VirtualFleet, Wanted, endpoint
from calve.errors import CalveError
from calve.fleet.config import Rollout as Bounds
from calve.fleet.verdict import Outcome, Verdict
from calve.region.refresh import Preferences
from calve.region.rehearsal import Plan, simulate
from calve.region.scripts import fails, good
from calve.rollout.guard import Guard
from calve.rollout.run import POLL_S, Host
from calve.tasks import Cancel, Group

MACHINES = 20
BOOT_S, FAILS_S = 20.0, 12.0
CONSOLE_LAG_S, REPORT_LAG_S = 30.0, 1.0
_ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def fleet(work: Path) -> Iterator[VirtualFleet]:
    """Make a fleet of 20 whose next release fails, with lags, throttled APIs and a launch that is refused."""
    wanted = Wanted(
        size=(MACHINES, MACHINES, 2 * MACHINES),
        console_lag_s=CONSOLE_LAG_S,
        report_lag_s=REPORT_LAG_S,
        throttled=True,
    )
    with (
        tempfile.TemporaryDirectory(dir=work) as name,
        endpoint() as served,
        VirtualFleet(Path(name), served, wanted) as made,
    ):
        made.fleet = replace(made.fleet, rollout=Bounds(100, 125, 0))
        made.scripts[2] = lambda _launch: fails("signature", "no signature", FAILS_S)
        made.cloud.refuse(1)
        yield made


class Watched:
    """Times what becomes of release 2 of a fleet, epoch seconds of its clock."""

    def __init__(self, made: VirtualFleet) -> None:
        self._made = made
        self.back_at: float | None = None
        self.least = MACHINES
        made.clock.drive(self._look)

    def _look(self) -> None:
        made = self._made
        self.least = min(self.least, made.serving())
        group = made.cloud.autoscaling.groups[NAME]
        old = [one for one in group.instances.values() if one.spec.version == "1"]
        whole = len(old) == len(group.instances) == MACHINES == made.serving()
        ended = bool(group.refreshes) and group.refreshes[-1].status.value not in ACTIVE
        if self.back_at is None and whole and ended:
            self.back_at = made.clock.monotonic()

    def wait(self) -> Self:
        """Let time pass until the fleet is whole, old and well, at most four hours."""
        self._made.until(lambda: self.back_at is not None, within_s=4 * 3600)
        return self

    @property
    def back_s(self) -> float:
        """Return how long after its failure could be read the fleet was back."""
        return (self.back_at or 0.0) - self.readable_at

    @property
    def readable_at(self) -> float:
        """Return when the first failure could be read: its report, 1 s after it was written."""
        made = self._made
        launched = min(
            one.launched_at
            for one in made.cloud.ec2.instances.values()
            if one.tags.get("aws:ec2launchtemplate:version") == "2"
        )
        return launched + FAILS_S + REPORT_LAG_S

    @property
    def called_at(self) -> float:
        """Return when the rollback was called."""
        (told,) = self._made.said("rollback")
        return dt.datetime.fromisoformat(str(told.fields["at"])).timestamp()


class Paced(SystemClock):
    """Notes what an operator of real agents asked in each round: calls to AWS, and GETs to S3."""

    def __init__(self, made: Agents) -> None:
        self._made = made
        self._before = len(made.asked), made.gets
        self.rounds: list[tuple[int, int]] = []

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if seconds == POLL_S:
            self.note()
        return super().wait(event, seconds)

    def note(self) -> None:
        """End a round."""
        now = len(self._made.asked), self._made.gets
        self.rounds.append((now[0] - self._before[0], now[1] - self._before[1]))
        self._before = now


class Seen:
    """Sees real agents and their group as no operator can, without lag or request, while the block lasts.

    Attributes:
        failed_at: when the first machine of a new release had its failure's line on its console; monotonic seconds.
        back_at: when the same machines as before were the whole group, in service and healthy, the refresh ended.
        least: how many machines were healthy at the fewest.
    """

    def __init__(self, made: Agents) -> None:
        self._made = made
        self._thread, self._over = Group("seen", limit=1), Cancel()
        self._asked = len(made.asked)
        self._old, self._earlier = set(made.serving()), set(made.newer())
        self.failed_at: float | None = None
        self.back_at: float | None = None
        self.least = len(self._old)

    def __enter__(self) -> Self:
        self._thread.__enter__()
        self._thread.spawn(self._look)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.cancel()
        self._thread.__exit__(kind, error, trace)

    def _look(self) -> None:
        made = self._made
        while not self._over.cancelled:
            self.least = min(self.least, len(made.serving()))
            if self.failed_at is None:
                mine = [one for one in made.newer() if one not in self._earlier]
                if any(map(made.failure, mine)):
                    self.failed_at = time.monotonic()
            elif self.back_at is None and made.is_settled(self._old):
                self.back_at = time.monotonic()
            time.sleep(LOOK_S)

    def times(self) -> tuple[float, float]:
        """Wait until all are back; return seconds from the failure's line to the rollback's request, and to that."""
        until(lambda: self.back_at is not None, "the fleet to be old and well again")
        asked = self._made.asked[self._asked :]
        called_at = next(at for at, action in asked if action == "RollbackInstanceRefresh")
        failed_at = self.failed_at or 0.0
        return called_at - failed_at, (self.back_at or 0.0) - failed_at


class Bench:
    """All parts, and what they found."""

    def __init__(self, work: Path) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._work = work

    def verdict(self) -> None:
        """A bad release on 20 machines: with the CLI, with a guard alone, with AWS alone."""

        def judged(made: VirtualFleet) -> None:
            verdict = made.rollout(made.release(2)).run()
            assert verdict is not None and verdict.outcome is Outcome.ROLLED_BACK  # noqa: PT018

        def guarded(made: VirtualFleet) -> None:
            made.rollout(made.release(2)).run(detach=True)
            Guard(made.fleet, made.gateways, made.host).run(once=True)

        def late(made: VirtualFleet) -> None:
            half = itertools.count()
            made.scripts[2] = lambda _launch: (
                good(BOOT_S) if next(half) < MACHINES / 2 else fails("signature", "no", FAILS_S)
            )
            judged(made)

        def left(made: VirtualFleet) -> None:
            made.rollout(made.release(2)).run(detach=True)

        cli, alone, half, aws = map(self._watched, (judged, guarded, late, left))
        for name, seen in (("the CLI", cli), ("a guard alone", alone)):
            rounds = math.ceil((seen.called_at - seen.readable_at) / POLL_S)
            self.rows.append(at_most(f"{name}: readable to rollback", rounds, "round", 2))
            row = at_most(f"{name}: readable to all 20 old and well", seen.back_s, "s", 90)
            row.peer, row.ratio = aws.back_s, aws.back_s / seen.back_s
            self.rows.append(row)
        late_s = (half.back_at or 0.0) - half.called_at
        self.rows.append(
            at_most("bad after half were replaced: rollback to all old", late_s, "s", 90)
        )
        least = min(one.least for one in (cli, alone, half, aws))
        self.rows.append(
            at_most("machines fewer than the minimum, at worst", MACHINES - least, "", 0)
        )
        self.notes.append(
            f"virtual seconds; peer is AWS alone, auto rollback on; a round is {POLL_S:.0f} s; console lag "
            f"{CONSOLE_LAG_S:.0f} s, report lag {REPORT_LAG_S:.0f} s, throttled, one launch refused"
        )

    def _watched(self, act: Callable[[VirtualFleet], None]) -> Watched:
        with fleet(self._work) as made:
            watched = Watched(made)
            act(made)
            return watched.wait()

    def killed(self) -> None:
        """The operator is killed before and after every call; see the test, which this runs."""
        argv = [sys.executable, "-m", "pytest", "-q", "tests/region/rollout/test_killed.py"]
        began = time.monotonic()
        ended = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, check=False)
        self.rows.append(at_most("killed operator: violations", int(ended.returncode != 0), "", 0))
        self.notes.append(
            f"killed: {time.monotonic() - began:.0f} s: {(ended.stdout.splitlines() or ['nothing said'])[-1]}"
        )

    def thousand(self) -> None:
        """A release over 1,000 machines, good and bad."""
        for name, script in (
            ("good", good(40.0)),
            ("never healthy", fails("unhealthy", "500", 100.0)),
        ):
            began = time.monotonic()
            told = simulate(
                Plan(1000, Preferences(100, 110, auto_rollback=name != "good"), most_s=7200.0),
                lambda _launch, script=script: script,
            )
            took_s = time.monotonic() - began
            self.rows.append(at_most(f"1,000 machines, {name}: real time", took_s, "s", 10))
            self.notes.append(
                f"1,000 machines, {name}: {told.refresh.status.value} after {told.samples[-1].at_s:.0f} virtual s, "
                f"{len(told.samples)} samples"
            )

    def processes(self) -> None:
        """The real agent on 20 machines, a closure that lost a path: with the CLI, with a guard once that was killed."""
        began = time.monotonic()
        with (
            tempfile.TemporaryDirectory(dir=room() or self._work, prefix="calve-fleet-") as name,
            Agents(Path(name), MACHINES) as made,
        ):
            self.notes.append(
                f"real agents: {MACHINES} in service after {time.monotonic() - began:.0f} s; real seconds, console "
                f"lag {REAL_LAG_S:.0f} s, a round is {POLL_S:.0f} s"
            )
            closure = made.bad(2)
            with Seen(made) as seen:
                clock = Paced(made)
                verdict = made.operator.deploy(closure, made.gateways, Host(clock=clock))
                self._real("agents, CLI", seen, verdict, clock)
            closure = made.bad(3)
            with Seen(made) as seen:
                made.deploy_and_die(closure)
                clock = Paced(made)
                verdict = made.guard(Host(by="guard", clock=clock))
                self._real("agents, guard", seen, verdict, clock)

    def _real(self, who: str, seen: Seen, verdict: Verdict, clock: Paced) -> None:
        clock.note()
        called_s, back_s = seen.times()
        reason = verdict.reason
        assert verdict.outcome is Outcome.ROLLED_BACK
        assert reason is not None and reason.failures[0].code == "closure-incomplete"  # noqa: PT018
        self.rows += [
            at_most(f"{who}: failure line to rollback", called_s, "s", 2 * POLL_S),
            at_most(f"{who}: failure line to all old, well", back_s, "s", 90),
            at_most(f"{who}: fewer than the minimum, at worst", MACHINES - seen.least, "", 0),
        ]
        rounds = ", ".join(f"{aws} and {gets}" for aws, gets in clock.rounds)
        self.notes.append(f"{who}: calls to AWS and GETs to S3, by round: {rounds}")

    def demo(self) -> None:
        """The demo's requests: one release that goes well, two bad ones, a rollback, 50 requests a second."""
        argv = [sys.executable, "-m", "calve", "demo", "--json"]
        ended = subprocess.run(argv, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if ended.returncode:
            raise CalveError(f"the demo ended with status {ended.returncode}")
        report = json.loads(ended.stdout)
        requests = report["requests"]
        self.rows.append(at_most("demo: failed requests", requests["failed"], "", 0))
        self.rows.append(at_most("demo: the whole", report["seconds"], "s", 720))
        self.notes.append(
            f"demo: {requests['served']} served, slowest {requests['slowest_s']:.2f} s; "
            + ", ".join(
                f"release {one['release']} {one['outcome']} in {one['seconds']:.0f} s"
                for one in report["releases"]
            )
        )


def main() -> None:
    """Run the parts that are named, or all."""
    parts = ["verdict", "killed", "thousand", "processes", "demo"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", action="append", choices=parts)
    chosen = parser.parse_args().part or parts
    before = load()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work))
        for part in chosen:
            getattr(bench, part)()
    finish("rollout", bench.rows, [f"at the beginning: {before}", *bench.notes])


if __name__ == "__main__":
    main()
