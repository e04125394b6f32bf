"""The committed set v1: what on the root disk is valid, as far as the agent itself knows.

`/nix/var/calve/committed.json`: `committed` are the paths of finished boots, `fetched` those of a pull that has
not finished. Nix's own lists are the database, which the agent never opens, and `/nix-path-registration`, which
waits for stage 2 to load it. A name in the store is no proof: a power cut leaves empty files under final names.

What counts as valid: the registration's paths (stage 2 has not run since), `fetched` (it cannot have run since),
and of `committed` what a profile generation or a garbage-collection root still reaches: stage 2's collector may
have deleted, in part, whatever else there was.

Beside it, `/nix/var/calve/keyrings.json`: the highest sequence of each cache's keyring that this machine has seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from calve.errors import CalveError
from calve.nix.hashes import Hash
from calve.nix.narinfo import PathInfo
from calve.nix.storepath import StorePath

__all__ = ["VERSION", "Record", "dump_sequences", "parse_sequences", "reachable"]

VERSION = 1
_DAMAGE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
    CalveError,
)
Infos = Mapping[StorePath, PathInfo]


@dataclass(frozen=True, slots=True)
class Record:
    """The committed set: paths of finished boots, and of the one under way."""

    committed: Infos
    fetched: Infos

    def dump(self) -> bytes:
        """Return the file's content."""
        body = {
            "version": VERSION,
            "committed": [_row(self.committed[path]) for path in sorted(self.committed)],
            "fetched": [_row(self.fetched[path]) for path in sorted(self.fetched)],
        }
        return json.dumps(body, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Read the file; a damaged one, or one of a newer version, is an empty record: all is fetched again."""
        try:
            body = json.loads(data)
            if body["version"] != VERSION:
                return cls({}, {})
            return cls(_infos(body["committed"]), _infos(body["fetched"]))
        except _DAMAGE:
            return cls({}, {})


def dump_sequences(sequences: Mapping[str, int]) -> bytes:
    """Return the file of what was seen of keyrings, by the caches' URLs."""
    body = {"version": VERSION, "sequences": dict(sorted(sequences.items()))}
    return json.dumps(body, separators=(",", ":")).encode()


def parse_sequences(data: bytes) -> dict[str, int]:
    """Read that file; of a damaged one, or one of a newer version, nothing is known."""
    try:
        body = json.loads(data)
        if body["version"] != VERSION:
            return {}
        return {str(url): int(number) for url, number in body["sequences"].items()}
    except _DAMAGE:
        return {}


def _row(info: PathInfo) -> dict[str, Any]:
    return {
        "path": info.path.basename,
        "narHash": info.nar_hash.sri,
        "narSize": info.nar_size,
        "references": [path.basename for path in info.references],
        "deriver": None if info.deriver is None else info.deriver.basename,
    }


def _infos(rows: Iterable[dict[str, Any]]) -> dict[StorePath, PathInfo]:
    infos = (
        PathInfo(
            path=StorePath.from_basename(row["path"]),
            nar_hash=Hash.parse(row["narHash"]),
            nar_size=int(row["narSize"]),
            references=tuple(StorePath.from_basename(name) for name in row["references"]),
            deriver=None if row["deriver"] is None else StorePath.from_basename(row["deriver"]),
            signatures=(),
            ca=None,
        )
        for row in rows
    )
    return {info.path: info for info in infos}


def reachable(infos: Infos, roots: Iterable[StorePath]) -> dict[StorePath, PathInfo]:
    """Return the part of `infos` that the roots reach."""
    found: dict[StorePath, PathInfo] = {}
    todo = list(roots)
    while todo:
        path = todo.pop()
        if path in found or path not in infos:
            continue
        found[path] = infos[path]
        todo.extend(infos[path].references)
    return found
