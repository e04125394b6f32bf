"""The schedule, by (state, now): a clock that is a number, and answers in any order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.errors import DeadlineError, NotFoundError, RefusedError, TransientError
from calve.image.schedule import Fault, Limits, Schedule

BUSY = TransientError("busy", place="there", hint="wait")


class Course:
    """A schedule, its clock, and when each request was sent."""

    def __init__(self, count, *, rng=lambda: 1.0, now_s=1000.0, **limits):
        self.now_s = now_s
        self.schedule = Schedule(range(count), now_s, Limits(**limits), rng=rng)
        self.flights = []

    def send(self):
        """Send all that may go now; return their indices."""
        sent = []
        while type(step := self.schedule.next(self.now_s)) is int:
            self.flights.append((step, self.now_s))
            sent.append(step)
        self.last = step
        return sent

    def land(self, index):
        """Take the oldest request of a block out of the air; return when it was sent."""
        found = next(flight for flight in self.flights if flight[0] == index)
        self.flights.remove(found)
        return found[1]

    def good(self, index):
        return self.schedule.succeeded(index, self.land(index), self.now_s)

    def bad(self, index, fault=Fault.PASSING, error=BUSY):
        self.schedule.failed(index, self.land(index), self.now_s, fault, error)


# What may be in flight


def test_blocks_go_in_their_order_and_no_more_than_may_be_in_flight():
    course = Course(5, begin=2, most=2)
    assert course.send() == [0, 1]
    assert course.last == 1.0  # a wait: one of them will be answered
    assert course.good(1)
    assert course.send() == [2]
    assert (course.schedule.done, course.schedule.left) == (1, 4)


def test_it_ends():
    course = Course(2)
    assert course.send() == [0, 1]
    course.good(0)
    course.good(1)
    assert course.schedule.next(course.now_s) is None
    assert (course.schedule.done, course.schedule.again, course.schedule.left) == (2, 0, 0)


def test_nothing_to_send_is_an_end():
    assert Course(0).schedule.next(0.0) is None


def test_each_success_lets_one_more_be_in_flight():
    course = Course(100, begin=4, most=6)
    for allowed in (5, 6, 6):
        course.send()
        course.good(course.flights[0][0])
        assert course.schedule.allowed == allowed
    course.send()
    assert len(course.flights) == 6


def test_after_a_throttling_it_grows_by_one_for_a_round():
    course = Course(100, begin=8, least=1, most=6)
    course.send()
    course.bad(0, Fault.THROTTLED)
    assert course.schedule.allowed == 4
    for index in range(1, 5):
        course.good(index)
        assert course.schedule.allowed == 4
    course.good(5)
    assert course.schedule.allowed == 5
    for index in (6, 7):
        course.good(index)
    for _ in range(20):
        course.send()
        course.good(course.flights[0][0])
    assert course.schedule.allowed == 6


def test_throttling_halves_it_once_a_second_and_not_below_the_least():
    course = Course(100, begin=16, least=4)
    course.send()
    for index in range(4):
        course.bad(index, Fault.THROTTLED)
    assert course.schedule.allowed == 8  # all four are of one burst
    course.now_s += 0.99
    course.bad(4, Fault.THROTTLED)
    assert course.schedule.allowed == 8
    course.now_s += 0.01
    course.bad(5, Fault.THROTTLED)
    assert course.schedule.allowed == 4
    course.now_s += 1
    course.bad(6, Fault.THROTTLED)
    assert course.schedule.allowed == 4
    assert len(course.flights) == 9
    assert course.send() == []  # until less than four are left


def test_other_faults_do_not_lower_it():
    course = Course(8, begin=8)
    course.send()
    course.bad(0)
    course.bad(1, Fault.UNKNOWN)
    assert course.schedule.allowed == 8


def test_the_throttling_of_a_block_that_is_done_lowers_it_too():
    course = Course(1, begin=8)
    course.send()
    course.now_s += 100
    assert course.send() == [0]
    course.good(0)
    course.bad(0, Fault.THROTTLED)
    assert course.schedule.allowed == 4


# Again


@pytest.mark.parametrize(
    ("fault", "waits_s"),
    [(Fault.PASSING, [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]), (Fault.UNKNOWN, [1.0, 2.0, 4.0, 4.0])],
)
def test_what_failed_is_sent_again_later_and_later(fault, waits_s):
    course = Course(1)
    seen = []
    assert course.send() == [0]
    for _ in waits_s:
        course.bad(0, fault)
        assert course.send() == []
        seen.append(course.last)
        course.now_s += course.last
        assert course.send() == [0]
    assert seen == pytest.approx(waits_s)
    assert course.schedule.again == len(waits_s)
    course.good(0)
    assert course.schedule.next(course.now_s) is None


def test_the_wait_has_jitter():
    course = Course(1, rng=lambda: 0.25)
    course.send()
    course.bad(0)
    course.send()
    assert course.last == pytest.approx(0.05)


def test_what_is_due_again_goes_behind_what_was_not_sent_yet():
    course = Course(4, begin=2, most=2)
    assert course.send() == [0, 1]
    course.bad(0)
    course.good(1)
    course.now_s += 10
    assert course.send() == [2, 3]
    course.good(2)
    assert course.send() == [0]


def test_a_block_of_another_is_sent_while_one_waits():
    course = Course(3, begin=1)
    assert course.send() == [0]
    course.bad(0)
    assert course.send() == [1]


@pytest.mark.parametrize(("spent_s", "over"), [(120.0, False), (120.1, True)])
def test_the_time_of_a_block_is_over(spent_s, over):
    course = Course(2, begin=1)
    course.send()
    course.good(0)
    course.now_s += 500  # what it waited for its turn does not count
    assert course.send() == [1]
    course.now_s += spent_s
    if not over:
        course.bad(1)
        return
    with pytest.raises(DeadlineError, match=r"block 1 could not be sent within 120 s: busy") as one:
        course.bad(1)
    assert (one.value.place, one.value.hint) == ("there", "wait")


def test_an_unknown_snapshot_is_believed_in_for_a_while():
    gone = NotFoundError("no such snapshot")
    course = Course(3, unknown_s=50)
    course.send()
    course.now_s += 50
    course.bad(0, Fault.UNKNOWN, gone)
    course.now_s += 0.1
    with pytest.raises(NotFoundError) as caught:
        course.bad(1, Fault.UNKNOWN, gone)
    assert caught.value is gone


def test_what_is_final_is_raised_at_once():
    course = Course(2)
    course.send()
    refused = RefusedError("no")
    with pytest.raises(RefusedError) as caught:
        course.bad(0, Fault.FINAL, refused)
    assert caught.value is refused


# A second request for the slowest


def test_the_slowest_is_sent_a_second_time():
    course = Course(4)
    course.send()
    course.now_s += 2
    course.good(1)  # took 2 s
    assert course.send() == []
    assert course.last == pytest.approx(4.0)
    course.now_s += 4
    assert course.send() == [0, 2, 3]
    assert course.last == 1.0
    course.now_s += 100
    assert course.send() == []  # but no third time
    assert course.schedule.again == 3
    assert course.good(0)
    assert not course.good(0)  # the other answer
    assert (course.schedule.done, course.schedule.left) == (2, 2)


def test_the_oldest_is_the_slowest():
    course = Course(2, begin=1)
    course.send()
    course.bad(0)
    course.send()  # block 1
    course.now_s += 0.5
    course.schedule._allowed = 3.0
    assert course.send() == [0]
    course.now_s += 2.6
    assert course.send() == [1]


def test_nobody_is_hurried_while_there_are_others_to_send():
    course = Course(3, begin=2)
    course.send()
    course.now_s += 50
    assert course.send() == []
    course.good(0)
    assert course.send() == [2]
    course.bad(2)
    assert course.send() == []  # 2 waits for its turn
    assert course.last == pytest.approx(0.2)


def test_one_block_alone_is_sent_a_second_time():
    course = Course(1)
    course.send()
    course.now_s += 2.9
    assert course.send() == []
    assert course.last == pytest.approx(0.1)
    course.now_s += 0.11
    assert course.send() == [0]


def test_patience_is_three_times_what_99_of_100_took():
    course = Course(202, begin=202, most=202)
    course.send()
    for index in range(200):
        course.now_s = 1000.0 + (1 if index < 190 else 2 if index < 199 else 9)
        course.good(index)
    course.now_s = 1005.9
    assert course.send() == []
    course.now_s = 1006.1
    assert course.send() == [200, 201]


def test_both_requests_fail_and_the_block_is_sent_once_more():
    course = Course(1)
    course.send()
    course.now_s += 60
    assert course.send() == [0]
    course.bad(0)
    assert course.send() == []
    course.bad(0)
    course.now_s += 10
    assert course.send() == [0]
    assert course.good(0)
    assert course.schedule.next(course.now_s) is None


def test_the_second_request_is_good_after_the_first_had_failed():
    course = Course(1)
    course.send()
    course.now_s += 60
    course.send()
    course.bad(0)
    assert course.good(0)
    assert course.schedule.next(course.now_s) is None


def test_a_late_error_of_a_block_that_is_done_is_nobodys():
    course = Course(1)
    course.send()
    course.now_s += 60
    course.send()
    assert course.good(0)
    course.bad(0, Fault.FINAL, RefusedError("sealed"))
    assert course.schedule.next(course.now_s) is None


def test_a_second_request_counts_in_what_may_be_in_flight():
    course = Course(2, begin=2, least=2)
    course.send()
    course.now_s += 60
    assert course.send() == []
    assert course.last == 1.0


def test_both_requests_of_a_block_make_room_when_it_is_done():
    course = Course(3, begin=2, most=2)
    assert course.send() == [0, 1]
    course.good(1)
    assert course.send() == [2]
    course.good(2)
    course.now_s += 60
    assert course.send() == [0]
    course.good(0)
    assert course.schedule._flights == 0


# Any order of answers


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(1, 6),
    st.integers(0, 2**32),
    st.lists(st.sampled_from(["good", "bad", "throttled", "unknown", "silent"]), max_size=80),
)
def test_whatever_the_answers_every_block_ends_once(count, begin, seed, answers):
    chance = random.Random(seed)
    course = Course(count, begin=begin, least=1, most=8, rng=chance.random, now_s=chance.random())
    ended, requests, said = [], 0, iter(answers)
    for _ in range(100_000):
        before = len(course.flights)
        sent = course.send()
        requests += len(sent)
        assert not sent or before + len(sent) <= course.schedule.allowed + len(ended)
        if course.last is None:
            break
        assert course.last > 0
        what = next(said, "good")
        if not course.flights or what == "silent":
            course.now_s += chance.random() * course.last
            continue
        course.now_s += chance.random() * 0.2
        index = chance.choice(course.flights)[0]
        if what == "good":
            if course.good(index):
                ended.append(index)
        else:
            fault = {"bad": Fault.PASSING, "throttled": Fault.THROTTLED}.get(what, Fault.UNKNOWN)
            course.bad(index, fault)
    assert sorted(ended) == list(range(count))
    assert (course.schedule.done, course.schedule._flights) == (count, 0)
    assert requests == count + course.schedule.again
