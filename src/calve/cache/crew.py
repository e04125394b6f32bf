"""A crew of threads that works off tasks and hands the results to its owner's thread, who may add more tasks.

The walk over narinfos, the probes and uploads of a push, and the downloads of a pull are all of this shape: what
decides (which path is next, what is committed) stays in one thread, and needs no lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from threading import Condition
from types import TracebackType
from typing import Generic, Self, TypeAlias, TypeVar

from calve.tasks import Cancel, Group

__all__ = ["Crew", "Task"]

Result = TypeVar("Result")
Task: TypeAlias = Callable[[Cancel], Result]
"""Called in a thread, with a token that is cancelled once the crew is to stop."""


class Crew(Generic[Result]):
    """Threads that work off tasks. The first error stops all, and is raised when the block is left.

        with Crew("name", jobs=8) as crew:
            crew.add(task)
            for result in crew:
                crew.add(another)

    Args:
        name: of the threads.
        jobs: how many there are at most; they start as tasks come.
        cancel: stops the crew.
    """

    def __init__(self, name: str, *, jobs: int, cancel: Cancel | None = None) -> None:
        self._jobs = jobs
        self._group = Group(name, limit=jobs, parent=cancel)
        self._changed = Condition()
        self._todo: deque[Task[Result]] = deque()
        self._results: deque[Result] = deque()
        self._open = 0  # tasks whose result the owner does not have yet
        self._threads = 0
        self._idle = 0
        self._stopped = False

    @property
    def cancel(self) -> Cancel:
        """Return the token that is cancelled once the crew is to stop."""
        return self._group.cancel

    def add(self, task: Task[Result], *, urgent: bool = False) -> None:
        """Have a task done: last, or before those that wait."""
        with self._changed:
            self._open += 1
            if urgent:
                self._todo.appendleft(task)
            else:
                self._todo.append(task)
            more = self._idle < len(self._todo) and self._threads < self._jobs
            self._threads += more
            self._changed.notify_all()
        if more:
            self._group.spawn(self._member)

    def __iter__(self) -> Iterator[Result]:
        """Yield results as they come, until no task is open; end early once the crew was stopped."""
        while True:
            with self._changed:
                while not self._results and self._open and not self._stopped:
                    self._changed.wait()
                if self._stopped or not self._results:
                    return
                result = self._results.popleft()
                self._open -= 1
            yield result

    def _member(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._todo and not self._stopped:
                    self._changed.wait()
                self._idle -= 1
                if self._stopped:
                    return
                task = self._todo.popleft()
            result = task(self._group.cancel)
            with self._changed:
                self._results.append(result)
                self._changed.notify_all()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self._group.__enter__()
        self._unhook = self._group.cancel.on_cancel(self._stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._unhook()
        self._stop()
        self._group.__exit__(kind, error, trace)
