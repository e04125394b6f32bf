"""Where it is kept how releases ended: objects beside their records.

`fleets/<fleet>/releases/<8 digits>/reason.json` is written before a rollback is called, so that the reason survives
whoever called it; `…/verdict.json` when all is over; `…/tripped.json` by the breaker, later; `…/logs/<instance>.log` is
what failed machines said. All but logs are created once: of several judges the first one counts. Types: `Reason`, `Verdict` of `verdict`.
"""

from __future__ import annotations

from calve.cache.objects import Objects, is_missing
from calve.errors import CalveError
from calve.fleet import release as releases
from calve.fleet.verdict import LIMIT_BYTES, Reason, Verdict

__all__ = [
    "keep_log",
    "logs",
    "read",
    "read_reason",
    "trip",
    "tripped",
    "write",
    "write_reason",
]


def read(objects: Objects, fleet: str, number: int) -> Verdict | None:
    """Return a release's verdict; None while it has none."""
    key = _key(fleet, number, "verdict")
    data = _get(objects, key)
    return None if data is None else Verdict.parse(data, f"{objects.url}/{key}")


def write(objects: Objects, verdict: Verdict) -> Verdict:
    """Write a verdict; return the one that counts, which is the first."""
    if objects.put(_key(verdict.fleet, verdict.release, "verdict"), verdict.dump(), only_new=True):
        return verdict
    return read(objects, verdict.fleet, verdict.release) or verdict


def read_reason(objects: Objects, fleet: str, number: int) -> Reason | None:
    """Return why a release was given up; None where nobody said."""
    return _reason(objects, _key(fleet, number, "reason"))


def write_reason(objects: Objects, fleet: str, number: int, reason: Reason) -> Reason:
    """Write a reason; return the one that counts, which is the first."""
    if objects.put(_key(fleet, number, "reason"), reason.dump(), only_new=True):
        return reason
    return read_reason(objects, fleet, number) or reason


def keep_log(objects: Objects, fleet: str, number: int, instance: str, text: str) -> None:
    """Keep what a machine of a release said, at most 64 KiB of it."""
    data = text.encode("utf-8", "replace")[-LIMIT_BYTES:]
    objects.put(
        f"{releases.prefix(fleet)}{number:08d}/logs/{instance}.log",
        data,
        content_type="text/plain; charset=utf-8",
    )


def logs(objects: Objects, fleet: str, number: int) -> dict[str, str]:
    """Return what machines of a release said, by their ids."""
    start = f"{releases.prefix(fleet)}{number:08d}/logs/"
    found = {}
    for one in objects.list(start):
        name = one.key.removeprefix(start).removesuffix(".log")
        found[name] = objects.get(one.key, LIMIT_BYTES).decode("utf-8", "replace")
    return found


def _key(fleet: str, number: int, name: str) -> str:
    return f"{releases.prefix(fleet)}{number:08d}/{name}.json"


def _reason(objects: Objects, key: str) -> Reason | None:
    data = _get(objects, key)
    return None if data is None else Reason.parse(data, f"{objects.url}/{key}")


def _get(objects: Objects, key: str) -> bytes | None:
    try:
        return objects.get(key, LIMIT_BYTES)
    except CalveError as error:
        if is_missing(error):
            return None
        raise


def trip(objects: Objects, fleet: str, number: int, reason: Reason) -> None:
    """Keep that a release which had gone well was pinned back later, and why."""
    objects.put(_key(fleet, number, "tripped"), reason.dump(), only_new=True)


def tripped(objects: Objects, fleet: str, number: int) -> Reason | None:
    """Return why a release that had gone well was pinned back later; None where it was not."""
    return _reason(objects, _key(fleet, number, "tripped"))
