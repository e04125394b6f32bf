"""The show: the main job on one machine, from packages to an answer."""

from __future__ import annotations

import contextlib
import http.client
import tempfile
from pathlib import Path

from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.clock import SYSTEM
from calve.contract.userdata import UserData
from calve.demo.workshop import Workshop
from calve.demo.world import COMMAND_LINE, World
from calve.errors import CalveError, DeadlineError
from calve.progress import Note, Progress
from calve.region.machine import Launch
from calve.region.qemu import MachineImage
from calve.tasks import Cancel
from calve.transport.http import Client

__all__ = ["show"]

_BOOT_S = 180.0


def show(directory: Path, *, progress: Progress, cancel: Cancel) -> str:
    """Boot one machine that pulls its system; return the page that it serves."""
    workshop = Workshop(directory, progress=progress, cancel=cancel)
    with contextlib.ExitStack() as owner:
        store = owner.enter_context(workshop.store())
        system = workshop.system(store, "tiny", 1)
        image = MachineImage(
            workshop.kernel().image,
            workshop.initrd(hold_s=5),
            f"{COMMAND_LINE} quiet",
            workshop.disk(2 << 30),
        )
        work = owner.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=directory))
        world = owner.enter_context(World(Path(work)))
        client = Client(context=None, cancel=cancel)
        owner.callback(client.close)
        cache = open_objects(world.operator_cache, client, world.operator_credentials)
        pushed = push(store, [system], cache, workshop.key(), progress=progress, cancel=cancel)
        data = UserData(
            system=str(system),
            caches=(world.machine_cache,),
            manifest=pushed.manifests[system],
            keys=(workshop.key().name,),
            fleet="web",
            release=1,
        )
        world.add_image("ami-1", image)
        progress(Note("booting a machine"))
        world.machines.launch(Launch("i-1", "ami-1", "t3.nano", data.dump()))
        return _first_answer(world, "i-1", cancel)


def _first_answer(world: World, instance_id: str, cancel: Cancel) -> str:
    address = world.machines.address(instance_id)
    started = SYSTEM.monotonic()
    while address is not None and world.machines.running(instance_id):
        if SYSTEM.monotonic() - started > _BOOT_S:
            raise DeadlineError(f"{instance_id} did not answer within {_BOOT_S:.0f} s")
        connection = http.client.HTTPConnection(*address, timeout=2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read(4096).decode("utf-8", "replace").strip()
        except (OSError, http.client.HTTPException):
            cancel.wait(0.2)
        finally:
            connection.close()
    tail = world.machines.console(instance_id)[-2000:].decode("utf-8", "replace")
    raise CalveError(f"{instance_id} powered off:\n{tail}")
