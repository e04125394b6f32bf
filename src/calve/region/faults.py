"""Faults as data: what a server does wrong, to which requests, how often.

A fault is a frozen value; a `FaultPlan` hands them out, thread-safe, and is what a `Server` asks before each
request. Byte counts are of the response's body.
"""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from calve.region.server import Request, Response

__all__ = [
    "Answer",
    "Delay",
    "Fault",
    "FaultHook",
    "FaultPlan",
    "Flip",
    "Lost",
    "Reset",
    "Silent",
    "Stall",
    "Trickle",
    "Truncate",
]


@dataclass(frozen=True, slots=True)
class Lost:
    """Reset the connection without an answer; the request was performed, or was not."""

    performed: bool = True


@dataclass(frozen=True, slots=True)
class Reset:
    """Perform, send the head and so many bytes, then reset the connection (RST)."""

    after_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Truncate:
    """Perform, send the head with the right length and so many bytes, then close (FIN)."""

    after_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Silent:
    """Send nothing at all, until either side closes or the time is over; the request was performed, or was not."""

    performed: bool = True
    seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class Stall:
    """Perform, send the head and so many bytes, then nothing, until either side closes or the time is over."""

    after_bytes: int = 0
    seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class Trickle:
    """Perform, send the head and so many bytes, then one byte per interval."""

    after_bytes: int = 0
    every_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Flip:
    """Perform, and send the byte at `offset` with all its bits inverted."""

    offset: int = 0


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait so long, then perform and answer as usual."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer this instead of performing the request."""

    response: Response


Fault = Lost | Reset | Truncate | Silent | Stall | Trickle | Flip | Delay | Answer
FaultHook = Callable[["Request"], "Fault | None"]


F = TypeVar("F")


@dataclass(slots=True)
class _Rule(Generic[F]):
    fault: F
    method: str
    path: str
    skip: int
    times: int | None


class FaultPlan(Generic[F]):
    """Faults in the order they were added; a request meets the first that matches it and is not used up.

    A plan of `Fault` is a `FaultHook`: `Server(handle, faults=plan)`. A service has faults of its own kind beside.
    """

    def __init__(self) -> None:
        self._rules: list[_Rule[F]] = []
        self._lock = threading.Lock()
        self.injected = 0

    def add(
        self,
        fault: F,
        *,
        method: str = "*",
        path: str = "*",
        skip: int = 0,
        times: int | None = 1,
    ) -> FaultPlan[F]:
        """Plan a fault; return the plan.

        Args:
            fault: What goes wrong.
            method: A glob of the method.
            path: A glob of the raw path, without the query.
            skip: How many matching requests go unharmed first.
            times: How many it meets then; None for all.
        """
        with self._lock:
            self._rules.append(_Rule(fault, method, path, skip, times))
        return self

    def clear(self) -> None:
        """Forget what was planned."""
        with self._lock:
            self._rules.clear()

    def __call__(self, request: Request) -> F | None:
        """Take the fault that this request meets, if any."""
        with self._lock:
            for rule in self._rules:
                if not self._matches(rule, request):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                if rule.times is not None:
                    rule.times -= 1
                self.injected += 1
                return rule.fault
        return None

    @staticmethod
    def _matches(rule: _Rule[F], request: Request) -> bool:
        return (
            rule.times != 0
            and fnmatch.fnmatchcase(request.method, rule.method)
            and fnmatch.fnmatchcase(request.path, rule.path)
        )
