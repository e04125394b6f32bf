"""The facts that preflight goes by, gathered from the region by boto3, and from a cache in a directory.

What the region does not have (subnets, stacks, IAM) is answered in its own dialect by `Front`.
"""

import contextlib
import dataclasses
import datetime as dt
import functools
import io
import json
import urllib.parse

import pytest

import calve.aws.session
from calve.aws.account import Account
from calve.aws.autoscaling import AutoScaling, Hook
from calve.aws.ec2 import Ec2
from calve.aws.elb import Elb
from calve.aws.network import Network
from calve.aws.profiles import Profiles, Role
from calve.aws.refreshes import Preferences, Refreshes
from calve.aws.session import Session
from calve.aws.types import Types
from calve.cache.directory import DirectoryObjects
from calve.cache.manifest import Manifest
from calve.contract.abi import BOOTSPEC, EXTENSION, Abi
from calve.contract.userdata import Hook as DataHook
from calve.contract.userdata import UserData
from calve.errors import AccessError, NotFoundError
from calve.fleet.config import Delivery, Fleet, Health, Rollout
from calve.fleet.release import Release
from calve.fleet.tags import HOOK
from calve.nix import nar
from calve.nix.hashes import Hash
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.storepath import StorePath
from calve.region.access import Access
from calve.region.cloud import Cloud
from calve.region.message import Body, Response
from calve.region.query import AUTOSCALING, EC2, Dialect
from calve.region.scripted import ScriptedMachines
from calve.region.scripted_balancer import ScriptedBalancer
from calve.region.scripts import good
from calve.region.server import Server
from calve.region.signature import Allow, Principals
from calve.region.virtual import VirtualClock
from calve.rollout.facts import Sources, Target, gather
from calve.rollout.observe import Gateways
from calve.rollout.preflight import check
from calve.transport.credentials import Credentials

REGION = "eu-central-1"
IMAGE = "ami-0123456789abcdef0"
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
CLOUDFORMATION = Dialect("cloudformation", "2010-05-15", "urn:cfn", "member", "ValidationError")
IAM = Dialect("iam", "2010-05-08", "urn:iam", "member", "ValidationError")
STS = Dialect("sts", "2011-06-15", "urn:sts", "member", "ValidationError")
KERNEL = f"/nix/store/{'a' * 32}-linux-6.12"
OTHER = f"/nix/store/{'b' * 32}-linux-6.18"


class Front:
    """Answers some actions by a result, in place of the region behind it; `asked` has all actions in order.

    boto3 asks for alarms in JSON, which the region does not speak: they are read from it here.
    """

    def __init__(self, cloud):
        self.cloud, self.answers, self.asked = cloud, {}, []

    def handle(self, request):
        data = request.body.read_all(1 << 20)
        if request.headers.get("x-amz-target", "").endswith(".DescribeAlarms"):
            return self._alarms(json.loads(data))
        action = urllib.parse.parse_qs(data.decode()).get("Action", [""])[0]
        self.asked.append(action)
        if action in self.answers:
            dialect, result = self.answers[action]
            return dialect.answer(action, result, "request")
        body = Body(io.BytesIO(data), len(data))
        return self.cloud.handle(dataclasses.replace(request, body=body))

    def _alarms(self, asked):
        self.asked.append("DescribeAlarms")
        assert len(asked["AlarmNames"]) <= 100
        states = self.cloud.alarms.states
        found = [
            {"AlarmName": name, "StateValue": states[name]}
            for name in asked["AlarmNames"]
            if name in states
        ]
        body = json.dumps({"MetricAlarms": found, "CompositeAlarms": []}).encode()
        return Response(200, {"Content-Type": "application/x-amz-json-1.0"}, body)


