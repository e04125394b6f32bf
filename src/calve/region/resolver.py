"""Names of the simulated region, answered over TCP and UDP on one port of 127.0.0.1.

Source: RFC 1035 (messages), RFC 7766 (TCP), RFC 4592 (wildcards). It answers A queries out of a table; other types
of a known name get an empty answer, unknown names NXDOMAIN. A virtual machine reaches it through a TCP forward
(glibc: `options use-vc`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Self

from calve.region.listener import Listener
from calve.tasks import Group

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["Resolver", "answer"]

TTL_S = 5
_HEADER = struct.Struct(">HHHHHH")
_A, _ANY, _IN = 1, 255, 1
_RESPONSE, _AUTHORITATIVE, _AVAILABLE = 0x8000, 0x0400, 0x0080
_NO_ERROR, _FORMAT_ERROR, _NO_NAME, _NOT_IMPLEMENTED = 0, 1, 3, 4
_PORT_TRIES = 16


class Resolver:
    """A name server while its block lasts.

    Args:
        table: IPv4 addresses by name; `*.example` stands for all names below `example`.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._table: dict[str, bytes] = {}
        self._stack = contextlib.ExitStack()
        self._port = 0
        self.queries: list[str] = []
        for name, address in table.items():
            self.add(name, address)

    def add(self, name: str, address: str) -> None:
        """Give a name its address."""
        packed = ipaddress.IPv4Address(address).packed
        with self._lock:
            self._table[name.lower().rstrip(".")] = packed

    @property
    def port(self) -> int:
        """Return the port, of TCP and UDP alike."""
        return self._port

    def find(self, name: str) -> bytes | None:
        """Return the address of a name: its own, else that of the closest wildcard above."""
        with self._lock:
            if name in self._table:
                return self._table[name]
            parent = name
            while "." in parent:
                parent = parent.partition(".")[2]
                if f"*.{parent}" in self._table:
                    return self._table[f"*.{parent}"]
        return None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            # In this order on leaving: wake the UDP thread, join it, then close TCP and the socket.
            listener = stack.enter_context(self._listen(datagrams))
            self._port = listener.port
            threads = stack.enter_context(Group("resolver-udp", limit=1))
            waker, sleeper = socket.socketpair()
            stack.callback(waker.close)
            threads.spawn(self._serve_datagrams, datagrams, sleeper)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _listen(self, datagrams: socket.socket) -> Listener:
        """Bind UDP to a port that is free for TCP too, and leave TCP to be opened."""
        for _ in range(_PORT_TRIES):
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
                with contextlib.suppress(OSError):
                    datagrams.bind(("127.0.0.1", port))
                    break
        else:
            raise OSError("no port is free for both TCP and UDP")
        return Listener(self._serve, name="resolver", idle_s=30.0, port=port)

    def _serve(self, connection: socket.socket, _peer: tuple[str, int]) -> None:
        with connection.makefile("rb") as source:
            while len(prefix := source.read(2)) == 2:
                query = source.read(int.from_bytes(prefix, "big"))
                reply = self._reply(query)
                if reply is not None:
                    connection.sendall(len(reply).to_bytes(2, "big") + reply)

    def _serve_datagrams(self, datagrams: socket.socket, sleeper: socket.socket) -> None:
        with sleeper:
            poll = select.poll()  # select() knows no descriptor beyond 1023
            poll.register(datagrams, select.POLLIN)
            poll.register(sleeper, select.POLLIN)
            while True:
                if sleeper.fileno() in dict(poll.poll()):
                    return
                with contextlib.suppress(OSError):  # a client that is gone already
                    query, peer = datagrams.recvfrom(65535)
                    reply = self._reply(query)
                    if reply is not None:
                        datagrams.sendto(reply, peer)

    def _reply(self, query: bytes) -> bytes | None:
        parsed = _question(query)
        if parsed is not None:
            with self._lock:
                self.queries.append(parsed[0])
                del self.queries[:-1000]
        return answer(query, self)


def answer(query: bytes, names: Resolver) -> bytes | None:
    """Answer one message; None where it is too broken, or a reply itself."""
    if len(query) < _HEADER.size:
        return None
    identifier, flags, questions, *_ = _HEADER.unpack_from(query)
    if flags & _RESPONSE:
        return None
    reply = _RESPONSE | (flags & 0x7900) | _AVAILABLE
    if flags & 0x7800:
        return _HEADER.pack(identifier, reply | _NOT_IMPLEMENTED, 0, 0, 0, 0)
    parsed = _question(query) if questions == 1 else None
    if parsed is None:
        return _HEADER.pack(identifier, reply | _FORMAT_ERROR, 0, 0, 0, 0)
    name, kind, network, end = parsed
    question = query[_HEADER.size : end]
    address = names.find(name) if network in {_IN, _ANY} else None
    reply |= _AUTHORITATIVE
    if address is None:
        return _HEADER.pack(identifier, reply | _NO_NAME, 1, 0, 0, 0) + question
    if kind not in {_A, _ANY}:
        return _HEADER.pack(identifier, reply | _NO_ERROR, 1, 0, 0, 0) + question
    record = struct.pack(">HHHIH", 0xC000 | _HEADER.size, _A, _IN, TTL_S, 4) + address
    return _HEADER.pack(identifier, reply | _NO_ERROR, 1, 1, 0, 0) + question + record


def _question(query: bytes) -> tuple[str, int, int, int] | None:
    """Parse the first question: name in lower case, type, class, and where it ends; None where it is malformed."""
    position = _HEADER.size
    labels: list[str] = []
    while position < len(query) and query[position]:
        size = query[position]
        label = query[position + 1 : position + 1 + size]
        # A question is the first name of a message: there is nothing to point back to.
        if size > 63 or len(label) != size or position - _HEADER.size + size > 253:
            return None
        labels.append(label.decode("latin-1").lower())
        position += 1 + size
    end = position + 5
    if position >= len(query) or len(query) < end:
        return None
    kind, network = struct.unpack_from(">HH", query, position + 1)
    return ".".join(labels), kind, network, end
