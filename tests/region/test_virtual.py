"""A region on a virtual clock, boto3 as its client: releases of twenty minutes in a second."""

import base64
import contextlib
import datetime as dt
import json
import threading

import boto3
import botocore.config
import botocore.exceptions
import pytest

from calve.region.api_throttles import RATES, ApiThrottles, Rate
from calve.region.cloud import Cloud
from calve.region.group import Rules
from calve.region.scripted import ScriptedMachines, calve_of
from calve.region.scripted_balancer import ScriptedBalancer
from calve.region.scripts import dies_after, fails, good, panics, serves_500, silent
from calve.region.server import Server
from calve.region.virtual import VirtualClock
from calve.tasks import Cancel

REGION = "eu-central-1"
IMAGE = "ami-0123456789abcdef0"
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
HOOK = {
    "LifecycleHookName": "calve",
    "LifecycleTransition": "autoscaling:EC2_INSTANCE_LAUNCHING",
    "HeartbeatTimeout": 180,
}


class Place:
    """An operator whose releases are numbers, and machines that do what a release's script says."""

    def __init__(self, owner, **options):
        self.clock = VirtualClock(START)
        self.cancel = Cancel()
        self.scripts = {1: lambda: good(40)}
        self.reports = {}
        drain_s = options.pop("drain_s", 0.0)
        if "rates" in options:
            options["throttles"] = ApiThrottles(self.clock, options.pop("rates"))
        self.throttles = options.get("throttles")
        self.machines = ScriptedMachines(self.clock, self._script, report=self._report)
        self.balancer = ScriptedBalancer(self.clock, self.machines, drain_s=drain_s)
        owner.callback(self.balancer.close)
        owner.callback(self.machines.close)
        options.setdefault("rules", Rules(launch_parallelism=None))
        self.cloud = owner.enter_context(
            Cloud(self.machines, self.balancer, clock=self.clock, **options).still(self.clock.drive)
        )
        self.machines.connect(self.cloud.act)
        self.cloud.add_image(IMAGE, "base")
        server = owner.enter_context(Server(self.cloud.handle))
        self.ec2, self.groups, self.elb = (
            self._client(owner, server.url, name) for name in ("ec2", "autoscaling", "elbv2")
        )

    @staticmethod
    def _client(owner, url, name):
        client = boto3.client(
            name,
            endpoint_url=url,
            region_name=REGION,
            aws_access_key_id="AKIDEXAMPLE",
            aws_secret_access_key="secret",
            config=botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=10),
        )
        owner.callback(client.close)
        return client

    def _script(self, launch):
        return self.scripts[calve_of(launch.user_data)["release"]]()

    def _report(self, instance_id, user_data, text):
        calve = calve_of(user_data)
        self.reports[f"{calve['reports']}:{instance_id}/{calve['release']:08d}.log"] = text

    def data(self, release, hook=True):
        body = {"release": release, "reports": "boot-reports/AROA"}
        if hook:
            body["hook"] = {"group": "web", "name": "calve"}
        return {
            "ImageId": IMAGE,
            "UserData": base64.b64encode(json.dumps({"calve": body}).encode()).decode(),
        }

    def fleet(self, size=4, *, hook=True, grace_s=0):
        made = self.ec2.create_launch_template(
            LaunchTemplateName="web", LaunchTemplateData=self.data(1, hook)
        )
        self.template = made["LaunchTemplate"]["LaunchTemplateId"]
        group = self.elb.create_target_group(
            Name="web",
            Protocol="HTTP",
            Port=80,
            VpcId="vpc-1",
            HealthCheckIntervalSeconds=10,
            HealthyThresholdCount=2,
            UnhealthyThresholdCount=2,
        )
        self.arn = group["TargetGroups"][0]["TargetGroupArn"]
        self.groups.create_auto_scaling_group(
            AutoScalingGroupName="web",
            LaunchTemplate={"LaunchTemplateId": self.template, "Version": "1"},
            MinSize=0,
            MaxSize=2 * size,
            DesiredCapacity=size,
            AvailabilityZones=[f"{REGION}a"],
            TargetGroupARNs=[self.arn],
            HealthCheckType="ELB",
            HealthCheckGracePeriod=grace_s,
            LifecycleHookSpecificationList=[HOOK] if hook else [],
        )
        return self

    def release(self, number, script, hook=True):
        self.scripts[number] = script
        made = self.ec2.create_launch_template_version(
            LaunchTemplateId=self.template, LaunchTemplateData=self.data(number, hook)
        )
        version = str(made["LaunchTemplateVersion"]["VersionNumber"])
        self.groups.start_instance_refresh(
            AutoScalingGroupName="web",
            DesiredConfiguration={
                "LaunchTemplate": {"LaunchTemplateId": self.template, "Version": version}
            },
            Preferences={
                "MinHealthyPercentage": 100,
                "MaxHealthyPercentage": 110,
                "InstanceWarmup": 30,
            },
        )

    def sleep(self, seconds):
        self.cancel.wait(seconds, self.clock)

    @property
    def passed_s(self):
        return (self.clock.now() - START).total_seconds()

    def until(self, condition, poll_s=5, most_s=7200):
        """Poll as an operator does; return how long it took."""
        began = self.passed_s
        while not condition():
            assert self.passed_s - began < most_s, "it did not come about"
            self.sleep(poll_s)
        return self.passed_s - began

    def refresh(self):
        answer = self.groups.describe_instance_refreshes(AutoScalingGroupName="web")
        return answer["InstanceRefreshes"][0]

    def ended(self):
        return "EndTime" in self.refresh()

    def instances(self):
        answer = self.groups.describe_auto_scaling_groups(AutoScalingGroupNames=["web"])
        return answer["AutoScalingGroups"][0]["Instances"]

    def lifecycles(self):
        return sorted(one["LifecycleState"] for one in self.instances())

    def health(self):
        rows = self.elb.describe_target_health(TargetGroupArn=self.arn)["TargetHealthDescriptions"]
        return {one["Target"]["Id"]: one["TargetHealth"]["State"] for one in rows}

    def serving(self):
        return sum(one == "healthy" for one in self.health().values())

    def activities(self, word):
        found = self.groups.describe_scaling_activities(AutoScalingGroupName="web")["Activities"]
        return [one for one in found if word in one["Description"] + one.get("StatusMessage", "")]

    def console(self, instance_id):
        output = self.ec2.get_console_output(InstanceId=instance_id).get("Output", "")
        return output.replace("\r\n", "\n")

    def new(self, number):
        return [
            one.instance_id
            for one in self.machines.launches
            if calve_of(one.user_data)["release"] == number
        ]


