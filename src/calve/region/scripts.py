"""What a scripted machine does from its launch on, as data, and the usual stories ready-made.

The lines of evidence are those of Calve's agent, written from the format (`@@calve`, then JSON with `v`, `t`, `e`), in
the order in which a real machine says them; a machine that fails holds, abandons its hook and powers off, as one does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from calve.region.hooks import Result

__all__ = [
    "Script",
    "dies_after",
    "evidence",
    "fails",
    "good",
    "panics",
    "serves_500",
    "silent",
]

KERNEL = "[    0.000000] Linux version 6.12.0 (scripted)"
BEAT_S = 60.0
HOLD_S = 60.0
_PHASES = (("network", 0.1), ("agent", 0.2), ("imds", 0.25), ("manifest", 0.3), ("pull", 0.35))
"""When a boot's phases begin, as parts of it."""


@dataclass(frozen=True, slots=True)
class Script:
    """One machine's life; all times are seconds since its launch.

    Attributes:
        lines: What its console says, and when, in order.
        serves: From when on it answers the balancer's check, and with which HTTP status; None: no more.
        result: When it completes its launch hook, and with what; None for never.
        beat_s: Until then it keeps the hook from timing out, every so often; None for never.
        reports: When it writes its report: what its console said so far.
        off_at_s: When it powers off; None for never.
    """

    lines: tuple[tuple[float, str], ...] = ()
    serves: tuple[tuple[float, int | None], ...] = ()
    result: tuple[float, Result] | None = None
    beat_s: float | None = None
    reports: tuple[float, ...] = ()
    off_at_s: float | None = None


def good(boot_s: float = 40.0, *, system: str = "") -> Script:
    """Boot, serve, and say so after `boot_s`."""
    named = {"system": system} if system else {}
    lines = (
        *_booting(boot_s),
        (boot_s * 0.8, evidence(boot_s * 0.8, "ready", **named)),
        (boot_s * 0.9, evidence(boot_s * 0.9, "phase", n="health")),
        (boot_s, evidence(boot_s, "healthy", **named, as_wanted=True)),
    )
    return Script(
        lines, ((boot_s * 0.9, 200),), (boot_s, Result.CONTINUE), BEAT_S, reports=(boot_s,)
    )


def fails(
    code: str, message: str, at_s: float = 20.0, *, phase: str = "pull", hold_s: float = HOLD_S
) -> Script:
    """Fail with a code, tell the console and the report, hold, abandon, power off."""
    failure = evidence(at_s, "fail", code=code, phase=phase, message=message)
    return Script(
        (*_booting(at_s), (at_s, failure)),
        result=(at_s + hold_s, Result.ABANDON),
        beat_s=BEAT_S,
        reports=(at_s,),
        off_at_s=at_s + hold_s + 1,
    )


def silent() -> Script:
    """Be on, and say nothing to anybody: the hook times out."""
    return Script()


def panics(at_s: float = 3.0) -> Script:
    """Begin, and stand still in a kernel panic."""
    panic = f"[{at_s:12.6f}] Kernel panic - not syncing: VFS: Unable to mount root fs"
    return Script(((0.0, KERNEL), (at_s, panic)))


def serves_500(boot_s: float = 40.0) -> Script:
    """Call itself healthy, and answer the balancer's check with 500."""
    return replace(good(boot_s), serves=((boot_s * 0.9, 500),))


def dies_after(seconds: float, boot_s: float = 40.0) -> Script:
    """Boot well, and power off so long after the launch."""
    return replace(good(boot_s), off_at_s=seconds)


def evidence(at_s: float, kind: str, **fields: object) -> str:
    """Write a line of evidence, v1."""
    body = {"v": 1, "t": round(at_s, 2), "e": kind, **fields}
    return "@@calve " + json.dumps(body, separators=(",", ":"))


def _booting(seconds: float) -> tuple[tuple[float, str], ...]:
    began = seconds * 0.15
    start = (began, evidence(began, "start", agent="0.1.0", contract=[1, 1]))
    phases = [(part * seconds, evidence(part * seconds, "phase", n=name)) for name, part in _PHASES]
    return tuple(sorted([(0.0, KERNEL), start, *phases]))
