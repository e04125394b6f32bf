"""Instances as plain processes of this machine: the real agent on a directory, cheap enough for twenty at a time.

A machine's boot is a program; where it ends with 0 the machine has handed over: its port opens, answered here in place
of the closure's web server, and its stage 2 runs, another program. Any other end powers it off, but for `REBOOT`.
Nothing is isolated: all machines share this one's network, so that each has a port of its own for port 80.
"""

from __future__ import annotations

import contextlib
import enum
import json
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calve.errors import CalveError
from calve.process import Process
from calve.region import guard
from calve.region.machine import Launch
from calve.region.message import Request, Response
from calve.region.server import Server

__all__ = ["Place", "ProcessMachines", "Program"]

REBOOT = 3
"""The exit status of a stage 2 that wants the machine to start again."""
HTTP = 80


@dataclass(frozen=True, slots=True)
class Place:
    """One machine, as its programs see it.

    Attributes:
        launch: Its user data names the machine's own port where health is asked for at port 80.
        folder: Its own; a program may keep there what it likes.
        metadata: The URL of its metadata service.
        port: Of 127.0.0.1, in place of port 80.
    """

    launch: Launch
    folder: Path
    metadata: str
    port: int


Program = Callable[[Place], Sequence[str | Path]]
"""Prepares a machine's folder for a stage, and returns the program and its arguments."""


class _Stage(enum.Enum):
    """How far a machine is."""

    BOOT = "boot"
    SYSTEM = "system"
    UP = "up"
    OFF = "off"


@dataclass(slots=True)
class _Machine:
    """`program` ends with the running program, `site` with the machine's power, `owner` with the instance."""

    place: Place
    owner: contextlib.ExitStack
    stage: _Stage = _Stage.OFF
    process: Process | None = None
    program: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    site: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def cut(self) -> None:
        """Cut its power."""
        self.stage = _Stage.OFF
        if self.process is not None:
            self.process.signal(signal.SIGKILL)
        self.program.close()
        self.site.close()


class ProcessMachines:
    """See `machine.Machines`. It has no thread of its own: a machine comes on when somebody asks whether it runs.

    Args:
        directory: Where folders and consoles are kept.
        metadata: Starts the metadata service of one instance; closed with the instance.
        boot: The program of a machine's boot.
        system: The program of its stage 2.
        serves: From user data to the HTTP status that a machine answers with once it has handed over.
        env: The programs' whole environment; None is ours.
    """

    def __init__(
        self,
        directory: Path,
        metadata: Callable[[Launch], Server],
        boot: Program,
        system: Program,
        *,
        serves: Callable[[bytes], int] = lambda _user_data: 200,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = directory
        self._metadata = metadata
        self._boot = boot
        self._system = system
        self._serves = serves
        self._env = env
        self._machines: dict[str, _Machine] = {}
        self._lock = threading.Lock()

    def launch(self, launch: Launch) -> None:
        """Start a machine's boot.

        Raises:
            CalveError: Its folder cannot be made, or its program does not start.
        """
        try:
            machine = self._make(launch)
        except OSError as error:
            raise CalveError(
                f"cannot make a machine: {error.strerror or error}", place=error.filename
            ) from error
        with self._lock:
            self._machines[launch.instance_id] = machine

    def _make(self, launch: Launch) -> _Machine:
        folder = self._directory / launch.instance_id
        folder.mkdir(parents=True)
        with contextlib.ExitStack() as undo:
            port = _reserve(undo)
            seen = replace(launch, user_data=forwarded(launch.user_data, port))
            metadata = undo.enter_context(self._metadata(seen))
            machine = _Machine(Place(seen, folder, metadata.url, port), undo)
            self._start(machine, _Stage.BOOT)
            machine.owner = undo.pop_all()
        return machine

    def _start(self, machine: _Machine, stage: _Stage) -> None:
        program = self._boot if stage is _Stage.BOOT else self._system
        argv = program(machine.place)
        with (machine.place.folder / "console.log").open("ab") as console:
            process = Process(argv, stdout=console, stderr="stdout", env=self._env)
        guard.keep(process, machine.program)
        machine.process, machine.stage = process, stage

    def running(self, instance_id: str) -> bool:
        """Bring a machine on, and say whether it is on."""
        with self._lock:
            machine = self._machines.get(instance_id)
            if machine is None:
                return False
            code = None if machine.process is None else machine.process.returncode
            if code is not None:
                try:
                    self._follow(machine, code)
                except (CalveError, OSError) as error:
                    machine.cut()
                    _say(machine.place, f"the region: {error}")
            return machine.stage is not _Stage.OFF

    def _follow(self, machine: _Machine, code: int) -> None:
        """Do what follows a program's end."""
        machine.program.close()
        machine.process = None
        match machine.stage, code:
            case _Stage.BOOT, 0:
                status = self._serves(machine.place.launch.user_data)
                site = Server(
                    _page(status), name=machine.place.launch.instance_id, port=machine.place.port
                )
                machine.site.enter_context(site)
                self._start(machine, _Stage.SYSTEM)
            case _Stage.SYSTEM, 0:
                machine.stage = _Stage.UP
            case _Stage.SYSTEM, code if code == REBOOT:
                machine.site.close()
                self._start(machine, _Stage.BOOT)
            case _:
                machine.cut()

    def address(self, instance_id: str) -> tuple[str, int] | None:
        """Return where the machine's port 80 is reached; None where it has ended."""
        machine = self._machines.get(instance_id)
        return None if machine is None else ("127.0.0.1", machine.place.port)

    def console(self, instance_id: str) -> bytes:
        """Return what its programs said so far, of an ended machine too."""
        try:
            return (self._directory / instance_id / "console.log").read_bytes()
        except FileNotFoundError:
            return b""

    def kill(self, instance_id: str) -> None:
        """Cut a machine's power, as a crash of its host would."""
        with self._lock:
            machine = self._machines.get(instance_id)
            if machine is not None:
                machine.cut()

    def terminate(self, instance_id: str) -> None:
        """End the instance; nothing happens where it has ended. Its folder stays."""
        with self._lock:
            machine = self._machines.pop(instance_id, None)
        if machine is not None:
            machine.cut()
            machine.owner.close()

    def close(self) -> None:
        """End all instances."""
        for instance_id in list(self._machines):
            self.terminate(instance_id)


def forwarded(user_data: bytes, port: int) -> bytes:
    """Have what asks for health at port 80 ask at another one; foreign user data is left as it is."""
    try:
        document = json.loads(user_data)
        health = document["calve"]["health"]
        http, tcp = health.get("http", []), health.get("tcp", [])
        health["http"] = [{**one, "port": _moved(one.get("port", HTTP), port)} for one in http]
        health["tcp"] = [_moved(one, port) for one in tcp]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return user_data
    return json.dumps(document, separators=(",", ":")).encode()


def _moved(asked: Any, port: int) -> Any:
    return port if asked == HTTP else asked


def _reserve(owner: contextlib.ExitStack) -> int:
    """Take a port that refuses connections until somebody listens on it."""
    held = owner.enter_context(socket.socket())
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port: int = held.getsockname()[1]
    return port


def _page(status: int) -> Callable[[Request], Response]:
    return lambda _request: Response(status, body=b"a machine of the simulated region\n")


def _say(place: Place, text: str) -> None:
    with (place.folder / "console.log").open("a") as console:
        console.write(f"{text}\n")
