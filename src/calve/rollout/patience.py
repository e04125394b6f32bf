"""Patience with a cloud that gives no good answer: it is told, and borne for a quarter of an hour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from calve.progress import Note, Progress

if TYPE_CHECKING:
    from calve.clock import Clock
    from calve.errors import TransientError

__all__ = ["Patience"]

_LASTS_S: Final = 900.0


class Patience:
    """One loop's.

    Args:
        clock: measures it.
        progress: is told of each answer that was none.
    """

    def __init__(self, clock: Clock, progress: Progress) -> None:
        self._clock = clock
        self._progress = progress
        self._since: float | None = None

    def rest(self) -> None:
        """Take note of a good answer."""
        self._since = None

    def bear(self, error: TransientError) -> None:
        """Tell, and return; raise the error once it goes on for too long."""
        now = self._clock.monotonic()
        self._since = now if self._since is None else self._since
        if now - self._since >= _LASTS_S:
            raise error
        self._progress(Note(f"AWS gave no good answer, trying again: {error}"))
