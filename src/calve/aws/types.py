"""EC2: what instance types can run, and what an image is made for, whoever owns it.

Source: Amazon EC2 API reference, DescribeInstanceTypes and DescribeImages; EC2 User Guide, "Boot modes".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calve.aws.session import needs
from calve.errors import NotFoundError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.aws.session import Session

__all__ = ["Bootable", "InstanceType", "Types"]


@dataclass(frozen=True, slots=True)
class InstanceType:
    """An instance type.

    Attributes:
        name: `t3.nano`.
        architectures: `x86_64`, `arm64`, `i386` …
        boot_modes: `uefi`, `legacy-bios`.
    """

    name: str
    architectures: tuple[str, ...]
    boot_modes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bootable:
    """What has to be known of an image to boot it.

    Attributes:
        id: `ami-…`.
        state: `available`, `pending`, `disabled` …
        architecture: `x86_64` or `arm64`.
        boot_mode: `uefi`, `uefi-preferred` or `legacy-bios`; where the image does not say, what EC2 makes of that.
        tags: those that this account gave it.
    """

    id: str
    state: str
    architecture: str
    boot_mode: str
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


class Types:
    """Instance types and images for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("ec2")

    @needs("ec2:DescribeInstanceTypes")
    def instance_type(self, name: str) -> InstanceType:
        """Describe an instance type.

        Raises:
            NotFoundError: the region does not have it.
        """
        answer = self._client.describe_instance_types(
            Filters=[{"Name": "instance-type", "Values": [name]}]
        )
        if not answer["InstanceTypes"]:
            raise NotFoundError("the region has no such instance type", place=name)
        return _type(answer["InstanceTypes"][0])

    @needs("ec2:DescribeImages")
    def image(self, image_id: str) -> Bootable:
        """Describe an image, another account's too.

        Raises:
            NotFoundError: there is none, or this account may not launch it.
        """
        answer = self._client.describe_images(ImageIds=[image_id], IncludeDisabled=True)
        if not answer["Images"]:
            raise NotFoundError("there is no such image", place=image_id)
        return _image(answer["Images"][0])


def _type(item: dict[str, Any]) -> InstanceType:
    return InstanceType(
        item["InstanceType"],
        tuple(item.get("ProcessorInfo", {}).get("SupportedArchitectures", ())),
        tuple(item.get("SupportedBootModes", ())),
    )


def _image(item: dict[str, Any]) -> Bootable:
    architecture = item.get("Architecture", "")
    default = "uefi" if architecture == "arm64" else "legacy-bios"
    return Bootable(
        item["ImageId"],
        item.get("State", ""),
        architecture,
        item.get("BootMode") or default,
        {tag["Key"]: tag["Value"] for tag in item.get("Tags", ())},
    )
