"""Release v1: the numbered, immutable record that says which closure a fleet is to run.

`fleets/<fleet>/releases/<8 digits>.json`, created with "only where there is none": of two operators who take the same
number, one gets the next. Rollouts and verdicts stand in objects of their own beside it.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from calve import record
from calve.cache.manifest import check_digest
from calve.cache.objects import Objects
from calve.contract.health import Health
from calve.contract.userdata import Hook, UserData
from calve.errors import ConflictError, DamagedError, UsageError
from calve.fleet.config import FLEET_NAME
from calve.nix.storepath import StorePath

__all__ = ["Content", "Listed", "Release", "create", "listed", "prefix", "read"]

VERSION = 1
_LIMIT_BYTES = 64 * 1024
_OBJECT = re.compile(r"fleets/[^/]+/releases/([0-9]{8})(?:/(reason|tripped|verdict))?\.json")
_TRIES = 32
_MAX_NUMBER = 99_999_999  # 8 digits


@dataclass(frozen=True, slots=True)
class Content:
    """What a release is to be of: a closure that is in the cache.

    Attributes:
        system: the toplevel's store path.
        manifest: digest of its manifest.
        keys: names of the keys that signed it.
        repeats: number of the release whose closure this is again; None where it is a new one.
        image: what machines boot, where it is not what they booted before.
    """

    system: str
    manifest: str
    keys: tuple[str, ...]
    repeats: int | None = None
    image: str | None = None

    def is_of(self, release: Release) -> bool:
        """Say whether a release is of this."""
        mine = (self.manifest, self.repeats, self.image)
        return mine == (release.manifest, release.repeats, release.image)


@dataclass(frozen=True, slots=True)
class Release:
    """One release.

    Attributes:
        fleet: name of the fleet.
        number: 1 and up.
        system: the toplevel's store path.
        manifest: digest of its manifest.
        keys: names of the keys that signed it.
        created: when, UTC.
        repeats: number of the release whose closure this is again; None where it is a new one.
        image: what its machines boot, for delivery by image; None for the launch template's own.
    """

    fleet: str
    number: int
    system: str
    manifest: str
    keys: tuple[str, ...]
    created: dt.datetime
    repeats: int | None = None
    image: str | None = None

    @property
    def key(self) -> str:
        """Return where the record lies."""
        return f"{prefix(self.fleet)}{self.number:08d}.json"

    def user_data(
        self,
        caches: tuple[str, ...],
        *,
        deadline_s: int = 600,
        health: Health | None = None,
        hook: Hook | None = None,
        reports: str = "",
    ) -> UserData:
        """Return what a machine of this release is told; see `UserData` for what each means."""
        return UserData(
            system=self.system,
            caches=caches,
            manifest=self.manifest,
            keys=self.keys,
            fleet=self.fleet,
            release=self.number,
            deadline_s=deadline_s,
            health=health,
            hook=hook,
            reports=reports,
        )

    def dump(self) -> bytes:
        """Return the record's bytes."""
        body = {
            "version": VERSION,
            "fleet": self.fleet,
            "number": self.number,
            "system": self.system,
            "manifest": self.manifest,
            "keys": list(self.keys),
            "created": self.created.isoformat(timespec="seconds"),
        }
        if self.repeats is not None:
            body["repeats"] = self.repeats
        if self.image is not None:
            body["image"] = self.image
        return json.dumps(body, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, place: object) -> Release:
        """Read a record.

        Raises:
            UsageError: it is of a version that we do not read.
            DamagedError: it is no record.
        """
        fields = record.parse(
            data, what="release record", version=VERSION, limit=_LIMIT_BYTES, place=str(place)
        )
        number = fields.number("number")
        if not 1 <= number <= _MAX_NUMBER:
            raise DamagedError("the release record has no number", place=place)
        return cls(
            fleet=fields.text("fleet", _fleet),
            number=number,
            system=fields.text("system", _system),
            manifest=fields.text("manifest", check_digest),
            keys=fields.texts("keys", str),
            created=fields.text("created", record.time),
            repeats=fields.optional_number("repeats"),
            image=fields.optional("image", str),
        )


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing tells of a fleet's releases.

    Attributes:
        records: numbers of those that have a record, newest first.
        beside: what lies beside records, also such as were removed: `reason`, `tripped`, `verdict`.
    """

    records: tuple[int, ...]
    beside: Mapping[int, frozenset[str]]

    @property
    def latest(self) -> int:
        """Return the newest record's number, 0 where there is none."""
        return self.records[0] if self.records else 0

    @property
    def used(self) -> int:
        """Return the highest number that anything was ever written for: a record that was removed takes its own along."""
        return max((self.latest, *self.beside))

    def has(self, number: int, what: str) -> bool:
        """Say whether something lies beside a record."""
        return what in self.beside.get(number, ())

    @property
    def ended(self) -> tuple[int, ...]:
        """Return the numbers of those that have a verdict, newest first."""
        return tuple(one for one in sorted(self.beside, reverse=True) if self.has(one, "verdict"))


def _fleet(text: str) -> str:
    if not FLEET_NAME.fullmatch(text):
        raise DamagedError(f"{text[:100]!r} is no fleet's name")
    return text


def _system(text: str) -> str:
    return str(StorePath.parse(text))


def prefix(fleet: str) -> str:
    """Return how the keys of a fleet's releases begin; UsageError where it is no fleet's name."""
    if not FLEET_NAME.fullmatch(fleet):
        raise UsageError(
            f"{fleet!r} is no fleet's name", hint="lower-case letters, digits and -, at most 63"
        )
    return f"fleets/{fleet}/releases/"


def listed(objects: Objects, fleet: str) -> Listed:
    """Return what there is of a fleet's releases; one listing."""
    records: set[int] = set()
    beside: dict[int, set[str]] = {}
    for one in objects.list(prefix(fleet)):
        match = _OBJECT.fullmatch(one.key)
        if match is None:
            continue
        number, what = int(match[1]), match[2]
        if what is None:
            records.add(number)
        else:
            beside.setdefault(number, set()).add(what)
    found = {number: frozenset(what) for number, what in beside.items()}
    return Listed(tuple(sorted(records, reverse=True)), found)


def read(objects: Objects, fleet: str, number: int) -> Release:
    """Read a release.

    Raises:
        NotFoundError: there is none of this number.
        UsageError, DamagedError: see `Release.parse`; or it is the record of another release.
    """
    key = f"{prefix(fleet)}{number:08d}.json"
    place = f"{objects.url}/{key}"
    release = Release.parse(objects.get(key, _LIMIT_BYTES), place)
    if release.key != key:
        raise DamagedError(
            f"the record is that of release {release.number} of {release.fleet}", place=place
        )
    return release


def create(objects: Objects, fleet: str, content: Content, *, now: dt.datetime) -> Release:
    """Write the next release of a fleet and return it.

    Raises:
        ConflictError: others took every number that we tried.
    """
    last = listed(objects, fleet).used
    for number in range(last + 1, min(last + _TRIES, _MAX_NUMBER) + 1):
        release = Release(
            fleet,
            number,
            content.system,
            content.manifest,
            content.keys,
            now,
            content.repeats,
            content.image,
        )
        if objects.put(release.key, release.dump(), only_new=True):
            return release
    raise ConflictError(f"cannot get a number for a release of {fleet}", hint="try again")
