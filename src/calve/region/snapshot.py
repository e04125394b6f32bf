"""A snapshot as values: what is known of it, and the blocks that it is made of.

Source: EBS direct API reference (2019-11-02) and "EBS direct APIs" (EBS User Guide).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calve.errors import DamagedError
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "BLOCKS_PER_GIB",
    "BLOCK_BYTES",
    "Entry",
    "Snapshot",
    "Start",
    "State",
    "check",
    "invalid",
    "make",
    "not_found",
]

BLOCK_BYTES = 512 * 1024
BLOCKS_PER_GIB = (1 << 30) // BLOCK_BYTES
GIB_MOST = 65536
TAGS_MOST = 50


class State(StrEnum):
    """A snapshot's state."""

    PENDING = "pending"
    COMPLETED = "completed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Entry:
    """One block of a snapshot.

    Attributes:
        digest: SHA-256, 32 bytes, as whoever reads the block is told.
        blob: The content's name in `Blobs`.
        writer: The snapshot that wrote it; a child has its parent's entries until it writes its own.
    """

    digest: bytes
    blob: str
    writer: str


@dataclass(frozen=True, slots=True)
class Start:
    """What StartSnapshot asks for; two requests of one client token must be equal.

    Attributes:
        gib: The volume's size.
        parent_id: Whose blocks it begins with.
        encrypted: None where it is not said.
        timeout_minutes: 10 to 4320.
    """

    gib: int
    parent_id: str | None = None
    description: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    encrypted: bool | None = None
    key_arn: str | None = None
    timeout_minutes: int = 60


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot without its blocks.

    Attributes:
        id: `snap-` and 17 hexadecimal digits.
        gib: The volume's size.
        started_at: Seconds since 1970, as all instants here.
        lineage: The first snapshot of its chain; only snapshots of one lineage can be compared.
        parent_id: What it was started on.
        timeout_s: It ends in an error so long after its start or its last block.
        visible_at: Before it, whoever asks is told that there is no such snapshot.
        message: Why it is in an error.
        ends_at: When it leaves `pending`, once it is sealed; no block is written from then on.
        ends_as: The state it then has.
        shared_with: Accounts that may use it; `all` for everybody.
    """

    id: str
    gib: int
    started_at: float
    lineage: str
    parent_id: str | None = None
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    encrypted: bool = False
    key_arn: str | None = None
    timeout_s: float = 3600.0
    visible_at: float = 0.0
    state: State = State.PENDING
    message: str = ""
    ends_at: float | None = None
    ends_as: State = State.COMPLETED
    completed_at: float | None = None
    shared_with: frozenset[str] = frozenset()

    @property
    def block_count(self) -> int:
        """Return how many blocks the volume has room for."""
        return self.gib * BLOCKS_PER_GIB

    @property
    def writable(self) -> bool:
        """Say whether blocks may be written."""
        return self.state is State.PENDING and self.ends_at is None

    def dump(self) -> dict[str, Any]:
        """Return what is worth keeping of a completed snapshot, for JSON."""
        return {
            "id": self.id,
            "gib": self.gib,
            "started_at": self.started_at,
            "lineage": self.lineage,
            "parent_id": self.parent_id,
            "description": self.description,
            "tags": dict(self.tags),
            "encrypted": self.encrypted,
            "key_arn": self.key_arn,
            "completed_at": self.completed_at,
            "shared_with": sorted(self.shared_with),
        }

    @classmethod
    def parse(cls, document: Mapping[str, Any], place: object) -> Snapshot:
        """Read what `dump` wrote; DamagedError where it is something else."""
        try:
            known = dict(document)
            known["shared_with"] = frozenset(known["shared_with"])
            return cls(**known, state=State.COMPLETED)
        except (TypeError, KeyError) as error:
            raise DamagedError("this is no snapshot's record", place=place) from error


def check(ask: Start, parent: Snapshot | None, *, by_default: bool) -> None:
    """Refuse a start that AWS would refuse.

    Args:
        ask: What is asked for.
        parent: The snapshot it names, if it names one.
        by_default: Whether the account encrypts by default.
    """
    if not 1 <= ask.gib <= GIB_MOST:
        raise invalid(f"VolumeSize must be from 1 to {GIB_MOST} GiB.", "INVALID_VOLUME_SIZE")
    if not 10 <= ask.timeout_minutes <= 4320:
        raise invalid("Timeout must be from 10 to 4320 minutes.")
    if len(ask.tags) > TAGS_MOST or len(dict(ask.tags)) < len(ask.tags):
        raise invalid(f"At most {TAGS_MOST} tags of different keys.", "INVALID_TAG")
    if parent is not None:
        _check_parent(ask, parent, by_default=by_default)
    elif ask.key_arn is not None and not ask.encrypted and not by_default:
        raise invalid("KmsKeyArn is given, and Encrypted is not.")


def _check_parent(ask: Start, parent: Snapshot, *, by_default: bool) -> None:
    if ask.encrypted is not None:
        raise invalid("ParentSnapshotId and Encrypted cannot be given in the same request.")
    if ask.key_arn is not None:
        raise invalid("ParentSnapshotId and KmsKeyArn cannot be given in the same request.")
    if by_default and not parent.encrypted:
        raise invalid("Encryption by default is enabled and the parent is not encrypted.")
    if parent.state is not State.COMPLETED:
        raise invalid(
            f"The parent '{parent.id}' is not in the 'completed' state.", "INVALID_SNAPSHOT_ID"
        )
    if ask.gib < parent.gib:
        raise invalid(
            f"VolumeSize must not be smaller than the parent's {parent.gib} GiB.",
            "INVALID_VOLUME_SIZE",
        )


def make(ask: Start, parent: Snapshot | None, snapshot_id: str, now: float) -> Snapshot:
    """Make the snapshot that is asked for; a parent gives it lineage and encryption."""
    return Snapshot(
        snapshot_id,
        ask.gib,
        now,
        lineage=parent.lineage if parent is not None else snapshot_id,
        parent_id=parent.id if parent is not None else None,
        description=ask.description,
        tags=dict(ask.tags),
        encrypted=parent.encrypted if parent is not None else bool(ask.encrypted),
        key_arn=parent.key_arn if parent is not None else ask.key_arn,
        timeout_s=ask.timeout_minutes * 60.0,
    )


def invalid(message: str, reason: str = "INVALID_PARAMETER_VALUE") -> Refusal:
    """Make EBS direct's refusal of a bad value."""
    return Refusal(400, "ValidationException", message, [("Reason", reason)])


def not_found(snapshot_id: str) -> Refusal:
    """Make EBS direct's refusal of a snapshot that is not there."""
    return Refusal(
        404,
        "ResourceNotFoundException",
        f"The snapshot '{snapshot_id}' does not exist.",
        [("Reason", "SNAPSHOT_NOT_FOUND")],
    )
