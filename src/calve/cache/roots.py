"""Records that keep objects from garbage collection: roots, and pushes under way.

A root, `roots/<owner>/<name>.json`, keeps a manifest and all that it names. Version 1:

    {"version": 1, "owner": …, "name": …, "manifest": SHA256, "created": TIME, "checked": BOOL, "gc": ID or null}

`checked` says that a push saw everything that the manifest names since the last garbage collection that removed
something; where it is false or missing, the next push looks again. `gc` names the collection whose tombstones were
written since: what a push adds to the manifest's paths it must hold against them first.

A pending record, `pending/<id>.json`, keeps what a push is about to refer to, from before it looks at what exists
until its manifest is there. Version 1:

    {"version": 1, "id": …, "created": TIME, "expires": TIME, "previous": SHA256 or null, "paths": [DIGEST, …] or null}

Its paths are the 32 digits of each store path and the 52 of each NAR's hash, in any order; where they are too many
for one small record they stand apart, in `pending/<id>.paths`, one a line, and `paths` is null. The push renews
`expires` while it lives. Times are `YYYY-MM-DDTHH:MM:SSZ`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from calve import record
from calve.cache.manifest import MAX_PATHS, check_digest
from calve.cache.objects import is_missing
from calve.errors import AccessError, DamagedError, NotFoundError, UsageError
from calve.nix.hashes import encode32
from calve.nix.narinfo import PathInfo

if TYPE_CHECKING:
    from calve.cache.objects import Listed, Objects

__all__ = [
    "Pending",
    "Root",
    "list_pending",
    "list_roots",
    "read_pending",
    "read_root",
    "remove_pending",
    "tagged_root",
    "write_pending",
    "write_root",
]

VERSION = 1
MAX_BYTES = 4096
_MAX_PATHS_BYTES = MAX_PATHS * (33 + 53)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_PATH = re.compile(r"[0-9abcdfghijklmnpqrsvwxyz]{32}(?:[0-9abcdfghijklmnpqrsvwxyz]{20})?")
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise DamagedError(f"{text[:100]!r} is not a name of letters, digits, `.`, `_` and `-`")
    return text


def _digits(text: str) -> str:
    if not _PATH.fullmatch(text):
        raise DamagedError(f"{text[:100]!r} is not the digest of a store path or a NAR")
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
    checked: bool = False
    gc: str | None = None

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
                "checked": self.checked,
                "gc": self.gc,
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
            checked=fields.flag("checked"),
            gc=fields.optional("gc", _name),
        )


@dataclass(frozen=True, slots=True)
class Pending:
    """Keeps what a push is about to refer to; `paths` has the digits of store paths and of NARs' hashes."""

    id: str
    created: datetime.datetime
    expires: datetime.datetime
    previous: str | None
    paths: tuple[str, ...]

    @classmethod
    def of(
        cls,
        name: str,
        infos: Iterable[PathInfo],
        *,
        now: datetime.datetime,
        lasts_s: float,
        previous: str | None = None,
    ) -> Pending:
        """Make the record of a push that begins now."""
        digests = {info.path.digest: encode32(info.nar_hash.digest) for info in infos}
        paths = tuple(sorted({*digests, *digests.values()}))
        return cls(_name(name), now, now + datetime.timedelta(seconds=lasts_s), previous, paths)

    def renewed(self, now: datetime.datetime, lasts_s: float) -> Pending:
        """Return the record of the same push, which lives."""
        return replace(self, expires=now + datetime.timedelta(seconds=lasts_s))

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


def write_root(objects: Objects, root: Root, *, match: str | None = None) -> bool:
    """Write a root in place of an older one of the same name, or only of its version `match`; say whether it was."""
    return objects.put(root.key, root.dump(), match=match, content_type="application/json")


def read_root(objects: Objects, owner: str, name: str) -> Root | None:
    """Read a root; None where there is none."""
    found = tagged_root(objects, owner, name)
    return None if found is None else found[0]


def tagged_root(objects: Objects, owner: str, name: str) -> tuple[Root, str] | None:
    """Read a root and its version's tag; None where there is none."""
    key = root_key(owner, name)
    try:
        data, tag = objects.get_tagged(key, MAX_BYTES)
    except (NotFoundError, AccessError) as error:
        if isinstance(error, AccessError) and not is_missing(error):
            raise
        return None
    return Root.parse(data, f"{objects.url}/{key}"), tag


def write_pending(objects: Objects, pending: Pending, *, renew: bool = False) -> None:
    """Write a pending record; its paths before it, unless it is only renewed."""
    data, apart = pending.dump()
    if apart is not None and not renew:
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


def list_roots(objects: Objects) -> Iterator[tuple[Root, str]]:
    """Read every root, with its version's tag; a request for each. One that goes meanwhile is passed over.

    Raises:
        DamagedError: what lies there is not a root, or that of another key.
        UsageError: a root's version is one that we do not read.
    """
    for listed in objects.list("roots/"):
        place = f"{objects.url}/{listed.key}"
        try:
            data, tag = objects.get_tagged(listed.key, MAX_BYTES)
        except NotFoundError:
            continue
        root = Root.parse(data, place)
        if root.key != listed.key:
            raise DamagedError(f"it says to be the root {root.owner}/{root.name}", place=place)
        yield root, tag


def list_pending(
    objects: Objects,
    *,
    known: Collection[str] = (),
    over: Callable[[Pending, Listed], bool] = lambda _pending, _listed: False,
) -> Iterator[tuple[Pending, Listed]]:
    """Read the pending records, as they are now; one that goes meanwhile is passed over.

    Args:
        objects: the cache.
        known: tags of versions that are not read again.
        over: says of a record whose paths stand apart that nobody wants them: it is given without.

    Raises:
        DamagedError: a record is malformed, or its paths are missing.
        UsageError: its version is one that we do not read.
    """
    for listed in objects.list("pending/"):
        name = listed.key.removeprefix("pending/").removesuffix(".json")
        if not listed.key.endswith(".json") or listed.tag in known:
            continue
        place = f"{objects.url}/{listed.key}"
        try:
            pending = _pending_of(objects, listed, place, over)
        except NotFoundError:
            if objects.head(listed.key) is None:
                continue
            raise DamagedError("its paths are missing", place=place) from None
        if pending.id != name:
            raise DamagedError(f"it says to be the pending push {pending.id}", place=place)
        yield pending, listed


def _pending_of(
    objects: Objects, listed: Listed, place: str, over: Callable[[Pending, Listed], bool]
) -> Pending:
    data = objects.get(listed.key, MAX_BYTES)
    fields = record.parse(data, what="pending push", version=VERSION, limit=MAX_BYTES, place=place)
    if fields.has("paths"):
        return Pending.parse(data, None, place)
    without = Pending.parse(data, b"", place)
    if over(without, listed):
        return without
    apart = objects.get(f"{listed.key.removesuffix('.json')}.paths", _MAX_PATHS_BYTES)
    return Pending.parse(data, apart, place)
