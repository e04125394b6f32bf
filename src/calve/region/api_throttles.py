"""How many requests the query APIs take of an account: a token bucket per service and class of actions.

Source: EC2 Developer Guide, "Request throttling for the Amazon EC2 API"; Elastic Load Balancing User Guide, "Request
throttling for the ELB API". EC2 counts each action apart, ELB a class of them. Auto Scaling publishes no figures: ours.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from calve.region.signature import Refusal
from calve.region.throttles import Bucket, throttled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.clock import Clock

__all__ = ["RATES", "ApiThrottles", "Rate"]


@dataclass(frozen=True, slots=True)
class Rate:
    """A bucket: so many requests at once, and so many a second."""

    burst: float
    per_s: float


RATES: Final[Mapping[str, Mapping[str, Rate]]] = MappingProxyType(
    {
        "ec2": {
            "read": Rate(100, 20),
            "unfiltered": Rate(50, 10),
            "write": Rate(50, 5),
            "CreateLaunchTemplateVersion": Rate(100, 5),
            "TerminateInstances": Rate(100, 5),
        },
        "elasticloadbalancing": {"read": Rate(40, 10), "write": Rate(20, 3)},
        "autoscaling": {"read": Rate(100, 10), "write": Rate(20, 3)},
    }
)
"""By service: the class of what only reads, of EC2's `Describe` without any parameter, of all else; an action's own
name goes before its class."""


class ApiThrottles:
    """The buckets of one account; thread-safe.

    Args:
        clock: Fills the buckets. A client that waits by another clock between its tries finds them as they were.
        rates: May be replaced while it is in use; buckets that are there keep their rate. A service that is not
            named takes all.

    Attributes:
        refused: How many requests of each action were too many.
    """

    def __init__(self, clock: Clock, rates: Mapping[str, Mapping[str, Rate]] = RATES) -> None:
        self.rates = rates
        self.refused: Counter[str] = Counter()
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def check(self, service: str, action: str, form: Mapping[str, Any]) -> None:
        """Take one request into account.

        Raises:
            Refusal: RequestLimitExceeded (503) of EC2, ThrottlingException (400) of ELB, Throttling (400) of Auto
                Scaling.
        """
        rates = self.rates.get(service, {})
        kind = action if action in rates else _class(service, action, form)
        rate = rates.get(kind)
        if rate is None:
            return
        key = (service, f"{kind} {action}" if service == "ec2" else kind)
        now_s = self._clock.monotonic()
        with self._lock:
            bucket = self._buckets.get(key)
            if bucket is None:
                bucket = Bucket(rate.per_s, rate.burst, rate.burst, now_s)
                self._buckets[key] = bucket
            if bucket.take(now_s):
                return
            self.refused[action] += 1
        if service == "ec2":
            raise Refusal(503, "RequestLimitExceeded", "Request limit exceeded.")
        raise throttled(
            "ThrottlingException" if service == "elasticloadbalancing" else "Throttling"
        )


def _class(service: str, action: str, form: Mapping[str, Any]) -> str:
    if service == "ec2" and action.startswith("Describe") and not form:
        return "unfiltered"
    return "read" if action.startswith(("Describe", "Get")) else "write"
