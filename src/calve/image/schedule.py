"""Which block to send next: pure, by (state, now). Many requests in flight, as many as the service takes.

A block that fails for a while is sent again, with jitter, for 120 s; a snapshot that is not known yet just after its
start likewise. Each success lets one more be in flight; throttling halves what may be, and from the first time on it
grows by one for a round. When nothing else is left to send, the
slowest are sent a second time: whichever is answered first counts.
Source: EBS direct's quotas (1,000 PutSnapshotBlock a second and snapshot) and error retries; NixOS/amis and coldsnap
saw requests that were never answered.
"""

from __future__ import annotations

import enum
import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from calve.errors import CalveError, DeadlineError
from calve.transport.retry import Policy, delay

__all__ = ["Fault", "Limits", "Schedule"]

_AGAIN: Final = Policy(attempts=None, base_s=0.2, cap_s=5.0)
_UNKNOWN: Final = Policy(attempts=None, base_s=1.0, cap_s=4.0)
_SAMPLES: Final = 512


class Fault(enum.Enum):
    """How a request went wrong."""

    PASSING = "passing"  # a fault of the service or of the network
    THROTTLED = "throttled"  # too many requests
    UNKNOWN = "unknown"  # the snapshot is not known, or not yet
    FINAL = "final"  # nothing will change it


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds.

    Attributes:
        begin: requests in flight at first.
        least: however much is throttled.
        most: however well it goes.
        budget_s: for one block, from its first request.
        unknown_s: how long after the beginning a snapshot may be unknown.
        hedge_s: the least that a request is waited for before it is sent a second time.
        hedge_factor: and so many times what 99 of 100 took; so many times `hedge_s` while none was answered.
    """

    begin: int = 64
    least: int = 4
    most: int = 96
    budget_s: float = 120.0
    unknown_s: float = 120.0
    hedge_s: float = 1.0
    hedge_factor: float = 3.0


@dataclass(slots=True)
class _Block:
    index: int
    tries: int = 0
    first_s: float | None = None
    flights: list[float] = field(default_factory=list)  # when each request under way was sent


class Schedule:
    """What is left of an upload; not thread-safe: whoever asks holds a lock.

    Args:
        indices: of the blocks, in the order in which they should go.
        now_s: monotonic.
        limits: bounds.
        rng: gives numbers from 0 to 1, for jitter.
    """

    def __init__(
        self,
        indices: Iterable[int],
        now_s: float,
        limits: Limits = Limits(),
        *,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._limits = limits
        self._rng = rng
        self._begun_s = now_s
        self._ready = deque(_Block(index) for index in indices)
        self._later: list[tuple[float, int, _Block]] = []
        self._flying: dict[int, _Block] = {}
        self._flights = 0
        self._took: deque[float] = deque(maxlen=_SAMPLES)
        self._allowed = float(limits.begin)
        self._calm_s: float | None = None  # until then one throttling was counted already
        self.done = 0
        self.again = 0
        """Requests beyond one for each block."""

    @property
    def left(self) -> int:
        """Return how many blocks are not done."""
        return len(self._ready) + len(self._later) + len(self._flying)

    @property
    def allowed(self) -> int:
        """Return how many requests may be in flight."""
        return int(self._allowed)

    def next(self, now_s: float) -> int | float | None:
        """Return the block to send now, or how many seconds to wait for one, or None where all are done."""
        while self._later and self._later[0][0] <= now_s:
            self._ready.append(heapq.heappop(self._later)[2])
        if self._ready and self._flights < self.allowed:
            return self._send(self._ready.popleft(), now_s)
        if not self.left:
            return None
        if not self._ready and not self._later and self._flights < self.allowed:
            slowest = self._slowest(now_s)
            if isinstance(slowest, _Block):
                return self._send(slowest, now_s)
            return slowest
        return self._later[0][0] - now_s if self._later and not self._ready else 1.0

    def _send(self, block: _Block, now_s: float) -> int:
        if block.first_s is None:
            block.first_s = now_s
        else:
            self.again += 1
        block.tries += 1
        block.flights.append(now_s)
        self._flights += 1
        self._flying[block.index] = block
        return block.index

    def _slowest(self, now_s: float) -> _Block | float:
        """Return the request that should be sent a second time, or how long until there is one."""
        patience_s = self._patience_s()
        once = [block for block in self._flying.values() if len(block.flights) == 1]
        if not once:
            return 1.0
        slowest = min(once, key=lambda block: block.flights[0])
        left_s = slowest.flights[0] + patience_s - now_s
        return slowest if left_s <= 0 else left_s

    def _patience_s(self) -> float:
        took = sorted(self._took)
        usual_s = took[int(len(took) * 0.99)] if took else self._limits.hedge_s
        return max(self._limits.hedge_s, self._limits.hedge_factor * usual_s)

    def succeeded(self, index: int, sent_s: float, now_s: float) -> bool:
        """Take an answer that was good; False where the block was done already.

        Args:
            index: of the block.
            sent_s: what `next` was told when it gave the block.
            now_s: monotonic.
        """
        block = self._flying.pop(index, None)
        if block is None:
            return False
        self._flights -= len(block.flights)
        self._took.append(now_s - sent_s)
        more = 1.0 if self._calm_s is None else 1 / self._allowed
        self._allowed = min(self._limits.most, self._allowed + more)
        self.done += 1
        return True

    def failed(
        self, index: int, sent_s: float, now_s: float, fault: Fault, error: CalveError
    ) -> None:
        """Take a request that failed; it is sent again later.

        Args:
            index: of the block.
            sent_s: what `next` was told when it gave the block: it says which of two requests failed.
            now_s: monotonic.
            fault: how it failed.
            error: with what.

        Raises:
            CalveError: that error, where another try is in vain.
            DeadlineError: the block's time is over.
        """
        if fault is Fault.THROTTLED and (self._calm_s is None or now_s >= self._calm_s):
            self._allowed = max(float(self._limits.least), self._allowed / 2)
            self._calm_s = now_s + 1.0
        block = self._flying.get(index)
        if block is None:
            return  # its second request was answered
        if fault is Fault.FINAL:
            raise error
        if fault is Fault.UNKNOWN and now_s - self._begun_s > self._limits.unknown_s:
            raise error
        first_s = now_s if block.first_s is None else block.first_s
        if now_s - first_s > self._limits.budget_s:
            raise DeadlineError(
                f"block {index} could not be sent within {self._limits.budget_s:.0f} s: {error.message}",
                place=error.place,
                hint=error.hint,
            ) from error
        if sent_s in block.flights:
            block.flights.remove(sent_s)
            self._flights -= 1
        if block.flights:
            return
        del self._flying[index]
        policy = _UNKNOWN if fault is Fault.UNKNOWN else _AGAIN
        due_s = now_s + delay(policy, block.tries, self._rng())
        heapq.heappush(self._later, (due_s, index, block))
