"""Consoles as EC2 shows them: late, and for an hour after the instance's end.

Source: EC2 API reference, GetConsoleOutput: output is posted some time after it was written, and kept "for at least
one hour after the most recent post".
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping

__all__ = ["Consoles"]

LOOKS = 8
"""How often a console is looked at within the lag: what is shown is at most an eighth older than it should be."""


class Consoles:
    """Remembers how long each console was when; the text stays with the machine. Not thread-safe: see `cloud`.

    Args:
        read: All that an instance's console said so far.
        lag_s: How old what is shown has to be.
    """

    def __init__(self, read: Callable[[str], bytes], lag_s: float = 0.0) -> None:
        self._read = read
        self._lag_s = lag_s
        self._looked_at = -1.0
        self._lengths: dict[str, deque[tuple[float, int]]] = {}

    def look(self, running: Mapping[str, bool], known: Container[str], now: float) -> None:
        """Take in how long consoles are; the last look at one follows its end.

        Args:
            running: The instances that are not terminated, and whether they are on.
            known: The instances that EC2 shows; of others nothing is kept.
            now: Seconds.
        """
        if not self._lag_s:
            return
        due = now >= self._looked_at + self._lag_s / LOOKS
        for instance_id, on in running.items():
            if due or not on:
                self._note(instance_id, now)
        if due:
            self._looked_at = now
            for instance_id in [one for one in self._lengths if one not in known]:
                del self._lengths[instance_id]

    def _note(self, instance_id: str, now: float) -> None:
        seen = self._lengths.setdefault(instance_id, deque([(now, 0)]))
        length = len(self._read(instance_id))
        if seen[-1][1] != length:
            seen.append((now, length))
        while len(seen) > 1 and seen[1][0] <= now - self._lag_s:
            seen.popleft()

    def show(self, instance_id: str, now: float) -> bytes:
        """Return what a console had said a lag ago."""
        if not self._lag_s:
            return self._read(instance_id)
        seen = self._lengths.get(instance_id, ())
        old = [length for at, length in seen if at <= now - self._lag_s]
        return self._read(instance_id)[: old[-1]] if old else b""
