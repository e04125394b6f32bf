"""CloudWatch: the states of alarms, by their names; an alarm upon what a target group answers.

Source: Amazon CloudWatch API reference, DescribeAlarms, PutMetricAlarm; Elastic Load Balancing, "CloudWatch metrics for
your Application Load Balancer".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calve.aws.session import needs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calve.aws.session import Session

__all__ = ["ERRORS_PERCENT", "Alarms"]

ERRORS_PERCENT = 5
"""So many of the answers may be errors of the server's."""
_PERIOD_S, _PERIODS = 60, 2
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

    @needs("cloudwatch:PutMetricAlarm")
    def watch_errors(self, name: str, target_group: str, load_balancer: str) -> None:
        """Make an alarm, or make it anew, that goes off where machines answer with 5xx for two minutes.

        Args:
            name: its name.
            target_group: ARN of the target group.
            load_balancer: ARN of the Application Load Balancer in front of it.
        """
        dimensions = [
            {"Name": "TargetGroup", "Value": target_group.rpartition(":")[2]},
            {"Name": "LoadBalancer", "Value": load_balancer.partition("loadbalancer/")[2]},
        ]
        self._client.put_metric_alarm(
            AlarmName=name,
            AlarmDescription=f"more than {ERRORS_PERCENT} % of the answers are errors of the machines",
            ComparisonOperator="GreaterThanThreshold",
            Threshold=float(ERRORS_PERCENT),
            EvaluationPeriods=_PERIODS,
            TreatMissingData="notBreaching",
            Metrics=[
                _sum("errors", "HTTPCode_Target_5XX_Count", dimensions),
                _sum("requests", "RequestCount", dimensions),
                {
                    "Id": "share",
                    "Expression": "IF(requests > 0, 100 * FILL(errors, 0) / requests, 0)",
                    "Label": "errors, percent",
                    "ReturnData": True,
                },
            ],
        )


def _sum(name: str, metric: str, dimensions: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "Id": name,
        "MetricStat": {
            "Metric": {
                "Namespace": "AWS/ApplicationELB",
                "MetricName": metric,
                "Dimensions": dimensions,
            },
            "Period": _PERIOD_S,
            "Stat": "Sum",
        },
        "ReturnData": False,
    }
