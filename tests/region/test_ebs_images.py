"""Snapshots, images, tags and imports as EC2 has them, with boto3 as the client; every rule with EC2's code."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import time

import boto3
import botocore.config
import pytest
from botocore.exceptions import ClientError
from uploading import NoBalancer, NoMachines

from calve.errors import NotFoundError
from calve.region.blocks import Snapshots
from calve.region.cloud import Cloud
from calve.region.objects import ObjectService
from calve.region.objects_store import Condition, Object
from calve.region.server import Server
from calve.region.signature import Allow, Refusal
from calve.region.snapshot import BLOCK_BYTES, Entry, Start
from calve.region.storage import Storage
from calve.region.templates import TemplateSpec

NONE_SNAPSHOT, NONE_IMAGE = "snap-0123456789abcdef0", "ami-0123456789abcdef0"
OTHER = "210987654321"


class Place:
    """One region's EC2."""

    def __init__(self, name, directory, clock, objects, find):
        self.snapshots = Snapshots(directory / name, region=name, clock=clock)
        self.storage = Storage(name, self.snapshots, objects=objects, neighbour=find)
        self.cloud = Cloud(NoMachines(), NoBalancer(), region=name, storage=self.storage)
        self.clock = clock
        self.name = name
        self.owner = contextlib.ExitStack()
        self.url = ""

    @contextlib.contextmanager
    def open(self):
        with self.storage, self.cloud, Server(self.cloud.handle) as server, self.owner:
            self.url = server.url
            yield self

    @functools.cached_property
    def client(self):
        client = boto3.client(
            "ec2",
            endpoint_url=self.url,
            region_name=self.name,
            aws_access_key_id="AKIDEXAMPLE",
            aws_secret_access_key="secret",
            config=botocore.config.Config(
                retries={"total_max_attempts": 1}, parameter_validation=False
            ),
        )
        self.owner.callback(client.close)
        return client

    def pass_s(self, seconds):
        self.clock.shift += dt.timedelta(seconds=seconds)

    def pending(self, blocks=(0, 1), gib=1, **ask):
        made = self.snapshots.start(Start(gib, **ask))
        for index in blocks:
            data = hashlib.shake_128(b"%d" % index).digest(BLOCK_BYTES)
            digest = hashlib.sha256(data).digest()
            entry = Entry(digest, self.snapshots.blobs.put(digest, data), made.id)
            self.snapshots.write(made.id, index, digest, entry, 40)
        return made.id

    def snapshot(self, blocks=(0, 1), gib=1, **ask):
        made = self.pending(blocks, gib, **ask)
        self.snapshots.complete(made, len(blocks))
        self.pass_s(1)
        return made

    def register(self, snapshot=None, name="web", **changes):
        ebs = {"SnapshotId": snapshot or self.snapshot(), "VolumeType": "gp3"}
        options = {
            "Name": name,
            "Architecture": "x86_64",
            "VirtualizationType": "hvm",
            "RootDeviceName": "/dev/xvda",
            "BootMode": "uefi",
            "EnaSupport": True,
            "BlockDeviceMappings": [
                {"DeviceName": "/dev/xvda", "Ebs": ebs | changes.pop("ebs", {})}
            ],
        }
        return self.client.register_image(**(options | changes))["ImageId"]

    def image(self, image_id, **options):
        (found,) = self.client.describe_images(ImageIds=[image_id], **options)["Images"]
        return found

    def images(self, **options):
        return [one["ImageId"] for one in self.client.describe_images(**options)["Images"]]

    def refusal(self, call, *args, **options):
        with pytest.raises(ClientError) as caught:
            call(*args, **options)
        return caught.value.response["Error"]["Code"]


@pytest.fixture
def objects(service):
    return service


@pytest.fixture
def place(tmp_path, clock, objects):
    # Time stands still but for what a test lets pass.
    frozen = clock.monotonic()
    clock.monotonic = lambda: frozen + clock.shift.total_seconds()
    places = {}
    for name in ("test-region", "far-region"):
        places[name] = Place(
            name,
            tmp_path,
            clock,
            objects if name == "test-region" else None,
            lambda region: places[region].storage if region in places else None,
        )
    with contextlib.ExitStack() as stack:
        for one in places.values():
            stack.enter_context(one.open())
        places["test-region"].far = places["far-region"]
        yield places["test-region"]


# Snapshots


