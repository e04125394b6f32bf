"""Rows of figures: name, ours, peer, ratio, required; printed as a table or JSON, exit 1 where one is missed."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence


@dataclasses.dataclass
class Row:
    """One figure; `required` is shown, `met` decides."""

    name: str
    ours: float
    unit: str
    peer: float | None = None
    ratio: float | None = None
    spread: str = ""
    required: str = ""
    met: bool = True


def finish(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """Print the rows and leave."""
    if "--json" in sys.argv[1:]:
        print(
            json.dumps(
                {"name": title, "rows": [dataclasses.asdict(row) for row in rows], "notes": notes},
                indent=2,
            )
        )
    else:
        head = f"{'figure':<44} {'ours':>12} {'peer':>10} {'ratio':>7}  {'required':<16}"
        print(f"{title}\n{head}")
        for row in rows:
            peer = "" if row.peer is None else f"{row.peer:.2f}"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            verdict = "" if not row.required else ("" if row.met else "  MISSED")
            print(
                f"{row.name:<44} {row.ours:>9.2f} {row.unit:<4}{peer:>9} {ratio:>7}  "
                f"{row.required:<16} {row.spread}{verdict}"
            )
        for note in notes:
            print(f"  {note}")
    sys.exit(0 if all(row.met for row in rows) else 1)


def cpu_s(command: Callable[[], object]) -> float:
    """Return the user CPU seconds that a call took, in this process and its ended children."""

    def used() -> float:
        return sum(
            resource.getrusage(who).ru_utime
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )

    before = used()
    command()
    return used() - before


def child(argv: Sequence[str], **kwargs: object) -> Callable[[], object]:
    """Return a call that runs a command."""
    return lambda: subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, **kwargs)  # type: ignore[call-overload]


def pairs(
    ours: Callable[[], object], peer: Callable[[], object], count: int = 7
) -> tuple[float, float, float, str]:
    """Time interleaved pairs; return medians of ours and the peer's, the median ratio and its range."""
    mine, theirs = [], []
    for _ in range(count):
        mine.append(cpu_s(ours))
        theirs.append(cpu_s(peer))
    ratios = sorted(a / max(b, 1e-6) for a, b in zip(mine, theirs, strict=True))
    return (
        statistics.median(mine),
        statistics.median(theirs),
        statistics.median(ratios),
        f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
    )


def python(code: str, *arguments: str) -> list[str]:
    """Return the command of a fresh interpreter."""
    return [sys.executable, "-c", code, *arguments]


def environment() -> dict[str, str]:
    """Return an environment for Nix without a daemon or a configuration."""
    return {**os.environ, "NIX_REMOTE": "", "HOME": "/nonexistent"}