@pytest.fixture
def place(request):
    with contextlib.ExitStack() as owner:
        yield Place(owner, **dict(getattr(request, "param", {})))


def test_nothing_happens_until_somebody_waits(place):
    place.fleet()
    assert place.instances() == []
    assert place.clock.now() == START
    place.sleep(1)
    assert place.lifecycles() == ["Pending:Wait"] * 4


def test_a_release_of_twenty_minutes_leaves_the_same_story_every_time():
    stories = []
    for _ in range(2):
        with contextlib.ExitStack() as owner:
            place = Place(owner).fleet(10)
            place.until(lambda place=place: place.serving() == 10)
            place.release(2, lambda: good(60))
            story = []

            def over(place=place, story=story):
                story.append((place.passed_s, place.serving(), place.refresh()["Status"]))
                return place.ended()

            place.until(over)
            stories.append(story)
            assert place.refresh()["Status"] == "Successful"
            assert place.refresh()["PercentageComplete"] == 100
            assert len(place.new(2)) == 10
            assert {one["LaunchTemplate"]["Version"] for one in place.instances()} == {"2"}
            assert min(serving for _, serving, _ in story) >= 10
    assert stories[0] == stories[1]
    assert 600 < stories[0][-1][0] < 2400


def test_hooks_hold_until_the_scripts_complete_them(place):
    place.fleet(2)
    assert place.until(lambda: place.lifecycles() == ["InService"] * 2, poll_s=1) in {40, 41}
    healthy_s = place.until(lambda: place.serving() == 2, poll_s=1)
    assert 9 <= healthy_s <= 11  # one interval after the registration, and one good check suffices


def test_a_failure_is_told_to_console_and_report_before_the_group_replaces_the_machine(place):
    place.fleet(2)
    place.until(lambda: place.serving() == 2)
    place.release(2, lambda: fails("nar-damaged", "it is truncated", 20, hold_s=60))
    place.until(lambda: place.activities("ABANDON"), poll_s=1)
    first = place.new(2)[0]
    (line,) = [one for one in place.console(first).splitlines() if '"fail"' in one]
    said = json.loads(line.removeprefix("@@calve "))
    assert (said["v"], said["t"], said["code"]) == (1, 20, "nar-damaged")
    assert said["message"] == "it is truncated"
    report = place.reports[f"boot-reports/AROA:{first}/00000002.log"]
    assert report.splitlines()[-1] == line
    assert place.refresh()["Status"] == "InProgress"
    assert len(place.new(2)) == 2  # it is tried again
    assert place.serving() == 2


