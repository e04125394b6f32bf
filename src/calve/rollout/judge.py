"""The judge: from what is seen to why a release has to be given up, or nothing yet.

Pure, the same function in all hosts. docs/reference/rollout.md has the rules as a table. One machine suffices where
its failure is the release's own, as every other machine would meet it; what may be a machine's own bad luck takes two;
one more of either once a machine of the release serves. What EC2 refuses for want of capacity is nobody's fault.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Final

from calve.contract.codes import Code
from calve.contract.health import WITHIN_S
from calve.fleet.verdict import Failure, Reason
from calve.rollout.observation import End, Machine, Observation, Refused

__all__ = ["CODES", "Rules", "hindrance", "judge"]

_OF_MACHINE: Final = frozenset(
    {code.value for code in Code if code.transient}
    | {Code.DISK_FAULT.value, Code.IMDS_DENIED.value, Code.INTERNAL.value}
)
_OF_RELEASE: Final = frozenset(code.value for code in Code) - _OF_MACHINE

CODES: Final = {
    "kernel-panic": "the kernel panicked",
    "silent": "the machine never said that it was healthy, and its launch hook timed out",
    "gave-up": "the machine abandoned its launch, and did not say why",
    "machine-ended": "the machine stopped before it was in service, and did not say why",
    "wrong-answer": "the machine is in service, and answers the balancer's check with an error",
    "no-answer": "the machine is in service, and does not answer the balancer's check",
}
"""The judge's own codes, beside those of the agent."""

_MISMATCH: Final = "Target.ResponseCodeMismatch"
_CAPACITY: Final = (
    "sufficient",  # "We currently do not have sufficient t3.nano capacity in the Availability Zone you requested"
    "InsufficientInstanceCapacity",
    "vCPU capacity",
    "VcpuLimitExceeded",
    "InstanceLimitExceeded",
    "free addresses",
    "InsufficientFreeAddressesInSubnet",
    "Rate exceeded",
    "RequestLimitExceeded",
    "internal error",
    "InternalError",
    "Server.",
    "try again",
)


@dataclass(frozen=True, slots=True)
class Rules:
    """What suffices for a verdict.

    Attributes:
        of_release: so many machines with a failure that is the release's own.
        of_machine: so many machines with a failure of any kind, and at least
        share_percent: of the machines that were launched for the release.
        refused: so many launches that EC2 refused for another reason than capacity.
        unhealthy_s: so long a machine in service may answer the balancer wrongly.
        within_s: so long a machine may take from its launch until it answers.
        timeout_s: so long the rollout may take, from the refresh's start; None for as long as AWS lets it.
    """

    of_release: int = 1
    of_machine: int = 2
    share_percent: int = 10
    refused: int = 2
    unhealthy_s: float = 20.0
    within_s: float = float(WITHIN_S)
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Fault:
    code: str
    message: str
    of_release: bool


def judge(seen: Observation, rules: Rules, now: dt.datetime, *, by: str) -> Reason | None:
    """Return why the release must be given up; None while that is not certain.

    Args:
        seen: what is seen.
        rules: what suffices.
        now: UTC; the observation's own instant for a rehearsal.
        by: who judges.
    """
    found = [(one, fault) for one in seen.machines if (fault := _fault(one, rules, seen.at_s))]
    failed = {one.id for one, _ in found}
    grace = 1 if any(one.serves and one.id not in failed for one in seen.machines) else 0
    own = [(one, fault) for one, fault in found if fault.of_release]
    if len(own) >= rules.of_release + grace:
        return _reason("release-fault", own, by, now)
    share = -(-len(seen.machines) * rules.share_percent // 100)
    if len(found) >= max(rules.of_machine, share) + grace:
        return _reason("machine-faults", found, by, now)
    refused = [one for one in seen.refused if not hindrance(one)]
    if len(refused) >= rules.refused:
        text = f"EC2 refused {len(refused)} launches: {refused[-1].message}"
        return Reason("launch-refused", text, (), by, now)
    return _too_long(seen, rules, by, now)


def hindrance(refused: Refused) -> bool:
    """Say whether a refused launch is nobody's fault: capacity, quota, throttling."""
    return any(text in refused.message for text in _CAPACITY)


def _too_long(seen: Observation, rules: Rules, by: str, now: dt.datetime) -> Reason | None:
    refresh = seen.refresh
    if rules.timeout_s is None or refresh is None or refresh.started_at is None:
        return None
    if seen.at_s - refresh.started_at.timestamp() < rules.timeout_s or not refresh.can_roll_back:
        return None
    text = f"the rollout took longer than {rules.timeout_s:.0f} s; {refresh.percent} % was replaced"
    return Reason("timeout", text, (), by, now)


def _fault(machine: Machine, rules: Rules, at_s: float) -> _Fault | None:
    failure = machine.failure
    if failure is not None:
        code = str(failure.fields.get("code", Code.INTERNAL.value))[:64]
        message = str(failure.fields.get("message", ""))
        return _Fault(code, message, of_release=code in _OF_RELEASE)
    panic = next((line for line in machine.lines if "Kernel panic" in line), None)
    if panic is not None and (machine.target is None or not machine.serves):
        return _Fault("kernel-panic", panic, of_release=True)
    match machine.end:
        case End.TIMED_OUT:
            return _own("silent")
        case End.ABANDONED:
            return _own("gave-up")
        case End.EC2:
            return _own("machine-ended")
        case End.ELB:
            wrong = machine.unhealthy in {"", _MISMATCH}
            return _own("wrong-answer" if wrong else "no-answer", of_release=wrong)
    return _balancer(machine, rules, at_s)


def _balancer(machine: Machine, rules: Rules, at_s: float) -> _Fault | None:
    target = machine.target
    if machine.lifecycle != "InService" or target is None or target.state != "unhealthy":
        return None
    if target.reason == _MISMATCH:
        if at_s - target.since_s >= rules.unhealthy_s:
            return _own("wrong-answer", of_release=True)
    elif at_s - machine.first_s >= rules.within_s and at_s - target.since_s >= rules.unhealthy_s:
        return _own("no-answer")
    return None


def _own(code: str, *, of_release: bool = False) -> _Fault:
    return _Fault(code, CODES[code], of_release)


def _reason(rule: str, found: list[tuple[Machine, _Fault]], by: str, now: dt.datetime) -> Reason:
    failures = tuple(
        Failure(one.id, fault.code, fault.message, one.phase, one.lines) for one, fault in found
    )
    first = failures[0]
    where = f" in phase {first.phase}" if first.phase else ""
    more = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
    text = f"{first.instance}{where}: {first.code}: {first.message}{more}"
    return Reason(rule, text, failures, by, now)
