"""The deploy lock: one operator at a time changes a fleet. It says whose it is, and runs out by itself.

`fleets/<fleet>/lock.json`, changed only in place of the version that was read. Who holds it renews it between two
rounds of work; who was killed leaves one that the next operator on the same machine takes at once, as the process is
gone, and any other after `LASTS_S`. Reading (`status`, `watch`) and judging (`guard`) need no lock.
"""

from __future__ import annotations

import datetime as dt
import getpass
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calve import record
from calve.cache.objects import Objects, is_missing
from calve.clock import Clock
from calve.errors import CalveError, ConflictError
from calve.fleet import release as releases
from calve.record import Fields

__all__ = ["LASTS_S", "Held", "Holder", "held", "read"]

VERSION = 1
LASTS_S = 180.0
_LIMIT_BYTES = 4096
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock.

    Attributes:
        id: of this very holding.
        owner: user and host, for people.
        boot: of the machine: its boot's id; "" where it has none.
        pid: of the process there.
        doing: what for, in two words.
        expires: when it runs out, UTC.
    """

    id: str
    owner: str
    boot: str
    pid: int
    doing: str
    expires: dt.datetime

    def document(self) -> dict[str, Any]:
        """Return it as JSON's types."""
        return {
            "id": self.id,
            "owner": self.owner,
            "boot": self.boot,
            "pid": self.pid,
            "doing": self.doing,
            "expires": self.expires.isoformat(timespec="seconds"),
        }

    def dump(self) -> bytes:
        """Return the record's bytes."""
        return record.dump({"version": VERSION, **self.document()})

    @classmethod
    def parse(cls, data: bytes, place: str) -> Holder:
        """Read a record; DamagedError or UsageError where it cannot be."""
        fields: Fields = record.parse(
            data, what="lock", version=VERSION, limit=_LIMIT_BYTES, place=place
        )
        return cls(
            fields.text("id", str),
            fields.text("owner", str),
            fields.text("boot", str),
            fields.number("pid"),
            fields.text("doing", str),
            fields.text("expires", record.time),
        )

    def gone(self, now: dt.datetime) -> bool:
        """Say whether it holds no longer: it ran out, or its process on this very machine has ended."""
        if now >= self.expires:
            return True
        if not self.boot or self.boot != _boot() or self.pid == os.getpid():
            return False
        return not Path(f"/proc/{self.pid}").exists()


class Held:
    """A lock that is held; `renew` it more often than it runs out.

    Attributes:
        left: who held it and never gave it back; None where all was in order.
    """

    def __init__(
        self, objects: Objects, key: str, holder: Holder, left: Holder | None, clock: Clock
    ) -> None:
        self.left = left
        self._objects = objects
        self._key = key
        self._holder = holder
        self._clock = clock

    def renew(self) -> None:
        """Make it last again, once half of its time is over.

        Raises:
            ConflictError: somebody else holds it by now.
        """
        now = self._clock.now()
        if (self._holder.expires - now).total_seconds() > LASTS_S / 2:
            return
        there, tag = _get(self._objects, self._key)
        if there is None or there.id != self._holder.id:
            raise ConflictError(
                "the deploy lock was lost: this process stood still for too long",
                place=self._objects.url,
                hint="look at `calve status`; run the same command again to go on",
            )
        renewed = replace(self._holder, expires=now + dt.timedelta(seconds=LASTS_S))
        if self._objects.put(self._key, renewed.dump(), match=tag):
            self._holder = renewed

    def release(self) -> None:
        """Give it back; nothing happens where it is another's."""
        there, tag = _get(self._objects, self._key)
        if there is not None and there.id == self._holder.id:
            self._objects.delete(self._key, match=tag)


@contextmanager
def held(objects: Objects, fleet: str, *, doing: str, clock: Clock) -> Iterator[Held]:
    """Hold a fleet's lock while the block lasts; one that cannot be given back runs out, and hides no outcome.

    Raises:
        ConflictError: somebody else holds it.
    """
    key = _key(fleet)
    holder, left = _take(objects, key, doing, clock)
    lock = Held(objects, key, holder, left, clock)
    try:
        yield lock
    finally:
        with suppress(CalveError):
            lock.release()


def read(objects: Objects, fleet: str, now: dt.datetime) -> Holder | None:
    """Return who holds a fleet's lock; None where nobody does."""
    there, _ = _get(objects, _key(fleet))
    return None if there is None or there.gone(now) else there


def _take(objects: Objects, key: str, doing: str, clock: Clock) -> tuple[Holder, Holder | None]:
    for _ in range(_TRIES):
        now = clock.now()
        mine = Holder(
            secrets.token_hex(8),
            f"{_user()}@{socket.gethostname()}",
            _boot(),
            os.getpid(),
            doing,
            now + dt.timedelta(seconds=LASTS_S),
        )
        there, tag = _get(objects, key)
        if there is None:
            if objects.put(key, mine.dump(), only_new=True):
                return mine, None
        elif not there.gone(now):
            break
        elif objects.put(key, mine.dump(), match=tag):
            return mine, there
    raise ConflictError(
        "the fleet's deploy lock is held"
        if there is None
        else f"the fleet's deploy lock is held by {there.owner} for {there.doing}, "
        f"until {there.expires:%H:%M:%S} UTC unless it is renewed",
        place=f"{objects.url}/{key}",
        hint="calve watch shows what goes on; a lock whose owner is gone runs out by itself",
    )


def _get(objects: Objects, key: str) -> tuple[Holder | None, str | None]:
    try:
        data, tag = objects.get_tagged(key, _LIMIT_BYTES)
    except CalveError as error:
        if is_missing(error):
            return None, None
        raise
    return Holder.parse(data, f"{objects.url}/{key}"), tag


def _key(fleet: str) -> str:
    return releases.prefix(fleet).removesuffix("releases/") + "lock.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _boot() -> str:
    """Return the id of this machine's boot, which containers on it share; its hostname tells those apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    return f"{boot}/{socket.gethostname()}"
