"""Write the agent's payload as a directory: what the NixOS initrd carries.

`calve.disk.payload` finds out what the agent reaches, as it does for an initrd of ours. Below OUT:
  calve/      the pruned Python; it stands at /calve in the initrd
  libraries/  a link to each shared object that it loads: NixOS copies what a link leads to, also a library that no
              ELF header names (libgcc_s, which glibc opens by itself)

Usage: python3 agent_tree.py OUT
"""

# ruff: noqa: INP001  (a script)

from __future__ import annotations

import shutil
import stat
import sys
import tempfile
from pathlib import Path

from calve.disk import payload

__all__ = ["main", "write"]


def write(agent: payload.Payload, out: Path) -> None:
    """Write the tree below `out`, which must not exist.

    Args:
        agent: what goes into it.
        out: a directory; `calve` and `libraries` are made in it.
    """
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="calve-") as scratch:
        for entry in agent.entries(Path(scratch)):
            if not entry.path.startswith(f"{payload.PREFIX}/"):
                continue  # a library of the system: a link below
            place = out / entry.path
            if stat.S_ISDIR(entry.mode):
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(entry.content, bytes):
                place.write_bytes(entry.content)
            else:
                shutil.copyfile(entry.content, place)
            place.chmod(stat.S_IMODE(entry.mode))
    links = out / "libraries"
    links.mkdir()
    for number, (library, where) in enumerate(agent.libraries):
        if not where.startswith(f"{payload.PREFIX}/"):
            # The loader opens it where the header says, not where its last link leads.
            (links / f"{number:02}-{library.name}").symlink_to(f"/{where}")


def main(arguments: list[str]) -> int:
    """Write the payload of the running Python."""
    if len(arguments) != 1:
        sys.stderr.write(__doc__)
        return 2
    write(payload.build(), Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
