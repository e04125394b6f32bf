"""A fleet's releases with their verdicts, the live one, and the roots that keep their closures from collection."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any, Final

from calve.cache import roots
from calve.cache.objects import Objects
from calve.cache.roots import Root
from calve.errors import NotFoundError
from calve.fleet import ends
from calve.fleet import release as releases
from calve.fleet.release import Release
from calve.fleet.verdict import Outcome, Verdict

__all__ = ["KEPT", "Entry", "keep", "live", "recent", "under_way"]

KEPT: Final = 5
"""So many released closures can be rolled back to: their roots stay."""
_OWNER: Final = "fleet"


@dataclass(frozen=True, slots=True)
class Entry:
    """A release and how it ended; None while it has not."""

    release: Release
    verdict: Verdict | None

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        one = self.release
        return {
            "release": one.number,
            "system": one.system,
            "manifest": one.manifest,
            "created": one.created.isoformat(timespec="seconds"),
            "repeats": one.repeats,
            "verdict": None if self.verdict is None else self.verdict.document(),
        }


def recent(objects: Objects, fleet: str, most: int = 20) -> list[Entry]:
    """Return the newest releases, newest first; a request or two for each."""
    found: list[Entry] = []
    for number in releases.listed(objects, fleet).records[:most]:
        try:
            release = releases.read(objects, fleet, number)
        except NotFoundError:
            continue  # somebody removes records at this very time
        found.append(Entry(release, ends.read(objects, fleet, number)))
    return found


def live(objects: Objects, fleet: str) -> Release | None:
    """Return the release that the fleet runs: the newest that went well and did not trip; None before the first."""
    listed = releases.listed(objects, fleet)
    for number in listed.ended:
        if listed.has(number, "tripped"):
            continue
        verdict = ends.read(objects, fleet, number)
        if verdict is None or verdict.outcome is not Outcome.RELEASED:
            continue
        try:
            return releases.read(objects, fleet, number)
        except NotFoundError:
            continue  # a record that somebody removed
    return None


def under_way(objects: Objects, fleet: str) -> Release | None:
    """Return the newest release where it has no verdict yet; None where it has, or there is none."""
    listed = releases.listed(objects, fleet)
    if not listed.records or listed.has(listed.latest, "verdict"):
        return None
    return releases.read(objects, fleet, listed.latest)


def keep(objects: Objects, fleet: str, now: dt.datetime) -> None:
    """Keep the closures of the newest `KEPT` that went well, and of what has no verdict; let go of all others.

    Where many in a row went badly, fewer are seen here: what is older than those stays as it is.
    """
    wanted: dict[str, str] = {}
    good = 0
    seen = recent(objects, fleet, most=4 * KEPT)
    for entry in seen:
        released = entry.verdict is not None and entry.verdict.outcome is Outcome.RELEASED
        good += released
        if entry.verdict is None or (released and good <= KEPT):
            wanted[_name(entry.release)] = entry.release.manifest
    for name, manifest in wanted.items():
        if roots.read_root(objects, _OWNER, name) is None:
            roots.write_root(objects, Root(_OWNER, name, manifest, now))
    oldest = _name(seen[-1].release) if seen and good < KEPT else ""
    for listed in objects.list(f"roots/{_OWNER}/{fleet}."):
        name = listed.key.rpartition("/")[2].removesuffix(".json")
        if name not in wanted and name >= oldest:
            objects.delete(listed.key)


def _name(release: Release) -> str:
    return f"{release.fleet}.{release.number:08d}"
