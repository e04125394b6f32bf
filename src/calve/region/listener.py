"""A TCP port of 127.0.0.1 with a thread per connection, whose end leaves no thread, connection or port."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Self

from calve.errors import CancelledError
from calve.tasks import Cancel, Group

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Listener", "shut"]

CONNECTIONS = 1024


class Listener:
    """Accepts connections while its block lasts.

    Leaving the block shuts every connection down, joins every thread and raises what `serve` raised first; an
    OSError (the peer went away, or was silent for `idle_s`) and a cancellation just end the connection.

    Args:
        serve: Speaks with one peer; the connection is closed when it returns.
        name: Of the threads.
        idle_s: The connections' timeout.
        port: 0 for a free one.
        wrap: Makes a TLS connection of an accepted one, without a handshake yet.

    Attributes:
        closing: Cancelled as soon as the block is left; whatever waits looks at it.
        connections: How many were accepted so far.
        port: While it is open; 0 before.
    """

    def __init__(
        self,
        serve: Callable[[socket.socket, tuple[str, int]], None],
        *,
        name: str,
        idle_s: float,
        port: int = 0,
        wrap: Callable[[socket.socket], socket.socket] | None = None,
    ) -> None:
        self.closing = Cancel()
        self.connections = 0
        self.port = port
        self._serve = serve
        self._name = name
        self._idle_s = idle_s
        self._wrap = wrap
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()

    @property
    def open_connections(self) -> int:
        """Return how many connections are open now."""
        with self._lock:
            return len(self._open)

    def __enter__(self) -> Self:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = listener.getsockname()[1]
        self._stack.callback(listener.close)
        threads = self._stack.enter_context(Group(self._name, limit=CONNECTIONS))
        acceptor = self._stack.enter_context(Group(f"{self._name}-accept", limit=1))
        self._stack.callback(self._shut, listener)
        acceptor.spawn(self._accept, listener, threads)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _shut(self, listener: socket.socket) -> None:
        self.closing.cancel()
        shut(listener)
        with self._lock:
            for connection in self._open:
                shut(connection)

    def _accept(self, listener: socket.socket, threads: Group) -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except OSError:
                if self.closing.cancelled:
                    return
                raise
            self.connections += 1
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(self._idle_s)
                threads.spawn(self._run, connection, peer)
            except CancelledError:  # a thread failed; let new peers be refused, not wait
                connection.close()
                listener.close()
                return

    def _run(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        if self._wrap is not None:
            connection = self._wrap(connection)
        with self._lock:
            self._open.add(connection)
            if self.closing.cancelled:
                shut(connection)
        try:
            with contextlib.suppress(OSError, CancelledError):
                self._serve(connection, peer)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


def shut(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Shut a connection down, so that its thread wakes; TLS's own way is not safe from another thread."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, how)
