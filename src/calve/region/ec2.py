"""The part of EC2 that a fleet needs: launch templates, instances and their consoles; images stand in `images`.

Source: Amazon EC2 API reference (2016-11-15). `Ec2` holds the state and answers actions; it starts and ends nothing:
`cloud` performs what stands here and tells it what it saw. Not thread-safe: `cloud` holds one lock.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from calve.region.capacity import Capacity
from calve.region.machine import Launch
from calve.region.names import ACCOUNT, identifier
from calve.region.query import EC2, Action, Params, Replays, filters, page, time_of
from calve.region.signature import Refusal
from calve.region.tags import Shelf, specified, tag_set
from calve.region.templates import LaunchTemplate, TemplateSpec, Version, check_data, user_data

__all__ = ["Ec2", "Instance", "State"]

CONSOLE_BYTES = 64 * 1024
TERMINATED_KEPT_S = 3600.0
"""How long a terminated instance stays visible."""
_NAME = re.compile(r"[A-Za-z0-9().\-/_]{3,128}")
_LISTS = {
    "TagSpecification": "tagSpecificationSet",
    "Tag": "tagSet",
    "SecurityGroup": "securityGroupSet",
    "SecurityGroupId": "securityGroupIdSet",
    "BlockDeviceMapping": "blockDeviceMappingSet",
    "NetworkInterface": "networkInterfaceSet",
}
"""Lists of a launch template's data whose names in a request and in an answer differ."""


class State(StrEnum):
    """An instance's state."""

    PENDING = "pending"
    RUNNING = "running"
    SHUTTING_DOWN = "shutting-down"
    TERMINATED = "terminated"
    STOPPED = "stopped"


