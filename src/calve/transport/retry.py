"""The one retry policy: full jitter on an exponential delay, to a number of attempts and a deadline.

Source: M. Brooker, "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from calve.clock import SYSTEM, Clock
from calve.errors import DeadlineError, TransientError
from calve.tasks import Cancel

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT", "Policy", "delay", "retry"]

T = TypeVar("T")

_MOST_DOUBLINGS = 60  # keeps 2**n a float


@dataclass(frozen=True, slots=True)
class Policy:
    """When to try again, and when to stop.

    Attributes:
        attempts: the first included; None is as many as fit before the deadline.
        base_s: bound of the first delay, doubled with every attempt.
        cap_s: bound of every delay.
        deadline_s: from the first attempt; no attempt begins later.
    """

    attempts: int | None = 8
    base_s: float = 0.1
    cap_s: float = 10.0
    deadline_s: float = 120.0


DEFAULT = Policy()


def delay(policy: Policy, attempt: int, random: float) -> float:
    """Return how many seconds to wait after the failed attempt number `attempt`, counted from 1.

    Args:
        policy: its base and cap.
        attempt: the number of attempts that failed.
        random: from 0 to 1, uniformly distributed.
    """
    doublings = min(attempt - 1, _MOST_DOUBLINGS)
    return random * min(policy.cap_s, policy.base_s * 2.0**doublings)


def _ignore(_attempt: int, _pause_s: float, _error: TransientError) -> None:
    pass


def retry(
    function: Callable[[], T],
    policy: Policy = DEFAULT,
    *,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
    rng: Callable[[], float] = random.random,
    on_retry: Callable[[int, float, TransientError], object] = _ignore,
) -> T:
    """Call `function` until it raises no TransientError; any other error passes.

    An error's `retry_after_s` is waited for, where it is longer than the policy's own delay.

    Args:
        function: what to try.
        policy: when to stop.
        cancel: ends a wait with CancelledError.
        clock: measures the deadline, and waits.
        rng: gives numbers from 0 to 1.
        on_retry: told the number of failed attempts, the wait in seconds and the error, before each wait.

    Raises:
        TransientError: the last one, once the attempts are used up.
        DeadlineError: the next attempt would begin after the deadline.
    """
    token = Cancel() if cancel is None else cancel
    began = clock.monotonic()
    attempt = 0
    while True:
        token.check()
        attempt += 1
        try:
            return function()
        except TransientError as error:
            if policy.attempts is not None and attempt >= policy.attempts:
                raise _last(error, attempt) from error
            pause = max(delay(policy, attempt, rng()), error.retry_after_s or 0.0)
            spent = clock.monotonic() - began
            if spent + pause > policy.deadline_s:
                raise DeadlineError(
                    f"{error.message} (gave up after {attempt} attempts in {spent:.0f} s)",
                    place=error.place,
                    hint=error.hint,
                ) from error
            on_retry(attempt, pause, error)
        token.wait(pause, clock)


def _last(error: TransientError, attempts: int) -> TransientError:
    if attempts == 1:
        return error
    return TransientError(
        f"{error.message} (after {attempts} attempts)",
        place=error.place,
        hint=error.hint,
        retry_after_s=error.retry_after_s,
    )
