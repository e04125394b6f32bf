"""A disk of our own making starts under UEFI firmware, whatever a cloud gives for blocks that were never written."""

from __future__ import annotations

import os
import uuid
from unittest import mock

import pytest

from calve.demo.world import COMMAND_LINE
from calve.disk import arch, assemble, check, ext4, fat, gpt, uki
from calve.disk.disk import BLOCK_BYTES
from calve.region import qemu

SEED = uuid.UUID("5ca1ab1e-0000-4000-8000-000000000001")
ROOT_BYTES = 200 << 20


def make_disk(workshop, folder):
    """Make a disk: the ESP with a unified kernel image, and an empty root file system."""
    kernel = workshop.kernel()
    made = uki.write(
        uki.Uki(
            arch=arch.X86_64,
            stub=uki.find_stub(arch.X86_64),
            kernel=kernel.image,
            initrd=workshop.initrd(hold_s=1),
            command_line=COMMAND_LINE.replace("root=/dev/vda", "root=LABEL=nixos"),
            os_release="ID=calve\nNAME=Calve\n",
            uname=kernel.version,
        ),
        folder / "linux.efi",
    )
    fat.make(folder / "esp", made.path, arch=arch.X86_64, seed=SEED)
    ext4.make(folder / "root", ROOT_BYTES)
    parts = [
        assemble.Part("esp", gpt.Kind.ESP, folder / "esp"),
        assemble.Part("root", gpt.Kind.ROOT, folder / "root", fill=True),
    ]
    return assemble.build(parts, folder / "disk.raw", arch=arch.X86_64, seed=SEED)


def fill(disk, path):
    """Write what an encrypted volume has where its snapshot has nothing; return how many blocks."""
    written = {block.index for block in disk.blocks}
    never = set(range(disk.size_bytes // BLOCK_BYTES)) - written
    with path.open("r+b") as file:
        for index in never:
            file.seek(index * BLOCK_BYTES)
            file.write(os.urandom(BLOCK_BYTES))
    return len(never)


@pytest.fixture(scope="module")
def disk(rig, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uefi")
    disk = make_disk(rig.workshop, folder)
    assert fill(disk, folder / "disk.raw") > 1000
    assert check.check(folder / "disk.raw").arches == (arch.X86_64,)
    return folder / "disk.raw"


def test_it_starts_and_pulls(rig, disk):
    path = rig.release("tiny", 1)
    image = qemu.DiskImage(disk, qemu.ovmf())
    with mock.patch.object(rig, "image", return_value=image), rig.boot(rig.user_data(path)) as boot:
        assert boot.get() == (200, "calve demo release 1\n")
        assert "BdsDxe: starting Boot" in boot.console
        assert boot.event("ready")["paths"] == 5
        # The partition ends where the disk does, and the file system with it.
        assert boot.event("grown")["after_mb"] > 700