_CODES = {
    State.PENDING: 0,
    State.RUNNING: 16,
    State.SHUTTING_DOWN: 32,
    State.TERMINATED: 48,
    State.STOPPED: 80,
}


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance as EC2 knows it."""

    id: str
    image_id: str
    instance_type: str
    launched_at: float
    tags: Mapping[str, str]
    zone: str
    state: State = State.PENDING
    reason: tuple[str, str] | None = None
    ended_at: float | None = None


class Ec2:
    """EC2's state and actions.

    Args:
        zone: The availability zone of an instance whose launch names none.
        console: What an instance's console shows at an instant.
        check_image: Notes that an instance of a type is launched from an image; Refusal where it cannot be.
        seed: Names the region's story, so that two regions give different identifiers.
    """

    dialect = EC2

    def __init__(
        self,
        zone: str,
        console: Callable[[str, float], bytes],
        check_image: Callable[[str, str, float], None],
        seed: str,
    ) -> None:
        self.zone = zone
        self.templates: dict[str, LaunchTemplate] = {}
        self.instances: dict[str, Instance] = {}
        self.capacity = Capacity()
        self._check_image = check_image
        self._console = console
        self._seed = seed
        self._tokens = Replays[tuple[str, int]]()  # a template and its version
        self.actions: Mapping[str, Action] = {
            "CreateLaunchTemplate": self._create_template,
            "CreateLaunchTemplateVersion": self._create_version,
            "DescribeLaunchTemplates": self._describe_templates,
            "DescribeLaunchTemplateVersions": self._describe_versions,
            "DescribeInstances": self._describe_instances,
            "TerminateInstances": self._terminate_instances,
            "GetConsoleOutput": self._console_output,
        }

    # For cloud and the other services

    def template(self, template_id: str | None, name: str | None) -> LaunchTemplate:
        """Find a launch template by its id or its name; Refusal where there is none."""
        if template_id is not None:
            if not re.fullmatch(r"lt-[0-9a-f]{8,17}", template_id):
                raise Refusal(
                    400, "InvalidLaunchTemplateId.Malformed", f'Invalid id: "{template_id}"'
                )
            found = self.templates.get(template_id)
            if found is None:
                raise Refusal(
                    400,
                    "InvalidLaunchTemplateId.NotFound",
                    f"The specified launch template, with template ID {template_id}, does not exist.",
                )
            return found
        for candidate in self.templates.values():
            if candidate.name == name:
                return candidate
        raise Refusal(
            400,
            "InvalidLaunchTemplateName.NotFoundException",
            f"The specified launch template, with template name {name}, does not exist.",
        )

    @property
    def shelf(self) -> Shelf:
        """Return where the tags of launch templates are."""
        return Shelf(
            "launch-template",
            "InvalidLaunchTemplateId.NotFound",
            lambda: {one.id: one.tags for one in self.templates.values()},
            self._put_tags,
        )

    def _put_tags(self, template_id: str, tags: Mapping[str, str]) -> None:
        self.templates[template_id] = replace(self.templates[template_id], tags=dict(tags))

    def launch(
        self,
        instance_id: str,
        spec: TemplateSpec,
        tags: Mapping[str, str],
        now: float,
        zone: str | None = None,
    ) -> Launch:
        """Note an instance that is about to start, and say what to start.

        Raises:
            Refusal: The template names no image, or one that nothing can be launched from; or the capacity lacks.
        """
        data = self.template(spec.id, None).resolve(spec.version).data
        image_id = str(data.get("ImageId", ""))
        if not image_id:
            raise Refusal(
                400, "MissingParameter", "The request must contain the parameter ImageId."
            )
        kind = str(data.get("InstanceType", "t3.nano"))
        self._check_image(image_id, kind, now)
        place = zone or self.zone
        self.capacity.take(kind, place)
        self.instances[instance_id] = Instance(
            instance_id, image_id, kind, now, {**_tags(data), **tags}, place
        )
        return Launch(instance_id, image_id, kind, user_data(data))

    def live(self) -> list[str]:
        """Return the instances that are not terminated."""
        return [one.id for one in self.instances.values() if one.state is not State.TERMINATED]

    def ending(self) -> list[str]:
        """Return the instances that are to be terminated."""
        return [one.id for one in self.instances.values() if one.state is State.SHUTTING_DOWN]

    def terminate(self, instance_id: str, reason: tuple[str, str]) -> None:
        """Ask for an instance's end; nothing happens where it has ended."""
        one = self.instances.get(instance_id)
        if one is not None and one.state not in {State.TERMINATED, State.SHUTTING_DOWN}:
            self.instances[instance_id] = replace(one, state=State.SHUTTING_DOWN, reason=reason)

    def forget(self, instance_id: str) -> None:
        """Drop an instance that could not be started."""
        self.instances.pop(instance_id, None)

    def observe(self, running: Mapping[str, bool], now: float) -> None:
        """Take in which machines are on; those not in `running` are left as they are."""
        for instance_id, on in running.items():
            one = self.instances.get(instance_id)
            if one is None:
                continue
            if one.state is State.PENDING and on:
                one = replace(one, state=State.RUNNING)
            elif one.state in {State.PENDING, State.RUNNING} and not on:
                reason = (
                    "Client.InstanceInitiatedShutdown",
                    "Client.InstanceInitiatedShutdown: Instance initiated shutdown",
                )
                one = replace(one, state=State.STOPPED, reason=reason)
            elif one.state is State.SHUTTING_DOWN and not on:
                one = replace(one, state=State.TERMINATED, ended_at=now)
            self.instances[instance_id] = one
        old = [
            one.id
            for one in self.instances.values()
            if one.ended_at is not None and now - one.ended_at > TERMINATED_KEPT_S
        ]
        for instance_id in old:
            del self.instances[instance_id]

    # Launch templates

    def _create_template(self, params: Params, now: float) -> Mapping[str, Any]:
        name, token = params.need("LaunchTemplateName"), params.text("ClientToken")
        description, data = params.text("VersionDescription"), params.raw("LaunchTemplateData")
        tags = specified(params, "launch-template")["launch-template"]
        params.done()
        if not _NAME.fullmatch(name):
            raise Refusal(
                400, "InvalidLaunchTemplateName.MalformedException", f"Invalid name: {name}"
            )
        if not data:
            raise Refusal(
                400, "MissingParameter", "The request must contain the parameter LaunchTemplateData"
            )
        check_data(data, description)
        digest = _digest("create", name, description, data, tags)
        done = self._tokens.find(token, digest)
        if done is not None:
            return {"launchTemplate": _template(self.templates[done[0]])}
        if any(one.name == name for one in self.templates.values()):
            raise Refusal(
                400,
                "InvalidLaunchTemplateName.AlreadyExistsException",
                "Launch template name already in use.",
            )
        template_id = identifier("lt", self._seed, name)
        version = Version(1, description, now, data)
        made = LaunchTemplate(template_id, name, now, {1: version}, tags=tags)
        self.templates[template_id] = made
        self._tokens.keep(token, digest, (template_id, 1))
        return {"launchTemplate": _template(made)}

    def _create_version(self, params: Params, now: float) -> Mapping[str, Any]:
        template = self._named(params)
        source, token = params.text("SourceVersion"), params.text("ClientToken")
        description, data = params.text("VersionDescription"), params.raw("LaunchTemplateData")
        params.done()
        if not data:
            raise Refusal(
                400, "MissingParameter", "The request must contain the parameter LaunchTemplateData"
            )
        check_data(data, description)
        digest = _digest("version", template.id, source, description, data)
        done = self._tokens.find(token, digest)
        number = done[1] if done is not None else template.latest + 1
        if done is None:
            template = template.add(data, source, description, now)
            self.templates[template.id] = template
            self._tokens.keep(token, digest, (template.id, number))
        return {"launchTemplateVersion": _version(template, template.versions[number])}

    def _named(self, params: Params) -> LaunchTemplate:
        template_id = params.text("LaunchTemplateId")
        name = params.text("LaunchTemplateName")
        if (template_id is None) == (name is None):
            raise Refusal(
                400,
                "InvalidParameterCombination" if name else "MissingParameter",
                "Give either the launch template's ID or its name.",
            )
        return self.template(template_id, name)

    def _describe_templates(self, params: Params, _now: float) -> Mapping[str, Any]:
        ids, names = params.strings("LaunchTemplateId"), params.strings("LaunchTemplateName")
        found = list(self.templates.values())
        if ids or names:
            found = [self.template(one, None) for one in ids or []]
            found += [self.template(None, one) for one in names or []]
        shown, token = page(found, params, "MaxResults", mark="NextToken", most=200)
        params.done()
        return {"launchTemplates": [_template(one) for one in shown], "nextToken": token}

    def _describe_versions(self, params: Params, _now: float) -> Mapping[str, Any]:
        template = self._named(params)
        wanted = params.strings("LaunchTemplateVersion")
        low = params.integer("MinVersion", 1, 10**9) or 1
        high = params.integer("MaxVersion", 1, 10**9) or 10**9
        if wanted:
            numbers = [template.resolve(one).number for one in wanted]
        else:
            numbers = sorted((n for n in template.versions if low <= n <= high), reverse=True)
        shown, token = page(numbers, params, "MaxResults", mark="NextToken", most=200)
        params.done()
        versions = [_version(template, template.versions[number]) for number in shown]
        return {"launchTemplateVersionSet": versions, "nextToken": token}

    # Instances

    def _describe_instances(self, params: Params, _now: float) -> Mapping[str, Any]:
        ids = params.strings("InstanceId")
        match = filters(params, {"instance-id", "instance-state-name", "image-id"})
        found = self._found(ids) if ids else list(self.instances.values())
        found = [one for one in found if match(_facts(one))]
        shown, token = page(found, params, "MaxResults", mark="NextToken", most=1000)
        params.done()
        rows = [
            {
                "reservationId": identifier("r", one.id),
                "ownerId": ACCOUNT,
                "instancesSet": [_instance(one)],
            }
            for one in shown
        ]
        return {"reservationSet": rows, "nextToken": token}

    def _terminate_instances(self, params: Params, _now: float) -> Mapping[str, Any]:
        found = self._found(params.strings("InstanceId") or [])
        params.done()
        if not found:
            raise Refusal(
                400, "MissingParameter", "The request must contain the parameter InstanceId"
            )
        reason = (
            "Client.UserInitiatedShutdown",
            "Client.UserInitiatedShutdown: User initiated shutdown",
        )
        rows = []
        for one in found:
            self.terminate(one.id, reason)
            rows.append(
                {
                    "instanceId": one.id,
                    "currentState": _state(self.instances[one.id].state),
                    "previousState": _state(one.state),
                }
            )
        return {"instancesSet": rows}

    def _console_output(self, params: Params, now: float) -> Mapping[str, Any]:
        found = self._found([params.need("InstanceId")])
        params.boolean("Latest")
        params.done()
        output = self._console(found[0].id, now)[-CONSOLE_BYTES:]
        return {
            "instanceId": found[0].id,
            "timestamp": time_of(now),
            "output": base64.b64encode(output).decode() if output else None,
        }

    def _found(self, ids: Iterable[str]) -> list[Instance]:
        found = []
        for instance_id in ids:
            if not re.fullmatch(r"i-[0-9a-f]{8,17}", instance_id):
                raise Refusal(400, "InvalidInstanceID.Malformed", f'Invalid id: "{instance_id}"')
            if instance_id not in self.instances:
                raise Refusal(
                    400,
                    "InvalidInstanceID.NotFound",
                    f"The instance ID '{instance_id}' does not exist",
                )
            found.append(self.instances[instance_id])
        return found


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _facts(one: Instance) -> dict[str, str]:
    facts = {
        "instance-id": one.id,
        "instance-state-name": one.state.value,
        "image-id": one.image_id,
    }
    return facts | {f"tag:{name}": value for name, value in one.tags.items()}


