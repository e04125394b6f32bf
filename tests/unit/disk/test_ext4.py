"""ext4 root disks: clean, root's own, the same bytes every time; whoever builds them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import calve
from calve.disk import ext4
from calve.errors import CalveError, UsageError

SIZE = 24 << 20

pytestmark = pytest.mark.skipif(
    shutil.which("mke2fs") is None or shutil.which("debugfs") is None,
    reason="e2fsprogs is not installed",
)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    (root / "nix/store/a-b").mkdir(parents=True)
    (root / "nix/store/a-b/file").write_bytes(os.urandom(100_000))
    (root / "nix/store/a-b/file").chmod(0o444)
    (root / "nix/store/a-b/run me").write_text("#!/bin/sh\n")
    (root / "nix/store/a-b/run me").chmod(0o555)
    (root / "nix/store/a-b/link").symlink_to("/nowhere/x")
    (root / "nix/store/a-b/long").symlink_to("/nowhere/" + "x" * 100)
    (root / "nix/store/a-b/folder").symlink_to(".")
    (root / "nix/store/a-b").chmod(0o555)
    (root / "etc").mkdir()
    (root / "etc/ünïcode").write_text("x")
    return root


def fsck(image):
    done = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def debugfs(image, request):
    return subprocess.run(
        ["debugfs", "-R", request, image], capture_output=True, text=True, check=True
    ).stdout


def test_an_empty_disk(tmp_path):
    image = tmp_path / "disk"
    ext4.make(image, SIZE)
    assert image.stat().st_size == SIZE
    assert image.stat().st_blocks * 512 < SIZE
    fsck(image)
    head = debugfs(image, "stats -h")
    assert re.search(r"Filesystem volume name:\s+nixos", head)
    assert re.search(r"Reserved block count:\s+0\b", head)
    other = tmp_path / "other"
    ext4.make(other, SIZE)
    assert other.read_bytes() == image.read_bytes()


def test_a_tree(tmp_path, tree):
    image = tmp_path / "disk"
    ext4.make(image, SIZE, tree=tree, label="demo")
    fsck(image)
    for path in ("/", "/nix", "/nix/store/a-b", "/nix/store/a-b/file", "/etc/ünïcode"):
        text = debugfs(image, f'stat "{path}"')
        assert re.search(r"User:\s+0\s+Group:\s+0\b", text), text
    text = debugfs(image, 'stat "/nix/store/a-b/run me"')
    assert re.search(r"Mode:\s+0555", text)
    assert re.search(r"mtime: 0x0*1[: ]", text)
    assert '"/nowhere/x"' in debugfs(image, 'stat "/nix/store/a-b/link"')
    out = tmp_path / "out"
    debugfs(image, f'dump "/nix/store/a-b/file" {out}')
    assert out.read_bytes() == (tree / "nix/store/a-b/file").read_bytes()


NAMES = [
    'quo"te',
    r"dev-disk\x2duuid.mount",
    "a  b",
    " lead",
    "t\tab",
    "#hash",
    "-dash",
    "<9>",
    "é",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_debugfs_might_misread(tmp_path, name):
    """Owners and times are set by name: a name misread would leave the builder's."""
    images = []
    for at in (1, 2):
        tree = tmp_path / f"tree-{at}"
        tree.mkdir()
        (tree / name).write_text("x")
        os.utime(tree / name, (at * 1e8, at * 1e8))
        if os.geteuid() == 0:
            os.chown(tree / name, at, at)
        images.append(tmp_path / f"disk-{at}")
        ext4.make(images[-1], 8 << 20, tree=tree)
    fsck(images[0])
    assert images[0].read_bytes() == images[1].read_bytes()


def test_two_builds_have_the_same_bytes_whatever_the_tree_s_owners_and_times(tmp_path, tree):
    one, two = tmp_path / "one", tmp_path / "two"
    ext4.make(one, SIZE, tree=tree)
    for directory, folders, files in os.walk(tree):
        for name in [*folders, *files]:
            os.utime(os.path.join(directory, name), (5e8, 6e8), follow_symlinks=False)
    ext4.make(two, SIZE, tree=tree)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else needs root")
def test_a_normal_user_s_disk_is_root_s_own(tmp_path, tree):
    source = str(Path(calve.__file__).parents[1])
    program = (
        f"import sys; sys.path.insert(0, {source!r}); from pathlib import Path\n"
        "from calve.disk import ext4\n"
        "ext4.make(Path(sys.argv[1]), int(sys.argv[2]), tree=Path(sys.argv[3]))"
    )
    home = tmp_path / "home"
    home.mkdir()
    for place in (home, tree, *tree.rglob("*")):
        os.chown(place, 65534, 65534, follow_symlinks=False)
    for parent in [tmp_path, *tmp_path.parents]:
        if "pytest-of-" in str(parent):  # pytest's own folders are private
            parent.chmod(parent.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, home / "disk", str(SIZE), tree],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
    )
    if "Permission denied" in done.stderr and "ModuleNotFound" in done.stderr:
        pytest.skip("another user cannot read the sources")
    assert done.returncode == 0, done.stderr
    fsck(home / "disk")
    assert re.search(r"User:\s+0\s+Group:\s+0\b", debugfs(home / "disk", 'stat "/etc/ünïcode"'))
    ext4.make(tmp_path / "ours", SIZE, tree=tree)
    assert (tmp_path / "ours").read_bytes() == (home / "disk").read_bytes()


def test_what_cannot_be_written(tmp_path, tree):
    image = tmp_path / "disk"
    image.write_text("precious")
    with pytest.raises(UsageError, match="exists"):
        ext4.make(image, SIZE)
    assert image.read_text() == "precious"
    (tree / "new\nline").write_text("x")
    with pytest.raises(UsageError, match="name"):
        ext4.make(tmp_path / "two", SIZE, tree=tree)


def test_a_tree_that_does_not_fit(tmp_path, tree):
    (tree / "large").write_bytes(bytes(1) + os.urandom(SIZE))
    with pytest.raises(CalveError):
        ext4.make(tmp_path / "disk", SIZE, tree=tree)
