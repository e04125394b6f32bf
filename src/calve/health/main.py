"""Stage 2's entry: `python3 -m calve.health.main [RUN [HEALTH [ROOT]]]`; its exit status is an `Outcome`."""

from __future__ import annotations

import importlib
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from calve.boot import handover
from calve.boot.console import Console
from calve.boot.policy import Policy
from calve.contract.codes import Code
from calve.contract.health import LIMIT_BYTES, Health
from calve.contract.userdata import UserData, UserDataError
from calve.errors import CalveError, DamagedError
from calve.health.confirm import Confirmation, Outcome
from calve.tasks import limit_arenas

__all__ = ["HEALTH", "LATER", "RUN", "import_everything", "main"]

RUN = "/run/calve"
HEALTH = "/etc/calve/health.json"
LATER = (
    "calve.cache.s3",
    "ctypes",
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
    "runpy",
    "traceback",
)
"""Modules that are imported when first used: with what this module imports, all that it may ever load."""


def import_everything() -> None:
    """Import what may come later: this is how its payload is found out."""
    for name in LATER:
        importlib.import_module(name)


def main(arguments: list[str]) -> int:
    """Judge this boot; see `Outcome`.

    Args:
        arguments: the directory that the initrd left, the closure's health file, and the root of this machine.
    """
    run, place, root = (*arguments, *(RUN, HEALTH, "/")[len(arguments) :])
    limit_arenas()
    console = Console(sys.stdout, before=_text(Path(run) / handover.BOOT_LOG))
    try:
        confirmation = _read(Path(run), Path(root), console)
    except (CalveError, UserDataError, OSError) as error:
        # A /run that is not the initrd's: there is nobody to ask, and no hook.
        console.emit("fail", code=Code.INTERNAL, phase="health", message=str(error))
        return Outcome.POWER_OFF
    try:
        try:
            closure = _closure(Path(place))
        except DamagedError as error:  # the release's own fault, as that of a check that fails
            return confirmation.fail(Code.UNHEALTHY, str(error))
        return replace(confirmation, closure=closure).run()
    except Exception as error:  # noqa: BLE001  (the last place: a machine that nobody judged ends, and says why)
        if not isinstance(error, CalveError):
            console.write("".join(traceback.format_exception(error)))
        return confirmation.fail(Code.INTERNAL, str(error))


def _closure(place: Path) -> Health:
    """Read what the closure asks for; nothing where it has no such file."""
    try:
        with place.open("rb") as file:
            return Health.parse_file(file.read(LIMIT_BYTES + 1), str(place))
    except FileNotFoundError:
        return Health()


def _read(run: Path, root: Path, console: Console) -> Confirmation:
    """Read what the initrd left."""
    try:
        policy = Policy.parse((run / handover.AGENT).read_bytes(), str(run / handover.AGENT))
        data = (run / handover.USER_DATA).read_bytes()
    except FileNotFoundError:
        return Confirmation(Policy(keys=(), root=root, run=run), console, None)
    wanted = UserData.parse(data) if data else None
    return Confirmation(replace(policy, root=root), console, wanted)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
