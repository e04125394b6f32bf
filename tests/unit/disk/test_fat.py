"""The EFI system partition: clean, the same bytes every time, one file in one run at a fixed place."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from calve.disk import fat
from calve.disk.arch import AARCH64, X86_64
from calve.errors import SpaceError, UsageError
from calve.process import which

MIB = 1 << 20
BLOCK = 512 << 10
SEED = uuid.UUID(int=7)

pytestmark = pytest.mark.skipif(
    shutil.which("mcopy") is None or shutil.which("mkfs.vfat", path="/usr/sbin:/sbin") is None,
    reason="dosfstools or mtools are not installed",
)


@pytest.fixture(name="loader")
def _loader(tmp_path):
    path = tmp_path / "linux.efi"
    path.write_bytes(os.urandom(2 * MIB))
    return path


def make(path, loader, **more):
    fat.make(path, loader, **{"arch": X86_64, "seed": SEED} | more)
    return path


def fsck(path):
    done = subprocess.run(
        [which("fsck.vfat", package="dosfstools"), "-nv", path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def clusters(path, name="BOOTX64.EFI"):
    """Return the runs of clusters that a file has."""
    out = subprocess.run(
        ["mtools", "-c", "mshowfat", "-i", path, f"::/EFI/BOOT/{name}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return re.findall(r"<([\d-]+)>", out)


def offset(path, loader):
    """Return where the file's content begins in the image."""
    found = path.read_bytes().find(loader.read_bytes())
    assert found > 0
    return found


def changed(before, after):
    one, other = before.read_bytes(), after.read_bytes()
    assert len(one) == len(other)
    return [
        n
        for n in range(len(one) // BLOCK)
        if one[n * BLOCK :][:BLOCK] != other[n * BLOCK :][:BLOCK]
    ]


@pytest.mark.parametrize("arch", [X86_64, AARCH64], ids=lambda arch: arch.name)
def test_firmware_finds_the_loader(tmp_path, loader, arch):
    image = make(tmp_path / "esp", loader, arch=arch)
    assert image.stat().st_size == 64 * MIB
    assert image.stat().st_blocks * 512 < 4 * MIB
    assert "32 bit entries" in fsck(image)
    subprocess.run(
        ["mcopy", "-i", image, f"::/EFI/BOOT/{arch.loader}", tmp_path / "copy"], check=True
    )
    assert (tmp_path / "copy").read_bytes() == loader.read_bytes()


def test_the_same_inputs_give_the_same_bytes(tmp_path, loader, monkeypatch):
    one = make(tmp_path / "one", loader)
    time.sleep(2.1)  # FAT counts in steps of two seconds
    os.utime(loader, (1, 1))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mtoolsrc").write_text("this is no setting of theirs\n")
    (tmp_path / "a@@1M" / "b:c").mkdir(parents=True)
    moved = loader.rename(tmp_path / "a@@1M/b:c/d@@7")
    two = make(tmp_path / "a@@1M/esp@@5", moved)
    assert one.read_bytes() == two.read_bytes()
    assert not list(tmp_path.glob(".esp*"))
    assert make(tmp_path / "three", moved, seed=uuid.UUID(int=8)).read_bytes() != one.read_bytes()


@pytest.mark.parametrize("size", [64, 100, 128, 200, 256])
def test_the_file_is_one_run_and_begins_early_in_a_block(tmp_path, loader, size):
    image = make(tmp_path / "esp", loader, size_bytes=size * MIB)
    assert "32 bit entries" in fsck(image)
    (run,) = clusters(image)
    assert run.startswith("5-")
    # Stub and texts of a unified kernel image, its first 80 KB, are in one block.
    assert offset(image, loader) % BLOCK < BLOCK - (128 << 10)


def test_only_blocks_with_changed_bytes_change(tmp_path, loader):
    before = make(tmp_path / "before", loader)
    data = bytearray(loader.read_bytes())
    data[75_000] ^= 1
    data[-1] ^= 1
    start = offset(before, loader)
    loader.write_bytes(data)
    after = make(tmp_path / "after", loader)
    assert changed(before, after) == [(start + 75_000) // BLOCK, (start + 2 * MIB - 1) // BLOCK]


def test_as_much_as_fits(tmp_path):
    loader = tmp_path / "linux.efi"
    loader.touch()
    for size in (64, 256):
        os.truncate(loader, size * MIB - size * MIB // 65 - MIB)
        fsck(make(tmp_path / f"{size}", loader, size_bytes=size * MIB))
        os.truncate(loader, loader.stat().st_size + 1)
        with pytest.raises(SpaceError, match="do not fit") as caught:
            make(tmp_path / "over", loader, size_bytes=size * MIB)
        assert caught.value.place == str(loader)
    assert not (tmp_path / "over").exists()


@pytest.mark.parametrize("size", [0, 63 * MIB, 257 * MIB, 64 * MIB + 512])
def test_sizes_that_it_does_not_have(tmp_path, loader, size):
    with pytest.raises(UsageError, match="64 to 256 MiB"):
        make(tmp_path / "esp", loader, size_bytes=size)


def test_what_cannot_be_written(tmp_path, loader):
    (tmp_path / "esp").write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        make(tmp_path / "esp", loader)
    assert (tmp_path / "esp").read_text() == "precious"
    with pytest.raises(UsageError, match="does not exist"):
        make(tmp_path / "other", Path("/nowhere/linux.efi"))