class Cache:
    """A closure in a directory: a toplevel that says how it boots, and what it refers to."""

    def __init__(self, directory):
        self.directory = directory
        (directory / "cache" / "nar").mkdir(parents=True)
        (directory / "cache" / "nix-cache-info").write_text("StoreDir: /nix/store\n")
        self.objects = DirectoryObjects(directory / "cache")

    def system(self, letter, kernel=KERNEL, *, agent=True, system="x86_64-linux", libraries=3):
        top = StorePath(letter * 32, "nixos-system-web-25.11")
        spec = {"kernel": f"{kernel}/bzImage", "initrd": f"{kernel}/initrd", "kernelParams": []}
        spec |= {"init": f"{top}/init", "toplevel": str(top), "label": "web"}
        boot = {BOOTSPEC: spec} | ({EXTENSION: Abi("0.2.0").dump()} if agent else {})
        files = {"boot.json": json.dumps(boot), "system": system, "etc/boot.json": "another"}
        paths = [StorePath(f"{letter * 30}{one:02d}", f"lib-{one}") for one in range(libraries)]
        entries = [self._put(top, files, paths)]
        entries += [self._put(path, {"data": path.name}, ()) for path in paths]
        return Manifest(top, tuple(entries))

    def _put(self, path, files, references):
        tree = self.directory / path.basename
        for name, text in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        parts = []
        nar.dump(tree, lambda data: parts.append(bytes(data)))
        data = b"".join(parts)
        info = PathInfo(path, Hash.sha256(data), len(data), tuple(sorted(references)))
        entry = NarInfo(info, f"nar/{path.digest}.nar", "none", None, len(data))
        self.objects.put(entry.url, data)
        self.objects.put(f"{path.digest}.narinfo", entry.dump())
        return entry


class Place:
    """A fleet of two that nothing is wrong with, and what looks at it."""

    def __init__(self, owner, tmp_path):
        self.principals = Principals()
        self.clock = VirtualClock(NOW)
        machines = ScriptedMachines(self.clock, lambda _launch: good(40))
        owner.callback(machines.close)
        self.cloud = owner.enter_context(
            Cloud(
                machines,
                ScriptedBalancer(self.clock, machines),
                clock=self.clock,
                authenticate=Access(self.principals, region=REGION).check,
            ).still(self.clock.drive)
        )
        self.cloud.add_image(IMAGE, "base")
        self.front = Front(self.cloud)
        self.url = owner.enter_context(Server(self.front.handle)).url
        self.cache = Cache(tmp_path)
        self.fleet = Fleet(
            "web",
            ".#web",
            Delivery.INITRD,
            "web",
            Health("/healthz", None, 180),
            Rollout(100, 200, 120, warmup_s=30),
        )
        self.sources = self.sources_of(Allow("*"))
        self.scaling, self.ec2 = self.sources.gateways.scaling, self.sources.gateways.ec2
        self.refreshes = self.sources.gateways.refreshes
        self.arn = self.sources.gateways.elb.create_target_group("web", path="/healthz").arn

    def sources_of(self, *policy):
        key = self.principals.add_user(f"user{len(policy)}", policy)
        keys = Credentials(key.access_key, key.secret_key)
        session = Session(REGION, self.url, credentials=keys)
        self.session = session
        return Sources.of(Gateways.of(session, self.cache.objects), session)

    def alarms(self, *names):
        rules = dataclasses.replace(self.fleet.rollout, alarms=names)
        self.fleet = dataclasses.replace(self.fleet, rollout=rules)

    def session(self, *policy):
        key = self.principals.add_user(f"user{len(policy)}", policy or (Allow("*"),))
        return Session(REGION, self.url, credentials=Credentials(key.access_key, key.secret_key))

    def put(self, *, kind="t3.nano", hook=True, endpoint="http://127.0.0.1:1"):
        named = DataHook("web", HOOK, endpoint) if hook else None
        data = UserData(
            f"/nix/store/{'c' * 32}-web",
            ("https://cache.example",),
            "0" * 64,
            ("acme-1",),
            "web",
            1,
            hook=named,
        )
        template = self.ec2.create_template(
            "web", image_id=IMAGE, instance_type=kind, user_data=data.dump()
        )
        self.scaling.create_group(
            "web",
            template_id=template.id,
            version=1,
            size=(0, 2, 4),
            target_groups=[self.arn],
            hooks=[Hook(HOOK)] if hook else [],
        )
        return template

    def facts(self, manifest=None, sources=None, **target):
        return gather(sources or self.sources, self.fleet, Target(manifest, **target))

    def codes(self, *args, **more):
        return [(one.code, one.refuses) for one in check(self.facts(*args, **more))]


