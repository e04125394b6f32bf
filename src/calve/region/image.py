"""An image (AMI) as a value: what RegisterImage says of it, checked, and how EC2 shows it.

Source: EC2 API reference, RegisterImage, BlockDeviceMapping, EbsBlockDevice, Image; "Boot modes" and "NitroTPM"
(EC2 User Guide). What a request leaves out has EC2's default: `i386`, `paravirtual`, no ENA, a `standard` volume.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calve.region.names import ACCOUNT
from calve.region.query import time_of
from calve.region.signature import Refusal
from calve.region.tags import specified, tag_set

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calve.region.query import Params
    from calve.region.snapshot import Snapshot

__all__ = ["Device", "Image", "ImageState", "check_name", "parse_image", "when"]

_NAME = re.compile(r"[A-Za-z0-9()\[\] ./\-'@_]{3,128}")
_DEVICE = re.compile(r"/dev/(sd|xvd|hd)[a-z]{1,2}[0-9]{0,2}|xvd[a-z]{1,2}[0-9]{0,2}")
_UEFI_DATA_BYTES = 64 * 1024
_DESCRIPTION_CHARACTERS = 255


class ImageState(StrEnum):
    """An image's state."""

    PENDING = "pending"
    AVAILABLE = "available"
    FAILED = "failed"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class Device:
    """A block device mapping.

    Attributes:
        name: `/dev/xvda`, for example.
        snapshot_id: What the volume is made of; None for an empty one.
        gib: The volume's size.
        kind: The volume's type.
        encrypted: Of an empty volume; None where it is not said.
    """

    name: str
    snapshot_id: str | None
    gib: int
    kind: str = "standard"
    delete_on_termination: bool = True
    encrypted: bool | None = None

    def row(self, snapshot: Snapshot | None) -> dict[str, Any]:
        """Write it as EC2 does."""
        ebs = {
            "snapshotId": self.snapshot_id,
            "volumeSize": self.gib,
            "volumeType": self.kind,
            "deleteOnTermination": self.delete_on_termination,
            "encrypted": bool(self.encrypted if snapshot is None else snapshot.encrypted),
        }
        return {"deviceName": self.name, "ebs": ebs}


@dataclass(frozen=True, slots=True)
class Image:
    """An image.

    Attributes:
        id: `ami-` and 17 hexadecimal digits.
        created_at: Seconds since 1970, as all instants here.
        devices: In the order of the request.
        uefi_data: The variable store, as it was sent, in base64.
        launchable_by: Accounts that may launch it; `all` for everybody.
        source: Image and region that it was copied from.
    """

    id: str
    name: str
    created_at: float
    description: str | None = None
    architecture: str = "i386"
    virtualization: str = "paravirtual"
    root_device: str | None = None
    devices: tuple[Device, ...] = ()
    boot_mode: str | None = None
    tpm_support: str | None = None
    imds_support: str | None = None
    ena_support: bool | None = None
    sriov_support: str | None = None
    uefi_data: str | None = None
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    launchable_by: frozenset[str] = frozenset()
    disabled: bool = False
    deprecated_at: float | None = None
    launched_at: float | None = None
    source: tuple[str, str] | None = None

    @property
    def snapshot_ids(self) -> list[str]:
        """Return the snapshots that it is made of."""
        return [one.snapshot_id for one in self.devices if one.snapshot_id is not None]

    @property
    def root(self) -> Device | None:
        """Return its root volume; None where it has none."""
        return next((one for one in self.devices if one.name == self.root_device), None)

    def row(self, state: ImageState, find: Callable[[str], Snapshot | None]) -> dict[str, Any]:
        """Write it as EC2 does."""
        return {
            "imageId": self.id,
            "imageLocation": f"{ACCOUNT}/{self.name}",
            "imageState": state.value,
            "imageOwnerId": ACCOUNT,
            "isPublic": "all" in self.launchable_by,
            "name": self.name,
            "description": self.description,
            "imageType": "machine",
            "architecture": self.architecture,
            "creationDate": time_of(self.created_at),
            "platformDetails": "Linux/UNIX",
            "usageOperation": "RunInstances",
            "rootDeviceType": "ebs",
            "rootDeviceName": self.root_device,
            "blockDeviceMapping": [
                one.row(find(one.snapshot_id) if one.snapshot_id else None) for one in self.devices
            ],
            "virtualizationType": self.virtualization,
            "hypervisor": "xen",
            "bootMode": self.boot_mode,
            "tpmSupport": self.tpm_support,
            "imdsSupport": self.imds_support,
            "enaSupport": self.ena_support,
            "sriovNetSupport": self.sriov_support,
            "deprecationTime": when(self.deprecated_at),
            "lastLaunchedTime": when(self.launched_at),
            "sourceImageId": self.source[0] if self.source else None,
            "sourceImageRegion": self.source[1] if self.source else None,
            "tagSet": tag_set(self.tags),
        }


def when(seconds: float | None) -> str | None:
    """Return an instant as EC2 writes it; None where it never was."""
    return None if seconds is None else time_of(seconds)


