"""Lifecycle hooks over HTTP with boto3: every action and error, machines that sign with their role, their metadata."""

import contextlib
import datetime as dt
import http.client
import re
import time

import boto3
import botocore.config
import pytest

from calve.aws.autoscaling import AutoScaling, Hook
from calve.aws.ec2 import Ec2
from calve.aws.elb import Elb
from calve.aws.session import Session
from calve.errors import AccessError, CalveError, NotFoundError
from calve.region.access import Access
from calve.region.cloud import Cloud
from calve.region.imds import Imds, Instance
from calve.region.server import Server
from calve.region.signature import Allow, Principals
from calve.region.targets import Check
from calve.transport.credentials import Credentials

REGION = "eu-central-1"
IMAGE = "ami-0123456789abcdef0"
LAUNCHING = "autoscaling:EC2_INSTANCE_LAUNCHING"
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"
OWN = "arn:aws:autoscaling:eu-central-1:123456789012:autoScalingGroup:*:autoScalingGroupName/web"
ROLE = (
    Allow("autoscaling:CompleteLifecycleAction", OWN),
    Allow("autoscaling:RecordLifecycleActionHeartbeat", OWN),
)


class Machines:
    """Machines that are a flag each."""

    def __init__(self):
        self.on = {}

    def launch(self, launch):
        self.on[launch.instance_id] = True

    def address(self, instance_id):
        return ("127.0.0.1", 1)

    def running(self, instance_id):
        return self.on.get(instance_id, False)

    def console(self, instance_id):
        return b""

    def terminate(self, instance_id):
        self.on[instance_id] = False

    def close(self):
        pass


class Balancer:
    """Finds every target healthy, with nothing under way."""

    def __init__(self):
        self.added = []
        self.there = set()

    def start(self, check):
        pass

    def add(self, target_id, address):
        self.added.append(target_id)
        self.there.add(target_id)

    def checks(self):
        return {one: Check(known=True, passing=True, code=200) for one in self.there}

    def ready(self, target_id):
        pass

    def drain(self, target_id):
        pass

    def remove(self, target_id):
        self.there.discard(target_id)


class Place:
    """A region that verifies signatures, an operator, and one role for machines."""

    def __init__(self, clock, principals, cloud, server, machines, balancer, owner):
        self.clock, self.principals, self.cloud = clock, principals, cloud
        self.machines, self.balancer, self.url = machines, balancer, server.url
        self._owner = owner
        self.operator = principals.add_user("operator")
        principals.set_policy("calve-machine", ROLE)
        session = self.session(self.operator)
        self.groups, self.ec2, self.elb = AutoScaling(session), Ec2(session), Elb(session)
        self.raw = self.client(self.operator)
        for one in (self.groups, self.ec2, self.elb):
            owner.callback(one._client.close)

    def session(self, key):
        return Session(
            REGION, self.url, credentials=Credentials(key.access_key, key.secret_key, key.token)
        )

    def client(self, key, service="autoscaling", **changes):
        keys = {
            "aws_access_key_id": key.access_key,
            "aws_secret_access_key": key.secret_key,
            "aws_session_token": key.token,
        }
        made = boto3.client(
            service,
            endpoint_url=self.url,
            region_name=REGION,
            config=botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=10),
            **{**keys, **changes},
        )
        self._owner.callback(made.close)
        return made

    def machine(self, instance_id, hours=6):
        expires = self.clock.now() + dt.timedelta(hours=hours)
        return self.principals.add_session("calve-machine", instance_id, expires)

    def create(self, *hooks, size=(0, 1, 2), name="web", target_groups=()):
        self.template = self.ec2.create_template(
            f"template-{name}",
            image_id=IMAGE,
            instance_type="t3.nano",
            user_data=b"",
            description="",
        )
        self.groups.create_group(
            name,
            template_id=self.template.id,
            version=1,
            size=size,
            hooks=hooks,
            target_groups=target_groups,
        )

    def states(self, name="web"):
        return {one.id: one.lifecycle for one in self.groups.group(name).instances}

    def held(self, *hooks, state="Pending:Wait", **more):
        """Create a group and return the first instance once it is held."""
        self.create(*hooks, **more)
        until(lambda: list(self.states().values()) == [state])
        return next(iter(self.states()))

    def token(self, instance_id):
        group = next(iter(self.cloud.autoscaling.groups.values()))
        return group.instances[instance_id].waits[0].token


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


