"""A Debian root for an initrd with systemd: packages unpacked into one directory, nothing of them run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from calve.demo import kept
from calve.demo.packages import Deb, Packages
from calve.demo.system import table
from calve.demo.unpack_deb import Unpacker
from calve.nix.unpack import storage_error

__all__ = ["root"]

_MERGED = ("bin", "lib", "lib64", "sbin")


def root(packages: Packages, out: Path) -> Path:
    """Fetch the packages and unpack them below `out`, unless they are there; return the root.

    Args:
        packages: where they come from.
        out: a directory, made where it is missing.

    Raises:
        DamagedError: a package is not what it should be.
        SpaceError, CalveError: `out` cannot be written to.
    """
    debs = packages.fetch([name for (name,) in table("initrd/packages.txt")])
    digest = hashlib.sha256("\n".join(deb.sha256 for deb in debs).encode()).hexdigest()
    final = out / f"root-{digest[:12]}"
    try:
        if not final.is_dir():
            with kept.whole(final) as work:
                _unpack(debs, work)
    except OSError as error:
        raise storage_error(error, out) from error
    return final


def _unpack(debs: Sequence[Deb], work: Path) -> None:
    unpacker = Unpacker(work)
    for deb in debs:
        unpacker.add(deb.path)
    for name in _MERGED:
        (work / name).symlink_to(f"usr/{name}")
