"""Images: `python -m benchmarks.images [PART]...`; all parts where none is named.

upload: PutSnapshotBlock per second and CPU per block, against boto3 in the manner of NixOS/amis, same endpoint. The
endpoint checks signatures and checksums and shares the processors with what is measured, for both sides alike.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._ebs import Ebs
from benchmarks._rows import PAIRS, Row, finish, load
from calve.disk.disk import BLOCK_BYTES

_BLOCKS = int(os.environ.get("CALVE_BENCH_BLOCKS", "1000"))
_DELAYS_S = (0.0, 0.1)
_RATIO = 2.0


def _floor_s(disk: Path) -> float:
    """Return the CPU seconds that the SHA-256 of a block takes."""
    with disk.open("rb") as file:
        data = [file.read(BLOCK_BYTES) for _ in range(64)]
    begin = time.process_time()
    for one in data:
        hashlib.sha256(one).digest()
    return (time.process_time() - begin) / len(data)


def _compared(name: str, unit: str, ours: list[float], peer: list[float], least: float) -> Row:
    """Return a row of rates, its ratio how many times ours is the peer's, in pairs."""
    ratios = sorted(a / b for a, b in zip(ours, peer, strict=True))
    ratio = statistics.median(ratios)
    spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
    required = f">= {least:.2f} x" if least else ""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    return Row(name, mine, unit, theirs, ratio, spread, required, ratio >= least)


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
            rows.append(_compared(f"{what}: PUTs per second", "/s", *rates, _RATIO))
            mine, theirs = statistics.median(cpus[0]), statistics.median(cpus[1])
            ratios = sorted(b / a for a, b in zip(*cpus, strict=True))
            spread = f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
            ratio = statistics.median(ratios)
            rows.append(Row(f"{what}: CPU per block", mine, "ms", theirs, ratio, spread))
            again = max(pair[0]["requests"] for pair in runs) - _BLOCKS
            notes.append(f"{what}: at most {again:.0f} requests beyond one for each block")
            notes.append(f"{what}: the service used {service_ms:.2f} ms of CPU for a block")
            peaks = [max(pair[n]["peak_mb"] for pair in runs) for n in (0, 1)]
            notes.append(f"{what}: peak {peaks[0]:.0f} MB, boto3's {peaks[1]:.0f} MB")
        rows.append(Row("SHA-256 of a block", _floor_s(disk) * 1000, "ms"))
    return rows, [*notes, f"at the end: {load()}"]


_PARTS: dict[str, Callable[[], tuple[list[Row], list[str]]]] = {"upload": upload}


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
