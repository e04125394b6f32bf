"""Every situation that AWS can be found in has its step."""

import datetime as dt

import pytest

from calve.aws.refreshes import Refresh
from calve.fleet.verdict import Outcome, Reason, Verdict
from calve.rollout.steps import (
    Conclude,
    CreateVersion,
    Done,
    Refuse,
    RollBack,
    Situation,
    StartRefresh,
    Watch,
    next_step,
)

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
REASON = Reason("release-fault", "why", (), "cli", NOW)
VERDICT = Verdict("web", 2, Outcome.RELEASED, "r-1", "cli", NOW)


def situation(**changes):
    values = {
        "release": 2,
        "version": 7,
        "live": "6",
        "refresh": None,
        "other": None,
        "reason": None,
        "verdict": None,
        "may_start": True,
    }
    return Situation(**{**values, **changes})


def refresh(status):
    return Refresh("r-1", status, None, 0, 2, NOW, None, "lt-1", "7")


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"version": None}, CreateVersion(6)),
        ({}, StartRefresh(7)),
        ({"verdict": VERDICT}, Done(VERDICT)),
        ({"verdict": VERDICT, "refresh": refresh("InProgress"), "reason": REASON}, Done(VERDICT)),
        ({"refresh": refresh("Pending")}, Watch()),
        ({"refresh": refresh("InProgress")}, Watch()),
        ({"refresh": refresh("Baking")}, Watch()),
        ({"refresh": refresh("Pending"), "reason": REASON}, RollBack(REASON)),
        ({"refresh": refresh("InProgress"), "reason": REASON}, RollBack(REASON)),
        ({"refresh": refresh("Baking"), "reason": REASON}, RollBack(REASON)),
        ({"refresh": refresh("RollbackInProgress"), "reason": REASON}, Watch()),
        ({"refresh": refresh("Cancelling"), "reason": REASON}, Watch()),
        ({"refresh": refresh("Successful"), "reason": REASON}, Conclude(Outcome.RELEASED, None)),
        (
            {"refresh": refresh("RollbackSuccessful"), "reason": REASON},
            Conclude(Outcome.ROLLED_BACK, REASON),
        ),
        ({"refresh": refresh("RollbackFailed")}, Conclude(Outcome.ROLLBACK_FAILED, None)),
        ({"refresh": refresh("Cancelled")}, Conclude(Outcome.CANCELLED, None)),
        ({"refresh": refresh("Failed")}, Conclude(Outcome.FAILED, None)),
    ],
)
def test_steps(changes, step):
    assert next_step(situation(**changes)) == step


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"other": refresh("InProgress")}, "another instance refresh"),
        ({"may_start": False}, "never started"),
        ({"version": None, "live": "$Latest"}, "from $Latest, not from a numbered"),
    ],
)
def test_what_cannot_begin_is_refused_and_says_why(changes, said):
    step = next_step(situation(**changes))
    assert isinstance(step, Refuse)
    assert said in step.message
    assert step.hint
