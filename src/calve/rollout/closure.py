"""A closure as the cache has it: whether all of it is there, for what machines it is, and how it wants to be booted.

What it is for and how it boots stand in two files of its toplevel, `system` and `boot.json`, so that one small NAR is
read. Source: RFC 125 (bootspec); nixpkgs, nixos/modules/system/activation/top-level.nix.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from calve.cache.compression import decompressor
from calve.cache.lookup import narinfo_key, read_narinfo
from calve.cache.objects import is_missing
from calve.cache.scope import each
from calve.contract.abi import BOOTSPEC, LIMIT_BYTES, Wanted, parse_wanted
from calve.errors import AccessError, CalveError, DamagedError, NotFoundError
from calve.nix import nar

if TYPE_CHECKING:
    from calve.cache.manifest import Manifest
    from calve.cache.objects import Objects
    from calve.nix.narinfo import NarInfo
    from calve.nix.storepath import StorePath
    from calve.tasks import Cancel

__all__ = ["Closure", "boots", "look", "missing"]

JOBS: Final = 16
"""Requests that are under way at once."""
_MOST_BYTES: Final = 8 << 20
_FILES: Final = {b"boot.json": LIMIT_BYTES, b"system": 256}


@dataclass(frozen=True, slots=True)
class Closure:
    """What was seen of a closure.

    Attributes:
        toplevel: its store path.
        paths: how many it has in this cache.
        missing: those whose narinfo or NAR the cache has lost.
        system: Nix's name of the machines that it is for, `x86_64-linux`; empty where nothing says it.
        boot: how it wants to be booted; None where its toplevel does not say, or was not read.
    """

    toplevel: StorePath
    paths: int
    missing: tuple[StorePath, ...] = ()
    system: str = ""
    boot: Wanted | None = None


def look(
    objects: Objects,
    manifest: Manifest,
    *,
    jobs: int = JOBS,
    cancel: Cancel | None = None,
) -> Closure:
    """Look at a closure.

    Args:
        objects: the cache.
        manifest: the closure's.
        jobs: how many requests are under way at once.
        cancel: stops it.

    Raises:
        AccessError, TransientError, MissingCacheError: the cache could not be asked.
    """
    here = tuple(entry for entry in manifest.paths if entry.url)
    lost = missing(objects, here, jobs=jobs, cancel=cancel)
    top = next((one for one in here if one.info.path == manifest.toplevel), None)
    system, boot = "", None
    if top is not None and top.info.path not in lost:
        system, boot = _said(objects, top)
    return Closure(manifest.toplevel, len(here), lost, system, boot)


def missing(
    objects: Objects,
    entries: tuple[NarInfo, ...],
    *,
    jobs: int = JOBS,
    cancel: Cancel | None = None,
) -> tuple[StorePath, ...]:
    """Return the paths whose narinfo or NAR the cache does not have, sorted; two HEADs for each."""
    tasks = (partial(_is_there, objects, entry) for entry in entries)
    found = each("preflight", tasks, jobs=jobs, cancel=cancel)
    return tuple(sorted(path for path, there in found if not there))


def boots(objects: Objects, toplevel: StorePath) -> Wanted | None:
    """Return how a system of the cache wants to be booted; None where the cache does not say."""
    try:
        return _said(objects, read_narinfo(objects, toplevel))[1]
    except (NotFoundError, AccessError, DamagedError) as error:
        if isinstance(error, DamagedError) or is_missing(error):
            return None
        raise


def _is_there(objects: Objects, entry: NarInfo, cancel: Cancel) -> tuple[StorePath, bool]:
    path = entry.info.path
    for key in (narinfo_key(path), entry.url):
        cancel.check()
        try:
            there = objects.head(key) is not None
        except AccessError as error:
            if not is_missing(error):
                raise
            there = False
        if not there:
            return path, False
    return path, True


def _said(objects: Objects, entry: NarInfo) -> tuple[str, Wanted | None]:
    """Return what a toplevel's files say; nothing where it is too large or damaged: a pull will say so."""
    try:
        files = _files(objects, entry) if entry.info.nar_size <= _MOST_BYTES else {}
        data = files.get(b"boot.json")
        boot = None if data is None else parse_wanted(data, entry.info.path)
    except DamagedError:
        return "", None
    except CalveError as error:
        if is_missing(error):
            return "", None
        raise
    system = files.get(b"system", b"").decode("utf-8", "replace").strip()
    return system or _system_of(data), boot


def _system_of(boot_json: bytes | None) -> str:
    """Return the system that a bootspec names."""
    spec: Any = json.loads(boot_json).get(BOOTSPEC) if boot_json is not None else None
    named = spec.get("system") if isinstance(spec, dict) else None
    return named if isinstance(named, str) else ""


def _files(objects: Objects, entry: NarInfo) -> dict[bytes, bytes]:
    """Return the files that we know of a toplevel's top directory.

    Raises:
        DamagedError: the NAR is not the one of this entry.
    """
    with objects.open(entry.url) as source:
        read = decompressor(entry.compression, source.read, place=entry.info.path)
        left, chunks = entry.info.nar_size + 1, []
        while left > 0 and (chunk := read(min(left, 1 << 18))):
            chunks.append(bytes(chunk))
            left -= len(chunk)
    data = b"".join(chunks)
    if hashlib.sha256(data).digest() != entry.info.nar_hash.digest:
        raise DamagedError("the NAR is not the one that was signed", place=entry.info.path)
    return _picked(data)


def _picked(data: bytes) -> dict[bytes, bytes]:
    """Return the files of a NAR that are wanted, by their names."""
    at = 0

    def source(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    found: dict[bytes, bytes] = {}
    depth, name = 0, None
    for event in nar.read(source, limit=len(data)):
        if isinstance(event, bytes):
            if name is not None:
                found[name] += event
            continue
        name = None
        if isinstance(event, nar.Directory):
            depth += 1
        elif isinstance(event, nar.End):
            depth -= 1
        elif isinstance(event, nar.File) and depth == 1 and event.size <= _FILES.get(event.name, 0):
            name = event.name
            found[name] = b""
    return found
