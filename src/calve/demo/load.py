"""A client that keeps asking, and counts what failed: the judge of a release without a failed request.

Open loop: requests start at fixed instants whatever became of earlier ones, so that a stall is seen by all that come
during it. Fresh and kept connections take turns. No retries: a request fails where its answer is not 200, has the wrong
body, does not come within 5 s, or the connection is reset.
"""

from __future__ import annotations

import collections
import http.client
import queue
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from calve.clock import SYSTEM, Clock
from calve.tasks import Cancel, Group

__all__ = ["Load", "Tally"]

TIMEOUT_S: Final = 5.0
_RELEASE: Final = re.compile(rb"calve demo release (\d+)")
_KEPT: Final = 4  # kept connections
_FRESH: Final = 12  # threads for fresh ones: 25 a second of 5 s each would want more, but then all is lost anyway
_FAILURES: Final = 20


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of the requests.

    Attributes:
        served: answered with the right page.
        failed: everything else.
        by_release: the served ones, by the number in the page.
        reasons: what the first failures were.
        slowest_s: the longest answer that was served.
    """

    served: int = 0
    failed: int = 0
    by_release: Mapping[int, int] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    slowest_s: float = 0.0


class Load:
    """Requests at a rate, from `__enter__` on to the end of the block.

    Args:
        address: host and port of the load balancer.
        rate: requests a second.
        path: what is asked for.
        clock: times them.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        rate: float = 50.0,
        path: str = "/",
        clock: Clock = SYSTEM,
        parent: Cancel | None = None,
    ) -> None:
        self._address = address
        self._rate = rate
        self._path = path
        self._clock = clock
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._served: collections.Counter[int] = collections.Counter()
        self._failed = 0
        self._reasons: list[str] = []
        self._slowest_s = 0.0
        self._fresh: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._kept: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._group = Group("load", limit=_KEPT + _FRESH + 1, parent=parent)

    def tally(self) -> Tally:
        """Return the counts so far."""
        with self._lock:
            return Tally(
                served=sum(self._served.values()),
                failed=self._failed,
                by_release=dict(sorted(self._served.items())),
                reasons=tuple(self._reasons),
                slowest_s=self._slowest_s,
            )

    def __enter__(self) -> Self:
        self._group.__enter__()
        for _ in range(_KEPT):
            self._group.spawn(self._work, self._kept, keep=True)
        for _ in range(_FRESH):
            self._group.spawn(self._work, self._fresh, keep=False)
        self._group.spawn(self._tick)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._group.__exit__(kind, error, trace)

    def _tick(self) -> None:
        """Start a request at every instant, kept and fresh in turn; a late start does not delay the next."""
        unhook = self._group.cancel.on_cancel(self._stop.set)
        due = self._clock.monotonic()
        turn = 0
        while not self._clock.wait(self._stop, max(0.0, due - self._clock.monotonic())):
            (self._kept if turn % 2 else self._fresh).put(due)
            turn += 1
            due += 1 / self._rate
        unhook()
        for _ in range(_KEPT):
            self._kept.put(None)
        for _ in range(_FRESH):
            self._fresh.put(None)

    def _work(self, todo: queue.SimpleQueue[float | None], *, keep: bool) -> None:
        connection: http.client.HTTPConnection | None = None
        while (due := todo.get()) is not None:
            if connection is None:
                connection = http.client.HTTPConnection(*self._address, timeout=TIMEOUT_S)
            if not self._ask(connection, due) or not keep or connection.sock is None:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection, due: float) -> bool:
        """Send one request; return whether the connection can be kept."""
        try:
            connection.request("GET", self._path)
            response = connection.getresponse()
            body = response.read(65536)
        except (OSError, http.client.HTTPException) as error:
            self._count(None, f"{type(error).__name__}: {error}", due)
            return False
        release = _RELEASE.search(body)
        if response.status != 200:
            self._count(None, f"status {response.status}", due)
        elif release is None:
            self._count(None, "the wrong body", due)
        else:
            self._count(int(release.group(1)), "", due)
        return not response.will_close

    def _count(self, release: int | None, reason: str, due: float) -> None:
        took_s = self._clock.monotonic() - due
        if release is not None and took_s > TIMEOUT_S:
            release, reason = None, f"took {took_s:.1f} s"
        with self._lock:
            if release is None:
                self._failed += 1
                if len(self._reasons) < _FAILURES:
                    self._reasons.append(reason)
            else:
                self._served[release] += 1
                self._slowest_s = max(self._slowest_s, took_s)
