"""The policies of the roles: complete, as narrow as they can be, and in IAM's grammar."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import replace

import botocore.session
import pytest

import calve.aws
from calve.aws.buckets import Bucket
from calve.aws.session import actions_of, needs
from calve.errors import CalveError, UsageError
from calve.fleet.config import File, Parameter, Secret, parse
from calve.infra import policies as module
from calve.infra.policies import MOST_CHARACTERS, actions_of_role, policy
from calve.infra.resources import OBJECTS, where
from calve.infra.roles import ADMINISTRATOR, CLIENTS, GATEWAYS, SHOW, Role
from calve.infra.scope import PLACEHOLDERS, Scope

MACHINES = "arn:aws:iam::123456789012:role/acme-machine"
FULL = Scope(
    account="123456789012",
    region="eu-central-1",
    bucket="acme-nix",
    fleet="web",
    group="acme-web",
    machine_role=MACHINES,
)
SCOPES = {
    "nothing is known": Scope(),
    "all is known": FULL,
    "no group": replace(FULL, group=None),
    "a prefix": replace(FULL, prefix="team/nix/"),
    "China": replace(FULL, region="cn-north-1"),
    "a parameter": replace(FULL, key=Parameter("/acme/key", "eu-west-1")),
    "a secret": replace(FULL, key=Secret("acme/key")),
}
# IAM's names of services, and botocore's.
MODELS = {
    "autoscaling": "autoscaling",
    "cloudformation": "cloudformation",
    "cloudwatch": "cloudwatch",
    "ebs": "ebs",
    "ec2": "ec2",
    "elasticloadbalancing": "elbv2",
    "iam": "iam",
    "kms": "kms",
    "s3": "s3",
    "secretsmanager": "secretsmanager",
    "ssm": "ssm",
    "sts": "sts",
}
# Actions without an operation of their name.
PERMISSIONS = {"iam:PassRole", "s3:ListBucket"}


def statements(role, scope=FULL):
    return {one["Sid"]: one for one in policy(role, scope).document["Statement"]}


def granted(role, scope=FULL):
    return {action for one in statements(role, scope).values() for action in one["Action"]}


def gateways():
    """Return every class below calve.aws with a method that needs an action."""
    for found in pkgutil.iter_modules(calve.aws.__path__, "calve.aws."):
        here = importlib.import_module(found.name)
        for one in vars(here).values():
            if isinstance(one, type) and one.__module__ == found.name and actions_of(one):
                yield one


def needing(gateway):
    return {name for name, member in vars(gateway).items() if getattr(member, "actions", ())}


# Complete


def test_every_method_of_every_gateway_has_its_row_and_every_row_its_method():
    missing = {one.__name__: needing(one) ^ set(GATEWAYS.get(one, ())) for one in gateways()}
    assert {name: methods for name, methods in missing.items() if methods} == {}
    assert set(GATEWAYS) == set(gateways())


def test_what_is_in_no_role_is_for_the_demo_or_for_an_administrator():
    nobody = {
        f"{gateway.__name__}.{name}"
        for gateway, methods in GATEWAYS.items()
        for name, callers in methods.items()
        if not callers
    }
    assert SHOW == ADMINISTRATOR == ()
    assert nobody - {f"Bucket.{name}" for name in GATEWAYS[Bucket]} == {
        "Alarms.watch_errors",
        "AutoScaling.create_group",
        "AutoScaling.delete_group",
        "AutoScaling.put_hook",
        "AutoScaling.set_checks",
        "AutoScaling.set_grace",
        "AutoScaling.tag",
        "Ec2.create_template",
        "Ec2.require_tokens",
        "Ec2.tag_template",
        "Ec2.template",
        "Ec2.template_of",
        "Ec2.terminate",
        "Elb.create_target_group",
        "Elb.target_group",
    }


def test_a_method_that_is_in_a_role_brings_its_actions(monkeypatch):
    class Pools:
        @needs("autoscaling:PutWarmPool")
        def put(self):
            pass

    assert "autoscaling:PutWarmPool" not in actions_of_role(Role.MACHINE)
    monkeypatch.setattr(module, "GATEWAYS", {Pools: {"put": (Role.MACHINE,)}})
    assert "autoscaling:PutWarmPool" in granted(Role.MACHINE)
    monkeypatch.setattr(module, "GATEWAYS", {Pools: {"gone": (Role.MACHINE,)}})
    with pytest.raises(CalveError, match=r"Pools\.gone"):
        actions_of_role(Role.MACHINE)


def test_every_action_has_its_resources():
    for role in Role:
        for action in actions_of_role(role):
            where(action, role, Scope())
    with pytest.raises(CalveError, match="no resource is known"):
        where("ec2:AllocateAddress", Role.RELEASER, Scope())


@pytest.mark.parametrize("role", Role)
def test_botocore_knows_every_action(role):
    session = botocore.session.get_session()
    for action in sorted(actions_of_role(role) | granted(role, Scope())):
        service, _, name = action.partition(":")
        if action not in PERMISSIONS:
            assert name in session.get_service_model(MODELS[service]).operation_names, action


def test_what_the_agent_asks_of_auto_scaling_is_the_machine_s():
    from calve.boot import uplink

    source = pkgutil.get_data("calve.boot", uplink.__file__.rpartition("/")[2]).decode()
    asked = set(re.findall(r'_call\(\s*"([A-Za-z]+)"', source))
    assert {f"autoscaling:{name}" for name in asked} == set(CLIENTS[Role.MACHINE])


# In IAM's grammar

ARN = re.compile(
    r"arn:(aws|aws-cn|aws-us-gov):[a-z0-9-]+:([a-z0-9-]*|\*|REGION):([0-9]{12}|ACCOUNT|):\S.*"
)
TESTS = {"ArnLike", "Null", "StringEquals"}


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
@pytest.mark.parametrize("role", Role)
def test_a_document_is_a_policy(role, scope):
    found = policy(role, scope)
    assert list(found.document) == ["Version", "Statement"]
    assert found.document["Version"] == "2012-10-17"
    sids = [one["Sid"] for one in found.document["Statement"]]
    assert len(set(sids)) == len(sids)
    for one in found.document["Statement"]:
        assert set(one) - {"Condition"} == {"Sid", "Effect", "Action", "Resource"}
        assert re.fullmatch(r"[A-Za-z0-9]+", one["Sid"])
        assert one["Effect"] == "Allow"
        assert one["Action"]
        assert one["Action"] == sorted(set(one["Action"]))
        assert all(re.fullmatch(r"[a-z0-9]+:[A-Z][A-Za-z]+", each) for each in one["Action"])
        assert one["Resource"]
        assert all(each == "*" or ARN.fullmatch(each) for each in one["Resource"]), one
        for test, keys in one.get("Condition", {}).items():
            assert test in TESTS
            assert all(re.fullmatch(r"[a-z0-9]+:\S+", key) for key in keys)


@pytest.mark.parametrize("role", Role)
def test_a_policy_is_as_short_as_iam_wants_it(role):
    long = replace(FULL, fleet="f" * 63, group="g" * 255, prefix="p" * 100 + "/")
    assert policy(role, long).characters <= MOST_CHARACTERS


def test_one_that_is_too_long_is_refused():
    with pytest.raises(CalveError, match="6144") as caught:
        policy(Role.BUILDER, replace(FULL, prefix="p" * 1000 + "/"))
    assert caught.value.hint


# As narrow as it can be


@pytest.mark.parametrize("role", Role)
def test_only_descriptions_are_of_everything(role):
    for one in statements(role).values():
        describes = all(each.partition(":")[2].startswith("Describe") for each in one["Action"])
        assert ("*" in one["Resource"]) == describes


def test_the_observer_changes_nothing():
    verbs = ("Describe", "Get", "List")
    assert all(each.partition(":")[2].startswith(verbs) for each in granted(Role.OBSERVER))


def test_a_machine_reads_the_cache_writes_its_own_report_and_lets_go_of_its_hook():
    found = statements(Role.MACHINE, replace(FULL, prefix="p/"))
    assert {sid: one["Action"] for sid, one in found.items()} == {
        "Group": list(CLIENTS[Role.MACHINE]),
        "Bucket": ["s3:ListBucket"],
        "ReadObjects": ["s3:GetObject"],
        "WriteObjects": ["s3:PutObject"],
    }
    assert found["WriteObjects"]["Resource"] == [
        "arn:aws:s3:::acme-nix/p/boot-reports/${aws:userid}/*"
    ]
    assert found["Bucket"]["Resource"] == ["arn:aws:s3:::acme-nix"]
    assert "arn:aws:s3:::acme-nix/p/*" not in found["ReadObjects"]["Resource"]


def test_the_releaser_passes_one_role_to_ec2_and_runs_what_the_fleet_s_template_says():
    found = statements(Role.RELEASER)
    assert found["PassRole"]["Resource"] == [MACHINES]
    assert found["PassRole"]["Condition"] == {
        "StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}
    }
    template = found["Template"]
    assert template["Action"] == ["ec2:CreateLaunchTemplateVersion", "ec2:RunInstances"]
    assert template["Condition"] == {"StringEquals": {"ec2:ResourceTag/calve:fleet": "web"}}
    assert found["Run"]["Action"] == ["ec2:RunInstances"]
    assert list(found["Run"]["Condition"]) == ["ArnLike"]
    assert found["TagStarted"]["Condition"] == {
        "StringEquals": {"ec2:CreateAction": "RunInstances"}
    }


def test_the_group_is_meant_by_its_name_or_by_its_tag():
    named = statements(Role.GUARD)["Group"]
    place = "arn:aws:autoscaling:eu-central-1:123456789012"
    assert named["Resource"] == [f"{place}:autoScalingGroup:*:autoScalingGroupName/acme-web"]
    assert "Condition" not in named
    tagged = statements(Role.GUARD, replace(FULL, group=None))["Group"]
    assert tagged["Resource"][0].endswith("autoScalingGroupName/*")
    assert tagged["Condition"] == {"StringEquals": {"autoscaling:ResourceTag/calve:fleet": "web"}}


def test_consoles_are_those_of_the_group_s_machines():
    key = "ec2:ResourceTag/aws:autoscaling:groupName"
    found = statements(Role.OBSERVER)["Machines"]
    assert found["Condition"] == {"StringEquals": {key: "acme-web"}}
    anybody = statements(Role.OBSERVER, replace(FULL, group=None))["Machines"]
    assert anybody["Condition"] == {"Null": {key: "false"}}


def test_the_guard_rolls_back_and_pins_back_and_begins_no_release():
    actions = granted(Role.GUARD)
    assert {
        "autoscaling:RollbackInstanceRefresh",
        "autoscaling:UpdateAutoScalingGroup",
    } <= actions
    begun = {"autoscaling:StartInstanceRefresh", "ec2:CreateLaunchTemplateVersion"}
    assert actions & begun == set()


def test_only_who_writes_in_parts_gives_parts_up():
    may = {role for role in Role if "s3:AbortMultipartUpload" in granted(role)}
    assert may == {Role.BUILDER}


def test_the_builder_removes_only_images_of_calve():
    own = statements(Role.BUILDER)["OwnImages"]
    assert {"ec2:DeleteSnapshot", "ec2:DeregisterImage"} <= set(own["Action"])
    assert own["Condition"] == {"Null": {"ec2:ResourceTag/calve:line": "false"}}


@pytest.mark.parametrize(
    ("key", "action", "resource", "via"),
    [
        (
            Parameter("/acme/key:3", "eu-west-1"),
            "ssm:GetParameter",
            "arn:aws:ssm:eu-west-1:123456789012:parameter/acme/key",
            "ssm.eu-west-1.amazonaws.com",
        ),
        (
            Secret("acme/key"),
            "secretsmanager:GetSecretValue",
            "arn:aws:secretsmanager:eu-central-1:123456789012:secret:acme/key-??????",
            "secretsmanager.eu-central-1.amazonaws.com",
        ),
        (
            Secret("arn:aws:secretsmanager:eu-west-3:123456789012:secret:x-abcdef", "eu-west-3"),
            "secretsmanager:GetSecretValue",
            "arn:aws:secretsmanager:eu-west-3:123456789012:secret:x-abcdef",
            "secretsmanager.eu-west-3.amazonaws.com",
        ),
    ],
)
def test_a_signing_key_in_aws_is_the_builder_s_to_read(key, action, resource, via):
    found = statements(Role.BUILDER, replace(FULL, key=key))
    assert (found["Key"]["Action"], found["Key"]["Resource"]) == ([action], [resource])
    assert found["Decrypt"]["Condition"] == {"StringEquals": {"kms:ViaService": via}}
    assert action not in granted(Role.RELEASER, replace(FULL, key=key))


def test_without_such_a_key_nobody_reads_secrets(tmp_path):
    for key in (None, File(tmp_path)):
        actions = granted(Role.BUILDER, replace(FULL, key=key))
        assert {one for one in actions if one.startswith(("ssm:", "secrets", "kms:"))} == set()


def test_every_role_says_what_it_does_with_objects():
    assert set(OBJECTS) == set(Role)


# The scope


def test_what_is_not_known_is_a_word_in_capitals_and_told():
    found = policy(Role.RELEASER, Scope())
    assert set(found.unknown) == set(PLACEHOLDERS)
    for word, _ in PLACEHOLDERS.values():
        assert word in found.dump()
    for role in Role:
        assert policy(role, FULL).unknown == ()
    assert policy(Role.BUILDER, Scope()).unknown == ("account", "bucket")


def config(text, path="calve.toml"):
    from pathlib import Path

    return parse(text, Path(path))


def test_a_scope_comes_from_the_fleet_file():
    file = config(
        '[cache]\nurl = "s3://acme-nix/p?region=eu-west-1"\nkey = { ssm = "/k" }\n'
        '[fleet.web]\nsystem = "."\ngroup = "acme-web"\n'
    )
    found = Scope.of(file.cache, file.fleets["web"], machine_role=MACHINES)
    assert found == Scope(
        account="123456789012",
        region="eu-west-1",
        bucket="acme-nix",
        prefix="p/",
        fleet="web",
        group="acme-web",
        machine_role=MACHINES,
        key=Parameter("/k", "eu-west-1", None),
    )
    assert Scope.of(file.cache, file.fleets["web"], group="other").group == "other"


def test_a_cache_that_is_no_bucket_says_nothing(tmp_path):
    file = config(f'[cache]\nurl = "file://{tmp_path}"\n')
    assert Scope.of(file.cache, None, name="web") == Scope(fleet="web")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"account": "1234"}, "12 digits"),
        ({"machine_role": "acme-machine"}, "role's ARN"),
        ({"machine_role": "arn:aws:iam::123456789012:role/*"}, "match others"),
        ({"group": "web*"}, "match others"),
        ({"group": "a:b"}, "Auto Scaling group"),
        ({"fleet": "*"}, "fleet's name"),
        ({"prefix": "a/${aws:userid}/"}, "match others"),
    ],
)
def test_what_would_widen_or_break_a_policy_is_refused(fields, words):
    with pytest.raises(UsageError, match=words):
        replace(FULL, **fields)


def test_partitions():
    assert {
        region: replace(FULL, region=region).partition
        for region in ("eu-west-1", "cn-north-1", "us-gov-west-1")
    } == {"eu-west-1": "aws", "cn-north-1": "aws-cn", "us-gov-west-1": "aws-us-gov"}
    china = statements(Role.RELEASER, replace(FULL, region="cn-north-1"))
    assert china["PassRole"]["Condition"]["StringEquals"] == {
        "iam:PassedToService": "ec2.amazonaws.com.cn"
    }