def test_snapshots_are_described(place):
    assert place.client.describe_snapshots()["Snapshots"] == []
    one = place.snapshot(tags=(("role", "web"),), description="first")
    two = place.pending(gib=2)
    (shown,) = place.client.describe_snapshots(SnapshotIds=[one])["Snapshots"]
    assert (shown["State"], shown["Progress"], shown["VolumeSize"]) == ("completed", "100%", 1)
    assert (shown["Description"], shown["Tags"]) == ("first", [{"Key": "role", "Value": "web"}])
    assert (shown["Encrypted"], shown["OwnerId"]) == (False, "123456789012")
    assert shown["FullSnapshotSizeInBytes"] == 2 * BLOCK_BYTES
    (shown,) = place.client.describe_snapshots(SnapshotIds=[two])["Snapshots"]
    assert (shown["State"], shown["Progress"]) == ("pending", "40%")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("tag:role", "web", 1),
        ("tag:role", "w?*", 1),
        ("tag:role", "db", 0),
        ("tag-key", "role", 1),
        ("status", "pending", 1),
        ("status", "completed", 1),
        ("owner-id", "123456789012", 2),
        ("volume-size", "2", 1),
        ("description", "fir*", 1),
    ],
)
def test_snapshots_are_filtered(place, name, value, found):
    place.snapshot(tags=(("role", "web"),), description="first")
    place.pending(gib=2)
    answer = place.client.describe_snapshots(Filters=[{"Name": name, "Values": [value]}])
    assert len(answer["Snapshots"]) == found


def test_snapshots_in_pages_and_by_owner(place):
    made = [place.snapshot(()) for _ in range(7)]
    pages = place.client.get_paginator("describe_snapshots").paginate(
        OwnerIds=["self"], PaginationConfig={"PageSize": 5}
    )
    found = [[one["SnapshotId"] for one in page["Snapshots"]] for page in pages]
    assert [len(one) for one in found] == [5, 2]
    assert found[0] + found[1] == made
    assert place.client.describe_snapshots(OwnerIds=[OTHER])["Snapshots"] == []
    combined = {"SnapshotIds": made[:1], "MaxResults": 5}
    assert place.refusal(place.client.describe_snapshots, **combined) == (
        "InvalidParameterCombination"
    )
    assert place.refusal(place.client.describe_snapshots, MaxResults=4) == "InvalidParameterValue"


def test_snapshots_that_are_not_there(place):
    for call in (
        lambda one: place.client.describe_snapshots(SnapshotIds=[one]),
        lambda one: place.client.delete_snapshot(SnapshotId=one),
        lambda one: place.client.copy_snapshot(SourceRegion="test-region", SourceSnapshotId=one),
        lambda one: place.client.create_tags(Resources=[one], Tags=[{"Key": "a", "Value": ""}]),
    ):
        assert place.refusal(call, NONE_SNAPSHOT) == "InvalidSnapshot.NotFound"
    assert place.refusal(place.client.describe_snapshots, SnapshotIds=["x"]) == (
        "InvalidSnapshotID.Malformed"
    )


def test_a_deleted_snapshot_is_gone_and_frees_its_blocks(place):
    snapshot = place.snapshot()
    assert len(place.snapshots.blobs) == 2
    place.client.delete_snapshot(SnapshotId=snapshot)
    assert place.client.describe_snapshots()["Snapshots"] == []
    assert len(place.snapshots.blobs) == 0
    place.client.delete_snapshot(SnapshotId=place.pending())
    assert len(place.snapshots.blobs) == 0


def test_a_snapshot_is_shared(place):
    snapshot = place.snapshot()
    attribute = {"SnapshotId": snapshot, "Attribute": "createVolumePermission"}

    def shared():
        answer = place.client.describe_snapshot_attribute(**attribute)
        return answer["CreateVolumePermissions"]

    assert shared() == []
    place.client.modify_snapshot_attribute(
        **attribute, OperationType="add", UserIds=[OTHER], GroupNames=["all"]
    )
    assert shared() == [{"UserId": OTHER}, {"Group": "all"}]
    place.client.modify_snapshot_attribute(
        SnapshotId=snapshot, CreateVolumePermission={"Remove": [{"Group": "all"}]}
    )
    assert shared() == [{"UserId": OTHER}]
    assert place.refusal(
        place.client.modify_snapshot_attribute, **attribute, OperationType="add", UserIds=["me"]
    ) == ("InvalidParameterValue")
    assert place.refusal(place.client.modify_snapshot_attribute, **attribute, UserIds=[OTHER]) == (
        "MissingParameter"
    )


