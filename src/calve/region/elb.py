"""The part of Elastic Load Balancing v2 that a fleet needs: target groups and the health of their targets.

Source: Elastic Load Balancing API reference (2015-12-01). The region has one load balancer, so the first target group
takes it; listeners and load balancers as such are not simulated. Not thread-safe: `cloud` holds one lock.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calve.region import targets
from calve.region.names import arn, identifier
from calve.region.query import ELB, Action, Params, page
from calve.region.signature import Refusal
from calve.region.targets import HealthCheck, Target, TargetGroup, TargetState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Elb"]

_ATTRIBUTE = "deregistration_delay.timeout_seconds"
_PATH = re.compile(r"/[A-Za-z0-9._~/?&=+,;:@!*-]{0,1023}")


class Elb:
    """Target groups' state and actions.

    Args:
        region: The region's name.
        running: Says whether an instance is there to be registered.
        start: Gives the balancer a target group's check; called once.
    """

    dialect = ELB

    def __init__(
        self,
        region: str,
        running: Callable[[str], bool],
        start: Callable[[HealthCheck], None],
    ) -> None:
        self.groups: dict[str, TargetGroup] = {}
        self._region = region
        self._running = running
        self._start = start
        self.actions: Mapping[str, Action] = {
            "CreateTargetGroup": self._create,
            "DescribeTargetGroups": self._describe,
            "ModifyTargetGroupAttributes": self._modify_attributes,
            "DescribeTargetGroupAttributes": self._describe_attributes,
            "RegisterTargets": self._register,
            "DeregisterTargets": self._deregister,
            "DescribeTargetHealth": self._health,
        }

    def register(self, target_group: str, target_id: str, now: float) -> None:
        """Register a target for a group's sake; nothing happens where the target group is gone."""
        if target_group in self.groups:
            self.groups[target_group] = targets.register(self.groups[target_group], target_id, now)

    def deregister(self, target_group: str, target_id: str, now: float) -> None:
        """Deregister a target for a group's sake."""
        if target_group in self.groups:
            self.groups[target_group] = targets.deregister(
                self.groups[target_group], target_id, now
            )

    def state(self, target_groups: tuple[str, ...], target_id: str) -> str | None:
        """Return what counts of an instance's states in these target groups."""
        found = [
            self.groups[name].targets[target_id].state
            for name in target_groups
            if name in self.groups and target_id in self.groups[name].targets
        ]
        state = targets.worst(found)
        return None if state is None else state.value

    def group(self, name: str) -> TargetGroup:
        """Find a target group by its ARN; Refusal where there is none."""
        if name not in self.groups:
            raise Refusal(400, "TargetGroupNotFound", f"Target groups '{name}' not found")
        return self.groups[name]

    def _create(self, params: Params, _now: float) -> Mapping[str, Any]:
        name = params.need("Name")
        check = _check(params)
        params.done()
        if not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,32}(?<!-)", name):
            raise Refusal(400, "ValidationError", f"Target group name '{name}' is not valid")
        for existing in self.groups.values():
            if existing.name == name and existing.check == check:
                return {"TargetGroups": [self._shown(existing)]}
            if existing.name == name:
                raise Refusal(
                    400,
                    "DuplicateTargetGroupName",
                    f"A target group with the same name '{name}' exists, but with different settings",
                )
        if self.groups:
            raise Refusal(
                400, "TooManyTargetGroups", "The simulated region has one target group at most"
            )
        self._start(check)
        resource = f"targetgroup/{name}/{identifier('tg', name)[3:19]}"
        made = TargetGroup(arn("elasticloadbalancing", self._region, resource), name, check)
        self.groups[made.arn] = made
        return {"TargetGroups": [self._shown(made)]}

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        arns, names = params.strings("TargetGroupArns"), params.strings("Names")
        found = list(self.groups.values())
        if arns:
            found = [self.group(one) for one in arns]
        if names:
            found = [one for one in found if one.name in names]
            for name in names:
                if all(one.name != name for one in found):
                    raise Refusal(400, "TargetGroupNotFound", "One or more target groups not found")
        shown, mark = page(found, params, "PageSize", mark="Marker", most=400)
        params.done()
        return {"TargetGroups": [self._shown(one) for one in shown], "NextMarker": mark}

    def _shown(self, group: TargetGroup) -> dict[str, Any]:
        check = group.check
        return {
            "TargetGroupArn": group.arn,
            "TargetGroupName": group.name,
            "Protocol": "HTTP",
            "Port": 80,
            "TargetType": "instance",
            "ProtocolVersion": "HTTP1",
            "HealthCheckEnabled": True,
            "HealthCheckProtocol": "HTTP",
            "HealthCheckPort": "traffic-port",
            "HealthCheckPath": check.path,
            "HealthCheckIntervalSeconds": check.interval_s,
            "HealthCheckTimeoutSeconds": check.timeout_s,
            "HealthyThresholdCount": check.healthy,
            "UnhealthyThresholdCount": check.unhealthy,
            "Matcher": {"HttpCode": "200"},
            "LoadBalancerArns": [
                arn("elasticloadbalancing", self._region, "loadbalancer/app/region/1")
            ],
        }

    def _modify_attributes(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = self.group(params.need("TargetGroupArn"))
        attributes = [(one.need("Key"), one.need("Value")) for one in params.structs("Attributes")]
        params.done()
        for key, value in attributes:
            if key != _ATTRIBUTE:
                raise Refusal(
                    400,
                    "InvalidConfigurationRequest",
                    f"Target group attribute key '{key}' is not recognized (or not simulated)",
                )
            if not re.fullmatch(r"[0-9]{1,4}", value) or int(value) > 3600:
                raise Refusal(
                    400, "InvalidConfigurationRequest", f"{key} must be from 0 to 3600, not {value}"
                )
            group = replace(group, delay_s=float(value))
        self.groups[group.arn] = group
        return _attributes(group)

    def _describe_attributes(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = self.group(params.need("TargetGroupArn"))
        params.done()
        return _attributes(group)

    def _register(self, params: Params, now: float) -> Mapping[str, Any]:
        group, ids = self.group(params.need("TargetGroupArn")), _targets(params)
        params.done()
        for target_id in ids:
            if not self._running(target_id):
                raise Refusal(
                    400,
                    "InvalidTarget",
                    f"The following targets are not in a running state and cannot be registered: '{target_id}'",
                )
        for target_id in ids:
            self.register(group.arn, target_id, now)
        return {}

    def _deregister(self, params: Params, now: float) -> Mapping[str, Any]:
        group, ids = self.group(params.need("TargetGroupArn")), _targets(params)
        params.done()
        for target_id in ids:
            self.deregister(group.arn, target_id, now)
        return {}

    def _health(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = self.group(params.need("TargetGroupArn"))
        wanted = _targets(params)
        params.strings("Include")
        params.done()
        rows = []
        for target_id in wanted or sorted(group.targets):
            found = group.targets.get(target_id)
            rows.append(_described(target_id, found))
        return {"TargetHealthDescriptions": rows}


def _check(params: Params) -> HealthCheck:
    default = HealthCheck()
    path = params.text("HealthCheckPath") or default.path
    if not _PATH.fullmatch(path):
        raise Refusal(400, "ValidationError", f"Health check path '{path}' is not valid")
    for name, known in {
        "Protocol": {"HTTP"},
        "Port": {"80"},
        "TargetType": {"instance"},
        "ProtocolVersion": {"HTTP1"},
        "HealthCheckProtocol": {"HTTP"},
        "HealthCheckPort": {"traffic-port", "80"},
        "HealthCheckEnabled": {"true"},
    }.items():
        value = params.text(name)
        if value is not None and value not in known:
            raise Refusal(400, "ValidationError", f"{name} '{value}' is not simulated")
    matcher = params.struct("Matcher")
    if matcher is not None and matcher.text("HttpCode") not in {None, "200"}:
        raise Refusal(400, "ValidationError", "only the matcher 200 is simulated")
    params.text("VpcId")
    interval_s = params.integer("HealthCheckIntervalSeconds", 5, 300) or default.interval_s
    timeout_s = params.integer("HealthCheckTimeoutSeconds", 2, 120)
    if timeout_s is not None and timeout_s >= interval_s:
        raise Refusal(
            400, "ValidationError", "Health check timeout must be smaller than the interval"
        )
    return HealthCheck(
        path,
        interval_s,
        timeout_s or min(default.timeout_s, interval_s - 1),
        params.integer("HealthyThresholdCount", 2, 10) or default.healthy,
        params.integer("UnhealthyThresholdCount", 2, 10) or default.unhealthy,
    )


def _targets(params: Params) -> list[str]:
    found = []
    for one in params.structs("Targets"):
        found.append(one.need("Id"))
        one.integer("Port", 80, 80)
    return found


def _attributes(group: TargetGroup) -> Mapping[str, Any]:
    return {"Attributes": [{"Key": _ATTRIBUTE, "Value": f"{group.delay_s:.0f}"}]}


def _described(target_id: str, target: Target | None) -> dict[str, Any]:
    if target is None:
        health: dict[str, Any] = {
            "State": "unused",
            "Reason": "Target.NotRegistered",
            "Description": "Target is not registered to the target group",
        }
    else:
        health = {
            "State": target.state.value,
            "Reason": target.reason,
            "Description": target.description,
        }
    shown = {"Target": {"Id": target_id, "Port": 80}, "TargetHealth": health}
    if target is None or target.state is not TargetState.DRAINING:
        return {**shown, "HealthCheckPort": "80"}
    return shown
