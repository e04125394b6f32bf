"""Images: `python -m benchmarks.images [PART]...`; all parts where none is named.

release: the first image of 300 MB from its closure to a completed snapshot, and the next release, of which one path of
400 KiB is another, to a registered AMI; each request answered after 100 ms. The service shares our process.
upload: PutSnapshotBlock per second and CPU per block, against boto3 in the manner of NixOS/amis, same endpoint. The
endpoint checks signatures and checksums and shares the processors with what is measured, for both sides alike.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks import _closure
from benchmarks._ebs import Ebs
from benchmarks._rows import PAIRS, Row, at_most, compared, finish, load
from calve.aws.ebs import EbsDirect
from calve.aws.images import Images
from calve.demo.imports import Importer, temporary
from calve.demo.workshop import Workshop
from calve.demo.world import REGION, World
from calve.disk.arch import X86_64
from calve.disk.disk import BLOCK_BYTES
from calve.image.built import Built
from calve.image.parent import FileBlocks
from calve.image.publish import Publisher
from calve.image.release import Release
from calve.image.source import StoreSource
from calve.image.start import start_of
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.region.faults import Delay, FaultPlan
from calve.tasks import Cancel
from calve.transport.http import Client

_BLOCKS = int(os.environ.get("CALVE_BENCH_BLOCKS", "1000"))
_DELAYS_S = (0.0, 0.1)
_RATIO = 2.0
_BYTES = 300_000_000
T = TypeVar("T")


def _floor_s(disk: Path) -> float:
    """Return the CPU seconds that the SHA-256 of a block takes."""
    with disk.open("rb") as file:
        data = [file.read(BLOCK_BYTES) for _ in range(64)]
    begin = time.process_time()
    for one in data:
        hashlib.sha256(one).digest()
    return (time.process_time() - begin) / len(data)


def upload() -> tuple[list[Row], list[str]]:
    """Measure the upload of one disk, without a delay and with 100 ms for each request."""
    rows: list[Row] = []
    notes = [f"upload: {_BLOCKS} blocks; at the beginning: {load()}"]
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm, prefix="calve-images-") as name:
        disk = Path(name, "disk.raw")
        with disk.open("wb") as file:
            for _ in range(_BLOCKS):
                file.write(os.urandom(BLOCK_BYTES))
        for delay_s in _DELAYS_S:
            with Ebs(Path(name, f"ebs-{delay_s}"), delay_s) as ebs:
                ebs.upload("boto3", disk, _BLOCKS)  # its files are there for both
                before_s = ebs.cpu_s
                runs = [
                    (ebs.upload("calve", disk, _BLOCKS), ebs.upload("boto3", disk, _BLOCKS))
                    for _ in range(PAIRS)
                ]
                service_ms = (ebs.cpu_s - before_s) / (2 * PAIRS * _BLOCKS) * 1000
            what = f"{delay_s * 1000:.0f} ms"
            rates = [[_BLOCKS / pair[n]["wall_s"] for pair in runs] for n in (0, 1)]
            cpus = [[pair[n]["cpu_s"] / _BLOCKS * 1000 for pair in runs] for n in (0, 1)]
            rows.append(compared(f"{what}: PUTs per second", "/s", *rates, _RATIO, rates=True))
            rows.append(compared(f"{what}: CPU per block", "ms", *cpus))
            again = max(pair[0]["requests"] for pair in runs) - _BLOCKS
            notes.append(f"{what}: at most {again:.0f} requests beyond one for each block")
            notes.append(f"{what}: the service used {service_ms:.2f} ms of CPU for a block")
            peaks = [max(pair[n]["peak_mb"] for pair in runs) for n in (0, 1)]
            notes.append(f"{what}: peak {peaks[0]:.0f} MB, boto3's {peaks[1]:.0f} MB")
        rows.append(Row("SHA-256 of a block", _floor_s(disk) * 1000, "ms"))
    return rows, [*notes, f"at the end: {load()}"]


def _system(store: LocalStore, top: StorePath, big: StorePath, small: bytes) -> StorePath:
    """Add a system: the web server's own start, and two paths more, the small one with these bytes."""
    importer = Importer(store)
    with temporary(store) as work:
        (work / "small").mkdir()
        (work / "small/file").write_bytes(small)
        path = importer.add(work / "small", "small")
        (work / "top").mkdir()
        links = {"base": top, "big": big, "small": path, "init": f"{top}/init"}
        for name, target in links.items():
            (work / "top" / name).symlink_to(str(target))
        (work / "top/boot.json").write_bytes((store.real(top) / "boot.json").read_bytes())
        made = importer.add(work / "top", "nixos-system-images-1", [top, big, path])
    importer.flush()
    return made


