"""Extents: runs of blocks in an image, and where new ones go so that a generation touches little of the disk.

What is uploaded is whole groups of 512 KiB; an object of an image is one run of blocks of 4 KiB that never moves.
New objects lie together where there is room for all: then they share their groups. Free is whatever no object of the
new image has, what its parent had there included: a path that replaces another of its size takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

__all__ = ["GROUP_BLOCKS", "Extent", "allocate", "groups", "merged", "without"]

GROUP_BLOCKS = 128  # 512 KiB of blocks of 4 KiB, EBS's own unit


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """A run of blocks: the first one's address, and how many; at least one."""

    address: int
    blocks: int

    @property
    def end(self) -> int:
        """Return the address behind the last block."""
        return self.address + self.blocks


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """Return the same blocks in as few extents as possible, sorted."""
    found: list[Extent] = []
    for extent in sorted(extents):
        if found and extent.address <= found[-1].end:
            last = found.pop()
            found.append(Extent(last.address, max(last.end, extent.end) - last.address))
        else:
            found.append(extent)
    return found


def without(extents: Iterable[Extent], taken: Iterable[Extent]) -> list[Extent]:
    """Return the blocks of `extents` that are in none of `taken`, sorted."""
    found: list[Extent] = []
    gone = iter(merged(taken))
    hole = next(gone, None)
    for extent in merged(extents):
        at = extent.address
        while hole is not None and hole.end <= at:
            hole = next(gone, None)
        while hole is not None and hole.address < extent.end:
            if hole.address > at:
                found.append(Extent(at, hole.address - at))
            at = hole.end
            if at >= extent.end:
                break
            hole = next(gone, None)
        if at < extent.end:
            found.append(Extent(at, extent.end - at))
    return found


def groups(extents: Iterable[Extent]) -> set[int]:
    """Return the groups of 512 KiB that have a block of these."""
    return {
        group
        for extent in extents
        for group in range(extent.address // GROUP_BLOCKS, (extent.end - 1) // GROUP_BLOCKS + 1)
    }


def allocate(
    runs: Sequence[Sequence[int]], taken: Iterable[Extent], *, begin: int, size: int
) -> list[int]:
    """Find addresses for new objects.

    All lie together, in the free run where they touch the fewest groups; where none has room for all, each run has a
    place of its own; what of these has none fills the largest places, as long as a group's worth fits, and the rest
    lies at the end.

    Args:
        runs: sizes of objects, in blocks; what is in one run belongs together, and what a later image drops at once.
        taken: what has its place already.
        begin: where the first of them may lie.
        size: of the parent image, in blocks; `begin` where there is none.

    Returns:
        The address of each, in blocks, run by run; the same input gives the same.
    """
    room = _Room(runs, merged(taken), begin, size)
    if not room.put_together(range(len(room.sizes))):
        rest: list[int] = []
        for run in sorted(room.runs, key=lambda run: (-room.total(run), run)):
            # Something will lie at the end anyway: what is small shares its groups.
            anew = not rest or room.total(run) >= GROUP_BLOCKS
            if not room.put_together(run, anew=anew):
                rest += run
        room.put_at_end(room.fill(sorted(rest)))
    return room.found


class _Room:
    """Where there is room, and what was put there; objects are counted through all runs."""

    def __init__(
        self, runs: Sequence[Sequence[int]], taken: Sequence[Extent], begin: int, size: int
    ) -> None:
        self.sizes = [size for run in runs for size in run]
        starts = [0, *accumulate(map(len, runs))]
        self.runs = [list(range(start, end)) for start, end in pairwise(starts) if end > start]
        self.found = [0] * len(self.sizes)
        self._holes = without([Extent(begin, size - begin)] if size > begin else [], taken)
        self._end = max([begin, *(extent.end for extent in taken)])
        self._touched = {0}  # the header's

    def total(self, chosen: Iterable[int]) -> int:
        """Return how many blocks objects have."""
        return sum(self.sizes[index] for index in chosen)

    def _put(self, chosen: Iterable[int], at: int) -> None:
        """Give objects their addresses, one behind another."""
        end = at
        for index in chosen:
            self.found[index] = end
            end += self.sizes[index]
        if end > at:
            put = Extent(at, end - at)
            self._touched |= groups([put])
            self._holes = without(self._holes, [put])
            self._end = max(self._end, end)

    def put_at_end(self, chosen: Sequence[int]) -> None:
        """Put objects behind everything."""
        self._put(chosen, self._end)

    def put_together(self, chosen: Sequence[int], *, anew: bool = True) -> bool:
        """Put objects where they touch the fewest groups anew, there into the smallest hole; False where none fits.

        A hole that many of them fill exactly is worth a group: nothing is left over that nobody can use.

        Args:
            chosen: the objects.
            anew: they may touch groups that nothing new has touched.
        """
        wanted = self.total(chosen)
        places = []
        for hole in self._holes:
            aligned = -(-hole.address // GROUP_BLOCKS) * GROUP_BLOCKS
            for at in (hole.address, aligned):
                if wanted and at + wanted <= hole.end:
                    cost = len(groups([Extent(at, wanted)]) - self._touched)
                    exact = hole.blocks == wanted >= GROUP_BLOCKS
                    if anew or not cost:
                        places.append((cost - exact, hole.blocks, at))
        if places:
            self._put(chosen, min(places)[2])
        return bool(places) or not wanted

    def fill(self, rest: list[int]) -> list[int]:
        """Fill the largest holes with what fits, the largest first; return what is left."""
        for hole in sorted(self._holes, key=lambda hole: (-hole.blocks, hole.address)):
            if hole.blocks < GROUP_BLOCKS:
                break  # nothing that fits would be worth it, here and in all that follow
            chosen = set()
            room = hole.blocks
            for index in sorted(rest, key=lambda index: (-self.sizes[index], index)):
                if self.sizes[index] <= room:
                    chosen.add(index)
                    room -= self.sizes[index]
            if hole.blocks - room >= GROUP_BLOCKS:
                self._put(sorted(chosen), hole.address)
                rest = [index for index in rest if index not in chosen]
        return rest
