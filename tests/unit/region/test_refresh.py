"""Instance refresh: every state and event with its source, each preference on a virtual clock, and that it costs nothing."""

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calve.region import groups
from calve.region.autoscaling import AutoScaling, Lookups
from calve.region.ec2 import State
from calve.region.group import Launch, Rules, Seen, Terminate, World
from calve.region.query import Params
from calve.region.refresh import (
    Preferences,
    Refresh,
    Reserved,
    Rollback,
    Status,
    bounds,
    cancel,
    rollback,
)
from calve.region.refresh_steps import Member, decide
from calve.region.signature import Refusal
from calve.region.templates import LaunchTemplate, TemplateSpec, Version

HOUR_S = 3600.0
GUIDE = "Amazon EC2 Auto Scaling User Guide"
WORKS = f"{GUIDE}, How an instance refresh works"
UNDO = f"{GUIDE}, Undo changes with a rollback"
CHECKPOINTS = f"{GUIDE}, Add checkpoints to an instance refresh"
API = "API reference, "


# Every state and every event

TWO = TemplateSpec("lt-1", "web", "2")
OLD = [Member(f"i-{one}", 0.0, False, False, True, False) for one in "ab"]
NEW = [Member(f"i-{one}", 5.0, True, False, True, False) for one in "cd"]
BACK = [one._replace(matches=False) for one in NEW]
HERE = [one._replace(matches=True) for one in OLD]


def refresh_in(status, *, auto=False):
    """Make a refresh of two instances that has come to a status."""
    made = Refresh("r", TWO, Preferences(100, 200, 0.0, False, auto, alarms=("errors",)), 0.0)
    if status is Status.PENDING:
        return made
    ids = frozenset(one.id for one in OLD)
    made = replace(made, status=status, began=True, old=ids, total=2, remaining=2)
    if status is Status.BAKING:
        made = replace(made, remaining=0, until=100.0)
    if "Rollback" in status:
        made = replace(made, remaining=0, rollback=Rollback("why", 0.0, 50, 1))
    return made


def looked(refresh, members, now=10.0, leaving=(), alarm="OK"):
    return decide(
        refresh,
        members,
        desired=2,
        leaving=frozenset(leaving),
        now=now,
        parallelism=None,
        give_up_s=HOUR_S,
        alarms={"errors": alarm},
    ).refresh


EVENTS = {
    "look": lambda one: looked(one, BACK if one.rolls_back else OLD),
    "all replaced": lambda one: looked(one, NEW),
    "all undone": lambda one: looked(one, HERE),
    "alarm": lambda one: looked(one, BACK if one.rolls_back else OLD, alarm="ALARM"),
    "an hour": lambda one: looked(one, BACK if one.rolls_back else OLD, now=HOUR_S + 1),
    "bake over": lambda one: looked(one, NEW, now=100.0),
    "quiet": lambda one: looked(one, [*OLD, *NEW]),
    "unquiet": lambda one: looked(one, OLD, leaving={"i-c"}),
}

TABLE = [
    ("Pending", "look", False, "InProgress", API + "InstanceRefresh"),
    ("Pending", "alarm", False, "Failed", UNDO),
    ("Pending", "alarm", True, "Failed", UNDO + ": there is nothing to undo"),
    ("InProgress", "look", False, "InProgress", WORKS),
    ("InProgress", "all replaced", False, "Successful", WORKS),
    ("InProgress", "alarm", False, "Failed", UNDO + ": fails without rolling back"),
    ("InProgress", "alarm", True, "RollbackInProgress", UNDO),
    ("InProgress", "an hour", False, "Failed", WORKS + ": one-hour timeout"),
    ("InProgress", "an hour", True, "RollbackInProgress", UNDO + ": for one hour before it fails"),
    ("Baking", "look", False, "Baking", API + "InstanceRefresh"),
    ("Baking", "bake over", False, "Successful", API + "RefreshPreferences"),
    ("Baking", "alarm", False, "Failed", UNDO),
    ("Baking", "alarm", True, "RollbackInProgress", UNDO),
    ("Cancelling", "unquiet", False, "Cancelling", API + "CancelInstanceRefresh"),
    ("Cancelling", "quiet", False, "Cancelled", API + "CancelInstanceRefresh"),
    ("Cancelling", "alarm", True, "Cancelled", API + "CancelInstanceRefresh"),
    ("RollbackInProgress", "look", False, "RollbackInProgress", UNDO),
    ("RollbackInProgress", "all undone", False, "RollbackSuccessful", UNDO),
    ("RollbackInProgress", "alarm", True, "RollbackInProgress", UNDO),
    ("RollbackInProgress", "an hour", False, "RollbackFailed", UNDO + ": it will eventually fail"),
    ("RollbackInProgress", "an hour", True, "RollbackFailed", UNDO + ": it will eventually fail"),
]


