"""Stage 2 of a boot, judged: healthy within its time, or not; and what follows from it.

The order where all is well: the launch hook completed, the system remembered as good, the report. Where it is not:
what the journal says, the failure's line, then as the agent ends (`boot.depart`). A machine that has served before
remembers the system as bad, and starts again: its agent goes back to the last good one.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from dataclasses import dataclass, field
from typing import Final

from calve import process
from calve.boot import served
from calve.boot.console import Console
from calve.boot.depart import depart
from calve.boot.policy import Policy
from calve.boot.store import profile_system
from calve.boot.uplink import CONTINUE, beat, open_uplink
from calve.clock import SYSTEM, Clock
from calve.contract.codes import Code
from calve.contract.health import Health
from calve.contract.userdata import UserData
from calve.errors import AccessError, CalveError, CancelledError
from calve.health.probe import Probe
from calve.nix.storepath import StorePath
from calve.tasks import Cancel, Group
from calve.transport.http import Client

__all__ = ["Confirmation", "Outcome"]

_PAUSE_S: Final = 1.0
_JOURNAL: Final = (
    "journalctl", "--boot", "--no-pager", "--priority=warning", "--lines=40", "--output=short-monotonic",
)  # fmt: skip
_JOURNAL_CHARS: Final = 6000


class Outcome(enum.IntEnum):
    """What the service manager is to do; the exit status of the process."""

    HEALTHY = 0
    POWER_OFF = 1
    REBOOT = 3


@dataclass(frozen=True, slots=True)
class Confirmation:
    """One judgement.

    Attributes:
        policy: the image's; its root is this machine's.
        console: takes the evidence.
        wanted: user data; None where the machine was started without ours.
        closure: what the closure asks for.
        clock: for waits.
    """

    policy: Policy
    console: Console
    wanted: UserData | None
    closure: Health = field(default_factory=Health)
    clock: Clock = SYSTEM

    def run(self) -> Outcome:
        """Wait until all holds, or its time is over; do what follows."""
        self.console.phase("health")
        running = profile_system(self.policy.root)
        reasons = self._wait()
        if reasons:
            self._tell_journal()
            return self.fail(Code.UNHEALTHY, "; ".join(reasons))
        try:
            self._proceed()
        except CalveError as error:
            code = Code.HOOK_DENIED if isinstance(error, AccessError) else Code.HOOK_UNREACHABLE
            return self.fail(code, str(error))
        as_wanted = self.wanted is not None and str(running) == self.wanted.system
        if as_wanted and running is not None:
            self._remember(running)
        self.console.emit("healthy", system=str(running), as_wanted=as_wanted)
        self._report()
        return Outcome.HEALTHY

    @property
    def health(self) -> Health:
        """Return what must hold: what user data says goes before the closure's time."""
        said = None if self.wanted is None else self.wanted.health
        return self.closure if said is None else said.with_more(self.closure)

    @property
    def _held(self) -> UserData | None:
        """Return the user data of a machine that its launch hook holds; None where nothing does."""
        wanted = self.wanted
        return wanted if wanted is not None and wanted.hook is not None and self._is_new else None

    @property
    def _is_new(self) -> bool:
        return served.read(self.policy.root).good is None

    def _wait(self) -> list[str]:
        """Return what does not hold when the time is over; nothing as soon as all does."""
        cancel, done = Cancel(), threading.Event()
        health = self.health
        end_s = self.clock.monotonic() + health.within_s
        reasons: list[str] | None = None
        probe: Probe | None = None
        try:
            with Group("health", limit=2, parent=cancel) as group:
                group.spawn(self._end, end_s, done, group.cancel)
                if (held := self._held) is not None:
                    group.spawn(beat, self.policy, held, done, group.cancel, self.clock)
                try:
                    with Client(cancel=group.cancel) as client:
                        probe = Probe(health, client, group.cancel)
                        while reasons := probe.failing():
                            group.cancel.wait(_PAUSE_S, self.clock)
                finally:
                    done.set()
        except CancelledError:
            if reasons == []:
                return []  # all held just when the time was over
            return _found(probe, reasons)
        return reasons or []

    def _end(self, end_s: float, done: threading.Event, cancel: Cancel) -> None:
        if not self.clock.wait(done, end_s - self.clock.monotonic()):
            cancel.cancel()

    def _remember(self, system: StorePath) -> None:
        """Remember the system as good. A machine that serves goes on serving where its disk cannot be written."""
        try:
            served.confirm(self.policy.root, system)
        except OSError as error:
            self.console.emit("note", message=f"it is not remembered as good: {error}")

    def _reject(self, system: StorePath) -> bool:
        """Remember the system as bad; say whether the machine may start again, with another one."""
        try:
            known = served.reject(self.policy.root, system)
        except OSError as error:
            self.console.emit("note", message=f"it is not remembered as bad: {error}")
            return False
        return known.good not in {None, system}

    def _proceed(self) -> None:
        if (held := self._held) is not None:
            with open_uplink(self.policy, held, clock=self.clock) as uplink:
                uplink.complete(CONTINUE)

    def _report(self) -> None:
        if self.wanted is None or not self.wanted.reports:
            return
        try:
            with open_uplink(self.policy, self.wanted, clock=self.clock) as uplink:
                uplink.report(self.console.transcript())
        except CalveError as error:
            self.console.emit("note", message=f"the report: {error}")

    def _tell_journal(self) -> None:
        """Put what the journal has of warnings and worse on the console, ahead of the failure's line."""
        with contextlib.suppress(CalveError):
            said = process.run(_JOURNAL, check=False).stdout.decode("utf-8", "replace")
            for line in said[-_JOURNAL_CHARS:].splitlines():
                self.console.write("".join(c if c.isprintable() else " " for c in line) + "\n")

    def fail(self, code: Code, message: str) -> Outcome:
        """Tell why, hold, let go of the hook; of a bad system, a machine that has served goes back to its last good one."""
        running = profile_system(self.policy.root)
        bad = running if code is Code.UNHEALTHY else None
        again = bad is not None and not self._is_new and self._reject(bad)
        self.console.emit("fail", code=code, phase="health", message=message)
        depart(self.policy, self.console, self.wanted, clock=self.clock)
        return Outcome.REBOOT if again else Outcome.POWER_OFF


def _found(probe: Probe | None, reasons: list[str] | None) -> list[str]:
    """Return what did not hold when the time was over: of the round under way, else of the last one."""
    if probe is None:
        return ["nothing was found out"]
    hung = [f"{probe.now}: no answer in time"] if probe.now else []
    return [*(probe.found or reasons or []), *hung] or ["nothing was found out"]
