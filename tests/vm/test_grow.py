"""Root disks that are larger than what is on them: the first boot takes the space, with the machine's own kernel."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from calve.boot import gpt
from calve.boot.grow import FileSystem
from calve.disk import ext4
from calve.process import which

_spec = importlib.util.spec_from_file_location("powercut", Path(__file__).with_name("powercut.py"))
powercut = importlib.util.module_from_spec(_spec)
sys.modules["powercut"] = powercut
_spec.loader.exec_module(powercut)

MIB = 1 << 20
SMALL_BYTES = 24 * MIB  # the tiny system does not fit into it
ROOT_START_BYTES = 9 * MIB
DISK_BYTES = ROOT_START_BYTES + SMALL_BYTES + MIB
ADDED_BYTES = 512 * MIB
LAYOUT = "label: gpt\nstart=1MiB, size=8MiB, type=uefi\nstart=9MiB, type=linux\n"


@dataclasses.dataclass
class Recording:
    """A boot: what the machine said, the disk it began with and the one it left, and the log of its writes."""

    answer: tuple[int, str]
    events: list
    base: Path
    disk: Path
    log: Path

    def of(self, kind):
        return [event.fields for event in self.events if event.kind == kind]


def record(rig, release, disk, *, log_writes=False, **image):
    made = dataclasses.replace(rig.image(disk=disk, **image), log_writes=log_writes)
    with (
        mock.patch.object(rig, "image", return_value=made),
        rig.boot(rig.user_data(rig.release("tiny", release))) as boot,
    ):
        answer = boot.get()
        folder = rig.world.machines._directory / boot.name
    return Recording(answer, boot.events, disk, folder / "disk.raw", folder / "writes.log")


def check_ext4(disk):
    """Replay the journal, as a kernel would, and look at everything."""
    with powercut.Disk(disk) as copy:
        assert copy.replay() is None


def entries(fd):
    return gpt.Table.read(lambda offset, size: os.pread(fd, size, offset), 512).entries


def root_end(disk):
    with disk.open("rb") as file:
        return entries(file.fileno())[-1].last_lba


# The whole disk


@pytest.fixture(scope="module")
def whole(rig, tmp_path_factory):
    disk = tmp_path_factory.mktemp("whole") / "disk.raw"
    ext4.make(disk, 256 * MIB)
    os.truncate(disk, 8 << 30)
    return record(rig, 1, disk, log_writes=True)


def test_a_file_system_fills_a_disk_of_32_times_its_size(whole):
    assert whole.answer == (200, "calve demo release 1\n")
    assert whole.of("grown") == [{"before_mb": 268.4, "after_mb": 8589.9}]


def test_what_has_grown_is_sound(whole):
    check_ext4(whole.disk)


def blocks(fd):
    return FileSystem.parse(os.pread(fd, 1024, 1024)).size_bytes


def test_wherever_the_power_is_cut_the_file_system_is_sound(whole):
    log = powercut.WriteLog(whole.log)
    rng = random.Random(20)
    sizes = set()
    for _, disk in powercut.cut_disks(whole.base, log, log.epochs, choose(log, rng)):
        assert disk.replay() is None
        sizes.add(blocks(disk.fd))
    assert {256 * MIB, 8 << 30} <= sizes


def choose(log, rng):
    """Choose cuts around the epoch from which on the new size stands in the superblock."""
    found = [
        number
        for number, epoch in enumerate(log.epochs)
        for one in epoch
        if one.offset <= 1024 < one.offset + one.size
        and FileSystem.parse(log.bytes[one.data + 1024 - one.offset :][:1024]).size_bytes == 8 << 30
    ]
    near = range(max(0, found[0] - 3), found[0] + 2)
    return [powercut.Cut(number, rng.randrange(1 << 32)) for number in near for _ in range(6)]


# The last partition of a GPT disk


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt")
    root, disk = folder / "root.raw", folder / "disk.raw"
    ext4.make(root, SMALL_BYTES)
    with disk.open("xb") as file:
        file.truncate(DISK_BYTES)
    sfdisk = which("sfdisk", package="fdisk")
    subprocess.run([sfdisk, "-q", disk], input=LAYOUT, text=True, check=True)
    with disk.open("r+b") as file:
        file.seek(ROOT_START_BYTES)
        file.write(root.read_bytes())
    os.truncate(disk, DISK_BYTES + ADDED_BYTES)
    return disk


@pytest.fixture(scope="module")
def last(rig, disk):
    return record(rig, 1, disk, command_line="root=/dev/vda2", log_writes=True)


def test_a_partition_and_its_file_system_take_the_space_before_the_closure_needs_it(last):
    assert last.answer == (200, "calve demo release 1\n")
    (grown,) = last.of("grown")
    assert grown["before_mb"] == 25.2
    assert grown["after_mb"] >= (SMALL_BYTES + ADDED_BYTES) / 1e6 - 10
    kinds = [event.fields.get("n", event.kind) for event in last.events]
    assert kinds.index("manifest") < kinds.index("grown") < kinds.index("pull")


def test_the_table_is_in_order_for_others(last):
    done = subprocess.run(
        [which("sfdisk", package="fdisk"), "--verify", last.disk],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "No errors detected" in done.stdout
    assert done.stderr == ""


def test_nothing_is_written_to_the_table_once_it_has_grown(rig, last):
    again = record(rig, 2, last.disk, command_line="root=/dev/vda2", log_writes=True)
    assert again.answer == (200, "calve demo release 2\n")
    assert again.of("grown") == []
    log = powercut.WriteLog(again.log)
    assert not [request for request in log.requests if request.size and in_table(request)]


def in_table(request):
    end = DISK_BYTES + ADDED_BYTES - 33 * 512
    return request.offset < MIB or request.offset + request.size > end


def test_wherever_the_power_is_cut_the_primary_table_stands(last):
    log = powercut.WriteLog(last.log)
    steps = [number for number, epoch in enumerate(log.epochs) if any(map(in_table, epoch))]
    assert len(steps) == 3  # the backup, the entries, the header: a flush between each
    rng = random.Random(20)
    cuts = [powercut.Cut(number, None) for number in (*steps, steps[-1] + 1)]
    cuts += [powercut.Cut(number, rng.randrange(1 << 32)) for number in steps * 20]
    seen = {}
    for cut, disk in powercut.cut_disks(last.base, log, log.epochs, cuts):
        first, root = entries(disk.fd)
        assert (first.first_lba, first.last_lba) == (2048, 18431)
        seen.setdefault(cut.epoch, set()).add(root.last_lba)
    old, new = root_end(last.base), root_end(last.disk)
    assert (new - old) * 512 >= ADDED_BYTES
    assert [seen[number] for number in steps] == [{old}, {old}, {old, new}]
    assert seen[steps[-1] + 1] == {new}


def test_what_has_grown_in_a_partition_is_sound(last, tmp_path):
    inner = tmp_path / "root.raw"
    options = [f"skip={ROOT_START_BYTES // MIB}", "bs=1M", "conv=sparse", "status=none"]
    subprocess.run(["dd", f"if={last.disk}", f"of={inner}", *options], check=True)
    check_ext4(inner)
