"""Images that were built, written, read back and exported as an encrypted volume gives them: they boot and serve.

The base image pulls its release; the release image is the second of its line, written onto the first one's snapshot,
and has its closure inside.
"""

from __future__ import annotations

import dataclasses
import subprocess
import time
from unittest import mock

import pytest

from calve.aws.ebs import EbsDirect
from calve.aws.images import Images
from calve.demo.world import REGION
from calve.disk.arch import X86_64
from calve.image.base import Base
from calve.image.parent import FileBlocks
from calve.image.publish import Publisher
from calve.image.release import Release
from calve.image.source import StoreSource
from calve.image.start import start_of
from calve.region import qemu
from calve.tasks import Cancel


@pytest.fixture(scope="module")
def publisher(rig):
    world = rig.world
    ebs = EbsDirect(rig.client, REGION, world.operator_credentials, endpoint=world.api.url)
    return Publisher(REGION, ebs, Images(world.session))


def publish(publisher, built):
    return publisher.publish(built, deep=True)


def volume(rig, snapshot, place):
    """Return the volume of a snapshot; what nobody wrote is random."""
    rig.world.storage.snapshots.export(snapshot, place, omitted="random", key=b"encrypted")
    return qemu.DiskImage(place, qemu.ovmf())


@pytest.fixture(scope="module")
def base(rig, publisher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    path = rig.release("webserver", 1)
    with rig.workshop.store() as store:
        source = StoreSource(store)
        start = start_of(source, path, folder, initrd=rig.workshop.initrd(hold_s=1))
        built = Base("web-base", X86_64, start, source).build(folder / "out", cancel=Cancel())
    return volume(rig, publish(publisher, built).snapshot.id, folder / "volume.raw")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(False, id="plain", marks=pytest.mark.full),
        pytest.param(True, id="verity"),
    ],
)
def release(request, rig, publisher, tmp_path_factory):
    """Publish two releases, the second onto the first; return the second's volume and how many blocks it sent."""
    folder = tmp_path_factory.mktemp("release")
    parent, sent = None, []
    for number in (1, 2):
        path = rig.release("webserver", number)
        with rig.workshop.store() as store:
            source = StoreSource(store)
            start = start_of(source, path, folder)
            blocks = None if parent is None else FileBlocks(parent.raw, parent.disk)
            made = Release("web", X86_64, start, source, path, parent, blocks, verity=request.param)
            parent = made.build(folder / str(number), cancel=Cancel())
        published = publish(publisher, parent)
        sent.append(published.snapshot.blocks)
    assert parent.has_verity == request.param
    return volume(rig, published.snapshot.id, folder / "volume.raw"), sent, parent


@pytest.mark.full
def test_a_base_image_pulls_and_serves(rig, base):
    path = rig.release("webserver", 1)
    with mock.patch.object(rig, "image", return_value=base), rig.boot(rig.user_data(path)) as boot:
        assert boot.get() == (200, "calve demo release 1\n")
        assert "BdsDxe: starting Boot" in boot.console
        # Its kernel and initrd are the image's.
        assert boot.event("ready")["fetched_bytes"] < 60_000_000


def test_the_second_release_of_a_line_is_a_few_blocks_and_serves(rig, release):
    image, sent, _ = release
    assert sent[0] > 200
    assert sent[1] <= 10
    path = rig.release("webserver", 2)
    with mock.patch.object(rig, "image", return_value=image), rig.boot(rig.user_data(path)) as boot:
        assert boot.get() == (200, "calve demo release 2\n")


def test_under_dm_verity_a_bit_that_flipped_ends_the_machine(rig, release, tmp_path):
    image, _, built = release
    if not built.has_verity:
        pytest.skip("without dm-verity nobody would know")
    bad = tmp_path / "bad.raw"
    subprocess.run(["cp", "--sparse=always", "--", image.disk, bad], check=True)
    start = next(one.start_bytes for one in built.disk.partitions if one.name == "root")
    with bad.open("r+b") as file:
        file.seek(start + 2048)  # in the superblock's block: the first that is read
        file.write(b"\1")
    bad = dataclasses.replace(image, disk=bad)
    path = rig.release("webserver", 2)
    with mock.patch.object(rig, "image", return_value=bad), rig.boot(rig.user_data(path)) as boot:
        end = time.monotonic() + 100
        while "dm-verity device corrupted" not in boot.console and time.monotonic() < end:
            time.sleep(0.2)
        assert "dm-verity device corrupted" in boot.console, boot.console[-3000:]
