"""Writes a planned disk into an EBS snapshot: begun, sent block by block, sealed, and waited for.

Killed anywhere and run again it goes on with the same snapshot: the plan gives the client's token, and a journal beside
the disk says which blocks were sent. Nobody who looks at the snapshot before it is `completed` can use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol, TypeVar

from calve.aws.ebs import EbsDirect, Started
from calve.clock import SYSTEM, Clock
from calve.errors import (
    ConflictError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    RefusedError,
)
from calve.image import journal
from calve.image.journal import Begun, Journal
from calve.image.plan import BlockPlan
from calve.image.schedule import Limits
from calve.image.sending import Sending
from calve.image.waiting import until
from calve.progress import Note, Progress, silent
from calve.tasks import Cancel
from calve.transport import retry

__all__ = ["Snapshot", "Snapshots", "Upload", "abort", "journal_of"]

T = TypeVar("T")

_ATTEMPTS: Final = 8
_CONNECT_S: Final = 3.0
_READ_S: Final = 12.0
_DONE_S: Final = 600.0
_SEALED_S: Final = 60.0
_PAUSE_S: Final = 2.0
_CONTROL: Final = retry.Policy(attempts=None, base_s=0.2, cap_s=5.0, deadline_s=120.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A completed snapshot.

    Attributes:
        id: of EC2.
        blocks: that were sent for it, by this run and those before.
        requests: PutSnapshotBlock that this run sent.
    """

    id: str
    blocks: int
    requests: int


class Snapshots(Protocol):
    """What is asked of EC2 about a snapshot."""

    def snapshot_state(self, snapshot: str) -> tuple[str, str] | None:
        """Return its state (`pending`, `completed`, `error`) and message; None where it is not known (yet)."""


class Deletes(Snapshots, Protocol):
    """What also deletes snapshots."""

    def delete_snapshot(self, snapshot: str) -> None:
        """Delete a snapshot, pending ones too; NotFoundError where there is none."""


def journal_of(path: Path, region: str) -> Path:
    """Return where the journal of a disk's upload into a region lies."""
    return path.with_name(f"{path.name}.{region}.upload")


def abort(ec2: Deletes, place: Path) -> str | None:
    """Delete the pending snapshot that a journal names; the next upload begins another.

    Returns:
        Its id; None where nothing is pending.
    """
    begun = journal.read(place)
    if begun is None or not begun.snapshot:
        return None
    found = ec2.snapshot_state(begun.snapshot)
    if found is not None and found[0] == "completed":
        journal.forget(place)  # the upload was over, and only its run not
        return None
    if found is not None:
        ec2.delete_snapshot(begun.snapshot)
    # The token that began it gives the deleted one for ever.
    Journal.open(place, Begun(begun.plan, begun.region, begun.attempt + 1, "")).close()
    return None if found is None else begun.snapshot