@pytest.mark.parametrize("region", ["test-region", "far-region"])
def test_a_snapshot_is_copied_within_a_region_and_to_another(place, region):
    there = place if region == "test-region" else place.far
    source = place.snapshot()
    answer = there.client.copy_snapshot(
        SourceRegion="test-region",
        SourceSnapshotId=source,
        Description="copy",
        TagSpecifications=[{"ResourceType": "snapshot", "Tags": [{"Key": "of", "Value": source}]}],
    )
    copy = answer["SnapshotId"]
    assert answer["Tags"] == [{"Key": "of", "Value": source}]
    assert there.snapshots.find(copy).state == "pending"
    there.pass_s(1)
    place.client.delete_snapshot(SnapshotId=source)
    (shown,) = there.client.describe_snapshots(SnapshotIds=[copy])["Snapshots"]
    assert (shown["State"], shown["Description"], shown["VolumeSize"]) == ("completed", "copy", 1)
    assert sorted(there.snapshots.blocks(copy)) == [0, 1]
    assert len(there.snapshots.blobs) == 2
    there.client.delete_snapshot(SnapshotId=copy)
    assert len(there.snapshots.blobs) == len(place.snapshots.blobs) == 0


def test_what_is_not_copied(place):
    options = {"SourceSnapshotId": place.pending(), "SourceRegion": "test-region"}
    assert place.refusal(place.client.copy_snapshot, **options) == "IncorrectState"
    options = {"SourceSnapshotId": place.snapshot(), "SourceRegion": "mars-north-1"}
    assert place.refusal(place.client.copy_snapshot, **options) == "InvalidParameterValue"


def test_encryption_by_default_and_a_copy_that_encrypts(place):
    plain = place.snapshot()
    assert place.client.get_ebs_encryption_by_default()["EbsEncryptionByDefault"] is False
    assert place.client.enable_ebs_encryption_by_default()["EbsEncryptionByDefault"] is True
    copy = place.client.copy_snapshot(SourceRegion="test-region", SourceSnapshotId=plain)
    (shown,) = place.client.describe_snapshots(SnapshotIds=[copy["SnapshotId"]])["Snapshots"]
    assert shown["Encrypted"]
    assert shown["KmsKeyId"].startswith("arn:aws:kms:test-region:123456789012:key/")
    place.client.disable_ebs_encryption_by_default()
    assert place.client.get_ebs_encryption_by_default()["EbsEncryptionByDefault"] is False


# Tags


def test_tags_are_created_described_and_deleted(place):
    snapshot, image = place.snapshot(), place.register()
    place.client.create_tags(
        Resources=[snapshot, image],
        Tags=[{"Key": "a", "Value": "1"}, {"Key": "b", "Value": "2"}],
    )
    place.client.create_tags(Resources=[image], Tags=[{"Key": "b", "Value": "3"}])
    filters = [{"Name": "resource-type", "Values": ["image"]}]
    rows = place.client.describe_tags(Filters=filters)["Tags"]
    assert rows == [
        {"Key": "a", "ResourceId": image, "ResourceType": "image", "Value": "1"},
        {"Key": "b", "ResourceId": image, "ResourceType": "image", "Value": "3"},
    ]
    place.client.delete_tags(
        Resources=[snapshot, image], Tags=[{"Key": "a"}, {"Key": "b", "Value": "3"}]
    )
    rows = place.client.describe_tags()["Tags"]
    assert [(row["ResourceId"], row["Key"]) for row in rows] == [(snapshot, "b")]
    assert place.images(Filters=[{"Name": "tag-key", "Values": ["*"]}]) == []


@pytest.mark.parametrize(
    ("tags", "code"),
    [
        ([{"Key": "aws:x", "Value": ""}], "InvalidParameterValue"),
        ([{"Key": "k" * 129, "Value": ""}], "InvalidParameterValue"),
        ([{"Key": "k", "Value": "v" * 257}], "InvalidParameterValue"),
        ([{"Key": "k", "Value": ""}] * 2, "InvalidParameterValue"),
        ([{"Key": f"k{n}", "Value": ""} for n in range(51)], "TagLimitExceeded"),
    ],
)
def test_bad_tags(place, tags, code):
    snapshot = place.snapshot()
    assert place.refusal(place.client.create_tags, Resources=[snapshot], Tags=tags) == code
    assert place.client.describe_tags()["Tags"] == []


