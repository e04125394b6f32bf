"""A region, and machines of 512 MB that are booted in it one at a time, each watched until it has done what counts."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks._rows import Run, busy_s
from calve.cache.lookup import narinfo_key, read_narinfo
from calve.cache.objects import Objects, open_objects
from calve.cache.push import push
from calve.contract.evidence import Evidence, read
from calve.contract.userdata import UserData
from calve.demo.report import phases
from calve.demo.workshop import Workshop
from calve.demo.world import BUCKET, COMMAND_LINE, World
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.region.machine import Launch
from calve.region.qemu import MachineImage
from calve.region.signature import ANONYMOUS, Allow
from calve.transport.http import Client

WITHIN_S = 600.0
"""How long a machine may take to its answer; one that takes longer is counted with this."""
LONGEST_S = 1800.0
"""How long the agent may take, with whatever closure."""
DISK_BYTES = 2 << 30

_POLL_S = 0.05
_LAST_LINES = 12


@dataclass(frozen=True)
class Booted:
    """One boot.

    Attributes:
        seconds: from the kernel's start to the first answer with the release's page, or to the event that was
            waited for; None where it did not come.
        phases: names and seconds.
        events: what the machine said.
        last_lines: of its console.
        run: wall time (the longest where it did not come), CPU of QEMU, requests; failed where the machine said so.
    """

    seconds: float | None
    phases: tuple[tuple[str, float], ...]
    events: tuple[Evidence, ...]
    last_lines: tuple[str, ...]
    run: Run

    def event(self, kind: str) -> dict[str, Any]:
        """Return the fields of the last event of a kind; empty where there is none."""
        found = [event.fields for event in self.events if event.kind == kind]
        return found[-1] if found else {}


class Rig:
    """The region, while the block lasts.

    Args:
        workshop: has what machines are made of.
        directory: of its own.
    """

    def __init__(self, workshop: Workshop, directory: Path) -> None:
        self.workshop = workshop
        self.world = World(directory)
        # Nix reads the same bucket as a plain binary cache over HTTP: Debian's does not sign requests.
        arn = f"arn:aws:s3:::{BUCKET}/*"
        self.world.principals.set_policy(ANONYMOUS.principal, [Allow("s3:GetObject", arn)])
        self._client = Client(context=None, cancel=None)
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self._client.close)
            undo.enter_context(self.world)
            self._owner = undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner.close()

    @property
    def cache(self) -> Objects:
        """Return the bucket, for the operator."""
        return open_objects(
            self.world.operator_cache, self._client, self.world.operator_credentials
        )

    @property
    def plain_cache(self) -> str:
        """Return the bucket's address for machines that do not sign."""
        endpoint = self.world.machine_cache.partition("endpoint=")[2]
        return f"{endpoint.replace('%3A', ':').replace('%2F', '/')}/{BUCKET}"

    def push(self, store: LocalStore, system: StorePath) -> bytes:
        """Push a system; return the user data with which a machine becomes it."""
        pushed = push(store, [system], self.cache, self.workshop.key())
        self._let_nix_have(system)
        return UserData(
            system=str(system),
            caches=(self.world.machine_cache,),
            manifest=pushed.manifests[system],
            keys=(self.workshop.key().name,),
            fleet="bench",
            release=1,
            deadline_s=int(LONGEST_S),
        ).dump()

    def _let_nix_have(self, system: StorePath) -> None:
        """Take the content address out of the toplevel's narinfo; its signature stands.

        Nix 2.17 to 2.34 reckons that of a path which refers to itself otherwise than Nix before and after, and refuses
        it: https://github.com/NixOS/nix/issues/15837. Our machines read the manifest.
        """
        entry = read_narinfo(self.cache, system)
        signed = replace(entry, info=replace(entry.info, ca=None))
        self.cache.put(narinfo_key(system), signed.dump())

    def image(self, initrd: Path, disk: Path) -> MachineImage:
        return MachineImage(self.workshop.kernel().image, initrd, COMMAND_LINE, disk)

    def boot(self, image: MachineImage, user_data: bytes, *, page: str = "") -> Booted:
        """Boot a machine, wait for its page (or, without one, until its system is committed), end it."""
        within_s = WITHIN_S if page else LONGEST_S
        name = f"i-{next(self._numbers):017x}"
        machines = self.world.machines
        machines.images[name] = image
        requests = sum(self.world.objects.counts.values())
        cpu_before_s, busy_before_s = _children_s(), busy_s()
        machines.launch(Launch(name, name, "t3.nano", user_data))
        try:
            watch = _Watch(lambda: machines.console(name))
            while time.monotonic() < watch.begun_s + within_s and machines.running(name):
                if watch.look(lambda: _answers(machines.address(name), page), page=page):
                    break
                time.sleep(_POLL_S)
        finally:
            machines.terminate(name)
        cpu_s = _children_s() - cpu_before_s
        last_lines = watch.text.splitlines()[-_LAST_LINES:]
        seconds = watch.seconds
        run = Run(
            within_s if seconds is None else seconds,
            cpu_s,
            0.0,
            sum(self.world.objects.counts.values()) - requests,
            failed="\n".join(last_lines) if watch.failed else "",
            others_s=max(0.0, busy_s() - busy_before_s - cpu_s),
        )
        return Booted(
            seconds,
            tuple(phases(watch.events, seconds)),
            watch.events,
            tuple(last_lines),
            run,
        )


class _Watch:
    """What is seen of a machine."""

    def __init__(self, console: Callable[[], bytes]) -> None:
        self._console = console
        self._kernel_s: float | None = None  # when, by our clock, the kernel started
        self.begun_s = time.monotonic()
        self.text = ""
        self.events: tuple[Evidence, ...] = ()
        self.seconds: float | None = None
        self.failed = False

    def look(self, answers: Callable[[], bool], *, page: str) -> bool:
        """Look once; say whether it is over."""
        now_s = time.monotonic()
        self.text = self._console().decode("utf-8", "replace")
        heard = len(self.events)
        self.events = tuple(read(self.text))
        for event in self.events[heard:]:
            # A line is seen a little late, never early: the earliest start that one of them tells is the nearest.
            start_s = now_s - event.at_s
            self._kernel_s = start_s if self._kernel_s is None else min(self._kernel_s, start_s)
        kinds = {(event.kind, event.fields.get("n")) for event in self.events}
        if any(kind == "fail" for kind, _ in kinds):
            self.failed = True
            return True
        if not page:
            ready = [event.at_s for event in self.events if event.kind == "ready"]
            self.seconds = ready[0] if ready else None
            return bool(ready)
        # Not before stage 2: until the network is up, a connection waits long before it fails.
        if ("phase", "answer") in kinds and answers() and self._kernel_s is not None:
            self.seconds = time.monotonic() - self._kernel_s
            return True
        return False


def _answers(address: tuple[str, int] | None, page: str) -> bool:
    if address is None:
        return False
    connection = http.client.HTTPConnection(*address, timeout=2.0)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        return answer.status == 200 and page in answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
