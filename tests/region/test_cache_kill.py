"""`kill -9` at any instant of `calve push` and `calve pull`, and a second run: nothing is wrong, little is done twice.

Real processes against the region's S3, which takes a moment for each request, so that instants of the network and of
the disk both occur. What was asked is attributed to a run by its key: each run has one of its own.
"""

from __future__ import annotations

import bisect
import datetime as dt
import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import calve
from calve.cache import gc
from calve.cache import manifest as manifests
from calve.cache.manifest import Manifest
from calve.cache.objects import Objects, open_objects
from calve.cache.roots import Root
from calve.cache.verify import verify
from calve.clock import SystemClock
from calve.nix import nar
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.nix.tree import remove_tree
from calve.region.faults import Delay
from calve.region.objects import ObjectService
from calve.region.server import Server
from calve.region.signature import Principals
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client

SEED = int(os.environ.get("CALVE_TEST_SEED", "20261123"))
KEY = SecretKey.generate("test-1")
RING = Keyring((KEY.public,))
JOBS = 8
DELAY_S = 0.02
SIZES = {7: 20_000_000, 20: 6_000_000, 33: 9_000_000, 50: 5_000_000}
PATHS = 60
OLD_PATHS = 18  # what an older version, which some caches have, shares
SMALL_BYTES = 256 << 10  # from this size on a push asks before it sends
BUCKET = "nix"


# A closure


def digest_of(name: str) -> str:
    return encode32(hashlib.sha256(name.encode()).digest()[:20])


def add(store: LocalStore, name: str, data: bytes, references: list[StorePath]) -> PathInfo:
    """Stage a path: a directory of one large and three small files."""
    quarter = len(data) // 10
    files = [data[:quarter], data[quarter : 2 * quarter], data[2 * quarter : 3 * quarter]]
    files.append(data[3 * quarter :])
    events: list[object] = [nar.Directory(b"")]
    for number, content in enumerate(files):
        events.append(nar.File(b"file%d" % number, len(content), executable=number == 1))
        events += [content[at : at + 65536] for at in range(0, len(content), 65536)]
    events += [nar.Symlink(b"link", b"file0"), nar.End()]
    whole = hashlib.sha256()
    size = nar.emit(iter(events), whole.update)
    path = StorePath(digest_of(name), name)
    info = PathInfo(path, Hash("sha256", whole.digest()), size, tuple(sorted(references)))
    store.stage(info, iter(events))
    return info


def make_closures(root: Path) -> tuple[StorePath, StorePath]:
    """Make a store of 60 libraries that refer to earlier ones and two systems; return the systems, old and new."""
    chance = random.Random(1)
    with LocalStore(root, create=True) as store:
        infos: list[PathInfo] = []
        for number in range(PATHS):
            size = SIZES.get(number) or int(chance.lognormvariate(8, 1.5))
            earlier = chance.sample(infos, min(len(infos), chance.randrange(4)))
            references = [info.path for info in earlier]
            infos.append(add(store, f"lib{number}", chance.randbytes(size), references))
        paths = [info.path for info in infos]
        infos.append(add(store, "system-1", b"old" * 100, paths[:OLD_PATHS]))
        infos.append(add(store, "system-2", b"new" * 100, paths))
        store.commit(infos)
    return infos[-2].path, infos[-1].path


# A cache


class ShiftedClock(SystemClock):
    """The machine's clock, put forward by hand: that of the service, and of who collects."""

    hours = 0.0

    def now(self):
        return super().now() + dt.timedelta(hours=self.hours)

    def monotonic(self):
        return super().monotonic() + self.hours * 3600


_ACCESS_KEY = re.compile(r"Credential=([^/]+)/")


