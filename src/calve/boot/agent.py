"""The agent: user data → manifest → pre-flight → pull → commit → profile, or a failure with its code.

What decides is elsewhere and pure (`contract.userdata`, `preflight.check`, `failure.classify`); this acts, in order.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import calve
from calve.boot import fallback, handover, memory, preflight, served
from calve.boot.console import Console
from calve.boot.depart import depart
from calve.boot.failure import Failure, classify
from calve.boot.grow import grow
from calve.boot.handoff import Handoff
from calve.boot.policy import Policy
from calve.boot.store import BootStore, profile_system
from calve.boot.uplink import beat
from calve.cache import keyring, pull
from calve.cache.manifest import key
from calve.cache.objects import Objects, is_missing, open_objects
from calve.clock import SYSTEM, Clock
from calve.contract import evidence, userdata
from calve.contract.codes import Code
from calve.contract.userdata import UserData, UserDataError
from calve.errors import (
    AccessError,
    CalveError,
    CancelledError,
    DamagedError,
    UsageError,
    VerificationError,
)
from calve.nix.signing import Keyring
from calve.nix.storepath import StorePath
from calve.progress import Event, Step
from calve.tasks import Cancel, Group, limit_arenas
from calve.transport import imds
from calve.transport.http import Client, tls_context
from calve.transport.retry import Policy as Retries
from calve.transport.retry import delay

__all__ = ["Agent"]

_SAMPLE_S: Final = 0.5
_REPORT_S: Final = 2.0
_PATIENCE_S: Final = 30.0
_NO_NETWORK: Final = "no-network"
_REASON_CHARS: Final = 300
_AGAIN: Final = Retries(attempts=None, base_s=1.0, cap_s=5.0)
_PATIENT: Final = Retries(attempts=None)  # to the deadline of an object, and of the whole boot
# Measured (VmHWM): the interpreter and a plan of 3,000 paths; a decoder's window at zstd's level 19; a connection's
# buffers. The first two bound what a cache can make us take, whatever it was compressed with.
_MB_FIXED: Final = 26
_MB_PER_DECODER: Final = 8.5
_MB_PER_JOB: Final = 0.5


@dataclass(slots=True)
class _Figures:
    """What the report says of this boot."""

    fetched_bytes: int = 0
    nar_bytes: int = 0
    paths: int = 0
    lowest_available: int = field(default_factory=memory.available_bytes)
    step: Step | None = None


class Agent:
    """One boot. `run` returns the exit status of the process."""

    def __init__(
        self,
        policy: Policy,
        console: Console,
        clock: Clock = SYSTEM,
        *,
        handoff: Handoff | None = None,
    ) -> None:
        self._policy = policy
        self._handoff = Handoff(policy.root) if handoff is None else handoff
        self._console = console
        self._clock = clock
        self._phase = "imds"
        self._figures = _Figures()
        self._started = clock.monotonic()
        self._wanted: UserData | None = None
        self._held = False  # a launch hook waits for this machine
        self._data = b""  # user data, as it came

    def run(self) -> int:
        """Boot; 0 where the profile names the system to start, else 1, after all that a failure asks for.

        Does not return where the system needs a kernel of its own: then that starts.
        """
        limit_arenas()
        self._console.emit(
            "start",
            agent=calve.__version__,
            contract=[userdata.VERSION, evidence.VERSION],
            kernel=os.uname().release,
        )
        try:
            self._boot()
            self._leave()
        except Exception as error:  # noqa: BLE001  (the last place: everything becomes a code)
            failure = classify(self._phase, error)
            if self._falls_back(failure):
                return 0
            self._fail(failure, error)
            return 1
        return 0

    def _leave(self) -> None:
        handover.write(self._policy, self._data, self._console.transcript())
        self._handoff.leave()

    def _fail(self, failure: Failure, error: Exception) -> None:
        if failure.code is Code.INTERNAL and not isinstance(error, CalveError):
            self._console.write("".join(traceback.format_exception(error)))
        self._console.emit("fail", code=failure.code, phase=failure.phase, message=failure.message)
        depart(self._policy, self._console, self._wanted, clock=self._clock)

    def _falls_back(self, failure: Failure) -> bool:
        """Start another system in place of the one that failed, where that may be; say whether it can."""
        root = self._policy.root
        system = fallback.after(
            failure, served.read(root), current=profile_system(root), rescue=self._policy.rescue
        )
        if system is None:
            return False
        try:
            with BootStore(root) as store:
                self._degrade(system, failure.code, failure.message)
                self._finish(store, system)
            self._enter(self._handoff.phase)
            self._leave()
        except Exception as error:  # noqa: BLE001  (likewise; what was wrong first is what is told)
            self._console.emit("note", message=f"cannot fall back: {error}")
            return False
        return True

    def _degrade(self, system: StorePath, code: str, message: str) -> None:
        """Say that it is another system that goes on."""
        self._console.emit("degraded", system=str(system), code=code, message=message)

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._console.phase(phase)

    def _boot(self) -> None:
        cancel = Cancel()
        done = threading.Event()
        finished = False
        try:
            with Group("agent", limit=2, parent=cancel) as group:
                group.spawn(self._watch, done, group.cancel)
                try:
                    self._work(group, done)
                    finished = True
                finally:
                    done.set()
        except CancelledError as error:
            if (
                finished
            ):  # the deadline passed in the last moment: the system is committed all the same
                return
            if self._late():
                raise UserDataError(
                    Code.DEADLINE, f"not done after {self._deadline_s:.0f} s"
                ) from error
            raise

    def _work(self, group: Group, done: threading.Event) -> None:
        cancel = group.cancel
        self._check_network()
        self._enter("imds")
        with contextlib.ExitStack() as owner:
            metadata = imds.client(cancel=cancel)
            owner.callback(metadata.close)
            service = imds.Imds(metadata, self._policy.imds)
            data = service.user_data()
            wanted = self._wanted = UserData.parse(data)
            self._data = data or b""
            roots = Keyring.parse(self._policy.keys)
            known = served.read(self._policy.root)
            self._held = wanted.hook is not None and known.good is None
            if self._held:
                group.spawn(beat, self._policy, wanted, done, cancel, self._clock)
            system = fallback.instead(_system(wanted.system), known)
            if str(system) != wanted.system:
                self._degrade(system, Code.UNHEALTHY, f"{wanted.system} was not healthy here")
            store = owner.enter_context(BootStore(self._policy.root))
            if not store.whole(system):
                client = Client(
                    context=tls_context(self._policy.ca_file), cancel=cancel, retries=_PATIENT
                )
                owner.callback(client.close)
                role = imds.Role(service)
                caches = [_cache(url, client, role) for url in wanted.caches]
                self._enter("manifest")
                self._await_access(caches, wanted.manifest, cancel)
                answered, trusted = self._trust(store, caches, roots, wanted.keys)
                plan = pull.plan(
                    answered,
                    [system],
                    store,
                    trusted,
                    manifest=wanted.manifest,
                    cancel=cancel,
                    progress=self._listen,
                )
                self._grow()
                self._fetch(store, plan, cancel)
            cancel.check()
            self._finish(store, system)
        self._enter(self._handoff.phase)

    def _finish(self, store: BootStore, system: StorePath) -> None:
        """Make a system that is whole on the disk the one that starts."""
        self._enter("commit")
        self._check_system(system)
        self._handoff.prepare(system)
        if self._held:
            self._handoff.check_health(system)
        generation = store.finish(system)
        figures, wanted = self._figures, self._wanted
        self._console.emit(
            "ready",
            system=str(system),
            # Another system than the one that was wanted is of another release; of which, nobody knows here.
            **({"release": wanted.release} if wanted and str(system) == wanted.system else {}),
            generation=generation,
            paths=figures.paths,
            nar_bytes=figures.nar_bytes,
            fetched_bytes=figures.fetched_bytes,
            agent_peak_mb=_mb(memory.peak_bytes()),
            lowest_available_mb=_mb(min(figures.lowest_available, memory.available_bytes())),
            **({"note": self._handoff.note} if self._handoff.note else {}),
        )

    def _await_access(self, caches: Sequence[Objects], manifest: str, cancel: Cancel) -> None:
        """Wait for a while where access is denied: AWS takes seconds until a new role may what it may.

        Only then does "denied" say "missing", of a keyring too. At most a third of the deadline goes by with it, so
        that what was denied is told.
        """
        patience_s = min(_PATIENCE_S, self._deadline_s / 3)
        begun_s = self._clock.monotonic()
        attempt = 0
        while all(_denied(cache, key(manifest)) for cache in caches):
            left_s = patience_s - (self._clock.monotonic() - begun_s)
            if left_s <= 0:
                return  # what needs the access says so
            attempt += 1
            cancel.wait(min(left_s, delay(_AGAIN, attempt, random.random())), self._clock)  # noqa: S311  (jitter)

    def _grow(self) -> None:
        """Let the root file system fill its disk; where it cannot, pre-flight judges what there is."""
        try:
            grown = grow(self._policy.root)
        except (CalveError, OSError) as error:
            self._console.emit("grown", message=str(error))
            return
        if grown is not None:
            before, after = _mb(grown.before_bytes), _mb(grown.after_bytes)
            self._console.emit("grown", before_mb=before, after_mb=after)

    def _fetch(self, store: BootStore, plan: pull.PullPlan, cancel: Cancel) -> None:
        jobs, decoders = _concurrency(self._policy.memory_mb)
        preflight.check(
            preflight.measure(self._policy.root, memory.available_bytes()),
            nar_bytes=plan.nar_bytes,
            paths=len(plan.missing),
            budget_bytes=self._policy.memory_mb << 20,
        )
        self._enter("pull")
        pulled = pull.pull(
            plan, store, jobs=jobs, decoders=decoders, progress=self._listen, cancel=cancel
        )
        self._figures.paths = pulled.paths
        self._figures.nar_bytes = pulled.nar_bytes
        self._figures.fetched_bytes = pulled.fetched_bytes

    def _trust(
        self, store: BootStore, caches: Sequence[Objects], roots: Keyring, names: Sequence[str]
    ) -> tuple[Sequence[Objects], Keyring]:
        """Read the caches' keyrings; return the caches that answered, and the keys that user data chooses.

        A name that nobody knows is an error. One that was revoked counts no longer, which is one if none is left:
        user data outlives a key.
        """
        if not roots.keys:
            raise UserDataError(Code.KEY_UNKNOWN, "the image trusts no key")
        try:
            found = keyring.trusted(caches, roots, store.sequences())
        except VerificationError as error:
            raise UserDataError(Code.CACHE_UNTRUSTED, str(error)) from error
        store.remember(found.sequences)
        chosen = tuple(key for key in found.keyring.keys if key.name in names)
        heard = {key.name for key in (*found.keyring.keys, *found.revoked)}
        wrong = [name for name in names if name not in heard or not chosen]
        if wrong:
            known = ", ".join(sorted({key.name for key in found.keyring.keys}))
            raise UserDataError(
                Code.KEY_UNKNOWN, f"image and keyring trust {known}, not {', '.join(wrong)}"
            )
        return found.caches, Keyring(chosen)

    def _check_network(self) -> None:
        """Fail where the initrd left word that there is no network: a machine that has served need not end there."""
        try:
            reason = (self._policy.run / _NO_NETWORK).read_text("utf-8", "replace").strip()
        except FileNotFoundError:
            return
        self._phase = "network"
        raise UserDataError(Code.IMDS_UNREACHABLE, reason[:_REASON_CHARS])

    def _check_system(self, system: StorePath) -> None:
        init = self._policy.root / str(system).lstrip("/") / "init"
        if not os.path.lexists(init):
            raise UserDataError(Code.SYSTEM_INVALID, f"{system} has no init")

    # What runs beside

    @property
    def _deadline_s(self) -> float:
        return float("inf") if self._wanted is None else self._wanted.deadline_s

    def _late(self) -> bool:
        return self._clock.monotonic() - self._started > self._deadline_s

    def _listen(self, event: Event) -> None:
        if isinstance(event, Step):
            self._figures.step = event

    def _watch(self, done: threading.Event, cancel: Cancel) -> None:
        """Sample memory, tell of progress, and end a boot that takes too long."""
        reported = self._clock.monotonic()
        while not self._clock.wait(done, _SAMPLE_S):
            available = memory.available_bytes()
            self._figures.lowest_available = min(self._figures.lowest_available, available)
            if self._late():
                cancel.cancel()
                return
            step = self._figures.step
            if step is not None and self._clock.monotonic() - reported >= _REPORT_S:
                reported = self._clock.monotonic()
                self._console.emit(
                    "progress",
                    n=self._phase,
                    done=step.done,
                    total=step.total,
                    unit=step.unit,
                    available_mb=_mb(available),
                )


def _denied(cache: Objects, name: str) -> bool:
    """Say whether a cache denies to look at an object, which may also be missing."""
    try:
        cache.head(name)
    except AccessError as error:
        return is_missing(error)
    except CalveError:
        pass  # whoever reads it is told
    return False


def _system(text: str) -> StorePath:
    """Read user data's system; UserDataError where it is no store path after all."""
    try:
        return StorePath.parse(text)
    except DamagedError as error:
        raise UserDataError(Code.USERDATA_MALFORMED, f"user data: calve.system: {error}") from error


def _cache(url: str, client: Client, role: imds.Role) -> Objects:
    """Open one of user data's caches; UserDataError where its URL is not one."""
    try:
        return open_objects(url, client, role)
    except UsageError as error:
        raise UserDataError(Code.USERDATA_MALFORMED, f"user data: calve.caches: {error}") from error


def _concurrency(budget_mb: int) -> tuple[int, int]:
    """Return (connections, decoders) for a memory budget in MB."""
    decoders = max(1, min(3, int((budget_mb - _MB_FIXED) / _MB_PER_DECODER)))
    left = budget_mb - _MB_FIXED - decoders * _MB_PER_DECODER
    return max(1, min(8, int(left / _MB_PER_JOB))), decoders


def _mb(count: int) -> float:
    return round(count / 1e6, 1)
