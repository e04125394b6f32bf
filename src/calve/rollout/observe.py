"""Looks at a rollout: the group, its refresh, its activities, the balancer, and what machines said of themselves.

A machine's boot report lies in the bucket within a second, its console comes with a lag of AWS's: the report is asked
first, the console of who has none, of a few in each round. What was learnt is kept for the next round; a new process
learns it again. Types: `Observer`, `Gateways`, `Place`.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from calve.aws.autoscaling import AutoScaling
from calve.aws.ec2 import Ec2
from calve.aws.elb import Elb
from calve.aws.refreshes import Refreshes
from calve.cache.objects import is_missing
from calve.contract import evidence
from calve.contract.userdata import UserData, UserDataError
from calve.errors import AccessError, CalveError, DamagedError, NotFoundError, TransientError
from calve.rollout.observation import (
    End,
    Machine,
    Observation,
    Target,
    ends,
    failure_of,
    launched,
    refused,
)

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Iterable, Mapping

    from calve.aws.autoscaling import Activity, Group, GroupInstance
    from calve.aws.ec2 import TemplateVersion
    from calve.aws.elb import TargetHealth
    from calve.aws.refreshes import Refresh
    from calve.aws.session import Session
    from calve.cache.objects import Objects
    from calve.contract.evidence import Evidence

__all__ = ["Gateways", "Observer", "Said", "health_of", "report_of"]

_REPORTS: Final = 32
"""Reports that are asked for in one round, at most."""
_CONSOLES: Final = 4
"""Consoles likewise: GetConsoleOutput has a small budget of its own in an account."""
_CONSOLE_S: Final = 10.0
"""Between two looks at the same machine's console."""
_REPORT_BYTES: Final = 64 * 1024
_LINES: Final = 12
_MOST_ACTIVITIES: Final = 2000


@dataclass(frozen=True, slots=True)
class Gateways:
    """Where a fleet's facts come from."""

    scaling: AutoScaling
    refreshes: Refreshes
    ec2: Ec2
    elb: Elb
    objects: Objects

    @classmethod
    def of(cls, session: Session, objects: Objects) -> Self:
        """Return those of a session, and a bucket's objects."""
        return cls(AutoScaling(session), Refreshes(session), Ec2(session), Elb(session), objects)


def health_of(elb: Elb, target_groups: Iterable[str]) -> dict[str, TargetHealth]:
    """Return a health for each machine: of one in several target groups, one that is not healthy.

    A target group that somebody deleted says nothing.
    """
    health: dict[str, TargetHealth] = {}
    for arn in target_groups:
        with contextlib.suppress(NotFoundError):
            for one in elb.health(arn):
                there = health.get(one.id)
                if there is None or there.state == "healthy":
                    health[one.id] = one
    return health


def report_of(objects: Objects, data: UserData | None, instance: str) -> str:
    """Return a machine's boot report, foreign text; "" where there is none, or it is too long: there is the console.

    Args:
        objects: the bucket.
        data: what the machine was told; None where that is not known.
        instance: its id.

    Raises:
        AccessError: reports may not be read.
    """
    if data is None or not data.reports:
        return ""
    try:
        found = objects.get(data.report_key(instance), _REPORT_BYTES)
    except CalveError as error:
        if is_missing(error) or isinstance(error, DamagedError | TransientError):
            return ""
        raise
    return found.decode("utf-8", "replace")


@dataclass(slots=True)
class Said:
    """What a machine said, as far as we know, and when we looked; `text` is a report or a console."""

    first_s: float
    text: str = ""
    lines: tuple[str, ...] = ()
    events: tuple[Evidence, ...] = ()
    report_s: float = -1.0
    console_s: float = -1.0
    target: Target | None = None
    unhealthy: str = ""

    @property
    def failed(self) -> bool:
        """Say whether its last word is known."""
        return failure_of(self.events) is not None


