"""The show's region, not entered: what its machines are told and what their role may."""

import http.client
import json

import pytest

from calve.aws.autoscaling import AutoScaling
from calve.aws.session import Session
from calve.demo.world import World
from calve.errors import AccessError
from calve.region.group import Group, GroupInstance, Lifecycle
from calve.region.machine import Launch
from calve.region.templates import TemplateSpec
from calve.transport.credentials import Credentials

GROUP = "arn:aws:autoscaling:eu-central-1:123456789012:autoScalingGroup:0000:autoScalingGroupName/"
NAME = "i-00000000000000001"


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path, group="site")
    with made.s3, made.balancer, made.api:  # which listen since they were made; no driver runs
        yield made


@pytest.fixture
def ask(world):
    """Return a function: a path of one machine's metadata in, status and body out."""
    with world._metadata(Launch(NAME, "ami-1", "t3.nano", b"")) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)

        def get(path, method="GET", **headers):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        ttl = {"x-aws-ec2-metadata-token-ttl-seconds": "60"}
        _, token = get("/latest/api/token", "PUT", **ttl)
        yield lambda path: get(f"/latest/meta-data/{path}", **{"x-aws-ec2-metadata-token": token})
        connection.close()


def test_metadata_follows_the_group(world, ask):
    path = "autoscaling/target-lifecycle-state"
    assert ask(path)[0] == 404
    spec = TemplateSpec("lt-1", "site", "1")
    for lifecycle in Lifecycle:
        one = GroupInstance(NAME, spec, 0.0, "", lifecycle)
        group = Group("site", spec, 0, 1, 1, 0.0, instances={NAME: one})
        world.cloud.autoscaling.groups["site"] = group
        wanted = "Standby" if lifecycle.aside else "InService"
        if lifecycle.leaving:
            wanted = "Terminated"
        assert ask(path) == (200, wanted)


def test_the_machines_role_may_end_actions_of_its_group_only(world, ask):
    _, document = ask("iam/security-credentials/calve-machine")
    key = world.principals.find(json.loads(document)["AccessKeyId"])
    for action, group, allowed in [
        ("CompleteLifecycleAction", "site", True),
        ("RecordLifecycleActionHeartbeat", "site", True),
        ("CompleteLifecycleAction", "web", False),
        ("DeleteLifecycleHook", "site", False),
        ("SetDesiredCapacity", "site", False),
    ]:
        found = world.principals.allows(key.identity, f"autoscaling:{action}", GROUP + group)
        assert found is allowed, action
    assert world.machine_api == "http://169.254.169.249"


def test_the_operator_is_let_in_and_a_stranger_is_not(world):
    operator = world.session
    stranger = Session(
        operator.region, operator.endpoint, credentials=Credentials("AKID", "secret")
    )
    for session, refused in ((operator, False), (stranger, True)):
        gateway = AutoScaling(session)
        if refused:
            with pytest.raises(AccessError, match="InvalidClientTokenId"):
                gateway.activities("site")
        else:
            world.cloud.autoscaling.groups["site"] = Group(
                "site", TemplateSpec("lt-1", "site", "1"), 0, 1, 1, 0.0
            )
            assert gateway.activities("site") == ()
        gateway._client.close()
