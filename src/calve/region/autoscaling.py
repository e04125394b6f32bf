"""The part of EC2 Auto Scaling that a fleet needs: groups, their instances and activities, instance refresh.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01). Actions only change what `groups` and `refresh` then bring
on; nothing is started here. Not thread-safe: `cloud` holds one lock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calve.region import refresh as refreshes
from calve.region.groups import Activity, Group, GroupInstance
from calve.region.names import activity_uuid, arn
from calve.region.query import AUTOSCALING, Action, Params, page, time_of
from calve.region.refresh import Preferences, Refresh, Status
from calve.region.signature import Refusal
from calve.region.templates import LaunchTemplate, TemplateSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["AutoScaling", "Lookups"]

_NOT_A_TEMPLATE = "You must use a valid fully-formed launch template. "
MOST = 10_000


@dataclass(frozen=True, slots=True)
class Lookups:
    """What Auto Scaling asks of its neighbours; each raises Refusal where there is nothing.

    Attributes:
        template: A launch template by id or by name.
        instance_type: Of an instance.
        target_group: That a target group exists.
    """

    template: Callable[[str | None, str | None], LaunchTemplate]
    instance_type: Callable[[str], str]
    target_group: Callable[[str], object]


class AutoScaling:
    """Groups' state and actions.

    Args:
        region: The region's name.
        zone: The availability zone of every instance.
        lookups: The neighbours.
    """

    dialect = AUTOSCALING

    def __init__(self, region: str, zone: str, lookups: Lookups) -> None:
        self.groups: dict[str, Group] = {}
        self._region = region
        self._zone = zone
        self._lookups = lookups
        self.actions: Mapping[str, Action] = {
            "CreateAutoScalingGroup": self._create,
            "UpdateAutoScalingGroup": self._update,
            "DeleteAutoScalingGroup": self._delete,
            "DescribeAutoScalingGroups": self._describe,
            "DescribeAutoScalingInstances": self._describe_instances,
            "SetDesiredCapacity": self._set_desired,
            "DescribeScalingActivities": self._describe_activities,
            "StartInstanceRefresh": self._start_refresh,
            "DescribeInstanceRefreshes": self._describe_refreshes,
            "CancelInstanceRefresh": self._cancel_refresh,
        }

    def _group(self, name: str) -> Group:
        if name not in self.groups:
            raise _invalid(f"AutoScalingGroup name not found - AutoScalingGroup '{name}' not found")
        return self.groups[name]

    # Groups

    def _create(self, params: Params, now: float) -> Mapping[str, Any]:
        name = params.need("AutoScalingGroupName")
        spec = self._spec(params.struct("LaunchTemplate"))
        min_size, max_size = _size(params, "MinSize"), _size(params, "MaxSize")
        if min_size is None or max_size is None:
            raise _invalid("MinSize and MaxSize must be given")
        desired = _size(params, "DesiredCapacity")
        arns = params.strings("TargetGroupARNs") or []
        group = Group(
            name,
            spec,
            min_size,
            max_size,
            min_size if desired is None else desired,
            now,
            zone=self._zone,
            target_groups=tuple(dict.fromkeys(arns)),
            tags=_tags(params),
        )
        group = _settings(group, params)
        params.strings("AvailabilityZones")
        params.text("VPCZoneIdentifier")
        params.done()
        if not re.fullmatch(r"[^:/\\\x00-\x1f]{1,255}", name):
            raise _invalid(f"Group name '{name}' is not valid")
        if name in self.groups:
            raise Refusal(
                400,
                "AlreadyExists",
                "AutoScalingGroup by this name already exists - A group with the name "
                f"{name} already exists",
            )
        _check_sizes(group)
        for target_group in group.target_groups:
            self._check_target_group(target_group)
        cause = (
            "a user request created an AutoScalingGroup changing the desired capacity "
            f"from 0 to {group.desired}"
        )
        self.groups[name] = replace(group, cause=cause)
        return {}

    def _check_target_group(self, target_group: str) -> None:
        try:
            self._lookups.target_group(target_group)
        except Refusal as refusal:
            raise _invalid(f"Provided Target Groups may not be valid: {refusal.message}") from None

    def _spec(self, params: Params | None) -> TemplateSpec:
        if params is None:
            raise _invalid(
                "Valid requests must contain either LaunchTemplate, LaunchConfigurationName, InstanceId or "
                "MixedInstancesPolicy parameter (only LaunchTemplate is simulated)."
            )
        template_id, name = params.text("LaunchTemplateId"), params.text("LaunchTemplateName")
        version = params.text("Version") or "$Default"
        if (template_id is None) == (name is None):
            raise _invalid(
                "Valid requests must contain either launchTemplateId or LaunchTemplateName"
            )
        try:
            template = self._lookups.template(template_id, name)
            template.resolve(version)
        except Refusal as refusal:
            raise _invalid(f"{_NOT_A_TEMPLATE}{refusal.message}") from None
        return TemplateSpec(template.id, template.name, version)

    def _update(self, params: Params, _now: float) -> Mapping[str, Any]:
        before = self._group(params.need("AutoScalingGroupName"))
        group = before
        template = params.struct("LaunchTemplate")
        if template is not None:
            group = replace(group, spec=self._spec(template))
        min_size, max_size = _size(params, "MinSize"), _size(params, "MaxSize")
        group = replace(
            group,
            min_size=group.min_size if min_size is None else min_size,
            max_size=group.max_size if max_size is None else max_size,
        )
        desired = _size(params, "DesiredCapacity")
        if desired is None:
            desired = min(max(group.desired, group.min_size), group.max_size)
        group = _settings(replace(group, desired=desired), params)
        params.done()
        _check_sizes(group)
        if group.desired != before.desired:
            cause = (
                f"a user request update of AutoScalingGroup constraints to min: {group.min_size}, "
                f"max: {group.max_size}, desired: {group.desired} changing the desired capacity "
                f"from {before.desired} to {group.desired}"
            )
            group = replace(group, cause=cause)
        self.groups[group.name] = group
        return {}

    def _set_desired(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = self._group(params.need("AutoScalingGroupName"))
        desired = _size(params, "DesiredCapacity")
        params.boolean("HonorCooldown")
        params.done()
        if desired is None:
            raise _invalid("DesiredCapacity must be given")
        if not group.min_size <= desired <= group.max_size:
            side = "above max" if desired > group.max_size else "below min"
            limit = group.max_size if desired > group.max_size else group.min_size
            raise _invalid(
                f"New SetDesiredCapacity value {desired} is {side} value {limit} for the AutoScalingGroup."
            )
        cause = (
            "a user request explicitly set group desired capacity changing the desired capacity "
            f"from {group.desired} to {desired}"
        )
        self.groups[group.name] = replace(group, desired=desired, cause=cause)
        return {}

    def _delete(self, params: Params, now: float) -> Mapping[str, Any]:
        group = self._group(params.need("AutoScalingGroupName"))
        force = params.boolean("ForceDelete") or False
        params.done()
        if not force and group.instances:
            raise Refusal(
                400,
                "ResourceInUse",
                "You cannot delete an AutoScalingGroup while there are instances or pending Spot "
                "instance request(s) still in the group.",
            )
        refresh = group.refresh
        kept = group.refreshes
        if refresh is not None:
            reason = "Cancelled because the Auto Scaling group is being deleted."
            ended = replace(refresh, status=Status.CANCELLED, reason=reason, ended_at=now)
            kept = (*kept[:-1], ended)
        cause = (
            "a user request force deleted AutoScalingGroup changing the desired capacity "
            f"from {group.desired} to 0"
        )
        deleting = replace(group, deleting=True, refreshes=kept, cause=cause)
        self.groups[group.name] = deleting
        if deleting.gone:
            del self.groups[group.name]
        return {}

    # What is

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        names = params.strings("AutoScalingGroupNames")
        found = [one for one in self.groups.values() if not names or one.name in names]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=100)
        params.done()
        return {"AutoScalingGroups": [self._shown(one) for one in shown], "NextToken": token}

    def _shown(self, group: Group) -> dict[str, Any]:
        return {
            "AutoScalingGroupName": group.name,
            "AutoScalingGroupARN": arn(
                "autoscaling",
                self._region,
                f"autoScalingGroup:{activity_uuid(group.name, group.created_at)}"
                f":autoScalingGroupName/{group.name}",
            ),
            "LaunchTemplate": _template(group.spec),
            "MinSize": group.min_size,
            "MaxSize": group.max_size,
            "DesiredCapacity": group.desired,
            "DefaultCooldown": round(group.cooldown_s),
            "DefaultInstanceWarmup": None if group.warmup_s is None else round(group.warmup_s),
            "AvailabilityZones": [group.zone],
            "LoadBalancerNames": [],
            "TargetGroupARNs": list(group.target_groups),
            "HealthCheckType": "ELB" if group.checks_elb else "EC2",
            "HealthCheckGracePeriod": round(group.grace_s),
            "Instances": [self._instance(one, group) for one in group.instances.values()],
            "CreatedTime": time_of(group.created_at),
            "SuspendedProcesses": [],
            "EnabledMetrics": [],
            "Status": "Delete in progress" if group.deleting else None,
            "Tags": [
                {
                    "ResourceId": group.name,
                    "ResourceType": "auto-scaling-group",
                    "Key": key,
                    "Value": value,
                    "PropagateAtLaunch": True,
                }
                for key, value in group.tags.items()
            ],
            "TerminationPolicies": ["Default"],
            "NewInstancesProtectedFromScaleIn": False,
        }

    def _instance(self, one: GroupInstance, group: Group) -> dict[str, Any]:
        return {
            "InstanceId": one.id,
            "InstanceType": self._lookups.instance_type(one.id),
            "AvailabilityZone": group.zone,
            "LifecycleState": one.lifecycle.value,
            "HealthStatus": "Unhealthy" if one.sick else "Healthy",
            "LaunchTemplate": _template(one.spec),
            "ProtectedFromScaleIn": False,
        }

    def _describe_instances(self, params: Params, _now: float) -> Mapping[str, Any]:
        ids = params.strings("InstanceIds")
        found = [
            (one, group)
            for group in self.groups.values()
            for one in group.instances.values()
            if not ids or one.id in ids
        ]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=50)
        params.done()
        rows = []
        for one, group in shown:
            row = self._instance(one, group)
            health = str(row["HealthStatus"]).upper()
            rows.append({**row, "AutoScalingGroupName": group.name, "HealthStatus": health})
        return {"AutoScalingInstances": rows, "NextToken": token}

    def _describe_activities(self, params: Params, _now: float) -> Mapping[str, Any]:
        name, ids = params.text("AutoScalingGroupName"), params.strings("ActivityIds")
        params.boolean("IncludeDeletedGroups")
        groups = [self._group(name)] if name is not None else list(self.groups.values())
        found = [
            _activity(one, group)
            for group in groups
            for one in reversed(group.activities.values())  # type: ignore[call-overload]
            if ids is None or one.id in ids
        ]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=100)
        params.done()
        return {"Activities": shown, "NextToken": token}

    # Refreshes

    def _start_refresh(self, params: Params, now: float) -> Mapping[str, Any]:
        group = self._group(params.need("AutoScalingGroupName"))
        strategy = params.text("Strategy") or "Rolling"
        configuration = params.struct("DesiredConfiguration")
        spec = None
        if configuration is not None:
            spec = self._spec(configuration.struct("LaunchTemplate"))
        preferences = _preferences(params.struct("Preferences"))
        params.done()
        if strategy != "Rolling":
            raise _invalid(f"Strategy '{strategy}' is not simulated")
        if group.refresh is not None:
            raise Refusal(
                400,
                "InstanceRefreshInProgress",
                "An Instance Refresh is already in progress and blocks the execution of this Instance Refresh.",
            )
        if preferences.auto_rollback:
            _check_rollback(group, spec)
        if group.desired == 0 and not group.instances:
            raise _invalid("The group has no instances to refresh")
        refresh_id = activity_uuid(group.name, group.created_at, "refresh", group.serial + 1)
        made = Refresh(refresh_id, spec, preferences, now)
        self.groups[group.name] = replace(
            group, serial=group.serial + 1, refreshes=(*group.refreshes, made)
        )
        return {"InstanceRefreshId": refresh_id}

    def _describe_refreshes(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = self._group(params.need("AutoScalingGroupName"))
        ids = params.strings("InstanceRefreshIds")
        found = [one for one in reversed(group.refreshes) if not ids or one.id in ids]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=100)
        params.done()
        return {"InstanceRefreshes": [_refresh(one, group) for one in shown], "NextToken": token}

    def _cancel_refresh(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = self._group(params.need("AutoScalingGroupName"))
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
        self.groups[group.name] = replace(group, refreshes=(*group.refreshes[:-1], cancelled))
        return {"InstanceRefreshId": refresh.id}


def _invalid(message: str) -> Refusal:
    return Refusal(400, "ValidationError", message)


def _size(params: Params, name: str) -> int | None:
    return params.integer(name, 0, MOST)


def _check_sizes(group: Group) -> None:
    if group.min_size > group.max_size:
        raise _invalid(
            "Max bound, "
            f"{group.max_size}, must be greater than or equal to min bound, {group.min_size}"
        )
    if not group.min_size <= group.desired <= group.max_size:
        raise _invalid(
            f"Desired capacity:{group.desired} must be between the specified min size:"
            f"{group.min_size} and max size:{group.max_size}"
        )


def _settings(group: Group, params: Params) -> Group:
    """Take in the settings that creating and updating share."""
    kind = params.text("HealthCheckType") or ("ELB" if group.checks_elb else "EC2")
    if kind not in {"EC2", "ELB"}:
        raise _invalid(f"Health check type '{kind}' is not valid (or not simulated)")
    grace_s = params.integer("HealthCheckGracePeriod", 0, 7200)
    cooldown_s = params.integer("DefaultCooldown", 0, 86_400)
    warmup_s = params.integer("DefaultInstanceWarmup", -1, 3600)
    return replace(
        group,
        checks_elb=kind == "ELB",
        grace_s=group.grace_s if grace_s is None else float(grace_s),
        cooldown_s=group.cooldown_s if cooldown_s is None else float(cooldown_s),
        warmup_s={None: group.warmup_s, -1: None}.get(warmup_s, warmup_s),
    )


def _tags(params: Params) -> dict[str, str]:
    tags = {}
    for one in params.structs("Tags"):
        tags[one.need("Key")] = one.text("Value") or ""
        one.text("ResourceId")
        one.text("ResourceType")
        one.boolean("PropagateAtLaunch")
    return tags


def _preferences(params: Params | None) -> Preferences:
    if params is None:
        return Preferences()
    low = params.integer("MinHealthyPercentage", 0, 100)
    high = params.integer("MaxHealthyPercentage", 100, 200)
    warmup_s = params.integer("InstanceWarmup", 0, 86_400)
    if high is not None and low is None:
        raise _invalid(
            "MinHealthyPercentage must be specified when MaxHealthyPercentage is specified"
        )
    if high is not None and low is not None and high - low > 100:
        raise _invalid(
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
        raise _invalid("AutoRollback requires a DesiredConfiguration")
    if group.spec.version.startswith("$"):
        raise _invalid(
            "AutoRollback cannot be used when the Auto Scaling group's launch template version is "
            f"{group.spec.version}"
        )


def _template(spec: TemplateSpec) -> dict[str, str]:
    return {
        "LaunchTemplateId": spec.id,
        "LaunchTemplateName": spec.name,
        "Version": spec.version,
    }


def _activity(one: Activity, group: Group) -> dict[str, Any]:
    return {
        "ActivityId": one.id,
        "AutoScalingGroupName": group.name,
        "Description": one.description,
        "Cause": one.cause,
        "StartTime": time_of(one.started_at),
        "EndTime": None if one.ended_at is None else time_of(one.ended_at),
        "StatusCode": one.status,
        "StatusMessage": one.message,
        "Progress": one.progress,
        "Details": f'{{"Availability Zone":"{group.zone}"}}',
    }


def _refresh(one: Refresh, group: Group) -> dict[str, Any]:
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
        "DesiredConfiguration": {"LaunchTemplate": _template(one.spec)} if one.spec else None,
    }