def check_name(name: str) -> None:
    """Refuse what is no image's name."""
    if not _NAME.fullmatch(name):
        raise Refusal(
            400,
            "InvalidAMIName.Malformed",
            "AMI names must be between 3 and 128 characters long, and may contain letters, numbers, spaces and "
            "( ) [ ] . / - ' @ _",
        )


def parse_image(
    params: Params, image_id: str, now: float, find: Callable[[str], Snapshot]
) -> Image:
    """Read RegisterImage.

    Args:
        params: The request's; all of them are read.
        image_id: Of the new image.
        now: When it is made.
        find: Returns a completed snapshot, or refuses.

    Raises:
        Refusal: With EC2's code.
    """
    name = params.need("Name")
    check_name(name)
    root, mappings = params.text("RootDeviceName"), params.structs("BlockDeviceMapping")
    devices = tuple(_device(one, find) for one in mappings)
    image = Image(
        image_id,
        name,
        now,
        description=_description(params),
        architecture=_choice(params, "Architecture", "i386", "x86_64", "arm64") or "i386",
        virtualization=_choice(params, "VirtualizationType", "paravirtual", "hvm") or "paravirtual",
        root_device=root,
        devices=devices,
        boot_mode=_choice(params, "BootMode", "legacy-bios", "uefi", "uefi-preferred"),
        tpm_support=_choice(params, "TpmSupport", "v2.0"),
        imds_support=_choice(params, "ImdsSupport", "v2.0"),
        ena_support=params.boolean("EnaSupport"),
        sriov_support=_choice(params, "SriovNetSupport", "simple"),
        uefi_data=_uefi_data(params),
        tags=specified(params, "image")["image"],
    )
    params.done()
    _check(image)
    return image


def _description(params: Params) -> str | None:
    text = params.text("Description")
    if text is not None and len(text) > _DESCRIPTION_CHARACTERS:
        raise Refusal(
            400,
            "InvalidParameterValue",
            f"Description must have at most {_DESCRIPTION_CHARACTERS} characters.",
        )
    return text


def _choice(params: Params, name: str, *known: str) -> str | None:
    value = params.text(name)
    if value is not None and value not in known:
        raise Refusal(
            400, "InvalidParameterValue", f"Value ({value}) for parameter {name} is invalid."
        )
    return value


def _uefi_data(params: Params) -> str | None:
    text = params.text("UefiData")
    if text is None:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        data = b""
    if not data or len(data) > _UEFI_DATA_BYTES:
        raise Refusal(
            400, "InvalidParameterValue", "UefiData must be base64 of a UEFI variable store."
        )
    return text


def _device(params: Params, find: Callable[[str], Snapshot]) -> Device:
    name = params.need("DeviceName")
    if not _DEVICE.fullmatch(name):
        raise _bad_mapping(f"Invalid device name {name}")
    ebs = params.struct("Ebs")
    if ebs is None:
        raise _bad_mapping(f"The device {name} has no EBS volume; others are not simulated.")
    snapshot_id, encrypted = ebs.text("SnapshotId"), ebs.boolean("Encrypted")
    gib = ebs.integer("VolumeSize", 1, 65536)
    kind = _choice(ebs, "VolumeType", "standard", "gp2", "gp3", "st1", "sc1") or "standard"
    kept = ebs.boolean("DeleteOnTermination")
    if snapshot_id is None and gib is None:
        raise Refusal(
            400,
            "MissingParameter",
            "The request must contain the parameter size or snapshotId",
        )
    if snapshot_id is not None:
        snapshot = find(snapshot_id)
        if encrypted is not None:
            raise _bad_mapping("The parameter encrypted cannot be given with a snapshot.")
        if gib is not None and gib < snapshot.gib:
            raise _bad_mapping(
                f"Volume of size {gib}GB is smaller than snapshot '{snapshot_id}', "
                f"expect size >= {snapshot.gib}GB"
            )
        gib = gib or snapshot.gib
    return Device(name, snapshot_id, gib or 0, kind, kept is not False, encrypted)


def _bad_mapping(message: str) -> Refusal:
    return Refusal(400, "InvalidBlockDeviceMapping", message)


def _check(image: Image) -> None:
    if image.root_device is None:
        raise Refusal(
            400, "MissingParameter", "The request must contain the parameter rootDeviceName"
        )
    names = [one.name for one in image.devices]
    if len(set(names)) < len(names):
        raise _bad_mapping("A device name stands twice.")
    if image.root is None or image.root.snapshot_id is None:
        raise _bad_mapping(f"The root device {image.root_device} is not backed by a snapshot.")
    if image.tpm_support and image.boot_mode != "uefi":
        raise _bad_combination("TpmSupport v2.0 requires the boot mode uefi.")
    if image.uefi_data and image.boot_mode not in {"uefi", "uefi-preferred"}:
        raise _bad_combination("UefiData requires a boot mode with UEFI.")
    if image.architecture == "arm64" and image.boot_mode not in {None, "uefi"}:
        raise _bad_combination("The architecture arm64 boots by UEFI only.")


def _bad_combination(message: str) -> Refusal:
    return Refusal(400, "InvalidParameterCombination", message)
