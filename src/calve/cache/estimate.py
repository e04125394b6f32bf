"""How long a pull would take: measured on the first bytes of the largest NAR that is missing."""

from __future__ import annotations

import hashlib

from calve.cache.compression import decompressor
from calve.cache.lookup import OTHER_MAY_HELP
from calve.cache.objects import Readable
from calve.cache.pull import PullPlan
from calve.clock import SYSTEM, Clock
from calve.tasks import Cancel

__all__ = ["SAMPLE_BYTES", "estimate"]

SAMPLE_BYTES = 2 << 20
_READ_BYTES = 64 * 1024
_NAR_BYTES = 256 * 1024


class _Sample:
    """The first bytes of an object, and what they took: until the first one came, and all others."""

    def __init__(self, source: Readable, clock: Clock) -> None:
        self._source = source
        self._clock = clock
        self.bytes = 0
        self.first_bytes = 0
        self.first_s = 0.0
        self.rest_s = 0.0

    def read(self, _size: int) -> bytes:
        begun = self._clock.monotonic()
        data = self._source.read(_READ_BYTES) if self.bytes < SAMPLE_BYTES else b""
        took_s = self._clock.monotonic() - begun
        if self.bytes:
            self.rest_s += took_s
        else:
            self.first_s, self.first_bytes = took_s, len(data)
        self.bytes += len(data)
        return data


def estimate(
    plan: PullPlan,
    *,
    jobs: int,
    processors: int,
    cancel: Cancel | None = None,
    clock: Clock = SYSTEM,
) -> float | None:
    """Return about how many seconds the pull of a plan would take; None where that cannot be measured.

    At most 2 MiB are fetched, by one connection, decompressed and hashed. The pull is as slow as the slowest of: the
    link at this rate, an answer's delay for every path over `jobs` connections, and the processors. Disks are not
    looked at.

    Args:
        plan: of what is missing.
        jobs: how many NARs would be under way at once.
        processors: how many of them could be decompressed at once.
        cancel: stops it.
        clock: measures.
    """
    if not plan.missing:
        return 0.0
    found = max(plan.missing, key=lambda each: each.entry.file_size or each.entry.info.nar_size)
    entry = found.entry
    begun = clock.monotonic()
    nar_bytes = 0
    try:
        with found.cache.open(entry.url, entry.file_size) as source:
            sample = _Sample(source, clock)
            content = decompressor(entry.compression, sample.read, place=found.cache.url)
            digest = hashlib.sha256()
            while sample.bytes < SAMPLE_BYTES and (data := content(_NAR_BYTES)):
                if cancel is not None:
                    cancel.check()
                digest.update(data)
                nar_bytes += len(data)
    except OTHER_MAY_HELP:
        return None
    work_s = max(0.0, clock.monotonic() - begun - sample.first_s - sample.rest_s)
    ratio = sample.bytes / nar_bytes if nar_bytes else 1.0
    fetch_bytes = sum(
        ratio * each.entry.info.nar_size if each.entry.file_size is None else each.entry.file_size
        for each in plan.missing
    )
    rest_bytes = sample.bytes - sample.first_bytes
    link_s = fetch_bytes * sample.rest_s / rest_bytes if rest_bytes else 0.0
    answers_s = sample.first_s * len(plan.missing) / jobs
    cores_s = plan.nar_bytes * work_s / nar_bytes / processors if nar_bytes else 0.0
    return max(link_s, answers_s, cores_s)
