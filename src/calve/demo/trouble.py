"""What can go wrong with a show, found early and told in words that one can act on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from calve.aws.autoscaling import AutoScaling
from calve.contract import evidence
from calve.disk.arch import X86_64
from calve.disk.uki import find_stub
from calve.errors import CalveError, DamagedError, NotFoundError
from calve.process import which
from calve.region.qemu import QemuMachines, ovmf
from calve.ui.text import sanitize

__all__ = ["PROGRAMS", "check_group", "check_machines", "check_programs", "consoles", "throwaway"]

PROGRAMS: Final = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
    "haproxy": "haproxy",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
}
"""What the show runs, and the Debian packages that have it."""


def check_programs() -> None:
    """Look for all programs before minutes of work have gone by; NotFoundError names all packages that lack."""
    lacking: dict[str, str] = {}
    for name, package in PROGRAMS.items():
        try:
            which(name, package=package)
        except NotFoundError:
            lacking[name] = package
    for find, package in ((ovmf, "ovmf"), (lambda: find_stub(X86_64), "systemd-boot-efi")):
        try:
            find()
        except NotFoundError:
            lacking[package] = package
    if lacking:
        raise NotFoundError(
            f"not installed: {', '.join(lacking)}",
            hint=f"apt-get install {' '.join(dict.fromkeys(lacking.values()))}",
        )


@contextlib.contextmanager
def throwaway(directory: Path) -> Iterator[None]:
    """Say of damaged parts that they can be thrown away: their own hints are for what cannot."""
    try:
        yield
    except DamagedError as error:
        error.hint = f"a part that the demo keeps is damaged: rm -r {directory}, and run it again"
        raise


def check_machines(machines: QemuMachines) -> None:
    """Raise with a machine's own words where one failed, or has gone: the group would replace it for ever."""
    for name in machines.instances():
        for event in evidence.read(_console(machines, name)):
            if event.kind == "fail":
                fields = event.fields
                raise CalveError(
                    sanitize(f"{fields.get('code')}: {fields.get('message')}"), place=name
                )
    for name, code in machines.ended().items():
        how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
        raise CalveError(
            f"QEMU {how}; last on the machine's console: {_last_line(machines, name)}",
            place=name,
            hint="four machines at a time take 2 GB of memory, and disk where .calve is: is there room?",
        )


def check_group(scaling: AutoScaling, group: str) -> None:
    """Raise with the reason where the group could not start a machine: it would try for ever."""
    for activity in scaling.activities(group):
        if activity.status == "Failed":
            raise CalveError(sanitize(activity.message or activity.cause))


def consoles(machines: QemuMachines) -> str:
    """Return the last line of every machine's console."""
    names = machines.instances()
    return "; ".join(f"{name}: {_last_line(machines, name)}" for name in names) or "no machine runs"


def _console(machines: QemuMachines, name: str) -> str:
    return machines.console(name).decode("utf-8", "replace")


def _last_line(machines: QemuMachines, name: str) -> str:
    lines = _console(machines, name).split("\n")
    return sanitize(next((line.strip() for line in reversed(lines) if line.strip()), "nothing"))
