"""The instance metadata service, version 2 only, and a role's credentials out of it.

Source: "Use the Instance Metadata Service" in the EC2 user guide. Without a session token nothing is asked: there
is no way back to version 1.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import re
import threading
from typing import TYPE_CHECKING

from calve.clock import SYSTEM, Clock
from calve.errors import (
    AccessError,
    CalveError,
    DamagedError,
    DeadlineError,
    NotFoundError,
    TransientError,
)
from calve.transport.credentials import Credentials
from calve.transport.http import Client
from calve.transport.retry import Policy, retry
from calve.transport.status import raise_for_status

if TYPE_CHECKING:
    from collections.abc import Callable

    from calve.tasks import Cancel

__all__ = ["BASE", "POLICY", "USER_DATA_BYTES", "Imds", "Role", "client"]

BASE = "http://169.254.169.254"
USER_DATA_BYTES = 16384
POLICY = Policy(attempts=None, base_s=0.02, cap_s=3.0, deadline_s=60.0)

_TIMEOUT_S = 1.0
_TTL_S = 300
_MARGIN_S = 30  # a token is not used in its last seconds
_ANSWER_BYTES = 65536
_TOKEN_BYTES = 1024
_ROLE = re.compile(r"[\w+=,.@-]{1,64}", re.ASCII)
_ID = re.compile(r"i-[0-9A-Za-z]{1,40}")
_TOKEN = re.compile(rb"[\x21-\x7e]+")

_REFRESH_BEFORE = dt.timedelta(minutes=5)
_NEW_ROLE_S = 30.0  # how long a role of a new machine may be unknown
_PAUSE_S = 30.0  # between two attempts to renew credentials that are still valid


def client(*, cancel: Cancel | None = None, clock: Clock = SYSTEM) -> Client:
    """Return an HTTP client with timeouts for a service that is one hop away."""
    return Client(cancel=cancel, clock=clock, connect_s=_TIMEOUT_S, read_s=_TIMEOUT_S)


class Imds:
    """The metadata service of this machine; used by many threads.

    Args:
        client: from `client()`; the owner closes it. Its cancel ends every wait.
        base: where the service is.
        clock: for the token's life and for waits.
        rng: gives numbers from 0 to 1.
        policy: how long an unreachable service is waited for.
    """

    def __init__(
        self,
        client: Client,
        base: str = BASE,
        *,
        clock: Clock = SYSTEM,
        rng: Callable[[], float] = random.random,
        policy: Policy = POLICY,
    ) -> None:
        self.policy = policy
        self._client = client
        self._base = base.rstrip("/")
        self._clock = clock
        self._rng = rng
        self._lock = threading.Lock()
        self._token: tuple[str, float] | None = None

    def get(self, path: str, *, limit: int = _ANSWER_BYTES) -> bytes:
        """Return what is at a path such as `/latest/meta-data/instance-id`.

        Args:
            path: with the leading slash.
            limit: DamagedError where the answer is longer than so many bytes.

        Raises:
            NotFoundError: there is nothing at the path.
            AccessError: the service is switched off, or gives no token.
            DeadlineError: it was not reachable in time.
        """
        return self.retry(lambda: self._get(path, limit))

    def user_data(self) -> bytes | None:
        """Return the user data, at most 16 KiB; None where the machine was started without."""
        try:
            return self.get("/latest/user-data", limit=USER_DATA_BYTES)
        except NotFoundError:
            return None

    def instance_id(self) -> str:
        """Return the machine's id, such as `i-0123456789abcdef0`."""
        text = self.get("/latest/meta-data/instance-id").decode("utf-8", "replace").strip()
        if not _ID.fullmatch(text):
            raise DamagedError("the metadata service gives no instance id", place=self._base)
        return text

    def retry(self, function: Callable[[], bytes]) -> bytes:
        """Call `function` under the service's policy."""
        return retry(
            function, self.policy, cancel=self._client.cancel, clock=self._clock, rng=self._rng
        )

    def _get(self, path: str, limit: int) -> bytes:
        """Ask once; once more where the token is refused, with a new one."""
        for last in (False, True):
            token = self._session(fresh=last)
            headers = {"x-aws-ec2-metadata-token": token}
            with self._client.request("GET", self._base + path, headers=headers) as response:
                if response.status == 401 and not last:
                    continue
                if response.status == 403:
                    raise self._off()
                raise_for_status(response)
                return response.read_all(limit)
        raise CalveError("unreachable")

    def _session(self, *, fresh: bool) -> str:
        with self._lock:
            now = self._clock.monotonic()
            if self._token is None or fresh or now >= self._token[1]:
                self._token = (self._new_token(), now + _TTL_S - _MARGIN_S)
            return self._token[0]

    def _new_token(self) -> str:
        url = f"{self._base}/latest/api/token"
        headers = {"x-aws-ec2-metadata-token-ttl-seconds": str(_TTL_S)}
        with self._client.request("PUT", url, headers=headers) as response:
            if response.status in {400, 401, 403, 404, 405}:
                raise self._off()
            raise_for_status(response)
            token = response.read_all(_TOKEN_BYTES)
        if not _TOKEN.fullmatch(token):
            raise DamagedError("the metadata service gives a malformed token", place=url)
        return token.decode("ascii")

    def _off(self) -> AccessError:
        return AccessError(
            "the instance metadata service refuses sessions of version 2",
            place=self._base,
            hint="set HttpEndpoint=enabled in the launch template's metadata options",
        )


