"""A closure that is in the cache is put on a fleet: the lock, the release's number, the rollout. Run again, it goes on."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from calve.errors import ConflictError
from calve.fleet import history, lock
from calve.fleet.verdict import Outcome
from calve.rollout import start
from calve.rollout.run import Host, Rollout, Settings
from calve.rollout.steps import Conclude

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calve.fleet.config import Fleet
    from calve.fleet.release import Content, Release
    from calve.rollout.observe import Gateways

__all__ = ["begun", "settle", "unsettled"]


@contextmanager
def begun(
    content: Content,
    fleet: Fleet,
    gateways: Gateways,
    host: Host,
    *,
    cache: str,
    timeout_s: int | None = None,
) -> Iterator[Rollout]:
    """Hold the fleet's lock while the block lasts, and give the rollout of its release: a new one, or what was left.

    Args:
        content: what is to be run.
        fleet: where.
        gateways: AWS and the bucket.
        host: who runs it.
        cache: URL of the binary cache, for machines that know none yet.
        timeout_s: as `Rules.timeout_s`.

    Raises:
        ConflictError: somebody else deploys, or another release is being rolled out.
        NotFoundError: there is no such group.
    """
    with lock.held(gateways.objects, fleet.name, doing="a deploy", clock=host.clock) as held:
        group = gateways.scaling.group(fleet.group)
        hooks = gateways.scaling.hooks(fleet.group)
        active = any(one.active for one in gateways.refreshes.newest(fleet.group))
        if not active:
            settle(fleet, gateways, host, but=content)
        release = start.number(
            gateways.objects,
            fleet.name,
            content,
            now=host.clock.now(),
            begun=active,
            left=held.left is not None,
        )
        settings = Settings(
            start.preferences(fleet.rollout, group),
            start.rules(fleet, timeout_s),
            start.change(release, fleet, group, hooks, cache),
        )
        yield Rollout(release, fleet.group, gateways, settings, replace(host, lock=held))


def unsettled(fleet: Fleet, gateways: Gateways, host: Host) -> Release | None:
    """Return the release that went well while nobody watched, so that only its verdict lacks; None where none did."""
    there = history.under_way(gateways.objects, fleet.name)
    if there is None:
        return None
    step = Rollout(there, fleet.group, gateways, Settings(), host).standing()
    concludes = isinstance(step, Conclude) and step.outcome is Outcome.RELEASED
    return there if concludes else None


def settle(fleet: Fleet, gateways: Gateways, host: Host, *, but: Content | None = None) -> None:
    """Write the verdict of a release whose refresh ended while nobody watched.

    Args:
        fleet: whose.
        gateways: AWS and the bucket.
        host: who does it.
        but: the release of this closure is left alone: it is about to be gone on with.
    """
    there = history.under_way(gateways.objects, fleet.name)
    if there is None or (but is not None and but.is_of(there)):
        return
    settings = Settings(rules=start.rules(fleet))
    with suppress(ConflictError):  # it has no refresh: it is superseded
        Rollout(there, fleet.group, gateways, settings, host).round()
