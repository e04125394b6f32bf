"""A tiny CloudWatch: alarms whose state the simulation sets, DescribeAlarms and PutMetricAlarm.

    cloud.alarms.set("web-5xx", "ALARM", "Threshold Crossed: 1 datapoint was greater than the threshold")

Source: Amazon CloudWatch API reference (2010-08-01), DescribeAlarms, PutMetricAlarm, MetricAlarm. There are no metrics: a
new alarm has INSUFFICIENT_DATA, as on AWS until it was evaluated, and stays so until it is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from calve.region.awsjson import CLOUDWATCH
from calve.region.names import arn
from calve.region.query import page

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from calve.region.query import Action, Dialect, Params

__all__ = ["Alarms"]

STATES = frozenset({"OK", "ALARM", "INSUFFICIENT_DATA"})


@dataclass(frozen=True, slots=True)
class _Alarm:
    name: str
    state: str
    reason: str
    changed_at: float


class Alarms:
    """Alarms by name, and CloudWatch's action.

    Args:
        region: The region's name.
        now: The time of day in seconds.

    Attributes:
        states: Every alarm's state by name, as it is at any moment; not to be written.
    """

    dialect: Dialect = CLOUDWATCH

    def __init__(self, region: str, now: Callable[[], float]) -> None:
        self._region = region
        self._now = now
        self._alarms: dict[str, _Alarm] = {}
        self._states: dict[str, str] = {}
        self.states: Mapping[str, str] = MappingProxyType(self._states)
        self.actions: Mapping[str, Action] = {
            "DescribeAlarms": self._describe,
            "PutMetricAlarm": self._put,
        }

    def set(self, name: str, state: str, reason: str = "") -> None:
        """Put an alarm into a state, and make it where there is none of that name; thread-safe.

        Raises:
            ValueError: The state is not OK, ALARM or INSUFFICIENT_DATA.
        """
        if state not in STATES:
            raise ValueError(f"an alarm's state is one of {', '.join(sorted(STATES))}, not {state}")
        self._alarms[name] = _Alarm(name, state, reason, self._now())
        self._states[name] = state

    def _describe(self, params: Params, _now: float) -> Mapping[str, Any]:
        names, prefix = params.strings("AlarmNames"), params.text("AlarmNamePrefix")
        kinds, state = params.strings("AlarmTypes"), params.text("StateValue")
        if names is not None and prefix is not None:
            raise params.refusal("AlarmNames and AlarmNamePrefix cannot be used together")
        found = [
            one
            for one in sorted(self._alarms.values(), key=lambda alarm: alarm.name)
            if (names is None or one.name in names)
            and one.name.startswith(prefix or "")
            and state in {None, one.state}
            and (kinds is None or "MetricAlarm" in kinds)
        ]
        shown, token = page(found, params, "MaxRecords", mark="NextToken", most=100)
        params.done()
        rows = [self._row(one) for one in shown]
        return {"MetricAlarms": rows, "CompositeAlarms": [], "NextToken": token}

    def _put(self, params: Params, _now: float) -> Mapping[str, Any]:
        name = params.need("AlarmName")
        for text in ("AlarmDescription", "ComparisonOperator", "TreatMissingData", "Threshold"):
            params.text(text)
        params.integer("EvaluationPeriods", 1, 1000)
        for one in params.structs("Metrics"):
            one.need("Id")
            one.raw("MetricStat")
            one.text("Expression")
            one.text("Label")
            one.boolean("ReturnData")
        params.done()
        if name not in self._alarms:
            self.set(name, "INSUFFICIENT_DATA", "Unchecked: Initial alarm creation")
        return {}

    def _row(self, one: _Alarm) -> dict[str, Any]:
        return {
            "AlarmName": one.name,
            "AlarmArn": arn("cloudwatch", self._region, f"alarm:{one.name}"),
            "ActionsEnabled": True,
            "StateValue": one.state,
            "StateReason": one.reason,
            "StateUpdatedTimestamp": one.changed_at,
        }