@dataclass(frozen=True, slots=True)
class Upload:
    """One disk into one region.

    Attributes:
        ebs: of the region.
        ec2: of the region.
        region: its name.
        path: the raw disk, or the overlay upon its parent.
        plan: what of it to write.
        tags: the snapshot's.
        description: likewise.
        progress: told of bytes.
        cancel: ends it; the snapshot stays pending then, and the journal beside the disk.
        limits: bounds of what is in flight.
        clock: for waits.
    """

    ebs: EbsDirect
    ec2: Snapshots
    region: str
    path: Path
    plan: BlockPlan
    tags: Mapping[str, str]
    description: str = ""
    progress: Progress = silent
    cancel: Cancel = field(default_factory=Cancel)
    limits: Limits = field(default_factory=Limits)
    clock: Clock = SYSTEM

    @property
    def journal(self) -> Path:
        """Return where the journal lies."""
        return journal_of(self.path, self.region)

    def run(self) -> Snapshot:
        """Return when the snapshot is completed.

        Raises:
            DamagedError: the disk is not what was planned.
            CalveError: of the service; AccessError and RefusedError at once, DeadlineError after its time.
        """
        begun, state = self._begin()
        requests = 0
        if state != "completed":
            try:
                requests = self._send(begun)
            except NotFoundError:
                Journal.open(self.journal, self._next_to(begun)).close()
                raise
            self._seal(begun.snapshot)
            self._wait(begun.snapshot)
        journal.forget(self.journal)
        return Snapshot(begun.snapshot, len(self.plan.blocks), requests)

    # The beginning

    def _begin(self) -> tuple[Begun, str]:
        """Find the snapshot that an earlier run began with this plan, or begin one."""
        known = journal.read(self.journal)
        plan = self.plan.digest
        if known is None or (known.plan, known.region) != (plan, self.region):
            known = Begun(plan, self.region, 0, "")
        for attempt in range(known.attempt, known.attempt + _ATTEMPTS):
            try:
                started = self._start(attempt)
            except ConflictError:
                continue  # a snapshot of that token has other tags: another version of us
            state = self._state(started.id)
            written = known.snapshot == started.id and known.done
            if state is None and not written and self._is_new(started):
                state = started.status  # EC2 may not know a new one for a while
            if state not in {"pending", "completed"}:
                continue  # it ended in error, or was deleted: its token is spent
            done = known.done if known.snapshot == started.id else frozenset[int]()
            return replace(known, attempt=attempt, snapshot=started.id, done=done), state
        raise ConflictError(
            f"{_ATTEMPTS} snapshots of this plan ended in error", hint="calve image list"
        )

    @staticmethod
    def _next_to(begun: Begun) -> Begun:
        """Return what the next run finds where a snapshot is not there: another one is to be begun."""
        return replace(begun, attempt=begun.attempt + 1, snapshot="", done=frozenset())

    def _is_new(self, started: Started) -> bool:
        """Say whether EC2 may be yet to know a snapshot; an older one that it does not know was deleted."""
        now_s = self.clock.now().timestamp()
        return started.started_s is None or now_s - started.started_s < self.limits.unknown_s

    def _start(self, attempt: int) -> Started:
        return self._patiently(
            lambda: self.ebs.start(
                self.plan.size_gib,
                token=self.plan.token(self.region, attempt),
                parent=self.plan.parent,
                description=self.description,
                tags=self.tags,
            )
        )

    def _state(self, snapshot: str) -> str | None:
        found = self._patiently(lambda: self.ec2.snapshot_state(snapshot))
        return None if found is None else found[0]

    def _send(self, begun: Begun) -> int:
        """Send what is not sent yet; return how many requests that took."""
        left = [block for block in self.plan.blocks if block.index not in begun.done]
        taken = Journal.open(self.journal, begun)
        with closing(taken), self.ebs.apart(connect_s=_CONNECT_S, read_s=_READ_S) as puts:
            sending = Sending(
                puts,
                begun.snapshot,
                self.path,
                left,
                taken=taken.done,
                limits=self.limits,
                progress=self.progress,
                clock=self.clock,
            )
            return sending.run(self.cancel)

    # The end

    def _seal(self, snapshot: str) -> None:
        """Seal it. One that a lost answer, or a run before, had sealed already refuses a second time.

        Raises:
            RefusedError: it was refused for another reason: it does not complete.
            DamagedError: it ended in error.
        """
        self.progress(Note("sealing the snapshot"))
        count, linear = len(self.plan.blocks), self.plan.linear_sha256
        try:
            self._patiently(lambda: self.ebs.complete(snapshot, count, linear))
        except RefusedError as refusal:
            try:
                self._wait(snapshot, _SEALED_S)
            except DeadlineError:
                raise refusal from None

    def _wait(self, snapshot: str, within_s: float = _DONE_S) -> None:
        def ended() -> tuple[str, str] | None:
            found = self._patiently(lambda: self.ec2.snapshot_state(snapshot))
            return None if found is None or found[0] == "pending" else found

        found = until(ended, within_s, most_s=_PAUSE_S, cancel=self.cancel, clock=self.clock)
        if found is None:
            raise DeadlineError(
                f"the snapshot is not completed after {within_s:.0f} s", place=snapshot
            )
        state, message = found
        if state != "completed":
            raise DamagedError(f"the snapshot ended in {state}: {message}", place=snapshot)

    def _patiently(self, function: Callable[[], T]) -> T:
        return retry.retry(function, _CONTROL, cancel=self.cancel, clock=self.clock)
