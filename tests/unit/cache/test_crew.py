from __future__ import annotations

import threading

import pytest

from calve.cache.crew import Crew
from calve.errors import CancelledError, DamagedError
from calve.tasks import Cancel


def test_results_come_to_the_owner_who_may_add_more() -> None:
    seen = []
    with Crew[int]("crew", jobs=3) as crew:
        crew.add(lambda _cancel: 5)
        for number in crew:
            seen.append(number)
            if number:
                crew.add(lambda _cancel, number=number: number - 1)
                crew.add(lambda _cancel: 0)
    assert sorted(seen) == [0] * 6 + [1, 2, 3, 4, 5]


def test_no_tasks_no_threads() -> None:
    before = threading.active_count()
    with Crew[int]("crew", jobs=3) as crew:
        assert list(crew) == []
        assert threading.active_count() == before


def test_no_more_threads_than_jobs_nor_than_tasks() -> None:
    most = 0
    lock = threading.Lock()
    active = 0
    gate = threading.Barrier(3)

    def task(_cancel: Cancel) -> str:
        nonlocal most, active
        with lock:
            active += 1
            most = max(most, active)
        gate.wait(10)
        with lock:
            active -= 1
        return threading.current_thread().name

    with Crew[str]("crew", jobs=3) as crew:
        for _ in range(9):
            crew.add(task)
        names = set(crew)
    assert most == 3
    assert len(names) == 3


def test_urgent_tasks_come_first() -> None:
    hold = threading.Event()
    done: list[str] = []

    def first(_cancel: Cancel) -> str:
        hold.wait(10)
        return "first"

    with Crew[str]("crew", jobs=1) as crew:
        crew.add(first)
        crew.add(lambda _cancel: "late")
        crew.add(lambda _cancel: "urgent", urgent=True)
        hold.set()
        done = list(crew)
    assert done.index("urgent") < done.index("late")


def test_the_first_error_stops_the_others_and_is_raised() -> None:
    def waits(cancel: Cancel) -> None:
        cancel.wait(60)

    def fails(_cancel: Cancel) -> None:
        raise DamagedError("broken")

    with pytest.raises(DamagedError, match="broken"), Crew[None]("crew", jobs=2) as crew:
        crew.add(waits)
        crew.add(fails)
        for _ in range(100):
            crew.add(waits)
        list(crew)
    assert not [each for each in threading.enumerate() if each.name.startswith("crew")]


def test_the_owners_error_stops_the_crew() -> None:
    with pytest.raises(ValueError, match="mine"), Crew[int]("crew", jobs=2) as crew:
        crew.add(lambda _cancel: 1)
        crew.add(lambda cancel: cancel.wait(60))
        for _ in crew:
            raise ValueError("mine")
    assert not [each for each in threading.enumerate() if each.name.startswith("crew")]


def test_cancelling_the_parent_stops_the_crew() -> None:
    parent = Cancel()
    with pytest.raises(CancelledError), Crew[None]("crew", jobs=2, cancel=parent) as crew:
        crew.add(lambda cancel: cancel.wait(60))
        parent.cancel()
        list(crew)
