"""A disk that was made elsewhere, described by reading it: every block is data."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid

import pytest

from calve.disk import assemble, describe, fat, gpt
from calve.disk.arch import X86_64
from calve.disk.disk import BLOCK_BYTES, ZERO_BLOCK
from calve.errors import CancelledError, ConflictError, UsageError
from calve.tasks import Cancel

pytestmark = pytest.mark.skipif(
    shutil.which("mcopy") is None, reason="dosfstools or mtools are not installed"
)


@pytest.fixture(name="disk")
def _disk(tmp_path, pe_file):
    (tmp_path / "loader").write_bytes(pe_file())
    fat.make(tmp_path / "esp", tmp_path / "loader", arch=X86_64, seed=uuid.UUID(int=1))
    (tmp_path / "root").write_bytes(os.urandom(3 * BLOCK_BYTES))
    parts = [
        assemble.Part("esp", gpt.Kind.ESP, tmp_path / "esp"),
        assemble.Part("root", gpt.Kind.ROOT, tmp_path / "root", fill=True),
    ]
    made = assemble.build(parts, tmp_path / "disk.raw", arch=X86_64, seed=uuid.UUID(int=1))
    return tmp_path / "disk.raw", made


def test_every_block_is_data_zeros_included(disk):
    path, made = disk
    events = []
    found = describe.describe(path, progress=events.append)
    assert [block.index for block in found.blocks] == list(range(2048))
    assert (found.size_bytes, found.arch, found.parent) == (1 << 30, X86_64, None)
    known = {block.index: block.sha256 for block in made.blocks}
    for block in found.blocks:
        assert block.sha256 == known.get(block.index, ZERO_BLOCK)
    assert (events[-1].done, events[-1].total) == (1 << 30, 1 << 30)
    assert found.present == found.blocks


def test_the_volume_is_whole_gib(disk, monkeypatch):
    path, _ = disk
    data = path.read_bytes()[: 300 * BLOCK_BYTES]
    path.write_bytes(data)
    monkeypatch.setattr(describe, "check", lambda _path: Checked(300 * BLOCK_BYTES))
    found = describe.describe(path)
    assert (found.size_bytes, len(found.blocks)) == (1 << 30, 300)
    assert found.blocks[299].sha256 == hashlib.sha256(data[-BLOCK_BYTES:]).hexdigest()


class Checked:
    """What the look at a disk said, so far as it matters."""

    arches = (X86_64,)

    def __init__(self, size_bytes):
        self.size_bytes = size_bytes


def test_what_is_not_described(disk, tmp_path, monkeypatch):
    path, _ = disk
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(CancelledError):
        describe.describe(path, cancel=cancel)
    (tmp_path / "no.raw").write_bytes(bytes(BLOCK_BYTES))
    with pytest.raises(UsageError, match="it has no partition table"):
        describe.describe(tmp_path / "no.raw")
    os.truncate(path, 300 * BLOCK_BYTES - 1)
    monkeypatch.setattr(describe, "check", lambda _path: Checked(300 * BLOCK_BYTES))
    with pytest.raises(ConflictError, match="became shorter"):
        describe.describe(path)
    monkeypatch.setattr(describe, "check", lambda _path: Checked((64 << 30) + BLOCK_BYTES))
    with pytest.raises(UsageError, match="more than 64 GiB"):
        describe.describe(path)
