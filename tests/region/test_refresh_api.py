"""Auto Scaling and CloudWatch as boto3 sees them, on a virtual clock: refreshes, alarms, tags, zones, processes."""

import base64
import contextlib
import datetime as dt
import http.client
import json

import boto3
import botocore.config
import pytest

from calve.region.cloud import Cloud
from calve.region.group import Rules
from calve.region.scripted import ScriptedMachines, calve_of
from calve.region.scripted_balancer import ScriptedBalancer
from calve.region.scripts import good, silent
from calve.region.server import Server
from calve.region.virtual import VirtualClock
from calve.tasks import Cancel

REGION = "eu-central-1"
IMAGE = "ami-0123456789abcdef0"
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
ZONES = [f"{REGION}{letter}" for letter in "abc"]


class Place:
    """A region, and an operator with boto3 who waits for what is to come; version 2 is good, version 3 never runs."""

    def __init__(self, owner):
        self.clock = VirtualClock(START)
        self.cancel = Cancel()
        scripts = {1: good(40), 2: good(40), 3: silent()}
        machines = ScriptedMachines(
            self.clock, lambda launch: scripts[calve_of(launch.user_data)["release"]]
        )
        owner.callback(machines.close)
        balancer = ScriptedBalancer(self.clock, machines)
        cloud = Cloud(machines, balancer, clock=self.clock, rules=Rules(launch_parallelism=None))
        self.cloud = owner.enter_context(cloud.still(self.clock.drive))
        self.cloud.add_image(IMAGE, "base")
        self.url = owner.enter_context(Server(self.cloud.handle)).url
        names = ("ec2", "autoscaling", "elbv2", "cloudwatch")
        self.ec2, self.groups, self.elb, self.watch = (self._client(owner, one) for one in names)

    def _client(self, owner, name):
        client = boto3.client(
            name,
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id="AKIDEXAMPLE",
            aws_secret_access_key="secret",
            config=botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=10),
        )
        owner.callback(client.close)
        return client

    def fleet(self, size=2, **more):
        made = self.ec2.create_launch_template(
            LaunchTemplateName="web", LaunchTemplateData=self._data(1)
        )
        self.template = made["LaunchTemplate"]["LaunchTemplateId"]
        for release in (2, 3):
            self.ec2.create_launch_template_version(
                LaunchTemplateId=self.template, LaunchTemplateData=self._data(release)
            )
        target_group = self.elb.create_target_group(
            Name="web", Protocol="HTTP", Port=80, VpcId="vpc-0", HealthCheckPath="/"
        )
        settings = {
            "AutoScalingGroupName": "web",
            "LaunchTemplate": {"LaunchTemplateId": self.template, "Version": "1"},
            "MinSize": 0,
            "MaxSize": 2 * size,
            "DesiredCapacity": size,
            "AvailabilityZones": ZONES[:1],
            "TargetGroupARNs": [target_group["TargetGroups"][0]["TargetGroupArn"]],
            "HealthCheckType": "ELB",
            "HealthCheckGracePeriod": 600,
        }
        self.groups.create_auto_scaling_group(**(settings | more))
        self.until(lambda: len(self.instances()) == size and self.all_healthy())
        return self

    @staticmethod
    def _data(release):
        user_data = json.dumps({"calve": {"release": release}}).encode()
        return {
            "ImageId": IMAGE,
            "InstanceType": "t3.nano",
            "UserData": base64.b64encode(user_data).decode(),
        }

    def sleep(self, seconds):
        self.cancel.wait(seconds, self.clock)

    def until(self, condition, most_s=9000):
        stop = self.clock.monotonic() + most_s
        while not condition():
            assert self.clock.monotonic() < stop, "it did not come about"
            self.sleep(5)

    def group(self):
        answer = self.groups.describe_auto_scaling_groups(AutoScalingGroupNames=["web"])
        return answer["AutoScalingGroups"][0]

    def instances(self):
        return [one for one in self.group()["Instances"] if "Termin" not in one["LifecycleState"]]

    def all_healthy(self):
        arn = self.group()["TargetGroupARNs"][0]
        rows = self.elb.describe_target_health(TargetGroupArn=arn)["TargetHealthDescriptions"]
        healthy = {one["Target"]["Id"] for one in rows if one["TargetHealth"]["State"] == "healthy"}
        return {one["InstanceId"] for one in self.instances()} <= healthy

    def versions(self):
        return sorted(one["LaunchTemplate"]["Version"] for one in self.instances())

    def start(self, version="2", **preferences):
        form = {"MinHealthyPercentage": 100, "MaxHealthyPercentage": 150, "InstanceWarmup": 0}
        wanted = {"LaunchTemplate": {"LaunchTemplateId": self.template, "Version": version}}
        return self.groups.start_instance_refresh(
            AutoScalingGroupName="web", DesiredConfiguration=wanted, Preferences=form | preferences
        )["InstanceRefreshId"]

    def refresh(self):
        answer = self.groups.describe_instance_refreshes(AutoScalingGroupName="web")
        return answer["InstanceRefreshes"][0]

    def ended(self):
        return "EndTime" in self.refresh()


