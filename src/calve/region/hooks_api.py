"""Auto Scaling's actions on lifecycle hooks and on the lifecycle actions that they began.

Source: Amazon EC2 Auto Scaling API reference (2011-01-01), PutLifecycleHook, DescribeLifecycleHooks,
DescribeLifecycleHookTypes, DeleteLifecycleHook, CompleteLifecycleAction, RecordLifecycleActionHeartbeat. What AWS says
where no action is under way is seen in many scripts' logs; its words for the rest are not documented and are ours.
Nothing is notified: a token is learnt from the group's state, or not at all. Not thread-safe: `cloud` holds one lock.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from calve.region import hooks
from calve.region.group import find, invalid
from calve.region.hooks import Hook, Result, Transition, Wait
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from enum import StrEnum

    from calve.region.group import Group
    from calve.region.query import Action, Params

__all__ = ["HookActions", "specified"]

E = TypeVar("E", bound="StrEnum")

MOST_HOOKS = 50
HEARTBEAT_S = (30, 7200)
METADATA_CHARACTERS = 4000
_NAME = re.compile(r"[A-Za-z0-9\-_/]{1,255}")


class HookActions:
    """The actions.

    Args:
        groups: The region's groups by name; changed in place.
    """

    def __init__(self, groups: dict[str, Group]) -> None:
        self._groups = groups
        self.actions: Mapping[str, Action] = {
            "PutLifecycleHook": self._put,
            "DescribeLifecycleHooks": self._describe,
            "DescribeLifecycleHookTypes": self._types,
            "DeleteLifecycleHook": self._delete,
            "CompleteLifecycleAction": self._complete,
            "RecordLifecycleActionHeartbeat": self._beat,
        }

    def _group(self, params: Params) -> Group:
        return find(self._groups, params.need("AutoScalingGroupName"))

    # Hooks

    def _put(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = self._group(params)
        made = _read(params, group.hooks)
        params.done()
        self._groups[group.name] = replace(group, hooks=_added(group.hooks, made))
        return {}

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        group = self._group(params)
        names = params.strings("LifecycleHookNames")
        params.done()
        shown = [one for one in group.hooks.values() if not names or one.name in names]
        return {"LifecycleHooks": [_row(one, group) for one in shown]}

    def _types(self, params: Params, _now: float) -> Mapping[str, Any]:
        params.done()
        return {"LifecycleHookTypes": list(Transition)}

    def _delete(self, params: Params, now: float) -> Mapping[str, Any]:
        group = self._group(params)
        hook = _known(group, params)
        params.done()
        self._groups[group.name] = replace(
            group,
            hooks={name: one for name, one in group.hooks.items() if name != hook.name},
            instances={
                one.id: replace(one, waits=hooks.drop(one.waits, hook.name, now))
                for one in group.instances.values()
            },
        )
        return {}

    # Lifecycle actions

    def _complete(self, params: Params, now: float) -> Mapping[str, Any]:
        result = _member(params, "LifecycleActionResult", Result)
        if result is None:
            raise invalid("LifecycleActionResult must be CONTINUE or ABANDON")
        self._change(params, now, lambda wait: replace(wait, result=result))
        return {}

    def _beat(self, params: Params, now: float) -> Mapping[str, Any]:
        self._change(params, now, lambda wait: replace(wait, beat_at=now))
        return {}

    def _change(self, params: Params, now: float, change: Callable[[Wait], Wait]) -> None:
        """Change the one action under way that a request names by its hook, and by token or instance."""
        group = self._group(params)
        hook = _known(group, params)
        token, instance_id = params.text("LifecycleActionToken"), params.text("InstanceId")
        params.done()
        if not token and not instance_id:
            raise invalid("Either LifecycleActionToken or InstanceId must be given")
        for one in group.instances.values():
            for wait in one.waits:
                named = instance_id in {None, one.id} and token in {None, wait.token}
                if named and wait.hook.name == hook.name and wait.active(now):
                    waits = tuple(change(each) if each is wait else each for each in one.waits)
                    instances = {**group.instances, one.id: replace(one, waits=waits)}
                    self._groups[group.name] = replace(group, instances=instances)
                    return
        what = f"token {token}" if token else f"instance ID {instance_id}"
        raise invalid(f"No active Lifecycle Action found with {what}")


def specified(params: Params) -> dict[str, Hook]:
    """Read the hooks that a group is created with, by name."""
    found: dict[str, Hook] = {}
    for one in params.structs("LifecycleHookSpecificationList"):
        made = _read(one, {})
        if made.name in found:
            raise invalid(f"The lifecycle hook {made.name} is specified twice")
        found = _added(found, made)
    return found


def _added(before: Mapping[str, Hook], made: Hook) -> dict[str, Hook]:
    after = {**before, made.name: made}
    if len(after) > MOST_HOOKS:
        raise Refusal(
            400, "LimitExceeded", f"A group has at most {MOST_HOOKS} lifecycle hooks, as it is"
        )
    return after


def _read(params: Params, there: Mapping[str, Hook]) -> Hook:
    """Read a hook; what is not given stays as it is in one of that name, and else is AWS's default."""
    name = params.need("LifecycleHookName")
    transition = _member(params, "LifecycleTransition", Transition)
    default = _member(params, "DefaultResult", Result)
    heartbeat_s = params.integer("HeartbeatTimeout", *HEARTBEAT_S)
    metadata = params.text("NotificationMetadata")
    if not _NAME.fullmatch(name):
        raise invalid(f"The lifecycle hook's name '{name}' is not valid")
    if metadata is not None and not 1 <= len(metadata) <= METADATA_CHARACTERS:
        raise invalid(f"NotificationMetadata has 1 to {METADATA_CHARACTERS} characters")
    before = there.get(name)
    if before is None:
        if transition is None:
            raise invalid("LifecycleTransition must be given for a new lifecycle hook")
        before = Hook(name, transition)
    return replace(
        before,
        transition=transition or before.transition,
        heartbeat_s=heartbeat_s or before.heartbeat_s,
        default=default or before.default,
        metadata=metadata or before.metadata,
    )


def _member(params: Params, name: str, kind: type[E]) -> E | None:
    """Read one of an enumeration's values; None where it is absent."""
    text = params.text(name)
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        raise invalid(f"{name} must be one of {', '.join(kind)}, not '{text}'") from None


def _known(group: Group, params: Params) -> Hook:
    name = params.need("LifecycleHookName")
    if name not in group.hooks:
        raise invalid(f"No Lifecycle Hook found with name: {name}")
    return group.hooks[name]


def _row(hook: Hook, group: Group) -> dict[str, Any]:
    return {
        "LifecycleHookName": hook.name,
        "AutoScalingGroupName": group.name,
        "LifecycleTransition": hook.transition.value,
        "NotificationMetadata": hook.metadata,
        "HeartbeatTimeout": hook.heartbeat_s,
        "GlobalTimeout": hook.most_s,
        "DefaultResult": hook.default.value,
    }
