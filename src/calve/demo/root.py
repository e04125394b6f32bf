"""A Debian root for an initrd with systemd: packages unpacked into one directory, nothing of them run."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from calve.demo.packages import Deb, Packages
from calve.demo.system import text
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
    lines = text("initrd/packages.txt").splitlines()
    debs = packages.fetch([line for line in lines if line and not line.startswith("#")])
    digest = hashlib.sha256("\n".join(deb.sha256 for deb in debs).encode()).hexdigest()
    final = out / f"root-{digest[:12]}"
    try:
        if not final.is_dir():
            _unpack(debs, final)
    except OSError as error:
        raise storage_error(error, out) from error
    return final


def _unpack(debs: Sequence[Deb], final: Path) -> None:
    """Unpack beside `final`, then rename: a directory of that name is complete."""
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".root-", dir=final.parent))
    try:
        unpacker = Unpacker(work)
        for deb in debs:
            unpacker.add(deb.path)
        for name in _MERGED:
            (work / name).symlink_to(f"usr/{name}")
        work.chmod(0o755)
        work.replace(final)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
