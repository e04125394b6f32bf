"""A cloud (S3 and metadata of the region), a closure in it, and machines: the agent as a process on a directory."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import io
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

import calve
from calve.boot.policy import Policy
from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.contract import evidence
from calve.contract.abi import Abi, Bootspec, Wanted
from calve.contract.health import Health
from calve.contract.userdata import UserData
from calve.nix import nar, narwriter, staging
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import PathInfo
from calve.nix.signing import SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.region.imds import Imds, Instance
from calve.region.server import Server
from calve.region.signature import Allow
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client

BUCKET = "nix"
NOTHING = Health()
REGION = "test-region"
SOURCE = Path(calve.__file__).parent.parent

# What stands before the agent's own main, to end it at an instant or to have it write to the disk often.
DRIVER = """
import os, signal, sys
from calve.cache import pull
from calve.boot.main import main
pull._FLUSH_BYTES = int(os.environ["BATCH_BYTES"])
left = int(os.environ["EVENTS"])
run = os.path.dirname(os.environ["ROOT"]) + "/run"  # no disk: what is left to stage 2
names = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod", "os.utime"}
seen = 0
def hook(name, arguments):
    global seen
    if name in names and not str(arguments[0]).startswith(run) and (name != "open" or isinstance(arguments[2], int) and arguments[2] & 3):
        seen += 1
        if seen == left:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
try:
    code = main(sys.argv[1:])
finally:
    print("events", seen, flush=True)
sys.exit(code)
"""


def started(module: str, hasty: str) -> list[str]:
    """Return Python's arguments for a module, behind other Python where there is some."""
    if not hasty:
        return ["-m", module]
    return ["-c", f"import sys, {module} as program\n{hasty}\nsys.exit(program.main(sys.argv[1:]))"]