def test_tags_of_what_is_not_there(place):
    tags = [{"Key": "k", "Value": ""}]
    for resource, code in (
        (NONE_IMAGE, "InvalidAMIID.NotFound"),
        ("vpc-12345678", "InvalidID"),
        ("snap-x", "InvalidID"),
    ):
        assert place.refusal(place.client.create_tags, Resources=[resource], Tags=tags) == code
        assert place.refusal(place.client.delete_tags, Resources=[resource], Tags=tags) == code


# Images


def test_everything_that_was_registered_comes_back(place):
    snapshot = place.snapshot(gib=2)
    image = place.register(
        snapshot,
        Description="d",
        TpmSupport="v2.0",
        ImdsSupport="v2.0",
        SriovNetSupport="simple",
        UefiData="AAAA",
        ebs={"VolumeSize": 8, "DeleteOnTermination": False},
        TagSpecifications=[{"ResourceType": "image", "Tags": [{"Key": "k", "Value": "v"}]}],
    )
    shown = place.image(image)
    assert shown["BlockDeviceMappings"] == [
        {
            "DeviceName": "/dev/xvda",
            "Ebs": {
                "SnapshotId": snapshot,
                "VolumeSize": 8,
                "VolumeType": "gp3",
                "DeleteOnTermination": False,
                "Encrypted": False,
            },
        }
    ]
    expected = {
        "Name": "web",
        "State": "available",
        "Description": "d",
        "Architecture": "x86_64",
        "VirtualizationType": "hvm",
        "BootMode": "uefi",
        "TpmSupport": "v2.0",
        "ImdsSupport": "v2.0",
        "SriovNetSupport": "simple",
        "EnaSupport": True,
        "RootDeviceName": "/dev/xvda",
        "RootDeviceType": "ebs",
        "OwnerId": "123456789012",
        "Public": False,
        "Tags": [{"Key": "k", "Value": "v"}],
    }
    assert {name: shown.get(name) for name in expected} == expected
    assert not {"UefiData", "DeprecationTime", "LastLaunchedTime", "SourceImageId"} & shown.keys()

    def attribute(name):
        return place.client.describe_image_attribute(ImageId=image, Attribute=name)

    assert attribute("uefiData")["UefiData"] == {"Value": "AAAA"}
    assert attribute("bootMode")["BootMode"] == {"Value": "uefi"}
    assert attribute("tpmSupport")["TpmSupport"] == {"Value": "v2.0"}
    assert attribute("blockDeviceMapping")["BlockDeviceMappings"] == shown["BlockDeviceMappings"]
    assert attribute("launchPermission")["LaunchPermissions"] == []
    assert attribute("lastLaunchedTime")["LastLaunchedTime"] == {}


def test_what_is_left_out_has_ec2_s_defaults(place):
    snapshot = place.snapshot(gib=2)
    mapping = {"DeviceName": "/dev/sda1", "Ebs": {"SnapshotId": snapshot}}
    answer = place.client.register_image(
        Name="bare", RootDeviceName="/dev/sda1", BlockDeviceMappings=[mapping]
    )
    shown = place.image(answer["ImageId"])
    assert (shown["Architecture"], shown["VirtualizationType"]) == ("i386", "paravirtual")
    assert not {"BootMode", "EnaSupport", "TpmSupport", "ImdsSupport"} & shown.keys()
    ebs = shown["BlockDeviceMappings"][0]["Ebs"]
    assert (ebs["VolumeSize"], ebs["VolumeType"], ebs["DeleteOnTermination"]) == (
        2,
        "standard",
        True,
    )


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"TpmSupport": "v2.0", "BootMode": "uefi-preferred"}, "InvalidParameterCombination"),
        ({"TpmSupport": "v2.0", "BootMode": "legacy-bios"}, "InvalidParameterCombination"),
        ({"TpmSupport": "v1.2"}, "InvalidParameterValue"),
        ({"ImdsSupport": "v1.0"}, "InvalidParameterValue"),
        ({"BootMode": "bios"}, "InvalidParameterValue"),
        ({"UefiData": "AAAA", "BootMode": "legacy-bios"}, "InvalidParameterCombination"),
        ({"UefiData": "!"}, "InvalidParameterValue"),
        ({"Architecture": "arm64", "BootMode": "legacy-bios"}, "InvalidParameterCombination"),
        ({"Architecture": "sparc"}, "InvalidParameterValue"),
        ({"SriovNetSupport": "complex"}, "InvalidParameterValue"),
        ({"Name": "x"}, "InvalidAMIName.Malformed"),
        ({"Name": "a:b:c"}, "InvalidAMIName.Malformed"),
        ({"Name": "n" * 129}, "InvalidAMIName.Malformed"),
        ({"Description": "d" * 256}, "InvalidParameterValue"),
        ({"RootDeviceName": "/dev/xvdb"}, "InvalidBlockDeviceMapping"),
        ({"BlockDeviceMappings": []}, "InvalidBlockDeviceMapping"),
        ({"ebs": {"VolumeSize": 1}}, "InvalidBlockDeviceMapping"),
        ({"ebs": {"VolumeType": "gp9"}}, "InvalidParameterValue"),
        ({"ebs": {"Encrypted": True}}, "InvalidBlockDeviceMapping"),
        ({"ebs": {"SnapshotId": NONE_SNAPSHOT}}, "InvalidSnapshot.NotFound"),
        ({"KernelId": "aki-12345678"}, "UnknownParameter"),
        (
            {"TagSpecifications": [{"ResourceType": "snapshot", "Tags": []}]},
            "InvalidParameterValue",
        ),
    ],
)
def test_bad_registrations(place, changes, code):
    snapshot = place.snapshot(gib=2)
    assert place.refusal(place.register, snapshot, **changes) == code
    assert place.images() == []


