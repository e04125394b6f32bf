"""The other initrd: PID 1 is systemd, out of a directory that looks like a Debian root; the agent is a unit.

Its units stand in the order in which NixOS's stand (`data/systemd`, `data/calve-agent.service`), so that what a boot
shows of it holds for the NixOS module too. Of the root only what is listed here is taken, and the libraries that it
needs; where the agent needs a library that the root has as well, the root's is taken, so that Python and the root have
to be of one distribution.
Source: systemd's bootup(7), systemd.special(7); NixOS, system/boot/systemd/initrd.nix.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from calve.disk import cpio, elf, initrd, payload
from calve.errors import NotFoundError

__all__ = ["SystemdInitrd"]

_LIBRARY = "usr/lib/systemd"
_UNITS = f"{_LIBRARY}/system"
_OURS = "etc/systemd/system"

PROGRAMS = (
    "usr/bin/busybox",
    "usr/bin/mount",
    "usr/bin/systemctl",
    "usr/bin/udevadm",
    "usr/bin/umount",
    f"{_LIBRARY}/system-generators/systemd-fstab-generator",
    f"{_LIBRARY}/systemd",
    f"{_LIBRARY}/systemd-fsck",
    f"{_LIBRARY}/systemd-journald",
    f"{_LIBRARY}/systemd-networkd",
    f"{_LIBRARY}/systemd-shutdown",
    f"{_LIBRARY}/systemd-sysctl",
    f"{_LIBRARY}/systemd-udevd",
)
NEWER_PROGRAMS = (f"{_LIBRARY}/systemd-executor",)
"""What later versions of systemd have; others do without."""

APPLETS = ("sh", "cat", "cp", "echo", "grep", "insmod", "ln", "mkdir", "readlink", "sleep")
RULES = ("50-udev-default", "60-block", "60-persistent-storage", "99-systemd")
UNITS = (
    "basic.target",
    "final.target",
    "initrd-cleanup.service",
    "initrd-fs.target",
    "initrd-parse-etc.service",
    "initrd-root-device.target",
    "initrd-root-fs.target",
    "initrd-switch-root.service",
    "initrd-switch-root.target",
    "initrd-udevadm-cleanup-db.service",
    "initrd-usr-fs.target",
    "initrd.target",
    "local-fs-pre.target",
    "local-fs.target",
    "network-pre.target",
    "network.target",
    "paths.target",
    "shutdown.target",
    "slices.target",
    "sockets.target",
    "swap.target",
    "sysinit.target",
    "systemd-journald-dev-log.socket",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "timers.target",
    "umount.target",
)
WANTS = {
    "initrd.target": ("systemd-networkd.service",),
    "sockets.target": (
        "systemd-journald-dev-log.socket",
        "systemd-journald.socket",
        "systemd-udevd-control.socket",
        "systemd-udevd-kernel.socket",
    ),
    "sysinit.target": (
        "systemd-journald.service",
        "systemd-udev-trigger.service",
        "systemd-udevd.service",
    ),
}
"""Which units of systemd's a target starts: Debian's own links lead to more than is here."""

_OUR_UNITS = (
    "calve-emergency.service",
    "emergency.target",
    "initrd-find-nixos-closure.service",
    "systemd-modules-load.service",
)
_DROP_INS = {
    "calve-agent.service": "calve-agent.conf",
    "initrd-switch-root.service": "switch-root.conf",
    "sysroot.mount": "sysroot.conf",
}
_MERGED = ("bin", "lib", "lib64", "sbin")
_GROUPS = (
    "root", "tty", "dialout", "kmem", "input", "video", "render", "sgx", "audio", "lp", "disk", "cdrom", "tape", "kvm",
)  # fmt: skip
_NETWORK_ID = 998
_NOBODY_ID = 65534
# Amazon's resolver answers at this address in every VPC that has DNS support on.
_RESOLVER = b"nameserver 169.254.169.253\n"


@dataclass(frozen=True, slots=True)
class SystemdInitrd:
    """What goes into an initrd whose PID 1 is systemd.

    Attributes:
        root: a Debian root, merged below /usr: systemd, udev, mount, a static busybox, and their libraries.
        kernel_modules: `lib/modules/VERSION` of the kernel it will run under.
        agent: its payload.
        policy: the image's policy, `boot.policy.Policy.dump`'s bytes.
        ca_file: certificate authorities; they stand at `/etc/calve/ca.pem`.
    """

    root: Path
    kernel_modules: Path
    agent: payload.Payload
    policy: bytes
    ca_file: Path | None = None

    def parts(self) -> list[Path]:
        """Return the files and directories, beside the agent's, that it is made of."""
        return [self.root, self.kernel_modules, *filter(None, [self.ca_file])]

    def entries(self, scratch: Path) -> Iterator[cpio.Entry]:
        """Yield every file; compiled Python modules are written below `scratch`.

        Raises:
            NotFoundError: the root lacks a program, a unit or a library.
            DamagedError: a program of the root is no ELF file that can be read.
        """
        for entry in initrd.shared(self, scratch):
            yield self._merged(entry)
        for name in _MERGED:
            yield cpio.link(name, f"usr/{name}")
        yield cpio.link("init", f"{_LIBRARY}/systemd")
        for applet in APPLETS:
            yield cpio.link(f"usr/bin/{applet}", "busybox")
        yield from self._programs()
        yield from self._units()
        yield from _our_units()
        yield from _etc()

    def _merged(self, entry: cpio.Entry) -> cpio.Entry:
        """Return the entry below /usr where that is its place, with the root's file where the root has it."""
        path = _below_usr(entry.path)
        if not path.startswith("usr/"):
            return entry
        own = elf.inside(self.root, path)
        content = own if stat.S_ISREG(entry.mode) and own.is_file() else entry.content
        return dataclasses.replace(entry, path=path, content=content)

    def _file(self, path: str) -> Path:
        """Return the root's file at a path, by what links lead to."""
        file = elf.inside(self.root, path)
        if not file.is_file():
            raise NotFoundError(f"the root has no {path}", place=self.root)
        return file

    def _programs(self) -> Iterator[cpio.Entry]:
        newer = [path for path in NEWER_PROGRAMS if elf.inside(self.root, path).is_file()]
        programs = [*PROGRAMS, *newer]
        libraries = elf.closure([self._file(path) for path in programs], self.root)
        for path in [*programs, *(file.relative_to(self.root).as_posix() for file in libraries)]:
            place = _below_usr(path)
            file = self._file(place)
            real = file.relative_to(self.root).as_posix()
            if real != place:
                yield cpio.link(place, f"/{real}")
            yield cpio.file(real, file, executable=True)
        yield cpio.link(
            f"{_LIBRARY}/systemd-sysroot-fstab-check", "system-generators/systemd-fstab-generator"
        )

    def _units(self) -> Iterator[cpio.Entry]:
        for name in UNITS:
            yield cpio.file(f"{_UNITS}/{name}", self._file(f"{_UNITS}/{name}"))
        for target, names in WANTS.items():
            for name in names:
                yield cpio.link(f"{_OURS}/{target}.wants/{name}", f"/{_UNITS}/{name}")
        for name in RULES:
            path = f"usr/lib/udev/rules.d/{name}.rules"
            yield cpio.file(path, self._file(path))


