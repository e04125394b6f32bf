"""A store that the agent wrote, in the hands of the real Nix: loaded, verified, collected, added to, booted again."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
from pathlib import Path

import pytest

from calve.boot import served
from calve.boot.agent import Agent
from calve.boot.console import Console
from calve.boot.policy import Policy
from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.contract import evidence
from calve.contract.userdata import UserData
from calve.nix import nar, narwriter
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath, fixed_output
from calve.region.imds import Imds, Instance
from calve.region.server import Server
from calve.transport.http import Client


@dataclasses.dataclass
class System:
    toplevel: StorePath
    own: StorePath
    manifest: str
    paths: list[PathInfo]


class Operator:
    """A store of content-addressed paths, and the cache that it is pushed to."""

    def __init__(self, directory: Path) -> None:
        self.store = LocalStore(directory / "store", create=True)
        self.url = f"file://{directory}/cache"
        self.key = SecretKey.generate("test-1")
        self._work = directory / "work"

    def add(self, name: str, files: dict, *references: StorePath) -> StorePath:
        work = self._work / name
        for inner, content in files.items():
            place = work / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, StorePath):
                place.symlink_to(str(content))
            else:
                place.write_bytes(content)
                place.chmod(0o755 if inner == "init" else 0o644)
        out = io.BytesIO()
        size = narwriter.dump(work, out.write)
        nar_hash = Hash.sha256(out.getvalue())
        info = PathInfo(
            fixed_output(name, nar_hash, references), nar_hash, size, tuple(sorted(references))
        )
        out.seek(0)
        if self.store.missing([info.path]):
            self.store.stage(info, nar.read(out.read, limit=size))
            self.store.commit([info])
        return info.path

    def release(self, number: int) -> System:
        lib = self.add("lib", {"lib.so": b"lib" * 30_000})
        app = self.add("app", {"bin/app": f"{lib}/lib.so".encode() * 100, "bin/init": b"#!"}, lib)
        own = self.add(f"own-{number}", {"page": b"release %d" % number})
        top = self.add(
            f"system-{number}",
            {"init": f"#!{app}/bin/app\n".encode(), "sw": app, "www": own},
            app,
            own,
        )
        with Client() as client:
            objects = open_objects(self.url, client)
            pushed = push(self.store, [top], objects, self.key)
        return System(top, own, pushed.manifests[top], self.store.closure([top]))


class Machine:
    """A root directory on which the agent and Nix take turns."""

    def __init__(self, root: Path, operator: Operator, nix) -> None:
        self.root = root
        self.operator = operator
        self.nix = nix
        self.user_data = b""
        self.imds = Imds(Instance("i-1", "x", "xa", "10.0.0.1", user_data=lambda: self.user_data))
        self.server = Server(self.imds.handle)

    def boot(self, system: System, number: int) -> dict:
        """Run the agent; return the fields of its last line."""
        self.user_data = UserData(
            system=str(system.toplevel),
            caches=(self.operator.url,),
            manifest=system.manifest,
            keys=("test-1",),
            fleet="web",
            release=number,
        ).dump()
        out = io.StringIO()
        policy = Policy(
            (self.operator.key.public.dump(),),
            self.root,
            self.server.url,
            hold_s=0,
            run=self.root.parent / "run",
        )
        code = Agent(policy, Console(out)).run()
        events = {event.kind: event for event in evidence.read(out.getvalue())}
        assert code == 0, out.getvalue()
        return events["ready"].fields

    def stage_2(self) -> None:
        """Load the registration as `register-nix-paths.service` does."""
        place = self.root / "nix-path-registration"
        self.nix.run("nix-store", "--load-db", stdin=place.read_bytes())
        place.unlink()

    def all(self) -> list[str]:
        """Return Nix's valid paths, by its dump."""
        lines = self.nix.lines("nix-store", "--dump-db")
        found = []
        while lines:
            found.append(lines[0])
            lines = lines[5 + int(lines[4]) :]
        return found

    def collect(self) -> str:
        """Run `nix-collect-garbage -d` as root of this machine would: its profiles are below its own state."""
        env = self.nix.env | {"NIX_STATE_DIR": str(self.root / "nix/var/nix")}
        done = subprocess.run(
            ["nix-collect-garbage", "--store", f"local?root={self.root}", "-d"],
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr


@pytest.fixture
def operator(tmp_path):
    made = Operator(tmp_path / "operator")
    with made.store:
        yield made


@pytest.fixture
def machine(operator, nix):
    made = Machine(nix.root, operator, nix)
    with made.server:
        yield made


@pytest.fixture
def one(operator):
    return operator.release(1)


def names(system: System) -> set[str]:
    return {str(info.path) for info in system.paths}


def verify(nix):
    nix.run("nix-store", "--verify", "--check-contents")


def test_nix_accepts_what_the_agent_registered(machine, nix, one):
    machine.boot(one, 1)
    machine.stage_2()
    assert set(machine.all()) == names(one)
    verify(nix)
    for info in one.paths:
        assert nix.lines("nix-store", "--query", "--hash", str(info.path)) == [info.nar_hash.nix32]
        assert set(nix.lines("nix-store", "--query", "--references", str(info.path))) == {
            str(path) for path in info.references
        }
        dumped = nix.run("nix-store", "--dump", nix.real(str(info.path)), store=False)
        assert hashlib.sha256(dumped).digest() == info.nar_hash.digest


def test_a_second_boot_after_stage_2_fetches_nothing(machine, one):
    machine.boot(one, 1)
    machine.stage_2()
    ready = machine.boot(one, 1)
    assert (ready["paths"], ready["fetched_bytes"], ready["generation"]) == (0, 0, 1)


def test_an_update_after_stage_2_registers_all_of_it(machine, nix, operator, one):
    machine.boot(one, 1)
    machine.stage_2()
    two = operator.release(2)
    ready = machine.boot(two, 2)
    assert (ready["paths"], ready["generation"]) == (2, 2)
    machine.stage_2()
    assert set(machine.all()) == names(one) | names(two)
    verify(nix)


def test_collecting_garbage_keeps_the_running_system_and_the_last_good_one(
    machine, nix, operator, one
):
    two, three = operator.release(2), operator.release(3)
    for number, system in ((1, one), (2, two), (3, three)):
        machine.boot(system, number)
        machine.stage_2()
        if system is two:
            served.confirm(machine.root, two.toplevel)
    unrelated = nix.root / "unrelated"
    unrelated.write_text("nobody wants it")
    added = nix.lines("nix-store", "--add", unrelated)[0]
    assert added in machine.all()
    machine.collect()
    # Generations 1 and 2 are gone; 2 is rooted as the last good one.
    profiles = machine.root / "nix/var/nix/profiles"
    assert sorted(place.name for place in profiles.glob("system*")) == ["system", "system-3-link"]
    assert set(machine.all()) == names(two) | names(three)
    assert not nix.real(added).exists()
    assert not nix.real(str(one.own)).exists()
    verify(nix)
    ready = machine.boot(three, 3)
    assert (ready["fetched_bytes"], ready["paths"]) == (0, 0)
    # Back to the last good one, too, without a byte.
    ready = machine.boot(two, 2)
    assert (ready["fetched_bytes"], ready["generation"]) == (0, 4)
    # What was collected is fetched again.
    ready = machine.boot(one, 1)
    assert ready["paths"] == 2
    machine.stage_2()
    verify(nix)


def test_nix_can_add_to_it_and_the_agent_does_not_mind(machine, nix, one):
    machine.boot(one, 1)
    machine.stage_2()
    place = nix.root / "thing"
    place.mkdir()
    (place / "file").write_text("added by Nix")
    added = nix.lines("nix-store", "--add", place)[0]
    assert nix.real(added).is_dir()
    ready = machine.boot(one, 1)
    assert (ready["fetched_bytes"], ready["paths"]) == (0, 0)
    assert nix.real(added).is_dir()
    assert set(machine.all()) == names(one) | {added}
    verify(nix)


def test_a_path_that_nix_has_and_no_root_of_ours_reaches_is_recognised_by_its_hash(
    machine, nix, operator, one
):
    machine.boot(one, 1)
    machine.stage_2()
    two = operator.release(2)
    own = next(info for info in two.paths if info.path == two.own)
    work = nix.root / "own-2"
    work.mkdir()
    (work / "page").write_bytes(b"release 2")
    (work / "page").chmod(0o644)
    assert nix.lines("nix-store", "--add-fixed", "--recursive", "sha256", work) == [str(own.path)]
    # The agent never opens Nix's database: it hashes what nothing vouches for.
    assert machine.boot(two, 2)["paths"] == 1
    machine.stage_2()
    verify(nix)
    assert set(machine.all()) == names(one) | names(two)


def test_without_stage_2_nothing_is_lost(machine, nix, operator, one):
    """Boots whose registration nobody loads: the next one carries all of it."""
    for number, system in enumerate((one, operator.release(2), operator.release(3)), 1):
        machine.boot(system, number)
    machine.stage_2()
    assert len(machine.all()) == 2 + 3 * 2
    verify(nix)
    machine.collect()
    # None was ever judged good, so that only the one that is set now is kept.
    assert len(machine.all()) == 2 + 2
