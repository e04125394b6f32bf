"""The one way to wait for what EC2 does in its own time: asked at first often, then less and less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

from calve.aws.images import Images
from calve.clock import Clock
from calve.tasks import Cancel

__all__ = ["known", "until"]

T = TypeVar("T")

_LEAST_S: Final = 0.2
_GROWTH: Final = 1.5
_KNOWN_S: Final = 15.0


def until(
    look: Callable[[], T | None], within_s: float, *, most_s: float, cancel: Cancel, clock: Clock
) -> T | None:
    """Ask until there is an answer.

    Args:
        look: returns None as long as there is none.
        within_s: how long, in seconds.
        most_s: between two questions.
        cancel: ends it.
        clock: for the waits.

    Returns:
        The answer; None where there was none in time.
    """
    end_s = clock.monotonic() + within_s
    pause_s = _LEAST_S
    while True:
        found = look()
        if found is not None or clock.monotonic() > end_s:
            return found
        cancel.wait(pause_s, clock)
        pause_s = min(most_s, pause_s * _GROWTH)


def known(images: Images, image: str, *, cancel: Cancel, clock: Clock) -> bool:
    """Wait until EC2 knows an image; of a new one that may take seconds. False where it does not become known."""
    found = until(
        lambda: images.images(image=image) or None,
        _KNOWN_S,
        most_s=1.0,
        cancel=cancel,
        clock=clock,
    )
    return found is not None
