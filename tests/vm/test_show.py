"""The whole show on the small system: no request fails, the report says what was seen, Ctrl-C leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARK = "CALVE_TEST_MARK"


@pytest.fixture
def place(tmp_path_factory):
    """A working directory that shares .calve, with a home and a temporary directory of its own."""
    folder = tmp_path_factory.mktemp("show")
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    (ROOT / ".calve").mkdir(exist_ok=True)
    (folder / ".calve").symlink_to(ROOT / ".calve")
    return folder


def start(place, *arguments):
    mark = uuid.uuid4().hex
    env = {**os.environ, MARK: mark, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
    child = subprocess.Popen(
        [sys.executable, "-m", "calve", "demo", "--system", "tiny", *arguments],
        cwd=place,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return child, mark


def marked(mark):
    """Return the command lines of all processes that have a mark in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def nothing_is_left(place, mark):
    # A forwarder's end is told to nobody: it ends by itself with its connection.
    end = time.monotonic() + 5
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.1)
    assert marked(mark) == []
    assert sorted(path.name for path in place.iterdir()) == [".calve", "home", "tmp"]
    assert list((place / "tmp").iterdir()) == []
    assert list((place / "home").iterdir()) == []
    assert list((ROOT / ".calve" / "demo").glob("run-*")) == []


def test_a_release_fails_no_request_and_the_report_says_so(place):
    child, mark = start(place, "--json")
    out, err = child.communicate(timeout=400)
    assert child.returncode == 0, err[-3000:]
    report = json.loads(out)
    assert report == json.loads((ROOT / ".calve/demo/report.json").read_text())
    requests = report["requests"]
    assert requests["failed"] == 0
    assert set(requests["by_release"]) == {"1", "2"}
    assert requests["served"] == sum(requests["by_release"].values()) > 100
    assert [(one["release"], one["outcome"]) for one in report["releases"]] == [
        (2, "released"),
        (3, "rolled-back"),
    ]
    assert "system-invalid" in report["releases"][1]["reason"]
    *machines, bad = report["machines"]
    assert (bad["release"], bad["failure"]) == (None, "system-invalid")
    assert [machine["release"] for machine in machines] == [1, 1, 2, 2]
    for machine in machines:
        names = [phase["name"] for phase in machine["phases"]]
        assert names == [
            "kernel", "network", "agent", "imds", "manifest", "pull", "commit", "switch-root", "answer",
        ]  # fmt: skip
        assert all(phase["seconds"] >= 0 for phase in machine["phases"])
        assert machine["agent_peak_mb"] <= 48
        assert machine["lowest_available_mb"] >= 300
    first, second = machines[0], machines[-1]
    # The image has the kernel and the initrd, 25 MB of it.
    assert 500_000 < first["bytes_fetched"] < 5_000_000
    assert second["bytes_fetched"] < 100_000, "the seed was fetched again"
    nothing_is_left(place, mark)


def interrupt(place, after_s, *, twice=False):
    child, mark = start(place)
    try:
        child.wait(after_s)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        if twice:
            time.sleep(0.2)
            child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert "Traceback" not in err, err[-3000:]
    assert child.returncode in {0, 130}
    nothing_is_left(place, mark)


@pytest.mark.parametrize(
    ("after_s", "twice"),
    [(3.0, True), (12.0, False), pytest.param(30.0, True, marks=pytest.mark.full)],
)
def test_ctrl_c_leaves_nothing(place, after_s, twice):
    interrupt(place, after_s, twice=twice)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_ctrl_c_at_30_random_instants_leaves_nothing(place):
    chance = random.Random(20261123)
    for _ in range(30):
        interrupt(place, chance.uniform(0.4, 45.0), twice=chance.random() < 0.3)
