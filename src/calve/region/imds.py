"""One machine's instance metadata service, version 2 alone: no answer without a token.

Source: "Use the Instance Metadata Service" and "Instance metadata categories" (EC2 User Guide). Served by a
`Server` of its own per machine; faults are the server's: `FaultPlan().add(Answer(Response(503)), times=3)`, or with
`path="*/iam/security-credentials/*"` and 404 for credentials that are late.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from calve.clock import SYSTEM, Clock
from calve.region.message import Response

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Mapping

    from calve.region.message import Request
    from calve.region.signature import Key

__all__ = ["Imds", "Instance"]

_ROOT = re.compile(r"/(?:latest|\d{4}-\d{2}-\d{2})/")
_TTL = "x-aws-ec2-metadata-token-ttl-seconds"
_CALLS = 10_000


@dataclass(frozen=True, slots=True)
class Instance:
    """What an instance's metadata says. What changes while it runs is asked for at each request.

    Attributes:
        role: The instance profile's role; None without a profile.
        user_data: The user data; None for none.
        credentials: The role's current key; None: not there yet (404).
        lifecycle_state: Where its Auto Scaling group wants it: `InService`, `Terminated`, …; None outside of groups.
        tags: Those shown in metadata; None where the instance does not show any.
    """

    instance_id: str
    region: str
    availability_zone: str
    local_ipv4: str
    instance_type: str = "t3.nano"
    image_id: str = "ami-00000000000000000"
    account_id: str = "000000000000"
    architecture: str = "x86_64"
    role: str | None = None
    user_data: Callable[[], bytes | None] = field(default=lambda: None)
    credentials: Callable[[], Key | None] = field(default=lambda: None)
    lifecycle_state: Callable[[], str | None] = field(default=lambda: None)
    tags: Callable[[], Mapping[str, str] | None] = field(default=lambda: None)


class Imds:
    """The service of one instance; `handle` is what a `Server` serves.

    Attributes:
        calls: The last requests: method, path, status.
    """

    def __init__(self, instance: Instance, *, clock: Clock = SYSTEM) -> None:
        self.instance = instance
        self.clock = clock
        self.calls: deque[tuple[str, str, int]] = deque(maxlen=_CALLS)
        self._started = clock.now()
        self._tokens: dict[str, float] = {}
        self._lock = threading.Lock()

    def handle(self, request: Request) -> Response:
        """Answer a request."""
        if request.path == "/latest/api/token":
            response = self._token(request)
        elif request.method not in {"GET", "HEAD"}:
            response = _plain(405, "Method Not Allowed")
        elif not self._known(request.headers.get("x-aws-ec2-metadata-token", "")):
            response = _plain(401, "Unauthorized")
        else:
            response = self._get(request.path)
        self.calls.append((request.method, request.path, response.status))
        return response

    def expire_tokens(self) -> None:
        """Forget all tokens, as a restart of the service does."""
        with self._lock:
            self._tokens.clear()

    def _token(self, request: Request) -> Response:
        if request.method != "PUT":
            return _plain(405, "Method Not Allowed", {"Allow": "OPTIONS, PUT"})
        if "x-forwarded-for" in request.headers:
            return _plain(403, "Forbidden")
        text = request.headers.get(_TTL, "")
        if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 21600:
            return _plain(400, "Bad Request")
        token = secrets.token_urlsafe(40)
        now = self.clock.monotonic()
        with self._lock:
            self._tokens = {each: end for each, end in self._tokens.items() if end > now}
            self._tokens[token] = now + int(text)
        return Response(200, {"Content-Type": "text/plain", _TTL: text}, token.encode())

    def _known(self, token: str) -> bool:
        with self._lock:
            end = self._tokens.get(token)
        return end is not None and end > self.clock.monotonic()

    def _get(self, path: str) -> Response:
        root = _ROOT.match(path)
        if root is None:
            return _plain(404, "Not Found")
        rest = path[root.end() :]
        if rest == "user-data":
            data = self.instance.user_data()
            if data is None:
                return _plain(404, "Not Found")
            return Response(200, {"Content-Type": "application/octet-stream"}, data)
        if rest.rstrip("/") == "dynamic/instance-identity/document":
            return _text(_json(self._identity()))
        if rest.rstrip("/") != "meta-data" and not rest.startswith("meta-data/"):
            return _plain(404, "Not Found")
        return self._meta_data(rest.removeprefix("meta-data").strip("/"))

    def _meta_data(self, path: str) -> Response:
        entries = self._entries()
        if path in entries:
            return _text(entries[path])
        below = f"{path}/" if path else ""
        names: dict[str, None] = {}
        for entry in entries:
            if entry.startswith(below):
                name, slash, _ = entry[len(below) :].partition("/")
                names[name + slash] = None
        return _text("\n".join(names)) if names else _plain(404, "Not Found")

    def _entries(self) -> dict[str, str]:
        """Return the metadata as it is now, by path below meta-data/."""
        instance = self.instance
        entries = {
            "ami-id": instance.image_id,
            "instance-id": instance.instance_id,
            "instance-type": instance.instance_type,
            "local-ipv4": instance.local_ipv4,
            "placement/availability-zone": instance.availability_zone,
            "placement/region": instance.region,
        }
        state = instance.lifecycle_state()
        if state is not None:
            entries["autoscaling/target-lifecycle-state"] = state
        if instance.role is not None:
            entries["iam/info"] = _json(self._profile(instance.role))
            key = instance.credentials()
            if key is not None:
                entries[f"iam/security-credentials/{instance.role}"] = _json(self._secrets(key))
        for name, value in (instance.tags() or {}).items():
            entries[f"tags/instance/{name}"] = value
        return entries

    def _profile(self, role: str) -> dict[str, str]:
        return {
            "Code": "Success",
            "LastUpdated": _stamp(self._started),
            "InstanceProfileArn": f"arn:aws:iam::{self.instance.account_id}:instance-profile/{role}",
            "InstanceProfileId": "AIPA0000000000000000",
        }

    def _secrets(self, key: Key) -> dict[str, str]:
        expires = key.expires or self.clock.now()
        return {
            "Code": "Success",
            "LastUpdated": _stamp(self.clock.now()),
            "Type": "AWS-HMAC",
            "AccessKeyId": key.access_key,
            "SecretAccessKey": key.secret_key,
            "Token": key.token or "",
            "Expiration": _stamp(expires),
        }

    def _identity(self) -> dict[str, str | None]:
        instance = self.instance
        return {
            "accountId": instance.account_id,
            "architecture": instance.architecture,
            "availabilityZone": instance.availability_zone,
            "imageId": instance.image_id,
            "instanceId": instance.instance_id,
            "instanceType": instance.instance_type,
            "kernelId": None,
            "pendingTime": _stamp(self._started),
            "privateIp": instance.local_ipv4,
            "ramdiskId": None,
            "region": instance.region,
            "version": "2017-09-30",
        }


def _stamp(moment: dt.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _json(document: Mapping[str, str | None]) -> str:
    return json.dumps(document, indent=2)


def _text(text: str) -> Response:
    return Response(200, {"Content-Type": "text/plain"}, text.encode())


def _plain(status: int, phrase: str, headers: Mapping[str, str] | None = None) -> Response:
    body = f"<html><body><h1>{status} - {phrase}</h1></body></html>\n".encode()
    return Response(status, {"Content-Type": "text/html", **(headers or {})}, body)
