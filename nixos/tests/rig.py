"""Boot NixOS in the simulated region, as tests/vm boots the demo's systems; exit 1 where something is not as it must be.

Usage: python3 rig.py PLAN, a JSON object: `kernel`, `initrd`, `command_line`, `systems` (two releases' toplevels) and
`registration` (of both closures, as nixpkgs' closureInfo writes it). `store` says where /nix/store lies, if elsewhere.
"""

# ruff: noqa: D102, D103, INP001, T201

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.contract import evidence
from calve.contract.userdata import UserData
from calve.demo.world import World
from calve.disk import ext4
from calve.nix import registration
from calve.nix.closure import closure
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.storepath import StorePath
from calve.region.machine import Launch
from calve.region.qemu import MachineImage
from calve.transport.http import Client

KEY = SecretKey.generate("nixos-test-1", random=bytes)  # 32 zeros: it signs nothing but tests
DISK_BYTES = 4 << 30
WITHIN_S = 1200  # NixOS under software emulation, on a slow builder


class RigError(Exception):
    """Something is not as it must be."""


class Closures:
    """The store that Nix has built the systems into, by its registration; what `push` reads."""

    def __init__(self, file: Path, store: Path) -> None:
        self._infos = {info.path: info for info in registration.parse(file.read_bytes(), file)}
        self._store = store

    def closure(self, roots: Iterable[StorePath]) -> list[PathInfo]:
        return closure(roots, self._infos.__getitem__)

    def real(self, path: StorePath) -> Path:
        return self._store / path.basename


class Rig:
    """A region and the plan's machines in it."""

    def __init__(self, plan: dict, world: World, work: Path) -> None:
        self.plan = plan
        self.world = world
        self.work = work
        self.systems = [StorePath.parse(text) for text in plan["systems"]]
        self.empty = work / "empty.raw"
        ext4.make(self.empty, DISK_BYTES)
        client = Client(context=None, cancel=None)
        cache = open_objects(world.operator_cache, client, world.operator_credentials)
        store = Closures(Path(plan["registration"]), Path(plan.get("store", "/nix/store")))
        self.manifests = push(store, self.systems, cache, KEY).manifests
        client.close()
        self.count = 0

    def user_data(self, release: int, keys: tuple[str, ...] = (KEY.name,)) -> bytes:
        system = self.systems[release - 1]
        caches = (self.world.machine_cache,)
        manifest = self.manifests[system]
        return UserData(str(system), caches, manifest, keys, fleet="web", release=release).dump()

    @contextlib.contextmanager
    def boot(self, user_data: bytes, disk: Path | None = None) -> Iterator[Boot]:
        self.count += 1
        name = f"i-{self.count:017x}"
        files = [Path(self.plan[key]) for key in ("kernel", "initrd")]
        image = MachineImage(*files, self.plan["command_line"], disk or self.empty)
        self.world.machines.images[name] = image
        self.world.machines.launch(Launch(name, name, "t3.nano", user_data))
        boot = Boot(self.world, name)
        try:
            yield boot
        except RigError:
            print(boot.console[-20_000:], file=sys.stderr)
            raise
        finally:
            self.world.machines.terminate(name)

    def disk(self, boot: Boot) -> Path:
        return self.work / "world" / "machines" / boot.name / "disk.raw"


class Boot:
    """What one machine said and served."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name

    @property
    def console(self) -> str:
        return self.world.machines.console(self.name).decode("utf-8", "replace")

    def event(self, kind: str) -> dict:
        found = [event.fields for event in evidence.read(self.console) if event.kind == kind]
        check(found, f"no {kind} in the evidence")
        return found[-1]

    def running(self) -> bool:
        return self.world.machines.running(self.name)

    def get(self, path: str) -> str:
        end = time.monotonic() + WITHIN_S
        while time.monotonic() < end:
            check(self.running(), f"the machine ended before it served {path}")
            connection = http.client.HTTPConnection(
                *self.world.machines.address(self.name), timeout=10
            )
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                body = answer.read().decode()
                check(answer.status == 200, f"{path}: {answer.status}")
                return body
            except (OSError, http.client.HTTPException):
                time.sleep(0.5)
            finally:
                connection.close()
        raise RigError(f"no answer for {path}")

    def failure(self) -> str:
        """Wait for the power-off; return the code of the last failure."""
        end = time.monotonic() + WITHIN_S
        while self.running():
            check(time.monotonic() < end, "it does not power off")
            time.sleep(0.5)
        return self.event("fail")["code"]

    def requests(self) -> int:
        calls = self.world.objects.calls
        return sum(call.principal.endswith(self.name) for call in calls)


def check(truth: object, otherwise: str) -> None:
    if not truth:
        raise RigError(otherwise)


def pulls_and_serves(rig: Rig) -> Path:
    """An empty disk comes up as release 1, within a t3.nano's memory; its disk is what the next ones start from."""
    with rig.boot(rig.user_data(1)) as boot:
        check("release 1" in boot.get("/"), "another release's page")
        boot.get("/healthz")
        ready = boot.event("ready")
        check(ready["system"] == str(rig.systems[0]), "another system")
        check(ready["paths"] > 100, "hardly anything was pulled")
        check(ready["lowest_available_mb"] >= 250, f"memory: {ready['lowest_available_mb']} MB")
    return rig.disk(boot)


def pulls_the_difference(rig: Rig, disk: Path) -> Path:
    """Release 2 on the disk of release 1 fetches what differs."""
    with rig.boot(rig.user_data(2), disk) as boot:
        check("release 2" in boot.get("/"), "another release's page")
        ready = boot.event("ready")
        check(0 < ready["paths"] < 40, f"{ready['paths']} paths")
        check(ready["generation"] == 2, f"generation {ready['generation']}")
    return rig.disk(boot)


def asks_nothing_twice(rig: Rig, disk: Path) -> None:
    """A reboot asks the metadata service and nothing else."""
    with rig.boot(rig.user_data(2), disk) as boot:
        check("release 2" in boot.get("/"), "another release's page")
        check(boot.event("ready")["paths"] == 0, "it fetched again")
        check(boot.requests() == 0, "it asked the bucket")


def refuses(rig: Rig) -> None:
    """What cannot be used ends in one line and a power-off."""
    with rig.boot(b"#!/bin/sh\necho hello\n") as boot:
        check(boot.failure() == "userdata-foreign", "another code")
    with rig.boot(rig.user_data(1, keys=("other-1",))) as boot:
        check(boot.failure() == "key-unknown", "another code")


def main(arguments: list[str]) -> int:
    plan = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="calve-") as name, World(Path(name) / "world") as world:
        rig = Rig(plan, world, Path(name))
        try:
            disk = pulls_and_serves(rig)
            print("pulls and serves: ok", flush=True)
            disk = pulls_the_difference(rig, disk)
            print("pulls the difference: ok", flush=True)
            asks_nothing_twice(rig, disk)
            print("asks nothing twice: ok", flush=True)
            refuses(rig)
            print("refuses: ok", flush=True)
        except RigError as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
