"""Scaling activities: what a group did, is doing, and why.

Source: Auto Scaling API reference, Activity; User Guide, "Verify a scaling activity".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Activity", "Ledger"]

ACTIVITIES_KEPT = 5000


@dataclass(frozen=True, slots=True)
class Activity:
    """A scaling activity; `zone` is where its instance is, or was to be."""

    id: str
    description: str
    cause: str
    started_at: float
    status: str
    progress: int
    ended_at: float | None = None
    message: str | None = None
    zone: str = ""


class Ledger:
    """A group's activities at one instant, being written; copied when the first thing is written.

    Args:
        activities: Those there are, oldest first.
        name: Makes the next one's id.
        now: Seconds.
    """

    def __init__(
        self, activities: Mapping[str, Activity], name: Callable[[], str], now: float
    ) -> None:
        self._before = activities
        self._written: dict[str, Activity] | None = None
        self._name = name
        self._now = now

    def open(self, description: str, cause: str, status: str, zone: str = "") -> str:
        """Begin an activity; return its id."""
        name = self._name()
        self._put(Activity(name, description, cause, self._now, status, 30, zone=zone))
        return name

    def describe(self, name: str, description: str) -> None:
        """Give an activity another description."""
        self._put(replace(self._find(name), description=description))

    def update(self, name: str, status: str, progress: int) -> None:
        """Say how far an activity is, in percent."""
        self._put(replace(self._find(name), status=status, progress=progress))

    def close(self, name: str, status: str, message: str | None = None) -> None:
        """End an activity."""
        self._put(
            replace(
                self._find(name), status=status, progress=100, ended_at=self._now, message=message
            )
        )

    def kept(self) -> Mapping[str, Activity]:
        """Return what is kept: the oldest that ended go where there are too many."""
        kept = self._written
        if kept is None:
            return self._before
        if len(kept) > ACTIVITIES_KEPT:
            ended = [one.id for one in kept.values() if one.ended_at is not None]
            for name in ended[: len(kept) - ACTIVITIES_KEPT]:
                del kept[name]
        return kept

    def _find(self, name: str) -> Activity:
        return (self._before if self._written is None else self._written)[name]

    def _put(self, activity: Activity) -> None:
        if self._written is None:
            self._written = dict(self._before)
        self._written[activity.id] = activity