@pytest.fixture
def place():
    with contextlib.ExitStack() as owner:
        yield Place(owner)


def code_of(caught):
    return caught.value.response["Error"]["Code"]


# Refreshes


def test_a_rollback_and_all_that_is_said_of_it(place):
    place.fleet()
    place.cloud.alarms.set("errors", "OK")
    refresh_id = place.start(
        CheckpointPercentages=[50, 100],
        CheckpointDelay=600,
        BakeTime=60,
        SkipMatching=True,
        AutoRollback=True,
        AlarmSpecification={"Alarms": ["errors"]},
        ScaleInProtectedInstances="Refresh",
        StandbyInstances="Terminate",
    )
    place.until(lambda: place.refresh()["PercentageComplete"] == 50)
    shown = place.refresh()
    assert (shown["InstanceRefreshId"], shown["Status"]) == (refresh_id, "InProgress")
    assert shown["Preferences"] == {
        "MinHealthyPercentage": 100,
        "MaxHealthyPercentage": 150,
        "InstanceWarmup": 0,
        "SkipMatching": True,
        "AutoRollback": True,
        "CheckpointPercentages": [50, 100],
        "CheckpointDelay": 600,
        "BakeTime": 60,
        "AlarmSpecification": {"Alarms": ["errors"]},
        "ScaleInProtectedInstances": "Refresh",
        "StandbyInstances": "Terminate",
    }
    live = {"PercentageComplete": 50, "InstancesToUpdate": 1}
    assert shown["ProgressDetails"] == {"LivePoolProgress": live}
    assert "RollbackDetails" not in shown
    assert "EndTime" not in shown
    answer = place.groups.rollback_instance_refresh(AutoScalingGroupName="web")
    at = place.clock.now()
    assert answer["InstanceRefreshId"] == refresh_id
    assert place.refresh()["Status"] == "RollbackInProgress"
    place.until(place.ended)
    shown = place.refresh()
    assert (shown["Status"], shown["PercentageComplete"]) == ("RollbackSuccessful", 0)
    details = shown["RollbackDetails"]
    assert details["RollbackStartTime"] == at
    assert details["PercentageCompleteOnRollback"] == 50
    assert details["InstancesToUpdateOnRollback"] == 1
    assert details["ProgressDetailsOnRollback"] == {"LivePoolProgress": live}
    assert details["RollbackReason"]
    assert shown["EndTime"] > shown["StartTime"]
    assert place.versions() == ["1", "1"]
    assert place.group()["LaunchTemplate"]["Version"] == "1"