def test_a_snapshot_must_be_completed_to_become_an_image(place):
    assert place.refusal(place.register, place.pending()) == "IncorrectState"


def test_a_name_is_unique_in_a_region_until_it_is_free(place):
    one = place.register(name="web")
    assert place.refusal(place.register, name="web") == "InvalidAMIName.Duplicate"
    place.far.register(name="web")
    place.client.deregister_image(ImageId=one)
    assert place.register(name="web") != one


def test_images_are_filtered(place):
    one = place.register(name="web-1")
    two = place.register(name="web-2", Architecture="arm64")
    place.client.create_tags(Resources=[two], Tags=[{"Key": "role", "Value": "web"}])
    (device,) = place.image(one)["BlockDeviceMappings"]

    def found(name, *values):
        return place.images(Filters=[{"Name": name, "Values": list(values)}])

    assert found("name", "web-*") == [one, two]
    assert found("name", "web-1", "web-2") == [one, two]
    assert found("name", "web") == []
    assert found("tag:role", "web") == [two]
    assert found("state", "available") == [one, two]
    assert found("architecture", "arm64") == [two]
    assert found("block-device-mapping.snapshot-id", device["Ebs"]["SnapshotId"]) == [one]
    assert place.images(Owners=["self"]) == [one, two]
    assert place.images(Owners=["amazon"]) == []
    assert place.refusal(found, "colour", "red") == "InvalidParameterValue"
    assert place.refusal(place.images, ImageIds=[NONE_IMAGE]) == "InvalidAMIID.NotFound"
    assert place.refusal(place.images, ImageIds=["ami-x"]) == "InvalidAMIID.Malformed"
    pages = place.client.get_paginator("describe_images").paginate(PaginationConfig={"PageSize": 1})
    assert [len(page["Images"]) for page in pages] == [1, 1]


def test_a_snapshot_that_an_image_uses_is_not_deleted(place):
    snapshot = place.snapshot()
    image = place.register(snapshot)
    delete = {"SnapshotId": snapshot}
    assert place.refusal(place.client.delete_snapshot, **delete) == "InvalidSnapshot.InUse"
    answer = place.client.deregister_image(ImageId=image)
    assert (answer["Return"], answer.get("DeleteSnapshotResults")) == (True, [])
    place.client.delete_snapshot(**delete)


def test_deregistering_with_its_snapshots_keeps_what_another_image_uses(place):
    shared, own = place.snapshot(), place.snapshot()
    mapping = {"DeviceName": "/dev/xvdb", "Ebs": {"SnapshotId": own}}
    root = {"DeviceName": "/dev/xvda", "Ebs": {"SnapshotId": shared}}
    both = place.register(shared, name="both", BlockDeviceMappings=[root, mapping])
    one = place.register(shared, name="one")
    answer = place.client.deregister_image(ImageId=both, DeleteAssociatedSnapshots=True)
    assert answer["DeleteSnapshotResults"] == [
        {"SnapshotId": shared, "ReturnCode": "skipped"},
        {"SnapshotId": own, "ReturnCode": "success"},
    ]
    left = [row["SnapshotId"] for row in place.client.describe_snapshots()["Snapshots"]]
    assert left == [shared]
    place.client.deregister_image(ImageId=one, DeleteAssociatedSnapshots=True)
    assert place.client.describe_snapshots()["Snapshots"] == []
    assert place.refusal(place.client.deregister_image, ImageId=one) == "InvalidAMIID.NotFound"


