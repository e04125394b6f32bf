"""The load balancer: HAProxy 2.6 behind one socket of this machine, without retries of its own.

Source: HAProxy 2.6 configuration manual and management guide (`add server`, `set server state`, `show stat`).
Servers are added and removed at run time; nothing is reloaded, so no connection is lost by the balancer itself.
Why no client sees a drain: the client's connection is HAProxy's and stays; each request is balanced anew, and with
`option http-server-close` each has a connection of its own to a machine, so none can meet a kept one that the machine
is just closing. A machine in drain is not chosen; when its last request has ended, nothing ties a client to it.
One thread, so that a command on the admin socket never falls between the choice of a machine and its being counted.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from calve.clock import SYSTEM, Clock
from calve.errors import CalveError, ConflictError, DeadlineError, TransientError
from calve.process import Process, which
from calve.region import guard
from calve.region.targets import Add, Check, Drain, Effect, HealthCheck, Ready, Remove

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

__all__ = ["Balancer", "HaProxy", "tell"]

CONNECTIONS = 400
"""Of clients at a time; twice that and the checks stay below the usual limit of 1024 open files."""

START_S = 10.0
_PATH = re.compile(r"/[A-Za-z0-9._~/?&=+,;:@!*-]{0,1023}")
_STATUS = re.compile(r"[A-Z0-9]+")
_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
_PROXY, _SERVERS = "machines", 4


class Balancer(Protocol):
    """What `cloud` asks of a load balancer; called by one thread. Whoever made it closes it."""

    def start(self, check: HealthCheck) -> None:
        """Begin to listen, with this check for every target; ConflictError where it has begun."""

    def add(self, target_id: str, address: tuple[str, int]) -> None:
        """Take a target in, without traffic, with checks running from nothing."""

    def checks(self) -> Mapping[str, Check]:
        """Say what is known of every target."""

    def ready(self, target_id: str) -> None:
        """Let a target have traffic."""

    def drain(self, target_id: str) -> None:
        """Give a target no new request; checks go on."""

    def remove(self, target_id: str) -> None:
        """Take a target away; requests still under way are cut. Nothing happens where it is unknown."""


def tell(balancer: Balancer, effect: Effect) -> None:
    """Tell a balancer what a target group wants."""
    match effect:
        case Add(target_id, address):
            balancer.add(target_id, address)
        case Ready(target_id):
            balancer.ready(target_id)
        case Drain(target_id):
            balancer.drain(target_id)
        case Remove(target_id):
            balancer.remove(target_id)


class HaProxy:
    """HAProxy in a process of its own; use it as a context manager.

    The address is known, and taken, before `start`.

    Args:
        port: Where clients connect on 127.0.0.1; 0 for a free one.
        check_interval_s: How often a target is really checked; None for what the target group says (at least 5 s
            on AWS, which is long for a demonstration).
        directory: Where its own files are kept, in a folder that goes with it; None for the temporary directory.
        clock: For waiting.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        check_interval_s: float | None = None,
        directory: Path | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self._interval_s = check_interval_s
        self._parent = directory
        self._clock = clock
        self._socket: socket.socket | None = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind(("127.0.0.1", port))
        except OSError as error:
            self._socket.close()
            raise ConflictError(f"port {port} is taken: {error.strerror}") from error
        self.address: tuple[str, int] = self._socket.getsockname()
        self._process: Process | None = None
        self._owner = contextlib.ExitStack()
        self._directory: Path | None = None
        self._admin = ""
        self._options = ""
        self._names: dict[str, str] = {}
        self._leftover: list[str] = []
        self._serial = 0

    # Process

    def start(self, check: HealthCheck) -> None:
        """Start the process; DeadlineError or CalveError, with its last words, where it does not come up."""
        try:
            self._start(check)
        except OSError as error:
            raise CalveError(
                f"cannot start haproxy: {error.strerror or error}", place=error.filename
            ) from error

    def _start(self, check: HealthCheck) -> None:
        if self._process is not None and self._process.returncode is not None:
            raise CalveError(f"haproxy has ended: {self._last_words()}")
        if self._process is not None or self._socket is None:
            raise ConflictError("this balancer is started, or closed, already")
        self._directory = Path(tempfile.mkdtemp(prefix="calve-lb-", dir=self._parent))
        self._owner.callback(shutil.rmtree, self._directory, ignore_errors=True)
        # By its descriptor: a socket's path has 107 bytes, and a temporary directory may have more.
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._owner.callback(os.close, folder)
        self._admin = f"/proc/self/fd/{folder}/admin"
        with contextlib.ExitStack() as files, socket.socket(socket.AF_UNIX) as admin:
            admin.bind(self._admin)
            admin.listen()
            path = self._directory / "haproxy.cfg"
            path.write_text(self._config(check, self._socket.fileno(), admin.fileno()))
            path.chmod(0o644)  # for nobody, by its descriptor: the directory stays private
            config = files.enter_context(path.open("rb"))
            self._process = Process(
                [which("haproxy"), "-db", "-f", f"/dev/fd/{config.fileno()}"],
                stdout=files.enter_context((self._directory / "log").open("wb")),
                stderr="stdout",
                pass_fds=(self._socket.fileno(), admin.fileno(), config.fileno()),
                unprivileged=True,
                cwd=Path("/"),  # ours may not be nobody's to enter
            )
        guard.keep(self._process, self._owner)
        self._socket.close()
        self._socket = None
        self._await_admin(self._process)

    def _config(self, check: HealthCheck, listener: int, admin: int) -> str:
        if not _PATH.fullmatch(check.path):
            raise CalveError("this health check path cannot be given to HAProxy", place=check.path)
        interval_ms = round(1000 * (self._interval_s or check.interval_s))
        self._options = f"check inter {interval_ms} rise {check.healthy} fall {check.unhealthy}"
        return f"""\
global
  stats socket fd@{admin} level admin
  nbthread 1
  maxconn {CONNECTIONS}
defaults
  mode http
  retries 0
  no option redispatch
  option http-server-close
  timeout connect 5s
  timeout client 1h
  timeout http-request 1m
  timeout http-keep-alive 1h
  timeout server 1m
  timeout check {round(1000 * min(check.timeout_s, max(1.0, interval_ms / 1000)))}
frontend web
  bind fd@{listener}
  default_backend {_PROXY}
backend {_PROXY}
  balance roundrobin
  option httpchk
  http-check send meth GET uri {check.path} ver HTTP/1.1 hdr Host health hdr Connection close
  http-check expect status 200
"""

    def _await_admin(self, process: Process) -> None:
        never = threading.Event()
        deadline = self._clock.monotonic() + START_S
        while True:
            try:
                self._command("show info")
            except CalveError:
                if process.returncode is not None:
                    raise CalveError(f"haproxy ended at once: {self._last_words()}") from None
                if self._clock.monotonic() > deadline:
                    raise DeadlineError(f"haproxy does not answer: {self._last_words()}") from None
                self._clock.wait(never, 0.02)
            else:
                return

    def _last_words(self) -> str:
        try:
            lines = Path(f"{self._directory}/log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-10:])

    def close(self) -> None:
        """End the process and free the port; idempotent."""
        if self._process is not None:
            self._process.stop(grace_s=1.0)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._owner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Targets

    def add(self, target_id: str, address: tuple[str, int]) -> None:
        """Add a server; it is a new one to HAProxy, so that no earlier check's result can be taken for its own."""
        if not _ID.fullmatch(target_id):
            raise CalveError("this is no target's name", place=target_id)
        self._serial += 1
        name = f"{target_id}.{self._serial}"
        host, port = address
        self._told(f"add server {_PROXY}/{name} {host}:{port} {self._options}")
        self._names[target_id] = name
        self._told(f"set server {_PROXY}/{name} state drain")
        self._told(f"enable health {_PROXY}/{name}")

    def checks(self) -> Mapping[str, Check]:
        """Read every server's check and connections."""
        self._sweep()
        lines = self._command(f"show stat {_PROXY} {_SERVERS} -1").removeprefix("# ").splitlines()
        rows = {row["svname"]: row for row in csv.DictReader(line for line in lines if line)}
        return {one: _check(rows[name]) for one, name in self._names.items() if name in rows}

    def ready(self, target_id: str) -> None:
        """Set a server's state to ready."""
        self._told(f"set server {_PROXY}/{self._names[target_id]} state ready")

    def drain(self, target_id: str) -> None:
        """Set a server's state to drain."""
        self._told(f"set server {_PROXY}/{self._names[target_id]} state drain")

    def remove(self, target_id: str) -> None:
        """Delete a server; what is still connected is cut."""
        name = self._names.pop(target_id, None)
        if name is not None:
            server = f"{_PROXY}/{name}"
            self._told(f"set server {server} state maint")
            self._told(f"disable health {server}")
            self._told(f"shutdown sessions server {server}")
            self._leftover.append(name)
            self._sweep()

    def _sweep(self) -> None:
        """Delete servers out of use; one whose last session is just ending takes another round."""
        self._leftover = [
            name
            for name in self._leftover
            if "deleted" not in self._command(f"del server {_PROXY}/{name}")
        ]

    # Admin socket

    def _told(self, command: str) -> None:
        answer = self._command(command).strip()
        if answer and "registered" not in answer:
            raise CalveError(f"haproxy refused `{command}`: {answer}")

    def _command(self, command: str) -> str:
        """Say one line to the admin socket and read the answer to its end."""
        parts = []
        try:
            with socket.socket(socket.AF_UNIX) as admin:
                admin.settimeout(5.0)
                admin.connect(self._admin)
                admin.sendall(command.encode() + b"\n")
                while part := admin.recv(65536):
                    parts.append(part)
        except OSError as error:
            # What is dying closes its sockets first.
            code = None if self._process is None else self._process.wait(0.2)
            if code is not None:
                raise CalveError(f"haproxy has ended with {code}: {self._last_words()}") from error
            raise TransientError(
                f"haproxy's admin socket does not answer: {error}. {self._last_words()}"
            ) from error
        return b"".join(parts).decode("utf-8", "replace")


def _check(row: Mapping[str, str]) -> Check:
    """Read a line of `show stat`; a check that is under way shows the last one's status behind a star."""
    status = _STATUS.search(row["check_status"] or "")
    health, rise = row["check_health"], row["check_rise"]
    code = row["check_code"]
    word = status.group() if status else "INI"
    return Check(
        known=word not in {"INI", "UNK", "SOCKERR"},
        passing=bool(health and rise) and int(health) >= int(rise),
        code=int(code) if code and int(code) >= 100 else None,
        timed_out=word in {"L4TOUT", "L6TOUT", "L7TOUT"},
        connections=int(row["scur"] or 0) + int(row["qcur"] or 0),
    )
