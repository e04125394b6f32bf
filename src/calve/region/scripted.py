"""Machines that do what their scripts say on a virtual clock: no process, no port, no thread.

machines = ScriptedMachines(clock, lambda launch: good(40.0))
cloud = Cloud(machines, ScriptedBalancer(clock, machines), clock=clock)
machines.connect(cloud.act)
"""

from __future__ import annotations

import functools
import heapq
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from calve.errors import CalveError
from calve.region.hooks import Result
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from calve.region.machine import Launch
    from calve.region.scripts import Script
    from calve.region.virtual import VirtualClock

__all__ = ["Beat", "Complete", "Report", "ScriptedMachines", "calve_of"]

Complete = Callable[[str, bytes, Result], object]
"""Completes the launch hook of an instance with this user data."""
Beat = Callable[[str, bytes], object]
"""Restarts its timeout."""
Report = Callable[[str, bytes, str], object]
"""Keeps an instance's report: its id, its user data, the text."""


@dataclass(slots=True)
class _Machine:
    launch: Launch
    script: Script
    began: float
    address: tuple[str, int]
    on: bool = True
    ended_at: float | None = None
    code: int | None = None
    said: list[tuple[float, str]] = field(default_factory=list)


class ScriptedMachines:
    """See `machine.Machines`. Work is done for what is due alone; not thread-safe beyond what the clock is.

    Args:
        clock: Drives it, from now on until `close`.
        script_of: What a machine will do; called once, at its launch. A CalveError refuses the launch.
        complete: Completes hooks; nobody is told by default. See `connect`.
        beat: Keeps them from timing out.
        report: Keeps reports.

    Attributes:
        launches: All that were launched, in order.
    """

    def __init__(
        self,
        clock: VirtualClock,
        script_of: Callable[[Launch], Script],
        *,
        complete: Complete | None = None,
        beat: Beat | None = None,
        report: Report | None = None,
    ) -> None:
        self.launches: list[Launch] = []
        self._clock = clock
        self._script_of = script_of
        self._complete, self._beat, self._report = complete, beat, report
        self._machines: dict[str, _Machine] = {}
        self._due: list[tuple[float, int, _Machine, Callable[[_Machine], None]]] = []
        self._serial = 0
        self._watchers: list[Callable[[str], object]] = []
        self._undrive = clock.drive(self.step)

    def connect(self, act: Callable[[str, Mapping[str, str]], object]) -> None:
        """Have hooks completed by `cloud.act`, as user data names them."""

        def call(action: str, instance_id: str, user_data: bytes, **more: str) -> None:
            hook = calve_of(user_data).get("hook")
            if isinstance(hook, dict):
                named = {"AutoScalingGroupName": hook["group"], "LifecycleHookName": hook["name"]}
                act(action, {**named, "InstanceId": instance_id, **more})

        def complete(instance_id: str, user_data: bytes, result: Result) -> None:
            name = "CompleteLifecycleAction"
            call(name, instance_id, user_data, LifecycleActionResult=result.value)

        self._complete = complete
        self._beat = functools.partial(call, "RecordLifecycleActionHeartbeat")

    def watch(self, watcher: Callable[[str], object]) -> None:
        """Call `watcher` with an instance's id whenever what it serves changes."""
        self._watchers.append(watcher)

    def step(self) -> float | None:
        """Do what is due; see `virtual.Step`."""
        now, did = self._clock.monotonic(), False
        while self._due and (self._due[0][0] <= now or not self._due[0][2].on):
            _, _, machine, deed = heapq.heappop(self._due)
            if machine.on:
                deed(machine)
                did = True
        if did:
            return now
        return self._due[0][0] if self._due else None

    # Machines

    def launch(self, launch: Launch) -> None:
        """Begin a machine's script; CalveError where `script_of` raises it."""
        script = self._script_of(launch)
        self.launches.append(launch)
        high, low = divmod(len(self.launches), 256)
        address = (f"10.0.{high % 256}.{low}", 80)
        machine = _Machine(launch, script, self._clock.monotonic(), address)
        self._machines[launch.instance_id] = machine
        for at_s, code in script.serves:
            self._at(at_s, machine, functools.partial(self._serve, code=code))
        for at_s in script.reports:
            self._at(at_s, machine, self._write)
        if script.beat_s is not None and script.result is not None:
            self._at(script.beat_s, machine, self._keep)
        if script.result is not None:
            self._at(script.result[0], machine, self._end_wait)
        if script.off_at_s is not None:
            self._at(script.off_at_s, machine, self._off)

    def address(self, instance_id: str) -> tuple[str, int] | None:
        """Return an address where nobody listens; None for an unknown machine."""
        machine = self._machines.get(instance_id)
        return None if machine is None else machine.address

    def running(self, instance_id: str) -> bool:
        """Say whether it is on."""
        machine = self._machines.get(instance_id)
        return machine is not None and machine.on

    def code(self, instance_id: str) -> int | None:
        """Return the HTTP status with which it answers now; None where it does not answer."""
        machine = self._machines.get(instance_id)
        return machine.code if machine is not None and machine.on else None

    def console(self, instance_id: str) -> bytes:
        """Return what its console said so far."""
        machine = self._machines.get(instance_id)
        return b"" if machine is None else self._said(machine).encode()

    def kill(self, instance_id: str) -> None:
        """Power it off now, as a crash of its host would."""
        machine = self._machines.get(instance_id)
        if machine is not None and machine.on:
            self._off(machine)

    def terminate(self, instance_id: str) -> None:
        """End it; nothing happens where it is off already, or unknown."""
        self.kill(instance_id)

    def close(self) -> None:
        """End all machines and leave the clock; idempotent."""
        self._undrive()
        for instance_id in self._machines:
            self.kill(instance_id)

    # Deeds

    def _at(self, at_s: float, machine: _Machine, deed: Callable[[_Machine], None]) -> None:
        self._serial += 1
        heapq.heappush(self._due, (machine.began + at_s, self._serial, machine, deed))

    def _serve(self, machine: _Machine, code: int | None) -> None:
        machine.code = code
        for watcher in self._watchers:
            watcher(machine.launch.instance_id)

    def _off(self, machine: _Machine) -> None:
        machine.on, machine.ended_at = False, self._clock.monotonic()
        self._serve(machine, None)

    def _write(self, machine: _Machine) -> None:
        if self._report is not None:
            launch = machine.launch
            self._report(launch.instance_id, launch.user_data, self._said(machine))

    def _keep(self, machine: _Machine) -> None:
        script, age_s = machine.script, self._clock.monotonic() - machine.began
        if script.beat_s is None or script.result is None or age_s >= script.result[0]:
            return
        if self._beat is not None:
            self._tell(machine, self._beat, machine.launch.instance_id, machine.launch.user_data)
        self._at(age_s + script.beat_s, machine, self._keep)

    def _end_wait(self, machine: _Machine) -> None:
        if self._complete is not None and machine.script.result is not None:
            launch, (_, result) = machine.launch, machine.script.result
            self._tell(machine, self._complete, launch.instance_id, launch.user_data, result)

    def _tell(self, machine: _Machine, call: Callable[..., object], *arguments: object) -> None:
        """Call outside; who is refused says so on the console and goes on, as a machine does."""
        try:
            call(*arguments)
        except (CalveError, Refusal) as error:
            machine.said.append((self._clock.monotonic(), f"calve: the hook: {error}"))

    def _said(self, machine: _Machine) -> str:
        until = self._clock.monotonic() if machine.ended_at is None else machine.ended_at
        scripted = [(machine.began + at_s, text) for at_s, text in machine.script.lines]
        said = sorted([*scripted, *machine.said], key=lambda line: line[0])
        return "".join(f"{text}\n" for at, text in said if at <= until)


def calve_of(user_data: bytes) -> dict[str, Any]:
    """Return the member `calve` of a launch's user data; {} where it has none."""
    try:
        document = json.loads(user_data)
    except ValueError:
        return {}
    found = document.get("calve") if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {}