_SHARED = functools.cache(calve.aws.session._boto3_session)


@pytest.fixture
def place(tmp_path, monkeypatch):
    # Boto reads its models anew for every session, which takes longer than all else here.
    monkeypatch.setattr(calve.aws.session, "_boto3_session", _SHARED)
    with contextlib.ExitStack() as owner:
        yield Place(owner, tmp_path)


# The whole


def test_a_fleet_that_is_well_has_no_problem(place):
    place.put()
    facts = place.facts(place.cache.system("d"))
    assert check(facts) == ()
    assert facts.gaps == ()
    assert (facts.closure.paths, facts.closure.system) == (4, "x86_64-linux")
    assert facts.hook_endpoint


def test_nothing_is_changed(place):
    place.put()
    place.front.asked.clear()
    place.facts(place.cache.system("d"))
    changing = {one for one in place.front.asked if not one.startswith("Describe")} - {""}
    assert changing == {"RunInstances", "CreateLaunchTemplateVersion"}  # dry runs
    template = place.ec2.template("web")
    assert (template.latest_version, place.ec2._client.describe_instances()["Reservations"]) == (
        1,
        [],
    )


def test_without_its_group_nothing_can_be_said(place):
    with pytest.raises(NotFoundError):
        place.facts()


# One thing wrong


@pytest.mark.parametrize(
    ("state", "code"),
    [
        ("OK", []),
        ("ALARM", [("alarm-on", True)]),
        ("INSUFFICIENT_DATA", [("alarm-on", True)]),
    ],
)
def test_an_alarm_that_is_on_is_found(place, state, code):
    place.put()
    place.alarms("errors")
    place.cloud.alarms.set("errors", state)
    assert place.codes() == code


def test_an_alarm_that_does_not_exist_is_found(place):
    place.put()
    place.alarms("errors", "latency")
    place.cloud.alarms.set("errors", "OK")
    (found,) = check(place.facts())
    assert (found.code, "latency" in found.message) == ("alarm-missing", True)


def test_another_architecture_is_found(place):
    place.put(kind="t4g.nano")
    assert place.codes() == [("architecture", True), ("boot-mode", True)]


def test_an_image_that_is_gone_is_found(place):
    place.put()
    assert place.codes(image="ami-0000000000000000f") == [("image-unusable", True)]


def test_a_group_on_latest_is_found(place):
    template = place.put()
    place.scaling._client.update_auto_scaling_group(
        AutoScalingGroupName="web",
        LaunchTemplate={"LaunchTemplateId": template.id, "Version": "$Latest"},
    )
    assert place.codes() == [("unpinned-version", True)]


def test_a_suspended_process_is_found(place):
    place.put()
    client = place.scaling._client
    client.suspend_processes(AutoScalingGroupName="web", ScalingProcesses=["Launch"])
    assert place.codes() == [("suspended", True)]
    client.resume_processes(AutoScalingGroupName="web")
    assert place.codes() == []


def test_a_refresh_to_another_version_is_found_and_the_own_is_not(place):
    template = place.put()
    mine = place.ec2.create_version(template.id, source=1, description="2", user_data=b"{}")
    place.refreshes.start("web", template_id=template.id, version=2, preferences=Preferences())
    assert place.codes() == [("refresh-active", True)]
    assert place.codes(version=mine) == []
    other = dataclasses.replace(mine, template_id="lt-0123456789abcdef0")
    assert place.codes(version=other) == [("refresh-active", True)]


def test_user_data_that_machines_cannot_be_told_is_found(place):
    place.put()
    release = Release("web", 2, f"/nix/store/{'c' * 32}-w", "0" * 64, ("acme-1",), NOW)
    assert place.codes(release=release, cache="s3://acme") == []
    long = dataclasses.replace(release, keys=tuple(f"acme-{one}" for one in range(2000)))
    assert place.codes(release=long, cache="s3://acme") == [("user-data", True)]
    place.fleet = dataclasses.replace(place.fleet, health=Health("/", None, 3601))
    assert place.codes(release=release, cache="s3://acme") == [("user-data", True)]


