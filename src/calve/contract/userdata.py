"""User data v1: the small JSON document that tells a machine which system it is to be.

    {"calve": {"version": 1, "fleet": "web", "release": 7, "system": "/nix/store/…", "caches": ["s3://…"],
               "manifest": "<sha256 of its body, hex>", "keys": ["acme-1"], "deadline_s": 600}}

One document serves two readers: systemd's IMDS reader looks at `systemd.credentials` beside it and ignores the
rest. It names keys, never brings them: the keys themselves are baked into the image. At most 16 KiB (EC2's bound).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from calve.contract.codes import Code

__all__ = ["LIMIT_BYTES", "VERSION", "UserData", "UserDataError"]

VERSION = 1
LIMIT_BYTES = 16 * 1024
_SYSTEM = re.compile(r"/nix/store/[0-9a-df-np-sv-z]{32}-[0-9a-zA-Z+\-._?=]{1,211}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class UserDataError(ValueError):
    """The document cannot be used; `code` says which way."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class UserData:
    """What a machine is to be.

    Attributes:
        system: store path of the system (toplevel).
        caches: URLs of binary caches, in order of priority.
        manifest: sha256 of the closure's manifest body, hex.
        keys: names of the signing keys, among those of the image, that count.
        fleet: name of the fleet.
        release: number of the release.
        deadline_s: seconds from the agent's start until it gives up.
    """

    system: str
    caches: tuple[str, ...]
    manifest: str
    keys: tuple[str, ...]
    fleet: str
    release: int
    deadline_s: int = 600

    def dump(self) -> bytes:
        """Return the document; UserDataError where it exceeds EC2's bound."""
        body = {
            "version": VERSION,
            "fleet": self.fleet,
            "release": self.release,
            "system": self.system,
            "caches": list(self.caches),
            "manifest": self.manifest,
            "keys": list(self.keys),
            "deadline_s": self.deadline_s,
        }
        data = json.dumps({"calve": body}, separators=(",", ":")).encode()
        if len(data) > LIMIT_BYTES:
            raise UserDataError(Code.USERDATA_MALFORMED, f"{len(data)} bytes exceed EC2's 16 KiB")
        return data

    @classmethod
    def parse(cls, data: bytes | None) -> UserData:
        """Read a document; UserDataError tells absent, foreign, too new and damaged apart."""
        if not data:
            raise UserDataError(Code.USERDATA_ABSENT, "the instance has no user data")
        try:
            document = json.loads(data[: LIMIT_BYTES + 1])
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or "calve" not in document:
            raise UserDataError(
                Code.USERDATA_FOREIGN, 'the user data is no JSON object with the member "calve"'
            )
        body = document["calve"]
        version = body.get("version") if isinstance(body, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise UserDataError(
                Code.USERDATA_VERSION, f"user data of version {version}; this image reads {VERSION}"
            )
        if version is None:
            raise _malformed("version", "a number")
        deadline = _get(body, "deadline_s", int, 600)
        release = _get(body, "release", int)
        if not 1 <= deadline <= 86400:
            raise _malformed("deadline_s", "seconds, 1 to 86400")
        return cls(
            system=_matching(body, "system", _SYSTEM, "a store path"),
            caches=_texts(body, "caches"),
            manifest=_matching(body, "manifest", _DIGEST, "a sha256 in hex"),
            keys=_texts(body, "keys"),
            fleet=_get(body, "fleet", str),
            release=release,
            deadline_s=deadline,
        )


def _malformed(name: str, wanted: str) -> UserDataError:
    return UserDataError(Code.USERDATA_MALFORMED, f"user data: calve.{name} must be {wanted}")


def _get(body: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _malformed(name, {int: "a number", str: "a text"}[kind])
    return value


def _matching(body: dict[str, Any], name: str, pattern: re.Pattern[str], wanted: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _malformed(name, wanted)
    return value


def _texts(body: dict[str, Any], name: str) -> tuple[str, ...]:
    value = body.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise _malformed(name, "a list of texts, not empty")
    return tuple(value)
