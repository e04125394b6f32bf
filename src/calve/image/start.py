"""What firmware starts of a system: its kernel, its initrd and their parameters, by its bootspec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calve.contract import abi
from calve.disk import uki
from calve.errors import NotFoundError
from calve.image.source import Source
from calve.nix.storepath import STORE_DIR, StorePath

__all__ = ["CONSOLES", "Start", "start_of"]

CONSOLES: Final = ("console=tty0", "console=ttyS0,115200n8")
"""The screen, and last the serial console: that is /dev/console, which EC2 shows."""


@dataclass(frozen=True, slots=True)
class Start:
    """What firmware starts.

    Attributes:
        kernel: its file.
        initrd: its file.
        uname: the kernel's release; empty where neither the system nor the kernel's file says it.
        params: the kernel's command line, without root= and init=.
        seeds: store paths that the two come from.
        os_release: content of os-release(5).
    """

    kernel: Path
    initrd: Path
    uname: str
    params: tuple[str, ...]
    seeds: tuple[StorePath, ...] = ()
    os_release: str = "ID=calve\nPRETTY_NAME=Calve\n"


def start_of(
    source: Source,
    system: StorePath,
    work: Path,
    *,
    initrd: Path | None = None,
    debug: bool = False,
) -> Start:
    """Read what a system starts with: kernel, initrd and parameters of its bootspec.

    Args:
        source: has the system.
        system: the toplevel.
        work: for what has to be unpacked.
        initrd: in place of the system's own.
        debug: ask for the root shell that the image's policy may allow.

    Raises:
        NotFoundError: the system has no boot.json, or names no kernel or initrd.
        DamagedError: it is damaged.
    """
    top = source.take(system, work)
    place = top / "boot.json"
    try:
        data = place.read_bytes()
    except OSError as error:
        raise NotFoundError(
            f"the system has no boot.json: {error.strerror}",
            place=system,
            hint="only a system (toplevel) can be made an image",
        ) from error
    wanted = abi.parse_wanted(data, f"{system}/boot.json")
    spec = wanted.bootspec
    if spec is None or (spec.initrd is None and initrd is None):
        raise NotFoundError("the system's boot.json names no initrd", place=system)
    kernel_path, kernel = _file(source, spec.kernel, work)
    seeds = [kernel_path]
    if initrd is None:
        path, initrd = _file(source, spec.initrd or "", work)
        seeds.append(path)
    words = [word for word in spec.params if word not in CONSOLES]
    words += [*CONSOLES, f"calve.kernel={kernel_path}"]
    words += [] if any(word.startswith("panic=") for word in spec.params) else ["panic=30"]
    words += ["calve.debug=1"] if debug else []
    release = wanted.release or uki.kernel_release(kernel)
    return Start(kernel, initrd, release, tuple(words), tuple(seeds))


def _file(source: Source, file: str, work: Path) -> tuple[StorePath, Path]:
    """Find a file of a store path; return the path and where the file can be read."""
    name, _, inner = file.removeprefix(f"{STORE_DIR}/").partition("/")
    path = StorePath.from_basename(name)
    place = source.take(path, work)
    return path, place / inner if inner else place
