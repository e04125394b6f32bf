"""EC2's images (AMIs) and their snapshots."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from calve.aws.session import needs
from calve.errors import NotFoundError

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Mapping

    from calve.aws.session import Session

__all__ = ["Ami", "Images", "ImportTask", "SnapshotRow"]

_ID: Final = re.compile(r"ami-[0-9a-f]{8,17}")
_ROOT: Final = "/dev/xvda"
_IMPORT_ROLE: Final = "vmimport"


@dataclass(frozen=True, slots=True)
class Ami:
    """An image.

    Attributes:
        id: `ami-…`.
        name: unique in its region and account.
        state: `available`, `pending`, `disabled`, `failed` …
        architecture: `x86_64` or `arm64`.
        snapshots: of its volumes, the root's first.
        created: ISO 8601, as EC2 says it.
        deprecated: when it is or was deprecated; empty where nobody said.
        tags: its own.
        size_gib: of its root volume; 0 where it has none of a snapshot.
    """

    id: str
    name: str
    state: str
    architecture: str
    snapshots: tuple[str, ...]
    created: str
    deprecated: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    size_gib: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A snapshot of ours: its state, and when it was begun (ISO 8601)."""

    id: str
    state: str
    message: str
    started: str
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ImportTask:
    """An import of a disk.

    Attributes:
        id: `import-snap-…`.
        state: `active`, `completed`, or `deleted`: it failed, or was cancelled.
        message: what it does, or why it failed.
        percent: how far it is.
        snapshot: what it made; empty until it is completed.
    """

    id: str
    state: str
    message: str
    percent: int
    snapshot: str


