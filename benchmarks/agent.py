"""The agent in a machine of 512 MB: memory with the webserver's closure and with a single file of 600 MB.

Figures are the machine's own evidence: the agent's peak resident memory (VmHWM) and the lowest MemAvailable that it
sampled. Beside them, what the agent adds to an initrd, packed as `calve image initrd` packs it.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

from benchmarks._rows import Row, finish
from calve.boot.policy import Policy
from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.contract import evidence
from calve.contract.userdata import UserData
from calve.demo.imports import add_tree
from calve.demo.system import Boot
from calve.demo.tiny import build_tiny
from calve.demo.workshop import Workshop
from calve.demo.world import COMMAND_LINE, World
from calve.disk import initrd, payload
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.process import which
from calve.region.machine import Launch
from calve.region.qemu import MachineImage
from calve.transport.http import Client

_FILE_BYTES = 600 << 20
_WITHIN_S = 600.0


def _big(store: LocalStore, workshop: Workshop, work: Path) -> StorePath:
    """Make a system with one file of 600 MB that does not compress."""
    tiny = build_tiny(store, workshop.packages, release=1, boot=Boot(workshop.kernel()))
    tree = work / "big"
    tree.mkdir()
    source = random.Random(3)
    with (tree / "file").open("wb") as file:
        for _ in range(_FILE_BYTES >> 20):
            file.write(source.randbytes(1 << 20))
    big = add_tree(store, tree, "big", [])
    top = work / "top"
    top.mkdir()
    (top / "init").symlink_to(f"{tiny}/init")
    (top / "big").symlink_to(str(big))
    return add_tree(store, top, "nixos-system-big-1", [tiny, big])


def _boot(
    world: World, workshop: Workshop, store: LocalStore, system: StorePath
) -> dict[str, float]:
    """Boot a machine until its system is committed; return the fields of its `ready` event and the pull's seconds."""
    client = Client(context=None, cancel=None)
    cache = open_objects(world.operator_cache, client, world.operator_credentials)
    pushed = push(store, [system], cache, workshop.key())
    client.close()
    data = UserData(
        system=str(system),
        caches=(world.machine_cache,),
        manifest=pushed.manifests[system],
        keys=(workshop.key().name,),
        fleet="bench",
        release=1,
    )
    name = f"i-{system.digest[:17]}"
    world.machines.images[name] = MachineImage(
        workshop.kernel().image, workshop.initrd(hold_s=1), COMMAND_LINE, workshop.disk(2 << 30)
    )
    world.machines.launch(Launch(name, name, "t3.nano", data.dump()))
    end = time.monotonic() + _WITHIN_S
    try:
        while time.monotonic() < end:
            events = list(evidence.read(world.machines.console(name).decode("utf-8", "replace")))
            for event in events:
                if event.kind == "fail":
                    raise SystemExit(f"the machine failed: {event.fields}")
                if event.kind == "ready":
                    start = {e.fields["n"]: e.at_s for e in events if e.kind == "phase"}
                    return {**event.fields, "pull_s": start["commit"] - start["pull"]}
            time.sleep(0.5)
    finally:
        world.machines.terminate(name)
    raise SystemExit(f"not ready within {_WITHIN_S:.0f} s")


def _initrd_rows(workshop: Workshop, work: Path) -> list[Row]:
    """Measure what the agent adds to an initrd: with it, less one with an empty payload."""
    agent = payload.build()
    sizes = []
    for number, part in enumerate(
        (agent, payload.Payload(agent.version, Path("/dev/null"), (), ()))
    ):
        spec = initrd.Initrd(
            Path(which("busybox")), workshop.kernel().modules, part, Policy(keys=()).dump()
        )
        sizes.append(initrd.write(spec, work / f"initrd-{number}").compressed_bytes)
    added = (sizes[0] - sizes[1]) / 1e6
    return [
        Row("initrd, whole", sizes[0] / 1e6, "MB"),
        Row("initrd, added by the agent", added, "MB", required="<= 10 MB", met=added <= 10),
    ]


def main() -> None:
    workshop = Workshop(Path(".calve/demo"))
    rows = []
    with tempfile.TemporaryDirectory(prefix="calve-bench-", dir=".calve") as name:
        work = Path(name).absolute()
        with World(work / "world") as world:
            with workshop.store() as store:
                system = workshop.system(store, "webserver", 1)
                figures = {"webserver": _boot(world, workshop, store, system)}
            with LocalStore(work / "store", create=True) as store:
                system = _big(store, workshop, work)
                figures["one file of 600 MB"] = _boot(world, workshop, store, system)
        for what, found in figures.items():
            peak, lowest = found["agent_peak_mb"], found["lowest_available_mb"]
            rows += [
                Row(f"{what}: agent's peak", peak, "MB", required="<= 48 MB", met=peak <= 48),
                Row(
                    f"{what}: lowest MemAvailable",
                    lowest,
                    "MB",
                    required=">= 300 MB",
                    met=lowest >= 300,
                ),
                Row(f"{what}: NAR", found["nar_bytes"] / 1e6, "MB"),
                Row(f"{what}: pull, emulated", found["pull_s"], "s"),
            ]
        rows += _initrd_rows(workshop, work)
        os.sync()
    finish("agent (512 MB machine under software emulation)", rows)


if __name__ == "__main__":
    main()
