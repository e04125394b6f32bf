"""What both kinds of image have: an EFI system partition with a unified kernel image, a partition table, one directory."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from calve.contract import abi
from calve.disk import assemble, fat, gpt, uki
from calve.disk.arch import Arch
from calve.disk.disk import Disk
from calve.image.built import RAW, Loader
from calve.image.start import Start
from calve.progress import Note, Progress
from calve.tasks import Cancel

__all__ = ["Builder"]

_NAME: Final = "esp"
_NAMESPACE: Final = uuid.UUID("ca1fe000-0000-4000-8000-0000000000ff")


class Builder:
    """Builds one disk into a directory.

    Args:
        line: what it is an image of; all GUIDs follow from it.
        arch: the processor.
        start: what firmware starts.
        out: the directory.
        progress: is told.
        cancel: ends it.
    """

    def __init__(
        self, line: str, arch: Arch, start: Start, out: Path, progress: Progress, cancel: Cancel
    ) -> None:
        self.arch = arch
        self.start = start
        self.out = out
        self.progress = progress
        self.cancel = cancel
        self.seed = uuid.uuid5(_NAMESPACE, f"{line} {arch.name}")

    def loader(
        self, work: Path, root: Sequence[str], parent: Disk | None = None
    ) -> tuple[assemble.Part, Loader]:
        """Make the EFI system partition, as large as the parent's; return it, and what it was made of."""
        self.progress(Note("making the unified kernel image and the EFI system partition"))
        line = " ".join([*self.start.params, *root, f"init={abi.INIT}"])
        loader = Loader(_digest(self.start.kernel), _digest(self.start.initrd), line)
        made = uki.write(
            uki.Uki(
                self.arch,
                uki.find_stub(self.arch),
                self.start.kernel,
                self.start.initrd,
                line,
                self.start.os_release,
                self.start.uname,
            ),
            work / "loader.efi",
            cancel=self.cancel,
        )
        if parent is None:
            roomy = made.size_bytes < fat.DEFAULT_BYTES * 3 // 4
            size = fat.DEFAULT_BYTES if roomy else fat.MAX_BYTES
        else:  # what stands behind it must not move
            size = next(one.size_bytes for one in parent.partitions if one.name == _NAME)
        esp = work / "esp"
        fat.make(
            esp, made.path, arch=self.arch, seed=self.seed, size_bytes=size, cancel=self.cancel
        )
        return assemble.Part(_NAME, gpt.Kind.ESP, esp), loader

    def disk(self, parts: Sequence[assemble.Part], parent: Disk | None = None) -> Disk:
        """Put the disk together."""
        self.progress(Note("putting the disk together"))
        raw = self.out / RAW
        raw.unlink(missing_ok=True)
        return assemble.build(
            parts, raw, arch=self.arch, seed=self.seed, parent=parent, cancel=self.cancel
        )


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
