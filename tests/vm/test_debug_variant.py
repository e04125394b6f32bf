"""The debug variant of a release image starts under UEFI: a root shell on the console, and the same release served."""

from __future__ import annotations

import os
from unittest import mock

import pytest

from calve.demo.world import COMMAND_LINE
from calve.disk.arch import X86_64
from calve.disk.disk import BLOCK_BYTES
from calve.disk.inspect.source import FileSource
from calve.image import debug
from calve.image.release import Release
from calve.image.source import StoreSource
from calve.image.start import Start
from calve.region import qemu
from calve.tasks import Cancel

SHELL = "can't access tty; job control turned off"


def make(rig, system, out):
    """Build a release image whose initrd allows a shell; what was never written is garbage, as on an encrypted volume."""
    kernel = rig.workshop.kernel()
    words = tuple(word for word in COMMAND_LINE.split() if not word.startswith(("root=", "init=")))
    initrd = rig.workshop.initrd(hold_s=1, debug=True)
    start = Start(kernel.image, initrd, kernel.version, words)
    with rig.workshop.store() as store:
        release = Release("tiny", X86_64, start, StoreSource(store), system)
        built = release.build(out, cancel=Cancel())
    written = {block.index for block in built.disk.blocks}
    with built.raw.open("r+b") as file:
        for index in set(range(built.disk.size_bytes // BLOCK_BYTES)) - written:
            file.seek(index * BLOCK_BYTES)
            file.write(os.urandom(BLOCK_BYTES))
    return built.raw


@pytest.mark.full
def test_it_starts_with_a_shell_and_serves(rig, tmp_path):
    system = rig.release("tiny", 1)
    raw = make(rig, system, tmp_path / "image")
    with FileSource(raw) as source:
        variant = debug.with_debug(source, raw)
    assert len(variant.blocks) <= 2
    with raw.open("r+b") as file:
        for index, data in variant.blocks.items():
            file.seek(index * BLOCK_BYTES)
            file.write(data)
    image = qemu.DiskImage(raw, qemu.ovmf())
    data = rig.user_data(system)
    with mock.patch.object(rig, "image", return_value=image), rig.boot(data) as boot:
        assert boot.get() == (200, "calve demo release 1\n")
        assert SHELL in boot.console
