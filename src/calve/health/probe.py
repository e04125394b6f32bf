"""Tries what must hold on this machine, and says in a few words what does not."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial

from calve import process
from calve.contract.health import Health, Http
from calve.errors import CalveError, CancelledError, NotFoundError
from calve.tasks import Cancel
from calve.transport.http import Client

__all__ = ["Probe"]

_HOST = "127.0.0.1"
_TIMEOUT_S = 5.0
_WORDS = 160
_SHELL = "/bin/sh"


class Probe:
    """Looks at this machine.

    Args:
        health: what must hold.
        client: for HTTP; the caller closes it.
        cancel: ends a program that hangs.
    """

    def __init__(self, health: Health, client: Client, cancel: Cancel) -> None:
        self._health = health
        self._client = client
        self._cancel = cancel
        self.now = ""
        """What is being tried; empty between two checks."""
        self.found: list[str] = []
        """What of the round under way, or the last one, does not hold."""

    def failing(self) -> list[str]:
        """Return what does not hold now; nothing where all is well.

        Raises:
            CancelledError: it was cancelled; `found` and `now` say how far it came.
        """
        self.found = []
        for what, check in self._checks():
            self._cancel.check()
            self.now = what
            failure = check()
            self.now = ""
            if failure:
                self.found.append(failure)
        return self.found

    def _checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        health = self._health
        for one in health.http:
            yield _what(one), partial(self._http, one)
        for port in health.tcp:
            yield f"port {port}", partial(_tcp, port)
        for unit in health.units:
            yield unit, partial(self._unit, unit)
        if health.command:
            yield "command", partial(self._command, health.command)

    def _http(self, one: Http) -> str:
        what = _what(one)
        try:
            url = f"http://{_HOST}:{one.port}{one.path}"
            with self._client.request("GET", url, read_s=_TIMEOUT_S) as answer:
                return "" if 200 <= answer.status < 300 else f"{what}: {answer.status}"
        except CancelledError:
            raise
        except CalveError as error:
            return f"{what}: {error.message}"

    def _unit(self, unit: str) -> str:
        done = self._run(["systemctl", "is-active", "--", unit])
        return "" if done == "active" else f"{unit}: {done or 'unknown'}"

    def _command(self, command: str) -> str:
        try:
            process.run([_SHELL, "-c", command], cancel=self._cancel)
        except CancelledError:
            raise
        except CalveError as error:
            return _short(f"command: {error.message}")
        return ""

    def _run(self, argv: list[str]) -> str:
        try:
            done = process.run(argv, check=False, cancel=self._cancel)
        except NotFoundError as error:
            return error.message
        return _short(done.stdout.decode("utf-8", "replace"))


def _what(one: Http) -> str:
    return f"GET {one.path} on port {one.port}"


def _tcp(port: int) -> str:
    try:
        socket.create_connection((_HOST, port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        return f"port {port}: {error.strerror or error}"
    return ""


def _short(text: str) -> str:
    return " ".join(text.split())[-_WORDS:]