def _template(template: LaunchTemplate) -> dict[str, Any]:
    return {
        "launchTemplateId": template.id,
        "launchTemplateName": template.name,
        "createTime": time_of(template.created_at),
        "createdBy": f"arn:aws:iam::{ACCOUNT}:root",
        "defaultVersionNumber": template.default,
        "latestVersionNumber": template.latest,
        "tagSet": tag_set(template.tags),
    }


def _version(template: LaunchTemplate, version: Version) -> dict[str, Any]:
    return {
        "launchTemplateId": template.id,
        "launchTemplateName": template.name,
        "versionNumber": version.number,
        "versionDescription": version.description,
        "createTime": time_of(version.created_at),
        "createdBy": f"arn:aws:iam::{ACCOUNT}:root",
        "defaultVersion": version.number == template.default,
        "launchTemplateData": _answered(version.data),
    }


def _answered(node: Any) -> Any:
    """Name a request's parameters as the answer does."""
    if isinstance(node, Mapping):
        return {
            _LISTS.get(name, name[:1].lower() + name[1:]): _answered(value)
            for name, value in node.items()
        }
    return [_answered(item) for item in node] if isinstance(node, list) else node


def _state(state: State) -> dict[str, Any]:
    return {"code": _CODES[state], "name": state.value}


def _instance(one: Instance) -> dict[str, Any]:
    return {
        "instanceId": one.id,
        "imageId": one.image_id,
        "instanceState": _state(one.state),
        "instanceType": one.instance_type,
        "launchTime": time_of(one.launched_at),
        "placement": {"availabilityZone": one.zone},
        "architecture": "x86_64",
        "stateReason": {"code": one.reason[0], "message": one.reason[1]} if one.reason else None,
        "tagSet": tag_set(one.tags),
    }


def _tags(data: Mapping[str, Any]) -> dict[str, str]:
    tags: dict[str, str] = {}
    specifications = data.get("TagSpecification", [])
    for item in specifications if isinstance(specifications, list) else []:
        if isinstance(item, dict) and item.get("ResourceType") == "instance":
            pairs = item.get("Tag", [])
            tags.update({one["Key"]: one.get("Value", "") for one in pairs if "Key" in one})
    return tags
