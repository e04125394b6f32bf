"""The blocks of one snapshot while it is written, and afterwards."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calve.region.snapshot import invalid

if TYPE_CHECKING:
    from calve.region.snapshot import Entry

__all__ = ["Content"]


@dataclass(slots=True)
class Content:
    """The blocks of one snapshot; `Snapshots` holds its lock around every use.

    Attributes:
        blocks: Of its whole chain, by index.
        touched_at: When it was started or last written to.
        sent: Digest of each block that was sent to this snapshot, as it was sent.
        progress: In percent, as whoever writes it says.
    """

    blocks: dict[int, Entry]
    touched_at: float
    sent: dict[int, bytes] = field(default_factory=dict)
    progress: int = 0
    _flights: dict[int, tuple[str, int]] = field(default_factory=dict)

    def depart(self, index: int, checksum: str) -> None:
        """Note that a block is on its way; Refusal where another content for the same index is."""
        other, count = self._flights.get(index, (checksum, 0))
        if other != checksum:
            raise invalid(
                f"Another update of block {index} is in progress.", "CONFLICTING_BLOCK_UPDATE"
            )
        self._flights[index] = (checksum, count + 1)

    def land(self, index: int) -> None:
        """Note that a block is on its way no more."""
        checksum, count = self._flights.pop(index)
        if count > 1:
            self._flights[index] = (checksum, count - 1)

    def linear(self) -> bytes:
        """Return the aggregated checksum, LINEAR: SHA-256 over the blocks' digests in the order of their indices."""
        digests = (self.sent[index] for index in sorted(self.sent))
        return hashlib.sha256(b"".join(digests)).digest()
