"""A fleet's machines as rows: the group's members, the release of each, and what the balancer says of it.

Pure but for `look`, which asks AWS: the group, each of its target groups, each launch template version in use.
Sources: Auto Scaling API reference, DescribeAutoScalingGroups; Elastic Load Balancing, DescribeTargetHealth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from calve.errors import NotFoundError

if TYPE_CHECKING:
    from calve.aws.autoscaling import Group, GroupInstance
    from calve.aws.ec2 import Ec2, TemplateVersion
    from calve.aws.elb import TargetHealth
    from calve.contract.userdata import UserData
    from calve.fleet.config import Fleet
    from calve.rollout.observe import Gateways

    Source = tuple[str | None, str | None]

__all__ = ["Row", "Seen", "counts", "look", "number", "rows", "source", "span", "with_version"]

_UNKNOWN: Final = "-"


@dataclass(frozen=True, slots=True)
class Row:
    """A machine of the group.

    Attributes:
        template: id of the launch template that it was launched from; None where the group does not say.
        version: that template's; likewise.
        release: that version's; None where it is not of this fleet.
        lifecycle: AWS's word.
        healthy: as the group has it.
        target: None where it is registered nowhere.
    """

    id: str
    template: str | None
    version: str | None
    release: int | None
    zone: str
    lifecycle: str
    healthy: bool
    target: TargetHealth | None

    @property
    def leaving(self) -> bool:
        """Say whether it is on its way out."""
        return self.lifecycle.startswith("Terminat")

    @property
    def balance(self) -> str:
        """Return what the balancer says, in its words; "-" where it says nothing."""
        if self.target is None:
            return _UNKNOWN
        reason = f" ({self.target.reason})" if self.target.reason else ""
        return f"{self.target.state}{reason}"

    @property
    def state(self) -> str:
        """Return where it is in its life, and what else is to be said of it."""
        if self.lifecycle != "InService":
            return self.lifecycle
        group = "" if self.healthy else ", unhealthy for the group"
        balance = "" if self.target is None else f", {self.balance}"
        return f"{self.lifecycle}{balance}{group}"

    def document(self) -> dict[str, object]:
        """Return it as JSON's types."""
        target = self.target
        return {
            "instance": self.id,
            "release": self.release,
            "version": self.version,
            "zone": self.zone,
            "lifecycle": self.lifecycle,
            "healthy": self.healthy,
            "target": None if target is None else target.state,
            "target_reason": None if target is None else target.reason,
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """A group as it was found.

    Attributes:
        fleet: whose it is.
        configured: number of the version that it launches from now; None where it has no template.
        told: what machines are told, by the launch template and the number of its version; None where that is not ours, or the version is gone.
    """

    fleet: str
    group: Group
    configured: str | None
    told: Mapping[Source, UserData | None]
    rows: tuple[Row, ...]

    def release(self, version: str | None) -> int | None:
        """Return the release that a version of the group's template carries; None where it carries none of this fleet."""
        return _release(self.fleet, self.told, (self.group.template_id, version))

    def told_of(self, row: Row) -> UserData | None:
        """Return what a machine was told; None where that is not ours, or the version is gone."""
        return self.told.get((row.template, row.version))


def look(gateways: Gateways, fleet: Fleet) -> Seen:
    """Ask AWS how a fleet's group stands; NotFoundError where the group does not exist."""
    from calve.rollout.observe import health_of

    try:
        group = gateways.scaling.group(fleet.group)
    except NotFoundError as error:
        raise NotFoundError(
            error.message,
            place=fleet.group,
            hint=f"is it in another region (--region), or called otherwise (fleet.{fleet.name}.group)?",
        ) from error
    health = health_of(gateways.elb, group.target_groups)
    told: dict[Source, UserData | None] = {}
    configured = None
    if group.template_id is not None:
        now = _version(gateways.ec2, group.template_id, group.version or "$Default")
        if now is not None:
            configured = str(now.number)
            told[group.template_id, configured] = _told(now)
    for one in group.instances:
        if one.template_id is not None and one.version is not None and source(one) not in told:
            told[source(one)] = _told(_version(gateways.ec2, one.template_id, one.version))
    return Seen(fleet.name, group, configured, told, rows(fleet.name, group, health, told))


def source(member: GroupInstance) -> Source:
    """Return what a member was launched from: a launch template's id, and its version."""
    return member.template_id, member.version


def with_version(seen: Seen, ec2: Ec2, version: str) -> Seen:
    """Ask what one more version of the group's launch template carries, unless it is known."""
    template = seen.group.template_id
    if template is None or (template, version) in seen.told:
        return seen
    told = {**seen.told, (template, version): _told(_version(ec2, template, version))}
    return replace(seen, told=told)


def rows(
    fleet: str,
    group: Group,
    health: Mapping[str, TargetHealth],
    told: Mapping[Source, UserData | None],
) -> tuple[Row, ...]:
    """Join a group's members with their targets and releases; those of no release first, then by release and id."""
    joined = (
        Row(
            one.id,
            one.template_id,
            one.version,
            _release(fleet, told, source(one)),
            one.zone,
            one.lifecycle,
            one.healthy,
            health.get(one.id),
        )
        for one in group.instances
    )
    return tuple(sorted(joined, key=lambda row: (row.release or 0, row.version or "", row.id)))


def counts(found: Iterable[Row]) -> list[tuple[int | None, str | None, str, int]]:
    """Return release, version, state and number of the machines that share them, in the order of `rows`."""
    counted = Counter((row.release, row.version, row.state) for row in found)
    return [(*key, count) for key, count in counted.items()]


def number(release: int | None) -> str:
    """Write a release's number; "-" for none."""
    return _UNKNOWN if release is None else str(release)


def span(seconds: float | None) -> str:
    """Write about how long something lasts: "45 s", "12 min", "5 h", "3 d"; "-" where it is not known."""
    if seconds is None:
        return _UNKNOWN
    left = max(0.0, seconds)
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if left < size * most:
            return f"{int(left // size)} {unit}"
    return f"{int(left // 86_400)} d"


def _release(
    fleet: str, told: Mapping[Source, UserData | None], launched_from: Source
) -> int | None:
    data = told.get(launched_from)
    return data.release if data is not None and data.fleet == fleet else None


def _version(ec2: Ec2, template: str, version: str) -> TemplateVersion | None:
    try:
        return ec2.version(template, version)
    except NotFoundError:
        return None


def _told(version: TemplateVersion | None) -> UserData | None:
    from calve.contract.userdata import UserData, UserDataError

    if version is None:
        return None
    try:
        return UserData.parse(version.user_data)
    except UserDataError:
        return None
