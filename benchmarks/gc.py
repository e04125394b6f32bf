"""Garbage collection of a cache in S3 that holds 100,000 objects, half of them garbage: requests, memory, time.

The region's S3 is a process of its own; its clock is set forward between the runs, for a collector removes nothing
that was not marked for an hour at least. No peer: Nix has nothing of the kind.

`python -m benchmarks.gc serve DIRECTORY` is that service.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from benchmarks._rows import Row, Run, finish, load, measure
from benchmarks._server import BUCKET, REGION, S3, _control
from calve.cache import manifest
from calve.cache.manifest import Manifest
from calve.cache.roots import Root
from calve.clock import SystemClock
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import SecretKey, Signature
from calve.nix.storepath import StorePath
from calve.process import Process
from calve.region.objects import ObjectService
from calve.region.objects_store import Object
from calve.region.server import Request, Response, Server
from calve.region.signature import Principals

_OBJECTS = int(os.environ.get("CALVE_BENCH_OBJECTS", "100000"))
_SIZES = (_OBJECTS // 10, _OBJECTS)
_CLOSURE = 2500  # paths of a release
_DAY_S = 86_400
_SEED = 7
_LISTS, _PEAK_MB = 250, 200


# What the cache holds


class Filler:
    """Writes a bucket as the service keeps it; NARs and narinfos, which nobody reads, share an empty data file."""

    def __init__(self, bucket: Path) -> None:
        bucket.mkdir(parents=True)
        (bucket / "empty.data").touch()
        self._bucket = bucket
        self._random = random.Random(_SEED)
        self._modified = dt.datetime.now(dt.UTC).replace(microsecond=0) - dt.timedelta(days=3)
        # Made with a real key they would all be as long; a signature that takes 50 µs is of no interest here.
        self._signature = SecretKey.generate("bench-1").sign(b"").value

    def _bytes(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def put(self, key: str, size: int, data: bytes | None, etag: str) -> None:
        name = hashlib.sha256(key.encode()).hexdigest()
        file = "empty.data" if data is None else f"{name}.data"
        if data is not None:
            (self._bucket / file).write_bytes(data)
        entry = Object(key, size, etag, self._modified, file)
        (self._bucket / f"{name}.json").write_bytes(entry.dump())

    def _real(self, key: str, data: bytes) -> None:
        self.put(key, len(data), data, hashlib.md5(data).hexdigest())

    def _entry(self, number: int, earlier: list[StorePath]) -> NarInfo:
        path = StorePath(encode32(self._bytes(20)), f"package-{number}-1.{number % 10}")
        nar_hash = Hash("sha256", self._bytes(32))
        references = tuple(sorted({path, *self._random.sample(earlier, min(6, len(earlier)))}))
        size = self._random.randrange(1000, 10_000_000)
        signatures = (Signature("bench-1", self._signature),)
        info = PathInfo(path, nar_hash, size, references, signatures=signatures)
        url = f"nar/{encode32(nar_hash.digest)}.nar.zst"
        file_hash = Hash("sha256", self._bytes(32))
        return NarInfo(info, url, "zstd", file_hash=file_hash, file_size=size // 4)

    def release(self, number: int, paths: int, *, kept: bool) -> None:
        """Write a closure with its manifest, and a root where it is kept."""
        entries: list[NarInfo] = []
        known: list[StorePath] = []
        for at in range(paths):
            entry = self._entry(at, known)
            entries.append(entry)
            known.append(entry.info.path)
            text = entry.dump()
            etag = hashlib.md5(text).hexdigest()
            self.put(f"{entry.info.path.digest}.narinfo", len(text), None, etag)
            self.put(entry.url, entry.file_size or 0, None, hashlib.md5(self._bytes(8)).hexdigest())
        body = Manifest(known[-1], tuple(entries)).dump()
        digest = manifest.digest_of(body)
        self._real(manifest.key(digest), manifest.pack(body))
        if kept:
            owner, name = ("push", f"release-{number}")
            root = Root(owner, name, digest, self._modified, checked=True)
            self._real(root.key, root.dump())

    def fill(self, objects: int) -> int:
        """Write about so many objects; return how many of them are garbage."""
        self._real("nix-cache-info", b"StoreDir: /nix/store\n")
        releases = max(2, objects // (2 * _CLOSURE + 1))
        paths = (objects // releases - 1) // 2
        for number in range(releases):
            self.release(number, paths, kept=number % 2 == 0)
        return releases // 2 * (2 * paths + 1)


# The service


class _Shifted(SystemClock):
    """The machine's clock, set forward."""

    def __init__(self) -> None:
        self.shift_s = 0.0

    def now(self) -> dt.datetime:
        return super().now() + dt.timedelta(seconds=self.shift_s)


