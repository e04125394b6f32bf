"""The EFI system partition: FAT32 with one file in it, made by mkfs.vfat and mtools.

Given a volume id and a time they write the same bytes for the same input. An empty file system gives its clusters out
in their order, so that the file is one run, and always at the same place: of two files of one size, only the
blocks with changed bytes differ.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

from calve import process
from calve.disk.arch import Arch
from calve.errors import SpaceError, UsageError
from calve.tasks import Cancel

__all__ = ["DEFAULT_BYTES", "MAX_BYTES", "make"]

DEFAULT_BYTES = 64 << 20
MAX_BYTES = 256 << 20
_LABEL = "ESP"
_EPOCH = "315532800"  # 1980-01-01, where FAT's time begins
_SHARE = 65  # of as many bytes one goes to the two tables, at the most


def make(
    path: Path,
    loader: Path,
    *,
    arch: Arch,
    seed: uuid.UUID,
    size_bytes: int = DEFAULT_BYTES,
    cancel: Cancel | None = None,
) -> None:
    """Write a file system image that firmware starts `loader` from; a sparse file.

    Args:
        path: the image; it must not exist.
        loader: the file that becomes `EFI/BOOT/BOOTX64.EFI`, or what it is called on `arch`.
        arch: the processor.
        seed: the volume id follows from it.
        size_bytes: of the file system: 64 to 256 MiB, whole MiB.
        cancel: ends it.

    Raises:
        UsageError: the image exists, the loader does not, or the size is none of these.
        SpaceError: the loader does not fit.
        NotFoundError: dosfstools or mtools are not installed.
    """
    _check(path, loader, size_bytes)
    mkfs = process.which("mkfs.vfat", package="dosfstools")
    # Clusters of 512 bytes at 64 MiB, of 2 KiB at 256: FAT32 is what has at least 65,525 of them (Microsoft's FAT
    # specification), and with as many as possible the file begins at the same place in a block, whatever the size.
    sectors = 1 << (size_bytes // DEFAULT_BYTES).bit_length() - 1
    volume = uuid.uuid5(seed, "volume").hex[:8]
    with tempfile.TemporaryDirectory(prefix=".esp-", dir=path.parent) as work:
        image = Path(work) / "esp"
        with image.open("xb") as file:
            file.truncate(size_bytes)
        options = ("--invariant", "-F", "32", "-s", str(sectors), "-i", volume, "-n", _LABEL)
        _run([mkfs, *options, "esp"], work, cancel)
        mmd, mcopy = (process.which(name, package="mtools") for name in ("mmd", "mcopy"))
        _run([mmd, "-i", "esp", "::/EFI", "::/EFI/BOOT"], work, cancel)
        _run([mcopy, "-i", "esp", loader.resolve(), f"::/EFI/BOOT/{arch.loader}"], work, cancel)
        image.replace(path)


def _check(path: Path, loader: Path, size_bytes: int) -> None:
    if path.exists():
        raise UsageError("exists already", place=path)
    if not loader.is_file():
        raise UsageError("does not exist", place=loader)
    if not DEFAULT_BYTES <= size_bytes <= MAX_BYTES or size_bytes % (1 << 20):
        raise UsageError(f"an EFI system partition has 64 to 256 MiB, not {size_bytes} bytes")
    need = loader.stat().st_size
    if need > size_bytes - size_bytes // _SHARE - (1 << 20):
        raise SpaceError(
            f"{need >> 20} MiB do not fit into an EFI system partition of {size_bytes >> 20} MiB",
            place=loader,
            hint="make the initrd smaller"
            if size_bytes == MAX_BYTES
            else "an image that is built whole (--full) has 256 MiB where that is needed",
        )


def _run(argv: list[str | Path], work: str, cancel: Cancel | None) -> None:
    """Run a tool in a folder where names are its own: mtools reads meaning into `@@` and `:` of a path."""
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": work,  # no .mtoolsrc
        "TZ": "UTC",
        "LC_ALL": "C",
        "SOURCE_DATE_EPOCH": _EPOCH,
        "MTOOLS_SKIP_CHECK": "1",
    }
    process.run(argv, cwd=Path(work), env=env, cancel=cancel)
