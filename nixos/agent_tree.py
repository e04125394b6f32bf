"""Write a payload as a directory: what the NixOS initrd carries, or the agent's part in stage 2.

`calve.disk.payload` finds out what the entry reaches, as it does for an initrd of ours. Below OUT:
  calve/      the pruned Python; it stands at /calve in the initrd
  libraries/  a link to each shared object that it loads: NixOS copies what a link leads to, also a library that no
              ELF header names (libgcc_s, which glibc opens by itself)

Usage: python3 agent_tree.py OUT [ENTRY]
"""

# ruff: noqa: INP001  (a script)

from __future__ import annotations

import sys
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
    agent.write(out)
    links = out / "libraries"
    links.mkdir()
    for number, (library, where) in enumerate(agent.libraries):
        if not where.startswith(f"{payload.PREFIX}/"):
            # The loader opens it where the header says, not where its last link leads.
            (links / f"{number:02}-{library.name}").symlink_to(f"/{where}")


def main(arguments: list[str]) -> int:
    """Write the payload of the running Python."""
    if len(arguments) not in {1, 2}:
        sys.stderr.write(__doc__)
        return 2
    write(payload.build(*arguments[1:]), Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
