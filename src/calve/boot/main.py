"""The agent's entry: `python3 -m calve.boot.main POLICY`; exit 0 means that the profile's system may start."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from calve.boot.agent import Agent
from calve.boot.console import Console
from calve.boot.handoff import CONTRACT, Handoff
from calve.boot.policy import Policy
from calve.contract.codes import Code
from calve.errors import CalveError

__all__ = ["LATER", "import_everything", "main"]

LATER = (
    "calve.boot.verity",  # a process of its own
    "calve.cache.directory",
    "calve.cache.s3",
    "calve.cache.web",
    "ctypes",  # syncfs, mallopt
    "encodings.ascii",
    "encodings.idna",  # socket.getaddrinfo encodes every host name with it
    "encodings.latin_1",
    "nacl.bindings",
    "nacl.exceptions",
    "runpy",  # python -m
    "traceback",
)
"""Modules that are imported when first used: with what this module imports, all that the agent may ever load."""


def import_everything() -> None:
    """Import what may come later: this is how the payload of an initrd is found out."""
    for name in LATER:
        importlib.import_module(name)


def main(arguments: list[str]) -> int:
    """Run the agent; 0 where the system is ready, 1 where the boot failed.

    Args:
        arguments: the policy's file and, for a plain process, the kernel command line's; what the initrd offers
            stands beside the policy.
    """
    place = arguments[0] if arguments else "/etc/calve/agent.json"
    console = Console(sys.stdout)
    try:
        policy = Policy.parse(Path(place).read_bytes(), place)
        command_line = Path(arguments[1] if arguments[1:] else "/proc/cmdline").read_text()
        offered = Path(place).with_name(CONTRACT)
        handoff = Handoff(
            policy.root,
            command_line,
            offered=offered.read_bytes() if offered.exists() else None,
        )
    except (CalveError, OSError) as error:
        # An image that was built wrong: nothing of this boot can change it, nobody knows how long to hold.
        console.emit("fail", code=Code.INTERNAL, phase="agent", message=str(error))
        return 1
    return Agent(policy.with_command_line(command_line), console, handoff=handoff).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
