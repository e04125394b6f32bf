"""The judge's rules, one by one: what suffices, what does not, what is nobody's fault."""

import datetime as dt

import pytest

from calve.aws.autoscaling import Activity
from calve.aws.refreshes import Refresh
from calve.contract.codes import Code
from calve.contract.evidence import Evidence
from calve.rollout.judge import Rules, judge
from calve.rollout.observation import End, Machine, Observation, Refused, Target, ends, refused

NOW = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
AT = NOW.timestamp()
RULES = Rules()


def refresh(status="InProgress", started_s=0.0):
    started = NOW - dt.timedelta(seconds=started_s)
    return Refresh("r-1", status, None, 10, 18, started, None, "lt-1", "2")


def machine(name="i-1", lifecycle="Pending:Wait", **more):
    return Machine(name, lifecycle, AT - 60, **more)


def failed(code, name="i-1"):
    return machine(name, events=(Evidence("fail", 9.0, {"code": code, "message": "m"}),))


def serving(name="i-9"):
    return machine(name, "InService", target=Target("healthy", "", AT - 30))


def unhealthy(reason, since_s, first_s=300.0, name="i-1"):
    target = Target("unhealthy", reason, AT - since_s)
    return Machine(name, "InService", AT - first_s, target)


def judged(*machines, refused=(), rules=RULES, started_s=0.0):
    seen = Observation(AT, refresh(started_s=started_s), machines, tuple(refused))
    found = judge(seen, rules, NOW, by="cli")
    return None if found is None else (found.rule, [one.code for one in found.failures])


OF_MACHINE = {
    "imds-unreachable",
    "imds-denied",
    "cache-unreachable",
    "disk-fault",
    "deadline",
    "hook-unreachable",
    "internal",
}


@pytest.mark.parametrize("reason", ["Target.Timeout", "Target.FailedHealthChecks"])
def test_a_machine_that_was_ended_for_no_answer_may_be_bad_luck(reason):
    one, two = (machine(name, "", end=End.ELB, unhealthy=reason) for name in ("i-1", "i-2"))
    assert judged(one) is None
    assert judged(one, two) == ("machine-faults", ["no-answer"] * 2)
    wrong = machine("i-1", "", end=End.ELB, unhealthy="Target.ResponseCodeMismatch")
    assert judged(wrong) == ("release-fault", ["wrong-answer"])


@pytest.mark.parametrize("code", [code.value for code in Code])
def test_every_code_is_the_releases_own_or_the_machines(code):
    alone = judged(failed(code))
    if code in OF_MACHINE:
        assert alone is None
        assert judged(failed(code), failed(code, "i-2")) == ("machine-faults", [code, code])
    else:
        assert alone == ("release-fault", [code])


def test_a_code_of_a_newer_agent_takes_two_machines():
    assert judged(failed("made-of-cheese")) is None
    assert judged(failed("made-of-cheese"), failed("made-of-cheese", "i-2")) is not None


def test_once_a_machine_serves_it_takes_one_more():
    assert judged(serving(), failed("signature")) is None
    assert judged(serving(), failed("signature"), failed("signature", "i-2")) is not None
    faults = [failed("disk-fault", f"i-{n}") for n in range(3)]
    assert judged(serving(), *faults[:2]) is None
    assert judged(serving(), *faults) is not None


@pytest.mark.parametrize(
    ("end", "code", "alone"),
    [
        (End.TIMED_OUT, "silent", False),
        (End.ABANDONED, "gave-up", False),
        (End.EC2, "machine-ended", False),
        (End.ELB, "wrong-answer", True),
    ],
)
def test_how_the_group_ended_a_machine_is_evidence(end, code, alone):
    one, two = machine("i-1", "", end=end), machine("i-2", "", end=end)
    assert (judged(one) is not None) == alone
    assert judged(one, two)[1] == [code, code]


def test_a_panic_on_the_console_is_the_releases_own():
    assert judged(machine(lines=("x", "[ 3.0] Kernel panic - not syncing: VFS"))) == (
        "release-fault",
        ["kernel-panic"],
    )


def test_a_wrong_answer_counts_once_it_lasts():
    reason = "Target.ResponseCodeMismatch"
    assert judged(unhealthy(reason, 19.0)) is None
    assert judged(unhealthy(reason, 20.0)) == ("release-fault", ["wrong-answer"])


