"""Buckets on disk: objects in files of their own, metadata beside, an index in memory.

A bucket is a directory. An object's data is written under a name of its own; what makes it visible is its
metadata file, renamed into place: `<sha256 of the key>.json`, which names key and data file. Keys never become
file names, so that no key leads out of the directory.
"""

from __future__ import annotations

import bisect
import contextlib
import datetime as dt
import hashlib
import json
import threading
import uuid
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING

from calve.errors import DamagedError
from calve.region.message import FileRange
from calve.region.signature import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Bucket", "Condition", "Draft", "Flight", "Object"]


@dataclass(frozen=True, slots=True)
class Object:
    """What is known of a stored object.

    Attributes:
        key: UTF-8 text.
        size: Bytes.
        etag: Without quotes: MD5 in hex, or that of the parts' MD5s with `-N`.
        modified: When it was written, whole seconds, UTC.
        file: Name of its data in the bucket's directory.
        headers: Those given back: content type, cache control, user metadata, …
        checksums: Base64 by algorithm (`sha256`), as the client gave them.
    """

    key: str
    size: int
    etag: str
    modified: dt.datetime
    file: str
    headers: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    def dump(self) -> bytes:
        """Render the metadata file."""
        document = asdict(self) | {"modified": self.modified.isoformat()}
        return json.dumps(document).encode()

    @classmethod
    def parse(cls, data: bytes, place: object) -> Object:
        """Parse a metadata file; DamagedError where it is none."""
        try:
            document = json.loads(data)
            document["modified"] = dt.datetime.fromisoformat(document["modified"])
            return cls(**document)
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedError("this is no object's metadata", place=place) from error


@dataclass(frozen=True, slots=True)
class Condition:
    """A conditional write.

    Attributes:
        only_new: `If-None-Match: *`.
        etag: `If-Match`, without quotes; `*` for any.
    """

    only_new: bool = False
    etag: str | None = None

    def check(self, current: Object | None) -> None:
        """Refuse where the object that is there does not fit."""
        if self.only_new and current is not None:
            raise _precondition("If-None-Match")
        if self.etag is None:
            return
        if current is None:
            raise Refusal(404, "NoSuchKey", "The specified key does not exist.")
        if self.etag not in {"*", current.etag}:
            raise _precondition("If-Match")


@dataclass(slots=True, eq=False)
class Flight:
    """A write under way; `disturbed` once the key was written or deleted by another."""

    key: str
    condition: Condition
    disturbed: bool = False


@dataclass(slots=True)
class Draft:
    """A data file that no object names yet."""

    path: Path
    file: IO[bytes]
    published: bool = False

    def discard(self) -> None:
        """Close the file, and delete it unless it was published."""
        self.file.close()
        if not self.published:
            self.path.unlink(missing_ok=True)


