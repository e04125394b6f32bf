"""The part of EC2 Auto Scaling that a fleet needs: groups, their instances and activities; hooks, instance refresh.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01). Actions only change what `groups` then brings on; nothing
is started here. `hooks_api`, `refresh_api` and the modules `group_*` have the other actions. Not thread-safe.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calve.region.activities import Activity
from calve.region.group import Group, GroupInstance, find, invalid
from calve.region.group_instances import InstanceActions
from calve.region.group_processes import ProcessActions, suspended_rows
from calve.region.group_tags import TagActions, group_filter, tag_rows, tagged
from calve.region.hooks_api import HookActions, specified
from calve.region.names import activity_uuid, arn
from calve.region.query import AUTOSCALING, Action, Params, page, time_of
from calve.region.refresh import Status
from calve.region.refresh_api import RefreshActions, template_row
from calve.region.signature import Refusal
from calve.region.templates import LaunchTemplate, TemplateSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["AutoScaling", "Lookups"]

_NOT_A_TEMPLATE = "You must use a valid fully-formed launch template. "
_DERIVED = (
    "An active instance refresh with a desired configuration exists. All configuration options derived from the "
    "desired configuration are not available for update while the instance refresh is active."
)
MOST = 10_000


@dataclass(frozen=True, slots=True)
class Lookups:
    """What Auto Scaling asks of its neighbours; each raises Refusal where there is nothing.

    Attributes:
        template: A launch template by id or by name.
        instance_type: Of an instance.
        target_group: That a target group exists.
        alarms: The states of all alarms by name, as they are at any moment.
    """

    template: Callable[[str | None, str | None], LaunchTemplate]
    instance_type: Callable[[str], str]
    target_group: Callable[[str], object]
    alarms: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class AutoScaling:
    """Groups' state and actions.

    Args:
        region: The region's name.
        zone: The availability zone of a group that names none.
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
            **RefreshActions(self.groups, self._spec, lookups.alarms).actions,
            **HookActions(self.groups).actions,
            **InstanceActions(self.groups, _activity).actions,
            **ProcessActions(self.groups).actions,
            **TagActions(self.groups).actions,
        }

    # Groups

    def _create(self, params: Params, now: float) -> Mapping[str, Any]:
        name = params.need("AutoScalingGroupName")
        spec = self._spec(params.struct("LaunchTemplate"))
        min_size, max_size = _size(params, "MinSize"), _size(params, "MaxSize")
        if min_size is None or max_size is None:
            raise invalid("MinSize and MaxSize must be given")
        desired = _size(params, "DesiredCapacity")
        arns = params.strings("TargetGroupARNs") or []
        group = Group(
            name,
            spec,
            min_size,
            max_size,
            min_size if desired is None else desired,
            now,
            zones=(self._zone,),
            target_groups=tuple(dict.fromkeys(arns)),
            hooks=specified(params),
        )
        group = tagged(self._settings(group, params), params)
        params.done()
        if not re.fullmatch(r"[^:/\\\x00-\x1f]{1,255}", name):
            raise invalid(f"Group name '{name}' is not valid")
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
            raise invalid(f"Provided Target Groups may not be valid: {refusal.message}") from None

    def _spec(self, params: Params | None) -> TemplateSpec:
        if params is None:
            raise invalid(
                "Valid requests must contain either LaunchTemplate, LaunchConfigurationName, InstanceId or "
                "MixedInstancesPolicy parameter (only LaunchTemplate is simulated)."
            )
        template_id, name = params.text("LaunchTemplateId"), params.text("LaunchTemplateName")
        version = params.text("Version") or "$Default"
        if (template_id is None) == (name is None):
            raise invalid(
                "Valid requests must contain either launchTemplateId or LaunchTemplateName"
            )
        try:
            template = self._lookups.template(template_id, name)
            template.resolve(version)
        except Refusal as refusal:
            raise invalid(f"{_NOT_A_TEMPLATE}{refusal.message}") from None
        return TemplateSpec(template.id, template.name, version)

    def _update(self, params: Params, _now: float) -> Mapping[str, Any]:
        before = find(self.groups, params.need("AutoScalingGroupName"))
        group = before
        template = params.struct("LaunchTemplate")
        if template is not None:
            group = replace(group, spec=self._spec(template))
        if group.spec != before.spec and before.refresh is not None and before.refresh.spec:
            raise invalid(_DERIVED)
        min_size, max_size = _size(params, "MinSize"), _size(params, "MaxSize")
        group = replace(
            group,
            min_size=group.min_size if min_size is None else min_size,
            max_size=group.max_size if max_size is None else max_size,
        )
        desired = _size(params, "DesiredCapacity")
        if desired is None:
            desired = min(max(group.desired, group.min_size), group.max_size)
        group = self._settings(replace(group, desired=desired), params)
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

    def _settings(self, group: Group, params: Params) -> Group:
        """Take in the settings that creating and updating share; subnets are accepted, and not simulated."""
        kind = params.text("HealthCheckType") or ("ELB" if group.checks_elb else "EC2")
        if kind not in {"EC2", "ELB"}:
            raise invalid(f"Health check type '{kind}' is not valid (or not simulated)")
        grace_s = params.integer("HealthCheckGracePeriod", 0, 7200)
        cooldown_s = params.integer("DefaultCooldown", 0, 86_400)
        warmup_s = params.integer("DefaultInstanceWarmup", -1, 3600)
        protects = params.boolean("NewInstancesProtectedFromScaleIn")
        params.text("VPCZoneIdentifier")
        return replace(
            group,
            zones=self._zones(params) or group.zones,
            checks_elb=kind == "ELB",
            grace_s=group.grace_s if grace_s is None else float(grace_s),
            cooldown_s=group.cooldown_s if cooldown_s is None else float(cooldown_s),
            warmup_s={None: group.warmup_s, -1: None}.get(warmup_s, warmup_s),
            protects=group.protects if protects is None else protects,
        )

    def _zones(self, params: Params) -> tuple[str, ...]:
        zones = tuple(dict.fromkeys(params.strings("AvailabilityZones") or ()))
        wrong = [one for one in zones if not re.fullmatch(re.escape(self._region) + "[a-z]", one)]
        if wrong:
            raise invalid(f"Invalid Availability Zone: [{wrong[0]}]")
        return zones

    def _set_desired(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = find(self.groups, params.need("AutoScalingGroupName"))
        desired = _size(params, "DesiredCapacity")
        params.boolean("HonorCooldown")
        params.done()
        if desired is None:
            raise invalid("DesiredCapacity must be given")
        if not group.min_size <= desired <= group.max_size:
            side = "above max" if desired > group.max_size else "below min"
            limit = group.max_size if desired > group.max_size else group.min_size
            raise invalid(
                f"New SetDesiredCapacity value {desired} is {side} value {limit} for the AutoScalingGroup."
            )
        cause = (
            "a user request explicitly set group desired capacity changing the desired capacity "
            f"from {group.desired} to {desired}"
        )
        self.groups[group.name] = replace(group, desired=desired, cause=cause)
        return {}

    def _delete(self, params: Params, now: float) -> Mapping[str, Any]:
        group = find(self.groups, params.need("AutoScalingGroupName"))
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
        # Outstanding lifecycle actions go with the group, and its hooks hold nothing any more.
        freed = {one.id: replace(one, waits=()) for one in group.instances.values()}
        deleting = replace(
            group, deleting=True, refreshes=kept, cause=cause, hooks={}, instances=freed
        )
        self.groups[group.name] = deleting
        if deleting.gone:
            del self.groups[group.name]
        return {}

    # What is

    def resource(self, action: str, form: Mapping[str, Any]) -> str:
        """Return the ARN that a policy has to allow for an action: the group's, or `*` where it is about none."""
        name = form.get("AutoScalingGroupName")
        return (
            "*" if action.startswith("Describe") or not isinstance(name, str) else self._arn(name)
        )

    def instance(self, instance_id: str) -> GroupInstance | None:
        """Find an instance in its group; None where it is in none."""
        found = (group.instances.get(instance_id) for group in self.groups.values())
        return next((one for one in found if one is not None), None)

    def _arn(self, name: str) -> str:
        """Return a group's ARN; that of a group that does not exist has `*` for its id."""
        group = self.groups.get(name)
        unique = "*" if group is None else activity_uuid(name, group.created_at)
        resource = f"autoScalingGroup:{unique}:autoScalingGroupName/{name}"
        return arn("autoscaling", self._region, resource)

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        names, passes = params.strings("AutoScalingGroupNames"), group_filter(params)
        named = [one for one in self.groups.values() if not names or one.name in names]
        found = [one for one in named if passes(one)]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=100)
        params.done()
        return {"AutoScalingGroups": [self._shown(one) for one in shown], "NextToken": token}

    def _shown(self, group: Group) -> dict[str, Any]:
        return {
            "AutoScalingGroupName": group.name,
            "AutoScalingGroupARN": self._arn(group.name),
            "LaunchTemplate": template_row(group.spec),
            "MinSize": group.min_size,
            "MaxSize": group.max_size,
            "DesiredCapacity": group.desired,
            "DefaultCooldown": round(group.cooldown_s),
            "DefaultInstanceWarmup": None if group.warmup_s is None else round(group.warmup_s),
            "AvailabilityZones": list(group.zones),
            "LoadBalancerNames": [],
            "TargetGroupARNs": list(group.target_groups),
            "HealthCheckType": "ELB" if group.checks_elb else "EC2",
            "HealthCheckGracePeriod": round(group.grace_s),
            "Instances": [self._instance(one) for one in group.instances.values()],
            "CreatedTime": time_of(group.created_at),
            "SuspendedProcesses": suspended_rows(group),
            "EnabledMetrics": [],
            "Status": "Delete in progress" if group.deleting else None,
            "Tags": tag_rows(group),
            "TerminationPolicies": ["Default"],
            "NewInstancesProtectedFromScaleIn": group.protects,
        }

    def _instance(self, one: GroupInstance) -> dict[str, Any]:
        return {
            "InstanceId": one.id,
            "InstanceType": self._lookups.instance_type(one.id),
            "AvailabilityZone": one.zone,
            "LifecycleState": one.lifecycle.value,
            "HealthStatus": "Unhealthy" if one.sick else "Healthy",
            "LaunchTemplate": template_row(one.spec),
            "ProtectedFromScaleIn": one.protected,
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
            row = self._instance(one)
            health = str(row["HealthStatus"]).upper()
            rows.append({**row, "AutoScalingGroupName": group.name, "HealthStatus": health})
        return {"AutoScalingInstances": rows, "NextToken": token}

    def _describe_activities(self, params: Params, _now: float) -> Mapping[str, Any]:
        name, ids = params.text("AutoScalingGroupName"), params.strings("ActivityIds")
        params.boolean("IncludeDeletedGroups")
        groups = [find(self.groups, name)] if name is not None else list(self.groups.values())
        found = [
            _activity(one, group)
            for group in groups
            for one in reversed(group.activities.values())  # type: ignore[call-overload]
            if ids is None or one.id in ids
        ]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=100)
        params.done()
        return {"Activities": shown, "NextToken": token}


def _size(params: Params, name: str) -> int | None:
    return params.integer(name, 0, MOST)


def _check_sizes(group: Group) -> None:
    if group.min_size > group.max_size:
        raise invalid(
            "Max bound, "
            f"{group.max_size}, must be greater than or equal to min bound, {group.min_size}"
        )
    if not group.min_size <= group.desired <= group.max_size:
        raise invalid(
            f"Desired capacity:{group.desired} must be between the specified min size:"
            f"{group.min_size} and max size:{group.max_size}"
        )


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
        "Details": f'{{"Availability Zone":"{one.zone}"}}',
    }
