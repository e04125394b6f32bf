"""The root partition under dm-verity: the kernel reads no block that is not what the root hash says.

`python3 -m calve.boot.verity DEVICE ROOT_HASH` sets it up and prints the device to mount, for the initrd's init. The
tree of hashes is a partition of the same disk, found by its superblock. Nothing on the disk is believed: another tree,
or another superblock, leads to another root hash, and then no read succeeds. A block that differs panics the kernel:
a machine with wrong files ends, and its group replaces it.

Sources: Linux: include/uapi/linux/dm-ioctl.h, Documentation/admin-guide/device-mapper/verity.rst; cryptsetup's
on-disk format (https://gitlab.com/cryptsetup/cryptsetup/-/wikis/DMVerity).
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from calve.errors import CalveError, DamagedError

__all__ = ["NAME", "find_tree", "open_root", "table"]

NAME: Final = "root"

_SUPERBLOCK: Final = struct.Struct("<8sII16x32sIIQH6x256s168x")
_MAGIC: Final = b"verity\0\0"
_BLOCK_BYTES: Final = 4096
_SECTOR_BYTES: Final = 512
_HASH: Final = re.compile(r"[0-9a-f]{64}")

_CONTROL: Final = "dev/mapper/control"
_HEAD: Final = struct.Struct("@IIIIIIiIIIQ128s129s7x")
_TARGET: Final = struct.Struct("@QQiI16s")
_DM_DEV_CREATE, _DM_DEV_SUSPEND, _DM_TABLE_LOAD = 3, 6, 9
_DM_READONLY: Final = 1
_ARGUMENT_BYTES: Final = 4096


def table(superblock: bytes, root_hash: str, data: str, tree: str, data_bytes: int) -> str:
    """Return the target's parameters.

    Args:
        superblock: the first 512 bytes of the tree's partition.
        root_hash: in base 16.
        data: number of the data's device, "major:minor".
        tree: likewise, of the tree's.
        data_bytes: the size of the data's device.

    Raises:
        DamagedError: it is no superblock, of a kind that we do not write, or of more data than there is.
    """
    if not _HASH.fullmatch(root_hash):
        raise DamagedError("the root hash is no SHA-256 in base 16", place="roothash=")
    if len(superblock) < _SUPERBLOCK.size or not superblock.startswith(_MAGIC):
        raise DamagedError("it is no tree of dm-verity", place=tree)
    _, version, kind, name, data_block, hash_block, blocks, salt_bytes, salt = (
        _SUPERBLOCK.unpack_from(superblock)
    )
    known = (1, 1, b"sha256", _BLOCK_BYTES, _BLOCK_BYTES)
    if (version, kind, name.rstrip(b"\0"), data_block, hash_block) != known or salt_bytes > len(
        salt
    ):
        raise DamagedError("the tree is of a kind that Calve does not write", place=tree)
    if not 0 < blocks <= data_bytes // _BLOCK_BYTES:
        raise DamagedError(
            f"the tree is about {blocks} blocks, and there are {data_bytes // _BLOCK_BYTES}",
            place=tree,
        )
    words = [1, data, tree, _BLOCK_BYTES, _BLOCK_BYTES, blocks, 1, "sha256", root_hash]
    words += [salt[:salt_bytes].hex() or "-", 1, "panic_on_corruption"]
    return " ".join(map(str, words))


def find_tree(device: str, base: Path = Path("/")) -> str:
    """Return the name of the partition beside a device's that has a tree of hashes.

    Raises:
        DamagedError: there is none.
    """
    disk = (base / "sys/class/block" / device).resolve().parent
    for folder in sorted(disk.iterdir()):
        if folder.name == device or not (folder / "partition").exists():
            continue
        try:
            with (base / "dev" / folder.name).open("rb") as file:
                found = file.read(len(_MAGIC)) == _MAGIC
        except OSError:
            continue  # another one will do, or none
        if found:
            return folder.name
    raise DamagedError("no partition of its disk has a tree of hashes", place=device)


def open_root(device: str, root_hash: str, base: Path = Path("/")) -> str:
    """Set the device up; return the name of the one to mount.

    Args:
        device: the name of the data's, below /dev.
        root_hash: in base 16.
        base: where /sys and /dev are.

    Raises:
        DamagedError: the disk has no tree, or one that cannot be of it.
        OSError: the kernel will not.
    """
    tree = find_tree(device, base)
    with (base / "dev" / tree).open("rb") as file:
        superblock = file.read(_SUPERBLOCK.size)
    sectors = int((base / "sys/class/block" / device / "size").read_text())
    data, hashes = (
        (base / "sys/class/block" / one / "dev").read_text().strip() for one in (device, tree)
    )
    text = table(superblock, root_hash, data, hashes, sectors * _SECTOR_BYTES)
    length = int(text.split()[5]) * _BLOCK_BYTES // _SECTOR_BYTES
    control = os.open(base / _CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        _ask(control, _DM_DEV_CREATE)
        _ask(control, _DM_TABLE_LOAD, _target(length, text), count=1, flags=_DM_READONLY)
        number = _ask(control, _DM_DEV_SUSPEND)  # without a flag it resumes
    finally:
        os.close(control)
    return (base / "sys/dev/block" / number).resolve(strict=True).name


def _target(length: int, text: str) -> bytes:
    body = text.encode() + b"\0"
    body = body.ljust(-(-len(body) // 8) * 8, b"\0")
    return _TARGET.pack(0, length, 0, _TARGET.size + len(body), b"verity") + body


def _ask(control: int, action: int, data: bytes = b"", *, count: int = 0, flags: int = 0) -> str:
    """Ask the device mapper; return the device's number."""
    argument = bytearray(_ARGUMENT_BYTES)
    _HEAD.pack_into(
        argument, 0,
        4, 0, 0, _ARGUMENT_BYTES, _HEAD.size, count, 0, flags, 0, 0, 0, NAME.encode(), b"",
    )  # fmt: skip
    argument[_HEAD.size : _HEAD.size + len(data)] = data
    # _IOWR(0xfd, action, struct dm_ioctl)
    fcntl.ioctl(control, (3 << 30) | (_HEAD.size << 16) | (0xFD << 8) | action, argument)
    number = _HEAD.unpack_from(argument)[10]
    major, minor = os.major(number), os.minor(number)
    return f"{major}:{minor}"


def main(arguments: Sequence[str]) -> int:
    """Set it up, and print the device; one line of what is wrong, and 1."""
    device, root_hash = arguments
    try:
        found = open_root(Path(device).resolve().name, root_hash)
    except (CalveError, OSError) as error:
        sys.stderr.write(f"dm-verity: {error}\n")
        return 1
    sys.stdout.write(f"/dev/{found}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
