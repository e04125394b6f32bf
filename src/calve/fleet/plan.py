"""The plan of a release: what changes, which machines are replaced, what they fetch, how long it takes.

From manifests, a fleet's rules and facts that are passed in; nothing is asked of anybody. It knows the arithmetic of
minimum and maximum healthy percentages of an instance refresh.
Source: https://docs.aws.amazon.com/autoscaling/ec2/userguide/instance-refresh-overview.html
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from calve.cache.manifest import Manifest
from calve.fleet.config import Delivery, Fleet, Rollout, Strategy
from calve.fleet.difference import Difference, Fetch, difference, fetched
from calve.nix.storepath import StorePath

__all__ = ["Live", "Plan", "Surge", "canary_percent", "plan", "sized", "surge"]

_NOTHING: frozenset[StorePath] = frozenset()


@dataclass(frozen=True, slots=True)
class Live:
    """The release that a fleet runs; `manifest` is None where the cache has lost it, `image` where it named none."""

    number: int
    system: StorePath
    manifest: Manifest | None
    image: str | None = None


@dataclass(frozen=True, slots=True)
class Surge:
    """How a group's machines are replaced.

    Attributes:
        machines: how many are replaced: the group's desired capacity.
        fewest: healthy ones there are at any time.
        most: machines there are at any time.
        at_once: how many new ones boot at the same time.
        batches: how many times that is done, one after the other.
        canary: how many of them come first, in a batch of their own; 0 where none do.
        pause_s: how long the others wait for them.
    """

    machines: int
    fewest: int
    most: int
    at_once: int
    batches: int
    canary: int = 0
    pause_s: int = 0

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "machines": self.machines,
            "fewest": self.fewest,
            "most": self.most,
            "at_once": self.at_once,
            "batches": self.batches,
            "canary": self.canary,
            "pause_s": self.pause_s,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What a deploy would do.

    Attributes:
        fleet: its name.
        number: of the release.
        resumes: whether that is made already, and without a verdict: a deploy goes on with it.
        system: its toplevel.
        delivery: how machines get it.
        image: what they boot from now on; None for what they boot already.
        live: number of the release that it follows; None for the first one.
        changes: whether there is anything to do.
        difference: from the live release; None without one, or where its manifest is lost.
        surge: None where nobody said how many machines there are, or none is replaced.
        fetch: what each machine fetches; None where it does not fetch from a cache.
        fetch_seeded: the same where its image has the live release's closure already; None without one.
        bake_s: how long all must stay healthy at the end.
        warm_up_s: how long a machine is in service before it counts.
        boot_s: from a machine's launch until it is in service; None where it is not known.
    """

    fleet: str
    number: int
    resumes: bool
    system: StorePath
    delivery: Delivery
    image: str | None
    live: int | None
    changes: bool
    difference: Difference | None
    surge: Surge | None
    fetch: Fetch | None
    fetch_seeded: Fetch | None
    bake_s: int
    warm_up_s: float
    boot_s: float | None

    @property
    def predicted_s(self) -> float | None:
        """Return how many seconds it would take, from the first launch to the end of baking; None where unknown."""
        if not self.changes:
            return 0.0
        if self.surge is None or self.boot_s is None:
            return None
        booting_s = self.surge.batches * (self.boot_s + self.warm_up_s)
        return booting_s + self.surge.pause_s + self.bake_s

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        seeded = self.fetch_seeded
        return {
            "fleet": self.fleet,
            "release": self.number,
            "resumes": self.resumes,
            "system": str(self.system),
            "delivery": self.delivery.value,
            "image": self.image,
            "live": self.live,
            "changes": self.changes,
            "surge": None if self.surge is None else self.surge.document(),
            "fetch": None if self.fetch is None else self.fetch.document(),
            "fetch_seeded": None if seeded is None else seeded.document(),
            "bake_s": self.bake_s,
            "warm_up_s": self.warm_up_s,
            "boot_s": self.boot_s,
            "predicted_s": self.predicted_s,
            "difference": None if self.difference is None else self.difference.document(),
        }


