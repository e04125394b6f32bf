"""CloudWatch: the states of alarms, by their names.

Source: Amazon CloudWatch API reference, DescribeAlarms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calve.aws.session import needs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calve.aws.session import Session

__all__ = ["Alarms"]

_MOST = 100
"""Names in one request."""


class Alarms:
    """CloudWatch's alarms for one session; thread-safe."""

    def __init__(self, session: Session) -> None:
        self._client = session.client("cloudwatch")

    @needs("cloudwatch:DescribeAlarms")
    def states(self, names: Iterable[str]) -> dict[str, str]:
        """Return alarms' states (`OK`, `ALARM`, `INSUFFICIENT_DATA`) by their names; one that is missing is left out.

        Args:
            names: of metric and of composite alarms.
        """
        wanted = list(dict.fromkeys(names))
        found: dict[str, str] = {}
        for at in range(0, len(wanted), _MOST):
            answer = self._client.describe_alarms(
                AlarmNames=wanted[at : at + _MOST],
                AlarmTypes=["MetricAlarm", "CompositeAlarm"],
                MaxRecords=_MOST,
            )
            for kind in ("MetricAlarms", "CompositeAlarms"):
                found |= {one["AlarmName"]: one["StateValue"] for one in answer.get(kind, ())}
        return found