@pytest.fixture
def place(clock):
    principals, machines, balancer = Principals(), Machines(), Balancer()
    access = Access(principals, region=REGION, clock=clock)
    with (
        Cloud(
            machines, balancer, clock=clock, region=REGION, poll_s=0.02, authenticate=access.check
        ) as cloud,
        Server(cloud.handle) as server,
        contextlib.ExitStack() as owner,
    ):
        cloud.add_image(IMAGE, "base")
        yield Place(clock, principals, cloud, server, machines, balancer, owner)


def code_of(call):
    """Return the code, the status and the message that a call is refused with."""
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call()
    answer = caught.value.response
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    return answer["Error"]["Code"], status, answer["Error"]["Message"]


# Hooks as data


def test_hooks_are_put_changed_shown_and_deleted(place):
    place.create(size=(0, 0, 1))
    raw = place.raw
    raw.put_lifecycle_hook(
        AutoScalingGroupName="web", LifecycleHookName="down", LifecycleTransition=TERMINATING
    )
    raw.put_lifecycle_hook(
        AutoScalingGroupName="web",
        LifecycleHookName="web/up_1-a",
        LifecycleTransition=LAUNCHING,
        HeartbeatTimeout=30,
        DefaultResult="CONTINUE",
        NotificationMetadata="to whom it may concern",
    )
    down, up = raw.describe_lifecycle_hooks(AutoScalingGroupName="web")["LifecycleHooks"]
    assert down == {
        "LifecycleHookName": "down",
        "AutoScalingGroupName": "web",
        "LifecycleTransition": TERMINATING,
        "HeartbeatTimeout": 3600,
        "GlobalTimeout": 172800,
        "DefaultResult": "ABANDON",
    }
    assert up["NotificationMetadata"] == "to whom it may concern"
    assert (up["HeartbeatTimeout"], up["GlobalTimeout"]) == (30, 3000)
    raw.put_lifecycle_hook(
        AutoScalingGroupName="web", LifecycleHookName="web/up_1-a", HeartbeatTimeout=7200
    )
    (after,) = raw.describe_lifecycle_hooks(
        AutoScalingGroupName="web", LifecycleHookNames=["web/up_1-a", "none"]
    )["LifecycleHooks"]
    assert after == {**up, "HeartbeatTimeout": 7200, "GlobalTimeout": 172800}
    raw.delete_lifecycle_hook(AutoScalingGroupName="web", LifecycleHookName="down")
    assert [one.name for one in place.groups.hooks("web")] == ["web/up_1-a"]
    types = raw.describe_lifecycle_hook_types()["LifecycleHookTypes"]
    assert types == [LAUNCHING, TERMINATING]


def test_the_gateway_reads_back_what_it_put(place):
    place.create(Hook("up"), Hook("down", launching=False, heartbeat_s=60), size=(0, 0, 1))
    place.groups.put_hook("web", Hook("up", heartbeat_s=300, abandons=False))
    assert place.groups.hooks("web") == (
        Hook("up", launching=True, heartbeat_s=300, abandons=False),
        Hook("down", launching=False, heartbeat_s=60, abandons=True),
    )
    with pytest.raises(NotFoundError, match="AutoScalingGroup name not found"):
        place.groups.hooks("other")


def test_a_hook_that_cannot_be_is_refused(place):
    place.create(size=(0, 0, 1))
    good = {"LifecycleHookName": "up", "LifecycleTransition": LAUNCHING}

    def put(**changes):
        named = {"AutoScalingGroupName": "web", **good, **changes}
        return code_of(
            lambda: place.raw.put_lifecycle_hook(
                **{name: value for name, value in named.items() if value is not None}
            )
        )

    for changes, text in [
        ({"HeartbeatTimeout": 29}, "from 30 to 7200"),
        ({"HeartbeatTimeout": 7201}, "from 30 to 7200"),
        ({"DefaultResult": "RETRY"}, "CONTINUE, ABANDON"),
        ({"LifecycleTransition": "launching"}, LAUNCHING),
        ({"LifecycleTransition": None}, "must be given for a new"),
        ({"LifecycleHookName": "up!"}, "is not valid"),
        ({"NotificationMetadata": "x" * 4001}, "1 to 4000"),
        ({"AutoScalingGroupName": "other"}, "AutoScalingGroup name not found"),
    ]:
        code, status, message = put(**changes)
        assert (code, status) == ("ValidationError", 400)
        assert text in message
    code, _, message = put(RoleARN="arn:aws:iam::123456789012:role/x")
    assert (code, "RoleARN" in message) == ("UnknownParameter", True)
    assert place.groups.hooks("web") == ()