def _below_usr(path: str) -> str:
    """Return where a path is: /bin, /lib and such are links into /usr."""
    return f"usr/{path}" if path.partition("/")[0] in _MERGED else path


def _our_units() -> Iterator[cpio.Entry]:
    data = importlib.resources.files("calve.disk") / "data"
    units = {"calve-agent.service": (data / "calve-agent.service").read_bytes()}
    units |= {name: (data / "systemd" / name).read_bytes() for name in _OUR_UNITS}
    for name, text in units.items():
        yield cpio.file(f"{_OURS}/{name}", text)
        for line in text.decode().splitlines():
            key, _, targets = line.partition("=")
            if key in {"RequiredBy", "WantedBy"}:
                folder = "requires" if key == "RequiredBy" else "wants"
                for target in targets.split():
                    yield cpio.link(f"{_OURS}/{target}.{folder}/{name}", f"../{name}")
    for unit, name in _DROP_INS.items():
        yield cpio.file(f"{_OURS}/{unit}.d/{name}", (data / "systemd" / name).read_bytes())
    network = (data / "systemd" / "10-calve.network").read_bytes()
    yield cpio.file("etc/systemd/network/10-calve.network", network)
    yield cpio.file("etc/calve/steps", (data / "systemd" / "steps").read_bytes())


def _etc() -> Iterator[cpio.Entry]:
    """Yield what tells systemd that this is an initrd, and the users that its units name."""
    release = b"ID=calve\nPRETTY_NAME=Calve\n"
    yield cpio.file("etc/initrd-release", release)
    yield cpio.file("etc/os-release", release)
    yield cpio.file("etc/resolv.conf", _RESOLVER)
    network = f"systemd-network:x:{_NETWORK_ID}:"
    nobody = f"nobody:x:{_NOBODY_ID}:"
    users = [
        "root:x:0:0::/:/bin/sh",
        f"{network}{_NETWORK_ID}::/:/bin/false",
        f"{nobody}{_NOBODY_ID}::/:/bin/false",
    ]
    groups = [f"{name}:x:{number}:" for number, name in enumerate(_GROUPS)]
    groups += [network, nobody.replace("nobody", "nogroup")]
    yield cpio.file("etc/passwd", "".join(f"{line}\n" for line in users).encode())
    yield cpio.file("etc/group", "".join(f"{line}\n" for line in groups).encode())
