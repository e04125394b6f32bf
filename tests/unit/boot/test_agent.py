"""The agent's own thread beside the boot: progress, the deadline, the hold; with a clock of its own."""

from __future__ import annotations

import io
import threading

import pytest

from calve.boot import agent as room
from calve.boot.agent import Agent
from calve.boot.console import Console
from calve.boot.grow import Grown
from calve.boot.policy import Policy
from calve.contract import evidence
from calve.contract.userdata import UserData
from calve.errors import CancelledError, DamagedError, DeadlineError, TransientError
from calve.progress import Step
from calve.tasks import Cancel


class Hands:
    """A clock moved by whoever waits on it; it also remembers the waits."""

    def __init__(self):
        self.now_s = 100.0
        self.waits = []
        self.until_s = float("inf")

    def monotonic(self):
        return self.now_s

    def now(self):
        raise NotImplementedError

    def wait(self, event, seconds):
        self.waits.append(seconds)
        self.now_s += seconds
        return event.is_set() or self.now_s >= self.until_s


@pytest.fixture
def hands():
    return Hands()


@pytest.fixture
def out():
    return io.StringIO()


def agent(tmp_path, out, hands, **policy):
    return Agent(
        Policy(("k-1:AAAA",), tmp_path, run=tmp_path / "run", **policy), Console(out), hands
    )


def wanted(deadline_s):
    return UserData(
        f"/nix/store/{'a' * 32}-system",
        ("s3://nix?region=test",),
        "0" * 64,
        ("k-1",),
        "web",
        1,
        deadline_s,
    )


def events(out):
    return list(evidence.read(out.getvalue()))


def test_progress_every_two_seconds_and_only_once_there_is_some(tmp_path, out, hands):
    made = agent(tmp_path, out, hands)
    hands.until_s = 110.0
    made._watch(threading.Event(), Cancel())
    assert events(out) == []
    made._listen(Step("pull", 3, 10))
    hands.until_s = 120.0
    made._watch(threading.Event(), Cancel())
    told = events(out)
    assert 4 <= len(told) <= 5
    assert told[0].kind == "progress"
    assert (told[0].fields["done"], told[0].fields["total"], told[0].fields["n"]) == (3, 10, "imds")
    assert told[0].fields["available_mb"] > 0


def test_the_deadline_cancels(tmp_path, out, hands):
    made = agent(tmp_path, out, hands)
    made._wanted = wanted(5)
    hands.until_s = 200.0
    cancel = Cancel()
    made._watch(threading.Event(), cancel)
    assert cancel.cancelled
    assert 105 < hands.now_s < 106.1


def test_before_user_data_is_known_there_is_no_deadline(tmp_path, out, hands):
    made = agent(tmp_path, out, hands)
    hands.until_s = 10_000.0
    cancel = Cancel()
    made._watch(threading.Event(), cancel)
    assert not cancel.cancelled


@pytest.mark.parametrize(
    ("late", "error", "code"),
    [(True, CancelledError(), "deadline"), (False, TransientError("x"), "imds-unreachable")],
)
def test_a_cancelled_boot_says_why(tmp_path, out, hands, monkeypatch, late, error, code):
    made = agent(tmp_path, out, hands, hold_s=7.0)

    def work(_group, _done):
        made._wanted = wanted(1) if late else None
        made._phase = "pull" if late else "imds"
        hands.now_s += 50
        raise error

    monkeypatch.setattr(made, "_work", work)
    monkeypatch.setattr(made, "_watch", lambda *_: None)
    assert made.run() == 1
    assert events(out)[-1].fields["code"] == code
    # The line first, then the hold, so that somebody can read it.
    assert hands.waits == [7.0]


def test_an_unknown_error_leaves_its_traceback_ahead_of_the_line(tmp_path, out, hands, monkeypatch):
    made = agent(tmp_path, out, hands, hold_s=0)
    monkeypatch.setattr(made, "_boot", lambda: {}["bug"])
    assert made.run() == 1
    text = out.getvalue()
    assert "Traceback" in text
    assert text.splitlines()[-1].startswith("@@calve")
    assert events(out)[-1].fields["code"] == "internal"


def test_a_known_error_leaves_no_traceback(tmp_path, out, hands, monkeypatch):
    made = agent(tmp_path, out, hands, hold_s=0)

    def work(_group, _done):
        raise DeadlineError("late")

    monkeypatch.setattr(made, "_work", work)
    assert made.run() == 1
    assert "Traceback" not in out.getvalue()


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (None, []),
        (Grown(268_435_456, 8 << 30), [{"before_mb": 268.4, "after_mb": 8589.9}]),
        (DamagedError("no GPT header", place="/dev/vda"), [{"message": "/dev/vda: no GPT header"}]),
        (OSError(5, "Input/output error"), [{"message": "[Errno 5] Input/output error"}]),
    ],
)
def test_a_disk_that_does_not_grow_is_told_and_does_not_end_the_boot(
    tmp_path, out, hands, monkeypatch, outcome, told
):
    def grow(root):
        assert root == tmp_path
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(room, "grow", grow)
    agent(tmp_path, out, hands)._grow()
    assert [event.fields for event in events(out)] == told
    assert all(event.kind == "grown" for event in events(out))