@pytest.mark.parametrize(("before", "event", "auto", "after", "source"), TABLE)
def test_what_is_seen_leads_from_state_to_state(before, event, auto, after, source):
    assert EVENTS[event](refresh_in(Status(before), auto=auto)).status == after, source


ACTIVE = ("Pending", "InProgress", "Baking", "Cancelling", "RollbackInProgress")
ENDED = ("Successful", "Failed", "Cancelled", "RollbackSuccessful", "RollbackFailed")
NOT_FOUND, RUNS = "ActiveInstanceRefreshNotFound", "InstanceRefreshInProgress"
ASKED = [
    *((one, "StartInstanceRefresh", RUNS, API + "StartInstanceRefresh") for one in ACTIVE),
    *((one, "StartInstanceRefresh", "Pending", API + "StartInstanceRefresh") for one in ENDED),
    *((one, "CancelInstanceRefresh", NOT_FOUND, API + "CancelInstanceRefresh") for one in ENDED),
    *((one, "RollbackInstanceRefresh", NOT_FOUND, UNDO + ": finished") for one in ENDED),
    *(
        (one, "RollbackInstanceRefresh", "RollbackInProgress", API + "RollbackInstanceRefresh")
        for one in ("Pending", "InProgress", "Baking")
    ),
    *(
        (one, "CancelInstanceRefresh", "Cancelling", API + "CancelInstanceRefresh")
        for one in ("Pending", "InProgress", "Baking")
    ),
    ("RollbackInProgress", "CancelInstanceRefresh", "Cancelling", API + "(refresh or rollback)"),
    ("RollbackInProgress", "RollbackInstanceRefresh", NOT_FOUND, "ours: it is rolled back already"),
    ("Cancelling", "CancelInstanceRefresh", NOT_FOUND, "ours: it is cancelled already"),
    ("Cancelling", "RollbackInstanceRefresh", NOT_FOUND, "ours: it is cancelled already"),
]


@pytest.mark.parametrize(("before", "request_", "after", "source"), ASKED)
def test_what_is_asked_leads_from_state_to_state_or_is_refused(before, request_, after, source):
    fleet = Fleet(1)
    fleet.until(settled)
    group = fleet.group
    fleet.group = replace(group, refreshes=(refresh_in(Status(before)),))
    if after in set(Status):
        fleet.do(request_)
        assert fleet.refresh.status == after, source
        return
    with pytest.raises(Refusal) as caught:
        fleet.do(request_)
    assert caught.value.code == after, source
    assert fleet.refresh.status == before


def test_the_tables_know_all_ten_states():
    seen = {row[0] for row in [*TABLE, *ASKED]} | {row[3] for row in TABLE}
    assert seen == set(Status)
    assert len(Status) == 10
    assert {one for one in Status if one.active} == set(ACTIVE)


# A fleet on a virtual clock


@dataclass
class Plan:
    """A machine: it runs after so long, is off after so long (None: never), or is refused with these words."""

    boot_s: float | None = 20.0
    off_s: float | None = None
    refused: str = ""


