"""Auto Scaling's actions on instance refreshes.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01), StartInstanceRefresh, DescribeInstanceRefreshes,
CancelInstanceRefresh. Not thread-safe: `cloud` holds one lock.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calve.region import refresh as refreshes
from calve.region.group import find, invalid
from calve.region.names import activity_uuid
from calve.region.query import page, time_of
from calve.region.refresh import Preferences, Refresh, Status
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
    """

    def __init__(
        self, groups: dict[str, Group], spec: Callable[[Params | None], TemplateSpec]
    ) -> None:
        self._groups = groups
        self._spec = spec
        self.actions: Mapping[str, Action] = {
            "StartInstanceRefresh": self._start,
            "DescribeInstanceRefreshes": self._describe,
            "CancelInstanceRefresh": self._cancel,
        }

    def _start(self, params: Params, now: float) -> Mapping[str, Any]:
        group = find(self._groups, params.need("AutoScalingGroupName"))
        strategy = params.text("Strategy") or "Rolling"
        configuration = params.struct("DesiredConfiguration")
        spec = None
        if configuration is not None:
            spec = self._spec(configuration.struct("LaunchTemplate"))
        preferences = _preferences(params.struct("Preferences"))
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

    def _cancel(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = find(self._groups, params.need("AutoScalingGroupName"))
        params.boolean("WaitForTransitioningInstances")
        params.done()
        refresh = group.refresh
        if refresh is None or refresh.status is Status.CANCELLING:
            raise Refusal(
                400,
                "ActiveInstanceRefreshNotFound",
                "No in progress or pending Instance Refresh found for Auto Scaling group "
                f"{group.name}",
            )
        cancelled = refreshes.cancel(refresh)
        self._groups[group.name] = replace(group, refreshes=(*group.refreshes[:-1], cancelled))
        return {"InstanceRefreshId": refresh.id}


def _preferences(params: Params | None) -> Preferences:
    if params is None:
        return Preferences()
    low = params.integer("MinHealthyPercentage", 0, 100)
    high = params.integer("MaxHealthyPercentage", 100, 200)
    warmup_s = params.integer("InstanceWarmup", 0, 86_400)
    if high is not None and low is None:
        raise invalid(
            "MinHealthyPercentage must be specified when MaxHealthyPercentage is specified"
        )
    if high is not None and low is not None and high - low > 100:
        raise invalid(
            "The difference between MaxHealthyPercentage and MinHealthyPercentage cannot be greater than 100"
        )
    return Preferences(
        90 if low is None else low,
        high,
        None if warmup_s is None else float(warmup_s),
        params.boolean("SkipMatching") or False,
        params.boolean("AutoRollback") or False,
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
    preferences = one.preferences
    return {
        "InstanceRefreshId": one.id,
        "AutoScalingGroupName": group.name,
        "Status": one.status.value,
        "StatusReason": one.reason,
        "StartTime": time_of(one.started_at),
        "EndTime": None if one.ended_at is None else time_of(one.ended_at),
        "PercentageComplete": one.percent,
        "InstancesToUpdate": one.remaining,
        "Strategy": "Rolling",
        "Preferences": {
            "MinHealthyPercentage": preferences.min_healthy,
            "MaxHealthyPercentage": preferences.max_healthy,
            "InstanceWarmup": None if preferences.warmup_s is None else round(preferences.warmup_s),
            "SkipMatching": preferences.skip_matching,
            "AutoRollback": preferences.auto_rollback,
        },
        "DesiredConfiguration": {"LaunchTemplate": template_row(one.spec)} if one.spec else None,
    }
