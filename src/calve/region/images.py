"""Images (AMIs): registered, described, shared, deprecated, disabled, copied, deregistered.

Source: EC2 API reference, the actions below; "Error codes" of the same; "Deprecate an AMI", "Disable an AMI" and
"Copy an AMI" (EC2 User Guide). An image without block devices is one that the region's owner added: whoever makes
machines knows what it is.
"""

from __future__ import annotations

import datetime as dt
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from calve.region import permissions
from calve.region.image import Image, ImageState, check_name, parse_image, when
from calve.region.names import ACCOUNT, identifier
from calve.region.query import EC2, Action, Params, Replays, filters, page
from calve.region.signature import Refusal
from calve.region.snapshot import Snapshot, Start, State
from calve.region.snapshots import find_snapshot
from calve.region.tags import specified, tag_facts

if TYPE_CHECKING:
    from calve.region.blocks import Snapshots

__all__ = ["Images"]

_FILTERS = {
    "name",
    "image-id",
    "state",
    "owner-id",
    "architecture",
    "description",
    "block-device-mapping.snapshot-id",
}
_ATTRIBUTES: Mapping[str, Callable[[Image], Any]] = {
    "description": lambda image: image.description,
    "bootMode": lambda image: image.boot_mode,
    "tpmSupport": lambda image: image.tpm_support,
    "imdsSupport": lambda image: image.imds_support,
    "uefiData": lambda image: image.uefi_data,
    "sriovNetSupport": lambda image: image.sriov_support,
    "lastLaunchedTime": lambda image: when(image.launched_at),
}