class Role:
    """The credentials of the machine's role: a Provider, used by many threads.

    They are renewed 5 minutes before they end. While the service is unreachable the old ones serve to their end.
    """

    def __init__(self, imds: Imds, *, clock: Clock = SYSTEM) -> None:
        self._imds = imds
        self._clock = clock
        self._lock = threading.Lock()
        self._value: Credentials | None = None
        self._next_s = 0.0
        self._born_s = clock.monotonic()

    def credentials(self, *, refresh: bool = False) -> Credentials:
        """Return credentials that are valid now.

        Raises:
            AccessError: the machine has no role (told after 30 s: a new one may not be there yet), or no metadata.
            DeadlineError: the metadata service was not reachable in time.
        """
        with self._lock:
            old = self._value
            now_s = self._clock.monotonic()
            if old is not None and not refresh and (self._fresh(old) or now_s < self._next_s):
                return old
            try:
                self._value = self._fetch()
            except (TransientError, DeadlineError):
                if old is None or refresh or self._ended(old):
                    raise
                self._value = old
            self._next_s = self._clock.monotonic() + _PAUSE_S
            return self._value

    def _fresh(self, value: Credentials) -> bool:
        return value.expires is None or self._clock.now() < value.expires - _REFRESH_BEFORE

    def _ended(self, value: Credentials) -> bool:
        return value.expires is not None and self._clock.now() >= value.expires

    def _fetch(self) -> Credentials:
        try:
            data = self._imds.retry(self._document)
        except NotFoundError as error:
            raise AccessError(
                "the machine has no role", place=error.place, hint="give it an instance profile"
            ) from error
        return _parse(data)

    def _document(self) -> bytes:
        """Fetch the role's name and then its document; a 404 soon after the start may pass."""
        path = "/latest/meta-data/iam/security-credentials/"
        try:
            name = self._imds.get(path).decode("utf-8", "replace").partition("\n")[0].strip()
            if not _ROLE.fullmatch(name):
                raise DamagedError("the metadata service names no role", place=path)
            data = self._imds.get(path + name)
        except NotFoundError as error:
            if self._clock.monotonic() - self._born_s < _NEW_ROLE_S:
                raise TransientError(error.message, place=error.place, hint=error.hint) from error
            raise
        return data


def _parse(data: bytes) -> Credentials:
    """Read a role's document; DamagedError names no value of it."""
    place = "role credentials of the metadata service"
    try:
        fields = json.loads(data)
        code = fields["Code"]
        if code == "Success":
            expires = dt.datetime.fromisoformat(fields["Expiration"])
            access_key, secret_key, token = (
                fields[name] for name in ("AccessKeyId", "SecretAccessKey", "Token")
            )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise DamagedError("malformed document", place=place) from None
    if code != "Success":
        raise AccessError("the metadata service gives no credentials for the role", place=place)
    if not all(isinstance(part, str) and part for part in (access_key, secret_key, token)):
        raise DamagedError("malformed document", place=place)
    if expires.tzinfo is None:
        expires = expires.replace(tzinfo=dt.UTC)
    return Credentials(access_key, secret_key, token, expires)