class Cache:
    """The region's S3 with one bucket, and what was asked of it, by who asked."""

    def __init__(self, directory: Path) -> None:
        self.clock = ShiftedClock()
        self.principals = Principals()
        self.service = ObjectService(directory, self.principals, clock=self.clock)
        self.bucket = self.service.add_bucket(BUCKET)
        self.server = Server(self.service.handle, faults=self._seen, clock=self.clock)
        self.delay_s = DELAY_S
        self.lock = threading.Lock()
        self.asked: dict[str, Counter[tuple[str, str]]] = {}  # by user: method, key
        self.times_s: list[float] = []  # of requests of users
        self.came = threading.Condition(self.lock)
        self.names: dict[str, str] = {}

    def _seen(self, request):
        found = _ACCESS_KEY.search(request.headers.get("authorization", ""))
        key = request.path.removeprefix(f"/{BUCKET}/")
        with self.came:
            user = self.names.get(found[1] if found else "", "")
            self.asked.setdefault(user, Counter())[request.method, key] += 1
            if user:
                self.times_s.append(time.monotonic())
                self.came.notify_all()
        return Delay(self.delay_s) if user and self.delay_s else None

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}?region=test-region&endpoint={self.server.url}"

    def user(self, name: str):
        key = self.principals.add_user(name)
        self.names[key.access_key] = name
        return key

    def nars(self, user: str, *methods: str) -> set[str]:
        """Return the NARs of which a user asked something."""
        with self.lock:
            asked = self.asked.get(user, Counter())
            return {key for method, key in asked if method in methods and key.startswith("nar/")}

    def quiet(self) -> None:
        """Wait until what a killed process had sent is done with."""
        end = time.monotonic() + 10
        while self.server.open_connections and time.monotonic() < end:
            time.sleep(0.005)
        assert not self.server.open_connections

    def objects(self, client: Client) -> Objects:
        key = self.principals.add_user("look")
        return open_objects(
            self.url, client, Static(Credentials(key.access_key, key.secret_key, key.token))
        )

    def size(self, key: str) -> int:
        found = self.bucket.get(key)
        assert found is not None, key
        return found.size

    def read(self, key: str) -> bytes:
        found = self.bucket.open(key)
        assert found is not None, key
        with found[1].file as file:
            return file.read()

    def __enter__(self):
        self.server.__enter__()
        return self

    def __exit__(self, *error):
        self.server.__exit__(*error)


# Runs


@dataclass
class Bench:
    """What all tests of a module share; read only."""

    store: Path
    key: Path
    old: StorePath
    new: StorePath
    caches: dict[str, Path]
    """Buckets: `none` is empty, `old` has the older closure, `new` both."""
    manifest: str
    courses: dict[str, tuple[list[float], float]]
    """Of a push and of a pull that nobody kills: when each request came, and the end; in seconds."""


def argv(what: str, bench: Bench, cache: Cache, to: Path | None = None) -> list[str]:
    if what == "push":
        more: list[object] = ["--store", bench.store, "--to", cache.url, "--key", bench.key]
    else:
        more = ["--store", to, "--from", cache.url, "--trusted", KEY.public.dump()]
        more += ["--manifest", bench.manifest] if what == "pull" else []
    command = [
        sys.executable,
        "-m",
        "calve",
        what.partition("-")[0],
        bench.new,
        "--jobs",
        JOBS,
        *more,
    ]
    return [str(one) for one in command]


def env_of(cache: Cache, user: str) -> dict[str, str]:
    key = cache.user(user)
    env = {**os.environ, "PYTHONPATH": str(Path(calve.__file__).parents[1])}
    env.pop("AWS_PROFILE", None)
    return env | {
        "AWS_ACCESS_KEY_ID": key.access_key,
        "AWS_SECRET_ACCESS_KEY": key.secret_key,
        "XDG_STATE_HOME": str(cache.service.root / "state"),
    }


