"""Memory: what the machine has left, and what the agent took."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes", "peak_bytes"]


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