class Images:
    """The images of one region.

    Args:
        region: Its name.
        snapshots: What images are made of; None where none can be registered.
        neighbour: Finds another region's images by its name; None where there is none.
        seed: Names the region's story; see `names`.
    """

    dialect = EC2

    def __init__(
        self,
        region: str,
        snapshots: Snapshots | None,
        neighbour: Callable[[str], Images | None],
        seed: str,
    ) -> None:
        self.snapshots = snapshots
        self._region = region
        self._neighbour = neighbour
        self._seed = seed
        self._serial = itertools.count(1)
        self._images: dict[str, Image] = {}
        self._copies = Replays[str]()
        self.actions: Mapping[str, Action] = {"DescribeImages": self._describe}
        if snapshots is not None:
            self.actions = {
                **self.actions,
                "RegisterImage": self._register,
                "DeregisterImage": self._deregister,
                "DescribeImageAttribute": self._attribute,
                "ModifyImageAttribute": self._modify,
                "EnableImageDeprecation": self._deprecate,
                "DisableImageDeprecation": self._undeprecate,
                "DisableImage": self._disable,
                "EnableImage": self._enable,
                "CopyImage": self._copy,
            }

    # For cloud and the other services

    def add(self, image_id: str, name: str, now: float) -> None:
        """Register an image without block devices."""
        self._images[image_id] = Image(
            image_id, name, now, architecture="x86_64", virtualization="hvm", ena_support=True
        )

    def find(self, image_id: str) -> Image:
        """Return an image; Refusal where there is none."""
        if not re.fullmatch(r"ami-[0-9a-f]{8,17}", image_id):
            raise Refusal(400, "InvalidAMIID.Malformed", f'Invalid id: "{image_id}"')
        found = self._images.get(image_id)
        if found is None:
            raise Refusal(
                400, "InvalidAMIID.NotFound", f"The image id '[{image_id}]' does not exist"
            )
        return found

    def tags(self) -> dict[str, Mapping[str, str]]:
        """Return every image's tags, by its id."""
        return {one.id: one.tags for one in self._images.values()}

    def put_tags(self, image_id: str, tags: Mapping[str, str]) -> None:
        """Replace an image's tags."""
        self._images[image_id] = replace(self._images[image_id], tags=dict(tags))

    def users(self, snapshot_id: str) -> list[str]:
        """Return the images that are made of a snapshot."""
        return [one.id for one in self._images.values() if snapshot_id in one.snapshot_ids]

    def launch(self, image_id: str, instance_type: str, now: float) -> None:
        """Note that an instance is launched from an image.

        Raises:
            Refusal: It is not there, not available, or nothing that the instance type (x86_64, Nitro) can run.
        """
        image = self.find(image_id)
        if self.state(image) is not ImageState.AVAILABLE:
            raise Refusal(
                400,
                "InvalidAMIID.Unavailable",
                f"The image ID '{image_id}' is not available; it is {self.state(image)}.",
            )
        _check_launch(image, instance_type)
        self._images[image_id] = replace(image, launched_at=now)

    def state(self, image: Image) -> ImageState:
        """Return an image's state, which is that of its snapshots unless it is disabled."""
        if image.disabled:
            return ImageState.DISABLED
        found = [self._snapshot(one) for one in image.snapshot_ids]
        if any(one is None or one.state is State.ERROR for one in found):
            return ImageState.FAILED
        if any(one is not None and one.state is State.PENDING for one in found):
            return ImageState.PENDING
        return ImageState.AVAILABLE

    def _snapshot(self, snapshot_id: str) -> Snapshot | None:
        return None if self.snapshots is None else self.snapshots.find(snapshot_id)

    # Making and ending

    def _register(self, params: Params, now: float) -> Mapping[str, Any]:
        snapshots = self._held()

        def find(snapshot_id: str) -> Snapshot:
            found = find_snapshot(snapshots, snapshot_id)
            if found.state is not State.COMPLETED:
                raise Refusal(
                    400,
                    "IncorrectState",
                    f"Snapshot {snapshot_id} is in invalid state - {found.state}",
                )
            return found

        made = parse_image(params, self._new_id(), now, find)
        self._check_new_name(made.name)
        self._images[made.id] = made
        return {"imageId": made.id}

    def _held(self) -> Snapshots:
        """Return the snapshots: what needs them is no action where there are none."""
        return cast("Snapshots", self.snapshots)

    def _new_id(self) -> str:
        return identifier("ami", self._seed, self._region, next(self._serial))

    def _check_new_name(self, name: str) -> None:
        for one in self._images.values():
            if one.name == name:
                raise Refusal(
                    400,
                    "InvalidAMIName.Duplicate",
                    f"AMI name {name} is already in use by AMI {one.id}",
                )

    def _deregister(self, params: Params, _now: float) -> Mapping[str, Any]:
        image = self.find(params.need("ImageId"))
        delete = params.boolean("DeleteAssociatedSnapshots")
        params.done()
        del self._images[image.id]
        results = []
        for snapshot_id in image.snapshot_ids if delete else ():
            kept = bool(self.users(snapshot_id))
            if not kept:
                self._held().delete(snapshot_id)
            code = "skipped" if kept else "success"
            results.append({"snapshotId": snapshot_id, "returnCode": code})
        return {"return": True, "deleteSnapshotResultSet": results}

    def _copy(self, params: Params, now: float) -> Mapping[str, Any]:
        name, source_id = params.need("Name"), params.need("SourceImageId")
        region, token = params.need("SourceRegion"), params.text("ClientToken")
        description, key_arn = params.text("Description"), params.text("KmsKeyId")
        encrypted, with_tags = params.boolean("Encrypted"), params.boolean("CopyImageTags")
        tags = specified(params, "image", "snapshot")
        params.done()
        asked = (name, source_id, region, description, key_arn, encrypted, with_tags, str(tags))
        done = self._copies.find(token, asked)
        if done is not None:
            return {"imageId": done}
        check_name(name)
        self._check_new_name(name)
        image, snapshots = self._source(region, source_id)
        ask = Start(0, None, "", tuple(tags["snapshot"].items()), encrypted, key_arn)
        copied = {one: self._held().copy(snapshots, one, ask).id for one in image.snapshot_ids}
        made = replace(
            image,
            id=self._new_id(),
            name=name,
            created_at=now,
            description=image.description if description is None else description,
            devices=tuple(
                replace(one, snapshot_id=copied.get(one.snapshot_id or "")) for one in image.devices
            ),
            tags={**(image.tags if with_tags else {}), **tags["image"]},
            launchable_by=frozenset(),
            deprecated_at=None,
            launched_at=None,
            source=(source_id, region),
        )
        self._images[made.id] = made
        self._copies.keep(token, asked, made.id)
        return {"imageId": made.id}

    def _source(self, region: str, image_id: str) -> tuple[Image, Snapshots]:
        """Find an image that can be copied, and its region's snapshots."""
        images = self if region == self._region else self._neighbour(region)
        if images is None or images.snapshots is None:
            raise Refusal(400, "InvalidParameterValue", f"Invalid region '{region}'.")
        image = images.find(image_id)
        if images.state(image) is not ImageState.AVAILABLE or not image.devices:
            raise Refusal(
                400, "InvalidAMIID.Unavailable", f"The image ID '{image_id}' is not available"
            )
        return image, images.snapshots

    # Showing and changing

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        ids, owners = params.strings("ImageId"), params.strings("Owner")
        disabled = params.boolean("IncludeDisabled")
        params.boolean("IncludeDeprecated")  # the owner always sees them
        match = filters(params, _FILTERS)
        found = [self.find(one) for one in ids] if ids else list(self._images.values())
        if owners and not set(owners) & {"self", ACCOUNT}:
            found = []
        found = [
            one
            for one in found
            if (disabled or not one.disabled) and _matches(match, one, self.state(one))
        ]
        shown, token = page(found, params, "MaxResults", mark="NextToken", most=1000)
        params.done()
        rows = [one.row(self.state(one), self._snapshot) for one in shown]
        return {"imagesSet": rows, "nextToken": token}

    def _attribute(self, params: Params, _now: float) -> Mapping[str, Any]:
        image, name = self.find(params.need("ImageId")), params.need("Attribute")
        params.done()
        answer: dict[str, Any] = {"imageId": image.id}
        if name == "launchPermission":
            return answer | {name: permissions.rows(image.launchable_by)}
        if name == "blockDeviceMapping":
            return answer | {name: image.row(self.state(image), self._snapshot)[name]}
        read = _ATTRIBUTES.get(name)
        if read is None:
            raise Refusal(
                400, "InvalidParameterValue", f"The attribute '{name}' is not simulated, or none."
            )
        value = read(image)
        return answer | {name: {} if value is None else {"value": value}}

    def _modify(self, params: Params, _now: float) -> Mapping[str, Any]:
        image = self.find(params.need("ImageId"))
        if params.text("Attribute") not in {None, "launchPermission"}:
            raise Refusal(400, "InvalidParameterValue", "Only launchPermission is simulated so.")
        description, imds = params.struct("Description"), params.struct("ImdsSupport")
        changed = replace(
            image,
            launchable_by=permissions.change(params, "LaunchPermission", image.launchable_by),
        )
        if description is not None:
            changed = replace(changed, description=description.text("Value"))
        if imds is not None:
            if imds.need("Value") != "v2.0":
                raise Refusal(400, "InvalidParameterValue", "ImdsSupport can only become v2.0.")
            changed = replace(changed, imds_support="v2.0")
        params.done()
        if image.disabled and changed.launchable_by:
            raise Refusal(400, "InvalidAMIID.Unavailable", "A disabled image cannot be shared.")
        self._images[image.id] = changed
        return {"return": True}

    def _deprecate(self, params: Params, now: float) -> Mapping[str, Any]:
        image, text = self.find(params.need("ImageId")), params.need("DeprecateAt")
        params.done()
        try:
            at = dt.datetime.fromisoformat(text)
        except ValueError:
            raise Refusal(400, "InvalidParameterValue", f"'{text}' is no timestamp.") from None
        at = at if at.tzinfo else at.replace(tzinfo=dt.UTC)
        if at.timestamp() <= now:
            raise Refusal(400, "InvalidParameterValue", "DeprecateAt must not be in the past.")
        # AWS rounds it to the nearest minute.
        self._images[image.id] = replace(image, deprecated_at=round(at.timestamp() / 60) * 60.0)
        return {"return": True}

    def _undeprecate(self, params: Params, _now: float) -> Mapping[str, Any]:
        return self._change(params, lambda image: replace(image, deprecated_at=None))

    def _disable(self, params: Params, _now: float) -> Mapping[str, Any]:
        # A disabled image is nobody's to launch any more, not even once it is enabled again.
        return self._change(
            params, lambda image: replace(image, disabled=True, launchable_by=frozenset())
        )

    def _enable(self, params: Params, _now: float) -> Mapping[str, Any]:
        return self._change(params, lambda image: replace(image, disabled=False))

    def _change(self, params: Params, change: Callable[[Image], Image]) -> Mapping[str, Any]:
        image = self.find(params.need("ImageId"))
        params.done()
        self._images[image.id] = change(image)
        return {"return": True}