def test_a_group_has_fifty_hooks_at_most(place):
    fifty = [Hook(f"hook-{number}") for number in range(50)]
    place.create(*fifty, size=(0, 0, 1))
    with pytest.raises(CalveError, match="LimitExceeded"):
        place.groups.put_hook("web", Hook("one-more"))
    place.groups.put_hook("web", Hook("hook-7", heartbeat_s=30))
    assert len(place.groups.hooks("web")) == 50
    with pytest.raises(CalveError, match="LimitExceeded"):
        place.create(*fifty, Hook("one-more"), name="other")
    with pytest.raises(CalveError, match="specified twice"):
        place.create(Hook("up"), Hook("up"), name="third")


# Lifecycle actions


def test_a_machine_is_held_until_it_says_continue_and_only_then_registered(place):
    target = place.elb.create_target_group("web", path="/", delay_s=1)
    name = place.held(Hook("up"), target_groups=[target.arn])
    assert place.elb.health(target.arn) == ()
    assert place.balancer.added == []
    (activity,) = place.groups.activities("web")
    assert activity.status == "MidLifecycleAction"
    shown = place.raw.describe_auto_scaling_instances(InstanceIds=[name])
    assert shown["AutoScalingInstances"][0]["LifecycleState"] == "Pending:Wait"
    place.client(place.machine(name)).complete_lifecycle_action(
        AutoScalingGroupName="web",
        LifecycleHookName="up",
        InstanceId=name,
        LifecycleActionResult="CONTINUE",
    )
    until(lambda: [one.state for one in place.elb.health(target.arn)] == ["healthy"])
    assert place.states() == {name: "InService"}


def test_heartbeats_prolong_and_the_timeout_abandons(place):
    first = place.held(Hook("up", heartbeat_s=60))
    machine = place.client(place.machine(first))
    for _ in range(3):
        place.clock.shift += dt.timedelta(seconds=50)
        machine.record_lifecycle_action_heartbeat(
            AutoScalingGroupName="web",
            LifecycleHookName="up",
            LifecycleActionToken=place.token(first),
        )
    assert place.states() == {first: "Pending:Wait"}
    place.machines.on[first] = False  # powered off: nobody looks
    until(lambda: place.ec2.instances([first])[0].state == "stopped")
    assert place.states() == {first: "Pending:Wait"}
    token = place.token(first)
    place.clock.shift += dt.timedelta(seconds=60)
    until(lambda: list(place.states().values()) == ["Pending:Wait"] and first not in place.states())
    (cancelled,) = [one for one in place.groups.activities("web") if one.status == "Cancelled"]
    assert cancelled.message == (
        "Instance failed to complete user's Lifecycle Action: Lifecycle Action with token "
        f"{token} was abandoned: Heartbeat Timeout"
    )


def test_abandon_by_token_replaces_the_machine(place):
    first = place.held(Hook("up"))
    place.raw.complete_lifecycle_action(
        AutoScalingGroupName="web",
        LifecycleHookName="up",
        LifecycleActionToken=place.token(first),
        LifecycleActionResult="ABANDON",
    )
    until(lambda: list(place.states().values()) == ["Pending:Wait"] and first not in place.states())
    assert not place.machines.running(first)
    causes = [one.cause for one in place.groups.activities("web")]
    assert any("in response to a launch failure." in one for one in causes)


def test_a_departing_machine_is_held_and_a_deleted_hook_lets_it_go(place):
    name = place.held(Hook("down", launching=False), state="InService")
    place.raw.set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=0)
    until(lambda: place.states() == {name: "Terminating:Wait"})
    assert place.machines.running(name)
    place.raw.delete_lifecycle_hook(AutoScalingGroupName="web", LifecycleHookName="down")
    until(lambda: place.states() == {})


