"""Tries what must hold on this machine, and says in a few words what does not."""

from __future__ import annotations

import socket
from collections.abc import Iterator

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

    def failing(self) -> list[str]:
        """Return what does not hold now; nothing where all is well."""
        return list(self._failing())

    def _failing(self) -> Iterator[str]:
        health = self._health
        found = [
            *(self._http(one) for one in health.http),
            *(_tcp(port) for port in health.tcp),
            *(self._unit(unit) for unit in health.units),
            self._command(health.command) if health.command else "",
        ]
        yield from filter(None, found)

    def _http(self, one: Http) -> str:
        what = f"GET {one.path} on port {one.port}"
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


def _tcp(port: int) -> str:
    try:
        socket.create_connection((_HOST, port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        return f"port {port}: {error.strerror or error}"
    return ""


def _short(text: str) -> str:
    return " ".join(text.split())[-_WORDS:]
