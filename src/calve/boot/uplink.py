"""What a machine may tell AWS of its boot: a report in the bucket, and its launch hook.

The report is the evidence of the console, for whoever cannot see the console yet. The hook holds the machine out of
service until it is healthy: it is kept from timing out while the machine works, completed with CONTINUE once it is
well, with ABANDON where it failed, so that the group replaces it at once.
Source: Amazon EC2 Auto Scaling API reference, CompleteLifecycleAction and RecordLifecycleActionHeartbeat.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from calve.boot.policy import Policy
from calve.cache import url as urls
from calve.clock import SYSTEM, Clock
from calve.contract.userdata import Hook, UserData
from calve.errors import CalveError, RefusedError
from calve.tasks import Cancel
from calve.transport import imds, retry, sigv4
from calve.transport.call import signed_request
from calve.transport.http import Client, tls_context

__all__ = ["ABANDON", "BEAT_S", "CONTINUE", "Uplink", "beat", "open_uplink"]

CONTINUE: Final = "CONTINUE"
ABANDON: Final = "ABANDON"
BEAT_S: Final = 60.0
"""A third of the heartbeat timeout that Calve gives its hooks: two beats may be lost."""

_VERSION: Final = "2011-01-01"
_ANSWER_BYTES: Final = 64 * 1024
_PATIENCE: Final = retry.Policy(attempts=None, base_s=0.2, cap_s=5.0, deadline_s=30.0)
_AT_ONCE: Final = retry.Policy(attempts=2, base_s=0.2, cap_s=2.0, deadline_s=10.0)
# Whoever waits for an answer here is a machine that is done, or done for.
_CONNECT_S: Final = 3.0
_READ_S: Final = 5.0


class Uplink:
    """Speaks for one machine and one boot.

    Args:
        wanted: user data.
        client: sends requests; the caller closes it.
        service: the metadata service.
        role: the machine's credentials.
        clock: for waits.
    """

    def __init__(
        self,
        wanted: UserData,
        client: Client,
        service: imds.Imds,
        role: imds.Role,
        *,
        clock: Clock = SYSTEM,
    ) -> None:
        self._wanted = wanted
        self._client = client
        self._service = service
        self._role = role
        self._clock = clock
        self._signer: sigv4.Signer | None = None
        self._endpoint = ""

    def report(self, text: str) -> None:
        """Write the report of this release's boot, over an earlier one's; nothing where nobody reads reports.

        Raises:
            CalveError: it could not be written, after some tries.
        """
        if not self._wanted.reports:
            return
        where = urls.parse(self._wanted.caches[0])
        if not isinstance(where, urls.S3):
            return
        from calve.cache.s3 import S3Objects

        bucket = S3Objects(where, self._client, self._role)
        key = self._wanted.report_key(self._service.instance_id())
        headers = {"content-type": "text/plain; charset=utf-8"}
        retry.retry(
            lambda: bucket.send_once(
                "PUT", key, headers=headers, body=text.encode("utf-8", "replace")
            ),
            _PATIENCE,
            cancel=self._client.cancel,
            clock=self._clock,
        )

    def beat(self) -> None:
        """Restart the hook's timeout; nothing where nothing is held.

        Raises:
            CalveError: it could not be.
        """
        self._call("RecordLifecycleActionHeartbeat", {}, _AT_ONCE)

    def complete(self, result: str) -> None:
        """End the hook's wait with CONTINUE or ABANDON; nothing where nothing is held, or there is no hook.

        Raises:
            CalveError: it could not be, after some tries.
        """
        self._call("CompleteLifecycleAction", {"LifecycleActionResult": result}, _PATIENCE)

    def _call(self, action: str, more: dict[str, str], policy: retry.Policy) -> None:
        hook = self._wanted.hook
        if hook is None:
            return
        fields = {
            "Action": action,
            "Version": _VERSION,
            "AutoScalingGroupName": hook.group,
            "LifecycleHookName": hook.name,
            "InstanceId": self._service.instance_id(),
            **more,
        }
        body = sigv4.query(sorted(fields.items())).encode()
        try:
            retry.retry(
                lambda: self._post(hook, body),
                policy,
                cancel=self._client.cancel,
                clock=self._clock,
            )
        except RefusedError as error:
            if "No active Lifecycle Action" not in error.message:
                raise

    def _post(self, hook: Hook, body: bytes) -> None:
        headers = {"content-type": "application/x-www-form-urlencoded; charset=utf-8"}
        signer = self._connected(hook)
        with signed_request(
            self._client, signer, "POST", self._endpoint, headers=headers, body=body
        ) as response:
            response.read_all(_ANSWER_BYTES)

    def _connected(self, hook: Hook) -> sigv4.Signer:
        if self._signer is None:
            place = "/latest/meta-data/placement/region"
            region = self._service.get(place).decode("ascii", "replace").strip()
            domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
            self._endpoint = hook.endpoint or f"https://autoscaling.{region}.{domain}/"
            self._signer = sigv4.Signer("autoscaling", region, self._role, clock=self._clock)
        return self._signer


@contextlib.contextmanager
def open_uplink(
    policy: Policy, wanted: UserData, *, clock: Clock = SYSTEM, cancel: Cancel | None = None
) -> Iterator[Uplink]:
    """Make one with connections of its own: what ended the boot has ended those of the pull.

    Raises:
        CalveError: the image's certificate authorities cannot be read.
    """
    with contextlib.ExitStack() as owner:
        metadata = imds.client(cancel=cancel, clock=clock)
        owner.callback(metadata.close)
        service = imds.Imds(metadata, policy.imds, clock=clock)
        client = Client(
            context=tls_context(policy.ca_file),
            cancel=cancel,
            clock=clock,
            connect_s=_CONNECT_S,
            read_s=_READ_S,
        )
        owner.callback(client.close)
        role = imds.Role(service, clock=clock)
        yield Uplink(wanted, client, service, role, clock=clock)


def beat(
    policy: Policy, wanted: UserData, done: threading.Event, cancel: Cancel, clock: Clock
) -> None:
    """Keep the launch hook from timing out until `done`; a beat that is lost ends nothing."""
    while not clock.wait(done, BEAT_S):
        with (
            contextlib.suppress(CalveError),
            open_uplink(policy, wanted, clock=clock, cancel=cancel) as uplink,
        ):
            uplink.beat()
