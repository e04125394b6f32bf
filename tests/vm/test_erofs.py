"""EROFS images under the kernel that the demo's machines have, Linux 6.1: a first one, and one onto it."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from calve.disk import cpio
from calve.disk.modules import load_order
from calve.process import which

_spec = importlib.util.spec_from_file_location(
    "erofsimage", Path(__file__).parents[1] / "property" / "erofsimage.py"
)
erofsimage = importlib.util.module_from_spec(_spec)
sys.modules["erofsimage"] = erofsimage
_spec.loader.exec_module(erofsimage)

INIT = """#!/bin/busybox sh
exec </dev/console >/dev/console 2>&1
busybox mount -t devtmpfs none /dev
for module in $(busybox cat /modules); do busybox insmod "/m/$module"; done
busybox mount -t erofs -o ro /dev/vda /mnt && cd /mnt && echo BEGIN
busybox find nix nix-path-registration -type f -exec busybox sha256sum {} +
busybox find . -exec busybox stat -c '%a %h %u %g %Y %N' {} +
echo END
busybox poweroff -f
"""


@pytest.fixture(scope="module")
def machine(workshop, tmp_path_factory):
    """Return what boots an image and returns its console."""
    folder = tmp_path_factory.mktemp("erofs")
    kernel = workshop.kernel()
    modules = load_order(kernel.modules, ["erofs", "virtio_pci", "virtio_blk"])
    entries = [
        cpio.file("init", INIT.encode(), executable=True),
        cpio.file("bin/busybox", Path(which("busybox")), executable=True),
        cpio.file("modules", "\n".join(module.name for module in modules).encode()),
        *(cpio.file(f"m/{module.name}", module) for module in modules),
        cpio.device("dev/console", 5, 1),
        cpio.directory("mnt"),
    ]
    (folder / "initrd").write_bytes(b"".join(cpio.archive(entries)))

    def boot(image):
        argv = [
            *(which("qemu-system-x86_64"), "-nodefaults", "-display", "none", "-machine", "pc"),
            *("-accel", "tcg", "-cpu", "max", "-m", "512", "-no-reboot", "-serial", "stdio"),
            *("-kernel", kernel.image, "-initrd", folder / "initrd"),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-drive", f"format=raw,file={image},if=virtio,readonly=on"),
        ]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=250)
        console = done.stdout.decode("utf-8", "replace").replace("\r", "")
        assert "BEGIN" in console, console[-3000:]
        assert "END" in console, console[-3000:]
        return console.partition("BEGIN\n")[2].partition("END\n")[0].splitlines()

    return boot


def check(lines, expected):
    """Hold what the machine saw against a closure: every file's bytes, every link, all metadata."""
    files = {
        f"{hashlib.sha256(content).hexdigest()}  {path.lstrip('/')}"
        for path, (mode, content) in expected.items()
        if stat.S_ISREG(mode)
    }
    assert set(lines) >= files
    said = {}
    for line in set(lines) - files:
        *words, name = line.split(" ", 5)
        path, _, target = name.partition(" -> ")
        said["/" + path.strip("'").removeprefix("./")] = words, target.strip("'")
    for path, (mode, content) in expected.items():
        (permissions, links, *rest), target = said.pop(path)
        assert int(permissions, 8) == stat.S_IMODE(mode)
        assert (links == "1") == (not stat.S_ISDIR(mode))
        assert target.encode() == (content if stat.S_ISLNK(mode) else b"")
        assert rest == ["0", "0", "1"]
    assert {tuple(words[2:]) for words, _ in said.values()} == {("0", "0", "1")}


def test_linux_6_1_reads_an_image_and_the_one_onto_it(machine, tmp_path):
    source = random.Random(11)
    store = erofsimage.Store()
    sizes = [0, 1, 4064, 4065, 4096, 4097, 100_000, 1_000_000]
    paths = [
        store.add(f"p{number}", {b"%d" % size: source.randbytes(size) for size in sizes})
        for number in range(5)
    ]
    wide = {b"%05d" % number: {b"l": f"../{number}"} for number in range(700)}
    paths.append(store.add("wide", wide))
    first = store.add("system", {b"init": ("x", b"#!")}, paths)
    paths[2] = store.add("p2", {b"new": source.randbytes(1_500_000), b"link": "t" * 4095})
    second = store.add("system", {b"init": ("x", b"#! 2")}, paths)
    parent, _ = store.build(tmp_path / "1", first)
    child, writer = store.build(tmp_path / "2", second, parent)
    assert len(writer.dirty) < child.blocks // 128
    check(machine(tmp_path / "1"), store.expected(first))
    before = (tmp_path / "1").read_bytes()
    (tmp_path / "3").write_bytes(erofsimage.overlay(before, tmp_path / "2", writer.written))
    check(machine(tmp_path / "3"), store.expected(second))