def test_no_answer_counts_once_the_machine_has_had_its_time():
    reason = "Target.Timeout"
    two = [unhealthy(reason, 60.0, 179.0, f"i-{n}") for n in range(2)]
    assert judged(*two) is None
    late = [unhealthy(reason, 60.0, 180.0, f"i-{n}") for n in range(2)]
    assert judged(*late) == ("machine-faults", ["no-answer", "no-answer"])


@pytest.mark.parametrize(
    "message",
    [
        "We currently do not have sufficient t3.nano capacity in the Availability Zone you requested",
        "You have requested more vCPU capacity than your current vCPU limit of 32 allows",
        "There are not enough free addresses in subnet 'subnet-1' to satisfy the requested number",
        "Request limit exceeded. RequestLimitExceeded",
    ],
)
def test_want_of_capacity_never_rolls_back(message):
    assert judged(refused=[Refused(str(n), message) for n in range(50)]) is None


def test_a_refusal_for_the_templates_sake_rolls_back():
    message = "The image id '[ami-1]' does not exist. Launching EC2 instance failed."
    assert judged(refused=[Refused("1", message)]) is None
    assert judged(refused=[Refused("1", message), Refused("2", message)])[0] == "launch-refused"


def test_a_timeout_rolls_back_what_is_not_done():
    rules = Rules(timeout_s=600)
    assert judged(machine(), rules=rules, started_s=599) is None
    assert judged(machine(), rules=rules, started_s=600) == ("timeout", [])


def test_the_reason_has_the_machine_the_phase_and_the_last_lines():
    events = (
        Evidence("phase", 5.0, {"n": "pull"}),
        Evidence("fail", 9.0, {"code": "nar-damaged", "message": "glibc is cut off"}),
    )
    seen = Observation(AT, refresh(), (machine(events=events, lines=("one", "two")),))
    found = judge(seen, RULES, NOW, by="guard")
    assert found.text == "i-1 in phase pull: nar-damaged: glibc is cut off"
    assert found.failures[0].lines == ("one", "two")
    assert (found.by, found.at) == ("guard", NOW)


def activity(name, description, cause="", status="Cancelled", message=None):
    return Activity(name, description, cause, status, message, NOW)


def test_activities_say_how_a_machine_was_ended():
    launch = "Launching a new EC2 instance: {}.  Status Reason: Instance failed to complete user's Lifecycle Action: Lifecycle Action with token x was abandoned: {}"
    one, two, three = "i-0000000000000000a", "i-0000000000000000b", "i-0000000000000000c"
    found = ends(
        [
            activity("1", launch.format(one, "Lifecycle Action Completed with ABANDON Result")),
            activity("2", launch.format(two, "Heartbeat Timeout")),
            activity(
                "3",
                f"Terminating EC2 instance: {three}",
                "… in response to an ELB system health check failure.",
            ),
            activity("4", f"Terminating EC2 instance: {one}", "… in response to a launch failure."),
        ]
    )
    assert found == {one: End.ABANDONED, two: End.TIMED_OUT, three: End.ELB}


def test_an_abandoned_launch_is_no_refused_one():
    abandoned = activity(
        "1", "Launching a new EC2 instance: i-1.  … was abandoned: …", status="Failed"
    )
    told = activity("2", "Launching a new EC2 instance.  Status Reason: no", "", "Failed", "no")
    assert refused([abandoned, told]) == (Refused("2", "no"),)


def test_of_many_machines_a_tenth_must_have_bad_luck():
    fine = [machine(f"i-{n}") for n in range(180)]
    bad = [failed("disk-fault", f"i-b{n}") for n in range(20)]
    assert judged(*fine, *bad[:2]) is None
    assert judged(*fine, *bad[:18]) is None
    assert judged(*fine, *bad)[0] == "machine-faults"
    assert judged(*fine, failed("signature", "i-s")) is not None, "what is the release's own is not"


def test_who_stops_after_it_was_in_service_says_nothing_of_the_release():
    one, two = "i-0000000000000000a", "i-0000000000000000b"
    stopped = "… in response to an EC2 health check indicating it has been terminated or stopped."
    assert ends(
        [
            activity("1", f"Launching a new EC2 instance: {one}", status="Successful"),
            activity("2", f"Terminating EC2 instance: {one}", stopped),
            activity("3", f"Terminating EC2 instance: {two}", stopped),
        ]
    ) == {two: End.EC2}
