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
    """A scaling activity."""

    id: str
    description: str
    cause: str
    started_at: float
    status: str
    progress: int
    ended_at: float | None = None
    message: str | None = None


class Ledger:
    """A group's activities at one instant, being written.

    Args:
        activities: Those there are, oldest first.
        name: Makes the next one's id.
        now: Seconds.
    """

    def __init__(
        self, activities: Mapping[str, Activity], name: Callable[[], str], now: float
    ) -> None:
        self._activities = dict(activities)
        self._name = name
        self._now = now

    def open(self, description: str, cause: str, status: str) -> str:
        """Begin an activity; return its id."""
        name = self._name()
        self._activities[name] = Activity(name, description, cause, self._now, status, 30)
        return name

    def describe(self, name: str, description: str) -> None:
        """Give an activity another description."""
        self._activities[name] = replace(self._activities[name], description=description)

    def update(self, name: str, status: str, progress: int) -> None:
        """Say how far an activity is, in percent."""
        self._activities[name] = replace(self._activities[name], status=status, progress=progress)

    def close(self, name: str, status: str, message: str | None = None) -> None:
        """End an activity."""
        self._activities[name] = replace(
            self._activities[name], status=status, progress=100, ended_at=self._now, message=message
        )

    def kept(self) -> dict[str, Activity]:
        """Return what is kept: the oldest that ended go where there are too many."""
        if len(self._activities) > ACTIVITIES_KEPT:
            ended = [one.id for one in self._activities.values() if one.ended_at is not None]
            for name in ended[: len(self._activities) - ACTIVITIES_KEPT]:
                del self._activities[name]
        return self._activities
