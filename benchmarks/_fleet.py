"""A fleet of real agents, each a plain process of this machine, in real time; its operator may be one too, to be killed.

`python benchmarks/_fleet.py FILE` is that operator: it deploys what the file says, and prints each fact as a line.
Real are the agent, SigV4 on both sides, HAProxy's checks, the operator; machines share one network and have no kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import calve
from calve.aws.refreshes import ACTIVE
from calve.aws.session import Session
from calve.boot.policy import Policy
from calve.cache import manifest as manifests
from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.clock import SYSTEM
from calve.contract import evidence
from calve.contract.abi import Abi, Bootspec, Wanted
from calve.contract.health import Health as StageHealth
from calve.demo.group import Place as FleetPlace
from calve.demo.group import create
from calve.demo.imports import add_tree, temporary
from calve.errors import CalveError, DeadlineError
from calve.fleet import ends
from calve.fleet import release as releases
from calve.fleet.config import Delivery, Fleet, Health
from calve.fleet.config import Rollout as Bounds
from calve.fleet.release import Content
from calve.fleet.verdict import Outcome, Verdict
from calve.infra.policies import policy
from calve.infra.roles import Role
from calve.infra.scope import Scope
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.process import Process
from calve.progress import Event, Fact
from calve.region.access import Access, Call
from calve.region.balancer import HaProxy
from calve.region.cloud import Cloud
from calve.region.group import Rules
from calve.region.imds import Imds, Instance
from calve.region.machine import Launch
from calve.region.message import Request, Response
from calve.region.names import ACCOUNT
from calve.region.objects import ObjectService
from calve.region.processes import Place, ProcessMachines
from calve.region.server import Server
from calve.region.signature import Identity, Principals, allowed
from calve.rollout.deploy import begun
from calve.rollout.guard import Guard
from calve.rollout.observe import Gateways
from calve.rollout.run import Host
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client

REGION: Final = "eu-central-1"
NAME: Final = "web"
CONSOLE_LAG_S: Final = 30.0
LOOK_S: Final = 0.05
_BUCKET: Final = "fleet"
_IMAGE: Final = "ami-0123456789abcdef0"
_ROLE: Final = "machine"
_WITHIN_S: Final = 180.0
_SOURCE: Final = Path(calve.__file__).parent.parent
_FLEET: Final = Fleet(
    NAME, "./result", Delivery.INITRD, NAME, Health("/healthz", None, 120), Bounds(100, 125, 0)
)


def room() -> Path | None:
    """Return where directories of machines belong: in memory where that can be; None is the usual place.

    Each agent has the disk take what it wrote, as a machine with a disk of its own does: here all would share one.
    """
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else None


def until(done: Callable[[], bool], what: str) -> None:
    """Wait until something is so; DeadlineError where it does not come to that."""
    end = time.monotonic() + _WITHIN_S
    while not done():
        if time.monotonic() > end:
            raise DeadlineError(f"{_WITHIN_S:.0f} s are too short for {what}")
        time.sleep(LOOK_S)


# The operator


@dataclass(frozen=True, slots=True)
class Operator:
    """Who deploys: where the services are, the bucket as a binary cache, and the keys that sign requests to both."""

    api: str
    cache: str
    access_key: str
    secret_key: str

    @contextlib.contextmanager
    def gateways(self) -> Iterator[Gateways]:
        """Open AWS and the bucket while the block lasts."""
        keys = Credentials(self.access_key, self.secret_key)
        session = Session(REGION, self.api, credentials=keys)
        with Client() as client:
            yield Gateways.of(session, open_objects(self.cache, client, Static(keys)))

    def deploy(self, closure: Content, gateways: Gateways, host: Host) -> Verdict:
        """Put a closure on the fleet, as `calve deploy` does once it is pushed."""
        with begun(closure, _FLEET, gateways, host, cache=self.cache) as rollout:
            verdict = rollout.run()
        if verdict is None:
            raise CalveError("the rollout has no verdict")
        return verdict


def main() -> None:
    """Be the operator that a file describes."""
    told = json.loads(Path(sys.argv[1]).read_text())
    operator, closure = Operator(**told["operator"]), Content(**told["closure"])
    with operator.gateways() as gateways:
        operator.deploy(closure, gateways, Host(progress=_tell))


def _tell(event: Event) -> None:
    if isinstance(event, Fact):
        print(json.dumps({"event": event.kind, **event.fields}), flush=True)


# The region


class Agents:
    """A group of machines on release 1, all in service, once the block begins.

    Args:
        directory: of its own; see `room`.
        size: how many machines.

    Attributes:
        asked: what the operator asked of all services but S3: when, monotonic seconds, and the action.
        gets: how many GETs it sent to S3.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._size = size
        self._key = SecretKey.generate("fleet-1")
        self._principals = Principals()
        self._access = Access(self._principals, region=REGION)
        self._objects = ObjectService(directory / "s3", self._principals, region=REGION)
        self._objects.add_bucket(_BUCKET)
        self._machines = ProcessMachines(
            directory / "machines",
            self._metadata,
            self._boot,
            self._system,
            env={"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(_SOURCE)},
        )
        self._balancer = HaProxy(directory=directory)
        self.cloud = Cloud(
            self._machines,
            self._balancer,
            region=REGION,
            authenticate=self._check,
            rules=Rules(launch_parallelism=None),
            console_lag_s=CONSOLE_LAG_S,
        )
        self.asked: list[tuple[float, str]] = []
        self.gets = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as owner:
            self._store = owner.enter_context(LocalStore(self._directory / "store", create=True))
            s3 = owner.enter_context(Server(self._answer, name="s3"))
            owner.callback(self._machines.close)
            owner.enter_context(self._balancer)
            owner.enter_context(self.cloud)
            api = owner.enter_context(Server(self.cloud.handle, name="aws"))
            key = self._principals.add_user("operator")
            cache = f"s3://{_BUCKET}?region={REGION}&endpoint={quote(s3.url, safe='')}"
            self.operator = Operator(api.url, cache, key.access_key, key.secret_key)
            self.gateways = owner.enter_context(self.operator.gateways())
            self._allow()
            self._create()
            until(lambda: len(self.serving()) == self._size, "the fleet to come up")
            self._owner = owner.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._owner.close()

    def _allow(self) -> None:
        scope = Scope(account=ACCOUNT, region=REGION, bucket=_BUCKET, group=NAME)
        self._principals.set_policy(_ROLE, allowed(policy(Role.MACHINE, scope).document))

    def _create(self) -> None:
        """Make release 1 and the group that runs it."""
        self.cloud.add_image(_IMAGE, "base")
        reports = f"boot-reports/{self._principals.role_id(_ROLE)}"
        size = (self._size, self._size, 2 * self._size)
        place = FleetPlace(
            self.operator.cache, reports, _IMAGE, f"{REGION}a", size, api=self.operator.api
        )
        now = SYSTEM.now()
        create(self.gateways, _FLEET, self.good(1), place, now=now)
        ends.write(self.gateways.objects, Verdict(NAME, 1, Outcome.RELEASED, "", "cli", now))

    def _answer(self, request: Request) -> Response:
        mine = f"Credential={self.operator.access_key}/"
        if request.method == "GET" and mine in request.headers.get("authorization", ""):
            self.gets += 1
        return self._objects.handle(request)

    def _check(self, request: Request, call: Call) -> Identity:
        identity = self._access.check(request, call)
        if identity.principal == "operator":
            self.asked.append((time.monotonic(), call.action))
        return identity

    # Machines

    def _metadata(self, launch: Launch) -> Server:
        expires = SYSTEM.now() + dt.timedelta(hours=6)
        session = self._principals.add_session(_ROLE, launch.instance_id, expires)
        instance = Instance(
            launch.instance_id,
            REGION,
            f"{REGION}a",
            "10.0.2.15",
            role=_ROLE,
            user_data=lambda: launch.user_data,
            credentials=lambda: session,
        )
        return Server(Imds(instance).handle, name=launch.instance_id)

    def _boot(self, place: Place) -> list[str | Path]:
        root, policy, line = (place.folder / name for name in ("root", "policy.json", "cmdline"))
        root.mkdir(exist_ok=True)
        keys = (self._key.public.dump(),)
        made = Policy(keys=keys, root=root, imds=place.metadata, run=place.folder / "run")
        policy.write_bytes(made.dump())
        line.write_text("console=ttyS0 root=/dev/vda\n")
        return [sys.executable, "-B", "-m", "calve.boot.main", policy, line]

    @staticmethod
    def _system(place: Place) -> list[str | Path]:
        run, health, root = (place.folder / name for name in ("run", "health.json", "root"))
        health.write_bytes(StageHealth().dump_file())
        return [sys.executable, "-B", "-m", "calve.health.main", run, health, root]

    # What is seen without a lag or a request

    def serving(self) -> list[str]:
        """Return the machines that the balancer finds healthy."""
        (group,) = self.cloud.elb.groups.values()
        return [one for one, target in list(group.targets.items()) if target.state == "healthy"]

    def newer(self) -> list[str]:
        """Return the machines of releases after the first, those that are gone too."""
        found = list(self.cloud.ec2.instances.items())
        return [one for one, it in found if it.tags["aws:ec2launchtemplate:version"] != "1"]

    def failure(self, instance: str) -> dict[str, Any] | None:
        """Return the fields of a machine's failure, as its console has it now; None where it has none."""
        events = evidence.read(self._machines.console(instance).decode("utf-8", "replace"))
        return next((dict(one.fields) for one in events if one.kind == "fail"), None)

    def is_settled(self, members: set[str]) -> bool:
        """Say whether these are the whole group, all of them in service and healthy, and no refresh goes on."""
        group = self.cloud.autoscaling.groups[NAME]
        there = {one for one, it in group.instances.items() if it.lifecycle.value == "InService"}
        ended = not group.refreshes or group.refreshes[-1].status.value not in ACTIVE
        return ended and there == set(group.instances) == members == set(self.serving())

    def good(self, number: int) -> Content:
        """Push a system: four store paths, two of them its own."""
        store, chance = self._store, random.Random(1)
        with temporary(store) as work:
            kernel = _add(store, work, "kernel", {"bzImage": chance.randbytes(300_000)})
            app = _add(store, work, "app", {"app": chance.randbytes(700_000)})
            www = _add(store, work, f"www-{number}", {"index.html": b"release %d" % number})
            image = f"{kernel}/bzImage"
            offers = Abi("0", kernel_release=os.uname().release, health_units=("calve.service",))
            spec = Bootspec(image, image, ("quiet",), "/init", "/x", "x")
            files: dict[str, bytes | Path] = {"kernel": Path(image), "init": b"#!/bin/sh\n"}
            files["boot.json"] = Wanted(spec, offers).dump()
            top = _add(store, work, f"nixos-system-web-{number}", files, (kernel, app, www))
        pushed = push(store, [top], self.gateways.objects, self._key)
        return Content(str(top), pushed.manifests[top], (self._key.name,))

    def bad(self, number: int) -> Content:
        """Push a system, and lose a NAR that its manifest goes on to name."""
        closure, objects = self.good(number), self.gateways.objects
        entries = manifests.read(objects, closure.manifest).paths
        (lost,) = (one.url for one in entries if one.info.path.name == f"www-{number}")
        objects.delete(lost)
        return closure

    def deploy_and_die(self, closure: Content) -> int | None:
        """Deploy from a process that is killed once the refresh has begun; return its exit status."""
        told = self._directory / "operator.json"
        operator, asked = dataclasses.asdict(self.operator), dataclasses.asdict(closure)
        told.write_text(json.dumps({"operator": operator, "closure": asked}))
        env = {**os.environ, "PYTHONPATH": str(_SOURCE)}
        argv: list[str | Path] = [sys.executable, "-B", Path(__file__), told]
        with Process(argv, stdout="pipe", stderr=2, env=env) as child:
            lines = child.stdout or ()
            if not any(json.loads(line)["event"] == "refresh" for line in lines):
                raise CalveError("the deploy ended before its refresh began")
            child.signal(signal.SIGKILL)
            return child.wait()

    def guard(self, host: Host) -> Verdict:
        """Guard the fleet from this process, until nothing is being rolled out."""
        objects = self.gateways.objects
        Guard(_FLEET, self.gateways, host).run(once=True)
        verdict = ends.read(objects, NAME, releases.listed(objects, NAME).latest)
        if verdict is None:
            raise CalveError("the guard has no verdict")
        return verdict


def _add(
    store: LocalStore,
    work: Path,
    name: str,
    files: dict[str, bytes | Path],
    references: tuple[StorePath, ...] = (),
) -> StorePath:
    """Add a directory of files and links."""
    tree = work / name
    tree.mkdir()
    for inner, content in files.items():
        if isinstance(content, Path):
            (tree / inner).symlink_to(content)
        else:
            (tree / inner).write_bytes(content)
            (tree / inner).chmod(0o755 if inner == "init" else 0o644)
    return add_tree(store, tree, name, references)


if __name__ == "__main__":
    main()
