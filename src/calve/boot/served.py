"""What stage 2 has found out about the systems on this disk: `/nix/var/calve/health.json`, v1.

    {"version": 1, "good": "/nix/store/…", "bad": "/nix/store/…"}

`good` was healthy in service, and so makes this a machine that has served: it may fall back to it. `bad` started and
was not healthy; it is forgotten once another system is confirmed. Stage 2 writes it, the agent reads it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calve.boot import durable
from calve.errors import CalveError
from calve.nix.storepath import StorePath

__all__ = ["LAST_GOOD", "Served", "confirm", "read", "reject"]

VERSION: Final = 1
LAST_GOOD: Final = "nix/var/nix/gcroots/calve/last-good"
"""A link to the system that was healthy last: what garbage collection leaves alone."""

_PLACE: Final = "nix/var/calve/health.json"
_LIMIT: Final = 4096


@dataclass(frozen=True, slots=True)
class Served:
    """What is known: nothing of a machine that is new."""

    good: StorePath | None = None
    bad: StorePath | None = None

    def dump(self) -> bytes:
        """Return the file's content."""
        body = {"version": VERSION}
        rows = {"good": self.good, "bad": self.bad}
        return json.dumps(body | {k: str(v) for k, v in rows.items() if v is not None}).encode()

    @classmethod
    def parse(cls, data: bytes) -> Served:
        """Read the file; a damaged one, or one of a newer version, says nothing: the machine counts as new."""
        try:
            body = json.loads(data)
            if body["version"] != VERSION:
                return cls()
            good, bad = body.get("good"), body.get("bad")
            return cls(
                None if good is None else StorePath.parse(good),
                None if bad is None else StorePath.parse(bad),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CalveError):
            return cls()


def read(root: Path) -> Served:
    """Return what is known of the disk at `root`."""
    try:
        with (root / _PLACE).open("rb") as file:
            return Served.parse(file.read(_LIMIT))
    except OSError:
        return Served()


def confirm(root: Path, system: StorePath) -> None:
    """Remember that a system is healthy; durable on return."""
    link = root / LAST_GOOD
    link.parent.mkdir(parents=True, exist_ok=True)
    durable.symlink(str(system), link)
    _write(root, Served(good=system))
    durable.sync(link.parent)


def reject(root: Path, system: StorePath) -> Served:
    """Remember that a system started and was not healthy; durable on return."""
    known = Served(read(root).good, system)
    _write(root, known)
    return known


def _write(root: Path, known: Served) -> None:
    """Write the file so that a cut leaves the old one or the new one, whole."""
    place = root / _PLACE
    place.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(place, [known.dump()])
    durable.sync(place.parent)
