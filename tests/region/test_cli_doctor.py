"""`calve doctor` upon a fleet in the region and a cache in a directory or in the region's S3."""

import contextlib
import dataclasses
import datetime as dt
import functools
import io
import json
import urllib.parse

import pytest

import calve.aws.session
from calve.aws.autoscaling import AutoScaling, Hook
from calve.aws.ec2 import Ec2
from calve.aws.elb import Elb
from calve.aws.session import Session
from calve.cache.directory import DirectoryObjects
from calve.cli import main
from calve.cli.session import Session as CommandLine
from calve.contract.userdata import Hook as DataHook
from calve.contract.userdata import UserData
from calve.errors import NotFoundError, UsageError
from calve.fleet.tags import HOOK
from calve.nix.signing import SecretKey
from calve.region.access import Access
from calve.region.cloud import Cloud
from calve.region.message import Body
from calve.region.query import Dialect
from calve.region.scripted import ScriptedMachines
from calve.region.scripted_balancer import ScriptedBalancer
from calve.region.scripts import good
from calve.region.server import Server
from calve.region.signature import Allow, Principals
from calve.region.virtual import VirtualClock
from calve.transport.credentials import Credentials

REGION = "eu-central-1"
IMAGE = "ami-0123456789abcdef0"
KEY, OTHER = (SecretKey.generate(name) for name in ("acme-1", "acme-2"))
STS = Dialect("sts", "2011-06-15", "urn:sts", "member", "ValidationError")
ARN = "arn:aws:iam::123456789012:user/operator"
INFO = b"StoreDir: /nix/store\n"


class Operator:
    """A directory with a fleet file, and how to call doctor in it."""

    def __init__(self, directory, monkeypatch):
        self.directory, self.monkeypatch = directory, monkeypatch
        monkeypatch.chdir(directory)
        (directory / "cache.sec").write_text(KEY.dump())
        (directory / "cache.sec").chmod(0o600)
        self.objects = DirectoryObjects(directory / "cache")
        self.objects.put("nix-cache-info", INFO)

    def write(self, *, url=None, trusted=KEY, fleets=("web",), cache=True, key=True):
        lines = ["[cache]", f'url = "{url or self.objects.url}"'] if cache else []
        lines += [f'trusted = ["{trusted.public.dump()}"]'] if cache and trusted else []
        lines += ['key = { file = "cache.sec" }'] if cache and key else []
        for name in fleets:
            lines += [f"[fleet.{name}]", 'system = "./result"', 'group = "web"']
            lines += ['rollout = { warm-up = "30s" }']
        (self.directory / "calve.toml").write_text("\n".join(lines) + "\n")

    def doctor(self, *argv, code=0):
        argv = ("doctor", *argv)
        out, err = io.StringIO(), io.StringIO()
        options = main._parser(argv).parse_args(argv)
        ended = main._module("doctor").run(options, CommandLine(out, err))
        assert code in {None, ended}, out.getvalue()
        return out.getvalue()

    def checks(self, *argv, code=0):
        found = json.loads(self.doctor(*argv, "--json", code=code))
        states = [one["state"] for one in found["checks"]]
        assert found["problems"] == states.count("problem")
        assert found["warnings"] == states.count("warning")
        return found["checks"]

    def bad(self, *argv, code=0):
        return [
            (one["code"], one["state"])
            for one in self.checks(*argv, code=code)
            if one["state"] != "ok"
        ]


@pytest.fixture
def operator(tmp_path, monkeypatch):
    monkeypatch.setattr(
        calve.aws.session,
        "_boto3_session",
        functools.cache(calve.aws.session._boto3_session),  # boto reads its models once
    )
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    return Operator(tmp_path, monkeypatch)


