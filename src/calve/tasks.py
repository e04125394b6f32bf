"""Threads, one primitive: a bounded group whose first error cancels the rest, and that joins on exit.

`Cancel` is the token that everything which waits looks at. A group makes a child of its parent's token, so that
Ctrl-C (which cancels the root token, see `cli.main`) reaches every worker, and a worker's failure only its siblings.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ParamSpec, Self

from calve.clock import SYSTEM, Clock
from calve.errors import CancelledError

__all__ = ["Budget", "Cancel", "Group", "limit_arenas"]

P = ParamSpec("P")


_M_ARENA_MAX, _M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -8, -3, -1  # mallopt(3)


def limit_arenas() -> None:
    """Have all threads share one malloc arena; call it before the first thread.

    glibc gives each thread an arena that it never empties: with eight connections a pull then holds 56 MB instead of
    41, a push 197 instead of 87 (412 paths, 1.8 GB). Nothing was slower for it: buffers are few and large.
    """
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        # Buffers of 64 to 256 KiB come and go: what is mapped anew for each costs a page fault for every 4 KiB.
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 4 << 20)


class Cancel:
    """A token that is cancelled once and for all; children are cancelled with it."""

    def __init__(self, parent: Cancel | None = None) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._hooks: dict[object, Callable[[], object]] = {}
        self._unlink: Callable[[], None] = lambda: None
        if parent is not None:
            self._unlink = parent.on_cancel(self.cancel)

    @property
    def cancelled(self) -> bool:
        """Say whether it was cancelled."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Cancel, and run the hooks, each once."""
        with self._lock:
            self._event.set()
            hooks = list(self._hooks.values())
            self._hooks.clear()
        for hook in hooks:
            hook()

    def on_cancel(self, hook: Callable[[], object]) -> Callable[[], None]:
        """Call `hook` when cancelled (at once where it is already); return how to take it off."""
        key = object()
        with self._lock:
            if not self._event.is_set():
                self._hooks[key] = hook
                return lambda: self._drop(key)
        hook()
        return lambda: None

    def _drop(self, key: object) -> None:
        with self._lock:
            self._hooks.pop(key, None)

    def check(self) -> None:
        """Raise CancelledError once cancelled."""
        if self._event.is_set():
            raise CancelledError

    def wait(self, seconds: float, clock: Clock = SYSTEM) -> None:
        """Sleep so long; raise CancelledError as soon as it is cancelled."""
        clock.wait(self._event, max(0.0, seconds))
        self.check()

    def close(self) -> None:
        """Let go of the parent."""
        self._unlink()


class Budget:
    """So much of something, bytes of memory for example, that threads share; who asks first is served first."""

    def __init__(self, amount: int) -> None:
        self._amount = amount
        self._held = 0
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def held(self, amount: int, cancel: Cancel) -> Iterator[None]:
        """Hold so much, once there is room; more than there is at all is as much as that.

        Raises:
            CancelledError: it was cancelled while it waited.
        """
        wanted = min(amount, self._amount)
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self._held + wanted > self._amount:
                    self._changed.wait(0.2)
                    cancel.check()
                self._held += wanted
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._held -= wanted
                self._changed.notify_all()


class Group:
    """At most `limit` threads at a time; `spawn` waits for a place.

    Leaving the block joins every thread. The first error cancels the group's token and is raised at the end;
    an error of the block itself cancels too and wins.
    """

    def __init__(self, name: str, *, limit: int, parent: Cancel | None = None) -> None:
        self.name = name
        self.cancel = Cancel(parent)
        self._slots = threading.Semaphore(limit)
        self._threads: deque[threading.Thread] = deque()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._count = 0

    def spawn(self, function: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run `function` in a thread of its own, once a place is free; CancelledError once cancelled."""
        while not self._slots.acquire(timeout=0.1):
            self.cancel.check()
        if self.cancel.cancelled:
            self._slots.release()
            self.cancel.check()
        with self._starting:
            self._count += 1
            thread = threading.Thread(
                target=self._run, args=(function, args, kwargs), name=f"{self.name}-{self._count}"
            )
            while self._threads and not self._threads[0].is_alive():
                self._threads.popleft().join()
            thread.start()
            self._threads.append(thread)

    def _run(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        try:
            function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001  (handed to the owner, in __exit__)
            with self._lock:
                if self._error is None and not (
                    isinstance(error, CancelledError) and self.cancel.cancelled
                ):
                    self._error = error
            self.cancel.cancel()
        finally:
            self._slots.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.cancel.cancel()
        while self._threads:
            self._threads.popleft().join()
        cancelled = self.cancel.cancelled
        self.cancel.close()
        if self._error is not None and (error is None or isinstance(error, CancelledError)):
            raise self._error
        if error is None and cancelled:
            raise CancelledError