def test_an_image_is_shared(place):
    image = place.register()

    def shared():
        answer = place.client.describe_image_attribute(ImageId=image, Attribute="launchPermission")
        return answer["LaunchPermissions"]

    place.client.modify_image_attribute(
        ImageId=image, LaunchPermission={"Add": [{"UserId": OTHER}, {"Group": "all"}]}
    )
    assert shared() == [{"UserId": OTHER}, {"Group": "all"}]
    assert place.image(image)["Public"] is True
    place.client.modify_image_attribute(
        ImageId=image, Attribute="launchPermission", OperationType="remove", UserGroups=["all"]
    )
    assert shared() == [{"UserId": OTHER}]
    place.client.modify_image_attribute(ImageId=image, Description={"Value": "new"})
    place.client.modify_image_attribute(ImageId=image, ImdsSupport={"Value": "v2.0"})
    shown = place.image(image)
    assert (shown["Description"], shown["ImdsSupport"]) == ("new", "v2.0")
    assert place.refusal(
        place.client.modify_image_attribute, ImageId=image, ImdsSupport={"Value": "v1.0"}
    ) == ("InvalidParameterValue")


def test_an_image_is_deprecated_and_no_more(place):
    image = place.register()
    place.client.enable_image_deprecation(ImageId=image, DeprecateAt="2044-01-01T00:00:29Z")
    assert place.image(image)["DeprecationTime"] == "2044-01-01T00:00:00.000Z"
    assert place.images(IncludeDeprecated=False) == [image]
    place.client.disable_image_deprecation(ImageId=image)
    assert "DeprecationTime" not in place.image(image)
    past = {"ImageId": image, "DeprecateAt": "2020-01-01T00:00:00Z"}
    assert place.refusal(place.client.enable_image_deprecation, **past) == "InvalidParameterValue"


def test_a_disabled_image_is_hidden_unshared_and_not_launched(place):
    image = place.register()
    place.client.modify_image_attribute(ImageId=image, LaunchPermission={"Add": [{"Group": "all"}]})
    place.client.disable_image(ImageId=image)
    assert place.images() == []
    shown = place.image(image, IncludeDisabled=True)
    assert (shown["State"], shown["Public"]) == ("disabled", False)
    with pytest.raises(Refusal, match=r"InvalidAMIID.Unavailable.*disabled"):
        place.storage.images.launch(image, "t3.nano", 0.0)
    place.client.enable_image(ImageId=image)
    assert place.image(image)["State"] == "available"


@pytest.mark.parametrize("region", ["test-region", "far-region"])
def test_an_image_is_copied(place, region):
    there = place if region == "test-region" else place.far
    source = place.register(TpmSupport="v2.0", Description="d")
    place.client.create_tags(Resources=[source], Tags=[{"Key": "k", "Value": "v"}])
    place.client.modify_image_attribute(
        ImageId=source, LaunchPermission={"Add": [{"Group": "all"}]}
    )
    ask = {
        "Name": "copy",
        "SourceImageId": source,
        "SourceRegion": "test-region",
        "ClientToken": "t",
        "CopyImageTags": True,
        "TagSpecifications": [{"ResourceType": "snapshot", "Tags": [{"Key": "s", "Value": "1"}]}],
    }
    copy = there.client.copy_image(**ask)["ImageId"]
    assert there.client.copy_image(**ask)["ImageId"] == copy
    other = ask | {"Name": "other"}
    assert place.refusal(there.client.copy_image, **other) == "IdempotentParameterMismatch"
    assert there.image(copy)["State"] == "pending"
    there.pass_s(1)
    shown = there.image(copy)
    assert (shown["State"], shown["TpmSupport"], shown["Description"]) == ("available", "v2.0", "d")
    assert (shown["SourceImageId"], shown["SourceImageRegion"]) == (source, "test-region")
    assert (shown["Public"], shown["Tags"]) == (False, [{"Key": "k", "Value": "v"}])
    snapshot = shown["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
    (row,) = there.client.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"]
    assert row["Tags"] == [{"Key": "s", "Value": "1"}]
    assert sorted(there.snapshots.blocks(snapshot)) == [0, 1]


def test_what_is_no_source_of_a_copy(place):
    source = place.register()
    ask = {"Name": "copy", "SourceImageId": source, "SourceRegion": "test-region"}
    copy = place.client.copy_image
    assert place.refusal(copy, **ask | {"SourceRegion": "mars"}) == "InvalidParameterValue"
    assert place.refusal(copy, **ask | {"SourceImageId": NONE_IMAGE}) == "InvalidAMIID.NotFound"
    assert place.refusal(copy, **ask | {"Name": "web"}) == "InvalidAMIName.Duplicate"
    place.client.disable_image(ImageId=source)
    assert place.refusal(copy, **ask) == "InvalidAMIID.Unavailable"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"EnaSupport": False}, "ENA"),
        ({"VirtualizationType": "paravirtual"}, "paravirtual"),
        ({"Architecture": "arm64"}, "architecture"),
    ],
)
def test_what_a_nitro_instance_cannot_run_is_not_launched(place, changes, message):
    image = place.register(**changes)
    with pytest.raises(Refusal, match=message):
        place.storage.images.launch(image, "t3.nano", 0.0)
    assert "LastLaunchedTime" not in place.image(image)


