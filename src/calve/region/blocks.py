"""Snapshots and their blocks: what EBS holds, without its protocol.

Source: EBS direct API reference (2019-11-02); "EBS direct APIs" and its pages on encryption, idempotency and
checksums (EBS User Guide). A child begins with its parent's blocks; contents are counted, so that either of them can
be deleted first. Refusals are EBS direct's. Thread-safe: one lock, which no hashing and no block's bytes wait for.

What was completed is found again when the directory is opened a second time; what was pending is gone.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from calve.clock import SYSTEM, Clock
from calve.errors import NotFoundError
from calve.region import volumes
from calve.region.blobs import Blobs
from calve.region.content import Content
from calve.region.names import arn, identifier
from calve.region.signature import Refusal
from calve.region.snapshot import (
    Entry,
    Snapshot,
    Start,
    State,
    check,
    invalid,
    make,
    not_found,
)
from calve.region.throttles import Limits, Throttles
from calve.region.volumes import Omitted, Records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

__all__ = ["Snapshots"]

_ID = re.compile(r"snap-[0-9a-f]{17}")


class Snapshots:
    """The snapshots of one account in one region.

    Args:
        directory: Of its own; what was completed there before is found again.
        region: Its name.
        clock: Seconds and the time of day.
        limits: Quotas.
        complete_s: How long a sealed snapshot stays pending.
        seed: Names the region's story; see `names`.

    Attributes:
        encrypted_by_default: The account's switch.
        blobs: The contents of all blocks.
        throttles: The quotas' buckets.
    """

    def __init__(
        self,
        directory: Path,
        *,
        region: str = "eu-central-1",
        clock: Clock = SYSTEM,
        limits: Limits | None = None,
        complete_s: float = 0.5,
        seed: str = "region",
    ) -> None:
        self.region = region
        self.encrypted_by_default = False
        self.blobs = Blobs(directory / "blocks")
        self.throttles = Throttles(limits or Limits(), clock)
        self._records = Records(directory)
        self._clock = clock
        self._complete_s = complete_s
        self._seed = seed
        self._origin = clock.now().timestamp() - clock.monotonic()
        self._lock = threading.RLock()
        self._snapshots: dict[str, Snapshot] = {}
        self._contents: dict[str, Content] = {}
        self._tokens: dict[str, tuple[Start, Snapshot]] = {}
        self._serial = itertools.count(1)
        for snapshot, blocks in self._records.load():
            self._snapshots[snapshot.id] = snapshot
            self._contents[snapshot.id] = Content(blocks, snapshot.started_at)
        self.blobs.keep_only(
            entry.blob for content in self._contents.values() for entry in content.blocks.values()
        )

    def now(self) -> float:
        """Return the time of day in seconds, which never goes back."""
        return self._origin + self._clock.monotonic()

    # Looking

    def find(self, snapshot_id: str) -> Snapshot | None:
        """Return a snapshot as it is now; None where there is none, or nobody is to know yet."""
        with self._lock:
            self._settle(snapshot_id)
            found = self._snapshots.get(snapshot_id)
            return found if found is not None and found.visible_at <= self.now() else None

    def all(self) -> list[Snapshot]:
        """Return all snapshots, in the order of their start."""
        with self._lock:
            found = [self.find(snapshot_id) for snapshot_id in self._snapshots]
        return sorted(
            (one for one in found if one is not None), key=lambda one: (one.started_at, one.id)
        )

    def progress(self, snapshot_id: str) -> int:
        """Return how far a snapshot is, in percent, as whoever writes it says."""
        with self._lock:
            found = self._snapshots.get(snapshot_id)
            if found is None or found.state is State.COMPLETED:
                return 100
            return self._contents[snapshot_id].progress

    def get(self, snapshot_id: str) -> Snapshot:
        """Return a snapshot; Refusal where there is none."""
        if not _ID.fullmatch(snapshot_id):
            raise invalid(f"The snapshot ID '{snapshot_id}' is malformed.", "INVALID_SNAPSHOT_ID")
        found = self.find(snapshot_id)
        if found is None:
            raise not_found(snapshot_id)
        return found

    def blocks(self, snapshot_id: str) -> Mapping[int, Entry]:
        """Return the blocks of a completed snapshot's chain; they change no more.

        Raises:
            Refusal: ResourceNotFoundException; ValidationException where it is not completed.
        """
        with self._lock:
            found = self.get(snapshot_id)
            if found.state is not State.COMPLETED:
                raise invalid(
                    f"The snapshot '{snapshot_id}' is not in the 'completed' state.",
                    "INVALID_SNAPSHOT_ID",
                )
            return self._contents[snapshot_id].blocks

    # Writing

    def start(self, ask: Start, token: str = "", *, late_s: float = 0.0) -> Snapshot:
        """Begin a snapshot.

        Args:
            ask: What it shall be.
            token: The client's; "" for none.
            late_s: How long nobody is to know of it.

        Raises:
            Refusal: ConflictException, ValidationException, ResourceNotFoundException,
                ConcurrentLimitExceededException.
        """
        with self._lock:
            done = self._tokens.get(token) if token else None
            if done is not None:
                if done[0] != ask:
                    raise Refusal(
                        409,
                        "ConflictException",
                        "The client token was used before in a request with other parameters.",
                    )
                return self._snapshots.get(done[1].id, done[1])
            parent = self.get(ask.parent_id) if ask.parent_id else None
            check(ask, parent, by_default=self.encrypted_by_default)
            pending = sum(one.state is State.PENDING for one in self.all())
            if pending >= self.throttles.limits.pending:
                raise Refusal(
                    400,
                    "ConcurrentLimitExceededException",
                    f"There are {pending} pending snapshots, which is the most.",
                )
            made = self._make(ask, parent)
            if late_s:
                made = replace(made, visible_at=made.started_at + late_s)
            self._add(made, self.blocks(parent.id) if parent is not None else {})
            if token:
                self._tokens[token] = (ask, made)
            return made

    def _make(self, ask: Start, parent: Snapshot | None = None) -> Snapshot:
        made = ""
        while not made or made in self._snapshots:  # one of an earlier life may have it
            made = identifier("snap", self._seed, self.region, next(self._serial))
        key_arn = arn("kms", self.region, "key/00000000-0000-0000-0000-000000000000")
        if ask.encrypted or self.encrypted_by_default:
            ask = replace(ask, encrypted=True, key_arn=ask.key_arn or key_arn)
        return make(ask, parent, made, self.now())

    def _add(self, made: Snapshot, blocks: Mapping[int, Entry]) -> None:
        self.blobs.hold(entry.blob for entry in blocks.values())
        self._snapshots[made.id] = made
        self._contents[made.id] = Content(dict(blocks), made.started_at)

    @contextlib.contextmanager
    def flight(self, snapshot_id: str, index: int, checksum: str) -> Iterator[Snapshot]:
        """Announce a block that is on its way, before its bytes are read.

        Raises:
            Refusal: The snapshot is not there or not writable, the index is beyond its end, or another content for
                the same index is on its way (CONFLICTING_BLOCK_UPDATE).
        """
        with self._lock:
            snapshot = self._writable(snapshot_id)
            if not 0 <= index < snapshot.block_count:
                raise invalid(
                    f"BlockIndex {index} is beyond the volume's {snapshot.block_count} blocks.",
                    "INVALID_BLOCK",
                )
            content = self._contents[snapshot_id]
            content.depart(index, checksum)
        try:
            yield snapshot
        finally:
            with self._lock:
                content.land(index)

    def _writable(self, snapshot_id: str) -> Snapshot:
        snapshot = self.get(snapshot_id)
        if not snapshot.writable:
            raise invalid(
                f"The snapshot '{snapshot_id}' is not in the 'pending' state, or sealed.",
                "INVALID_SNAPSHOT_ID",
            )
        return snapshot

    def write(
        self, snapshot_id: str, index: int, sent: bytes, entry: Entry | None, progress: int = 0
    ) -> None:
        """Make a block part of a snapshot that is still pending.

        Args:
            snapshot_id: Which.
            index: Of the block.
            sent: The digest that was sent.
            entry: What is stored; its blob is counted for the snapshot from now on. None: nothing is.
            progress: In percent.

        Raises:
            Refusal: The snapshot was sealed, deleted or timed out meanwhile; the entry's blob is dropped.
        """
        with self._lock:
            try:
                self._writable(snapshot_id)
            except Refusal:
                if entry is not None:
                    self.blobs.drop([entry.blob])
                raise
            content = self._contents[snapshot_id]
            content.touched_at = self.now()
            content.progress = max(content.progress, progress)
            content.sent[index] = sent
            if entry is not None:
                old = content.blocks.get(index)
                content.blocks[index] = entry
                if old is not None:
                    self.blobs.drop([old.blob])

    def complete(
        self, snapshot_id: str, count: int, checksum: bytes | None = None, *, failure: str = ""
    ) -> None:
        """Seal a snapshot; it becomes completed a little later, or ends in an error.

        Args:
            snapshot_id: Which.
            count: How many different blocks were written.
            checksum: SHA-256 over their digests in the order of their indices; None where it is not given.
            failure: Ends it in an error with this message.

        Raises:
            Refusal: It is not there, or not pending any more.
        """
        with self._lock:
            snapshot = self._writable(snapshot_id)
            content = self._contents[snapshot_id]
            if count != len(content.sent):
                failure = f"{len(content.sent)} blocks were written, {count} are claimed"
            elif checksum is not None and checksum != content.linear():
                failure = "The aggregated checksum is not that of the blocks"
            self._snapshots[snapshot_id] = replace(
                snapshot,
                ends_at=self.now() + self._complete_s,
                ends_as=State.ERROR if failure else State.COMPLETED,
                message=failure,
            )

    def copy(self, source: Snapshots, snapshot_id: str, ask: Start) -> Snapshot:
        """Copy a completed snapshot of this region or another; the copy is pending for a moment.

        Args:
            source: The region that has it.
            snapshot_id: Which.
            ask: Description, tags and encryption of the copy; size and parent do not count.
        """
        with source._lock:
            origin, blocks = source.get(snapshot_id), source.blocks(snapshot_id)
            names = [entry.blob for entry in blocks.values()]
            source.blobs.hold(names)
        adopted: list[str] = []
        try:
            for name in names if source is not self else ():
                self.blobs.adopt(source.blobs, name)
                adopted.append(name)
            with self._lock:
                encrypted = ask.encrypted or origin.encrypted
                made = self._make(replace(ask, gib=origin.gib, encrypted=encrypted))
                made = replace(made, ends_at=made.started_at + self._complete_s)
                self._add(made, blocks)
        finally:
            source.blobs.drop(names)
            self.blobs.drop(adopted)
        return made

    # Changing

    def update(self, snapshot_id: str, change: Callable[[Snapshot], Snapshot]) -> Snapshot:
        """Change what is known of a snapshot, such as its tags; KeyError where there is none."""
        with self._lock:
            changed = change(self._snapshots[snapshot_id])
            self._snapshots[snapshot_id] = changed
            if changed.state is State.COMPLETED:
                self._records.save(changed, self._contents[snapshot_id].blocks)
            return changed

    def delete(self, snapshot_id: str) -> None:
        """Delete a snapshot and free what only it needs; nothing happens where there is none."""
        with self._lock:
            if self._snapshots.pop(snapshot_id, None) is None:
                return
            content = self._contents.pop(snapshot_id)
            self._records.forget(snapshot_id)
            self.blobs.drop(entry.blob for entry in content.blocks.values())
            self.throttles.forget(snapshot_id)

    def _settle(self, snapshot_id: str) -> None:
        """Let happen what is due: the end of a sealed snapshot, or of one that nobody writes to any more."""
        one, now = self._snapshots.get(snapshot_id), self.now()
        if one is None or one.state is not State.PENDING:
            return
        if one.ends_at is not None:
            if now >= one.ends_at:
                one = replace(one, state=one.ends_as)
                if one.state is State.COMPLETED:
                    one = replace(one, completed_at=one.ends_at)
                    self._records.save(one, self._contents[snapshot_id].blocks)
                self._snapshots[snapshot_id] = one
        elif now > self._contents[snapshot_id].touched_at + one.timeout_s:
            message = "The snapshot was not completed in time"
            self._snapshots[snapshot_id] = replace(one, state=State.ERROR, message=message)

    # Volumes

    def export(
        self,
        snapshot_id: str,
        path: Path,
        *,
        omitted: Omitted = "zeros",
        key: bytes = b"",
        gib: int | None = None,
    ) -> None:
        """Write the volume that EC2 would make of a completed snapshot, as a sparse raw disk.

        Args:
            snapshot_id: Which.
            path: A new file.
            omitted: What blocks read as that nobody in the chain wrote; see `volumes.export`.
            key: Of the random bytes.
            gib: The volume's size; None is the snapshot's.

        Raises:
            NotFoundError: There is no such snapshot, or it is not completed.
        """
        with self._lock:
            try:
                snapshot, blocks = self.get(snapshot_id), self.blocks(snapshot_id)
            except Refusal as refusal:
                raise NotFoundError(refusal.message, place=snapshot_id) from refusal
            names = [entry.blob for entry in blocks.values()]
            self.blobs.hold(names)
        try:
            size = gib or snapshot.gib
            volumes.export(blocks, self.blobs, path, gib=size, omitted=omitted, key=key)
        finally:
            self.blobs.drop(names)
