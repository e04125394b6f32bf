"""EBS's request quotas: token buckets per snapshot and per account, and how many snapshots may be pending.

Source: "Amazon EBS endpoints and quotas" (AWS General Reference) for the figures; "Error retries" (EBS User Guide)
for the errors: a snapshot's own limit and the account's for blocks are RequestThrottledException with a Reason, the
account's for every other action is ThrottlingException.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calve.region.signature import Refusal

if TYPE_CHECKING:
    from calve.clock import Clock

__all__ = ["Bucket", "Limits", "Throttles", "throttled"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What an account may do in one region; the defaults are AWS's.

    Attributes:
        put_snapshot_per_s: PutSnapshotBlock, for one snapshot.
        put_per_s: PutSnapshotBlock, for the account.
        get_snapshot_per_s: GetSnapshotBlock, for one snapshot.
        get_per_s: GetSnapshotBlock, for the account.
        list_per_s: ListSnapshotBlocks and ListChangedBlocks, each.
        start_per_s: StartSnapshot.
        complete_per_s: CompleteSnapshot.
        pending: Snapshots that are pending at a time.
    """

    put_snapshot_per_s: float = 1000
    put_per_s: float = 1000
    get_snapshot_per_s: float = 1000
    get_per_s: float = 1000
    list_per_s: float = 50
    start_per_s: float = 10
    complete_per_s: float = 10
    pending: int = 100


@dataclass(slots=True)
class Bucket:
    """Tokens that grow with time, up to `most`."""

    per_s: float
    most: float
    tokens: float
    at_s: float

    def take(self, now_s: float) -> bool:
        """Take a token; say whether there was one."""
        self.tokens = min(self.most, self.tokens + (now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Throttles:
    """The buckets of one account; thread-safe.

    Args:
        limits: May be replaced while it is in use; buckets that are there keep their rate.
        clock: Fills the buckets.
    """

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def check(self, action: str, snapshot_id: str = "") -> None:
        """Take one request into account.

        Raises:
            Refusal: RequestThrottledException or ThrottlingException (400).
        """
        limits = self.limits
        match action:
            case "PutSnapshotBlock":
                self._check_block(action, snapshot_id, limits.put_snapshot_per_s, limits.put_per_s)
            case "GetSnapshotBlock":
                self._check_block(action, snapshot_id, limits.get_snapshot_per_s, limits.get_per_s)
            case "StartSnapshot":
                self._check_account(action, limits.start_per_s)
            case "CompleteSnapshot":
                self._check_account(action, limits.complete_per_s)
            case _:
                self._check_account(action, limits.list_per_s)

    def forget(self, snapshot_id: str) -> None:
        """Drop the buckets of a snapshot that is gone."""
        with self._lock:
            for key in [key for key in self._buckets if key[1] == snapshot_id]:
                del self._buckets[key]

    def _check_block(
        self, action: str, snapshot_id: str, snapshot_per_s: float, account_per_s: float
    ) -> None:
        if not self._take(action, snapshot_id, snapshot_per_s):
            raise throttled("RequestThrottledException", "RESOURCE_LEVEL_THROTTLE")
        if not self._take(action, "", account_per_s):
            raise throttled("RequestThrottledException", "ACCOUNT_THROTTLED")

    def _check_account(self, action: str, per_s: float) -> None:
        if not self._take(action, "", per_s):
            raise throttled("ThrottlingException")

    def _take(self, action: str, snapshot_id: str, per_s: float) -> bool:
        now_s = self._clock.monotonic()
        with self._lock:
            key = (action, snapshot_id)
            bucket = self._buckets.get(key)
            if bucket is None:
                most = max(1.0, per_s)
                bucket = self._buckets[key] = Bucket(per_s, most, most, now_s)
            return bucket.take(now_s)


def throttled(code: str, reason: str = "") -> Refusal:
    """Make the refusal of a request too many."""
    details = [("Reason", reason)] if reason else []
    return Refusal(400, code, "Rate exceeded", details)
