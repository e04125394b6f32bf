"""What an Auto Scaling group is made of, as frozen data: the group, its instances and activities, rules, effects.

Source: Amazon EC2 Auto Scaling User Guide and API Reference. `groups.advance` is what happens to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from calve.region.activities import Activity
from calve.region.ec2 import State
from calve.region.hooks import Hook, Wait
from calve.region.refresh import Refresh
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.region.templates import TemplateSpec

__all__ = [
    "Deregister",
    "Effect",
    "Group",
    "GroupInstance",
    "Launch",
    "Lifecycle",
    "Register",
    "Rules",
    "Seen",
    "Step",
    "Terminate",
    "World",
    "find",
    "invalid",
]


class Lifecycle(StrEnum):
    """An instance's state in its group."""

    PENDING = "Pending"
    PENDING_WAIT = "Pending:Wait"
    PENDING_PROCEED = "Pending:Proceed"
    IN_SERVICE = "InService"
    ENTERING_STANDBY = "EnteringStandby"
    STANDBY = "Standby"
    TERMINATING = "Terminating"
    TERMINATING_WAIT = "Terminating:Wait"
    TERMINATING_PROCEED = "Terminating:Proceed"

    @property
    def launching(self) -> bool:
        """Say whether it is on its way into service."""
        return self in _LAUNCHING

    @property
    def leaving(self) -> bool:
        """Say whether it is on its way out of the group."""
        return self in _LEAVING

    @property
    def aside(self) -> bool:
        """Say whether it is no part of the group's capacity for now."""
        return self in _ASIDE


_LAUNCHING = {Lifecycle.PENDING, Lifecycle.PENDING_WAIT, Lifecycle.PENDING_PROCEED}
_ASIDE = {Lifecycle.ENTERING_STANDBY, Lifecycle.STANDBY}
_LEAVING = {Lifecycle.TERMINATING, Lifecycle.TERMINATING_WAIT, Lifecycle.TERMINATING_PROCEED}


@dataclass(frozen=True, slots=True)
class Rules:
    """What governs every group of the region.

    Attributes:
        launch_parallelism: At most so many new machines boot at once during a refresh; None for no limit. AWS has
            no such limit: it is the simulated host's, where machines under emulation slow each other down.
        give_up_s: A refresh without progress fails after so long.
        retry_s: After a launch that was refused, the next one waits so long, then twice as long, up to 64 times.
    """

    launch_parallelism: int | None = 1
    give_up_s: float = 3600.0
    retry_s: float = 5.0


@dataclass(frozen=True, slots=True)
class GroupInstance:
    """An instance of a group; `spec.version` is the number that it was launched from.

    Attributes:
        served: It was in service.
        sick: It is shown as unhealthy.
        ailment: Why, where it is to be replaced and was not yet.
        waits: What lifecycle hooks hold it for, while it is in one of the waiting states.
        protected: From scale-in.
    """

    id: str
    spec: TemplateSpec
    launched_at: float
    activity: str
    lifecycle: Lifecycle = Lifecycle.PENDING
    in_service_at: float = 0.0
    served: bool = False
    sick: bool = False
    ended: bool = False
    waits: tuple[Wait, ...] = ()
    zone: str = ""
    ailment: str = ""
    protected: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """An Auto Scaling group.

    Attributes:
        spec: Its launch template, as the client named it.
        checks_elb: Target health counts (health check type ELB).
        zones: Its availability zones.
        tags: Those that its instances get too.
        own_tags: Those that they do not get.
        cause: What a user last asked for; it becomes the cause of the activities that follow from it.
        serial: How many things were named.
        refused: Zones that had no room a moment ago; the others are tried first.
        suspended: Its suspended processes, and AWS's words for why.
        protects: New instances are protected from scale-in.
    """

    name: str
    spec: TemplateSpec
    min_size: int
    max_size: int
    desired: int
    created_at: float
    zones: tuple[str, ...] = ("",)
    target_groups: tuple[str, ...] = ()
    checks_elb: bool = False
    grace_s: float = 0.0
    cooldown_s: float = 300.0
    warmup_s: float | None = None
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    own_tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    hooks: Mapping[str, Hook] = field(default_factory=lambda: MappingProxyType({}))
    instances: Mapping[str, GroupInstance] = field(default_factory=lambda: MappingProxyType({}))
    activities: Mapping[str, Activity] = field(default_factory=lambda: MappingProxyType({}))
    refreshes: tuple[Refresh, ...] = ()
    cause: str = ""
    serial: int = 0
    deleting: bool = False
    retry_at: float = 0.0
    refusals: int = 0
    refused: frozenset[str] = frozenset()
    suspended: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    protects: bool = False

    @property
    def refresh(self) -> Refresh | None:
        """Return the refresh that is under way."""
        last = self.refreshes[-1] if self.refreshes else None
        return last if last is not None and last.status.active else None

    @property
    def gone(self) -> bool:
        """Say whether its deletion is done."""
        return self.deleting and not self.instances


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen of an instance.

    Attributes:
        state: As EC2 gives it.
        target: Its state in the group's target groups, the worst of them: `initial`, `healthy`, `unhealthy`,
            `draining`; None where it is registered in none.
        error: Why its launch was refused.
    """

    state: State
    target: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class World:
    """What a group sees: its instances, (default, latest) of each launch template by id, alarms' states by name."""

    instances: Mapping[str, Seen]
    versions: Mapping[str, tuple[int, int]]
    alarms: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def resolve(self, spec: TemplateSpec) -> TemplateSpec:
        """Replace `$Default` and `$Latest` by the number of now."""
        if not spec.version.startswith("$"):
            return spec
        default, latest = self.versions[spec.id]
        return replace(spec, version=str(default if spec.version == "$Default" else latest))


@dataclass(frozen=True, slots=True)
class Launch:
    """Start an instance from a numbered version, in a zone; "" for the region's only one."""

    instance_id: str
    spec: TemplateSpec
    zone: str = ""


@dataclass(frozen=True, slots=True)
class Terminate:
    """End an instance's machine."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class Register:
    """Put an instance into a target group."""

    instance_id: str
    target_group: str


@dataclass(frozen=True, slots=True)
class Deregister:
    """Take an instance out of a target group, draining it."""

    instance_id: str
    target_group: str


Effect = Launch | Terminate | Register | Deregister


@dataclass(frozen=True, slots=True)
class Step:
    """A group after `advance`, what is to be done, and when to look again if nothing is seen before."""

    group: Group
    effects: tuple[Effect, ...]
    wake_at: float | None


def find(groups: Mapping[str, Group], name: str) -> Group:
    """Find a group by its name; Refusal where there is none."""
    if name not in groups:
        raise invalid(f"AutoScalingGroup name not found - AutoScalingGroup '{name}' not found")
    return groups[name]


def invalid(message: str) -> Refusal:
    """Make Auto Scaling's own error for what it cannot take."""
    return Refusal(400, "ValidationError", message)