class Bucket:
    """A bucket's objects; thread-safe, strongly consistent as S3 is.

    Args:
        root: Its directory; what an earlier bucket there holds is found again.
        name: The bucket's name.
        region: Where it lives.
        public: Whether anybody may read objects, unsigned.
    """

    def __init__(self, root: Path, name: str, region: str, *, public: bool = False) -> None:
        self.root = root
        self.name = name
        self.region = region
        self.public = public
        self._lock = threading.Lock()
        self._objects: dict[str, Object] = {}
        self._keys: list[bytes] = []
        self._flights: dict[str, set[Flight]] = {}
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        for path in self.root.glob("*.json"):
            entry = Object.parse(path.read_bytes(), path)
            self._objects[entry.key] = entry
        known = {entry.file for entry in self._objects.values()}
        for path in self.root.glob("*.data"):
            if path.name not in known:  # of a write that was cut short
                path.unlink()
        self._keys = sorted(key.encode() for key in self._objects)

    def _metadata_path(self, key: str) -> Path:
        return self.root / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def get(self, key: str) -> Object | None:
        """Return the object, if there is one."""
        with self._lock:
            return self._objects.get(key)

    def open(self, key: str) -> tuple[Object, FileRange] | None:
        """Open the object as it is now: a later write does not change what is read."""
        with self._lock:
            entry = self._objects.get(key)
            if entry is None:
                return None
            file = (self.root / entry.file).open("rb")
        return entry, FileRange(file, 0, entry.size)

    def draft(self) -> Draft:
        """Open a new data file."""
        path = self.root / f"{uuid.uuid4().hex}.data"
        return Draft(path, path.open("xb"))

    @contextlib.contextmanager
    def flight(self, key: str, condition: Condition) -> Iterator[Flight]:
        """Announce a write: refused at once where its condition already fails, watched until it is over."""
        flight = Flight(key, condition)
        with self._lock:
            condition.check(self._objects.get(key))
            self._flights.setdefault(key, set()).add(flight)
        try:
            yield flight
        finally:
            with self._lock:
                flights = self._flights[key]
                flights.discard(flight)
                if not flights:
                    del self._flights[key]

    def publish(self, flight: Flight, draft: Draft, entry: Object) -> None:
        """Make a draft the object.

        Of conditional writes at the same time the first to finish wins. Whoever was disturbed gets
        409 ConditionalRequestConflict ("a conflicting operation occurred during the upload") and tries again;
        whoever was not finds things as its condition was checked when the flight began.
        """
        draft.file.close()
        with self._lock:
            old = self._objects.get(entry.key)
            conditional = flight.condition != Condition()
            if conditional and flight.disturbed:
                raise Refusal(
                    409,
                    "ConditionalRequestConflict",
                    "The conditional request cannot succeed due to a conflicting operation against this resource.",
                    [("Key", entry.key)],
                )
            final = self._metadata_path(entry.key)
            temporary = final.with_suffix(".new")
            temporary.write_bytes(entry.dump())
            temporary.replace(final)
            draft.published = True
            self._objects[entry.key] = entry
            if old is None:
                bisect.insort(self._keys, entry.key.encode())
            else:
                (self.root / old.file).unlink(missing_ok=True)
            self._disturb(flight.key, flight)

    def delete(self, key: str, condition: Condition) -> bool:
        """Delete an object; say whether there was one."""
        with self._lock:
            old = self._objects.get(key)
            condition.check(old)
            self._disturb(key, None)
            if old is None:
                return False
            self._metadata_path(key).unlink(missing_ok=True)
            (self.root / old.file).unlink(missing_ok=True)
            del self._objects[key]
            del self._keys[bisect.bisect_left(self._keys, key.encode())]
            return True

    def _disturb(self, key: str, but: Flight | None) -> None:
        for flight in self._flights.get(key, ()):
            if flight is not but:
                flight.disturbed = True

    def listing(
        self, prefix: str, delimiter: str, after: str, limit: int
    ) -> tuple[list[Object | str], str | None]:
        """List objects and common prefixes (as text) in the order of their UTF-8 bytes.

        Args:
            prefix: Of the keys.
            delimiter: Keys that hold it beyond the prefix are rolled up; "" for none.
            after: A key or common prefix; what follows it is listed.
            limit: The most entries.

        Returns:
            The entries, and what to give as `after` for the next, or None where these are all.
        """
        found: list[Object | str] = []
        wanted, cut = prefix.encode(), delimiter.encode()
        with self._lock:
            position = bisect.bisect_left(self._keys, wanted)
            if after:
                position = max(position, self._beyond(after, wanted, cut))
            while position < len(self._keys) and self._keys[position].startswith(wanted):
                if len(found) == limit:
                    last = found[-1] if found else None
                    return found, last.key if isinstance(last, Object) else last
                key = self._keys[position]
                end = key.find(cut, len(wanted)) if cut else -1
                if end < 0:
                    found.append(self._objects[key.decode()])
                    position += 1
                else:
                    common = key[: end + len(cut)]
                    found.append(common.decode())
                    position = self._past(common)
        return found, None

    def _beyond(self, after: str, prefix: bytes, cut: bytes) -> int:
        """Find the first key after a key, or after all keys under a common prefix."""
        last = after.encode()
        if cut and last.startswith(prefix) and last.find(cut, len(prefix)) == len(last) - len(cut):
            return self._past(last)
        return bisect.bisect_right(self._keys, last)

    def _past(self, prefix: bytes) -> int:
        # No byte of UTF-8 is 0xFF: the next byte string beside the prefix lies beyond all its keys.
        return bisect.bisect_left(self._keys, prefix[:-1] + bytes([prefix[-1] + 1]))

    def __len__(self) -> int:
        with self._lock:
            return len(self._objects)

    def keys(self) -> list[str]:
        """Return all keys, in the order of their bytes."""
        with self._lock:
            return [key.decode() for key in self._keys]


def _precondition(header: str) -> Refusal:
    return Refusal(
        412,
        "PreconditionFailed",
        "At least one of the pre-conditions you specified did not hold",
        [("Condition", header)],
    )