@pytest.mark.parametrize("script", [silent, panics])
def test_who_says_nothing_is_abandoned_as_its_hook_times_out(place, script):
    place.fleet(1)
    place.until(lambda: place.serving() == 1)
    place.release(2, script)
    took_s = place.until(lambda: place.activities("Heartbeat Timeout"), poll_s=1)
    assert 180 <= took_s <= 182
    said = place.console(place.new(2)[0])
    assert ("Kernel panic" in said) is (script is panics)
    assert place.reports.keys() == {f"boot-reports/AROA:{place.new(1)[0]}/00000001.log"}


def test_beats_keep_a_slow_boot_alive(place):
    place.fleet(1)
    place.until(lambda: place.serving() == 1)
    place.release(2, lambda: good(900))
    place.until(place.ended)
    assert place.refresh()["Status"] == "Successful"
    assert place.activities("Heartbeat") == []
    assert len(place.new(2)) == 1


def test_a_machine_that_answers_500_enters_service_and_is_not_healthy(place):
    place.fleet(1, grace_s=600)
    place.until(lambda: place.serving() == 1)
    place.release(2, serves_500)
    place.until(lambda: place.new(2))
    bad = place.new(2)[0]
    place.until(lambda: place.health().get(bad) == "unhealthy")
    (row,) = place.elb.describe_target_health(
        TargetGroupArn=place.arn, Targets=[{"Id": bad, "Port": 80}]
    )["TargetHealthDescriptions"]
    assert row["TargetHealth"]["Reason"] == "Target.ResponseCodeMismatch"
    assert "[500]" in row["TargetHealth"]["Description"]
    assert place.serving() == 1


def test_a_machine_that_dies_is_replaced(place):
    place.fleet(2)
    place.scripts[1] = lambda: dies_after(100, 40)
    place.until(lambda: place.serving() == 2)
    place.scripts[1] = lambda: good(40)
    place.until(lambda: len(place.new(1)) == 4)
    place.until(lambda: place.serving() == 2)
    assert 150 <= place.passed_s <= 165


@pytest.mark.parametrize("place", [{"drain_s": 25.0}], indirect=True)
def test_a_target_drains_as_long_as_requests_are_under_way(place):
    place.fleet(1)
    place.until(lambda: place.serving() == 1)
    place.groups.set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=0)
    place.sleep(1)
    assert list(place.health().values()) == ["draining"]
    assert 23 <= place.until(lambda: not place.health(), poll_s=1) <= 25
    assert place.until(lambda: place.lifecycles() == [], poll_s=1) <= 1


def test_a_group_without_a_hook_lets_the_balancer_judge(place):
    place.fleet(1, hook=False, grace_s=300)
    place.until(lambda: place.lifecycles() == ["InService"], poll_s=1)
    assert place.passed_s <= 2
    place.until(lambda: place.serving() == 1, poll_s=1)
    assert 50 <= place.passed_s <= 61  # failing checks first: then two good ones are asked for


def test_leaving_ends_what_was_launched_and_frees_the_clock():
    threads = threading.active_count()
    with contextlib.ExitStack() as owner:
        place = Place(owner).fleet(2)
        place.sleep(10)
        names = place.new(1)
        assert all(place.machines.running(one) for one in names)
    assert not any(place.machines.running(one) for one in names)
    rounds = len(place.machines.launches)
    place.sleep(600)
    assert len(place.machines.launches) == rounds
    assert threading.active_count() == threads


@pytest.mark.parametrize("place", [{"console_lag_s": 60.0}], indirect=True)
def test_a_console_is_shown_late_and_for_an_hour_after_the_end(place):
    place.fleet(1)
    place.sleep(1)
    (name,) = place.new(1)
    began_s = place.passed_s
    healthy_s = place.until(lambda: '"healthy"' in place.console(name), poll_s=1)
    assert 40 + 60 - 1 <= began_s + healthy_s <= 40 + 60 * 9 / 8 + 2
    place.groups.set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=0)
    place.until(lambda: place.lifecycles() == [])
    place.sleep(3500)
    assert '"healthy"' in place.console(name)
    place.sleep(150)
    with pytest.raises(botocore.exceptions.ClientError, match=r"InvalidInstanceID\.NotFound"):
        place.console(name)


@pytest.mark.parametrize("place", [{"console_lag_s": 60.0}], indirect=True)
def test_last_words_are_shown_a_lag_after_the_end(place):
    place.fleet(1)
    place.scripts[1] = lambda: fails("disk-small", "no room", 10, hold_s=5)
    place.until(lambda: place.activities("ABANDON"), poll_s=1)
    name = place.new(1)[0]
    assert not place.machines.running(name)
    assert '"fail"' not in place.console(name)
    place.sleep(70)
    assert place.console(name) == place.machines.console(name).decode()
    assert '"fail"' in place.console(name)


