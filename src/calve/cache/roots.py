"""Records that keep objects from garbage collection: roots, and pushes under way.

A root, `roots/<owner>/<name>.json`, keeps a manifest and all that it names. Version 1:

    {"version": 1, "owner": …, "name": …, "manifest": SHA256, "created": TIME}

A pending record, `pending/<id>.json`, keeps what a push is about to refer to, from before it looks at what exists
until its manifest is there. Version 1:

    {"version": 1, "id": …, "created": TIME, "expires": TIME, "previous": SHA256 or null, "paths": [DIGEST, …] or null}

Its paths are the 32 digits of each store path; where they are too many for one small record they stand apart, in
`pending/<id>.paths`, one a line, and `paths` is null. Times are `YYYY-MM-DDTHH:MM:SSZ`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.cache import record
from calve.cache.manifest import MAX_PATHS, check_digest
from calve.errors import DamagedError, NotFoundError, UsageError
from calve.nix.storepath import StorePath

if TYPE_CHECKING:
    from calve.cache.objects import Objects

__all__ = [
    "Pending",
    "Root",
    "read_pending",
    "read_root",
    "remove_pending",
    "write_pending",
    "write_root",
]

VERSION = 1
MAX_BYTES = 4096
_MAX_PATHS_BYTES = MAX_PATHS * 33
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_PATH = re.compile(r"[0-9abcdfghijklmnpqrsvwxyz]{32}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise DamagedError(f"{text[:100]!r} is not a name of letters, digits, `.`, `_` and `-`")
    return text


def _digits(text: str) -> str:
    if not _PATH.fullmatch(text):
        raise DamagedError(f"{text[:100]!r} is not the digest of a store path")
    return text


def _time(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.strptime(text, _TIME).replace(tzinfo=datetime.UTC)
    except ValueError:
        raise DamagedError(f"{text[:100]!r} is not a time") from None


def _dump(fields: dict[str, Any]) -> bytes:
    return record.dump({"version": VERSION, **fields})


@dataclass(frozen=True, slots=True)
class Root:
    """Keeps a manifest: whose it is, what for, and which."""

    owner: str
    name: str
    manifest: str
    created: datetime.datetime

    def __post_init__(self) -> None:
        try:
            _name(self.owner), _name(self.name), check_digest(self.manifest)
        except DamagedError as error:
            raise UsageError(error.message, place=f"root {self.owner}/{self.name}") from error

    @property
    def key(self) -> str:
        """Return where it lies."""
        return root_key(self.owner, self.name)

    def dump(self) -> bytes:
        """Write it."""
        return _dump(
            {
                "owner": self.owner,
                "name": self.name,
                "manifest": self.manifest,
                "created": self.created.strftime(_TIME),
            }
        )

    @classmethod
    def parse(cls, data: bytes, place: str = "root") -> Root:
        """Read it; DamagedError where it is malformed, UsageError where its version is not known."""
        fields = record.parse(data, what="root", version=VERSION, limit=MAX_BYTES, place=place)
        return cls(
            owner=fields.text("owner", _name),
            name=fields.text("name", _name),
            manifest=fields.text("manifest", check_digest),
            created=fields.text("created", _time),
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """Keeps what a push is about to refer to; `paths` are the 32 digits of store paths."""

    id: str
    created: datetime.datetime
    expires: datetime.datetime
    previous: str | None
    paths: tuple[str, ...]

    @classmethod
    def of(
        cls,
        name: str,
        paths: Iterable[StorePath],
        *,
        now: datetime.datetime,
        lasts_s: float,
        previous: str | None = None,
    ) -> Pending:
        """Make the record of a push that begins now."""
        digests = tuple(sorted(path.digest for path in paths))
        return cls(_name(name), now, now + datetime.timedelta(seconds=lasts_s), previous, digests)

    def dump(self) -> tuple[bytes, bytes | None]:
        """Write it: the record, and its paths where they stand apart."""
        whole = self._dump(self.paths)
        if len(whole) <= MAX_BYTES:
            return whole, None
        return self._dump(None), "".join(f"{path}\n" for path in self.paths).encode("ascii")

    def _dump(self, paths: tuple[str, ...] | None) -> bytes:
        return _dump(
            {
                "id": self.id,
                "created": self.created.strftime(_TIME),
                "expires": self.expires.strftime(_TIME),
                "previous": self.previous,
                "paths": paths,
            }
        )

    @classmethod
    def parse(cls, data: bytes, apart: bytes | None = None, place: str = "pending") -> Pending:
        """Read it; DamagedError where it is malformed, UsageError where its version is not known."""
        fields = record.parse(
            data, what="pending push", version=VERSION, limit=MAX_BYTES, place=place
        )
        if apart is None:
            paths = fields.texts("paths", _digits)
        else:
            lines = apart.decode("ascii", "replace").splitlines()
            paths = tuple(_digits(line) for line in lines)
        return cls(
            id=fields.text("id", _name),
            created=fields.text("created", _time),
            expires=fields.text("expires", _time),
            previous=fields.optional("previous", check_digest),
            paths=paths,
        )


def root_key(owner: str, name: str) -> str:
    """Return where a root lies."""
    return f"roots/{owner}/{name}.json"


def write_root(objects: Objects, root: Root) -> None:
    """Write a root, in place of an older one of the same name."""
    objects.put(root.key, root.dump(), content_type="application/json")


def read_root(objects: Objects, owner: str, name: str) -> Root | None:
    """Read a root; None where there is none."""
    key = root_key(owner, name)
    try:
        return Root.parse(objects.get(key, MAX_BYTES), f"{objects.url}/{key}")
    except NotFoundError:
        return None


def write_pending(objects: Objects, pending: Pending) -> None:
    """Write a pending record; its paths before it."""
    data, apart = pending.dump()
    if apart is not None:
        objects.put(f"pending/{pending.id}.paths", apart, content_type="text/plain")
    objects.put(f"pending/{pending.id}.json", data, content_type="application/json")


def read_pending(objects: Objects, name: str) -> Pending:
    """Read a pending record and its paths; NotFoundError where there is none."""
    place = f"{objects.url}/pending/{name}.json"
    data = objects.get(f"pending/{name}.json", MAX_BYTES)
    fields = record.parse(data, what="pending push", version=VERSION, limit=MAX_BYTES, place=place)
    apart = None
    if not fields.has("paths"):
        apart = objects.get(f"pending/{name}.paths", _MAX_PATHS_BYTES)
    return Pending.parse(data, apart, place)


def remove_pending(objects: Objects, pending: Pending) -> None:
    """Remove a pending record, then its paths."""
    objects.delete(f"pending/{pending.id}.json")
    if pending.dump()[1] is not None:
        objects.delete(f"pending/{pending.id}.paths")