def test_force_deletes_what_is_held_on_both_sides_and_holds_nothing_more(place):
    place.create(Hook("down", launching=False), size=(0, 2, 2))
    until(lambda: list(place.states().values()) == ["InService", "InService"])
    place.groups.put_hook("web", Hook("up"))
    place.ec2.terminate([next(iter(place.states()))])
    held = ["InService", "Pending:Wait", "Terminating:Wait"]
    until(lambda: sorted(place.states().values()) == held)
    place.groups.delete_group("web", force=True)
    until(lambda: place.cloud.autoscaling.groups == {})
    assert not any(place.machines.on.values())


def test_actions_that_are_none(place):
    name = place.held(Hook("up"), Hook("down", launching=False))
    absent, none = "i-00000000000000000", "00000000-0000-0000-0000-000000000000"
    complete, beat = (
        place.raw.complete_lifecycle_action,
        place.raw.record_lifecycle_action_heartbeat,
    )

    def refused(call, **changes):
        named = {"AutoScalingGroupName": "web", "LifecycleHookName": "up", **changes}
        code, status, message = code_of(lambda: call(**named))
        assert (code, status) == ("ValidationError", 400)
        return message

    for call, more in ((complete, {"LifecycleActionResult": "CONTINUE"}), (beat, {})):
        text = "No active Lifecycle Action found with instance ID "
        assert refused(call, InstanceId=absent, **more) == text + absent
        assert refused(call, InstanceId=name, LifecycleHookName="down", **more) == text + name
        text = "No active Lifecycle Action found with token "
        assert refused(call, LifecycleActionToken=none, **more) == text + none
        token = place.token(name)
        both = {"InstanceId": absent, "LifecycleActionToken": token}
        assert refused(call, **both, **more) == text + token
        assert "Either LifecycleActionToken or InstanceId" in refused(call, **more)
        text = "No Lifecycle Hook found with name: other"
        assert refused(call, InstanceId=name, LifecycleHookName="other", **more) == text
        text = "AutoScalingGroup name not found"
        assert text in refused(call, InstanceId=name, AutoScalingGroupName="other", **more)
    assert "CONTINUE, ABANDON" in refused(complete, InstanceId=name, LifecycleActionResult="YES")
    complete(
        AutoScalingGroupName="web",
        LifecycleHookName="up",
        InstanceId=name,
        LifecycleActionResult="CONTINUE",
    )
    text = "No active Lifecycle Action found with instance ID "
    assert refused(beat, InstanceId=name) == text + name  # once is enough


# Who may


def test_a_machine_may_end_actions_of_its_own_group_and_nothing_else(place):
    name = place.held(Hook("up"))
    place.create(Hook("up"), name="other")
    key = place.machine(name)
    machine = place.client(key)
    said = {"LifecycleHookName": "up", "InstanceId": name, "LifecycleActionResult": "CONTINUE"}
    code, status, message = code_of(
        lambda: machine.complete_lifecycle_action(AutoScalingGroupName="other", **said)
    )
    assert (code, status) == ("AccessDenied", 403)
    shown = place.raw.describe_auto_scaling_groups(AutoScalingGroupNames=["other"])
    arn = shown["AutoScalingGroups"][0]["AutoScalingGroupARN"]
    assert message == (
        f"User: arn:aws:sts::123456789012:assumed-role/calve-machine/{name} is not authorized to perform: "
        f"autoscaling:CompleteLifecycleAction on resource: {arn} because no identity-based policy allows "
        "the autoscaling:CompleteLifecycleAction action"
    )
    code, _, message = code_of(
        lambda: machine.complete_lifecycle_action(AutoScalingGroupName="none", **said)
    )
    assert (code, "autoScalingGroup:*:autoScalingGroupName/none" in message) == (
        "AccessDenied",
        True,
    )
    assert re.search(r":autoScalingGroup:[0-9a-f-]{36}:autoScalingGroupName/other$", arn)
    code, _, message = code_of(lambda: machine.describe_lifecycle_hooks(AutoScalingGroupName="web"))
    assert code == "AccessDenied"
    assert message.endswith(
        "is not authorized to perform: autoscaling:DescribeLifecycleHooks because no identity-based "
        "policy allows the autoscaling:DescribeLifecycleHooks action"
    )
    for call in (
        machine.describe_auto_scaling_groups,
        lambda: machine.delete_lifecycle_hook(AutoScalingGroupName="web", LifecycleHookName="up"),
        lambda: machine.delete_auto_scaling_group(AutoScalingGroupName="web", ForceDelete=True),
    ):
        assert code_of(call)[:2] == ("AccessDenied", 403)
    code, status, message = code_of(place.client(key, "ec2").describe_instances)
    assert (code, status) == ("UnauthorizedOperation", 403)
    assert message.startswith(
        "You are not authorized to perform this operation. User: arn:aws:sts::"
    )
    assert code_of(place.client(key, "elbv2").describe_target_groups)[0] == "AccessDenied"
    gateway = AutoScaling(place.session(key))
    with pytest.raises(
        AccessError, match="not authorized to perform: autoscaling:Describe"
    ) as caught:
        gateway.group("web")
    assert caught.value.hint == "the caller needs autoscaling:DescribeAutoScalingGroups"
    gateway._client.close()
    assert place.states() == {name: "Pending:Wait"}


