"""A region's EBS and EC2 with disks to upload to it: what `test_upload` and `test_verify` share.

Loaded by the fixture `place` of conftest; run as a program it uploads one disk, for whoever wants to kill it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from calve.aws.ebs import EbsDirect
from calve.aws.images import Images
from calve.aws.session import Session
from calve.clock import SystemClock
from calve.disk.arch import X86_64
from calve.disk.disk import BLOCK_BYTES, Block, Disk
from calve.image.plan import Parent, plan
from calve.image.schedule import Limits
from calve.image.upload import Upload
from calve.image.verify import verify
from calve.region.blocks import Snapshots
from calve.region.cloud import Cloud
from calve.region.ebs import EbsService
from calve.region.server import Server
from calve.region.storage import Storage
from calve.tasks import Cancel
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client

REGION = "test-region"
LIMITS = Limits(
    begin=4, least=1, most=4, hedge_s=1e6
)  # a machine that stalls makes no second request
HURRIED = Limits(begin=4, least=1, most=4, hedge_s=10.0)
TAGS = {"Name": "calve-web", "calve:line": "web"}


class Hurry(SystemClock):
    """Time that passes twenty times as fast, for whoever waits by it."""

    TIMES = 20

    def monotonic(self):
        return time.monotonic() * self.TIMES

    def wait(self, event, seconds):
        return event.wait(seconds / self.TIMES)


class NoMachines:
    """EC2 without instances."""

    def console(self, _instance_id):
        return b""

    def running(self, _instance_id):
        return True

    def launch(self, _launch):
        pass

    def terminate(self, _instance_id):
        pass


class NoBalancer:
    """ELB without balancers."""

    def start(self, *_args):
        raise AssertionError


def content(seed):
    return (
        bytes(BLOCK_BYTES)
        if seed is None
        else hashlib.shake_128(f"{seed}".encode()).digest(BLOCK_BYTES)
    )


def disk_of(path, seeds, gib=1):
    """Write a sparse disk whose blocks are made of seeds (None is zeros); return its description."""
    blocks = []
    with path.open("wb") as file:
        file.truncate(gib << 30)
        for index, seed in sorted(seeds.items()):
            data = content(seed)
            file.seek(index * BLOCK_BYTES)
            file.write(data)
            blocks.append(Block(index, hashlib.sha256(data).hexdigest()))
    return Disk(X86_64, gib << 30, (), tuple(blocks))


class Place:
    """One region, and one disk at a time that is uploaded to it."""

    def __init__(self, directory, principals, key, faults, owner):
        self.directory = directory
        self.principals = principals
        self.key = key
        self.faults = faults
        """What the connection does wrong; `service.faults` is what EBS itself does."""
        self.snapshots = Snapshots(directory / "ebs", region=REGION, complete_s=0.05)
        self.service = EbsService(self.snapshots, principals)
        self.lock = threading.Condition()
        self.asked = []
        storage = owner.enter_context(Storage(REGION, self.snapshots))
        cloud = Cloud(NoMachines(), NoBalancer(), region=REGION, storage=storage)
        owner.enter_context(cloud)
        self.server = owner.enter_context(Server(self.service.handle, faults=self._seen))
        self.ec2_server = owner.enter_context(Server(cloud.handle))
        keys = Credentials(key.access_key, key.secret_key)
        self.ec2 = Images(Session(REGION, self.ec2_server.url, credentials=keys))
        owner.callback(self.ec2._client.close)
        self.client = owner.enter_context(Client())
        self.ebs = EbsDirect(self.client, REGION, Static(keys), endpoint=self.server.url)
        self.path = directory / "disk.raw"

    def _seen(self, request):
        with self.lock:
            self.asked.append((request.method, request.path))
            self.lock.notify_all()
        return self.faults(request)

    # What was asked

    def puts(self):
        """Return how often each block was sent."""
        with self.lock:
            return Counter(
                int(path.rpartition("/")[2]) for method, path in self.asked if method == "PUT"
            )

    def count(self, what):
        with self.lock:
            ends = {"start": "/snapshots", "complete": "/snapshots/completion/"}[what]
            exact = what == "start"
            return sum(
                method == "POST" and (path == ends if exact else path.startswith(ends))
                for method, path in self.asked
            )

    def quiet(self):
        """Wait until what an upload that was ended had sent is done with; one connection is kept, for what else is asked."""
        with socket.create_connection(
            ("127.0.0.1", self.server.port)
        ) as last:  # those before are accepted first
            last.sendall(b"GET / HTTP/1.1\r\nHost: region\r\nConnection: close\r\n\r\n")
            while last.recv(4096):
                pass
        end = time.monotonic() + 30
        while self.server.open_connections > 1 and time.monotonic() < end:
            time.sleep(0.005)
        assert self.server.open_connections <= 1

    def forget(self):
        self.quiet()
        with self.lock:
            self.asked.clear()

    # What is there

    def state(self, snapshot):
        return self.snapshots.find(snapshot).state.value

    def ids(self):
        return [one.id for one in self.snapshots.all()]

    def held(self, snapshot):
        """Return what a completed snapshot has: index and bytes."""
        found = {}
        for index, entry in self.snapshots.blocks(snapshot).items():
            with self.snapshots.blobs.open(entry.blob) as file:
                found[index] = file.read()
        return found

    # What is done

    def disk(self, seeds, gib=1):
        return disk_of(self.path, seeds, gib)

    def upload(self, disk, parent=None, **changes):
        options = {
            "ec2": self.ec2,
            "tags": TAGS,
            "description": "calve",
            "limits": LIMITS,
            "clock": Hurry(),
            "cancel": Cancel(),
        }
        plan_ = plan(disk, parent)
        options |= {"region": REGION, "path": self.path, "plan": plan_}
        return Upload(self.ebs, **(options | changes))

    @contextlib.contextmanager
    def patience(self, upload, seconds=60):
        """Cancel what hangs."""
        timer = threading.Timer(seconds, upload.cancel.cancel)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def run(self, disk, parent=None, **changes):
        upload = self.upload(disk, parent, **changes)
        with self.patience(upload):
            return upload.run()

    def parent(self, seeds):
        """Upload a disk; return it as a parent."""
        disk = self.disk(seeds)
        made = Parent(self.run(disk).id, disk)
        self.forget()
        return made

    def findings(self, snapshot, disk, parent=None, *, deep=False):
        """Verify; return which checks failed where."""
        found = verify(self.ebs, snapshot, plan(disk, parent), disk, deep=deep, cancel=Cancel())
        return [(one.check, one.place) for one in found.findings]


def main():
    """Upload one disk, as `argv[1]` says."""
    told = json.loads(sys.argv[1])
    disk = Disk.parse(Path(told["disk"]).read_bytes(), told["disk"])
    keys = Credentials(os.environ["KEY"], os.environ["SECRET"])
    with Client() as client:
        ebs = EbsDirect(client, REGION, Static(keys), endpoint=told["ebs"])
        ec2 = Images(Session(REGION, told["ec2"], credentials=keys))
        limits = Limits(begin=told["most"], most=told["most"])
        path = Path(told["path"])
        upload = Upload(ebs, ec2, REGION, path, plan(disk), TAGS, "calve", limits=limits)
        found = upload.run()
    sys.stdout.write(json.dumps([found.id, found.requests]))


if __name__ == "__main__":
    main()