@contextlib.contextmanager
def serve(status=200, after=0):
    """A web server that answers so, from the request after `after` on; 503 before."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(status if len(seen) > after else 503)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], seen
    finally:
        server.shutdown()
        server.server_close()


@dataclasses.dataclass
class Release:
    """A system that was pushed: its toplevel, its paths by name, its manifest."""

    number: int
    system: StorePath
    paths: dict[str, PathInfo]
    manifest: str

    def names(self, *names: str) -> list[PathInfo]:
        return [self.paths[name] for name in names]


@dataclasses.dataclass
class Boot:
    """What one run of the agent said and did."""

    code: int
    stdout: str
    stderr: str
    gets: list[str]
    requests: int
    received: int

    @property
    def events(self) -> list[evidence.Evidence]:
        return list(evidence.read(self.stdout))

    @property
    def phases(self) -> list[str]:
        return [event.fields["n"] for event in self.events if event.kind == "phase"]

    @property
    def last(self) -> evidence.Evidence:
        return self.events[-1]

    def event(self, kind: str) -> evidence.Evidence:
        found = [event for event in self.events if event.kind == kind]
        assert len(found) == 1, self.stdout + self.stderr
        return found[0]

    @property
    def ready(self) -> dict:
        assert self.code == 0, self.stdout + self.stderr
        return self.event("ready").fields

    @property
    def fail(self) -> dict:
        """The failure: one line, the last one, and no other text than evidence."""
        assert self.code == 1, self.stdout + self.stderr
        assert self.last.kind == "fail", self.stdout
        assert self.event("fail") == self.last
        assert all(line.startswith(evidence.PREFIX) for line in self.stdout.splitlines()), (
            self.stdout
        )
        assert self.stderr == ""
        return self.last.fields

    @property
    def nars(self) -> int:
        return sum(key.startswith("nar/") for key in self.gets)


class Cloud:
    """S3 and what is in it; `hook` is called ahead of each request to S3."""

    def __init__(self, service, principals, admin, clock, faults, directory: Path) -> None:
        self.service = service
        self.principals = principals
        self.clock = clock
        self.faults = faults
        self.hook = lambda _request: None
        self.key = SecretKey.generate("test-1")
        self.server = Server(self._handle, faults=faults, clock=clock)
        self.store = LocalStore(directory / "store", create=True)
        self._work = directory / "work"
        self._staged: list[PathInfo] = []
        self._admin = Static(Credentials(admin.access_key, admin.secret_key))
        arn = f"arn:aws:s3:::{BUCKET}"
        principals.set_policy(
            "machine",
            [
                Allow("s3:GetObject", f"{arn}/*"),
                Allow("s3:ListBucket", arn),
                Allow("s3:PutObject", f"{arn}/boot-reports/${{aws:userid}}/*"),
            ],
        )

    def _handle(self, request):
        self.hook(request)
        return self.service.handle(request)

    @property
    def cache(self) -> str:
        return self.cache_in(BUCKET)

    def cache_in(self, bucket: str) -> str:
        return f"s3://{bucket}?region={REGION}&endpoint={quote(self.server.url, safe='')}"

    def add(self, name: str, files: dict, references=(), *, of: str = "") -> PathInfo:
        """Put a path into the store: files' contents, None for a directory, a path for a link."""
        digest = hashlib.sha256(f"{name} {of}".encode()).digest()[:20]
        path = StorePath(encode32(digest), name)
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        for inner, content in files.items():
            place = self._work / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                place.symlink_to(content)
            else:
                place.write_bytes(content)
                place.chmod(0o755 if inner.startswith(("bin/", "init")) else 0o644)
        out = io.BytesIO()
        size = narwriter.dump(self._work, out.write)
        names = tuple(sorted(path if one == "self" else one.path for one in references))
        info = PathInfo(path, Hash.sha256(out.getvalue()), size, names)
        out.seek(0)
        if self.store.missing([path]) and info not in self._staged:
            self.store.stage(info, nar.read(out.read, limit=size))
            self._staged.append(info)
        return info

    def release(
        self,
        number: int,
        *,
        init: bool = True,
        key: SecretKey | None = None,
        health_units: tuple[str, ...] = (),
    ) -> Release:
        """Make a system of six paths, one of them the release's own beside the toplevel, and push it.

        With `health_units` it has a boot.json that names them.
        """
        rng = random.Random(1)
        lib = self.add("lib", {"lib/lib.so": rng.randbytes(200_000), "lib/empty": b""})
        app = self.add("app", {"bin/app": rng.randbytes(700_000)}, [lib, "self"])
        text = self.add("text", {f"share/doc/{n}": b"word " * n * 99 for n in range(40)})
        kernel = self.add("kernel", {"bzImage": rng.randbytes(300_000)})
        www = self.add(
            "www",
            {"index.html": b"release %d" % number, "pad": rng.randbytes(50_000)},
            of=str(number),
        )
        files = {
            "kernel": Path(f"{kernel.path}/bzImage"),
            "sw": Path(str(app.path)),
            "etc/www": Path(str(www.path)),
            "nixos-version": b"%d" % number,
        }
        if init:
            files["init"] = b"#!/bin/sh\nexec %s/bin/app\n" % str(app.path).encode()
        if health_units:
            place = f"{kernel.path}/bzImage"
            offers = Abi("0", kernel_release=os.uname().release, health_units=health_units)
            spec = Bootspec(place, place, ("quiet",), "/init", "/x", "x")
            files["boot.json"] = Wanted(spec, offers).dump()
        system = self.add(
            f"system-{number}" + ("" if init else "-no-init"), files, [app, text, kernel, www]
        )
        made = {info.path.name: info for info in (lib, app, text, kernel, www)}
        digest = self.push(system.path, key or self.key)
        return Release(number, system.path, made | {"system": system}, digest)

    @contextlib.contextmanager
    def objects(self):
        with Client() as client:
            yield open_objects(self.cache, client, self._admin)

    def push(self, path: StorePath, key: SecretKey) -> str:
        self.store.commit(self._staged)
        self._staged.clear()
        with self.objects() as objects:
            return push(self.store, [path], objects, key).manifests[path]

    def settle(self) -> None:
        """Wait until what a killed machine had asked for is answered, and so counted."""
        # Connections are accepted in their order: once ours is over, those before it are open, or over too.
        with (
            contextlib.suppress(ConnectionRefusedError),  # a server that was closed
            socket.create_connection(("127.0.0.1", self.server.port), timeout=20) as probe,
        ):
            probe.shutdown(socket.SHUT_WR)
            while probe.recv(65536):
                pass
        deadline = time.monotonic() + 20
        while self.server._listener._open and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not self.server._listener._open

    def counts(self) -> tuple[list[str], int, int]:
        """Return the keys that machines got, how many requests machines made, and bytes of objects sent."""
        calls = [call for call in self.service.calls if call.principal.startswith("machine/")]
        gets = [call.key for call in calls if call.method == "GET"]
        sent = sum(n for who, n in self.service.sent_bytes.items() if who.startswith("machine/"))
        return gets, len(calls), sent