def test_a_launch_out_of_a_template_is_noted(place):
    image = place.register()
    template = place.client.create_launch_template(
        LaunchTemplateName="web", LaunchTemplateData={"ImageId": image, "InstanceType": "t3.nano"}
    )["LaunchTemplate"]["LaunchTemplateId"]
    spec = TemplateSpec(template, "web", "1")
    launch = place.cloud.ec2.launch("i-0123456789abcdef0", spec, {}, 86400.0)
    assert (launch.image_id, launch.instance_type) == (image, "t3.nano")
    assert place.image(image)["LastLaunchedTime"] == "1970-01-02T00:00:00.000Z"
    place.client.deregister_image(ImageId=image)
    with pytest.raises(Refusal, match=r"InvalidAMIID.NotFound"):
        place.cloud.ec2.launch("i-0123456789abcdef1", spec, {}, 86400.0)


def test_a_region_without_snapshots_registers_nothing(tmp_path):
    with (
        Cloud(NoMachines(), NoBalancer(), region="test-region") as cloud,
        Server(cloud.handle) as server,
    ):
        cloud.add_image(NONE_IMAGE, "base")
        client = boto3.client(
            "ec2",
            endpoint_url=server.url,
            region_name="test-region",
            aws_access_key_id="AKIDEXAMPLE",
            aws_secret_access_key="secret",
        )
        assert client.describe_images()["Images"][0]["Name"] == "base"
        with pytest.raises(ClientError, match="InvalidAction"):
            client.describe_snapshots()
        client.close()


# Volumes


def test_a_volume_is_the_snapshot_s_blocks_and_zeros_or_noise(place, tmp_path):
    image = place.register(place.snapshot(blocks=(1, 3)), ebs={"VolumeSize": 2})
    assert place.storage.volume(image, tmp_path / "one") == "uefi"
    assert (tmp_path / "one").stat().st_size == 2 << 30
    with (tmp_path / "one").open("rb") as disk:
        blocks = [disk.read(BLOCK_BYTES) for _ in range(4)]
    written = {index: hashlib.shake_128(b"%d" % index).digest(BLOCK_BYTES) for index in (1, 3)}
    assert blocks == [written.get(index, bytes(BLOCK_BYTES)) for index in range(4)]
    assert (tmp_path / "one").stat().st_blocks * 512 < 4 * BLOCK_BYTES
    with pytest.raises(NotFoundError, match="does not exist"):
        place.storage.volume(NONE_IMAGE, tmp_path / "two")
    place.cloud.add_image(NONE_IMAGE, "base")
    with pytest.raises(NotFoundError, match="no snapshot"):
        place.storage.volume(NONE_IMAGE, tmp_path / "two")


# Imports


def put_object(objects, key, data):
    bucket = objects.bucket("nix")
    draft = bucket.draft()
    draft.file.write(data)
    entry = Object(key, len(data), "e", dt.datetime.now(dt.UTC), draft.path.name)
    with bucket.flight(key, Condition()) as flight:
        bucket.publish(flight, draft, entry)


def start_import(place, key="disk", form="RAW", **options):
    container = {"Format": form, "UserBucket": {"S3Bucket": "nix", "S3Key": key}}
    return place.client.import_snapshot(DiskContainer=container, **options)


def ended(place, task_id, seconds=20):
    deadline = time.monotonic() + seconds
    while True:
        answer = place.client.describe_import_snapshot_tasks(ImportTaskIds=[task_id])
        (task,) = answer["ImportSnapshotTasks"]
        if task["SnapshotTaskDetail"]["Status"] != "active":
            return task["SnapshotTaskDetail"]
        assert time.monotonic() < deadline
        assert task["SnapshotTaskDetail"]["StatusMessage"] in {"pending", "converting"}
        assert "SnapshotId" not in task["SnapshotTaskDetail"]
        place.pass_s(1)
        time.sleep(0.02)