def run(command: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def killed(command: list[str], env: dict[str, str], cache: Cache, when: Instant) -> None:
    """Run a command and kill it; one that is done before is none the worse for it."""
    begun = len(cache.times_s)
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        with cache.came:
            while len(cache.times_s) - begun < when.requests and child.poll() is None:
                cache.came.wait(0.05)
        time.sleep(when.after_s)
        child.kill()
        _, err = child.communicate(timeout=60)
    assert child.returncode in {0, -9}, err


def remove(tree: Path) -> None:
    """Remove a tree whose directories may be read-only: 400 of them would fill a disk."""
    fd = os.open(tree.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        remove_tree(fd, tree.name)
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kill")
    store = directory / "from"
    old, new = make_closures(store)
    key = directory / "key.sec"
    key.write_text(KEY.dump())
    key.chmod(0o600)
    caches = {name: directory / name for name in ("none", "old", "new")}
    made = Bench(store, key, old, new, caches, "", {})
    caches["none"].mkdir()
    with Cache(directory / "s3") as cache:
        cache.delay_s = 0.0
        run(argv("push", replace(made, new=old), cache), env_of(cache, "old"))
        shutil.copytree(directory / "s3" / BUCKET, caches["old"])
        cache.delay_s = DELAY_S
        for what in ("push", "pull"):
            begun_s = time.monotonic()
            cache.times_s.clear()
            out = run(argv(what, made, cache, directory / "to"), env_of(cache, what))
            made.manifest = made.manifest or out.split()[1]
            end_s = time.monotonic() - begun_s
            made.courses[what] = ([time_s - begun_s for time_s in cache.times_s], end_s)
    shutil.copytree(directory / "s3" / BUCKET, caches["new"])
    remove(directory / "to")
    return made


@dataclass(frozen=True)
class Instant:
    """Once so many requests have come, and then so many seconds later."""

    requests: int
    after_s: float


def instant(bench: Bench, what: str, number: int, of: int) -> tuple[random.Random, Instant]:
    """Choose when to kill: the time of a run is cut into so many parts, and one instant chosen in each.

    It is told by what has happened until then, for other processes may make this one slower than that was.
    """
    chance = random.Random(f"{SEED} {what} {number}")
    times_s, end_s = bench.courses[what]
    at_s = times_s[0] - 0.01 + (number + chance.random()) / of * (end_s - times_s[0])
    count = bisect.bisect(times_s, at_s)
    when = Instant(count, max(0.0, at_s - times_s[count - 1]) if count else 0.0)
    print(f"CALVE_TEST_SEED={SEED} {what} {number} of {of}: {when} of {len(times_s)}")  # noqa: T201  (to see it again)
    return chance, when


# Push


def holds(cache: Cache) -> set[str]:
    """Assert that nothing in the bucket refers to what is not there; return its keys.

    Who refers is read before that to which it refers, so that this may be asked while others write.
    """
    keys = cache.bucket.keys()
    roots = [Root.parse(cache.read(key), key) for key in keys if key.startswith("roots/")]
    keys = cache.bucket.keys()
    for root in roots:
        assert manifests.key(root.manifest) in keys
    entries = {}
    for key in keys:
        if key.startswith("manifests/"):
            digest = key.removeprefix("manifests/").removesuffix(".json.zst")
            body, signatures = manifests.unpack(cache.read(key), digest, key)
            RING.verify(manifests.signed_bytes(digest), signatures, key)
            entries |= {entry.info.path: entry for entry in Manifest.parse(body, key).paths}
    keys = cache.bucket.keys()
    for path in entries:
        assert f"{path.digest}.narinfo" in keys
    infos = [NarInfo.parse(cache.read(key), key) for key in keys if key.endswith(".narinfo")]
    present = set(cache.bucket.keys())
    for entry in [*infos, *entries.values()]:
        RING.verify(entry.info.fingerprint, entry.info.signatures, entry.info.path)
        for path in entry.info.references:
            assert f"{path.digest}.narinfo" in present, (entry.info.path, path)
        found = cache.bucket.get(entry.url)
        assert found is not None, entry.url
        assert entry.file_size in {None, found.size}
    return present


def collect(cache: Cache, objects: Objects) -> set[str]:
    """Collect garbage, to the end; return what is left, but for the collector's own."""
    for _ in range(2):
        cache.clock.hours += 25
        gc.run(objects, dry_run=False, clock=cache.clock)
    return {
        key for key in set(cache.bucket.keys()) if key != "gc.json" and not key.startswith("gc/")
    }


def push_is_survived(bench: Bench, tmp_path: Path, number: int, of: int) -> None:
    chance, when = instant(bench, "push", number, of)
    before = ("none", "old")[number % 2]
    shutil.copytree(bench.caches[before], tmp_path / "s3" / BUCKET)
    with Cache(tmp_path / "s3") as cache, Client(clock=cache.clock) as client:
        at_first = set(cache.bucket.keys())
        kills = ["kill-0"]
        killed(argv("push", bench, cache), env_of(cache, "kill-0"), cache, when)
        holds(cache)  # at once, whatever of its requests is still under way
        if chance.random() < 0.25:
            kills.append("kill-1")
            killed(argv("push", bench, cache), env_of(cache, "kill-1"), cache, when)
            holds(cache)
        cache.quiet()
        there = holds(cache)
        objects = cache.objects(client)
        # The manifest of a second run may differ: who did not send a NAR knows no hash of its file.
        published = any(key.startswith("manifests/") for key in there - at_first)
        if number % 3 == 2 and not published:
            # Nobody comes back: what was left goes, and nothing else does.
            there = collect(cache, objects)
            assert there - {"nix-cache-info"} == at_first - {"nix-cache-info"}
            holds(cache)
        known = {NarInfo.parse(cache.read(key)).url for key in there if key.endswith(".narinfo")}
        whole = {key: cache.size(key) for key in there if key.startswith("nar/")}
        pushed = run(argv("push", bench, cache), env_of(cache, "again"))
        twice = {key: whole[key] for key in cache.nars("again", "PUT") if key in whole}
        # Small NARs without a narinfo are sent in place of a question; the others were asked for.
        assert not known & twice.keys()
        assert max(twice.values(), default=0) < SMALL_BYTES, twice
        holds(cache)
        digest = pushed.split()[1]
        assert run(argv("push", bench, cache), env_of(cache, "third")).split()[1] == digest
        assert not cache.nars("third", "PUT", "GET", "HEAD")
        assert facts(cache, digest) == facts_of(bench)
        if number % 6 < 2:
            command = [sys.executable, "-m", "calve", "cache", "verify", "--cache", cache.url]
            run([*command, "--trusted", KEY.public.dump(), "--deep"], env_of(cache, "verify"))
        else:
            assert not verify(objects, RING).errors
        # In the end there is what a push that nobody killed makes, and nothing else.
        entries = facts(cache, digest)
        kept = {f"{info.path.digest}.narinfo" for info, _, _ in entries}
        kept |= {url for _, url, _ in entries} | {manifests.key(digest)}
        assert collect(cache, objects) == kept | {"nix-cache-info", "roots/push/system.json"}
        assert holds(cache) >= kept
    remove(tmp_path / "s3")


def facts(cache: Cache, digest: str) -> list[tuple[PathInfo, str, int | None]]:
    """Return what a manifest says of its paths, but for the hashes of compressed files, which it may not know."""
    body, _ = manifests.unpack(cache.read(manifests.key(digest)), digest, digest)
    entries = Manifest.parse(body).paths
    return [(entry.info, entry.url, entry.file_size) for entry in entries]


def facts_of(bench: Bench) -> list[tuple[PathInfo, str, int | None]]:
    return facts(Cache(bench.caches["new"].parent / "s3"), bench.manifest)


@pytest.mark.parametrize("number", range(6))
def test_a_push_killed_anywhere(bench, tmp_path, number):
    push_is_survived(bench, tmp_path, number, 6)


@pytest.mark.full
@pytest.mark.parametrize("number", range(200))
def test_a_push_killed_at_200_instants(bench, tmp_path, number):
    push_is_survived(bench, tmp_path, number, 200)


# Pull


def verified_by_nix(root: Path, home: Path) -> set[str]:
    """Have Nix verify a store and all its contents; return its valid paths."""
    if shutil.which("nix-store") is None:
        pytest.skip("Nix is not installed")
    home.mkdir(exist_ok=True)
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "NIX_CONFIG": "build-users-group =\nsubstituters =\n",
        "NIX_CONF_DIR": str(home / "conf"),
        "NIX_REMOTE": f"local?root={root}",
    }
    done = subprocess.run(
        ["nix-store", "--verify", "--check-contents"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in ("error", "disappeared", "modified", "but"):
        assert word not in done.stderr, done.stderr
    dump = subprocess.run(["nix-store", "--dump-db"], env=env, capture_output=True, text=True)
    assert dump.returncode == 0, dump.stderr
    return set(re.findall(r"^(/nix/store/\S+)\n[0-9a-f]{64}\n", dump.stdout, re.MULTILINE))


def pull_is_survived(bench: Bench, tmp_path: Path, number: int, of: int) -> None:
    chance, when = instant(bench, "pull", number, of)
    to = tmp_path / "to"
    how = "pull-walk" if number % 4 == 3 else "pull"
    with Cache(bench.caches["new"].parent / "s3") as cache:
        kills = ["kill-0"]
        killed(argv(how, bench, cache, to), env_of(cache, "kill-0"), cache, when)
        if chance.random() < 0.25:
            kills.append("kill-1")
            killed(argv(how, bench, cache, to), env_of(cache, "kill-1"), cache, when)
        if number % 2 and (to / "nix/var/nix/db/db.sqlite").exists():
            # As it was left, before anybody puts it right.
            assert len(verified_by_nix(to, tmp_path / "home")) in {0, PATHS + 1}
        run(argv(how, bench, cache, to), env_of(cache, "again"))
        fetched = Counter(key for user in [*kills, "again"] for key in cache.nars(user, "GET"))
    assert len(fetched) == PATHS + 1
    twice = sum(fetched.values()) - len(fetched)
    assert twice <= JOBS * len(kills), fetched
    with LocalStore(bench.store) as store, LocalStore(to) as sink:
        paths = {info.path: info for info in store.closure([bench.new])}
        got = {info.path: replace(info, signatures=()) for info in sink.closure([bench.new])}
        assert got == paths
    assert verified_by_nix(to, tmp_path / "home") == {str(path) for path in paths}
    left = {entry.name for entry in (to / "nix/store").iterdir()}
    assert left == {".links", *(path.basename for path in paths)}
    remove(to)


@pytest.mark.parametrize("number", range(6))
def test_a_pull_killed_anywhere(bench, tmp_path, number):
    pull_is_survived(bench, tmp_path, number, 6)


@pytest.mark.full
@pytest.mark.parametrize("number", range(200))
def test_a_pull_killed_at_200_instants(bench, tmp_path, number):
    pull_is_survived(bench, tmp_path, number, 200)
