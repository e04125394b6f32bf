"""What EBS itself can do wrong, as data; see `faults` for what a connection can.

    service.faults.add(Forget(), method="PUT", path="*/blocks/7")

Methods and paths are those of EBS direct: `POST /snapshots` starts, `PUT */blocks/*` writes,
`POST */completion/*` completes, `GET */blocks/*` reads, `GET *blocks` lists.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EbsFault", "Fail", "Fewer", "Forget", "Late", "Rot", "Throttle", "Twice"]


@dataclass(frozen=True, slots=True)
class Late:
    """StartSnapshot: whoever asks for the snapshot is told for so long that there is none."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Forget:
    """PutSnapshotBlock: answer and count the block as stored, and do not store it."""


@dataclass(frozen=True, slots=True)
class Rot:
    """PutSnapshotBlock: store the block with one bit flipped.

    Attributes:
        bit: Which, from the first byte's lowest.
        hidden: Whoever reads it gets the checksum of what was stored, not of what was sent.
    """

    bit: int = 0
    hidden: bool = True


@dataclass(frozen=True, slots=True)
class Twice:
    """Any action that changes something: it is delivered twice, and the second delivery is answered."""


@dataclass(frozen=True, slots=True)
class Fail:
    """CompleteSnapshot: the snapshot ends in the state `error`."""

    message: str = "An internal error has occurred"


@dataclass(frozen=True, slots=True)
class Throttle:
    """Refuse as one request too many, by `throttles.throttled`."""

    code: str = "RequestThrottledException"
    reason: str = "RESOURCE_LEVEL_THROTTLE"


@dataclass(frozen=True, slots=True)
class Fewer:
    """ListSnapshotBlocks, ListChangedBlocks: the page has at most so many blocks, none at all for 0."""

    count: int = 0


EbsFault = Late | Forget | Rot | Twice | Fail | Throttle | Fewer