class Fleet:
    """A group whose health is EC2's, driven by Auto Scaling's own actions."""

    def __init__(self, desired, plan=lambda _version, _count: Plan(), **settings):
        self.now = 0.0
        self.plan = plan
        self.alarms = {}
        self.machines = {}
        self.launches = []
        self.zones = []
        self.watch = lambda: None
        self.rules = Rules(launch_parallelism=None)
        data = {"ImageId": "ami-1"}
        versions = {number: Version(number, None, 0.0, data) for number in (1, 2, 3)}
        template = LaunchTemplate("lt-1", "web", 0.0, versions, 1)
        lookups = Lookups(
            lambda *_: template, lambda _: "t3.nano", lambda arn: arn, alarms=self.alarms
        )
        self.service = AutoScaling("eu-central-1", "eu-central-1a", lookups)
        form = {
            "LaunchTemplate": {"LaunchTemplateId": "lt-1", "Version": "1"},
            "MinSize": "0",
            "MaxSize": str(2 * desired),
            "DesiredCapacity": str(desired),
        }
        self.do("CreateAutoScalingGroup", **(form | settings))

    def do(self, action, **form):
        if action not in {"SetInstanceHealth", "CreateOrUpdateTags", "DescribeTags"}:
            form = {"AutoScalingGroupName": "web", **form}
        return self.service.actions[action](Params(form), self.now)

    def start(self, version="2", **preferences):
        form = {"MinHealthyPercentage": "100", "MaxHealthyPercentage": "200", "InstanceWarmup": "0"}
        wanted = {"LaunchTemplate": {"LaunchTemplateId": "lt-1", "Version": version}}
        more = {"DesiredConfiguration": wanted} if version else {}
        self.do("StartInstanceRefresh", Preferences=form | preferences, **more)

    @property
    def group(self):
        return self.service.groups["web"]

    @group.setter
    def group(self, group):
        self.service.groups["web"] = group

    @property
    def refresh(self):
        return self.group.refreshes[-1]

    @property
    def shown(self):
        return self.do("DescribeInstanceRefreshes")["InstanceRefreshes"][0]

    def versions(self):
        return "".join(sorted(one.spec.version for one in self.group.instances.values()))

    def ids(self, version="1"):
        return [one.id for one in self.group.instances.values() if one.spec.version == version]

    def lifecycles(self):
        return Counter(one.lifecycle.value for one in self.group.instances.values())

    def causes(self):
        return [one.cause for one in self.group.activities.values()]

    def seen(self, name):
        began, plan, ended = self.machines[name]
        if plan.refused:
            return Seen(State.PENDING, error=plan.refused)
        if ended:
            return Seen(State.TERMINATED)
        if plan.boot_s is None or self.now < began + plan.boot_s:
            return Seen(State.PENDING)
        off = plan.off_s is not None and self.now >= began + plan.boot_s + plan.off_s
        return Seen(State.STOPPED if off else State.RUNNING)

    def serving(self):
        return [
            one.id
            for one in self.group.instances.values()
            if one.lifecycle == "InService" and self.seen(one.id).state is State.RUNNING
        ]

    def _events(self):
        for name in self.group.instances:
            began, plan, _ = self.machines[name]
            if plan.boot_s is not None:
                yield began + plan.boot_s
                yield began + plan.boot_s + (plan.off_s or 0.0)

    def look(self):
        """Advance once; say when the next thing is due, None for never."""
        world = World(
            {one: self.seen(one) for one in self.group.instances}, {"lt-1": (1, 3)}, self.alarms
        )
        done = groups.advance(self.group, world, self.now, self.rules)
        self.group = done.group
        for effect in done.effects:
            match effect:
                case Launch(name, spec, zone):
                    plan = self.plan(spec.version, len(self.launches))
                    self.machines[name] = (self.now, plan, False)
                    self.launches.append(spec.version)
                    self.zones.append(zone)
                case Terminate(name):
                    began, plan, _ = self.machines[name]
                    self.machines[name] = (began, plan, True)
        self.watch()
        if done.wake_at == self.now:
            return self.now
        following = [at for at in (done.wake_at, *self._events()) if at is not None]
        return min((at for at in following if at > self.now), default=None)

    def until(self, condition, most_s=1e7):
        stop = self.now + most_s
        while not condition(self):
            following = self.look()
            assert condition(self) or (following is not None and following <= stop)
            self.now = following or self.now

    def pass_s(self, seconds):
        stop = self.now + seconds
        following = self.look()
        while following is not None and following <= stop:
            self.now = following
            following = self.look()
        self.now = stop


def settled(fleet):
    return len(fleet.serving()) == fleet.group.desired == len(fleet.group.instances)


def done(fleet):
    return not fleet.refresh.status.active


def started(desired=4, plan=lambda _version, _count: Plan(), **settings):
    fleet = Fleet(desired, plan, **settings)
    fleet.until(settled)
    return fleet