@pytest.fixture
def role(principals):
    principals.set_policy("vmimport", [Allow("s3:GetObject", "arn:aws:s3:::nix/*")])


@pytest.mark.usefixtures("role")
def test_a_raw_disk_is_imported(place, objects):
    data = hashlib.shake_128(b"disk").digest(BLOCK_BYTES + 1000)
    put_object(objects, "disk", data)
    tags = [{"ResourceType": "import-snapshot-task", "Tags": [{"Key": "k", "Value": "v"}]}]
    started = start_import(place, ClientToken="t", Description="d", TagSpecifications=tags)
    assert started["ImportTaskId"].startswith("import-snap-")
    assert (started["Description"], started["Tags"]) == ("d", [{"Key": "k", "Value": "v"}])
    again = start_import(place, ClientToken="t", Description="d", TagSpecifications=tags)
    assert again["ImportTaskId"] == started["ImportTaskId"]
    assert place.refusal(start_import, place, ClientToken="t") == "IdempotentParameterMismatch"
    detail = ended(place, started["ImportTaskId"])
    assert (detail["Status"], detail["DiskImageSize"]) == ("completed", len(data))
    blocks = place.snapshots.blocks(detail["SnapshotId"])
    padded = data.ljust(2 * BLOCK_BYTES, b"\0")
    assert sorted(blocks) == [0, 1]
    assert blocks[1].digest == hashlib.sha256(padded[BLOCK_BYTES:]).digest()
    place.register(detail["SnapshotId"])


@pytest.mark.usefixtures("role")
@pytest.mark.parametrize(
    ("form", "data", "message"),
    [
        ("VHD", b"garbage" * 200, "ClientError: Disk validation failed"),
        ("VMDK", b"garbage" * 200, "ClientError: Disk validation failed"),
        ("RAW", b"conectix" * 200, "ClientError: Disk validation failed"),
        ("RAW", b"", "ClientError: Disk validation failed"),
        ("VHD", b"conectix" * 128, "ServerError: the conversion of VHD is not simulated"),
    ],
)
def test_a_disk_that_is_none_ends_the_task_with_the_reason(place, objects, form, data, message):
    put_object(objects, "disk", data)
    detail = ended(place, start_import(place, form=form)["ImportTaskId"])
    assert detail["Status"] == "deleted"
    assert detail["StatusMessage"].startswith(message)
    assert place.snapshots.all() == []


def test_imports_that_are_refused_at_once(place, objects, principals):
    put_object(objects, "disk", b"data")
    assert place.refusal(start_import, place) == "InvalidParameter"  # no role
    principals.set_policy("vmimport", [Allow("s3:GetObject", "arn:aws:s3:::nix/*")])
    assert place.refusal(start_import, place, key="none") == "InvalidParameter"
    assert place.refusal(start_import, place, form="QCOW2") == "InvalidParameter"
    ask = {"ImportTaskIds": ["import-snap-1"]}
    assert place.refusal(place.client.describe_import_snapshot_tasks, **ask) == "InvalidParameter"


@pytest.mark.usefixtures("role")
def test_an_import_whose_snapshot_is_deleted_says_so(place, objects, monkeypatch):
    put_object(objects, "disk", bytes(3 * BLOCK_BYTES))
    write = place.snapshots.write

    def deleted(snapshot_id, *args):
        place.snapshots.delete(snapshot_id)
        write(snapshot_id, *args)

    monkeypatch.setattr(place.snapshots, "write", deleted)
    detail = ended(place, start_import(place)["ImportTaskId"])
    assert (detail["Status"], len(place.snapshots.blobs)) == ("deleted", 0)


@pytest.mark.usefixtures("role")
def test_an_import_under_way_ends_with_its_region(tmp_path, principals, clock):
    objects = ObjectService(tmp_path / "s3", principals, region="test-region")
    objects.add_bucket("nix")
    put_object(objects, "disk", bytes(64 * BLOCK_BYTES))
    place = Place("test-region", tmp_path, clock, objects, lambda _region: None)
    written, write = [], place.snapshots.write

    def slow(*args):
        written.append(args)
        time.sleep(0.05)
        write(*args)

    place.snapshots.write = slow
    with place.open():
        start_import(place)
        while not written:
            time.sleep(0.01)
    assert len(written) < 64
    (left,) = place.snapshots.all()
    assert left.state == "pending"