class Place:
    """A group of two, which the operator's credentials may do `policy` to."""

    def __init__(self, owner, operator):
        self.principals = Principals()
        clock = VirtualClock(dt.datetime(2026, 1, 1, tzinfo=dt.UTC))
        machines = ScriptedMachines(clock, lambda _launch: good(40))
        owner.callback(machines.close)
        balancer = ScriptedBalancer(clock, machines)
        check = Access(self.principals, region=REGION).check
        self.cloud = owner.enter_context(
            Cloud(machines, balancer, clock=clock, authenticate=check).still(clock.drive)
        )
        self.cloud.add_image(IMAGE, "base")
        url = owner.enter_context(Server(self._handle)).url
        key = self.principals.add_user("root")
        session = Session(REGION, url, credentials=Credentials(key.access_key, key.secret_key))
        self.scaling, self.ec2 = AutoScaling(session), Ec2(session)
        arn = Elb(session).create_target_group("web", path="/healthz").arn
        hook = DataHook("web", HOOK, "http://127.0.0.1:1")
        data = UserData(
            f"/nix/store/{'c' * 32}-w", ("x",), "0" * 64, ("acme-1",), "web", 1, hook=hook
        )
        template = self.ec2.create_template(
            "web", image_id=IMAGE, instance_type="t3.nano", user_data=data.dump()
        )
        self.scaling.create_group(
            "web",
            template_id=template.id,
            version=1,
            size=(0, 2, 4),
            target_groups=[arn],
            hooks=[Hook(HOOK)],
        )
        self.template = template.id
        operator.monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        operator.monkeypatch.setenv("AWS_REGION", REGION)
        self.monkeypatch = operator.monkeypatch

    def allow(self, *actions):
        key = self.principals.add_user("operator", tuple(map(Allow, actions)))
        self.monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.access_key)
        self.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret_key)

    def _handle(self, request):
        data = request.body.read_all(1 << 20)
        action = urllib.parse.parse_qs(data.decode()).get("Action", [""])[0]
        if action == "GetCallerIdentity":
            return STS.answer(action, {"Arn": ARN}, "request")
        body = Body(io.BytesIO(data), len(data))
        return self.cloud.handle(dataclasses.replace(request, body=body))


@pytest.fixture
def place(operator):
    operator.write()
    with contextlib.ExitStack() as owner:
        made = Place(owner, operator)
        made.allow("*")
        yield made


# A fleet


@pytest.mark.usefixtures("place")
def test_a_fleet_that_is_well_has_no_problem(operator):
    found = operator.checks("web")
    said = {one["code"]: one["message"] for one in found if one["state"] == "ok"}
    assert ARN in said["credentials"]
    assert said["region"] == REGION
    assert "2 machines" in said["group"]
    assert {"cache", "push", "release", "keyring", "key", "preflight"} <= said.keys()
    # The region gives machines their role by other means.
    assert [one["code"] for one in found if one["state"] != "ok"] == ["role"]


@pytest.mark.usefixtures("place")
def test_people_get_a_line_for_each_check_and_what_to_do(operator):
    lines = operator.doctor().splitlines()
    assert any(line.startswith("ok       cache: ") for line in lines)
    (at,) = [at for at, line in enumerate(lines) if line.startswith("warning  web: ")]
    assert "calve iam show machine" in lines[at + 1]


def test_preflights_problems_are_told(place, operator):
    place.scaling._client.update_auto_scaling_group(
        AutoScalingGroupName="web",
        LaunchTemplate={"LaunchTemplateId": place.template, "Version": "$Latest"},
    )
    assert ("unpinned-version", "problem") in operator.bad(code=1)


def test_every_fleet_is_looked_at_unless_one_is_named(place, operator):
    operator.write(fleets=("web", "api"))
    abouts = {one["about"] for one in operator.checks()}
    assert abouts == {"aws", "cache", "web", "api"}
    assert "api" not in {one["about"] for one in operator.checks("web")}


def test_a_group_that_does_not_exist_is_a_problem(place, operator):
    place.cloud.autoscaling.groups.clear()
    assert ("group", "problem") in operator.bad(code=1)


def test_only_permissions_missing_is_another_exit_code(place, operator):
    place.allow("autoscaling:*", "elasticloadbalancing:*", "ec2:Describe*")
    found = [one for one in operator.checks(code=4) if one["state"] == "problem"]
    assert {one["code"] for one in found} == {"permission"}
    assert all(one["permission"] for one in found)
    hints = " ".join(one["hint"] for one in found)
    assert "ec2:RunInstances" in hints
    assert "ec2:CreateLaunchTemplateVersion" in hints
    place.allow("ec2:*")
    (found,) = [one for one in operator.checks(code=4) if one["state"] == "problem"]
    assert "autoscaling:DescribeAutoScalingGroups" in found["hint"]