class Machine:
    """A root directory, a metadata service, and the agent run as a process."""

    def __init__(self, cloud: Cloud, directory: Path, name: str = "i-1") -> None:
        self.cloud = cloud
        self.name = name
        self.root = directory / "root"
        self.root.mkdir(parents=True)
        self.directory = directory
        self.user_data: bytes | None = None
        self.wanted = ""
        self.session = self.new_session()
        self.imds = Imds(
            Instance(
                name,
                REGION,
                f"{REGION}a",
                "10.0.2.15",
                role="machine",
                user_data=lambda: self.user_data,
                credentials=lambda: self.session,
            )
        )
        self.faults = type(cloud.faults)()
        self.server = Server(self.imds.handle, faults=self.faults)
        self.keys = (cloud.key.public.dump(),)
        self.memory_mb = 48
        self.rules: dict = {}
        self.line = ""

    def new_session(self):
        expires = self.cloud.clock.now() + dt.timedelta(hours=6)
        return self.cloud.principals.add_session("machine", self.name, expires)

    def wants(self, release: Release, **changes) -> None:
        """Set user data."""
        made = UserData(
            system=str(release.system),
            caches=(self.cloud.cache,),
            manifest=release.manifest,
            keys=("test-1",),
            fleet="web",
            release=release.number,
            deadline_s=60,
        )
        self.wanted = str(release.system)
        self.user_data = dataclasses.replace(made, **changes).dump()

    @property
    def reports(self) -> str:
        """Return where machines of this role may write."""
        return f"boot-reports/{self.session.identity.user_id.partition(':')[0]}"

    def policy(self) -> Path:
        place = self.directory / "policy.json"
        policy = Policy(
            keys=self.keys,
            root=self.root,
            imds=self.server.url,
            hold_s=99.0,
            memory_mb=self.memory_mb,
            run=self.directory / "run",
            **self.rules,
        )
        place.write_bytes(policy.dump())
        return place

    def command(self) -> list[str]:
        line = self.directory / "cmdline"
        line.write_text(f"console=ttyS0 root=/dev/vda calve.hold=0 {self.line}\n")
        return [str(self.policy()), str(line)]

    def start(
        self, *, driver: bool = False, batch: int = 128 << 20, events: int = 0, hasty: str = ""
    ):
        """Start the agent; `hasty` is Python that runs ahead of it, to have it wait less."""
        program = ["-c", DRIVER] if driver else started("calve.boot.main", hasty)
        return subprocess.Popen(
            [sys.executable, "-B", *program, *self.command()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(SOURCE),
                "BATCH_BYTES": str(batch),
                "EVENTS": str(events),
                "ROOT": str(self.root),
            },
        )

    def boot(self, **options) -> Boot:
        """Run the agent to its end."""
        self.cloud.settle()
        gets, requests, sent = self.cloud.counts()
        with self.start(**options) as process:
            out, err = process.communicate(timeout=120)
        self.cloud.settle()
        gets_now, requests_now, sent_now = self.cloud.counts()
        return Boot(
            process.returncode,
            out.decode(),
            err.decode(),
            gets_now[len(gets) :],
            requests_now - requests,
            sent_now - sent,
        )

    def stage_2(
        self, health: Health = NOTHING, *, program: Path | None = None, hasty: str = ""
    ) -> Boot:
        """Run the agent's part in stage 2 to its end, as after a hand-off; `program` stands for systemctl."""
        place = self.directory / "health.json"
        place.write_bytes(health.dump_file())
        path = os.environ["PATH"] if program is None else f"{program}:{os.environ['PATH']}"
        done = subprocess.run(
            [
                sys.executable,
                "-B",
                *started("calve.health.main", hasty),
                self.directory / "run",
                place,
                self.root,
            ],
            capture_output=True,
            env={"PATH": path, "PYTHONPATH": str(SOURCE)},
            timeout=120,
            check=False,
        )
        return Boot(done.returncode, done.stdout.decode(), done.stderr.decode(), [], 0, 0)

    # What is on the disk, read without the agent's code

    @property
    def store(self) -> Path:
        return self.root / "nix/store"

    def real(self, path: StorePath) -> Path:
        return self.store / path.basename

    def profile(self) -> str | None:
        link = self.root / "nix/var/nix/profiles/system"
        if not link.is_symlink():
            return None
        return os.readlink(link.parent / os.readlink(link))

    def generations(self) -> dict[str, str]:
        profiles = self.root / "nix/var/nix/profiles"
        return {link.name: os.readlink(link) for link in sorted(profiles.glob("system*"))}

    def last_good(self) -> str | None:
        link = self.root / "nix/var/nix/gcroots/calve/last-good"
        return os.readlink(link) if link.is_symlink() else None

    def registered(self) -> dict[str, tuple[str, int, list[str]]]:
        """Read /nix-path-registration: hash, size and references by path."""
        place = self.root / "nix-path-registration"
        lines = place.read_text().split("\n") if place.exists() else [""]
        found = {}
        while len(lines) > 1:
            path, digest, size, _deriver, count = lines[:5]
            found[path] = digest, int(size), lines[5 : 5 + int(count)]
            lines = lines[5 + int(count) :]
        return found

    def record(self) -> dict[str, list[str]]:
        place = self.root / "nix/var/calve/committed.json"
        if not place.exists():
            return {"committed": [], "fetched": []}
        body = json.loads(place.read_text())
        assert body["version"] == 1
        return {name: [row["path"] for row in body[name]] for name in ("committed", "fetched")}

    def named(self) -> set[str]:
        """Return the base names that registration or record call valid."""
        record = self.record()
        return {
            *(path.rpartition("/")[2] for path in self.registered()),
            *record["committed"],
            *record["fetched"],
        }

    def leftovers(self) -> list[str]:
        """Return what is in the store beside store paths."""
        return [name for name in os.listdir(self.store) if name.startswith(".")]

    def check(self, *releases: Release) -> None:
        """What is called valid is whole and right, whatever happened; and so is the profile's system."""
        known = {
            info.path.basename: info for release in releases for info in release.paths.values()
        }
        for name in self.named():
            assert name in known
            self.check_path(known[name])
        profile = self.profile()
        if profile is not None:
            release = next(one for one in releases if str(one.system) == profile)
            assert {info.path.basename for info in release.paths.values()} <= self.named()
        for _digest, _size, references in self.registered().values():
            assert set(references) <= set(self.registered())

    def check_path(self, info: PathInfo) -> None:
        place = self.real(info.path)
        digest = hashlib.sha256()
        assert narwriter.dump(place, digest.update) == info.nar_size
        assert digest.digest() == info.nar_hash.digest
        for inner in [place, *place.rglob("*")]:
            status = inner.lstat()
            assert status.st_mtime == 1
            if not stat.S_ISLNK(status.st_mode):
                assert stat.S_IMODE(status.st_mode) in {0o444, 0o555}

    def check_booted(self, release: Release, *, generation: int) -> None:
        """The profile names the release, and all of it is registered."""
        self.check(release, *self.others)
        assert self.profile() == str(release.system)
        assert self.generations()["system"] == f"system-{generation}-link"
        registered = self.registered()
        for info in release.paths.values():
            digest, size, references = registered[str(info.path)]
            assert digest == info.nar_hash.digest.hex()
            assert size == info.nar_size
            assert references == [str(path) for path in info.references]
        assert self.record()["fetched"] == []
        assert self.leftovers() == []

    others: tuple[Release, ...] = ()


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where there is room: the agent's many syncs would wait for everybody's writes to the disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 1 << 30:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="calve-test-") as directory:
        yield Path(directory)


@pytest.fixture
def cloud(service, principals, admin, clock, faults, tmp_path, monkeypatch):
    # The operator's side need not survive a power cut of the test machine.
    monkeypatch.setattr(staging, "sync", lambda _fd: None)
    made = Cloud(service, principals, admin, clock, faults, tmp_path / "cloud")
    with made.server, made.store:
        yield made


@pytest.fixture
def one(cloud):
    return cloud.release(1)


@pytest.fixture
def machine_in(cloud):
    """Return a function: a directory (and a name) in, a machine with an empty disk out."""
    with contextlib.ExitStack() as owner:

        def make(directory: Path, name: str = "i-1") -> Machine:
            machine = Machine(cloud, directory, name)
            owner.enter_context(machine.server)
            return machine

        yield make


@pytest.fixture
def machine(machine_in, tmp_path):
    return machine_in(tmp_path / "machine")


@pytest.fixture
def impatient():
    """Return what cuts the 30 s to one for which a machine tries to tell of itself."""
    return (
        "import dataclasses\n"
        "from calve.boot import uplink\n"
        "uplink._PATIENCE = dataclasses.replace(uplink._PATIENCE, deadline_s=1.0)"
    )


@pytest.fixture
def web():
    """Return `serve`."""
    return serve