# The closure


@pytest.mark.parametrize("lost", ["narinfo", "nar"])
def test_a_path_that_the_cache_lost_is_found(place, lost):
    place.put()
    manifest = place.cache.system("d")
    entry = manifest.paths[2]
    place.cache.objects.delete(entry.url if lost == "nar" else f"{entry.info.path.digest}.narinfo")
    facts = place.facts(manifest)
    assert facts.closure.missing == (entry.info.path,)
    assert [one.code for one in check(facts)] == ["closure-incomplete"]


def test_what_another_cache_has_is_not_looked_for(place):
    place.put()
    manifest = place.cache.system("d")
    there = manifest.paths[1]
    elsewhere = dataclasses.replace(there, url="", compression="none")
    place.cache.objects.delete(there.url)
    paths = tuple(elsewhere if one is there else one for one in manifest.paths)
    assert place.codes(Manifest(manifest.toplevel, paths)) == []


def test_an_image_of_its_own_needs_no_closure(place):
    place.put()
    place.fleet = dataclasses.replace(place.fleet, delivery=Delivery.IMAGE)
    manifest = place.cache.system("d")
    place.cache.objects.delete(manifest.paths[1].url)
    assert place.codes(manifest) == []


def test_a_closure_for_another_processor_is_found(place):
    place.put()
    assert place.codes(place.cache.system("d", system="aarch64-linux")) == [("architecture", True)]


def test_a_foreign_kernel_is_found_by_what_runs_now(place):
    place.put()
    live = place.cache.system("c", agent=False).toplevel
    same, other = place.cache.system("d", agent=False), place.cache.system("f", OTHER, agent=False)
    ours = place.cache.system("g", OTHER)
    assert place.codes(same, live=live) == []
    assert place.codes(other, live=live) == [("kernel", True)]
    assert place.codes(ours, live=live) == []
    assert place.codes(other) == [("kernel-unknown", False)]


def test_a_live_system_with_the_agent_says_nothing_of_the_images_kernel(place):
    place.put()
    live = place.cache.system("c").toplevel
    other = place.cache.system("f", OTHER, agent=False)
    assert place.codes(other, live=live) == [("kernel-unknown", False)]


def test_a_damaged_toplevel_says_nothing(place):
    place.put()
    manifest = place.cache.system("d")
    another = place.cache.system("f", OTHER, agent=False, system="aarch64-linux")
    url = manifest.paths[0].url
    for data in (b"not this", place.cache.objects.get(another.paths[0].url, 1 << 20)):
        place.cache.objects.delete(url)
        place.cache.objects.put(url, data)
        facts = place.facts(manifest)
        assert (facts.closure.system, facts.closure.boot) == ("", None)


# Permissions


ALL = ("autoscaling:*", "ec2:*", "elasticloadbalancing:*")


@pytest.mark.parametrize(
    ("lacks", "code", "permission"),
    [
        ("ec2:RunInstances", "permission", "ec2:RunInstances"),
        ("ec2:CreateLaunchTemplateVersion", "permission", "ec2:CreateLaunchTemplateVersion"),
        ("autoscaling:DescribeLifecycleHooks", "permission", "autoscaling:DescribeLifecycleHooks"),
        ("ec2:DescribeInstanceTypes", "unchecked", "ec2:DescribeInstanceTypes"),
    ],
)
def test_a_permission_that_the_caller_lacks_is_named(place, lacks, code, permission):
    place.put()
    service, _, action = lacks.partition(":")
    granted = [one for one in ALL if not one.startswith(f"{service}:")]
    granted += [f"{service}:{one}" for one in _actions(service) if one != action]
    found = check(place.facts(sources=place.sources_of(*map(Allow, granted))))
    assert [(one.code, one.refuses) for one in found] == [(code, code == "permission")]
    assert permission in found[0].hint


def _actions(service):
    gateways = (AutoScaling, Refreshes, Ec2, Elb, Types, Network, Account)
    methods = (member for one in gateways for member in vars(one).values())
    named = {name for member in methods for name in getattr(member, "actions", ())}
    return sorted(one.partition(":")[2] for one in named if one.startswith(f"{service}:"))


