"""The initrd of a machine that pulls: busybox, kernel modules, the agent's payload, the image's policy.

Written as one zstd-compressed cpio archive; the same inputs give the same bytes. What has systemd in busybox's place
is `initrd_systemd`; both are written here.
"""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from calve.disk import cpio, modules, payload
from calve.errors import UsageError
from calve.nix.zstd import ZstdCompressor
from calve.tasks import Cancel

__all__ = ["OPTIONAL", "REQUIRED", "Contents", "Initrd", "Written", "shared", "write"]

# What a disk and a network card of EC2 or of QEMU need; the file system and its checksums.
REQUIRED = ("virtio_net", "virtio_blk", "virtio_pci")
OPTIONAL = (
    "ena",
    "nvme",
    "ext4",
    "crc32c_generic",
    "crc32c_intel",
    "af_packet",
    "virtio_rng",
    "erofs",
    "overlay",
    "dm_verity",
)
APPLETS = (
    "sh", "mount", "umount", "mkdir", "cat", "echo", "sleep", "insmod", "ip", "udhcpc", "findfs", "switch_root",
    "poweroff", "ls", "cp", "setsid", "cttyhack",
)  # fmt: skip
_LEVEL = 19


class Contents(Protocol):
    """What goes into an initrd, of whichever kind; its attributes are those of `Initrd`."""

    @property
    def kernel_modules(self) -> Path: ...  # noqa: D102

    @property
    def agent(self) -> payload.Payload: ...  # noqa: D102

    @property
    def policy(self) -> bytes: ...  # noqa: D102

    @property
    def ca_file(self) -> Path | None: ...  # noqa: D102

    def parts(self) -> list[Path]:
        """Return the files and directories, beside the agent's, that it is made of."""

    def entries(self, scratch: Path) -> Iterator[cpio.Entry]:
        """Yield every file; compiled Python modules are written below `scratch`."""


@dataclass(frozen=True, slots=True)
class Initrd:
    """What goes into an initrd whose PID 1 is a script of busybox's shell.

    Attributes:
        busybox: a static busybox.
        kernel_modules: `lib/modules/VERSION` of the kernel it will run under.
        agent: its payload.
        policy: the image's policy, `boot.policy.Policy.dump`'s bytes.
        ca_file: certificate authorities; they stand at `/etc/calve/ca.pem`.
        debug: the image's policy allows a root shell; pass what `policy` says.
    """

    busybox: Path
    kernel_modules: Path
    agent: payload.Payload
    policy: bytes
    ca_file: Path | None = None
    debug: bool = False

    def parts(self) -> list[Path]:
        """Return the files and directories, beside the agent's, that it is made of."""
        return [self.busybox, self.kernel_modules, *filter(None, [self.ca_file])]

    def entries(self, scratch: Path) -> Iterator[cpio.Entry]:
        """Yield every file; compiled Python modules are written below `scratch`."""
        data = importlib.resources.files("calve.disk") / "data"
        yield cpio.file("bin/busybox", self.busybox, executable=True)
        for applet in APPLETS:
            yield cpio.link(f"bin/{applet}", "busybox")
        yield cpio.file("init", (data / "init").read_bytes(), executable=True)
        yield cpio.file("etc/udhcpc", (data / "udhcpc").read_bytes(), executable=True)
        if self.debug:
            yield cpio.file("etc/calve/debug", b"")
        yield from shared(self, scratch)


def shared(contents: Contents, scratch: Path) -> Iterator[cpio.Entry]:
    """Yield what both kinds have: device nodes, mount points, names, modules, policy, authorities, the agent."""
    yield cpio.device("dev/console", 5, 1)
    yield cpio.device("dev/null", 1, 3)
    for name in ("proc", "sys", "run", "sysroot", "tmp", "etc/calve"):
        yield cpio.directory(name)
    yield cpio.file("etc/nsswitch.conf", b"hosts: files dns\n")
    yield cpio.file("etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n")
    loaded = modules.load_order(contents.kernel_modules, REQUIRED, optional=OPTIONAL)
    yield cpio.file("etc/modules", "".join(f"{path.name}\n" for path in loaded).encode())
    for path in loaded:
        yield cpio.file(f"modules/{path.name}", path)
    yield cpio.file("etc/calve/agent.json", contents.policy, mode=0o600)
    if contents.ca_file is not None:
        yield cpio.file("etc/calve/ca.pem", contents.ca_file)
    yield from contents.agent.entries(scratch)


@dataclass(frozen=True, slots=True)
class Written:
    """What an initrd came to: bytes compressed, bytes unpacked, and the agent's share of the latter."""

    path: Path
    compressed_bytes: int
    unpacked_bytes: int


def write(
    initrd: Contents, out: Path, *, level: int = _LEVEL, cancel: Cancel | None = None
) -> Written:
    """Write the archive, under a temporary name first.

    Args:
        initrd: what goes into it.
        out: the file; replaced where it is there.
        level: of zstd.
        cancel: ends it.

    Raises:
        UsageError: a file that it needs is not there.
        NotFoundError: the kernel lacks a module, or a library is not installed.
    """
    for path in initrd.parts():
        if not path.exists():
            raise UsageError("does not exist", place=path)
    out.parent.mkdir(parents=True, exist_ok=True)
    unpacked = 0
    temporary = out.with_name(f".{out.name}.new")
    compressor = ZstdCompressor(level)
    try:
        with tempfile.TemporaryDirectory(prefix="calve-") as scratch, temporary.open("wb") as file:
            for chunk in cpio.archive(initrd.entries(Path(scratch))):
                if cancel is not None:
                    cancel.check()
                unpacked += len(chunk)
                file.write(compressor.compress(chunk))
            file.write(compressor.flush())
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Written(out, out.stat().st_size, unpacked)
