"""User data v1: the small JSON document that tells a machine which system it is to be.

    {"calve": {"version": 1, "fleet": "web", "release": 7, "system": "/nix/store/…", "caches": ["s3://…"],
               "manifest": "<sha256 of its body, hex>", "keys": ["acme-1"], "deadline_s": 600,
               "health": {"http": [{"path": "/healthz", "port": 80}], "within_s": 180},
               "hook": {"group": "web", "name": "calve"}, "reports": "boot-reports/AROA…"}}

`health`, `hook` and `reports` may be missing, as they are for an agent that does not know them. One document serves two readers: systemd's IMDS reader looks at `systemd.credentials` beside it and ignores the
rest. It names keys, never brings them: the keys themselves are baked into the image. At most 16 KiB (EC2's bound).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from calve.contract.codes import Code
from calve.contract.health import Health
from calve.errors import DamagedError

__all__ = ["LIMIT_BYTES", "VERSION", "Hook", "UserData", "UserDataError"]

VERSION = 1
LIMIT_BYTES = 16 * 1024
_SYSTEM = re.compile(r"/nix/store/[0-9a-df-np-sv-z]{32}-[0-9a-zA-Z+\-._?=]{1,211}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_GROUP = re.compile(r"[!-9;-~][ -9;-~]{0,254}")  # Auto Scaling's: no colon
_HOOK = re.compile(r"[A-Za-z0-9_/-]{1,255}")
_URL = re.compile(r"https?://[!-~]{1,1024}")
_REPORTS = re.compile(r"[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")


class UserDataError(ValueError):
    """The document cannot be used; `code` says which way."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Hook:
    """The launch hook that holds the machine until it is healthy.

    Attributes:
        group: the Auto Scaling group's name.
        name: the hook's.
        endpoint: URL of the Auto Scaling service; empty for AWS's own in the machine's region.
    """

    group: str
    name: str
    endpoint: str = ""

    def dump(self) -> dict[str, str]:
        """Return the member."""
        body = {"group": self.group, "name": self.name}
        return body | ({"endpoint": self.endpoint} if self.endpoint else {})


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
        health: what must hold before the machine is in service, beside what its closure asks for.
        hook: None where the balancer alone judges.
        reports: the key in the first cache under which this role's machines may write: `boot-reports/` and the
            role's unique id. The machine adds `:`, its instance id and the release. Empty where nobody reads them.
    """

    system: str
    caches: tuple[str, ...]
    manifest: str
    keys: tuple[str, ...]
    fleet: str
    release: int
    deadline_s: int = 600
    health: Health | None = None
    hook: Hook | None = None
    reports: str = ""

    def report_key(self, instance_id: str) -> str:
        """Return where a machine's report of this release lies: `reports` and `:` instance are its `aws:userid`."""
        return f"{self.reports}:{instance_id}/{self.release:08d}.log"

    def dump(self) -> bytes:
        """Return the document; UserDataError where it exceeds EC2's bound."""
        body: dict[str, Any] = {
            "version": VERSION,
            "fleet": self.fleet,
            "release": self.release,
            "system": self.system,
            "caches": list(self.caches),
            "manifest": self.manifest,
            "keys": list(self.keys),
            "deadline_s": self.deadline_s,
        }
        if self.health is not None:
            body["health"] = self.health.dump()
        if self.hook is not None:
            body["hook"] = self.hook.dump()
        if self.reports:
            body["reports"] = self.reports
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
            health=_health(body.get("health")),
            hook=_hook(body.get("hook")),
            reports=_reports(body.get("reports")),
        )


def _health(body: object) -> Health | None:
    try:
        return None if body is None else Health.parse(body, "user data: calve.health")
    except DamagedError as error:
        raise UserDataError(Code.USERDATA_MALFORMED, str(error)) from error


def _hook(body: object) -> Hook | None:
    if body is None:
        return None
    if not isinstance(body, dict):
        raise _malformed("hook", "an object")
    endpoint = body.get("endpoint", "")
    if not isinstance(endpoint, str) or (endpoint and not _URL.fullmatch(endpoint)):
        raise _malformed("hook.endpoint", "a URL")
    return Hook(
        group=_matching(body, "group", _GROUP, "a group's name", "hook."),
        name=_matching(body, "name", _HOOK, "a hook's name", "hook."),
        endpoint=endpoint,
    )


def _reports(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 256 or not _REPORTS.fullmatch(value):
        raise _malformed("reports", "a key, such as boot-reports/AROA…")
    return value


def _malformed(name: str, wanted: str) -> UserDataError:
    return UserDataError(Code.USERDATA_MALFORMED, f"user data: calve.{name} must be {wanted}")


def _get(body: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _malformed(name, {int: "a number", str: "a text"}[kind])
    return value


def _matching(
    body: dict[str, Any], name: str, pattern: re.Pattern[str], wanted: str, of: str = ""
) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _malformed(f"{of}{name}", wanted)
    return value


def _texts(body: dict[str, Any], name: str) -> tuple[str, ...]:
    value = body.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise _malformed(name, "a list of texts, not empty")
    return tuple(value)