def _check_launch(image: Image, instance_type: str) -> None:
    """Refuse what a Nitro instance of x86_64 cannot run."""
    if image.architecture != "x86_64":
        raise Refusal(
            400,
            "InvalidParameterValue",
            f"The architecture 'x86_64' of the specified instance type does not match the architecture "
            f"'{image.architecture}' of the specified AMI.",
        )
    if image.virtualization != "hvm":
        raise Refusal(
            400,
            "InvalidParameterCombination",
            f"The virtualization type '{image.virtualization}' is not supported for the '{instance_type}' "
            "instance type.",
        )
    if not image.ena_support:
        raise Refusal(
            400,
            "InvalidParameterCombination",
            f"Enhanced networking with the Elastic Network Adapter (ENA) is required for the '{instance_type}' "
            "instance type.",
        )


def _matches(match: Callable[[Mapping[str, str]], bool], image: Image, state: ImageState) -> bool:
    facts = {
        "name": image.name,
        "image-id": image.id,
        "state": state.value,
        "owner-id": ACCOUNT,
        "architecture": image.architecture,
        "description": image.description or "",
        **tag_facts(image.tags),
    }
    # A device's filter has a value for each device.
    return any(
        match({**facts, "block-device-mapping.snapshot-id": one})
        for one in image.snapshot_ids or [""]
    )