def test_who_may_not_see_the_group_is_told_so(place):
    place.put()
    with pytest.raises(AccessError) as caught:
        place.facts(sources=place.sources_of(Allow("ec2:*")))
    assert "autoscaling:DescribeAutoScalingGroups" in caught.value.hint


# What the region does not have


def group(place, **more):
    """Say of the group what the region does not."""
    found = place.scaling.group("web")
    row = {
        "AutoScalingGroupName": "web",
        "LaunchTemplate": {"LaunchTemplateId": found.template_id, "Version": "1"},
        "MinSize": 0,
        "MaxSize": 4,
        "DesiredCapacity": 2,
        "HealthCheckType": "ELB",
        "TargetGroupARNs": [place.arn],
        **more,
    }
    place.front.answers["DescribeAutoScalingGroups"] = AUTOSCALING, {"AutoScalingGroups": [row]}


def network(place, *, egress=None, endpoints=(), free=50, public=False, own=True):
    """Put the group into two subnets; the second one has a table of its own, or its VPC's."""
    group(place, VPCZoneIdentifier="subnet-1, subnet-2")
    subnets = [
        {
            "subnetId": name,
            "vpcId": "vpc-1",
            "availabilityZone": f"{REGION}{name[-1]}",
            "availableIpAddressCount": free,
            "mapPublicIpOnLaunch": public,
        }
        for name in ("subnet-1", "subnet-2")
    ]
    local = {"destinationCidrBlock": "10.0.0.0/16", "gatewayId": "local", "state": "active"}
    routes = [local] + ([egress] if egress else [])
    nat = {"destinationCidrBlock": "0.0.0.0/0", "natGatewayId": "nat-1", "state": "active"}
    tables = [_table("rtb-1", [local, nat], {"main": True})]
    tables.append(_table("rtb-2", routes, {"main": False, "subnetId": "subnet-2"} if own else {}))
    rows = [
        {
            "serviceName": name,
            "state": state,
            "privateDnsEnabled": dns,
            "vpcEndpointType": "Interface",
        }
        for name, state, dns in endpoints
    ]
    place.front.answers |= {
        "DescribeSubnets": (EC2, {"subnetSet": subnets}),
        "DescribeRouteTables": (EC2, {"routeTableSet": tables}),
        "DescribeVpcEndpoints": (EC2, {"vpcEndpointSet": rows}),
    }


def _table(name, routes, association):
    return {
        "routeTableId": name,
        "vpcId": "vpc-1",
        "routeSet": routes,
        "associationSet": [association] if association else [],
    }


def default(**target):
    return {"destinationCidrBlock": "0.0.0.0/0", "state": "active", **target}


SERVICE = f"com.amazonaws.{REGION}.autoscaling"


@pytest.mark.parametrize(
    ("settings", "codes"),
    [
        ({"egress": default(natGatewayId="nat-2")}, []),
        ({"own": False}, []),
        ({}, [("hook-unreachable", True)]),
        (
            {"egress": default(natGatewayId="nat-2", state="blackhole")},
            [("hook-unreachable", True)],
        ),
        ({"endpoints": [(SERVICE, "available", True)]}, []),
        ({"endpoints": [(SERVICE, "available", False)]}, [("hook-unreachable", True)]),
        ({"endpoints": [(SERVICE, "pending", True)]}, [("hook-unreachable", True)]),
        ({"endpoints": [(f"{SERVICE}-plans", "available", True)]}, [("hook-unreachable", True)]),
        ({"egress": default(gatewayId="igw-1"), "public": True}, []),
        ({"egress": default(gatewayId="igw-1")}, [("hook-unchecked", False)]),
        ({"own": False, "free": 0}, [("addresses", True)]),
        ({"own": False, "free": 1}, []),
    ],
)
def test_subnets_lead_to_the_hook_or_do_not(place, settings, codes):
    place.put(endpoint="")
    network(place, **settings)
    assert place.codes() == codes


def test_a_network_that_is_not_known_is_said_to_be_unchecked(place):
    place.put(endpoint="")
    assert place.codes() == [("hook-unchecked", False)]


