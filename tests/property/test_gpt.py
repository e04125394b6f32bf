"""Any GPT disk whose last partition grows: wherever its writes are cut, the primary table is the old or the new one."""

from __future__ import annotations

import importlib.util
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.boot import gpt

_place = Path(__file__).parents[1] / "unit" / "boot" / "gptdisk.py"
_spec = importlib.util.spec_from_file_location("gptdisk", _place)
gptdisk = importlib.util.module_from_spec(_spec)
sys.modules["gptdisk"] = gptdisk
_spec.loader.exec_module(gptdisk)

SBIN = ":/usr/sbin:/sbin"
MIB = 1 << 20


@st.composite
def disks(draw):
    """Return a disk that has become larger, and the number of its last partition."""
    sector_bytes = draw(st.sampled_from([512, 4096]))
    one = MIB // sector_bytes
    count = draw(st.sampled_from([128, 128, 4, 57, 200]))
    size = -(-count * 128 // sector_bytes)
    entries_lba = draw(st.sampled_from([2, 2, 2 + size, 2 + 2 * size]))
    room = max(entries_lba + size, 2 + 2 * size)
    at = draw(st.integers(room, one))
    starts = []
    for _ in range(draw(st.integers(1, 4))):
        at += draw(st.integers(0, one))
        last = at + draw(st.integers(0, 3 * one))
        starts.append((at, last))
        at = last + 1
    numbers = draw(st.permutations(range(1, count + 1)))[: len(starts)]
    entries = [bytes(128)] * count
    for number, (first, last) in zip(numbers, starts, strict=True):
        entries[number - 1] = gptdisk.entry(first, last, mark=number)
    slack = draw(st.integers(0, one))
    first_usable = draw(st.integers(entries_lba + size, starts[0][0]))
    small, added = at + slack + size + 1, draw(st.integers(one + size + 10, 5 * one))
    was_told = draw(st.booleans())  # somebody has moved the backup already, and no more than that
    disk = gptdisk.make(
        small + added if was_told else small,
        entries,
        sector_bytes=sector_bytes,
        entries_lba=entries_lba,
        first_usable=first_usable,
    )
    disk.sectors = small + added
    return disk, numbers[-1]


def planned(disk, number):
    return gpt.plan(gpt.Table.read(disk.read, disk.sector_bytes), number, disk.size_bytes)


def torn(data, disk, step):
    """Do some of a step's sectors, whichever they are."""
    pieces = [piece for write in step for piece in disk.pieces(write)]
    kept = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    left = disk.copy()
    left.data.update(piece for piece, keep in zip(pieces, kept, strict=True) if keep)
    return left


def agree(disk):
    """Check both tables as they should be in the end; return the entries."""
    (*_, my, alternate, first, end, guid, at, count, one, crc), entries = gptdisk.linux_reads(disk)
    last = disk.sectors - 1
    fields, spare = gptdisk.linux_reads(disk, last)
    size = -(-count * one // disk.sector_bytes)
    assert (my, alternate) == (1, last)
    assert fields[5:] == (last, 1, first, end, guid, last - size, count, one, crc)
    assert entries == spare
    assert 2 <= at <= first - size
    assert end == last - size - 1
    (boot_size,) = struct.unpack_from("<I", disk.read(0, 512), 458)
    assert boot_size == last
    for start, stop in (struct.unpack_from("<QQ", one, 32) for one in entries if any(one[:16])):
        assert first <= start <= stop <= end
    return entries


@settings(deadline=None)
@given(disks(), st.data())
def test_a_cut_leaves_the_old_table_or_the_new_one(made, data):
    disk, number = made
    plan = planned(disk, number)
    _, before = gptdisk.linux_reads(disk)
    after = list(before)
    old = before[number - 1]
    after[number - 1] = old[:40] + struct.pack("<Q", plan.last_lba) + old[48:]
    boot = disk.read(0, 446)
    for index, step in enumerate(plan.steps):
        left = torn(data, disk, step)
        _, found = gptdisk.linux_reads(left)
        assert found == before or (found == after and index == len(plan.steps) - 1)
        # The next boot goes on from there.
        again = planned(left, number)
        for rest in again.steps if again is not None else ():
            left.write(rest)
        assert agree(left) == after
        disk.write(step)
        assert gptdisk.linux_reads(disk)[1] == (after if index == len(plan.steps) - 1 else before)
    assert agree(disk) == after
    assert disk.read(0, 446) == boot
    assert planned(disk, number) is None


@settings(deadline=None)
@given(disks())
def test_nothing_is_written_where_something_is(made):
    disk, number = made
    fields, entries = gptdisk.linux_reads(disk)
    size = -(-len(entries) * 128 // disk.sector_bytes)
    plan = planned(disk, number)
    taken = {1, *range(fields[10], fields[10] + size)}  # the old table itself
    for one in entries:
        if any(one[:16]):
            first, last = struct.unpack_from("<QQ", one, 32)
            taken |= {*range(first, last + 1)}
    *steps, ((lba, _),) = [
        [piece for write in step for piece in disk.pieces(write)] for step in plan.steps
    ]
    assert lba == 1
    written = [lba for step in steps for lba, _ in step]
    assert len(written) == len(set(written)) == 2 * size + 2
    assert not taken & set(written)
    assert max(written) == disk.sectors - 1


@settings(deadline=None)
@given(disks(), st.lists(st.integers(2, 4), min_size=1, max_size=3))
def test_it_grows_as_often_as_its_disk_does(made, more):
    disk, number = made
    size = None
    for mib in more:
        plan = planned(disk, number)
        for step in plan.steps:
            disk.write(step)
        agree(disk)
        assert size is None or plan.last_lba > size
        size = plan.last_lba
        disk.sectors += mib * MIB // disk.sector_bytes


@pytest.mark.skipif(
    shutil.which("sfdisk", path=SBIN) is None, reason="sfdisk (fdisk) is not installed"
)
@settings(deadline=None, max_examples=15)
@given(disks().filter(lambda made: made[0].sector_bytes == 512))
def test_sfdisk_finds_nothing_wrong(made):
    disk, number = made
    for step in planned(disk, number).steps:
        disk.write(step)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "disk"
        disk.save(path)
        done = subprocess.run(
            [shutil.which("sfdisk", path=SBIN), "--verify", path], capture_output=True, text=True
        )
    assert "No errors detected" in done.stdout
    assert done.stderr == ""
