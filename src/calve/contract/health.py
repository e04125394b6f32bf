"""Health v1: what must hold before a machine counts as healthy; stage 2 tries it until it does.

Two have a say, and all of it must hold. The closure, in `/etc/calve/health.json`:

    {"version": 1, "http": [{"path": "/healthz", "port": 80}], "tcp": [22], "units": ["nginx.service"],
     "command": "…", "within_s": 180}

and user data, whose member `health` is the same without `version`, `units` and `command`: a launch template says
where to knock, it brings no program.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from calve.errors import DamagedError

__all__ = ["LIMIT_BYTES", "MOST_S", "VERSION", "WITHIN_S", "Health", "Http"]

VERSION: Final = 1
LIMIT_BYTES: Final = 64 * 1024
WITHIN_S: Final = 180
MOST_S: Final = 3600
_MOST: Final = 64
_TEXT: Final = 4096
_PORTS: Final = range(1, 65536)


@dataclass(frozen=True, slots=True)
class Http:
    """A path that must answer 2xx on this machine."""

    path: str
    port: int = 80


@dataclass(frozen=True, slots=True)
class Health:
    """What must hold.

    Attributes:
        http: paths that must answer 2xx on 127.0.0.1.
        tcp: ports that must accept a connection there.
        units: systemd units that must be active.
        command: a shell command that must succeed; empty for none.
        within_s: seconds until all of it must hold.
    """

    http: tuple[Http, ...] = ()
    tcp: tuple[int, ...] = ()
    units: tuple[str, ...] = ()
    command: str = ""
    within_s: int = WITHIN_S

    def dump(self) -> dict[str, Any]:
        """Return user data's member: what of it a launch template may say."""
        return {
            "http": [{"path": one.path, "port": one.port} for one in self.http],
            "tcp": list(self.tcp),
            "within_s": self.within_s,
        }

    def dump_file(self) -> bytes:
        """Return the closure's file."""
        more = {"units": list(self.units), "command": self.command}
        return json.dumps({"version": VERSION, **self.dump(), **more}, indent=1).encode() + b"\n"

    def with_more(self, other: Health) -> Health:
        """Return both: all that either asks for, within the time of this one."""
        return Health(
            http=tuple(dict.fromkeys((*self.http, *other.http))),
            tcp=tuple(dict.fromkeys((*self.tcp, *other.tcp))),
            units=tuple(dict.fromkeys((*self.units, *other.units))),
            command=self.command or other.command,
            within_s=self.within_s,
        )

    @classmethod
    def parse(cls, body: object, place: str) -> Health:
        """Read user data's member; what else is in it is passed over.

        Raises:
            DamagedError: a member is not of its kind; the message names it.
        """
        fields = _object(body, place)
        within_s = fields.get("within_s", WITHIN_S)
        if not _is_number(within_s) or not 1 <= within_s <= MOST_S:
            raise _wrong(place, "within_s", f"seconds, 1 to {MOST_S}")
        return cls(
            http=tuple(_http(one, place) for one in _list(fields, "http", place)),
            tcp=tuple(_port(one, "tcp", place) for one in _list(fields, "tcp", place)),
            within_s=within_s,
        )

    @classmethod
    def parse_file(cls, data: bytes, place: str) -> Health:
        """Read the closure's file.

        Raises:
            DamagedError: it is not one, or of another version.
        """
        if len(data) > LIMIT_BYTES:
            raise DamagedError(f"more than {LIMIT_BYTES} bytes", place=place)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"no JSON: {error}", place=place) from error
        fields = _object(body, place)
        if fields.get("version") != VERSION:
            raise DamagedError(f"no health of version {VERSION}", place=place)
        shared = cls.parse(fields, place)
        return cls(
            http=shared.http,
            tcp=shared.tcp,
            units=tuple(_text(one, "units", place) for one in _list(fields, "units", place)),
            command=_command(fields.get("command", ""), place),
            within_s=shared.within_s,
        )


def _wrong(place: str, name: str, wanted: str) -> DamagedError:
    return DamagedError(f"{name} must be {wanted}", place=place)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _object(body: object, place: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise DamagedError("no JSON object", place=place)
    return body


def _list(fields: dict[str, Any], name: str, place: str) -> list[Any]:
    value = fields.get(name, [])
    if not isinstance(value, list) or len(value) > _MOST:
        raise _wrong(place, name, f"a list, of {_MOST} at most")
    return value


def _http(body: object, place: str) -> Http:
    if not isinstance(body, dict):
        raise _wrong(place, "http", "a list of objects")
    path = _text(body.get("path"), "http.path", place)
    # It is sent as it stands; a control character or a space would begin another line of the request.
    if not path.startswith("/") or not path.isascii() or " " in path:
        raise _wrong(place, "http.path", "a path, percent-encoded")
    return Http(path, _port(body.get("port", 80), "http.port", place))


def _port(value: Any, name: str, place: str) -> int:
    if not _is_number(value) or value not in _PORTS:
        raise _wrong(place, name, "a port")
    return int(value)


def _text(value: object, name: str, place: str) -> str:
    if not isinstance(value, str) or len(value) > _TEXT or not value.isprintable():
        raise _wrong(place, name, "a text")
    return value


def _command(value: object, place: str) -> str:
    """Read a shell command, which may have several lines."""
    if not isinstance(value, str) or len(value) > _TEXT or "\0" in value:
        raise _wrong(place, "command", "a shell command")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair, which JSON can write and no program be given
        raise _wrong(place, "command", "a shell command") from None
    return value
