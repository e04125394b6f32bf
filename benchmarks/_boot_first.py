"""The first version of the walking skeleton: its agent in an initrd, packed by its own code from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks._closure import HOME
from calve.demo.workshop import Workshop
from calve.errors import NotFoundError
from calve.process import which

COMMIT = "d9bc129"
"""The first at which a machine pulls a signed closure in its initrd and serves it."""

_REPOSITORY = Path(__file__).resolve().parents[1]

# Arguments: source tree, busybox, modules, public key, zstd level, where to; and where to without the agent.
_PACK = """
import sys
from pathlib import Path
source, busybox, modules, key, level, out, bare = sys.argv[1:]
import calve
if not Path(calve.__file__).is_relative_to(source):
    sys.exit(f"{calve.__file__} is not below {source}")
from calve.boot.policy import Policy
from calve.disk import initrd, payload
agent = payload.build()
none = payload.Payload(agent.version, Path("/dev/null"), (), ())
for part, place in ((agent, out), (none, bare)):
    if place:
        spec = initrd.Initrd(Path(busybox), Path(modules), part, Policy(keys=(key,), hold_s=1).dump())
        initrd.write(spec, Path(place), level=int(level))
"""


def source() -> Path:
    """Return the source tree of the first version, taken from the repository once.

    Raises:
        NotFoundError: this is no clone of the repository, or not a whole one.
    """
    tree = HOME.absolute() / f"first-{COMMIT}"
    if not tree.exists():
        argv = ["git", "-C", str(_REPOSITORY), "archive", "--format=tar", COMMIT, "src"]
        archive = subprocess.run(argv, capture_output=True, check=False)
        if archive.returncode:
            said = archive.stderr.decode("utf-8", "replace").strip()
            raise NotFoundError(f"the repository here does not have {COMMIT}: {said}")
        part = tree.with_name(f".{tree.name}.part")
        part.mkdir(parents=True, exist_ok=True)
        subprocess.run(["tar", "-x", "-C", str(part)], input=archive.stdout, check=True)
        part.rename(tree)
    return tree / "src"


def pack(workshop: Workshop, out: Path, *, level: int, bare: Path | None = None) -> Path:
    """Pack the first version's initrd, for the same kernel and key; `bare` gets one without the agent.

    Raises:
        NotFoundError: see `source`.
    """
    tree = source()
    argv = [sys.executable, "-c", _PACK, str(tree)]
    argv += [which("busybox", package="busybox-static"), str(workshop.kernel().modules.absolute())]
    argv += [workshop.key().public.dump(), str(level), str(out), str(bare or "")]
    # Its own code, with the packages of third parties that we have.
    subprocess.run(argv, check=True, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)})
    return out