@pytest.mark.parametrize(
    ("status", "codes"),
    [("UPDATE_IN_PROGRESS", [("stack-active", True)]), ("UPDATE_COMPLETE", [])],
)
def test_a_stack_that_is_at_work_is_found(place, status, codes):
    place.put()
    group(place, Tags=[{"Key": "aws:cloudformation:stack-name", "Value": "infra"}])
    stack = {"StackName": "infra", "CreationTime": "2026-01-01T00:00:00Z", "StackStatus": status}
    place.front.answers["DescribeStacks"] = (CLOUDFORMATION, {"Stacks": [stack]})
    assert place.codes() == codes


def test_a_stack_that_cannot_be_asked_is_a_warning(place):
    place.put()
    group(place, Tags=[{"Key": "aws:cloudformation:stack-name", "Value": "infra"}])
    (found,) = check(place.facts())
    assert (found.code, found.refuses) == ("unchecked", False)
    assert "infra" in found.message


def test_the_caller_and_the_role_of_the_machines_are_found(place):
    template = place.put()
    account, profiles = place.sources.account, Profiles(place.session)
    place.front.answers["GetCallerIdentity"] = (STS, {"Arn": "arn:aws:iam::1:user/operator"})
    assert account.caller() == "arn:aws:iam::1:user/operator"
    assert place.ec2.version(template.id, 1).profile is None
    place.ec2._client.create_launch_template_version(
        LaunchTemplateId=template.id,
        SourceVersion="1",
        LaunchTemplateData={"IamInstanceProfile": {"Arn": "arn:aws:iam::1:instance-profile/web"}},
    )
    role = {"Arn": "arn:aws:iam::1:role/web", "RoleId": "AROA1", "RoleName": "web"}
    profile = {"InstanceProfileName": "web", "Roles": [role]}
    place.front.answers["GetInstanceProfile"] = (IAM, {"InstanceProfile": profile})
    name = place.ec2.version(template.id, 2).profile
    assert profiles.role(name) == Role("AROA1", "web", "arn:aws:iam::1:role/web")
    place.front.answers["GetInstanceProfile"] = (IAM, {"InstanceProfile": {**profile, "Roles": []}})
    with pytest.raises(NotFoundError):
        profiles.role(name)


# The gateways by themselves


def test_instance_types_and_images_say_what_they_are(place):
    types = place.sources.types
    assert types.instance_type("t4g.nano").architectures == ("arm64",)
    assert types.instance_type("t4g.nano").boot_modes == ("uefi",)
    assert types.instance_type("t3.nano").boot_modes == ("legacy-bios", "uefi")
    assert (types.image(IMAGE).architecture, types.image(IMAGE).boot_mode) == (
        "x86_64",
        "legacy-bios",
    )
    for ask in (
        lambda: types.instance_type("x9.huge"),
        lambda: types.image("ami-0000000000000000f"),
    ):
        with pytest.raises(NotFoundError):
            ask()


def test_instance_types_come_in_pages_and_unknown_ones_are_refused(place):
    client = place.ec2._client
    pages = client.get_paginator("describe_instance_types").paginate(
        Filters=[{"Name": "processor-info.supported-architecture", "Values": ["x86_64"]}],
        PaginationConfig={"PageSize": 5},
    )
    found = [one["InstanceType"] for page in pages for one in page["InstanceTypes"]]
    assert len(found) == len(set(found)) > 5
    assert "t3.nano" in found
    assert "t4g.nano" not in found
    with pytest.raises(client.exceptions.ClientError, match="InvalidInstanceType"):
        client.describe_instance_types(InstanceTypes=["t3.nano", "x9.huge"])


def test_only_dry_runs_of_instances_are_simulated(place):
    client = place.ec2._client
    with pytest.raises(client.exceptions.ClientError, match="UnsupportedOperation"):
        client.run_instances(ImageId=IMAGE, MinCount=1, MaxCount=1)


def test_more_alarms_than_one_request_takes_are_asked_in_several(place):
    names = [f"a{number:03}" for number in range(150)]
    for name in names[:140]:
        place.cloud.alarms.set(name, "OK")
    assert place.sources.alarms.states(names) == dict.fromkeys(names[:140], "OK")
