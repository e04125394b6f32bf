"""ext4 root disks, made by mke2fs: empty, or filled from a tree; no root, no mounting, the same bytes every time.

mke2fs copies owners and times from the tree (e2fsprogs 1.47): debugfs sets every inode's to root's and to the epoch
afterwards, so that whoever builds owns nothing of it and two builds are equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from calve import process
from calve.errors import UsageError
from calve.tasks import Cancel

__all__ = ["make"]

_UUID = "ca1fe000-0000-4000-8000-000000000001"
_EPOCH = "1"


def make(
    path: Path,
    size_bytes: int,
    *,
    tree: Path | None = None,
    label: str = "nixos",
    cancel: Cancel | None = None,
) -> None:
    """Write a file system image; a sparse file.

    Args:
        path: the image; it must not exist.
        size_bytes: of the file system.
        tree: what it holds; None leaves it empty. Modes are kept, owners become root.
        label: of the file system.
        cancel: ends it.

    Raises:
        UsageError: a name in the tree cannot be written, or the image exists.
        CalveError: mke2fs failed: the tree does not fit.
    """
    if path.exists():
        raise UsageError("exists already", place=path)
    with path.open("xb") as file:
        file.truncate(size_bytes)
    mke2fs = process.which("mke2fs", package="e2fsprogs")
    # One inode per 8 KiB: a store is many small files. Lazy initialisation would go on in the machine.
    argv: list[str | Path] = [
        *(mke2fs, "-q", "-F", "-t", "ext4", "-i", "8192", "-m", "0", "-b", "4096"),
        *("-L", label, "-U", _UUID),
        *("-E", f"hash_seed={_UUID},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"),
    ]
    if tree is not None:
        argv += ["-d", tree]
    env = {**os.environ, "E2FSPROGS_FAKE_TIME": _EPOCH, "SOURCE_DATE_EPOCH": _EPOCH}
    process.run([*argv, path], env=env, cancel=cancel)
    if tree is not None:
        debugfs = process.which("debugfs", package="e2fsprogs")
        script = os.fsencode("".join(_commands(tree)))
        process.run([debugfs, "-w", "-f", "-", path], stdin=script, env=env, cancel=cancel)


def _commands(tree: Path) -> Iterator[str]:
    for directory, folders, files in os.walk(tree):
        for name in [".", *folders, *files]:
            full = Path(directory) / name
            inner = "/" + os.path.relpath(full, tree)
            if "\n" in inner:  # debugfs reads a command a line, and has no way to write one
                raise UsageError("this name cannot stand in a disk image", place=repr(inner))
            inner = inner.replace('"', '""')
            status = full.lstat()
            for field in ("uid", "gid"):
                if getattr(status, f"st_{field}") != 0:
                    yield f'sif "{inner}" {field} 0\n'
            for field in ("atime", "ctime", "mtime", "crtime"):
                yield f'sif "{inner}" {field} @{_EPOCH}\n'
