"""A disk becomes a snapshot by EC2's own import: through a bucket, in minutes; for who may not use EBS direct.

Killed anywhere and run again it goes on: the object's key and the client's token follow from the plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from calve.aws.images import Images, ImportTask
from calve.cache.objects import Objects
from calve.cache.url import S3
from calve.clock import SYSTEM, Clock
from calve.disk.disk import BLOCK_BYTES, ZERO_BLOCK
from calve.errors import CalveError, ConflictError, DamagedError, DeadlineError
from calve.image import ami
from calve.image.built import Built
from calve.image.plan import BlockPlan
from calve.image.upload import Snapshot
from calve.image.waiting import until
from calve.progress import Note, Progress, Step, silent
from calve.tasks import Cancel
from calve.transport import retry

__all__ = ["Import"]

_ATTEMPTS: Final = 8
_WITHIN_S: Final = 2 * 3600.0
_PAUSE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Import:
    """One disk into one region.

    Attributes:
        images: EC2 there.
        objects: of a bucket there, and where the bucket is.
        place: likewise.
        built: the disk; whole.
        plan: of all its blocks.
        tags: the snapshot's.
        region: its name.
        progress: told of bytes, then of percent.
        cancel: ends it; an import that was begun goes on, and so does the next run with it.
        clock: for waits.
    """

    images: Images
    objects: Objects
    place: S3
    built: Built
    plan: BlockPlan
    tags: Mapping[str, str]
    region: str
    progress: Progress = silent
    cancel: Cancel = field(default_factory=Cancel)
    clock: Clock = SYSTEM

    @property
    def key(self) -> str:
        """Return the object's key, below the prefix of the bucket's URL."""
        return f"calve-import/{self.plan.digest}.raw"

    def run(self, written: str | None = None) -> Snapshot:
        """Return when the snapshot is completed and has its tags; the object is removed.

        Args:
            written: a snapshot that holds the plan already.

        Raises:
            DamagedError: EC2 says that it cannot import the disk.
            CalveError: of the services.
        """
        if written is None:
            written = self._import()
            self.images.tag(written, self.tags)
        self.objects.delete(self.key)
        return Snapshot(written, len(self.plan.blocks), 0)

    def _import(self) -> str:
        self._send()
        task = self._begin()
        self.progress(Note(f"importing as {task.id}"))
        ended = until(
            lambda: self._ended(task.id),
            _WITHIN_S,
            most_s=_PAUSE_S,
            cancel=self.cancel,
            clock=self.clock,
        )
        if ended is None:
            raise DeadlineError(
                f"the import is not completed after {_WITHIN_S:.0f} s", place=task.id
            )
        if ended.state != "completed" or not ended.snapshot:
            self.objects.delete(self.key)
            raise DamagedError(f"EC2 did not import the disk: {ended.message}", place=task.id)
        self.progress(Step("import", 100, 100, "%"))
        return ended.snapshot

    def _ended(self, task: str) -> ImportTask | None:
        """Return a task that has ended."""
        found = retry.retry(
            lambda: self.images.import_task(task), cancel=self.cancel, clock=self.clock
        )
        self.progress(Step("import", found.percent, 100, "%"))
        return None if found.state == "active" else found

    # The object

    def _send(self) -> None:
        """Put the disk into the bucket, unless it is there."""
        if self.objects.head(self.key) == self.built.disk.end_bytes:
            return
        self.objects.put_stream(self.key, self._chunks())

    def _chunks(self) -> Iterator[bytes]:
        """Yield the disk, block by block, each as it was planned; a hole reads as zeros.

        Raises:
            DamagedError: a block is another one: the disk changed since it was built.
        """
        total = self.built.disk.end_bytes
        planned = {block.index: block.sha256 for block in self.plan.blocks}
        sent = 0
        try:
            with self.built.raw.open("rb") as file:
                while sent < total:
                    self.cancel.check()
                    data = file.read(BLOCK_BYTES).ljust(BLOCK_BYTES, b"\0")
                    index = sent // BLOCK_BYTES
                    if hashlib.sha256(data).hexdigest() != planned.get(index, ZERO_BLOCK):
                        raise DamagedError(
                            f"block {index} is not what was planned: the disk has changed",
                            place=self.built.raw,
                            hint="build it again",
                        )
                    yield data
                    sent += len(data)
                    self.progress(Step("put", sent, total))
        except OSError as error:
            raise CalveError(f"cannot be read: {error.strerror}", place=self.built.raw) from error

    # The task

    def _begin(self) -> ImportTask:
        """Find the import that an earlier run began, or begin one; one that failed, or whose snapshot is gone, is spent."""
        description = ami.image_name(self.built.line, self.built.disk)
        for attempt in range(_ATTEMPTS):
            task = self.images.import_disk(
                self.place.bucket,
                f"{self.place.prefix}{self.key}",
                token=self.plan.token(self.region, attempt),
                description=description,
            )
            if task.state == "active":
                return task
            found = self.images.snapshot_state(task.snapshot) if task.snapshot else None
            if task.state == "completed" and found is not None and found[0] == "completed":
                return task
        raise ConflictError(f"{_ATTEMPTS} imports of this disk failed", hint="look at EC2's own")