def test_faults_have_the_names_that_botocore_knows(place):
    place.fleet()
    faults, named = place.groups.exceptions, {"AutoScalingGroupName": "web"}
    for request in (
        place.groups.cancel_instance_refresh,
        place.groups.rollback_instance_refresh,
    ):
        with pytest.raises(faults.ActiveInstanceRefreshNotFoundFault):
            request(**named)
    place.groups.start_instance_refresh(**named)
    with pytest.raises(faults.IrreversibleInstanceRefreshFault):
        place.groups.rollback_instance_refresh(**named)
    with pytest.raises(faults.InstanceRefreshInProgressFault):
        place.start()
    place.groups.cancel_instance_refresh(**named)
    with pytest.raises(faults.ActiveInstanceRefreshNotFoundFault):
        place.groups.rollback_instance_refresh(**named)
    place.until(place.ended)
    place.start()
    template = {"LaunchTemplateId": place.template, "Version": "3"}
    with pytest.raises(faults.ClientError, match="An active instance refresh with a desired"):
        place.groups.update_auto_scaling_group(**named, LaunchTemplate=template)
    place.groups.rollback_instance_refresh(**named)
    with pytest.raises(faults.ActiveInstanceRefreshNotFoundFault):
        place.groups.rollback_instance_refresh(**named)
    place.groups.cancel_instance_refresh(**named)  # cancels a rollback too, as documented
    place.until(place.ended)
    assert place.refresh()["Status"] == "Cancelled"


def test_a_release_that_never_runs_is_rolled_back_after_an_hour(place):
    place.fleet()
    began = place.clock.monotonic()
    place.start("3", AutoRollback=True)
    place.until(place.ended)
    assert 3600 <= place.clock.monotonic() - began <= 3610
    shown = place.refresh()
    assert shown["Status"] == "RollbackSuccessful"
    assert "No replacement instance became healthy" in shown["RollbackDetails"]["RollbackReason"]
    assert place.versions() == ["1", "1"]


# Alarms


def test_alarms_are_described_by_name_prefix_and_state(place):
    for name, state in [("web-a", "OK"), ("web-b", "ALARM"), ("other", "INSUFFICIENT_DATA")]:
        place.cloud.alarms.set(name, state, f"because of {name}")

    def names(**asked):
        answer = place.watch.describe_alarms(**asked)
        assert answer["CompositeAlarms"] == []
        return [one["AlarmName"] for one in answer["MetricAlarms"]]

    assert names() == ["other", "web-a", "web-b"]
    assert names(AlarmNames=["web-b", "none"]) == ["web-b"]
    assert names(AlarmNamePrefix="web-") == ["web-a", "web-b"]
    assert names(StateValue="ALARM") == ["web-b"]
    assert names(AlarmTypes=["CompositeAlarm"]) == []
    pages = place.watch.get_paginator("describe_alarms").paginate(PaginationConfig={"PageSize": 2})
    assert [len(one["MetricAlarms"]) for one in pages] == [2, 1]
    (shown,) = place.watch.describe_alarms(AlarmNames=["web-b"])["MetricAlarms"]
    assert shown["StateValue"] == "ALARM"
    assert shown["StateReason"] == "because of web-b"
    assert shown["StateUpdatedTimestamp"] == START
    assert shown["AlarmArn"].endswith(":alarm:web-b")
    with pytest.raises(ValueError, match="OK"):
        place.cloud.alarms.set("web-a", "FINE")


def test_an_alarm_stops_a_refresh_and_lets_none_begin(place):
    place.fleet()
    place.cloud.alarms.set("errors", "OK")
    place.start(AlarmSpecification={"Alarms": ["errors"]}, CheckpointPercentages=[50, 100])
    place.until(lambda: place.refresh()["PercentageComplete"] == 50)
    place.cloud.alarms.set("errors", "ALARM")
    place.until(place.ended)
    shown = place.refresh()
    assert (shown["Status"], shown["PercentageComplete"]) == ("Failed", 50)
    assert "errors is in the ALARM state" in shown["StatusReason"]
    assert place.versions() == ["1", "2"]
    with pytest.raises(place.groups.exceptions.ClientError, match="in the ALARM state"):
        place.start(AlarmSpecification={"Alarms": ["errors"]})