def serve(directory: Path) -> None:
    principals = Principals()
    key = principals.add_user("bench")
    clock = _Shifted()
    service = ObjectService(directory, principals, region=REGION, clock=clock)
    service.add_bucket(BUCKET)

    def control(request: Request) -> Response:
        match request.path.strip("/").split("/"):
            case ["shift", seconds]:
                clock.shift_s += float(seconds)
                return Response(200, {}, b"null")
        return _control(service, request)

    with (
        Server(service.handle, name="s3", clock=clock) as s3,
        Server(control, name="control") as told,
    ):
        print(
            json.dumps(
                {
                    "url": s3.url,
                    "control": told.url,
                    "access_key": key.access_key,
                    "secret_key": key.secret_key,
                }
            ),
            flush=True,
        )
        threading.Event().wait()


class Service(S3):
    """The service over a bucket that is filled, with a clock that can be set forward."""

    def __init__(self, directory: Path) -> None:
        argv = [sys.executable, "-m", "benchmarks.gc", "serve", str(directory)]
        self._process = Process(argv, stdout="pipe", stderr=sys.stderr.fileno())
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.stop()
            raise SystemExit("the S3 service did not start")
        self._told = json.loads(line)

    def forward(self, seconds: float) -> None:
        self._ask(f"shift/{seconds}")


# What is measured


def _collect(s3: Service, *more: str) -> tuple[Run, Counter[str]]:
    url = f"s3://{BUCKET}?region={REGION}&endpoint={s3.endpoint}"
    argv = [sys.executable, "-m", "calve", "cache", "gc", "--json", "--cache", url, *more]
    before = Counter(s3.counts())
    run = measure(argv, {**os.environ, **s3.credentials})
    if run.failed:
        raise SystemExit(f"calve cache gc failed with {run.failed}")
    counts = Counter(s3.counts()) - before
    run.requests = sum(counts.values())
    return run, counts


def _runs(objects: int, work: Path) -> tuple[list[Row], list[str]]:
    garbage = Filler(work / BUCKET).fill(objects)
    rows: list[Row] = []
    notes: list[str] = []
    with Service(work) as s3:
        for name, more in (
            ("rehearsal", ("--dry-run",)),
            ("mark", ("--no-dry-run",)),
            ("sweep, mark", ()),
        ):
            run, counts = _collect(s3, *more)
            lists = counts["ListObjectsV2"]
            title = f"{objects} objects, {name}"
            rows += [
                Row(f"{title}: lists", lists, "", required=f"<= {_LISTS}", met=lists <= _LISTS),
                Row(
                    f"{title}: peak",
                    run.peak_mb,
                    "MB",
                    required=f"<= {_PEAK_MB} MB",
                    met=run.peak_mb <= _PEAK_MB,
                ),
                Row(f"{title}: wall", run.wall_s, "s"),
                Row(f"{title}: CPU", run.cpu_s, "s"),
            ]
            parts = ", ".join(
                f"{count} {what or 'refused for the clock'}" for what, count in counts.most_common()
            )
            notes.append(f"{title}: {run.requests} requests: {parts}")
            s3.forward(_DAY_S + 60)
        left = _collect(s3, "--dry-run")[1]["ListObjectsV2"]
    notes.append(f"{objects} objects: {garbage} were garbage; a list takes {left} requests now")
    return rows, notes


def main() -> None:
    rows: list[Row] = []
    notes = [f"at the beginning: {load()}"]
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for objects in _SIZES:
        with contextlib.ExitStack() as owner:
            work = owner.enter_context(tempfile.TemporaryDirectory(dir=shm, prefix="calve-gc-"))
            some, more = _runs(objects, Path(work) / "s3")
        rows += some
        notes += more
    notes.append(f"at the end: {load()}")
    finish("garbage collection of a cache in S3", rows, notes)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]))
    else:
        main()
