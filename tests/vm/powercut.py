"""Power cuts of a disk whose writes were logged: what a cut may have left of it, and what a machine finds there.

QEMU's `blklogwrites` writes the format of Linux's dm-log-writes (drivers/md/dm-log-writes.c): a superblock in the
first sector, then for each request a sector with its header, then its data. A request stands in the log when it has
ended; a flush covers all that ended before it.

A cut leaves what a flush covered, and of the writes since any subset, in any order, each in whole or in part: a block
of 4 KiB is what a disk writes in one piece. What is then on the disk is read as a kernel would: after the journal's
replay, without repairs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
SECTOR_BYTES = 512
BLOCK_BYTES = 4096
_SCRATCH_BYTES = 1 << 30
_SUPER = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True, slots=True)
class Request:
    """One of a log: where on the disk, how much, and where in the log its data is."""

    offset: int
    size: int
    flags: int
    data: int


class WriteLog:
    """A log, mapped; `epochs` are the requests between two flushes, the last one unfinished."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, version, count, sector_bytes = _SUPER.unpack_from(self.bytes)
        if (magic, version, sector_bytes) != (MAGIC, 1, SECTOR_BYTES):
            raise ValueError(f"no log of writes: {path}")
        self.requests = list(self._requests(count))
        self.epochs: list[list[Request]] = [[]]
        for request in self.requests:
            if request.flags & FLUSH:
                self.epochs.append([])
            if request.size:
                self.epochs[-1].append(request)

    def _requests(self, count: int) -> Iterator[Request]:
        at = SECTOR_BYTES
        for _ in range(count):
            sector, sectors, flags, _ = _ENTRY.unpack_from(self.bytes, at)
            at += SECTOR_BYTES
            size = sectors * SECTOR_BYTES
            yield Request(sector * SECTOR_BYTES, size, flags, at)
            if not flags & DISCARD:
                at += size

    def without_flushes(self) -> list[list[Request]]:
        """Return the epochs, one, of a disk that does nothing where it is told to flush."""
        return [[request for epoch in self.epochs for request in epoch]]

    def write(self, fd: int, request: Request, start: int = 0, end: int | None = None) -> None:
        """Do a request to a disk, or a part of it."""
        end = request.size if end is None else min(end, request.size)
        if not request.flags & DISCARD:
            os.pwrite(
                fd, self.bytes[request.data + start : request.data + end], request.offset + start
            )

    def survivors(
        self, epoch: list[Request], rng: random.Random
    ) -> Iterator[tuple[Request, int, int]]:
        """Choose what a cut within an epoch left of its writes: the pieces (request, start, end), in their order."""
        issued = epoch[: rng.randint(1, len(epoch))] if epoch else []
        chance = rng.choice((0.02, 0.1, 0.5, 0.9, 0.98))
        torn = rng.random() < 0.5
        pieces = []
        for request in issued:
            if request.flags & FUA:
                yield request, 0, request.size
                continue
            step = BLOCK_BYTES if torn else request.size
            pieces += [(request, at, at + step) for at in range(0, request.size, step)]
        pieces = [piece for piece in pieces if rng.random() < chance]
        rng.shuffle(pieces)
        yield from pieces


class Disk:
    """A disk in memory: of a size of its own on this machine, it takes what is written to it."""

    def __init__(self, source: Path | Disk) -> None:
        self.fd = os.memfd_create("disk", 0)
        fd = source.fd if isinstance(source, Disk) else os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _copy(fd, self.fd)
        finally:
            if fd is not getattr(source, "fd", None):
                os.close(fd)

    @property
    def path(self) -> str:
        return f"/dev/fd/{self.fd}"

    def replay(self) -> str | None:
        """Replay the journal, and let orphans go as a kernel does; say what is wrong beyond that."""
        done = self._run("e2fsck", "-f", "-p", self.path)
        return None if done.returncode in (0, 1) else (done.stdout + done.stderr)[-2000:]

    def extract(self, names: list[str], folder: Path) -> None:
        """Copy trees of the file system into a folder; what is not there is left out."""
        script = "".join(f'rdump "{name}" "{folder}"\n' for name in names)
        self._run("debugfs", "-f", "-", self.path, stdin=script)

    def _run(
        self, program: str, *arguments: str, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            pass_fds=[self.fd],
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
            check=False,
        )

    def save(self, path: Path) -> None:
        """Write the disk to a file."""
        with path.open("xb") as file:
            _copy(self.fd, file.fileno())

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copy(source: int, target: int) -> None:
    """Copy an image without filling its holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole to the end
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            at += os.sendfile(target, source, at, end - at)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the power went: the epoch, and the seed of what survived of it; a seed of None loses all of it."""

    epoch: int
    seed: int | None


def cut_disks(
    base: Path, log: WriteLog, epochs: list[list[Request]], cuts: list[Cut]
) -> Iterator[tuple[Cut, Disk]]:
    """Yield the disk of each cut, in the order of their epochs; it is closed when the next is asked for."""
    with Disk(base) as durable:
        done = 0
        for cut in sorted(cuts, key=lambda cut: (cut.epoch, cut.seed is not None, cut.seed or 0)):
            while done < cut.epoch:
                for request in epochs[done]:
                    log.write(durable.fd, request)
                done += 1
            with Disk(durable) as disk:
                if cut.seed is not None:
                    for piece in log.survivors(epochs[cut.epoch], random.Random(cut.seed)):
                        log.write(disk.fd, *piece)
                yield cut, disk


def choose(epochs: list[list[Request]], count: int, rng: random.Random) -> list[Cut]:
    """Choose cuts: every epoch once as far as they go, then those with more writes more often."""
    numbers = [number for number, epoch in enumerate(epochs) if epoch]
    weights = [len(epochs[number]) ** 0.5 for number in numbers]
    chosen = rng.sample(numbers, min(count, len(numbers)))
    chosen += rng.choices(numbers, weights, k=max(0, count - len(numbers)))
    return [Cut(number, rng.randrange(1 << 32)) for number in chosen]


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Lend a folder and remove it with all that it holds; in memory where there is such a place."""
    memory = Path("/dev/shm")
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _SCRATCH_BYTES
    place = memory / f"calve-cut-{os.getpid()}" if roomy else folder
    place.mkdir()
    try:
        yield place
    finally:
        if os.geteuid() != 0:
            subprocess.run(["chmod", "-R", "u+w", place], check=False)
        shutil.rmtree(place)
