"""The breaker: outside a refresh, a version whose machines never come up is pinned back to an earlier one.

Without it a group abandons and launches for ever, and bills for it. Pure: from a group's activities to whether to trip.
Only launches that failed one after the other count; one machine that came into service, or a want of capacity, does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from calve.rollout.judge import hindrance
from calve.rollout.observation import ends, refused

if TYPE_CHECKING:
    from calve.aws.autoscaling import Activity

__all__ = ["MOST", "Run", "run_of"]

MOST: Final = 3
"""So many launches in a row may fail."""


@dataclass(frozen=True, slots=True)
class Run:
    """Launches that failed one after the other, newest first: the ids of their machines."""

    instances: tuple[str, ...]

    @property
    def trips(self) -> bool:
        """Say whether these are too many."""
        return len(self.instances) >= MOST


def run_of(activities: Iterable[Activity]) -> Run:
    """Return the failed launches since the last one that came into service.

    Args:
        activities: of a group since its last refresh, in any order.
    """
    newest_first = sorted(activities, key=lambda one: one.started_at, reverse=True)
    ended = ends(newest_first)
    harmless = {one.activity for one in refused(newest_first) if hindrance(one)}
    failed: list[str] = []
    for one in newest_first:
        if not one.description.startswith("Launching") or one.id in harmless:
            continue
        if one.status == "Successful":
            break
        name = next((each for each in ended if each in one.description), None)
        if name is not None:
            failed.append(name)
    return Run(tuple(failed))
