"""A region with real machines, for tests that boot: parts are made once and kept in .calve/demo, as the demo's are."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import itertools
import re
import tempfile
import time
from pathlib import Path

import pytest

from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.contract import evidence
from calve.contract.userdata import UserData
from calve.demo.workshop import Workshop
from calve.demo.world import COMMAND_LINE, ROLE, World
from calve.disk import ext4
from calve.image.seedtree import SeedTree
from calve.image.source import StoreSource
from calve.region.machine import Launch
from calve.region.qemu import MachineImage
from calve.region.signature import Allow
from calve.transport.http import Client

ROOT = Path(__file__).resolve().parents[2]
DISK_BYTES = 1 << 30


@dataclasses.dataclass
class Boot:
    """What a machine said and served; it may have ended."""

    rig: Rig
    name: str

    @property
    def disk(self):
        """Return its disk, which stays when it has ended."""
        return self.rig.disk_of(self.name)

    @property
    def console(self):
        return self.rig.world.machines.console(self.name).decode("utf-8", "replace")

    @property
    def events(self):
        return list(evidence.read(self.console))

    def event(self, kind):
        found = [event.fields for event in self.events if event.kind == kind]
        assert found, self.console[-3000:]
        return found[-1]

    def told(self, kind, within_s=200):
        """Wait for evidence of a kind; return the last's fields."""
        end = time.monotonic() + within_s
        while kind not in [event.kind for event in self.events]:
            assert self.rig.world.machines.running(self.name), self.console[-3000:]
            assert time.monotonic() < end, self.console[-3000:]
            time.sleep(0.2)
        return self.event(kind)

    def get(self, path="/", within_s=150):
        """Return the first answer's status and body."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            address = self.rig.world.machines.address(self.name)
            assert self.rig.world.machines.running(self.name), self.console[-3000:]
            connection = http.client.HTTPConnection(*address, timeout=5)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)
            finally:
                connection.close()
        raise AssertionError(f"no answer within {within_s} s: {self.console[-3000:]}")

    def ended(self, within_s=120):
        """Wait until it powered off; return its last evidence."""
        end = time.monotonic() + within_s
        while self.rig.world.machines.running(self.name):
            assert time.monotonic() < end, self.console[-3000:]
            time.sleep(0.2)
        return self.events[-1]


class Rig:
    """A region, a workshop, and a client for the cache."""

    def __init__(self, workshop, world, client, directory):
        self.directory = directory
        self.workshop = workshop
        self.world = world
        self.client = client
        self.cache = open_objects(world.operator_cache, client, world.operator_credentials)
        self.numbers = itertools.count(1)
        self.manifests = {}

    def release(self, system, number):
        """Build and push a release; return its toplevel."""
        with self.workshop.store() as store:
            path = self.workshop.system(store, system, number)
            if path not in self.manifests:
                pushed = push(store, [path], self.cache, self.workshop.key())
                self.manifests[path] = pushed.manifests[path]
        return path

    def seeded_disk(self):
        """Return a disk that has the webserver's first release already."""
        path = self.release("webserver", 1)
        disk = self.directory / f"seeded-{path.digest}.raw"
        if not disk.exists():
            with (
                tempfile.TemporaryDirectory(dir=self.directory) as name,
                self.workshop.store() as store,
            ):
                tree = Path(name, "tree")
                tree.mkdir(mode=0o755)
                with SeedTree(tree) as sink:
                    StoreSource(store).fill(sink, [path])
                ext4.make(disk, DISK_BYTES, tree=tree)
        return disk

    def disk_of(self, name):
        return self.world.machines._directory / name / "disk.raw"

    def user_data(self, path, **changes):
        data = UserData(
            system=str(path),
            caches=(self.world.machine_cache,),
            manifest=self.manifests[path],
            keys=(self.workshop.key().name,),
            fleet="web",
            release=1,
        )
        return dataclasses.replace(data, **changes).dump()

    def image(
        self,
        *,
        disk=None,
        command_line="",
        hold_s=1,
        ca_file=None,
        systemd=False,
        debug=False,
    ):
        return MachineImage(
            self.workshop.kernel().image,
            self.workshop.initrd(hold_s=hold_s, ca_file=ca_file, systemd=systemd, debug=debug),
            f"{COMMAND_LINE} {command_line}",
            disk or self.workshop.disk(DISK_BYTES),
        )

    @contextlib.contextmanager
    def boot(self, user_data, **image):
        """Boot a machine; it ends with the block."""
        name = f"i-{next(self.numbers):017x}"
        self.world.machines.images[name] = self.image(**image)
        self.world.machines.launch(Launch(name, name, "t3.nano", user_data))
        try:
            yield Boot(self, name)
        finally:
            self.world.machines.terminate(name)


@pytest.fixture(scope="session")
def workshop():
    return Workshop(ROOT / ".calve" / "demo")


@pytest.fixture(scope="session")
def rig(workshop, tmp_path_factory):
    # Sockets of QEMU and HAProxy have short names only; pytest's own folder is long.
    with World(tmp_path_factory.mktemp("world")) as world:
        # Rows of failures have groups of their own, whose names begin with it.
        own = [Allow(one.action, re.sub("/web$", "/web*", one.resource)) for one in world.policy]
        world.principals.set_policy(ROLE, own)
        client = Client(context=None, cancel=None)
        yield Rig(workshop, world, client, tmp_path_factory.mktemp("disks"))
        client.close()
