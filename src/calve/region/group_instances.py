"""Auto Scaling's actions on instances of a group: protection, standby, health.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01), SetInstanceProtection, EnterStandby, ExitStandby,
SetInstanceHealth; User Guide, "Temporarily remove instances from your Auto Scaling group" (activities and their causes).
An instance comes back from standby without its launch hooks: what AWS does there, it does not document.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calve.region.activities import Activity
from calve.region.group import Lifecycle, find, invalid
from calve.region.names import activity_uuid, stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calve.region.group import Group, GroupInstance
    from calve.region.query import Action, Params

__all__ = ["InstanceActions"]

BY_USER = "a user health-check"


class InstanceActions:
    """The actions.

    Args:
        groups: The region's groups by name; changed in place.
        shown: Shows an activity.
    """

    def __init__(
        self, groups: dict[str, Group], shown: Callable[[Activity, Group], dict[str, Any]]
    ) -> None:
        self._groups = groups
        self._shown = shown
        self.actions: Mapping[str, Action] = {
            "SetInstanceProtection": self._protect,
            "EnterStandby": self._enter,
            "ExitStandby": self._exit,
            "SetInstanceHealth": self._set_health,
        }

    def _protect(self, params: Params, _now: float) -> Mapping[str, Any]:
        group, found = self._named(params)
        protected = params.boolean("ProtectedFromScaleIn")
        params.done()
        if protected is None:
            raise invalid("ProtectedFromScaleIn must be given")
        for one in found:
            _must_be(one, Lifecycle.IN_SERVICE)
        changed = {one.id: replace(one, protected=protected) for one in found}
        self._groups[group.name] = replace(group, instances={**group.instances, **changed})
        return {}

    # Standby

    def _enter(self, params: Params, now: float) -> Mapping[str, Any]:
        group, found = self._named(params)
        decrements = params.boolean("ShouldDecrementDesiredCapacity")
        params.done()
        if decrements is None:
            raise invalid("ShouldDecrementDesiredCapacity must be given")
        for one in found:
            _must_be(one, Lifecycle.IN_SERVICE)
        if decrements and group.desired - len(found) < group.min_size:
            raise invalid(
                f"AutoScalingGroup {group.name} has min-size={group.min_size}, max-size={group.max_size}, and "
                f"desired-size={group.desired}. To place into standby {len(found)} more instance, please "
                "update the AutoScalingGroup sizes appropriately."
            )
        made = []
        for one in found:
            shrinks = (
                f", shrinking the capacity from {group.desired} to {group.desired - 1}"
                if decrements
                else ""
            )
            cause = (
                f"At {stamp(now)} instance {one.id} was moved to standby in response to a user "
                f"request{shrinks}."
            )
            group = replace(group, desired=group.desired - decrements)
            what = f"Moving EC2 instance to Standby: {one.id}"
            group, activity = _moved(group, one, Lifecycle.ENTERING_STANDBY, what, cause, now)
            made.append(self._shown(activity, group))
        self._groups[group.name] = group
        return {"Activities": made}

    def _exit(self, params: Params, now: float) -> Mapping[str, Any]:
        group, found = self._named(params)
        params.done()
        for one in found:
            _must_be(one, Lifecycle.STANDBY)
        if group.desired + len(found) > group.max_size:
            raise invalid(
                f"AutoScalingGroup {group.name} has min-size={group.min_size}, max-size={group.max_size}, and "
                f"desired-size={group.desired}. To exit standby {len(found)} more instance, please "
                "update the AutoScalingGroup sizes appropriately."
            )
        made = []
        for one in found:
            cause = (
                f"At {stamp(now)} instance {one.id} was moved out of standby in response to a user "
                f"request, increasing the capacity from {group.desired} to {group.desired + 1}."
            )
            group = replace(group, desired=group.desired + 1)
            what = f"Moving EC2 instance out of Standby: {one.id}"
            group, activity = _moved(group, one, Lifecycle.PENDING_PROCEED, what, cause, now)
            made.append(self._shown(activity, group))
        self._groups[group.name] = group
        return {"Activities": made}

    # Health

    def _set_health(self, params: Params, now: float) -> Mapping[str, Any]:
        instance_id, status = params.need("InstanceId"), params.need("HealthStatus")
        respects = params.boolean("ShouldRespectGracePeriod") is not False
        params.done()
        if status not in {"Healthy", "Unhealthy"}:
            raise invalid(f"HealthStatus must be Healthy or Unhealthy, not '{status}'")
        group = next((one for one in self._groups.values() if instance_id in one.instances), None)
        if group is None:
            raise invalid(f"Instance Id not found - No managed instance found for: {instance_id}")
        one = group.instances[instance_id]
        graced = respects and now < one.in_service_at + group.grace_s
        if one.lifecycle.leaving or (status == "Unhealthy" and graced):
            return {}
        sick = status == "Unhealthy"
        changed = replace(one, sick=sick, ailment=BY_USER if sick else "")
        instances = {**group.instances, one.id: changed}
        self._groups[group.name] = replace(group, instances=instances)
        return {}

    def _named(self, params: Params) -> tuple[Group, list[GroupInstance]]:
        group = find(self._groups, params.need("AutoScalingGroupName"))
        found = []
        for instance_id in params.strings("InstanceIds") or []:
            if instance_id not in group.instances:
                raise invalid(
                    f"The instance {instance_id} is not part of Auto Scaling group {group.name}."
                )
            found.append(group.instances[instance_id])
        return group, found


def _must_be(one: GroupInstance, lifecycle: Lifecycle) -> None:
    if one.lifecycle is not lifecycle:
        raise invalid(f"The instance {one.id} is not in {lifecycle}.")


def _moved(
    group: Group, one: GroupInstance, lifecycle: Lifecycle, what: str, cause: str, now: float
) -> tuple[Group, Activity]:
    """Begin to move an instance, and an activity that says so."""
    serial = group.serial + 1
    name = activity_uuid(group.name, group.created_at, serial)
    activity = Activity(name, what, cause, now, "InProgress", 50, zone=one.zone)
    moved = replace(one, lifecycle=lifecycle, activity=name)
    group = replace(
        group,
        serial=serial,
        instances={**group.instances, one.id: moved},
        activities={**group.activities, name: activity},
    )
    return group, activity
