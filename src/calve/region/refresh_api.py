"""Auto Scaling's actions on instance refreshes.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01), StartInstanceRefresh, DescribeInstanceRefreshes,
CancelInstanceRefresh (which cancels a rollback too), RollbackInstanceRefresh; User Guide, "Undo changes with a rollback"
(alarms at the start). Not thread-safe: `cloud` holds one lock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calve.region.group import find, invalid
from calve.region.names import activity_uuid
from calve.region.query import page, time_of
from calve.region.refresh import Preferences, Refresh, Rollback, Status, cancel, rollback
from calve.region.refresh_preferences import preferences_row, read_preferences
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calve.region.group import Group
    from calve.region.query import Action, Params
    from calve.region.templates import TemplateSpec

__all__ = ["RefreshActions", "template_row"]


class RefreshActions:
    """The actions.

    Args:
        groups: The region's groups by name; changed in place.
        spec: Reads a launch template that a request names.
        alarms: The states of all alarms by name; looked at whenever a refresh starts.
    """

    def __init__(
        self,
        groups: dict[str, Group],
        spec: Callable[[Params | None], TemplateSpec],
        alarms: Mapping[str, str],
    ) -> None:
        self._groups = groups
        self._spec = spec
        self._alarms = alarms
        self.actions: Mapping[str, Action] = {
            "StartInstanceRefresh": self._start,
            "DescribeInstanceRefreshes": self._describe,
            "CancelInstanceRefresh": self._cancel,
            "RollbackInstanceRefresh": self._rollback,
        }

    def _start(self, params: Params, now: float) -> Mapping[str, Any]:
        group = find(self._groups, params.need("AutoScalingGroupName"))
        strategy = params.text("Strategy") or "Rolling"
        configuration = params.struct("DesiredConfiguration")
        spec = None
        if configuration is not None:
            spec = self._spec(configuration.struct("LaunchTemplate"))
        preferences = read_preferences(params.struct("Preferences"))
        params.done()
        if strategy != "Rolling":
            raise invalid(f"Strategy '{strategy}' is not simulated")
        if group.refresh is not None:
            raise Refusal(
                400,
                "InstanceRefreshInProgress",
                "An Instance Refresh is already in progress and blocks the execution of this Instance Refresh.",
            )
        if preferences.auto_rollback:
            _check_rollback(group, spec)
        _check_alarms(preferences, self._alarms)
        if group.desired == 0 and not group.instances:
            raise invalid("The group has no instances to refresh")
        refresh_id = activity_uuid(group.name, group.created_at, "refresh", group.serial + 1)
        made = Refresh(refresh_id, spec, preferences, now)
        self._groups[group.name] = replace(
            group, serial=group.serial + 1, refreshes=(*group.refreshes, made)
        )
        return {"InstanceRefreshId": refresh_id}

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = find(self._groups, params.need("AutoScalingGroupName"))
        ids = params.strings("InstanceRefreshIds")
        found = [one for one in reversed(group.refreshes) if not ids or one.id in ids]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=100)
        params.done()
        return {"InstanceRefreshes": [_row(one, group) for one in shown], "NextToken": token}

    def _cancel(self, params: Params, now: float) -> Mapping[str, Any]:
        group = find(self._groups, params.need("AutoScalingGroupName"))
        waits = params.boolean("WaitForTransitioningInstances")
        params.done()
        refresh = _active(group)
        self._put(group, cancel(refresh, now if waits is False else None))
        return {"InstanceRefreshId": refresh.id}

    def _rollback(self, params: Params, now: float) -> Mapping[str, Any]:
        group = find(self._groups, params.need("AutoScalingGroupName"))
        params.done()
        refresh = _active(group)
        if refresh.rolls_back:
            raise _no_active(group)
        if refresh.spec is None or group.spec.version.startswith("$"):
            what = (
                "it was started without a desired configuration"
                if refresh.spec is None
                else f"the Auto Scaling group uses the launch template version {group.spec.version}"
            )
            raise Refusal(
                400,
                "IrreversibleInstanceRefresh",
                f"The Instance Refresh {refresh.id} cannot be rolled back: {what}.",
            )
        self._put(group, rollback(refresh, "Rollback initiated by a user request.", now))
        return {"InstanceRefreshId": refresh.id}

    def _put(self, group: Group, refresh: Refresh) -> None:
        self._groups[group.name] = replace(group, refreshes=(*group.refreshes[:-1], refresh))


def _active(group: Group) -> Refresh:
    """Return the refresh that can be ended early; Refusal where there is none."""
    refresh = group.refresh
    if refresh is None or refresh.status is Status.CANCELLING:
        raise _no_active(group)
    return refresh


def _no_active(group: Group) -> Refusal:
    return Refusal(
        400,
        "ActiveInstanceRefreshNotFound",
        f"No in progress or pending Instance Refresh found for Auto Scaling group {group.name}",
    )


def _check_alarms(preferences: Preferences, alarms: Mapping[str, str]) -> None:
    for name in preferences.alarms:
        state = alarms.get(name)
        if state is None:
            raise invalid(f"The CloudWatch alarm {name} does not exist")
        if state != "OK":
            raise invalid(
                f"The CloudWatch alarm {name} is in the {state} state; an instance refresh can only be "
                "started with alarms in the OK state"
            )


def _check_rollback(group: Group, spec: TemplateSpec | None) -> None:
    if spec is None:
        raise invalid("AutoRollback requires a DesiredConfiguration")
    if group.spec.version.startswith("$"):
        raise invalid(
            "AutoRollback cannot be used when the Auto Scaling group's launch template version is "
            f"{group.spec.version}"
        )


def template_row(spec: TemplateSpec) -> dict[str, str]:
    """Show a launch template as a group, an instance or a refresh names it."""
    return {
        "LaunchTemplateId": spec.id,
        "LaunchTemplateName": spec.name,
        "Version": spec.version,
    }


def _row(one: Refresh, group: Group) -> dict[str, Any]:
    progress = {"PercentageComplete": one.percent, "InstancesToUpdate": one.remaining}
    return {
        "InstanceRefreshId": one.id,
        "AutoScalingGroupName": group.name,
        "Status": one.status.value,
        "StatusReason": one.reason,
        "StartTime": time_of(one.started_at),
        "EndTime": None if one.ended_at is None else time_of(one.ended_at),
        **progress,
        "ProgressDetails": {"LivePoolProgress": progress},
        "Strategy": "Rolling",
        "Preferences": preferences_row(one.preferences),
        "DesiredConfiguration": {"LaunchTemplate": template_row(one.spec)} if one.spec else None,
        "RollbackDetails": None if one.rollback is None else _rollback_row(one.rollback),
    }


def _rollback_row(one: Rollback) -> dict[str, Any]:
    progress = {"PercentageComplete": one.percent, "InstancesToUpdate": one.remaining}
    return {
        "RollbackReason": one.reason,
        "RollbackStartTime": time_of(one.started_at),
        "PercentageCompleteOnRollback": one.percent,
        "InstancesToUpdateOnRollback": one.remaining,
        "ProgressDetailsOnRollback": {"LivePoolProgress": progress},
    }