def test_what_cloudwatch_cannot_do_is_an_error_in_its_own_protocol(place):
    error = place.watch.exceptions.ClientError
    with pytest.raises(error) as caught:
        place.watch.list_metrics()
    assert code_of(caught) == "InvalidAction"
    with pytest.raises(error, match="cannot be used together") as caught:
        place.watch.describe_alarms(AlarmNames=["a"], AlarmNamePrefix="a")
    assert code_of(caught) == "ValidationError"
    with pytest.raises(error) as caught:
        place.watch.describe_alarms(ActionPrefix="arn:")
    assert code_of(caught) == "UnknownParameter"
    host, port = place.url.removeprefix("http://").split(":")
    client = http.client.HTTPConnection(host, int(port), timeout=5)
    target = {"X-Amz-Target": "GraniteServiceVersion20100801.DescribeAlarms"}
    for body in (b"{", b"[]", b"\xff", b"[" * 100_000):
        client.request("POST", "/", body, target)
        answer = client.getresponse()
        said = json.loads(answer.read())
        assert (answer.status, said["__type"].split("#")[1]) == (400, "SerializationException")
    client.request("POST", "/", b"{}", target)
    assert (
        client.getresponse().getheader("x-amzn-query-error") == "MissingAuthenticationToken;Sender"
    )
    client.close()


# Tags


def tag(key, value="", propagates=True, group="web"):
    return {
        "ResourceId": group,
        "ResourceType": "auto-scaling-group",
        "Key": key,
        "Value": value,
        "PropagateAtLaunch": propagates,
    }


def test_tags_are_put_changed_found_and_deleted(place):
    place.fleet(1, Tags=[tag("calve:fleet", "web"), tag("team", "one", propagates=False)])
    assert place.group()["Tags"] == [tag("calve:fleet", "web"), tag("team", "one", False)]
    place.groups.create_or_update_tags(Tags=[tag("team", "two"), tag("live", "3", False)])
    shown = {one["Key"]: (one["Value"], one["PropagateAtLaunch"]) for one in place.group()["Tags"]}
    assert shown == {"calve:fleet": ("web", True), "team": ("two", True), "live": ("3", False)}
    place.groups.delete_tags(Tags=[tag("team", "other"), {"ResourceId": "web", "Key": "live"}])
    assert {one["Key"] for one in place.group()["Tags"]} == {"calve:fleet", "team"}

    def found(*filters):
        wanted = [{"Name": name, "Values": values} for name, values in filters]
        return [
            one["AutoScalingGroupName"]
            for one in place.groups.describe_auto_scaling_groups(Filters=wanted)[
                "AutoScalingGroups"
            ]
        ]

    assert found(("tag:calve:fleet", ["x", "web"])) == ["web"]
    assert found(("tag-key", ["team"]), ("tag-value", ["two"])) == ["web"]
    assert found(("tag:calve:fleet", ["web"]), ("tag:team", ["one"])) == []
    assert found(("tag:nothing", ["web"])) == []
    rows = place.groups.describe_tags(
        Filters=[
            {"Name": "auto-scaling-group", "Values": ["web"]},
            {"Name": "key", "Values": ["team"]},
            {"Name": "propagate-at-launch", "Values": ["true"]},
        ]
    )["Tags"]
    assert rows == [tag("team", "two")]


def test_tags_that_propagate_are_on_the_instances(place):
    place.fleet(1, Tags=[tag("shown", "1"), tag("hidden", "1", propagates=False)])
    (one,) = place.instances()
    answer = place.ec2.describe_instances(InstanceIds=[one["InstanceId"]])
    keys = {each["Key"] for each in answer["Reservations"][0]["Instances"][0]["Tags"]}
    assert "shown" in keys
    assert "hidden" not in keys


def test_tags_that_are_none_are_refused(place):
    place.fleet(1)
    error = place.groups.exceptions.ClientError
    for tags, said in [
        ([tag("aws:own")], "reserved"),
        ([tag("k" * 128, "v" * 256), tag("web", group="other")], "not found"),
        ([tag(f"key-{number}") for number in range(51)], "at most 50"),
    ]:
        with pytest.raises(error, match=said):
            place.groups.create_or_update_tags(Tags=tags)
    assert place.group()["Tags"] == []
    with pytest.raises(error, match="Allowed Filter types are: tag-key tag-value"):
        place.groups.describe_auto_scaling_groups(Filters=[{"Name": "name", "Values": ["web"]}])


