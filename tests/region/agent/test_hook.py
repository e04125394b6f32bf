"""A launch hook that holds the machine: kept from timing out, completed, abandoned; every request signed and real."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
import types

import pytest

from calve.aws.autoscaling import AutoScaling, Hook
from calve.aws.ec2 import Ec2
from calve.aws.session import Session
from calve.boot import served
from calve.contract.health import Health, Http
from calve.contract.userdata import Hook as UserHook
from calve.region.access import Access
from calve.region.cloud import Cloud
from calve.region.faults import Answer, Delay, FaultPlan
from calve.region.message import Response
from calve.region.names import ACCOUNT
from calve.region.server import Server
from calve.region.signature import Allow, Refusal
from calve.transport.credentials import Credentials

REGION = "test-region"
GROUP, HOOK = "web", "calve-launch"
BEAT, COMPLETE = "RecordLifecycleActionHeartbeat", "CompleteLifecycleAction"
BUCKET = "arn:aws:s3:::nix"
OWN = f"arn:aws:autoscaling:{REGION}:{ACCOUNT}:autoScalingGroup:*:autoScalingGroupName/{GROUP}"
BEATS = "from calve.boot import depart, uplink\nuplink.BEAT_S = depart.BEAT_S = 0.2"
ABANDONED = "was abandoned: Lifecycle Action Completed with ABANDON Result"
NEVER = Health(tcp=(1,), within_s=1)


class Flags:
    """Machines that are a flag each, and a balancer without targets."""

    def __init__(self):
        self.on = {}

    def launch(self, launch):
        self.on[launch.instance_id] = True

    def running(self, instance_id):
        return self.on.get(instance_id, False)

    def terminate(self, instance_id):
        self.on[instance_id] = False

    def console(self, instance_id):
        return b""

    def start(self, check):
        pass


class Held:
    """A machine that its group's launch hook holds.

    Attributes:
        told: the reports and the calls of Auto Scaling, with the code of those that were refused, as (what, when).
        clock: the time of day of Auto Scaling.
    """

    def __init__(self, cloud, scaling, groups, machine, api, told, clock):
        self.cloud, self.scaling, self.groups, self.machine = cloud, scaling, groups, machine
        self.api, self.told, self.clock = api, told, clock
        self.faults = api.faults

    def wants(self, release, **changes):
        hook = UserHook(GROUP, HOOK, self.api.url)
        self.machine.wants(release, **{"hook": hook, "reports": self.machine.reports, **changes})

    def may(self, *actions):
        """Let the role do so much to its group."""
        self.cloud.principals.set_policy(
            "machine",
            [
                Allow("s3:GetObject", f"{BUCKET}/*"),
                Allow("s3:ListBucket", BUCKET),
                Allow("s3:PutObject", f"{BUCKET}/boot-reports/${{aws:userid}}/*"),
                *(Allow(f"autoscaling:{action}", OWN) for action in actions),
            ],
        )

    @property
    def what(self):
        """Return what was told, and beats that follow one another as one."""
        found = [what for what, _ in self.told]
        return [a for a, b in zip(found, [None, *found], strict=False) if (a, b) != (BEAT, BEAT)]

    @property
    def wait(self):
        """Return the lifecycle action as the group has it; None once it is over."""
        instances = self.scaling.autoscaling.groups[GROUP].instances
        one = instances.get(self.machine.name)
        return one.waits[0] if one is not None and one.waits else None

    def states(self):
        return {one.id: one.lifecycle for one in self.groups.group(GROUP).instances}

    def activity(self):
        """Return the activity that launched the machine."""
        found = self.groups.activities(GROUP)
        return next(
            one
            for one in found
            if self.machine.name in one.description and "Launching" in one.description
        )

    def is_held(self):
        return self.states() == {self.machine.name: "Pending:Wait"}

    def is_replaced(self):
        """Wait until the group has given the machine up and holds another; say why it did."""
        until(lambda: self.machine.name not in self.states())
        until(lambda: list(self.states().values()) == ["Pending:Wait"])
        activity = self.activity()
        assert activity.status == "Cancelled"
        return activity.message


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.fixture
def held(cloud, clock, admin, machine_in, tmp_path):
    told = []
    access = Access(cloud.principals, region=REGION, clock=clock)

    def authenticate(request, call):
        said = call.action
        try:
            return access.check(request, call)
        except Refusal as refusal:
            said = refusal.code
            raise
        finally:
            if call.action in {BEAT, COMPLETE}:
                told.append((said, time.monotonic()))

    def hook(request):
        if request.method == "PUT" and "boot-reports" in request.path:
            told.append(("report", time.monotonic()))

    cloud.hook = hook
    flags = Flags()
    with contextlib.ExitStack() as owner:
        scaling = owner.enter_context(
            Cloud(flags, flags, region=REGION, poll_s=0.02, authenticate=authenticate)
        )
        api = owner.enter_context(Server(scaling.handle, faults=FaultPlan(), clock=clock))
        scaling.add_image("ami-0123456789abcdef0", "base")
        keys = Credentials(admin.access_key, admin.secret_key)
        session = Session(REGION, api.url, credentials=keys)
        groups, ec2 = AutoScaling(session), Ec2(session)
        for one in (groups, ec2):
            owner.callback(one._client.close)
        template = ec2.create_template(
            "web",
            image_id="ami-0123456789abcdef0",
            instance_type="t3.nano",
            user_data=b"",
            description="",
        )
        groups.create_group(
            GROUP, template_id=template.id, version=1, size=(0, 1, 2), hooks=[Hook(HOOK)]
        )
        until(lambda: [one.lifecycle for one in groups.group(GROUP).instances] == ["Pending:Wait"])
        [instance] = groups.group(GROUP).instances
        made = Held(
            cloud,
            scaling,
            groups,
            machine_in(tmp_path / "machine", instance.id),
            api,
            told,
            clock,
        )
        made.may(BEAT, COMPLETE)
        yield made


@pytest.fixture
def release(cloud):
    return cloud.release(1, health_units=("calve-health.service",))


@pytest.fixture
def booted(held, release):
    """One whose agent is through; its stage 2 is yet to come."""
    held.wants(release)
    assert held.machine.boot().code == 0
    assert held.is_held()
    assert held.told == []
    return held


# While it works


def test_it_is_kept_from_timing_out_while_the_machine_pulls(held, release):
    held.cloud.faults.add(Delay(2.5), path="*/nar/*", times=None)
    held.wants(release)
    assert held.machine.boot(hasty=BEATS).code == 0
    assert len(held.told) >= 2
    assert held.what == [BEAT]
    assert held.wait.beat_at > held.wait.began_at
    assert held.is_held()
    held.machine.check_booted(release, generation=1)


def test_a_beat_that_is_lost_ends_nothing(held, release):
    held.cloud.faults.add(Delay(1.5), path="*/nar/*", times=None)
    held.may()
    held.wants(release)
    assert held.machine.boot(hasty=BEATS).code == 0
    assert held.what[0] == "AccessDenied"
    assert held.wait.beat_at == held.wait.began_at


def test_and_while_stage_2_waits_for_health(booted):
    done = booted.machine.stage_2(Health(tcp=(1,), within_s=2), hasty=BEATS)
    assert done.last.fields["code"] == "unhealthy"
    assert booted.what == [BEAT, "report", COMPLETE]


def test_a_closure_s_health_that_cannot_be_read_lets_go_of_the_hook(booted):
    done = booted.machine.stage_2(types.SimpleNamespace(dump_file=lambda: b"{"))
    assert (done.code, done.last.fields["code"], done.stderr) == (1, "unhealthy", "")
    assert "health.json: no JSON" in done.last.fields["message"]
    assert booted.what == ["report", COMPLETE]


# Healthy


def test_a_healthy_machine_is_let_into_service(booted, release, web):
    with web(after=2) as (port, seen):
        done = booted.machine.stage_2(Health(http=(Http("/healthz", port),), within_s=20))
        assert len(seen) == 3
    assert (done.code, done.last.kind) == (0, "healthy")
    assert booted.what == [COMPLETE, "report"]
    until(lambda: booted.states() == {booted.machine.name: "InService"})
    assert booted.activity().status == "Successful"
    assert booted.machine.last_good() == str(release.system)


def test_a_machine_that_has_served_is_held_by_nothing(booted, web):
    assert booted.machine.stage_2().code == 0
    until(lambda: booted.states() == {booted.machine.name: "InService"})
    booted.told.clear()
    booted.cloud.faults.add(Delay(1.5), path="*/nar/*", times=None)
    two = booted.cloud.release(2, health_units=("calve-health.service",))
    booted.wants(two)
    assert booted.machine.boot(hasty=BEATS).code == 0
    with web(after=1) as (port, _seen):
        assert booted.machine.stage_2(Health(http=(Http("/", port),)), hasty=BEATS).code == 0
    assert booted.what == ["report"]
    assert booted.machine.last_good() == str(two.system)


def test_what_somebody_else_has_completed_is_no_error(booted):
    booted.groups._client.complete_lifecycle_action(
        AutoScalingGroupName=GROUP,
        LifecycleHookName=HOOK,
        InstanceId=booted.machine.name,
        LifecycleActionResult="CONTINUE",
    )
    until(lambda: booted.states() == {booted.machine.name: "InService"})
    done = booted.machine.stage_2()
    assert (done.code, done.last.kind) == (0, "healthy")


def test_auto_scaling_is_waited_for(booted, release):
    booted.faults.add(Answer(Response(503)), times=3)
    done = booted.machine.stage_2()
    assert (done.code, done.last.kind) == (0, "healthy")
    assert booted.faults.injected == 3
    assert booted.machine.last_good() == str(release.system)


def test_a_clock_that_is_wrong_is_corrected(booted):
    booted.clock.shift = dt.timedelta(hours=1)
    assert booted.machine.stage_2().code == 0
    # Each service refuses once; S3 is told the report again.
    assert booted.what == ["SignatureDoesNotMatch", COMPLETE, "report", "report"]
    booted.clock.shift = dt.timedelta()  # the operator's is right
    until(lambda: booted.states() == {booted.machine.name: "InService"})


# Not well


def test_a_failed_boot_is_reported_held_and_abandoned(held, release):
    held.machine.line = "calve.hold=2"
    held.wants(release, keys=("nobody-1",))
    boot = held.machine.boot()
    assert (boot.fail["code"], boot.fail["phase"]) == ("key-unknown", "manifest")
    (first, reported_s), (last, abandoned_s) = held.told
    assert (first, last) == ("report", COMPLETE)
    assert abandoned_s - reported_s >= 1.9
    assert ABANDONED in held.is_replaced()
    assert held.machine.profile() is None


def test_it_is_kept_from_timing_out_while_the_machine_stays_on_to_be_read(held, release):
    held.machine.line = "calve.hold=2"
    held.wants(release, keys=("nobody-1",))
    assert held.machine.boot(hasty=BEATS).fail["code"] == "key-unknown"
    beats = [what for what, _ in held.told].count(BEAT)
    assert held.what == ["report", BEAT, COMPLETE]
    assert beats >= 2


def test_an_unhealthy_system_is_abandoned(booted):
    done = booted.machine.stage_2(NEVER)
    assert (done.code, done.last.fields["code"]) == (1, "unhealthy")
    assert booted.what == ["report", COMPLETE]
    assert ABANDONED in booted.is_replaced()
    assert served.read(booted.machine.root) == served.Served()


def test_a_closure_that_would_never_tell_is_refused_at_once(held, one):
    held.wants(one)
    boot = held.machine.boot()
    assert (boot.fail["code"], boot.fail["phase"]) == ("health-missing", "commit")
    assert held.what == ["report", COMPLETE]
    assert ABANDONED in held.is_replaced()
    assert held.machine.profile() is None
    held.machine.check(one)


def test_user_data_that_cannot_be_read_names_nobody_to_tell(held):
    held.machine.user_data = b"#!/bin/sh\n"
    assert held.machine.boot().fail["code"] == "userdata-foreign"
    assert held.told == []
    assert held.is_held()


def test_a_role_that_may_not_complete_it(booted):
    booted.may()
    done = booted.machine.stage_2()
    assert done.code == 1
    assert [event.kind for event in done.events] == ["phase", "fail", "note"]
    assert (done.events[1].fields["code"], done.events[1].fields["phase"]) == (
        "hook-denied",
        "health",
    )
    assert COMPLETE in done.events[1].fields["message"]
    assert done.last.fields["message"].startswith("the hook: ")
    assert booted.what == ["AccessDenied", "report", "AccessDenied"]
    # Nothing lets it go: the hook times out, as it does for a machine that is merely off.
    assert booted.is_held()
    assert booted.machine.last_good() is None


def test_auto_scaling_that_does_not_answer(booted, impatient):
    booted.faults.add(Answer(Response(503)), times=None)
    done = booted.machine.stage_2(hasty=impatient)
    assert done.code == 1
    assert [event.kind for event in done.events] == ["phase", "fail", "note"]
    assert (done.events[1].fields["code"], done.events[1].fields["phase"]) == (
        "hook-unreachable",
        "health",
    )
    assert booted.what == ["report"]
    booted.faults.clear()
    assert booted.is_held()
    assert booted.machine.last_good() is None


def test_a_report_that_cannot_be_written_is_followed_by_the_rest(held, release):
    held.wants(release, keys=("nobody-1",), reports="boot-reports/AROAOTHER")
    boot = held.machine.boot()
    assert [event.kind for event in boot.events][-2:] == ["fail", "note"]
    assert held.what == ["report", COMPLETE]
    assert ABANDONED in held.is_replaced()