def test_keys_that_do_not_hold(place):
    key = place.machine("i-1")
    for service, changes, expected in [
        ("autoscaling", {"aws_access_key_id": "AKIDNOBODY"}, ("InvalidClientTokenId", 403)),
        ("autoscaling", {"aws_session_token": "other"}, ("InvalidClientTokenId", 403)),
        ("autoscaling", {"aws_secret_access_key": "other"}, ("SignatureDoesNotMatch", 403)),
        ("ec2", {"aws_access_key_id": "AKIDNOBODY"}, ("AuthFailure", 401)),
        ("ec2", {"aws_secret_access_key": "other"}, ("AuthFailure", 401)),
    ]:
        client = place.client(key, service, **changes)
        call = (
            client.describe_auto_scaling_groups
            if service == "autoscaling"
            else client.describe_instances
        )
        assert code_of(call)[:2] == expected
    short = place.machine("i-1", hours=-1)
    calls = place.client(short).describe_auto_scaling_groups
    assert code_of(calls)[:2] == ("ExpiredToken", 403)
    assert code_of(place.client(short, "ec2").describe_instances)[:2] == ("RequestExpired", 400)


def test_a_signature_that_is_none(place):
    host, port = place.url.removeprefix("http://").split(":")
    client = http.client.HTTPConnection(host, int(port), timeout=5)
    scope = f"{place.clock.now():%Y%m%d}/{REGION}/autoscaling/aws4_request"
    sent = {
        "Authorization": f"AWS4-HMAC-SHA256 Credential=AKID/{scope}, SignedHeaders=host, Signature=no"
    }
    client.request("POST", "/", "Action=DescribeAutoScalingGroups&Version=2011-01-01", sent)
    answer = client.getresponse()
    assert (answer.status, b"<Code>IncompleteSignature</Code>" in answer.read()) == (400, True)
    client.close()


@pytest.mark.parametrize(
    ("hours", "text"), [(1, "Signature expired: "), (-1, "Signature not yet current: ")]
)
def test_a_clock_that_is_off(place, hours, text):
    gateway = place.client(place.operator)
    place.clock.shift += dt.timedelta(hours=hours)
    code, status, message = code_of(gateway.describe_auto_scaling_groups)
    assert (code, status, message.startswith(text)) == ("SignatureDoesNotMatch", 403, True)


# Metadata


def test_metadata_says_where_the_group_wants_the_machine(place):
    name = place.held(Hook("up"), Hook("down", launching=False))
    instance = Instance(
        name,
        REGION,
        f"{REGION}a",
        "10.0.2.15",
        lifecycle_state=lambda: place.cloud.target_lifecycle(name),
    )
    imds = Imds(instance, clock=place.clock)

    def told():
        answer = imds._meta_data("autoscaling/target-lifecycle-state")
        return answer.body if answer.status == 200 else answer.status

    assert told() == b"InService"
    place.raw.complete_lifecycle_action(
        AutoScalingGroupName="web",
        LifecycleHookName="up",
        InstanceId=name,
        LifecycleActionResult="CONTINUE",
    )
    until(lambda: place.states() == {name: "InService"})
    assert told() == b"InService"
    place.raw.set_desired_capacity(AutoScalingGroupName="web", DesiredCapacity=0)
    until(lambda: place.states() == {name: "Terminating:Wait"})
    assert told() == b"Terminated"
    place.raw.delete_lifecycle_hook(AutoScalingGroupName="web", LifecycleHookName="down")
    until(lambda: place.states() == {})
    assert told() == 404