# Zones, processes, instances


def test_a_zone_without_room_shows_in_the_activities_and_another_one_helps(place):
    place.cloud.refuse(1, zone=ZONES[1])
    place.fleet(3, AvailabilityZones=ZONES)
    assert sorted(one["AvailabilityZone"][-1] for one in place.instances()) in (
        ["a", "a", "c"],
        ["a", "c", "c"],
    )
    assert place.group()["AvailabilityZones"] == ZONES
    answer = place.groups.describe_scaling_activities(AutoScalingGroupName="web")["Activities"]
    (failed,) = [one for one in answer if one["StatusCode"] == "Failed"]
    assert "sufficient t3.nano capacity" in failed["StatusMessage"]
    assert json.loads(failed["Details"]) == {"Availability Zone": ZONES[1]}
    ids = [one["InstanceId"] for one in place.instances()]
    rows = place.ec2.describe_instances(InstanceIds=ids)["Reservations"]
    placed = {
        one["InstanceId"]: one["Placement"]["AvailabilityZone"]
        for row in rows
        for one in row["Instances"]
    }
    assert placed == {one["InstanceId"]: one["AvailabilityZone"] for one in place.instances()}
    with pytest.raises(place.groups.exceptions.ClientError, match="Invalid Availability Zone"):
        place.groups.update_auto_scaling_group(
            AutoScalingGroupName="web", AvailabilityZones=["us-east-1a"]
        )


def test_suspended_processes_are_shown(place):
    place.fleet(1)
    named = {"AutoScalingGroupName": "web"}
    place.groups.suspend_processes(**named, ScalingProcesses=["Launch", "Terminate"])
    shown = place.group()["SuspendedProcesses"]
    assert [one["ProcessName"] for one in shown] == ["Launch", "Terminate"]
    assert shown[0]["SuspensionReason"].startswith("User suspended at 2026-01-01T")
    place.groups.resume_processes(**named, ScalingProcesses=["Launch"])
    assert [one["ProcessName"] for one in place.group()["SuspendedProcesses"]] == ["Terminate"]
    place.groups.resume_processes(**named)
    assert place.group()["SuspendedProcesses"] == []
    kinds = place.groups.describe_scaling_process_types()["Processes"]
    assert {"ProcessName": "InstanceRefresh"} in kinds


def test_instances_are_protected_set_aside_and_declared_ill(place):
    place.fleet(2)
    named = {"AutoScalingGroupName": "web"}
    first, second = (one["InstanceId"] for one in place.instances())
    place.groups.set_instance_protection(**named, InstanceIds=[first], ProtectedFromScaleIn=True)
    assert [one["ProtectedFromScaleIn"] for one in place.instances()] == [True, False]
    answer = place.groups.enter_standby(
        **named, InstanceIds=[second], ShouldDecrementDesiredCapacity=True
    )
    assert answer["Activities"][0]["Description"] == f"Moving EC2 instance to Standby: {second}"

    def state(instance_id):
        rows = place.groups.describe_auto_scaling_instances(InstanceIds=[instance_id])
        return rows["AutoScalingInstances"][0]["LifecycleState"]

    place.until(lambda: state(second) == "Standby")
    assert place.group()["DesiredCapacity"] == 1
    answer = place.groups.exit_standby(**named, InstanceIds=[second])
    assert answer["Activities"][0]["StatusCode"] == "InProgress"
    place.until(lambda: state(second) == "InService" and place.all_healthy())
    place.groups.set_instance_health(
        InstanceId=second, HealthStatus="Unhealthy", ShouldRespectGracePeriod=False
    )
    place.until(lambda: len(place.instances()) == 2 and second not in str(place.instances()))
    assert place.instances()[0]["InstanceId"] == first
