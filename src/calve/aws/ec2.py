"""EC2: launch templates, instances, consoles."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calve.aws.session import needs
from calve.errors import UsageError

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterable, Iterator, Mapping

    from calve.aws.session import Session

__all__ = ["Ec2", "Instance", "LaunchTemplate", "TemplateVersion"]

USER_DATA_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class LaunchTemplate:
    """A launch template."""

    id: str
    name: str
    default_version: int
    latest_version: int
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class TemplateVersion:
    """One version of a launch template; `user_data` decoded, b"" where it has none.

    Attributes:
        profile: The instance profile's name; None where it has none.
        metadata_tokens: `required` or `optional`; None where it does not say.
    """

    template_id: str
    number: int
    description: str
    image_id: str | None
    instance_type: str | None
    user_data: bytes
    profile: str | None = None
    metadata_tokens: str | None = None


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance; `state` is EC2's word, `reason` why it is in it."""

    id: str
    state: str
    image_id: str
    instance_type: str
    launched_at: datetime.datetime
    reason: str | None


class Ec2:
    """EC2 for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("ec2")

    @needs("ec2:CreateLaunchTemplate")
    def create_template(
        self,
        name: str,
        *,
        image_id: str,
        instance_type: str,
        user_data: bytes,
        description: str = "",
        token: str | None = None,
    ) -> LaunchTemplate:
        """Create a launch template with its version 1.

        Args:
            name: 3 to 128 characters.
            image_id: What instances boot.
            instance_type: For instance `t3.nano`.
            user_data: Raw, at most 16 KiB.
            description: Of version 1, at most 255 characters.
            token: The same token with the same arguments gives the same template.

        Raises:
            ConflictError: The name is taken.
            UsageError: The user data is too long.
        """
        data = {
            "ImageId": image_id,
            "InstanceType": instance_type,
            "UserData": _encoded(user_data),
        }
        answer = self._client.create_launch_template(
            LaunchTemplateName=name,
            LaunchTemplateData=data,
            **_given(VersionDescription=description, ClientToken=token),
        )
        return _template(answer["LaunchTemplate"])

    @needs("ec2:CreateLaunchTemplateVersion")
    def create_version(
        self,
        template_id: str,
        *,
        source: int,
        description: str,
        user_data: bytes,
        image_id: str | None = None,
        token: str | None = None,
    ) -> TemplateVersion:
        """Create a version from a numbered one, with other user data.

        Args:
            template_id: The launch template.
            source: The version that everything else is taken from; never `$Latest`, which may be a failed one.
            description: What the version is found by again; at most 255 characters.
            user_data: Raw, at most 16 KiB.
            image_id: What instances boot; None for the source's.
            token: The same token with the same arguments gives the same version.
        """
        answer = self._client.create_launch_template_version(
            LaunchTemplateId=template_id,
            SourceVersion=str(source),
            VersionDescription=description,
            LaunchTemplateData={"UserData": _encoded(user_data), **_given(ImageId=image_id)},
            **_given(ClientToken=token),
        )
        return _version(answer["LaunchTemplateVersion"])

    @needs("ec2:CreateLaunchTemplateVersion", "ec2:DescribeLaunchTemplateVersions")
    def require_tokens(self, template_id: str, source: int, description: str) -> TemplateVersion:
        """Create a version from a numbered one, that gives metadata to IMDSv2 alone; all else is the source's.

        Args:
            template_id: The launch template.
            source: The version's number.
            description: What the version is found by again: one that has it already is returned.
        """
        made = self.find_version(template_id, description)
        if made is not None:
            return made
        answer = self._client.describe_launch_template_versions(
            LaunchTemplateId=template_id, Versions=[str(source)]
        )
        data = answer["LaunchTemplateVersions"][0]["LaunchTemplateData"]
        # A version's options replace the source's as a whole; their state is EC2's to say.
        options = {k: v for k, v in data.get("MetadataOptions", {}).items() if k != "State"}
        answer = self._client.create_launch_template_version(
            LaunchTemplateId=template_id,
            SourceVersion=str(source),
            VersionDescription=description,
            LaunchTemplateData={"MetadataOptions": {**options, "HttpTokens": "required"}},
        )
        return _version(answer["LaunchTemplateVersion"])

    @needs("ec2:CreateTags")
    def tag_template(self, template_id: str, tags: Mapping[str, str]) -> None:
        """Give a launch template tags, in place of those of the same keys; its instances do not get them."""
        pairs = [{"Key": key, "Value": value} for key, value in tags.items()]
        self._client.create_tags(Resources=[template_id], Tags=pairs)

    @needs("ec2:DescribeLaunchTemplates")
    def template_of(self, template_id: str) -> LaunchTemplate:
        """Find a launch template by its id; NotFoundError where there is none."""
        answer = self._client.describe_launch_templates(LaunchTemplateIds=[template_id])
        return _template(answer["LaunchTemplates"][0])

    @needs("ec2:DescribeLaunchTemplates")
    def template(self, name: str) -> LaunchTemplate:
        """Find a launch template by its name; NotFoundError where there is none."""
        answer = self._client.describe_launch_templates(LaunchTemplateNames=[name])
        return _template(answer["LaunchTemplates"][0])

    @needs("ec2:DescribeLaunchTemplateVersions")
    def version(self, template_id: str, number: int | str) -> TemplateVersion:
        """Return a version by its number, `$Latest` or `$Default`; NotFoundError where there is none."""
        answer = self._client.describe_launch_template_versions(
            LaunchTemplateId=template_id, Versions=[str(number)]
        )
        return _version(answer["LaunchTemplateVersions"][0])

    @needs("ec2:DescribeLaunchTemplateVersions")
    def find_version(self, template_id: str, description: str) -> TemplateVersion | None:
        """Find the newest version with this description; None where there is none."""
        pages = self._client.get_paginator("describe_launch_template_versions").paginate(
            LaunchTemplateId=template_id
        )
        found = (item for page in pages for item in page["LaunchTemplateVersions"])
        matching = [item for item in found if item.get("VersionDescription", "") == description]
        return max(map(_version, matching), key=lambda one: one.number, default=None)

    @needs("ec2:DescribeInstances")
    def instances(self, ids: Iterable[str]) -> tuple[Instance, ...]:
        """Describe instances; NotFoundError where one is long gone or never was."""
        wanted = list(ids)
        if not wanted:
            return ()
        return tuple(self._describe(wanted))

    def _describe(self, ids: list[str]) -> Iterator[Instance]:
        pages = self._client.get_paginator("describe_instances").paginate(InstanceIds=ids)
        for page in pages:
            for reservation in page["Reservations"]:
                yield from map(_instance, reservation["Instances"])

    @needs("ec2:GetConsoleOutput")
    def console(self, instance_id: str) -> str:
        """Return the last 64 KiB of an instance's console as they are now; foreign text, "" where there is none."""
        answer = self._client.get_console_output(InstanceId=instance_id, Latest=True)
        return str(answer.get("Output") or "")

    @needs("ec2:TerminateInstances")
    def terminate(self, ids: Iterable[str]) -> None:
        """Terminate instances; those that have ended are left alone."""
        wanted = list(ids)
        if wanted:
            self._client.terminate_instances(InstanceIds=wanted)


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value}


