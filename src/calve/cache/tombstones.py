"""What garbage collection is about to remove: the record of a collection, and the list of its objects.

The record, `gc.json`, is that of the last collection or of the one under way. Version 1:

    {"version": 1, "id": ID, "state": "marked", "sweeping" or "done", "marked": TIME, "grace_s": N, "objects": N,
     "bytes": N, "told": BOOL, "sweeper": ID or null, "expires": TIME or null, "swept": TIME or null,
     "removed_objects": N, "removed_bytes": N}

`objects` and `bytes` are what has tombstones. `told` says that every root under `roots/push/` names this collection;
the grace begins with the write that says so. `sweeper` and `expires` are the lease of who removes. Times are
`YYYY-MM-DDTHH:MM:SSZ`, by the clock of the cache's store.

The tombstones, `gc/<id>.tombstones.zst`, are text: a line `KEY TAG SIZE` for every object, sorted by the bytes of the
keys, where the tag is that of the version which nothing kept. They are there before the record that names them, and
while its state is `marked` or `sweeping`; only such a version, under such a key, is ever removed.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection as Many
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from calve import record
from calve.cache.compression import compressor, decompressor
from calve.cache.objects import Listed, is_missing
from calve.errors import AccessError, DamagedError, NotFoundError

if TYPE_CHECKING:
    from calve.cache.objects import Objects

__all__ = [
    "PREFIX",
    "RECORD",
    "Collection",
    "Doomed",
    "doomed",
    "key",
    "read",
    "read_tombstones",
    "write",
    "write_tombstones",
]

VERSION = 1
RECORD = "gc.json"
PREFIX = "gc/"
"""Below it lies what only garbage collection writes and reads."""
MARKED, SWEEPING, DONE = "marked", "sweeping", "done"
_MAX_BYTES = 4096
_LEVEL = 3
_CHUNK_BYTES = 256 * 1024
_MAX_LINE_BYTES = 2048
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_LINE = re.compile(r"([!-~]{1,1024}) ([!-~]{1,200}) (0|[1-9][0-9]{0,17})")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TRIES = 5
_Bytes: TypeAlias = bytes  # which a record has a field of, too


def _id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise DamagedError(f"{text[:100]!r} is not an id of letters, digits, `.`, `_` and `-`")
    return text


def _state(text: str) -> str:
    if text not in {MARKED, SWEEPING, DONE}:
        raise DamagedError(f"{text[:100]!r} is not a state of a collection")
    return text


def _time(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)
    except ValueError:
        raise DamagedError(f"{text[:100]!r} is not a time") from None


def _stamp(time: datetime.datetime | None) -> str | None:
    return None if time is None else time.astimezone(datetime.UTC).strftime(_TIME)


@dataclass(frozen=True, slots=True)
class Collection:
    """One garbage collection; the fields are those of `gc.json`."""

    id: str
    state: str
    marked: datetime.datetime
    grace_s: int
    objects: int
    bytes: int
    told: bool = False
    sweeper: str | None = None
    expires: datetime.datetime | None = None
    swept: datetime.datetime | None = None
    removed_objects: int = 0
    removed_bytes: int = 0

    @property
    def under_way(self) -> bool:
        """Say whether it may still remove something."""
        return self.state != DONE

    def dump(self) -> _Bytes:
        """Write it."""
        return record.dump(
            {
                "version": VERSION,
                "id": self.id,
                "state": self.state,
                "marked": _stamp(self.marked),
                "grace_s": self.grace_s,
                "objects": self.objects,
                "bytes": self.bytes,
                "told": self.told,
                "sweeper": self.sweeper,
                "expires": _stamp(self.expires),
                "swept": _stamp(self.swept),
                "removed_objects": self.removed_objects,
                "removed_bytes": self.removed_bytes,
            }
        )

    @classmethod
    def parse(cls, data: _Bytes, place: str = RECORD) -> Collection:
        """Read it; DamagedError where it is malformed, UsageError where its version is not known."""
        fields = record.parse(
            data,
            what="record of garbage collection",
            version=VERSION,
            limit=_MAX_BYTES,
            place=place,
        )
        made = cls(
            id=fields.text("id", _id),
            state=fields.text("state", _state),
            marked=fields.text("marked", _time),
            grace_s=fields.number("grace_s"),
            objects=fields.number("objects"),
            bytes=fields.number("bytes"),
            told=fields.flag("told"),
            sweeper=fields.optional("sweeper", _id),
            expires=fields.optional("expires", _time),
            swept=fields.optional("swept", _time),
            removed_objects=fields.number("removed_objects"),
            removed_bytes=fields.number("removed_bytes"),
        )
        if made.state == SWEEPING and (made.sweeper is None or made.expires is None):
            raise DamagedError("it is being swept, but nobody has the lease", place=place)
        return made


def read(objects: Objects) -> tuple[Collection, str] | None:
    """Read the record and its version's tag: one request; None where no collection ever began.

    Raises:
        DamagedError: it is malformed.
        UsageError: its version is one that we do not read.
    """
    try:
        data, tag = objects.get_tagged(RECORD, _MAX_BYTES)
    except (NotFoundError, AccessError) as error:
        if isinstance(error, AccessError) and not is_missing(error):
            raise
        return None
    return Collection.parse(data, f"{objects.url}/{RECORD}"), tag


def write(objects: Objects, collection: Collection, match: str | None = None) -> bool:
    """Write the record in place of its version `match`, without one only where there is none; say whether it was."""
    data = collection.dump()
    if match is None:
        return objects.put(RECORD, data, only_new=True, content_type="application/json")
    return objects.put(RECORD, data, match=match, content_type="application/json")


def key(name: str) -> str:
    """Return where the tombstones of the collection of this id lie."""
    return f"{PREFIX}{_id(name)}.tombstones.zst"


def write_tombstones(objects: Objects, name: str, listed: Iterable[Listed]) -> None:
    """Write the tombstones of a collection, as they come.

    Args:
        objects: the cache.
        name: the collection's id, which was never used before.
        listed: the versions that nothing keeps, sorted by the bytes of their keys.

    Raises:
        DamagedError: a key or a tag is not one that can be written down.
    """
    place = f"{objects.url}/{key(name)}"
    with closing(_compressed(listed, place)) as chunks:
        objects.put_stream(key(name), chunks, content_type="application/zstd")


def _compressed(listed: Iterable[Listed], place: str) -> Generator[bytes, None, None]:
    made = compressor(_LEVEL)
    last = ""
    lines: list[str] = []
    size = 0
    for one in listed:
        line = f"{one.key} {one.tag} {one.size_bytes}"
        if not _LINE.fullmatch(line) or one.key <= last:
            raise DamagedError(f"a listing has {line[:200]!r} after {last!r}", place=place)
        last = one.key
        lines.append(f"{line}\n")
        size += len(line)
        if size >= _CHUNK_BYTES:
            yield from filter(None, [bytes(made.compress("".join(lines).encode("ascii")))])
            lines.clear()
            size = 0
    yield bytes(made.compress("".join(lines).encode("ascii"))) + bytes(made.flush())


def read_tombstones(objects: Objects, name: str) -> Iterator[Listed]:
    """Read the tombstones of a collection as they come; `modified_s` is 0.

    Raises:
        NotFoundError: they are not there, for the collection is done.
        DamagedError: they are malformed.
    """
    place = f"{objects.url}/{key(name)}"
    with objects.open(key(name)) as source:
        content = decompressor("zstd", source.read, place=place)
        last = ""
        rest = b""
        while chunk := content(_CHUNK_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _MAX_LINE_BYTES:
                break
            for line in lines:
                one = _parse(line, place)
                if one.key <= last:
                    raise DamagedError(f"{one.key} is not in its order", place=place)
                last = one.key
                yield one
        if rest:
            raise DamagedError("its last line has no end", place=place)


def _parse(line: bytes, place: str) -> Listed:
    found = _LINE.fullmatch(line.decode("ascii", "replace"))
    if found is None:
        raise DamagedError(f"{line[:200]!r} is not a tombstone", place=place)
    return Listed(found[1], int(found[3]), found[2], 0.0)


@dataclass(frozen=True, slots=True)
class Doomed:
    """What the collection under way may remove: its id (None where there is none), and which of the keys asked for."""

    gc: str | None
    keys: frozenset[str]


def doomed(objects: Objects, keys: Many[str]) -> Doomed:
    """Say which of some keys the collection under way may remove at any moment.

    One request where no collection is under way, two else. To be asked after one's pending record was written.

    Raises:
        DamagedError: the record or the tombstones are malformed, or the tombstones are gone.
    """
    wanted = keys if isinstance(keys, set | frozenset) else frozenset(keys)
    seen = None
    for _ in range(_TRIES):
        found = read(objects)
        if found is None or not found[0].under_way:
            return Doomed(None, frozenset())
        name = found[0].id
        if name == seen:
            break
        seen = name
        try:
            listed = read_tombstones(objects, name)
            return Doomed(name, frozenset(one.key for one in listed if one.key in wanted))
        except NotFoundError:  # they go once the collection is done
            continue
    raise DamagedError(
        "garbage collection is under way, but its tombstones are gone",
        place=f"{objects.url}/{key(seen or '')}",
    )
