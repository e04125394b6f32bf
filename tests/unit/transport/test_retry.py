from __future__ import annotations

import pytest

from calve.errors import CancelledError, DeadlineError, NotFoundError, TransientError
from calve.tasks import Cancel
from calve.transport.retry import Policy, delay, retry


class Flaky:
    def __init__(self, failures, **fields):
        self.calls = 0
        self.failures = failures
        self.fields = fields

    def __call__(self):
        self.calls += 1
        if self.calls <= self.failures:
            raise TransientError("busy", place="here", hint="wait", **self.fields)
        return self.calls


@pytest.mark.parametrize(
    ("attempt", "random", "expected"),
    [(1, 1, 0.1), (2, 1, 0.2), (4, 1, 0.8), (4, 0.5, 0.4), (8, 1, 10), (10**6, 1, 10), (3, 0, 0)],
)
def test_delay(attempt, random, expected):
    assert delay(Policy(), attempt, random) == pytest.approx(expected)


def test_success_after_failures(clock):
    seen = []
    result = retry(
        Flaky(3),
        clock=clock,
        rng=lambda: 1.0,
        on_retry=lambda attempt, pause, error: seen.append((attempt, pause, error.message)),
    )
    assert result == 4
    assert clock.waits == pytest.approx([0.1, 0.2, 0.4])
    assert seen == [(1, 0.1, "busy"), (2, 0.2, "busy"), (3, 0.4, "busy")]


def test_attempts_are_used_up(clock):
    work = Flaky(99)
    with pytest.raises(TransientError, match=r"busy \(after 5 attempts\)") as error:
        retry(work, Policy(attempts=5), clock=clock)
    assert (work.calls, len(clock.waits)) == (5, 4)
    assert (error.value.place, error.value.hint) == ("here", "wait")


def test_one_attempt_leaves_the_error_as_it_is(clock):
    with pytest.raises(TransientError, match=r"busy$"):
        retry(Flaky(9), Policy(attempts=1), clock=clock)


def test_the_deadline(clock):
    work = Flaky(99)
    policy = Policy(attempts=None, base_s=1, cap_s=4, deadline_s=10)
    with pytest.raises(DeadlineError, match=r"busy \(gave up after 4 attempts in 7 s\)") as error:
        retry(work, policy, clock=clock, rng=lambda: 1.0)
    assert clock.waits == [1, 2, 4]
    assert (error.value.place, error.value.hint) == ("here", "wait")


def test_the_server_says_how_long(clock):
    assert retry(Flaky(2, retry_after_s=7), clock=clock) == 3
    assert clock.waits == [7, 7]


def test_the_server_says_too_long(clock):
    with pytest.raises(DeadlineError):
        retry(Flaky(2, retry_after_s=3600), clock=clock)
    assert clock.waits == []


def test_other_errors_pass(clock):
    calls = []

    def work():
        calls.append(1)
        raise NotFoundError("gone")

    with pytest.raises(NotFoundError, match=r"^gone$"):
        retry(work, clock=clock)
    assert len(calls) == 1


def test_cancel_ends_the_wait(clock):
    cancel = Cancel()
    work = Flaky(9)
    with pytest.raises(CancelledError):
        retry(work, cancel=cancel, clock=clock, on_retry=lambda *_: cancel.cancel())
    assert work.calls == 1
    with pytest.raises(CancelledError):
        retry(work, cancel=cancel, clock=clock)
    assert work.calls == 1