def _encoded(user_data: bytes) -> str:
    if len(user_data) > USER_DATA_BYTES:
        raise UsageError(
            f"user data is {len(user_data)} bytes long, EC2 takes {USER_DATA_BYTES} at most"
        )
    return base64.b64encode(user_data).decode()


def _template(item: dict[str, Any]) -> LaunchTemplate:
    return LaunchTemplate(
        item["LaunchTemplateId"],
        item["LaunchTemplateName"],
        item["DefaultVersionNumber"],
        item["LatestVersionNumber"],
        {tag["Key"]: tag["Value"] for tag in item.get("Tags", ())},
    )


def _version(item: dict[str, Any]) -> TemplateVersion:
    data = item["LaunchTemplateData"]
    profile = data.get("IamInstanceProfile", {})
    return TemplateVersion(
        item["LaunchTemplateId"],
        item["VersionNumber"],
        item.get("VersionDescription", ""),
        data.get("ImageId"),
        data.get("InstanceType"),
        base64.b64decode(data.get("UserData", "")),
        profile.get("Name") or str(profile.get("Arn", "")).rpartition("/")[2] or None,
        data.get("MetadataOptions", {}).get("HttpTokens"),
    )


def _instance(item: dict[str, Any]) -> Instance:
    return Instance(
        item["InstanceId"],
        item["State"]["Name"],
        item["ImageId"],
        item["InstanceType"],
        item["LaunchTime"],
        item.get("StateReason", {}).get("Message"),
    )