def dies(version, _count):
    """Machines of version 2 power off as soon as they run."""
    return Plan(off_s=None if version == "1" else 0.0)


# Rollback


def test_a_rollback_replaces_what_was_deployed_and_nothing_else():
    fleet = started(4)
    fleet.start(MaxHealthyPercentage="125")
    fleet.until(lambda one: one.refresh.percent == 50)
    kept = set(fleet.ids()) & set(fleet.serving())
    answer = fleet.do("RollbackInstanceRefresh")
    assert answer == {"InstanceRefreshId": fleet.refresh.id}
    percents, serving = [], []

    def watch():
        percents.append(fleet.refresh.percent)
        serving.append(len(fleet.serving()))

    fleet.watch = watch
    fleet.until(done)
    assert fleet.refresh.status is Status.ROLLBACK_SUCCESSFUL
    assert fleet.versions() == "1111"
    assert kept <= set(fleet.ids())
    assert len(kept) == 2
    assert percents == sorted(percents, reverse=True)
    assert {50, 25, 0} == set(percents)
    assert min(serving) == 4
    details = fleet.shown["RollbackDetails"]
    assert details["PercentageCompleteOnRollback"] == 50
    assert details["InstancesToUpdateOnRollback"] == 2
    assert "user request" in details["RollbackReason"]
    assert fleet.group.spec.version == "1"
    assert fleet.shown["InstancesToUpdate"] == 4


def test_what_never_came_into_service_is_terminated_at_once_by_a_rollback():
    held = {
        "LifecycleHookName": "up",
        "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING",
        "HeartbeatTimeout": "7200",
    }
    fleet = started(2)
    fleet.do("PutLifecycleHook", **held)
    fleet.start()
    fleet.until(lambda one: one.lifecycles()["Pending:Wait"] == 2)
    at = fleet.now
    fleet.do("RollbackInstanceRefresh")
    fleet.until(done)
    assert fleet.now == at
    assert fleet.versions() == "11"
    assert len(fleet.launches) == 4
    assert fleet.refresh.rollback.percent == 0


def test_a_refresh_that_has_not_begun_rolls_back_to_what_is():
    fleet = started(2)
    fleet.do("UpdateAutoScalingGroup", LaunchTemplate={"LaunchTemplateId": "lt-1", "Version": "3"})
    fleet.start()
    fleet.do("RollbackInstanceRefresh")
    fleet.until(done)
    assert fleet.refresh.status is Status.ROLLBACK_SUCCESSFUL
    assert (fleet.versions(), len(fleet.launches)) == ("11", 2)


def test_a_rollback_leaves_what_was_skipped():
    fleet = started(2)
    fleet.start()
    fleet.until(done)
    fleet.do("UpdateAutoScalingGroup", LaunchTemplate={"LaunchTemplateId": "lt-1", "Version": "1"})
    fleet.do("SetDesiredCapacity", DesiredCapacity="3")
    fleet.until(settled)
    assert fleet.versions() == "122"
    fleet.start(SkipMatching="true")
    fleet.until(lambda one: one.versions() == "1222")
    fleet.do("RollbackInstanceRefresh")
    fleet.until(done)
    assert fleet.refresh.status is Status.ROLLBACK_SUCCESSFUL
    assert fleet.versions() == "122"


@pytest.mark.parametrize("group_version", ["$Latest", "$Default"])
def test_what_cannot_be_undone_is_said(group_version):
    template = {"LaunchTemplateId": "lt-1", "Version": group_version}
    fleet = started(1, LaunchTemplate=template)
    fleet.start()
    with pytest.raises(Refusal, match=rf"IrreversibleInstanceRefresh.*\{group_version}"):
        fleet.do("RollbackInstanceRefresh")
    fleet.until(done)
    fleet.start(version=None)
    with pytest.raises(Refusal, match=r"IrreversibleInstanceRefresh.*desired configuration"):
        fleet.do("RollbackInstanceRefresh")
    fleet = started(1, LaunchTemplate=template)
    with pytest.raises(Refusal, match="group's launch template version"):
        fleet.start(AutoRollback="true")


