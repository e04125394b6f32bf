"""The hand-off: the system is on the disk; start it under this kernel, or start its own kernel first.

What decides is `contract.abi.decide`; this reads what it decides on, and acts.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from calve.boot.kexec import LINUX, Loader
from calve.contract import abi
from calve.contract.codes import Code
from calve.contract.userdata import UserDataError
from calve.errors import DamagedError
from calve.nix.storepath import StorePath

__all__ = ["CONTRACT", "Handoff", "read_wanted"]

CONTRACT: Final = "contract.json"
"""In the initrd, beside the policy: what it offers; the object of the bootspec that the initrd belongs to."""

_LINKS = 8


class Handoff:
    """How this boot ends well.

    Args:
        root: where the root file system is mounted.
        command_line: of the kernel that runs.
        release: of that kernel.
        offered: `CONTRACT`'s content; None where the initrd has none.
        loader: starts kernels.

    Raises:
        DamagedError: `offered` is no contract.
    """

    def __init__(
        self,
        root: Path,
        command_line: str = "",
        *,
        release: str | None = None,
        offered: bytes | None = None,
        loader: Loader = LINUX,
    ) -> None:
        self._root = root
        self._line = command_line
        self._loader = loader
        self._kernel_is_loaded = False
        offers = abi.PLAIN if offered is None else abi.parse_abi(offered, CONTRACT)
        self._running = abi.Running.parse(command_line, release or os.uname().release, offers)
        self.note = ""
        """Why the closure's own kernel was not started though it would have been better; empty otherwise."""

    @property
    def phase(self) -> str:
        """Return the phase that comes after `ready`."""
        return "kexec" if self._kernel_is_loaded else "switch-root"

    def prepare(self, system: StorePath) -> None:
        """Decide how a system starts, and load its kernel where it needs its own; nothing on the disk changes.

        Raises:
            UserDataError: it cannot start on this machine.
        """
        decision = abi.decide(self._running, read_wanted(self._root, system))
        if isinstance(decision, abi.Refuse):
            raise UserDataError(decision.code, decision.message)
        if isinstance(decision, abi.Kexec):
            self._load(decision)

    def check_health(self, system: StorePath) -> None:
        """Refuse a system that would never tell a launch hook that it is healthy: it would time out, in minutes.

        Raises:
            UserDataError: its bootspec names no health units.
        """
        found = read_wanted(self._root, system).abi
        if found is None or not found.health_units:
            raise UserDataError(
                Code.HEALTH_MISSING,
                "the closure has no unit that would complete the launch hook",
            )

    def _load(self, wanted: abi.Kexec) -> None:
        try:
            self._loader.load(
                self._root,
                _below(self._root, wanted.kernel),
                _below(self._root, wanted.initrd),
                abi.command_line(wanted, self._line),
            )
        except UserDataError as error:
            if not wanted.may_switch_root:
                raise
            self.note = f"{error.code}: {error}"
        else:
            self._kernel_is_loaded = True

    def leave(self) -> None:
        """Start the kernel that was loaded; does not return then. Nothing of the root file system may be open.

        Raises:
            UserDataError: it does not start.
        """
        if self._kernel_is_loaded:
            self._loader.start(self._root)


def read_wanted(root: Path, system: StorePath) -> abi.Wanted:
    """Read what a system on the disk says of its start; a system without boot.json says nothing.

    Raises:
        UserDataError: its boot.json is damaged, or of a version that we do not know.
    """
    release = _modules_release(root, f"{system}/kernel-modules")
    try:
        with _below(root, f"{system}/boot.json").open("rb") as file:
            data = file.read(abi.LIMIT_BYTES + 1)
    except FileNotFoundError:
        return abi.Wanted(modules_release=release)
    try:
        return abi.parse_wanted(data, f"{system}/boot.json", modules_release=release)
    except DamagedError as error:
        raise UserDataError(Code.CONTRACT_UNKNOWN, str(error)) from error


def _modules_release(root: Path, link: str) -> str:
    """Return the release of the modules that a toplevel names; empty where it names none, or several."""
    with contextlib.suppress(OSError, UserDataError):
        found = [one.name for one in (_below(root, link) / "lib/modules").iterdir()]
        return found[0] if len(found) == 1 else ""
    return ""


def _below(root: Path, path: str) -> Path:
    """Return where a path of the machine lies while its disk is mounted at `root`, links at its end followed."""
    inner = Path(path)
    for _ in range(_LINKS):
        place = root / inner.relative_to("/")
        try:
            target = place.readlink()
        except OSError:
            return place
        inner = Path(os.path.normpath(inner.parent / target))
    raise UserDataError(Code.SYSTEM_INVALID, f"{path}: too many links")
