"""The end of a machine that failed, after its last word on the console: report, hold, let go of the hook.

The agent and stage 2 end alike. What cannot be told is told on the console; nothing here fails.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from calve.boot.console import Console
from calve.boot.policy import Policy
from calve.boot.uplink import ABANDON, BEAT_S, Uplink, open_uplink
from calve.clock import SYSTEM, Clock
from calve.contract.userdata import UserData
from calve.errors import CalveError

__all__ = ["depart"]


def depart(
    policy: Policy, console: Console, wanted: UserData | None, *, clock: Clock = SYSTEM
) -> None:
    """Return when the machine may power off.

    Args:
        policy: for how long it stays on, so that its console is read.
        console: has the failure's line; its transcript becomes the report.
        wanted: user data; None where it could not be read: then there is nobody to tell.
        clock: for the hold.
    """
    with contextlib.ExitStack() as owner:
        uplink = None
        if wanted is not None and (wanted.hook is not None or wanted.reports):
            uplink = _opened(owner, policy, console, wanted, clock)
        if uplink is None:
            clock.wait(threading.Event(), policy.hold_s)
            return
        _attempt(console, "the report", lambda: uplink.report(console.transcript()))
        _hold(policy.hold_s, uplink, clock)
        _attempt(console, "the hook", lambda: uplink.complete(ABANDON))


def _opened(
    owner: contextlib.ExitStack, policy: Policy, console: Console, wanted: UserData, clock: Clock
) -> Uplink | None:
    try:
        return owner.enter_context(open_uplink(policy, wanted, clock=clock))
    except CalveError as error:
        console.emit("note", message=f"nobody could be told: {error}")
        return None


def _hold(seconds: float, uplink: Uplink, clock: Clock) -> None:
    """Wait, and keep the hook from timing out meanwhile: somebody may have set a long hold to look at the machine."""
    end_s = clock.monotonic() + seconds
    while (left_s := end_s - clock.monotonic()) > 0:
        clock.wait(threading.Event(), min(left_s, BEAT_S))
        if left_s > BEAT_S:
            with contextlib.suppress(CalveError):
                uplink.beat()


def _attempt(console: Console, what: str, function: Callable[[], object]) -> None:
    try:
        function()
    except (CalveError, OSError) as error:
        console.emit("note", message=f"{what}: {error}")