def test_a_bad_release_is_undone_after_an_hour_where_it_is_to_be():
    fleet = started(2, dies)
    began = fleet.now
    fleet.start(AutoRollback="true")
    fleet.until(lambda one: one.refresh.rolls_back)
    assert fleet.now - began == HOUR_S
    assert "within 3600 seconds. Waiting for remaining" in fleet.refresh.rollback.reason
    fleet.until(done)
    assert fleet.refresh.status is Status.ROLLBACK_SUCCESSFUL
    assert fleet.versions() == "11"


def test_a_rollback_to_what_does_not_run_either_fails_after_another_hour():
    fleet = started(
        2, lambda version, count: Plan(off_s=0.0 if version == "1" and count > 1 else None)
    )
    fleet.start(MaxHealthyPercentage="150")
    fleet.until(lambda one: one.refresh.percent == 50)
    at = fleet.now
    fleet.do("RollbackInstanceRefresh")
    lowest = []
    fleet.watch = lambda: lowest.append(len(fleet.serving()))
    fleet.until(done)
    assert fleet.refresh.status is Status.ROLLBACK_FAILED
    assert "within 3600 seconds" in fleet.shown["StatusReason"]
    assert fleet.now - at == HOUR_S
    assert min(lowest) == 2


def test_a_cancelled_refresh_or_rollback_leaves_a_mixed_fleet():
    for action in ("StartInstanceRefresh", "RollbackInstanceRefresh"):
        fleet = started(4)
        fleet.start(MaxHealthyPercentage="125")
        fleet.until(lambda one: one.refresh.percent == 50)
        if action == "RollbackInstanceRefresh":
            fleet.do(action)
        fleet.do("CancelInstanceRefresh")
        fleet.until(done)
        assert fleet.refresh.status is Status.CANCELLED
        fleet.until(settled)
        assert set(fleet.versions()) == {"1", "2"}
        assert fleet.group.spec.version == "1"


def test_a_cancel_need_not_wait():
    fleet = started(2)
    fleet.start()
    fleet.until(lambda one: one.lifecycles()["Pending"] == 2)
    fleet.do("CancelInstanceRefresh", WaitForTransitioningInstances="false")
    assert fleet.refresh.status is Status.CANCELLED
    assert fleet.shown["EndTime"] is not None
    assert "without waiting" in fleet.shown["StatusReason"]


# Preferences


def test_checkpoints_pause_as_the_guide_tells_it():
    fleet = started(10)
    began = fleet.now
    fleet.start(
        MinHealthyPercentage="80",
        MaxHealthyPercentage="100",
        InstanceWarmup="580",
        CheckpointPercentages=["20", "50"],
        CheckpointDelay="900",
    )
    story = []

    def watch():
        entry = (round((fleet.now - began) / 60), fleet.refresh.percent, fleet.launches.count("2"))
        if not story or story[-1] != entry:
            story.append(entry)

    fleet.watch = watch
    fleet.until(lambda one: one.refresh.until is not None)
    assert "Checkpoint of 20 percent" in fleet.shown["StatusReason"]
    fleet.until(done)
    launched = {count: minute for minute, _, count in reversed(story)}
    assert launched == {2: 0, 4: 25, 5: 35}
    complete = {percent: minute for minute, percent, _ in reversed(story)}
    assert complete == {0: 0, 20: 10, 40: 35, 50: 45}
    assert fleet.refresh.status is Status.SUCCESSFUL
    assert fleet.shown["PercentageComplete"] == 50
    assert fleet.versions() == "1111122222"
    assert fleet.group.spec.version == "2"


def test_a_checkpoint_that_is_passed_is_skipped():
    fleet = started(2)
    began = fleet.now
    fleet.start(CheckpointPercentages=["10", "40", "100"], CheckpointDelay="100")
    fleet.until(done)
    assert fleet.now - began == 20.0 + 100.0 + 20.0
    assert fleet.versions() == "22"


def test_a_pause_is_no_standstill_and_a_long_warm_up_neither():
    fleet = started(2)
    began = fleet.now
    fleet.start(
        CheckpointPercentages=["50", "100"], CheckpointDelay="172800", InstanceWarmup="9000"
    )
    fleet.until(done)
    assert fleet.refresh.status is Status.SUCCESSFUL
    assert fleet.now - began == 2 * 9020.0 + 172_800.0