def surge(machines: int, rules: Rollout) -> Surge:
    """Return how a group of so many machines is replaced.

    The fewest are rounded up, the most down; yet one at a time is always replaced: beyond the group's size where the
    maximum is above 100 percent, otherwise in the place of one that is terminated first. A canary is one machine, at
    least.
    """
    fewest = -(-machines * rules.min_healthy_percent // 100)
    most = machines * rules.max_healthy_percent // 100
    if rules.max_healthy_percent > 100:
        most = max(most, machines + 1)
    else:
        fewest = min(fewest, max(machines - 1, 0))
    at_once = min(machines, most - fewest)
    if not at_once:
        return Surge(machines, fewest, most, 0, 0)
    first = rules.strategy is Strategy.CANARY and machines > 1
    canary = -(-machines * canary_percent(machines) // 100) if first else 0
    batches = -(-canary // at_once) - (canary - machines) // at_once
    pause_s = rules.canary_s if first else 0
    return Surge(machines, fewest, most, at_once, batches, canary, pause_s)


def canary_percent(machines: int) -> int:
    """Return how much of a group its canary is: a checkpoint of one machine, where 1 percent is not more."""
    return max(1, 100 // machines)


def plan(
    fleet: Fleet,
    manifest: Manifest,
    *,
    number: int,
    resumes: bool = False,
    live: Live | None = None,
    image: str | None = None,
    machines: int | None = None,
    boot_s: float | None = None,
    warm_up_s: float | None = None,
) -> Plan:
    """Plan a release.

    Args:
        fleet: its rules.
        manifest: of the system to release; sizes of its objects where they are known, see `sized`.
        number: of the release.
        resumes: whether it is made already.
        live: the one that runs.
        image: that its machines are to boot from now on.
        machines: the group's desired capacity, where it is known.
        boot_s: from a machine's launch until it is in service, where it is known.
        warm_up_s: of the instance refresh; None is the fleet file's.
    """
    earlier = None if live is None else live.manifest
    changed = None if earlier is None else difference(earlier, manifest)
    same = live is not None and live.system == manifest.toplevel
    fresh = image is not None and (live is None or live.image != image)
    replaced = None if fleet.delivery is Delivery.SSH else machines
    fetch, seeded = _fetches(fleet.delivery, manifest, earlier)
    return Plan(
        fleet=fleet.name,
        number=number,
        resumes=resumes,
        system=manifest.toplevel,
        delivery=fleet.delivery,
        live=None if live is None else live.number,
        changes=fresh or (not same if changed is None else not changed.same),
        image=image,
        difference=changed,
        surge=None if replaced is None else surge(replaced, fleet.rollout),
        fetch=fetch,
        fetch_seeded=seeded,
        bake_s=fleet.rollout.bake_s,
        warm_up_s=fleet.rollout.warmup_s if warm_up_s is None else warm_up_s,
        boot_s=boot_s,
    )


def _fetches(
    delivery: Delivery, manifest: Manifest, earlier: Manifest | None
) -> tuple[Fetch | None, Fetch | None]:
    """Return what a machine fetches: a bare one, and one that has the earlier closure."""
    has = _NOTHING if earlier is None else frozenset(entry.info.path for entry in earlier.paths)
    match delivery:
        case Delivery.IMAGE | Delivery.USER_DATA_BUILD:
            return None, None
        case Delivery.SSH:
            return fetched(manifest, has), None
        case Delivery.INITRD | Delivery.USER_DATA_PULL:
            seeded = None if earlier is None else fetched(manifest, has)
            return fetched(manifest, _NOTHING), seeded


def sized(manifest: Manifest, known: Manifest) -> Manifest:
    """Return a manifest with the sizes of its objects as far as another one knows them: a store knows none."""
    sizes = {entry.info.path: entry.file_size for entry in known.paths}
    entries = (
        entry
        if entry.file_size is not None
        else replace(entry, file_size=sizes.get(entry.info.path))
        for entry in manifest.paths
    )
    return Manifest(manifest.toplevel, tuple(entries))