class Images:
    """Images and snapshots of one region, for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("ec2")

    # Snapshots

    @needs("ec2:DescribeSnapshots")
    def snapshot_state(self, snapshot: str) -> tuple[str, str] | None:
        """Return a snapshot's state (`pending`, `completed`, `error`) and message; None where it is not known."""
        try:
            answer = self._client.describe_snapshots(SnapshotIds=[snapshot])
        except self._client.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") == "InvalidSnapshot.NotFound":
                return None
            raise
        found = answer["Snapshots"]
        return (found[0]["State"], found[0].get("StateMessage", "")) if found else None

    @needs("ec2:DescribeSnapshots")
    def snapshots(self, tag: str) -> tuple[SnapshotRow, ...]:
        """Return this account's snapshots that have a tag of this key."""
        pages = self._client.get_paginator("describe_snapshots").paginate(
            OwnerIds=["self"], Filters=[{"Name": "tag-key", "Values": [tag]}]
        )
        return tuple(_snapshot(row) for page in pages for row in page["Snapshots"])

    @needs("ec2:DeleteSnapshot")
    def delete_snapshot(self, snapshot: str) -> None:
        """Delete a snapshot, pending ones too.

        Raises:
            NotFoundError: there is none.
            ConflictError: an image uses it.
        """
        self._client.delete_snapshot(SnapshotId=snapshot)

    @needs("ec2:CreateTags")
    def tag(self, resource: str, tags: Mapping[str, str]) -> None:
        """Give a snapshot or an image tags, in place of those of the same keys."""
        pairs = [{"Key": key, "Value": value} for key, value in tags.items()]
        self._client.create_tags(Resources=[resource], Tags=pairs)

    # Imports

    @needs("ec2:ImportSnapshot")
    def import_disk(self, bucket: str, key: str, *, token: str, description: str) -> ImportTask:
        """Begin to import a raw disk out of S3, or find the import that was begun with the same token.

        EC2 reads the object as the service role `vmimport`, which an account has only where somebody made it.

        Args:
            bucket: of this region.
            key: the object's.
            token: at most 64 characters of ASCII.
            description: the snapshot's.
        """
        answer = self._client.import_snapshot(
            ClientToken=token,
            RoleName=_IMPORT_ROLE,
            Description=description,
            DiskContainer={
                "Format": "RAW",
                "UserBucket": {"S3Bucket": bucket, "S3Key": key},
            },
        )
        return _import(answer)

    @needs("ec2:DescribeImportSnapshotTasks")
    def import_task(self, task: str) -> ImportTask:
        """Return how an import stands; NotFoundError where there is none."""
        answer = self._client.describe_import_snapshot_tasks(ImportTaskIds=[task])
        rows = answer["ImportSnapshotTasks"]
        if not rows:
            raise NotFoundError("there is no such import", place=task)
        return _import(rows[0])

    # Images

    @needs("ec2:RegisterImage", "ec2:CreateTags")
    def register(
        self,
        name: str,
        *,
        snapshot: str,
        architecture: str,
        size_gib: int,
        description: str,
        tags: Mapping[str, str],
    ) -> str:
        """Register an image that boots by UEFI, and return its id.

        It has TPM 2.0, wants IMDSv2, has ENA, and a gp3 root volume that ends with its instance.

        Args:
            name: unique in the region; 3 to 128 characters.
            snapshot: completed; of the root volume.
            architecture: `x86_64` or `arm64`.
            size_gib: of the root volume.
            description: for people.
            tags: the image's.

        Raises:
            ConflictError: the name is taken.
        """
        pairs = [{"Key": key, "Value": value} for key, value in tags.items()]
        volume = {
            "SnapshotId": snapshot,
            "VolumeSize": size_gib,
            "VolumeType": "gp3",
            "DeleteOnTermination": True,
        }
        answer = self._client.register_image(
            Name=name,
            Description=description,
            Architecture=architecture,
            VirtualizationType="hvm",
            BootMode="uefi",
            TpmSupport="v2.0",
            ImdsSupport="v2.0",
            EnaSupport=True,
            RootDeviceName=_ROOT,
            BlockDeviceMappings=[{"DeviceName": _ROOT, "Ebs": volume}],
            TagSpecifications=[{"ResourceType": "image", "Tags": pairs}] if pairs else [],
        )
        return str(answer["ImageId"])

    @needs("ec2:DescribeImages")
    def images(self, *, tag: str = "", name: str = "", image: str = "") -> tuple[Ami, ...]:
        """Return this account's images that have a tag of this key, this name, or this id; disabled ones too."""
        filters = []
        if tag:
            filters.append({"Name": "tag-key", "Values": [tag]})
        if name:
            filters.append({"Name": "name", "Values": [name]})
        if image:
            filters.append({"Name": "image-id", "Values": [image]})
        pages = self._client.get_paginator("describe_images").paginate(
            Owners=["self"], Filters=filters, IncludeDeprecated=True, IncludeDisabled=True
        )
        return tuple(_ami(row) for page in pages for row in page["Images"])

    def image(self, wanted: str) -> Ami:
        """Find an image of this account by id or name; NotFoundError where there is none."""
        # A name may begin as ids do.
        found = self.images(image=wanted) if _ID.fullmatch(wanted) else ()
        found = found or self.images(name=wanted)
        if not found:
            raise NotFoundError("there is no such image", place=wanted, hint="calve image list")
        return found[0]

    @needs("ec2:DeregisterImage")
    def deregister(self, image: str) -> None:
        """Take an image away; its snapshots stay. Instances that run are not touched."""
        self._client.deregister_image(ImageId=image)

    @needs("ec2:ModifyImageAttribute", "ec2:ModifySnapshotAttribute")
    def share(self, image: Ami, accounts: Iterable[str], *, take_back: bool = False) -> None:
        """Let other accounts launch an image and read its snapshots, or no longer."""
        users = [{"UserId": account} for account in accounts]
        verb = "Remove" if take_back else "Add"
        self._client.modify_image_attribute(ImageId=image.id, LaunchPermission={verb: users})
        for snapshot in image.snapshots:
            self._client.modify_snapshot_attribute(
                SnapshotId=snapshot, CreateVolumePermission={verb: users}
            )

    @needs("ec2:DescribeImageAttribute")
    def shared_with(self, image: str) -> tuple[str, ...]:
        """Return the accounts, groups and organisations that may launch an image; `all` is everybody."""
        answer = self._client.describe_image_attribute(ImageId=image, Attribute="launchPermission")
        return tuple(
            str(value) for row in answer.get("LaunchPermissions", []) for value in row.values()
        )

    @needs("ec2:EnableImageDeprecation")
    def deprecate(self, image: str, when: dt.datetime) -> None:
        """Say from when on an image is no longer to be used; whoever knows its id still can."""
        self._client.enable_image_deprecation(ImageId=image, DeprecateAt=when)

    @needs("ec2:CopyImage")
    def copy(self, image: str, *, source_region: str, name: str, token: str) -> str:
        """Copy another region's image into this one, with its tags; return the id, which is pending at first."""
        answer = self._client.copy_image(
            SourceImageId=image,
            SourceRegion=source_region,
            Name=name,
            ClientToken=token,
            CopyImageTags=True,
        )
        return str(answer["ImageId"])

    # Who uses them

    @needs(
        "ec2:DescribeLaunchTemplates", "ec2:DescribeLaunchTemplateVersions", "ec2:DescribeInstances"
    )
    def used(self) -> dict[str, str]:
        """Return images that launch templates name or instances run, each with one user of it."""
        found: dict[str, str] = {}
        templates = self._client.get_paginator("describe_launch_templates").paginate()
        for template in (row for page in templates for row in page["LaunchTemplates"]):
            versions = self._client.get_paginator("describe_launch_template_versions").paginate(
                LaunchTemplateId=template["LaunchTemplateId"]
            )
            for version in (row for page in versions for row in page["LaunchTemplateVersions"]):
                image = version["LaunchTemplateData"].get("ImageId")
                if image:
                    name = f"{template['LaunchTemplateName']} version {version['VersionNumber']}"
                    found.setdefault(image, name)
        for page in self._client.get_paginator("describe_instances").paginate():
            for reservation in page["Reservations"]:
                for instance in reservation["Instances"]:
                    if instance["State"]["Name"] != "terminated":
                        found.setdefault(instance["ImageId"], instance["InstanceId"])
        return found