def test_baking_is_waited_for_and_can_be_rolled_back_until_its_end():
    fleet = started(2)
    began = fleet.now
    fleet.start(BakeTime="300")
    fleet.until(lambda one: one.refresh.status is Status.BAKING)
    assert fleet.now - began == 20.0
    assert (fleet.shown["PercentageComplete"], fleet.group.spec.version) == (100, "1")
    fleet.until(done)
    assert fleet.now - began == 320.0
    assert fleet.refresh.status is Status.SUCCESSFUL
    fleet.start(version="3", BakeTime="300")
    fleet.until(lambda one: one.refresh.status is Status.BAKING)
    fleet.pass_s(299)
    fleet.do("RollbackInstanceRefresh")
    fleet.until(done)
    assert fleet.refresh.status is Status.ROLLBACK_SUCCESSFUL
    assert fleet.versions() == "22"


def test_what_dies_while_it_bakes_is_replaced_by_the_new_version():
    fleet = started(2, lambda _version, count: Plan(off_s=100.0 if count == 2 else None))
    fleet.start(BakeTime="300")
    fleet.until(done)
    assert fleet.refresh.status is Status.SUCCESSFUL
    assert fleet.launches == ["1", "1", "2", "2", "2"]
    assert fleet.versions() == "22"


def test_a_fleet_that_matches_is_done_at_once():
    fleet = started(2)
    fleet.start(version="1", SkipMatching="true", BakeTime="300")
    at = fleet.now
    fleet.until(done)
    assert (fleet.now, fleet.refresh.status) == (at, Status.SUCCESSFUL)
    assert fleet.shown["PercentageComplete"] == 100
    assert len(fleet.launches) == 2


def test_alarms_must_be_ok_at_the_start():
    fleet = started(1)
    for state in (None, "ALARM", "INSUFFICIENT_DATA"):
        fleet.alarms |= {"errors": state} if state else {}
        with pytest.raises(Refusal, match=state or "does not exist"):
            fleet.start(AlarmSpecification={"Alarms": ["errors"]})
    assert fleet.group.refreshes == ()


@pytest.mark.parametrize(("auto", "ended"), [("false", "Failed"), ("true", "RollbackSuccessful")])
def test_an_alarm_ends_a_refresh(auto, ended):
    fleet = started(4)
    fleet.alarms["errors"] = "OK"
    fleet.start(
        MaxHealthyPercentage="125", AutoRollback=auto, AlarmSpecification={"Alarms": ["errors"]}
    )
    fleet.until(lambda one: one.refresh.percent == 50)
    fleet.alarms["errors"] = "ALARM"
    fleet.until(done)
    assert fleet.refresh.status == ended
    fleet.until(settled)
    assert (fleet.versions() == "1111") is (auto == "true")


def test_an_alarm_without_data_holds_a_refresh_up():
    fleet = started(4)
    fleet.alarms["errors"] = "OK"
    fleet.start(MaxHealthyPercentage="125", AlarmSpecification={"Alarms": ["errors"]})
    fleet.until(lambda one: one.refresh.percent == 25)
    fleet.alarms["errors"] = "INSUFFICIENT_DATA"
    count = len(fleet.launches)
    fleet.pass_s(1000)
    assert len(fleet.launches) == count
    assert "alarms to have data" in fleet.refresh.reason
    fleet.alarms["errors"] = "OK"
    fleet.until(done)
    assert fleet.refresh.status is Status.SUCCESSFUL


def set_aside(fleet, kind):
    """Protect one instance, or put it in standby; return its id."""
    one = fleet.ids()[0]
    if kind == "standby":
        fleet.do("EnterStandby", InstanceIds=[one], ShouldDecrementDesiredCapacity="true")
    else:
        fleet.do("SetInstanceProtection", InstanceIds=[one], ProtectedFromScaleIn="true")
    fleet.pass_s(0)
    return one


