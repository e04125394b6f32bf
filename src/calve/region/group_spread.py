"""How a group's instances are spread over its availability zones: where to launch, and where to take away.

Source: Amazon EC2 Auto Scaling User Guide, "Instance distribution" (evenly; another zone where one has no capacity),
"Default termination policy and instance scale-in" (the zone with the most instances first). Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

__all__ = ["choose", "surplus"]

T = TypeVar("T")


def choose(
    zones: Sequence[str], there: Mapping[str, int], count: int, refused: Collection[str]
) -> list[str]:
    """Return the zones of the next `count` launches: always the one that has the fewest, and not those that refused.

    Args:
        zones: The group's; the first of equals is taken.
        there: How many instances a zone has.
        count: How many are launched.
        refused: Zones that had no capacity; where they are all, they are tried again.
    """
    if len(zones) == 1:
        return [zones[0]] * count
    counts = {zone: there.get(zone, 0) for zone in zones if zone not in refused}
    counts = counts or {zone: there.get(zone, 0) for zone in zones}
    chosen = []
    for _ in range(count):
        zone = min(counts, key=counts.__getitem__)
        counts[zone] += 1
        chosen.append(zone)
    return chosen


def surplus(ranked: Sequence[tuple[str, bool, T]], count: int) -> list[T]:
    """Return the `count` that can best be spared: such as do not serve, then from the zone that has the most.

    Args:
        ranked: Zone, whether it serves, and what it is; those that can best be spared first.
        count: How many; fewer are returned where there are not as many.
    """
    gone = [one for _, serves, one in ranked if not serves][:count]
    by_zone: dict[str, list[T]] = {}
    for zone, serves, one in reversed(ranked):
        if serves:
            by_zone.setdefault(zone, []).append(one)
    while len(gone) < count and any(by_zone.values()):
        gone.append(max(by_zone.values(), key=len).pop())
    return gone
