"""How a rollout begins: the release's number, what its machines are told, what the refresh and the judge go by.

Pure but for `number`, which takes up what a killed run left. Types: `Change` (see `run`), `Fleet` of the fleet file.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from calve.aws.refreshes import Preferences
from calve.contract import health as contract
from calve.contract.userdata import Hook, UserData, UserDataError
from calve.errors import ConflictError, NotFoundError, UsageError
from calve.fleet import ends, history
from calve.fleet import release as releases
from calve.fleet.config import Strategy
from calve.fleet.plan import canary_percent
from calve.fleet.tags import ALARMS_TAG, HOOK, HOOK_TAG, REPORTS_TAG
from calve.fleet.verdict import Outcome, Reason, Verdict
from calve.rollout.judge import Rules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calve.aws.autoscaling import AutoScaling, Group
    from calve.aws.autoscaling import Hook as GroupHook
    from calve.aws.ec2 import TemplateVersion
    from calve.cache.objects import Objects
    from calve.fleet.config import Fleet, Health, Rollout
    from calve.fleet.release import Content, Release
    from calve.rollout.run import Change

__all__ = ["alarms", "change", "checks", "number", "own_hook", "preferences", "resolved", "rules"]

_TAG: Final = "tag:"


def number(
    objects: Objects,
    fleet: str,
    content: Content,
    *,
    now: dt.datetime,
    begun: bool,
    left: bool,
) -> Release:
    """Return the release to roll out: one of this closure that is live or has not ended, else a new one.

    Args:
        objects: the bucket; the deploy lock is held.
        fleet: its name.
        content: what is to be run.
        now: UTC.
        begun: a refresh is under way, so that a release of another closure without a verdict is alive.
        left: who held the lock before was killed: a release of this closure that has ended is the one that it never
            told of.

    Raises:
        ConflictError: another release is being rolled out.
    """
    there = history.under_way(objects, fleet)
    if there is None:
        ended = history.recent(objects, fleet, most=1)
        live = history.live(objects, fleet)
        if ended and content.is_of(ended[0].release) and (left or ended[0].release == live):
            return ended[0].release
    else:
        if content.is_of(there):
            return there
        if begun:
            raise ConflictError(
                f"release {there.number} is being rolled out",
                hint="calve watch shows it; calve cancel or calve rollback ends it",
            )
        _supersede(objects, there, now)
    made = releases.create(objects, fleet, content, now=now)
    history.keep(objects, fleet, now)
    return made


def _supersede(objects: Objects, release: Release, now: dt.datetime) -> None:
    text = "its run ended before the instance refresh began, and another release took over"
    reason = Reason("superseded", text, (), "cli", now)
    ends.write(
        objects,
        Verdict(release.fleet, release.number, Outcome.CANCELLED, "", "cli", now, reason),
    )


def change(
    release: Release,
    fleet: Fleet,
    group: Group,
    hooks: tuple[GroupHook, ...],
    cache: str,
) -> Change:
    """Return what makes the release's user data out of the live launch template version's; UsageError where it is none.

    What is the place's own (the caches as machines reach them, the deadline) stays as it is; the fleet file says what
    is healthy, the group which hook waits and where reports go.
    """
    held = own_hook(hooks) is not None
    # A machine that lets go of a hook which is not there does no harm: the hook can be put once all know of it.
    held = held or group.tags.get(HOOK_TAG) == HOOK

    def make(live: TemplateVersion) -> bytes:
        try:
            before: UserData | None = UserData.parse(live.user_data)
        except UserDataError:
            before = None
        endpoint = before.hook.endpoint if before is not None and before.hook is not None else ""
        data = release.user_data(
            (cache,) if before is None else before.caches,
            deadline_s=600 if before is None else before.deadline_s,
            health=checks(fleet.health),
            hook=Hook(group.name, HOOK, endpoint) if held else None,
            reports=group.tags.get(REPORTS_TAG, "" if before is None else before.reports),
        )
        try:
            text = data.dump()
            UserData.parse(text)
        except UserDataError as error:
            raise UsageError(f"the release's user data: {error}", place=group.name) from error
        return text

    return make


def own_hook(hooks: Iterable[GroupHook]) -> GroupHook | None:
    """Return the launch hook that Calve's machines let go of; None where the group has none."""
    return next((one for one in hooks if one.name == HOOK and one.launching), None)


def checks(health: Health | None) -> contract.Health | None:
    """Return what user data says of a fleet file's `health`."""
    if health is None:
        return None
    return contract.Health(
        http=() if health.http is None else (contract.Http(health.http),),
        tcp=() if health.tcp is None else (health.tcp,),
        within_s=health.within_s,
    )


def resolved(fleet: Fleet, scaling: AutoScaling) -> Fleet:
    """Return the fleet with its group's name, where the fleet file has a tag: `tag:KEY=VALUE`.

    Raises:
        UsageError: it is no such tag, or several groups have it.
        NotFoundError: no group has it.
    """
    if not fleet.group.startswith(_TAG):
        return fleet
    key, equals, value = fleet.group.removeprefix(_TAG).rpartition("=")
    if not (key and equals):
        raise UsageError(f"fleet.{fleet.name}.group: a tag is written tag:KEY=VALUE")
    names = scaling.tagged(key, value)
    if not names:
        raise NotFoundError("no Auto Scaling group has this tag", place=fleet.group)
    if len(names) > 1:
        raise UsageError(
            f"{len(names)} groups have this tag: {', '.join(names)}",
            place=fleet.group,
            hint="a fleet is one group: name it",
        )
    return replace(fleet, group=names[0])


def preferences(rollout: Rollout, group: Group) -> Preferences:
    """Return how the refresh goes about it. A canary is one machine, at least, and a pause."""
    canary = rollout.strategy is Strategy.CANARY and group.desired > 1
    first = canary_percent(group.desired) if canary else 100
    return Preferences(
        rollout.min_healthy_percent,
        rollout.max_healthy_percent,
        rollout.warmup_s,
        checkpoints=(first, 100) if canary else (),
        checkpoint_delay_s=rollout.canary_s if canary else 0,
        bake_s=rollout.bake_s,
        alarms=alarms(rollout, group),
    )


def alarms(rollout: Rollout, group: Group) -> tuple[str, ...]:
    """Return the alarms that take part: the fleet file's, and those that `calve adopt` made for the group."""
    adopted = group.tags.get(ALARMS_TAG, "").split()
    return tuple(dict.fromkeys([*rollout.alarms, *adopted]))


def rules(fleet: Fleet, timeout_s: int | None = None) -> Rules:
    """Return what suffices for a verdict."""
    within_s = contract.WITHIN_S if fleet.health is None else fleet.health.within_s
    return Rules(
        within_s=float(within_s), timeout_s=None if timeout_s is None else float(timeout_s)
    )
