"""`aws.images` over HTTP against the region's EC2."""

from __future__ import annotations

import datetime as dt

import pytest

from calve.aws.images import Ami, Images
from calve.aws.session import actions_of
from calve.errors import ConflictError, NotFoundError
from calve.image import ami

SEEDS = {0: "a", 2047: "b"}
OTHER = "210987654321"
NONE = "ami-0123456789abcdef0"


@pytest.fixture
def made(place):
    """An image of a disk that was uploaded; return its name, id and snapshot."""
    disk = place.disk(SEEDS)
    upload = place.upload(disk)
    tags = ami.tags("web", disk, upload.plan)
    snapshot = place.run(disk, tags=tags).id
    name = ami.image_name("web", disk)
    image = place.ec2.register(
        name, snapshot=snapshot, architecture="x86_64", size_gib=1, description="d", tags=tags
    )
    return name, image, snapshot


def test_an_image_is_registered_and_found(place, made):
    name, image, snapshot = made
    (found,) = place.ec2.images()
    assert found == Ami(
        image, name, "available", "x86_64", (snapshot,), found.created, "", found.tags, 1
    )
    assert found.tags[ami.LINE] == "web"
    assert dt.datetime.fromisoformat(found.created).tzinfo is not None
    assert place.ec2.images(tag=ami.LINE) == place.ec2.images(name=name) == (found,)
    assert place.ec2.images(tag="other") == place.ec2.images(name="other") == ()
    assert place.ec2.image(image) == place.ec2.image(name) == found
    (row,) = place.ec2._client.describe_images(ImageIds=[image])["Images"]
    assert (row["BootMode"], row["TpmSupport"], row["ImdsSupport"]) == ("uefi", "v2.0", "v2.0")
    assert (row["EnaSupport"], row["RootDeviceName"]) == (True, "/dev/xvda")
    (volume,) = row["BlockDeviceMappings"]
    assert volume["Ebs"]["VolumeType"] == "gp3"
    assert (volume["Ebs"]["DeleteOnTermination"], volume["Ebs"]["VolumeSize"]) == (True, 1)


def test_a_name_is_taken_once(place, made):
    name, _, snapshot = made
    with pytest.raises(ConflictError, match=r"InvalidAMIName\.Duplicate"):
        place.ec2.register(
            name, snapshot=snapshot, architecture="x86_64", size_gib=1, description="", tags={}
        )


def test_a_snapshot_in_use_is_not_deleted(place, made):
    _, image, snapshot = made
    with pytest.raises(ConflictError, match=r"InvalidSnapshot\.InUse"):
        place.ec2.delete_snapshot(snapshot)
    place.ec2.deregister(image)
    assert place.ec2.images() == ()
    place.ec2.delete_snapshot(snapshot)
    assert place.ids() == []
    assert place.ec2.snapshot_state(snapshot) is None


def test_snapshots_of_ours_are_found_by_a_tag(place, made):
    _, _, snapshot = made
    (row,) = place.ec2.snapshots(ami.LINE)
    assert (row.id, row.state, row.message) == (snapshot, "completed", "")
    assert (row.tags[ami.LINE], row.started[-6:]) == ("web", "+00:00")
    assert place.ec2.snapshots("other") == ()
    assert place.ec2.snapshot_state(snapshot) == ("completed", "")


def test_what_a_snapshot_in_error_says(place):
    started = place.ebs.start(1, token="t")
    place.snapshots._complete_s = 0.0
    place.snapshots.complete(started.id, 3)
    state = ("error", "0 blocks were written, 3 are claimed")
    assert place.ec2.snapshot_state(started.id) == state


@pytest.mark.parametrize(
    "ask",
    [
        lambda ec2: ec2.image(NONE),
        lambda ec2: ec2.deregister(NONE),
        lambda ec2: ec2.delete_snapshot("snap-0123456789abcdef0"),
        lambda ec2: ec2.deprecate(NONE, dt.datetime.now(dt.UTC) + dt.timedelta(days=9)),
        lambda ec2: ec2.copy(NONE, source_region="test-region", name="copy", token="t"),
    ],
)
def test_what_is_not_there(place, ask):
    with pytest.raises(NotFoundError):
        ask(place.ec2)


def test_an_image_is_deprecated(place, made):
    _, image, _ = made
    place.ec2.deprecate(image, dt.datetime(2100, 1, 2, 3, 4, tzinfo=dt.UTC))
    assert place.ec2.image(image).deprecated.startswith("2100-01-02T03:04:00")


def test_an_image_is_shared_with_its_snapshots_and_taken_back(place, made):
    _, image, snapshot = made
    client = place.ec2._client

    def shared():
        launch = client.describe_image_attribute(ImageId=image, Attribute="launchPermission")
        create = client.describe_snapshot_attribute(
            SnapshotId=snapshot, Attribute="createVolumePermission"
        )
        return [
            [one["UserId"] for one in rows]
            for rows in (launch["LaunchPermissions"], create["CreateVolumePermissions"])
        ]

    found = place.ec2.image(image)
    place.ec2.share(found, [OTHER])
    assert shared() == [[OTHER], [OTHER]]
    place.ec2.share(found, [OTHER], take_back=True)
    assert shared() == [[], []]


def test_an_image_is_copied_once_for_a_token(place, made):
    name, image, _ = made

    def copy():
        return place.ec2.copy(image, source_region="test-region", name=f"{name}-copy", token="t")

    copied = copy()
    assert copied == copy()
    assert place.ec2.image(copied).tags[ami.LINE] == "web"
    assert place.ec2.image(copied).id != image


def test_what_launch_templates_name_is_used(place, made):
    _, image, _ = made
    assert place.ec2.used() == {}
    place.ec2._client.create_launch_template(
        LaunchTemplateName="web", LaunchTemplateData={"ImageId": image}
    )
    place.ec2._client.create_launch_template_version(
        LaunchTemplateName="web", SourceVersion="1", LaunchTemplateData={"ImageId": NONE}
    )
    assert place.ec2.used() == {image: "web version 1", NONE: "web version 2"}


def test_every_method_says_which_permission_it_needs():
    assert actions_of(Images) >= {
        "ec2:CreateTags",
        "ec2:DeleteSnapshot",
        "ec2:DeregisterImage",
        "ec2:DescribeImages",
        "ec2:DescribeSnapshots",
        "ec2:EnableImageDeprecation",
        "ec2:RegisterImage",
    }
