"""The agent's part in stage 2, as a store path of the demo's systems: what the NixOS package is on NixOS.

Its libraries are the system's own: Debian's packages of the closure have them where the loader looks.
"""

from __future__ import annotations

from calve.contract.health import Health, Http
from calve.demo.imports import Importer, temporary
from calve.demo.index import Index
from calve.disk.payload import Payload
from calve.nix.storepath import StorePath

__all__ = ["HEALTH", "UNIT", "add_stage_2"]

UNIT = "calve-health.service"
HEALTH = Health(http=(Http("/healthz"),), units=("nginx.service",))


def add_stage_2(importer: Importer, index: Index, payload: Payload) -> StorePath:
    """Add the payload of `calve.health.main`, unless it is there; return its path.

    Args:
        importer: where to.
        index: knows what was added before.
        payload: what it is.
    """
    files = [payload.interpreter, *(module.origin for module in payload.modules)]
    parts = [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]

    def add() -> StorePath:
        with temporary(importer.store) as work:
            payload.write(work / "tree")
            return importer.add(work / "tree", "calve-stage-2")

    return index.once(importer, index.key(["stage-2", *parts]), add)
