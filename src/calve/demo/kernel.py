"""Debian's kernels: the image for a system, the modules for an initrd."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from calve.demo import kept
from calve.demo.packages import Packages
from calve.demo.unpack_deb import Unpacker, control
from calve.errors import DamagedError
from calve.nix.unpack import storage_error

__all__ = ["META_PACKAGE", "OTHER_META_PACKAGE", "Kernel", "kernel", "kernel_files"]

META_PACKAGE = "linux-image-cloud-amd64"
"""For virtual machines. Depends on the current kernel, whose package has the release in its name."""

OTHER_META_PACKAGE = "linux-image-amd64"
"""For any PC, likewise: another build, and so another release, of the same version."""

_IMAGE_PACKAGE = re.compile(r"linux-image-([0-9][0-9a-z.-]*-amd64)\b")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel on disk.

    Attributes:
        version: the release, as `uname -r` says it.
        image: vmlinuz, a bzImage with an EFI stub.
        modules: lib/modules/<version>, without modules.dep: Debian makes that on the machine.
    """

    version: str
    image: Path
    modules: Path


def kernel(packages: Packages, out: Path, meta_package: str = META_PACKAGE) -> Kernel:
    """Fetch the current kernel of a flavour and unpack it below `out`, unless it is there.

    Args:
        packages: where it comes from.
        out: a directory, made where it is missing.
        meta_package: names the flavour.

    Raises:
        DamagedError: the packages are not what they should be.
        SpaceError, CalveError: `out` cannot be written to.
    """
    meta = packages.fetch([meta_package])[0]
    match = _IMAGE_PACKAGE.search(control(meta.path).get("Depends", ""))
    if match is None:
        raise DamagedError("it depends on no kernel image", place=meta.path)
    deb = packages.fetch([match[0]])[0]
    version = match[1]
    final = out / f"linux-{version}-{deb.sha256[:12]}"
    try:
        if not ((final / "vmlinuz").is_file() and (final / "modules").is_dir()):
            shutil.rmtree(final, ignore_errors=True)  # somebody cleaned up in it
            with kept.whole(final) as work:
                kernel_files(deb.path, work, version)
    except OSError as error:
        raise storage_error(error, out) from error
    return Kernel(version, final / "vmlinuz", final / "modules")


def kernel_files(deb: Path, out: Path, version: str) -> tuple[Path, Path]:
    """Unpack a kernel package into `out`; return vmlinuz and the directory of its modules.

    Raises:
        DamagedError: it has no kernel of this version.
    """
    image, modules = f"boot/vmlinuz-{version}", f"usr/lib/modules/{version}"
    tree = out / "tree"
    tree.mkdir()
    Unpacker(tree, lambda path: path == image or f"{path}/".startswith(f"{modules}/")).add(deb)
    try:
        (tree / image).rename(out / "vmlinuz")
        (tree / modules).rename(out / "modules")
    except FileNotFoundError as error:
        raise DamagedError(f"it has no kernel {version}", place=deb) from error
    shutil.rmtree(tree)
    return out / "vmlinuz", out / "modules"