class Observer:
    """Looks at one release's machines.

    Args:
        gateways: where from.
        group: the Auto Scaling group's name.
        version: of the launch template that the release's machines are launched from.
        told: is told, by a key and a sentence, what cannot be looked at.
    """

    def __init__(
        self,
        gateways: Gateways,
        group: str,
        version: TemplateVersion,
        told: Callable[[str, str], object] = lambda _key, _text: None,
    ) -> None:
        self._gateways = gateways
        self._told = told
        self._group = group
        self._version = version
        self._known: dict[str, Said] = {}
        self._others: set[str] = set()
        try:
            self._data: UserData | None = UserData.parse(version.user_data)
        except UserDataError:
            self._data = None

    def look(self, group: Group, refresh: Refresh | None, now: dt.datetime) -> Observation:
        """Return what is seen of the release now."""
        at_s = now.timestamp()
        activities = self._activities(refresh)
        ended = ends(activities)
        mine = {one.id: one for one in group.instances if self._is_mine(one)}
        self._others.update(one.id for one in group.instances if one.id not in mine)
        # Who has left the group is of the release where the refresh launched it: old machines fail too.
        born = launched(activities)
        own = (born.keys() | self._known.keys()) - self._others
        ids = [*mine, *(one for one in ended if one in own and one not in mine)]
        for name in ids:
            self._known.setdefault(name, Said(born.get(name, at_s)))
        self._targets(group, mine, at_s)
        waiting = [one for one in ids if one not in mine or not self._is_well(mine[one])]
        self._listen(waiting, mine.keys(), at_s)
        machines = tuple(self._machine(one, mine.get(one), ended) for one in ids)
        return Observation(at_s, refresh, machines, refused(activities))

    def said(self, instance: str) -> str:
        """Return the last that a machine said, foreign text; "" where nothing is known."""
        known = self._known.get(instance)
        return "" if known is None else known.text

    def listen(self, instance: str) -> str:
        """Ask a machine's report and console once more, whatever was known; return what it said."""
        known = self._known.setdefault(instance, Said(0.0))
        self._report(instance, known, 0.0)
        console = self._console_of(instance)
        if len(console) > len(known.text):
            self._take(known, console)
        return known.text

    def _activities(self, refresh: Refresh | None) -> tuple[Activity, ...]:
        """Return those of the refresh: from its start to its rollback, when what is launched is old again."""
        if refresh is None or refresh.started_at is None:
            return ()
        found = self._gateways.scaling.activities(
            self._group, most=_MOST_ACTIVITIES, since=refresh.started_at
        )
        back = None if refresh.rollback is None else refresh.rollback.started_at
        return tuple(one for one in found if back is None or one.started_at < back)

    def _targets(self, group: Group, mine: dict[str, GroupInstance], at_s: float) -> None:
        health = health_of(self._gateways.elb, group.target_groups)
        for name in mine:
            found, known = health.get(name), self._known[name]
            if found is None:
                known.target = None
            elif known.target is None or (known.target.state, known.target.reason) != (
                found.state,
                found.reason or "",
            ):
                known.target = Target(found.state, found.reason or "", at_s)
                if found.state == "unhealthy":
                    known.unhealthy = found.reason or ""

    def _is_mine(self, one: GroupInstance) -> bool:
        version = self._version
        return (one.template_id, one.version) == (version.template_id, str(version.number))

    def _is_well(self, one: GroupInstance) -> bool:
        """Say whether nothing more is to be heard of it; without a balancer it has to say so itself."""
        known = self._known[one.id]
        if known.target is not None:
            well = known.target.state == "healthy"
        else:
            well = any(event.kind == "healthy" for event in known.events)
        return well and one.lifecycle == "InService"

    # What machines say

    def _listen(self, ids: Iterable[str], present: Iterable[str], at_s: float) -> None:
        """Ask for what is not known yet: who has left first, then whom we asked longest ago."""
        here = set(present)
        open_ = [one for one in ids if not self._known[one].failed]
        if self._data is not None and self._data.reports:
            order = sorted(open_, key=lambda one: (one in here, self._known[one].report_s))
            for one in order[:_REPORTS]:
                self._report(one, self._known[one], at_s)
        left = [
            one
            for one in open_
            if not self._known[one].failed and at_s - self._known[one].console_s >= _CONSOLE_S
        ]
        left.sort(key=lambda one: (one in here, self._known[one].console_s))
        for one in left[:_CONSOLES]:
            self._known[one].console_s = at_s
            text = self._console_of(one)
            if text:
                self._take(self._known[one], text)

    def _report(self, instance: str, known: Said, at_s: float) -> None:
        known.report_s = at_s
        text = report_of(self._gateways.objects, self._data, instance)
        if text:
            self._take(known, text)

    def _console_of(self, instance: str) -> str:
        try:
            return self._gateways.ec2.console(instance)
        except AccessError as error:
            self._told("console", f"machines' consoles are not looked at: {error.message}")
            return ""
        except CalveError:
            return ""  # it is gone, its type has no present console, or EC2 no good answer

    @staticmethod
    def _take(known: Said, text: str) -> None:
        known.text = text
        known.events = tuple(evidence.read(text))
        said = (line.rstrip() for line in text.splitlines() if line.strip())
        known.lines = tuple(deque(said, _LINES))

    def _machine(
        self, name: str, member: GroupInstance | None, ended: Mapping[str, End]
    ) -> Machine:
        known = self._known[name]
        return Machine(
            name,
            "" if member is None else member.lifecycle,
            known.first_s,
            known.target if member is not None else None,
            known.events,
            known.lines,
            ended.get(name),
            known.unhealthy,
        )
