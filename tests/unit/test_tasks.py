"""Groups: bounded, the first error cancels and is raised, everything is joined."""

import threading
import time

import pytest

from calve.errors import CalveError, CancelledError
from calve.tasks import Budget, Cancel, Group


def test_the_first_error_cancels_the_rest_and_is_raised():
    ended = []

    def wait(group):
        try:
            group.cancel.wait(30)
        finally:
            ended.append(1)

    def fail():
        raise CalveError("broken")

    with pytest.raises(CalveError, match="broken"), Group("t", limit=3) as group:
        group.spawn(wait, group)
        group.spawn(wait, group)
        group.spawn(fail)
    assert ended == [1, 1]


def test_no_more_than_the_limit_run_at_once():
    running, most = [0], [0]
    lock = threading.Lock()

    def work():
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    with Group("t", limit=2) as group:
        for _ in range(8):
            group.spawn(work)
    assert most == [2]


def test_an_error_of_the_block_wins_and_ends_the_threads():
    with pytest.raises(KeyError), Group("t", limit=2) as group:
        group.spawn(group.cancel.wait, 30)
        raise KeyError
    assert threading.active_count() == 1


def test_cancelling_the_parent_reaches_the_children():
    root = Cancel()
    with pytest.raises(CancelledError), Group("t", limit=1, parent=root) as group:
        group.spawn(group.cancel.wait, 30)
        root.cancel()


def test_a_child_is_let_go_of():
    root = Cancel()
    for _ in range(3):
        with Group("t", limit=1, parent=root):
            pass
    assert not root._hooks


def test_a_hook_set_too_late_runs_at_once():
    root, called = Cancel(), []
    root.cancel()
    root.on_cancel(lambda: called.append(1))
    assert called == [1]


def test_spawning_into_a_cancelled_group_is_refused():
    with pytest.raises(CancelledError), Group("t", limit=1) as group:
        group.cancel.cancel()
        group.spawn(lambda: None)


def test_a_budget_is_shared_in_order_and_what_is_too_large_gets_all_of_it() -> None:
    budget = Budget(10)
    cancel = Cancel()
    order: list[str] = []
    first = threading.Event()

    def hold(name: str, amount: int) -> None:
        with budget.held(amount, cancel):
            order.append(name)
            if name == "large":
                first.set()

    with budget.held(6, cancel):
        with budget.held(4, cancel):
            pass
        large = threading.Thread(target=hold, args=("large", 99))
        large.start()
        while not budget._queue:
            pass
        small = threading.Thread(target=hold, args=("small", 1))
        small.start()
        while len(budget._queue) < 2:
            pass
        assert order == []  # there is room for the small one, but it came later
    large.join()
    small.join()
    assert order == ["large", "small"]
    with budget.held(10, cancel):
        cancel.cancel()
        with pytest.raises(CancelledError), budget.held(1, cancel):
            pass
    with budget.held(10, Cancel()):
        pass