def release() -> tuple[list[Row], list[str]]:
    """Measure the way from a closure to a snapshot, and from the next closure to an AMI."""
    source = random.Random(5)
    workshop = Workshop(_closure.HOME.absolute() / "workshop")
    notes = [f"release: at the beginning: {load()}"]
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[[], T]) -> T:
        begin = time.monotonic()
        found = function()
        spent[name] = time.monotonic() - begin
        return found

    with tempfile.TemporaryDirectory(prefix="calve-images-") as name, workshop.store() as store:
        work = Path(name)
        top = workshop.system(store, "webserver", 1)
        left = _BYTES - sum(info.nar_size for info in store.closure([top]))
        importer = Importer(store)
        with temporary(store) as scratch:
            (scratch / "big").mkdir()
            for number in range(300):
                (scratch / "big" / str(number)).write_bytes(source.randbytes(left // 300))
            big = importer.add(scratch / "big", "big")
        importer.flush()
        one = _system(store, top, big, source.randbytes(400 << 10))
        two = _system(store, top, big, source.randbytes(400 << 10))
        size = sum(info.nar_size for info in store.closure([one]))
        with World(work / "world") as world, Client() as client:
            world.api.faults = FaultPlan().add(Delay(0.1), times=None)
            keys = world.operator_credentials
            ebs = EbsDirect(client, REGION, keys, endpoint=world.api.url)
            publisher = Publisher(REGION, ebs, Images(world.session))
            read = StoreSource(store)

            def build(system: StorePath, out: str, parent: Built | None) -> Built:
                start = start_of(read, system, work)
                blocks = None if parent is None else FileBlocks(parent.raw, parent.disk)
                made = Release("images", X86_64, start, read, system, parent, blocks)
                return made.build(work / out, cancel=Cancel())

            first = timed("first: build", lambda: build(one, "one", None))
            planned = publisher.plan(first)
            snapshot = timed("first: upload", lambda: publisher.upload(first, planned))
            timed("first: verify", lambda: publisher.verify(first.disk, planned, snapshot.id))
            publisher.register(first, planned, snapshot.id)
            second = timed("next: build", lambda: build(two, "two", first))
            done = timed("next: publish", lambda: publisher.publish(second))
    rows = [Row("the closure's NARs", size / 1e6, "MB", required=">= 300 MB", met=size >= _BYTES)]
    rows += [Row(name, seconds, "s") for name, seconds in spent.items()]
    to_snapshot = spent["first: build"] + spent["first: upload"]
    rows.append(at_most("first image, closure to completed snapshot", to_snapshot, "s", 12))
    to_ami = spent["next: build"] + spent["next: publish"]
    rows.append(at_most("next image, closure to registered AMI", to_ami, "s", 3))
    rows.append(at_most("next image, blocks written, whole disk", done.snapshot.blocks, "", 10))
    return rows, [*notes, f"at the end: {load()}"]


_PARTS: dict[str, Callable[[], tuple[list[Row], list[str]]]] = {
    "release": release,
    "upload": upload,
}


def main() -> None:
    wanted = [one for one in sys.argv[1:] if not one.startswith("-")] or list(_PARTS)
    rows: list[Row] = []
    notes: list[str] = []
    for name in wanted:
        if name not in _PARTS:
            raise SystemExit(f"there is no part {name}: {', '.join(_PARTS)}")
        found, said = _PARTS[name]()
        rows += found
        notes += said
    finish(f"images ({PAIRS} interleaved pairs)", rows, notes)


if __name__ == "__main__":
    main()
