"""Rollouts: how soon a bad release is taken back, against AWS alone; what a killed operator leaves; a demo's requests.

    python -m benchmarks.rollout [--json] [--part verdict] [--part killed] [--part thousand] [--part demo]

All but the demo run on the virtual clock: the region, its HTTP and the operator are real, machines are scripts that
boot in 20 s. AWS alone is the same region with auto rollback and nobody to judge.
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
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks._rows import Row, at_most, finish, load
from calve.aws.refreshes import ACTIVE
from calve.demo.virtual import NAME, VirtualFleet, Wanted, endpoint
from calve.fleet.config import Rollout as Bounds
from calve.fleet.verdict import Outcome
from calve.region.group import Rules as RegionRules
from calve.region.refresh import Preferences
from calve.region.rehearsal import Plan, simulate
from calve.region.scripts import fails, good
from calve.rollout.guard import Guard
from calve.rollout.run import POLL_S
from calve.tasks import Cancel

MACHINES = 20
BOOT_S, FAILS_S = 20.0, 12.0
CONSOLE_LAG_S, REPORT_LAG_S = 30.0, 1.0
_ROOT = Path(__file__).resolve().parent.parent
_CAPACITY = (
    "We currently do not have sufficient t3.nano capacity in the Availability Zone you requested"
)


@contextlib.contextmanager
def fleet(work: Path) -> Iterator[VirtualFleet]:
    """Make a fleet of 20 whose next release fails, with lags, throttled APIs and a launch that is refused."""
    wanted = Wanted(
        size=(MACHINES, MACHINES, 2 * MACHINES),
        console_lag_s=CONSOLE_LAG_S,
        report_lag_s=REPORT_LAG_S,
        throttled=True,
        region_rules=RegionRules(launch_parallelism=None),
    )
    with (
        tempfile.TemporaryDirectory(dir=work) as name,
        endpoint() as served,
        VirtualFleet(Path(name), served, wanted) as made,
    ):
        made.fleet = made.fleet.__class__(
            made.fleet.name,
            made.fleet.system,
            made.fleet.delivery,
            made.fleet.group,
            made.fleet.health,
            Bounds(100, 125, 0),
        )
        made.scripts[2] = lambda _launch: fails("signature", "no signature", FAILS_S)
        made.cloud.refuse(1, _CAPACITY)
        yield made


class Watched:
    """Times what becomes of release 2 of a fleet, epoch seconds of its clock."""

    def __init__(self, made: VirtualFleet) -> None:
        self._made = made
        self.back_at: float | None = None
        self.least = MACHINES
        self._undo = made.clock.drive(self._look)

    def _look(self) -> None:
        made = self._made
        self.least = min(self.least, made.serving())
        group = made.cloud.autoscaling.groups[NAME]
        old = [one for one in group.instances.values() if one.spec.version == "1"]
        whole = len(old) == len(group.instances) == MACHINES == made.serving()
        ended = bool(group.refreshes) and group.refreshes[-1].status.value not in ACTIVE
        if self.back_at is None and whole and ended:
            self.back_at = made.clock.monotonic()

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


class Bench:
    """All parts, and what they found."""

    def __init__(self, work: Path) -> None:
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._work = work

    def verdict(self) -> None:
        """A bad release on 20 machines: with the CLI, with a guard alone, with AWS alone."""
        with fleet(self._work) as made:
            watched = Watched(made)
            outcome = made.rollout(made.release(2)).run()
            assert outcome is not None and outcome.outcome is Outcome.ROLLED_BACK  # noqa: PT018
            made.until(lambda: watched.back_at is not None)
            cli = (watched.readable_at, watched.called_at, watched.back_at or 0.0, watched.least)
        with fleet(self._work) as made:
            watched = Watched(made)
            made.rollout(made.release(2)).run(detach=True)
            guard, cancel = Guard(made.fleet, made.gateways, made.host), Cancel()
            while guard.round():
                cancel.wait(POLL_S, made.clock)
            made.until(lambda: watched.back_at is not None)
            alone = (watched.readable_at, watched.called_at, watched.back_at or 0.0)
        with fleet(self._work) as made:
            half = itertools.count()
            made.scripts[2] = lambda _launch: (
                good(BOOT_S) if next(half) < MACHINES / 2 else fails("signature", "no", FAILS_S)
            )
            watched = Watched(made)
            made.rollout(made.release(2)).run()
            made.until(lambda: watched.back_at is not None)
            late_s = (watched.back_at or 0.0) - watched.called_at
        with fleet(self._work) as made:
            watched = Watched(made)
            made.rollout(made.release(2)).run(detach=True)
            made.until(lambda: watched.back_at is not None, within_s=4 * 3600)
            aws_s = (watched.back_at or 0.0) - watched.readable_at
        for name, (readable, called, back, *_) in (("the CLI", cli), ("a guard alone", alone)):
            rounds = math.ceil((called - readable) / POLL_S)
            self.rows.append(at_most(f"{name}: readable to rollback", rounds, "round", 2))
            row = at_most(f"{name}: readable to all 20 old and well", back - readable, "s", 90)
            row.peer, row.ratio = aws_s, aws_s / (back - readable)
            self.rows.append(row)
        self.rows.append(
            at_most("bad after half were replaced: rollback to all old", late_s, "s", 90)
        )
        self.rows.append(
            at_most("machines fewer than the minimum, at worst", MACHINES - cli[3], "", 0)
        )
        self.notes.append(
            f"virtual seconds; peer is AWS alone, auto rollback on; a round is {POLL_S:.0f} s; console lag "
            f"{CONSOLE_LAG_S:.0f} s, report lag {REPORT_LAG_S:.0f} s, throttled, one launch refused"
        )

    def killed(self) -> None:
        """The operator is killed before and after every call; see the test, which this runs."""
        argv = [sys.executable, "-m", "pytest", "-q", "tests/region/rollout/test_killed.py"]
        began = time.monotonic()
        ended = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True, check=False)
        self.rows.append(at_most("killed operator: violations", int(ended.returncode != 0), "", 0))
        self.notes.append(
            f"killed: {time.monotonic() - began:.0f} s: {ended.stdout.splitlines()[-1]}"
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

    def demo(self) -> None:
        """The demo's requests: one release that goes well, two bad ones, a rollback, 50 requests a second."""
        argv = [sys.executable, "-m", "calve", "demo", "--json"]
        ended = subprocess.run(argv, cwd=_ROOT, stdout=subprocess.PIPE, text=True, check=False)
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
    parts = ["verdict", "killed", "thousand", "demo"]
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
