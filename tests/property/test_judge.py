"""The judge and the steps: total for whatever is seen, monotone in failures, and just to machines of other versions."""

from __future__ import annotations

import datetime as dt
import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from calve.aws.autoscaling import Activity, Group, GroupInstance
from calve.aws.ec2 import TemplateVersion
from calve.aws.refreshes import Refresh, Rollback
from calve.contract import evidence
from calve.contract.codes import Code
from calve.contract.evidence import Evidence
from calve.errors import NotFoundError
from calve.fleet.verdict import LIMIT_BYTES, Outcome, Reason, Verdict
from calve.rollout import breaker, steps
from calve.rollout.judge import Rules, judge
from calve.rollout.observation import End, Machine, Observation, Refused, Target, ends, refused
from calve.rollout.observe import Gateways, Observer
from calve.rollout.steps import CreateVersion, Situation, StartRefresh, next_step

NOW = dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC)
AT = NOW.timestamp()
STATUSES = (
    "Pending",
    "InProgress",
    "Baking",
    "Cancelling",
    "Cancelled",
    "Successful",
    "Failed",
    "RollbackInProgress",
    "RollbackSuccessful",
    "RollbackFailed",
    "MadeUp",
)
TEXTS = st.text(st.characters(), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
CODES = st.sampled_from([code.value for code in Code])
FAILS = st.builds(
    lambda fields, code: Evidence("fail", 1.0, {**fields, **code}),
    st.dictionaries(st.sampled_from(["message", "phase", "code", "x"]), JSON, max_size=4),
    st.just({}) | st.builds(lambda code: {"code": code}, CODES),
)
EVENTS = FAILS | st.builds(
    Evidence,
    st.sampled_from(["phase", "healthy", "ready", "start", "note"]) | TEXTS,
    st.floats(0, 1e9),
    st.dictionaries(st.sampled_from(["n", "message"]), JSON, max_size=2),
)
TARGETS = st.builds(
    Target,
    st.sampled_from(["healthy", "unhealthy", "initial", "draining", "unused"]),
    st.sampled_from(["", "Target.ResponseCodeMismatch", "Target.Timeout"]),
    st.floats(AT - 600, AT),
)
MACHINES = st.builds(
    Machine,
    st.integers(0, 1 << 32).map("i-{:08x}".format),
    st.sampled_from(["", "Pending:Wait", "InService", "Terminating:Wait", "Standby"]),
    st.floats(AT - 600, AT),
    st.none() | TARGETS,
    st.lists(EVENTS, max_size=4).map(tuple),
    st.lists(TEXTS | st.just("Kernel panic - not syncing"), max_size=3).map(tuple),
    st.none() | st.sampled_from(End),
)
MOMENTS = st.floats(-7200, 0).map(lambda ago: NOW + dt.timedelta(seconds=ago))
REFRESHES = st.builds(
    lambda status, started, rollback: Refresh(
        "r-1", status, None, 10, 2, started, None, "lt-1", "2", rollback
    ),
    st.sampled_from(STATUSES),
    st.none() | MOMENTS,
    st.none() | st.builds(Rollback, TEXTS, st.none() | MOMENTS),
)
REFUSED = st.builds(
    Refused, TEXTS, TEXTS | st.just("The image id does not exist") | st.just("Insufficient")
)
SEEN = st.builds(
    Observation,
    st.just(AT),
    st.none() | REFRESHES,
    st.lists(MACHINES, max_size=5).map(tuple),
    st.lists(REFUSED, max_size=3).map(tuple),
)
PLAIN = st.builds(
    lambda name, lifecycle, target, code: Machine(
        f"i-{name:08x}",
        lifecycle,
        AT - 60,
        target,
        () if code is None else (Evidence("fail", 1.0, {"code": code}),),
    ),
    st.integers(0, 1 << 32),
    st.sampled_from(["Pending:Wait", "InService"]),
    st.sampled_from([None, Target("healthy", "", AT - 30)]),
    st.sampled_from([None, Code.SIGNATURE.value, Code.DISK_FAULT.value]),
)
FEW = st.builds(Observation, st.just(AT), st.none(), st.lists(PLAIN, max_size=4).map(tuple))
RULES = st.builds(Rules, timeout_s=st.none() | st.floats(0, 7200))


def failing(machine: Machine) -> bool:
    """Say whether it would be found failing, by the most severe rules; two are enough if one calls itself well."""
    rules = Rules(of_release=1, of_machine=1)
    return judge(Observation(AT, None, (machine, machine)), rules, NOW, by="x") is not None


@settings(deadline=None, max_examples=300)
@given(SEEN, RULES)
def test_whatever_is_seen_it_judges_and_the_reason_can_be_kept(seen, rules):
    found = judge(seen, rules, NOW, by="cli")
    if found is None:
        return
    kept = found.dump()
    assert len(kept) <= LIMIT_BYTES
    again = Reason.parse(kept, "here")
    assert again.dump() == kept
    verdict = Verdict("web", 2, Outcome.ROLLED_BACK, "r-1", "cli", NOW, again)
    assert Verdict.parse(verdict.dump(), "here") == verdict


@settings(deadline=None, max_examples=300)
@given(SEEN | FEW, RULES, PLAIN.filter(failing) | MACHINES.filter(failing))
def test_one_more_failed_machine_never_saves_a_release(seen, rules, more):
    if judge(seen, rules, NOW, by="cli") is not None:
        worse = replace(seen, machines=(*seen.machines, more))
        assert judge(worse, rules, NOW, by="cli") is not None


@settings(deadline=None, max_examples=40)
@given(st.lists(MACHINES, min_size=20, max_size=25), st.integers(0, 1 << 32))
def test_the_largest_reason_can_be_kept(machines, letter):
    text = chr(letter % 0x110000) * 600
    fault = Evidence("fail", 1.0, {"code": text, "message": text})
    worst = tuple(
        replace(
            one,
            events=(Evidence("phase", 0.5, {"n": text}), fault),
            lines=(text,) * 12,
        )
        for one in machines
    )
    found = judge(Observation(AT, None, worst), Rules(), NOW, by="cli")
    assert len(found.failures) >= 20
    kept = Verdict("web", 2, Outcome.ROLLED_BACK, "r-1", "cli", NOW, found).dump()
    assert len(kept) <= LIMIT_BYTES
    assert len(Verdict.parse(kept, "here").reason.failures) == 20


@settings(deadline=None, max_examples=200)
@given(MACHINES, FAILS)
def test_a_machine_that_is_well_after_a_failure_said_nothing(machine, fault):
    well = Evidence("healthy", 9.0, {})
    assert replace(machine, events=(*machine.events, fault, well)).failure is None
    assert replace(machine, events=(*machine.events, well, fault)).failure == fault


LINES = st.builds(lambda body: evidence.PREFIX + json.dumps(body), JSON) | st.text(max_size=600)


@settings(deadline=None, max_examples=300)
@given(st.lists(LINES, max_size=5), st.integers(0, 200), st.binary(max_size=40))
def test_consoles_of_any_bytes_are_read(lines, cut, junk):
    data = "\n".join(lines).encode("utf-8", "surrogatepass") + junk
    text = data[cut:].decode("utf-8", "replace")
    events = tuple(evidence.read(text))
    machine = Machine("i-1", "InService", AT, None, events, tuple(text.splitlines()))
    judge(Observation(AT, None, (machine,)), Rules(), NOW, by="cli")


DESCRIPTIONS = st.sampled_from(
    [
        "Launching a new EC2 instance: {}",
        "Launching a new EC2 instance: {}.  Status Reason: it was abandoned: Heartbeat Timeout",
        "Launching a new EC2 instance: {}.  Status Reason: it was abandoned: ABANDON",
        "Launching a new EC2 instance.  Status Reason: no capacity",
        "Terminating EC2 instance: {}",
        "{}",
    ]
)
CAUSES = st.sampled_from(
    ["", "in response to an ELB system health check failure.", "in response to an EC2 health check"]
)
IDS = st.integers(0, 6).map("i-{:017x}".format)
ACTIVITIES = st.builds(
    lambda n, text, name, cause, status, message, ago: Activity(
        f"a-{n}", text.format(name), cause, status, message, NOW - dt.timedelta(seconds=ago)
    ),
    st.integers(0, 99),
    DESCRIPTIONS | TEXTS.map(lambda text: text.replace("{", "").replace("}", "")),
    IDS,
    CAUSES,
    st.sampled_from(["Successful", "Failed", "Cancelled", "InProgress"]),
    st.none() | TEXTS,
    st.floats(0, 7200),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(ACTIVITIES, max_size=8))
def test_activities_of_any_words_are_read(activities):
    ends(activities)
    refused(activities)
    breaker.run_of(activities)


VERSION = TemplateVersion("lt-1", 2, "", None, None, b"")


class Scene:
    """All gateways at once: a group's activities, nobody's words, no balancer."""

    url = "none:"

    def __init__(self, activities: list[Activity]) -> None:
        self._activities = activities

    def activities(self, _group, *, most, since):
        return tuple(one for one in self._activities if one.started_at >= since)[:most]

    def get(self, key, _limit):
        raise NotFoundError("no such object", place=key)

    def console(self, _instance):
        return ""


@settings(deadline=None, max_examples=300)
@given(
    st.lists(ACTIVITIES, max_size=10),
    st.dictionaries(
        IDS,
        st.sampled_from([("lt-1", "1"), ("lt-1", "2"), ("lt-2", "2"), (None, None)]),
        max_size=6,
    ),
    st.sets(IDS, max_size=3),
    st.floats(0, 7200),
)
def test_no_machine_of_another_version_is_blamed(activities, there, before, ago):
    """Those `before` were launched before the refresh: no activity since then launched them."""
    gone = before - there.keys()
    old = {name for name, version in there.items() if version != ("lt-1", "2")} | gone
    mine = [
        one
        for one in activities
        if not (one.description.startswith("Launching") and any(n in one.description for n in gone))
    ]
    members = tuple(
        GroupInstance(name, "InService", True, version, "", template)
        for name, (template, version) in there.items()
    )
    group = Group("web", "lt-1", "1", 1, 9, 4, "ELB", (), (), members)
    scene = Scene(mine)
    observer = Observer(Gateways(scene, scene, scene, scene, scene), "web", VERSION)
    refresh = Refresh(
        "r-1", "InProgress", None, 0, 1, NOW - dt.timedelta(seconds=ago), None, "lt-1", "2"
    )
    for now in (group, replace(group, instances=())):
        seen = observer.look(now, refresh, NOW)
        assert not {one.id for one in seen.machines} & old
        assert {name for name, version in there.items() if version == ("lt-1", "2")} >= {
            one.id for one in seen.machines if one.lifecycle
        }


SITUATIONS = st.builds(
    Situation,
    st.integers(1, 99),
    st.none() | st.integers(1, 99),
    st.text(max_size=9) | st.integers(0, 999).map(str),
    st.none() | REFRESHES,
    st.none() | REFRESHES,
    st.none() | st.just(Reason("operator", "x", (), "operator", NOW)),
    st.none()
    | st.builds(lambda how: Verdict("web", 2, how, "", "cli", NOW), st.sampled_from(Outcome)),
    st.booleans(),
)


@settings(deadline=None, max_examples=500)
@given(SITUATIONS)
def test_every_situation_has_its_step(now):
    step = next_step(now)
    if not now.may_start or now.refresh is not None or now.other is not None:
        assert not isinstance(step, CreateVersion | StartRefresh)
    if isinstance(step, steps.RollBack):
        assert now.verdict is None
        assert now.refresh.can_roll_back
    if isinstance(step, steps.Conclude):
        assert not now.refresh.active
    if now.verdict is not None:
        assert step == steps.Done(now.verdict)
