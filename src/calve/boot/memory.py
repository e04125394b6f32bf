"""Memory: what the machine has left, what the agent took, and how the allocator is kept small."""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["available_bytes", "limit_arenas", "peak_bytes"]

_M_ARENA_MAX = -8  # mallopt(3)
_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1


def limit_arenas() -> None:
    """Keep glibc to two malloc arenas: one per thread would hold on to 60 MB (reference: transport.md, 3)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 2)
        libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 10)


def _field(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def available_bytes() -> int:
    """Return the kernel's estimate of memory that can be had without swapping."""
    return _field("/proc/meminfo", "MemAvailable:")


def peak_bytes() -> int:
    """Return the largest resident set this process has had (VmHWM)."""
    return _field("/proc/self/status", "VmHWM:")
