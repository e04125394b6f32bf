"""An image becomes one of another region, by EC2's copy: minutes, and whole, whatever that region has of its lineage.

The copy's snapshot gets what says which disk it holds, so that the next release can be written onto it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from calve.aws.images import Ami, Images
from calve.clock import SYSTEM, Clock
from calve.errors import ConflictError, DamagedError, DeadlineError
from calve.image import ami
from calve.image.waiting import known, until
from calve.progress import Note, Progress, silent
from calve.tasks import Cancel
from calve.transport import retry

__all__ = ["Copy"]

_ATTEMPTS: Final = 8
_WITHIN_S: Final = 3600.0
_PAUSE_S: Final = 10.0
# How a snapshot was written is not how its copy was.
_OF_WRITING: Final = frozenset({ami.PLAN, ami.PARENT})


@dataclass(frozen=True, slots=True)
class Copy:
    """One image into one region.

    Attributes:
        images: EC2 there.
        image: as it is where it comes from.
        source: the region that it comes from.
        region: where it goes.
        progress: is told.
        cancel: ends the wait; EC2 goes on.
        clock: for waits.
    """

    images: Images
    image: Ami
    source: str
    region: str
    progress: Progress = silent
    cancel: Cancel = field(default_factory=Cancel)
    clock: Clock = SYSTEM

    def run(self) -> str:
        """Return the copy's id once it can be launched; one that is there is taken.

        Raises:
            ConflictError: another image has the name there.
            DamagedError: EC2 says that the copy failed.
            DeadlineError: it takes longer than an hour.
        """
        found = next(iter(self.images.images(name=self.image.name)), None)
        if found is not None and found.tags.get(ami.DISK) != self.image.tags.get(ami.DISK):
            raise ConflictError(
                f"{found.id} has the name {found.name}, and holds something else",
                place=self.region,
            )
        made = found.id if found is not None else self._begin()
        copied = self._wait(made)
        tags = {key: self.image.tags[key] for key in self.image.tags.keys() - _OF_WRITING}
        for snapshot in copied.snapshots if tags else ():
            self.images.tag(snapshot, tags)
        return copied.id

    def _begin(self) -> str:
        """Begin the copy, or find one that was begun; the token of one that is gone gives it for ever, and is spent."""
        self.progress(Note(f"copying {self.image.id} into {self.region}"))
        for attempt in range(_ATTEMPTS):
            token = f"{self.image.id};{self.source};{self.region};{attempt}"
            made = self.images.copy(
                self.image.id,
                source_region=self.source,
                name=self.image.name,
                token=hashlib.sha256(token.encode()).hexdigest(),
            )
            if known(self.images, made, cancel=self.cancel, clock=self.clock):
                return made
        raise ConflictError(f"{_ATTEMPTS} copies of {self.image.id} are gone", place=self.region)

    def _wait(self, image: str) -> Ami:
        def ended() -> Ami | None:
            found = retry.retry(
                lambda: self.images.image(image), cancel=self.cancel, clock=self.clock
            )
            return None if found.state == "pending" else found

        found = until(ended, _WITHIN_S, most_s=_PAUSE_S, cancel=self.cancel, clock=self.clock)
        if found is None:
            raise DeadlineError(f"the copy is not available after {_WITHIN_S:.0f} s", place=image)
        if found.state != "available":
            raise DamagedError(f"the copy ended in {found.state}", place=image)
        return found