def _tags(row: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in row.get("Tags", [])}


def _snapshot(row: Mapping[str, Any]) -> SnapshotRow:
    started = row["StartTime"].isoformat(timespec="seconds")
    return SnapshotRow(
        row["SnapshotId"], row["State"], row.get("StateMessage", ""), started, _tags(row)
    )


def _import(row: Mapping[str, Any]) -> ImportTask:
    detail = row.get("SnapshotTaskDetail", {})
    progress = str(detail.get("Progress") or "0")
    return ImportTask(
        row["ImportTaskId"],
        detail.get("Status", "active"),
        detail.get("StatusMessage", ""),
        int(progress) if progress.isdecimal() else 0,
        detail.get("SnapshotId", ""),
    )


def _ami(row: Mapping[str, Any]) -> Ami:
    root = row.get("RootDeviceName")
    volumes = [
        one for one in row.get("BlockDeviceMappings", []) if "SnapshotId" in one.get("Ebs", {})
    ]
    volumes.sort(key=lambda one: one.get("DeviceName") != root)
    return Ami(
        id=row["ImageId"],
        name=row["Name"],
        state=row["State"],
        architecture=row["Architecture"],
        snapshots=tuple(one["Ebs"]["SnapshotId"] for one in volumes),
        created=row.get("CreationDate", ""),
        deprecated=row.get("DeprecationTime", ""),
        tags=_tags(row),
        size_gib=volumes[0]["Ebs"].get("VolumeSize", 0) if volumes else 0,
    )
