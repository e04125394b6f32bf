"""Auto Scaling's actions that suspend a group's processes and resume them.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01), SuspendProcesses, ResumeProcesses, SuspendedProcess; User
Guide, "Suspend and resume Amazon EC2 Auto Scaling processes". `groups` heeds Launch, Terminate, HealthCheck,
ReplaceUnhealthy, InstanceRefresh and AddToLoadBalancer; what the others do is not simulated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calve.region.group import find, invalid
from calve.region.names import stamp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.region.group import Group
    from calve.region.query import Action, Params

__all__ = ["ProcessActions", "suspended_rows"]

PROCESSES = (
    "Launch",
    "Terminate",
    "AddToLoadBalancer",
    "AlarmNotification",
    "AZRebalance",
    "HealthCheck",
    "InstanceRefresh",
    "ReplaceUnhealthy",
    "ScheduledActions",
)


class ProcessActions:
    """The actions.

    Args:
        groups: The region's groups by name; changed in place.
    """

    def __init__(self, groups: dict[str, Group]) -> None:
        self._groups = groups
        self.actions: Mapping[str, Action] = {
            "SuspendProcesses": self._suspend,
            "ResumeProcesses": self._resume,
            "DescribeScalingProcessTypes": self._types,
        }

    def _suspend(self, params: Params, now: float) -> Mapping[str, Any]:
        group, names = self._read(params)
        why = f"User suspended at {stamp(now)}"
        suspended = {**dict.fromkeys(names, why), **group.suspended}
        self._groups[group.name] = replace(group, suspended=suspended)
        return {}

    def _resume(self, params: Params, now: float) -> Mapping[str, Any]:
        group, names = self._read(params)
        left = {name: why for name, why in group.suspended.items() if name not in names}
        refresh = group.refresh
        if refresh is not None and len(left) < len(group.suspended):
            going_on = replace(refresh, progress_at=now)  # its hour begins anew
            group = replace(group, refreshes=(*group.refreshes[:-1], going_on))
        self._groups[group.name] = replace(group, suspended=left)
        return {}

    def _types(self, params: Params, _now: float) -> Mapping[str, Any]:
        params.done()
        return {"Processes": [{"ProcessName": name} for name in sorted(PROCESSES)]}

    def _read(self, params: Params) -> tuple[Group, list[str]]:
        """Read the group and the processes that a request names; all where it names none."""
        group = find(self._groups, params.need("AutoScalingGroupName"))
        names = params.strings("ScalingProcesses")
        params.done()
        for name in names or ():
            if name not in PROCESSES:
                raise invalid(f"Invalid process type '{name}'; one of {', '.join(PROCESSES)}")
        return group, names or list(PROCESSES)


def suspended_rows(group: Group) -> list[dict[str, str]]:
    """Show a group's suspended processes."""
    return [
        {"ProcessName": name, "SuspensionReason": why}
        for name, why in sorted(group.suspended.items())
    ]