def test_without_a_lag_a_console_is_shown_at_once(place):
    place.fleet(1)
    place.sleep(10)
    (name,) = place.new(1)
    assert place.console(name) == place.machines.console(name).decode() != ""


def _refusal(call, **parameters):
    """Call until it is refused; return how often it was not, the code, the status and the message."""
    for count in range(500):
        try:
            call(**parameters)
        except botocore.exceptions.ClientError as error:
            answer = error.response
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            return count, answer["Error"]["Code"], status, answer["Error"]["Message"]
    raise AssertionError("it was never refused")


@pytest.mark.parametrize("place", [{"rates": RATES}], indirect=True)
def test_requests_are_throttled_by_service_and_class(place):
    place.fleet(1)
    group = {"AutoScalingGroupName": "web"}
    limit = ("RequestLimitExceeded", 503, "Request limit exceeded.")
    rate = ("Rate exceeded",)
    instances = place.ec2.describe_instances
    assert _refusal(instances) == (50, *limit)  # without a filter
    assert _refusal(instances, MaxResults=5) == (100, *limit)
    assert _refusal(place.ec2.describe_launch_templates) == (50, *limit)  # a bucket of its own
    balancers = _refusal(place.elb.describe_target_groups)
    assert balancers == (40, "ThrottlingException", 400, *rate)
    assert _refusal(place.elb.describe_target_health, TargetGroupArn=place.arn)[0] == 0  # the same
    assert _refusal(place.groups.describe_scaling_activities) == (100, "Throttling", 400, *rate)
    desired = _refusal(place.groups.set_desired_capacity, DesiredCapacity=1, **group)
    assert desired == (19, "Throttling", 400, *rate)
    assert place.throttles.refused.total() == 7
    place.sleep(1)
    assert _refusal(instances, MaxResults=5)[0] == 20
    assert _refusal(place.groups.set_desired_capacity, DesiredCapacity=1, **group)[0] == 3


@pytest.mark.parametrize(
    "place",
    [{"rates": {"autoscaling": {"DescribeInstanceRefreshes": Rate(2, 0.1)}}}],
    indirect=True,
)
def test_one_action_may_have_a_rate_of_its_own(place):
    place.fleet(1)
    ask = place.groups.describe_instance_refreshes
    assert _refusal(ask, AutoScalingGroupName="web")[0] == 2
    for _ in range(150):
        place.groups.describe_auto_scaling_groups()
    place.sleep(10)
    assert _refusal(ask, AutoScalingGroupName="web")[0] == 1


def test_machines_hooks_are_not_the_operator_s_requests():
    with contextlib.ExitStack() as owner:
        place = Place(owner, rates={"autoscaling": {"CompleteLifecycleAction": Rate(1, 0.0)}})
        place.fleet(3)
        place.until(lambda: place.serving() == 3)
        assert place.throttles.refused.total() == 0


def test_a_launch_is_refused_for_want_of_capacity_and_tried_again(place):
    place.cloud.refuse(3)
    place.fleet(2)
    place.sleep(1)
    failed = place.activities("do not have sufficient")
    assert len(failed) == 2
    assert {one["StatusCode"] for one in failed} == {"Failed"}
    lacking = (
        "We currently do not have sufficient t3.nano capacity in the Availability Zone you requested "
        f"({REGION}a). Our system will be working on provisioning additional capacity. "
        "Launching EC2 instance failed."
    )
    assert {one["StatusMessage"] for one in failed} == {lacking}
    assert place.ec2.describe_instances()["Reservations"] == []
    place.until(lambda: place.serving() == 2)
    assert len(place.activities("do not have sufficient")) == 3
    assert len(place.new(1)) == 2


def test_a_refusal_may_be_of_one_zone_have_its_own_words_and_be_taken_back(place):
    place.cloud.refuse(100, "Nobody launches there", zone=f"{REGION}b")
    place.cloud.refuse(100, "You have reached your quota", zone=f"{REGION}a")
    place.fleet(1)
    place.sleep(100)
    tries = len(place.activities("You have reached your quota"))
    assert 3 < tries < 10  # ever later
    assert place.activities("Nobody") == []
    place.cloud.refuse(0)
    place.until(lambda: place.serving() == 1)
    assert len(place.activities("You have reached your quota")) == tries


def test_a_release_goes_on_once_capacity_is_back(place):
    place.fleet(2)
    place.until(lambda: place.serving() == 2)
    place.cloud.refuse(4)
    place.release(2, lambda: good(40))
    place.until(place.ended)
    assert place.refresh()["Status"] == "Successful"
    assert len(place.activities("sufficient")) == 4
