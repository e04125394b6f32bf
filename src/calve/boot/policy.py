"""The image's policy: what whoever built the image decided, `/etc/calve/agent.json` in the initrd.

    {"version": 1, "root": "/sysroot", "imds": "http://169.254.169.254", "keys": ["acme-1:base64…"],
     "ca_file": "/etc/calve/ca.pem", "memory_mb": 48, "hold_s": 60, "rescue": false, "debug": false}

User data chooses among its keys and can change nothing of it. The kernel command line may set `calve.hold=SECONDS`,
and `calve.debug=1`, which counts only where the image allows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calve.errors import UsageError

__all__ = ["VERSION", "Policy"]

VERSION = 1


@dataclass(frozen=True, slots=True)
class Policy:
    """What the image allows and where it looks.

    Attributes:
        root: where the root file system is mounted.
        imds: base URL of the metadata service.
        keys: trusted public keys, `name:base64`.
        ca_file: certificate authorities for HTTPS; None is OpenSSL's default.
        hold_s: seconds a failed machine stays on, so that its console is read.
        memory_mb: what the agent may use; concurrency follows.
        rescue: where user data is not ours, the image's own system starts; else the machine powers off.
        debug: a root shell on the console may be asked for on the kernel command line.
        run: where this boot leaves what its stage 2 asks for.
    """

    keys: tuple[str, ...]
    root: Path = Path("/sysroot")
    imds: str = "http://169.254.169.254"
    ca_file: str | None = None
    hold_s: float = 60.0
    memory_mb: int = 48
    rescue: bool = False
    debug: bool = False
    run: Path = Path("/run/calve")

    def dump(self) -> bytes:
        """Return the file's content."""
        body = {
            "version": VERSION,
            "root": str(self.root),
            "imds": self.imds,
            "keys": list(self.keys),
            "ca_file": self.ca_file,
            "hold_s": self.hold_s,
            "memory_mb": self.memory_mb,
            "rescue": self.rescue,
            "debug": self.debug,
            "run": str(self.run),
        }
        return json.dumps(body, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes, place: str) -> Policy:
        """Read the file; UsageError names what is wrong with it."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"no JSON: {error}", place=place) from error
        if not isinstance(body, dict) or body.get("version") != VERSION:
            raise UsageError(f"no agent policy of version {VERSION}", place=place)
        keys = _get(body, "keys", list, place, [])
        ca_file = body.get("ca_file")
        return cls(
            keys=tuple(str(key) for key in keys),
            root=Path(_get(body, "root", str, place, "/sysroot")),
            imds=_get(body, "imds", str, place, "http://169.254.169.254"),
            ca_file=None if ca_file is None else str(ca_file),
            hold_s=float(_get(body, "hold_s", (int, float), place, 60.0)),
            memory_mb=_get(body, "memory_mb", int, place, 48),
            rescue=_get(body, "rescue", bool, place, False),  # noqa: FBT003  (a default)
            debug=_get(body, "debug", bool, place, False),  # noqa: FBT003
            run=Path(_get(body, "run", str, place, "/run/calve")),
        )

    def with_command_line(self, line: str) -> Policy:
        """Apply what the kernel command line may set."""
        words = dict(word.partition("=")[::2] for word in line.split())
        hold = words.get("calve.hold", "")
        return replace(
            self,
            hold_s=float(hold) if hold.isdecimal() else self.hold_s,
            debug=self.debug and words.get("calve.debug") == "1",
        )


def _get(body: dict[str, Any], name: str, kind: Any, place: str, default: Any) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind):
        raise UsageError(f"{name} is of the wrong type", place=place)
    return value
