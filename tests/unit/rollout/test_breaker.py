"""The breaker counts launches that failed one after the other."""

import datetime as dt

from calve.aws.autoscaling import Activity
from calve.rollout.breaker import run_of

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def launch(minute, status="Cancelled", said="was abandoned: Heartbeat Timeout", message=None):
    name = f"i-{minute:017x}"
    return Activity(
        str(minute),
        f"Launching a new EC2 instance: {name}.  Status Reason: {said}",
        "",
        status,
        message,
        NOW + dt.timedelta(minutes=minute),
    )


def test_three_in_a_row_trip():
    assert not run_of([launch(1), launch(2)]).trips
    run = run_of([launch(1), launch(3), launch(2)])
    assert run.trips
    assert run.instances[0] == f"i-{3:017x}"


def test_one_that_came_into_service_ends_the_run():
    good = launch(3, "Successful", "")
    assert run_of([launch(1), launch(2), good, launch(4)]).instances == (f"i-{4:017x}",)


def test_want_of_capacity_and_what_is_under_way_do_not_count():
    capacity = Activity(
        "9",
        "Launching a new EC2 instance.  Status Reason: We currently do not have sufficient capacity",
        "",
        "Failed",
        "We currently do not have sufficient t3.nano capacity",
        NOW + dt.timedelta(minutes=9),
    )
    pending = launch(8, "MidLifecycleAction", "")
    assert not run_of([launch(1), launch(2), capacity, pending]).trips