KINDS = {
    "standby": ("StandbyInstances", "Terminate"),
    "protected": ("ScaleInProtectedInstances", "Refresh"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_set_aside_is_waited_for_an_hour(kind):
    fleet = started(3)
    one = set_aside(fleet, kind)
    began = fleet.now
    fleet.start()
    fleet.until(lambda fleet: len(fleet.ids("1")) == 1 and fleet.now > began)
    assert f"For example: {one} is" in fleet.refresh.reason
    assert ("Standby" if kind == "standby" else "scale-in protection") in fleet.refresh.reason
    fleet.until(done)
    assert fleet.refresh.status is Status.FAILED
    assert fleet.now - began == 20.0 + HOUR_S
    assert fleet.ids("1") == [one]
    assert len(fleet.ids("2")) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_returned_in_time_is_replaced(kind):
    fleet = started(3)
    one = set_aside(fleet, kind)
    fleet.start()
    fleet.pass_s(1800)
    if kind == "standby":
        fleet.do("ExitStandby", InstanceIds=[one])
    else:
        fleet.do("SetInstanceProtection", InstanceIds=[one], ProtectedFromScaleIn="false")
    fleet.until(done)
    assert fleet.refresh.status is Status.SUCCESSFUL
    assert fleet.versions() == "222"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_set_aside_can_be_ignored(kind):
    fleet = started(3)
    one = set_aside(fleet, kind)
    fleet.start(**{KINDS[kind][0]: "Ignore"})
    fleet.until(done)
    assert fleet.refresh.status is Status.SUCCESSFUL
    assert fleet.ids("1") == [one]
    assert len(fleet.ids("2")) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_set_aside_can_be_replaced_too(kind):
    fleet = started(3)
    set_aside(fleet, kind)
    name, replaces = KINDS[kind]
    fleet.start(**{name: replaces})
    assert fleet.shown["Preferences"][name] == replaces
    fleet.until(done)
    assert fleet.refresh.status is Status.SUCCESSFUL
    assert fleet.versions() == "2" * (2 if kind == "standby" else 3)


@pytest.mark.parametrize(
    ("preferences", "said"),
    [
        ({"CheckpointPercentages": ["50", "20"]}, "ascending"),
        ({"CheckpointPercentages": ["50", "50"]}, "unique"),
        ({"CheckpointPercentages": ["0", "50"]}, "1 to 100"),
        ({"CheckpointPercentages": ["101"]}, "1 to 100"),
        ({"CheckpointDelay": "60"}, "CheckpointPercentages must be specified"),
        ({"CheckpointPercentages": ["50"], "CheckpointDelay": "172801"}, "from 0 to 172800"),
        ({"BakeTime": "172801"}, "from 0 to 172800"),
        ({"AlarmSpecification": {"Alarms": [str(one) for one in range(11)]}}, "at most 10"),
        ({"StandbyInstances": "Refresh"}, "Terminate, Ignore, Wait"),
        ({"ScaleInProtectedInstances": "Terminate"}, "Refresh, Ignore, Wait"),
        ({"AlarmSpecification": {"Alarm": "x"}}, "not recognized"),
    ],
)
def test_preferences_that_are_none_are_refused(preferences, said):
    fleet = started(1)
    with pytest.raises(Refusal, match=said):
        fleet.start(**preferences)
    assert fleet.group.refreshes == ()


def test_the_template_of_a_group_cannot_be_changed_under_a_refresh():
    fleet = started(2)
    fleet.start()
    template = {"LaunchTemplateId": "lt-1", "Version": "3"}
    with pytest.raises(Refusal, match="An active instance refresh with a desired configuration"):
        fleet.do("UpdateAutoScalingGroup", LaunchTemplate=template)
    same = {"LaunchTemplateId": "lt-1", "Version": "1"}
    fleet.do("UpdateAutoScalingGroup", LaunchTemplate=same, MaxSize="9")
    assert fleet.group.max_size == 9
    fleet.until(done)
    fleet.do("UpdateAutoScalingGroup", LaunchTemplate=template)
    assert fleet.group.spec.version == "3"
    fleet.start(version=None)
    fleet.do("UpdateAutoScalingGroup", LaunchTemplate=same)


def test_scaling_out_under_a_refresh_takes_the_new_version():
    fleet = started(2)
    fleet.start(MaxHealthyPercentage="150", CheckpointPercentages=["50", "100"])
    fleet.until(lambda one: one.refresh.until is not None)
    fleet.do("SetDesiredCapacity", DesiredCapacity="4")
    fleet.until(settled)
    assert fleet.versions() == "1222"


# Bounds


def healthy(fleet):
    """Count what serves and is warm, as the guide defines it."""
    refresh = fleet.refresh
    warmup_s = refresh.preferences.warmup_s
    return {
        one
        for one in fleet.serving()
        if fleet.group.instances[one].launched_at < refresh.started_at
        or fleet.now >= fleet.group.instances[one].in_service_at + warmup_s
    }


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    desired=st.integers(1, 12),
    low=st.integers(0, 100),
    surge=st.integers(0, 100),
    parallelism=st.sampled_from([None, 1, 3]),
    warmup_s=st.sampled_from(["0", "45", "700"]),
    checkpoints=st.lists(st.integers(1, 100), unique=True, max_size=3).map(sorted),
    bake_s=st.sampled_from(["0", "600"]),
    auto=st.sampled_from(["true", "false"]),
    undo=st.none() | st.integers(0, 100),
    bad=st.sets(st.sampled_from("12")),
)
def test_a_refresh_never_takes_more_than_it_may(
    seed, desired, low, surge, parallelism, warmup_s, checkpoints, bake_s, auto, undo, bad
):
    chance = random.Random(seed)

    def plan(version, _count):
        fate = chance.random()
        return Plan(
            boot_s=chance.choice([0.0, 5.0, 40.0, 300.0]),
            off_s=chance.uniform(0, 3000) if fate < 0.2 + 0.2 * (version == "2") else None,
            refused="no room" if fate > 0.85 else "",
        )

    fleet = Fleet(desired, plan)
    fleet.until(settled)
    fleet.plan = lambda version, count: Plan(off_s=0.0) if version in bad else plan(version, count)
    fleet.rules = Rules(launch_parallelism=parallelism)
    more = {"CheckpointPercentages": list(map(str, checkpoints))} if checkpoints else {}
    high = max(100, min(200, low + surge))
    fleet.start(
        MinHealthyPercentage=str(low),
        MaxHealthyPercentage=str(high),
        InstanceWarmup=warmup_s,
        BakeTime=bake_s,
        AutoRollback=auto,
        **more,
    )
    least, most = bounds(fleet.refresh.preferences, desired)
    before, last = (healthy(fleet), fleet.now), 0

    def watch():
        nonlocal before, last
        were, at = before
        there = fleet.group.instances
        gone = {
            one
            for one in were
            if at == fleet.now
            and one in there
            and there[one].lifecycle.leaving
            and not there[one].sick
        }
        assert not gone or len(healthy(fleet)) >= least
        staying = sum(not one.lifecycle.leaving for one in there.values())
        assert staying <= max(most, desired + 1)
        percent = fleet.refresh.percent
        assert percent <= last if fleet.refresh.rollback else percent >= last
        before, last = (healthy(fleet), fleet.now), percent

    fleet.watch = watch
    if undo is not None:
        fleet.until(lambda one: done(one) or one.refresh.percent >= undo)
        if not done(fleet) and not fleet.refresh.rolls_back:
            fleet.do("RollbackInstanceRefresh")
    fleet.until(done)
    assert fleet.refresh.status in set(ENDED)
    if fleet.refresh.status is Status.ROLLBACK_SUCCESSFUL:
        assert set(fleet.versions()) == {"1"}
        assert fleet.shown["PercentageComplete"] == 0
    if fleet.refresh.status is Status.SUCCESSFUL and (not checkpoints or checkpoints[-1] == 100):
        assert fleet.refresh.remaining == 0


def test_reserved_members_of_a_rollback_count_too():
    kept = [one._replace(protected=True) for one in BACK]
    undoing = rollback(replace(refresh_in(Status.IN_PROGRESS), remaining=0), "why", 0.0)
    decision = decide(
        undoing,
        [*kept, *HERE],
        desired=2,
        leaving=frozenset(),
        now=1.0,
        parallelism=None,
        give_up_s=HOUR_S,
    )
    assert (decision.retire, decision.refresh.status) == ((), Status.ROLLBACK_IN_PROGRESS)
    preferences = replace(undoing.preferences, protected=Reserved.REPLACE)
    assert cancel(undoing).status is Status.CANCELLING
    freed = replace(undoing, preferences=preferences)
    decision = decide(
        freed,
        [*kept, *HERE],
        desired=2,
        leaving=frozenset(),
        now=1.0,
        parallelism=None,
        give_up_s=HOUR_S,
    )
    assert decision.retire == ("i-c", "i-d")