def test_a_permission_and_another_problem_is_a_problem(place, operator):
    place.allow("autoscaling:*", "elasticloadbalancing:*", "ec2:Describe*")
    operator.write(trusted=OTHER)
    assert {code for code, state in operator.bad(code=1) if state == "problem"} == {
        "key",
        "permission",
    }


def test_nothing_is_changed(place, operator):
    there = sorted(operator.directory.rglob("*"))
    operator.doctor()
    assert sorted(operator.directory.rglob("*")) == there
    assert place.ec2.template("web").latest_version == 1


# Where there is no fleet


def test_without_a_region_it_says_so(operator):
    operator.write()
    assert ("aws", "problem") in operator.bad(code=1)


def test_without_credentials_nothing_more_is_asked(place, operator):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        place.monkeypatch.delenv(name)
    operator.write(fleets=("web", "api"))
    assert operator.bad(code=4) == [("credentials", "problem")]


@pytest.mark.parametrize(
    ("settings", "bad"),
    [
        ({}, []),
        ({"trusted": OTHER}, [("key", "problem")]),
        ({"trusted": None}, [("trusted", "problem")]),
        ({"key": False}, [("key", "warning")]),
        ({"cache": False}, [("cache", "problem")]),
    ],
)
def test_the_signing_key_must_count(operator, settings, bad):
    operator.write(fleets=(), **settings)
    assert operator.bad(code=1 if ("problem" in dict(bad).values()) else 0) == bad


def test_a_signing_key_that_others_may_read_is_a_problem(operator):
    operator.write(fleets=())
    (operator.directory / "cache.sec").chmod(0o644)
    assert operator.bad(code=1) == [("key", "problem")]


def test_a_cache_that_is_not_set_up_is_a_problem(operator):
    operator.objects.delete("nix-cache-info")
    operator.write(fleets=())
    (found,) = [one for one in operator.checks(code=1) if one["state"] == "problem"]
    assert (found["code"], found["hint"]) == ("cache", "calve cache init sets it up")


def test_a_damaged_keyring_is_a_problem(operator):
    operator.objects.put("keyring.json", b"{}")
    operator.write(fleets=())
    assert operator.bad(code=1) == [("keyring", "problem")]


@pytest.mark.parametrize(
    ("policy", "bad"),
    [
        (("s3:*",), []),
        (("s3:GetObject", "s3:ListBucket"), [("push", True), ("release", True)]),
        (("s3:PutObject",), [("cache", True)]),
    ],
)
def test_what_the_caller_may_do_in_the_bucket_is_tried(
    operator, server, s3, principals, policy, bad
):
    s3.put_object(Bucket="nix", Key="nix-cache-info", Body=INFO)
    user = principals.add_user("user", tuple(map(Allow, policy)))
    operator.write(url=f"s3://nix?region=test-region&endpoint={server.url}")
    operator.monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    operator.monkeypatch.setenv("AWS_ACCESS_KEY_ID", user.access_key)
    operator.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", user.secret_key)
    found = [one for one in operator.checks(code=None) if one["about"] == "cache"]
    assert [(one["code"], one["permission"]) for one in found if one["state"] != "ok"] == bad
    assert [one["Key"] for one in s3.list_objects_v2(Bucket="nix")["Contents"]] == [
        "nix-cache-info"
    ]


# The fleet file


def test_without_a_fleet_file_there_is_one_clear_message(operator):
    with pytest.raises(NotFoundError, match=r"no calve\.toml here"):
        operator.doctor()


def test_a_wrong_fleet_file_says_where(operator):
    operator.write()
    path = operator.directory / "calve.toml"
    path.write_text(path.read_text().replace("system", "sytsem"))
    with pytest.raises(UsageError, match="sytsem"):
        operator.doctor()


def test_a_fleet_that_is_not_in_the_file_is_named(operator):
    operator.write()
    with pytest.raises(NotFoundError, match="api"):
        operator.doctor("api")
