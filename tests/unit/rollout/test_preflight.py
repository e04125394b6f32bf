"""Preflight's rules: each wrong fact is named, alone, and all that is right is not spoken of."""

import dataclasses
import datetime as dt
import re
from pathlib import Path

import pytest

from calve.aws.autoscaling import Group, Hook
from calve.aws.ec2 import TemplateVersion
from calve.aws.network import Subnet
from calve.aws.refreshes import Refresh
from calve.aws.types import Bootable, InstanceType
from calve.contract.abi import Abi, Bootspec, Wanted
from calve.errors import AccessError, UsageError
from calve.fleet.config import Delivery, Fleet, Health, Rollout
from calve.fleet.tags import ALARMS_TAG, HOOK
from calve.nix.storepath import StorePath
from calve.rollout.closure import Closure
from calve.rollout.facts import Facts, Gap
from calve.rollout.preflight import check, refuse

TOP = StorePath.parse(f"/nix/store/{'d' * 32}-nixos-system-web-25.11")
OLD, NEW = (f"/nix/store/{letter * 32}-linux-6.12" for letter in "ab")
ARN = "arn:aws:elasticloadbalancing:eu-central-1:1:targetgroup/web/1"
ENDPOINT = "com.amazonaws.eu-central-1.autoscaling"


def boot(kernel, agent=True):
    spec = Bootspec(f"{kernel}/bzImage", f"{kernel}/initrd", (), f"{TOP}/init", str(TOP), "web")
    return Wanted(spec, Abi("0.2.0", kernel_release="6.12") if agent else None)


def subnet(name="subnet-1", free=200, public=False, egress="nat-1"):
    return Subnet(name, "vpc-1", "eu-central-1a", free, public, egress)


WELL = Facts(
    fleet=Fleet(
        "web",
        str(TOP),
        Delivery.INITRD,
        "web",
        Health("/healthz", None, 180),
        Rollout(100, 200, 120, warmup_s=30, alarms=("errors",)),
    ),
    group=Group("web", "lt-1", "7", 0, 8, 4, "ELB", (ARN,), (), ()),
    region="eu-central-1",
    template=TemplateVersion("lt-1", 7, "", "ami-1", "t3.nano", b"{}"),
    hooks=(Hook(HOOK), Hook("leaving", launching=False, abandons=False)),
    image=Bootable("ami-1", "available", "x86_64", "uefi"),
    instance_type=InstanceType("t3.nano", ("x86_64",), ("legacy-bios", "uefi")),
    closure=Closure(TOP, 400, (), "x86_64-linux", boot(NEW)),
    image_boot=boot(OLD),
    alarms={"errors": "OK"},
    stack=("infra", "UPDATE_COMPLETE"),
    subnets=(subnet(), subnet("subnet-2")),
    endpoints=frozenset(),
)


def having(**changes):
    """Return the facts of a fleet that is well but for these: facts, or parts of them as `group__version`."""
    facts = WELL
    for name, value in changes.items():
        *parts, last = name.split("__")
        owners = [facts]
        for part in parts:
            owners.append(getattr(owners[-1], part))
        made = dataclasses.replace(owners.pop(), **{last: value})
        for part in reversed(parts):
            made = dataclasses.replace(owners.pop(), **{part: made})
        facts = made
    return facts


def codes(facts):
    return [(one.code, one.refuses) for one in check(facts)]


def refresh(status="InProgress"):
    return Refresh("r", status, None, 40, 2, dt.datetime(2026, 1, 1, tzinfo=dt.UTC), None)


MANY = [f"alarm-{number}" for number in range(10)]
REFUSED = [
    ("closure-incomplete", {"closure__missing": (TOP,)}),
    ("architecture", {"instance_type__architectures": ("arm64",)}),
    ("architecture", {"closure__system": "aarch64-linux"}),
    ("boot-mode", {"instance_type__boot_modes": ("legacy-bios",)}),
    ("kernel", {"closure__boot": boot(NEW, agent=False)}),
    ("user-data", {"user_data": "the release's user data: 16385 bytes"}),
    ("no-launch-template", {"group__template_id": None, "group__version": None}),
    ("unpinned-version", {"group__version": "$Latest"}),
    ("unpinned-version", {"group__version": "$Default"}),
    ("suspended", {"group__suspended": ("AlarmNotification", "Launch")}),
    ("alarm-on", {"alarms": {"errors": "ALARM"}}),
    ("alarm-missing", {"alarms": {}}),
    (
        "alarms",
        {
            "group__tags": {ALARMS_TAG: " ".join(MANY)},
            "alarms": dict.fromkeys(("errors", *MANY), "OK"),
        },
    ),
    ("image-alias", {"template__image_id": "resolve:ssm:/nixos/25.11", "image": None}),
    ("image-unusable", {"image__state": "disabled"}),
    ("mixed-instances", {"group__mixed": True}),
    ("attribute-based", {"group__mixed": True, "group__attributes": True}),
    ("refresh-active", {"refresh": refresh()}),
    ("stack-active", {"stack": ("infra", "UPDATE_ROLLBACK_IN_PROGRESS")}),
    ("no-surge", {"group__desired": 1, "fleet__rollout__max_healthy_percent": 100}),
    ("hook-continues", {"hooks": (Hook(HOOK, abandons=False),)}),
    ("hook-unreachable", {"subnets": (subnet(), subnet("subnet-2", egress=""))}),
    ("addresses", {"subnets": (subnet(free=0),)}),
    ("permission", {"gaps": (Gap("target health", "denied", "a:Describe", needed=True),)}),
]
WARNED = [
    ("unchecked", {"gaps": (Gap("the subnets", "denied", "ec2:DescribeSubnets"),)}),
    ("unchecked", {"gaps": (Gap("the hooks", "not simulated", needed=True),)}),
    ("kernel-unknown", {"closure__boot": boot(NEW, agent=False), "image_boot": None}),
    ("no-machines", {"group__desired": 0}),
    ("no-surge", {"fleet__rollout__max_healthy_percent": 100}),
    ("addresses", {"subnets": (subnet(free=3),)}),
    ("health-check", {"group__health_check": "EC2"}),
    ("warm-up", {"fleet__rollout__warmup_s": 0, "hooks": ()}),
    ("hook-continues", {"hooks": (Hook("dns", abandons=False),)}),
    ("hook-unchecked", {"subnets": None, "endpoints": None}),
    ("hook-unchecked", {"subnets": ()}),
    ("hook-unchecked", {"subnets": (subnet(egress="igw-1"),)}),
    ("hook-unchecked", {"subnets": (subnet(egress=""),), "endpoints": None}),
]
RIGHT = {
    "nothing is known": {
        "template": None,
        "hooks": None,
        "image": None,
        "instance_type": None,
        "closure": None,
        "image_boot": None,
        "alarms": None,
        "stack": None,
        "subnets": None,
        "endpoints": None,
    },
    "the same kernel needs no agent": {
        "closure__boot": boot(OLD, agent=False),
        "image_boot": boot(OLD, agent=False),
    },
    "an image carries its own kernel": {
        "closure__boot": boot(NEW, agent=False),
        "fleet__delivery": Delivery.IMAGE,
    },
    "an image that boots either way": {
        "image__boot_mode": "uefi-preferred",
        "instance_type__boot_modes": ("legacy-bios",),
    },
    "an endpoint in the VPC": {
        "subnets": (subnet(egress=""),),
        "endpoints": frozenset({ENDPOINT}),
    },
    "an address of the hook's own": {"subnets": (subnet(egress=""),), "hook_endpoint": True},
    "no hook to be reached": {"subnets": (subnet(egress=""),), "hooks": ()},
    "public machines": {"subnets": (subnet(egress="igw-1", public=True),)},
    "the group's own warm-up": {"fleet__rollout__warmup_s": 0, "group__warmup_s": 60},
    "one machine that is doubled": {"group__desired": 1},
    "fewer machines in place of more addresses": {
        "fleet__rollout__min_healthy_percent": 50,
        "fleet__rollout__max_healthy_percent": 100,
        "subnets": (subnet(free=0),),
    },
    "no balancer": {"group__target_groups": (), "group__health_check": "EC2"},
    "processes that no release needs": {"group__suspended": ("AZRebalance", "ScheduledActions")},
    "a foreign system that is not known": {"closure__system": ""},
}


def test_a_fleet_that_is_well_has_no_problem():
    assert check(WELL) == ()


@pytest.mark.parametrize(("code", "changes"), REFUSED)
def test_what_would_fail_is_refused(code, changes):
    (found,) = check(having(**changes))
    assert (found.code, found.refuses) == (code, True)
    assert found.message
    assert found.hint


@pytest.mark.parametrize(("code", "changes"), WARNED)
def test_what_may_go_wrong_is_a_warning(code, changes):
    assert codes(having(**changes)) == [(code, False)]


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_or_unknown_is_not_spoken_of(name):
    assert codes(having(**RIGHT[name])) == []


@pytest.mark.parametrize(
    "process",
    [
        "Launch",
        "Terminate",
        "HealthCheck",
        "ReplaceUnhealthy",
        "InstanceRefresh",
        "AddToLoadBalancer",
    ],
)
def test_every_process_that_a_release_needs_is_named(process):
    (found,) = check(having(group__suspended=(process,)))
    assert process in found.message


def test_all_problems_are_named_at_once():
    facts = having(group__version="$Latest", refresh=refresh("Baking"), alarms={})
    assert codes(facts) == [
        ("unpinned-version", True),
        ("refresh-active", True),
        ("alarm-missing", True),
    ]


def test_a_few_of_many_lost_paths_are_named():
    lost = tuple(StorePath.parse(f"/nix/store/{'d' * 31}{one}-lib{one}") for one in range(9))
    (found,) = check(having(closure__missing=lost))
    assert "lacks 9 of the closure's 400 paths" in found.message
    assert "lib0" in found.message
    assert "lib5" not in found.message
    assert str(TOP) in found.hint


def test_without_a_warm_up_the_time_is_said():
    rules = {
        "fleet__rollout__warmup_s": 0,
        "fleet__rollout__max_healthy_percent": 125,
        "hooks": (),
    }
    (found,) = check(having(**rules))
    assert "at most 840 s: 4 times 180 s, and 120 s of baking" in found.message


def test_a_permission_is_named():
    (found,) = check(having(gaps=(Gap("launching instances", "denied", "ec2:RunInstances", True),)))
    assert found.hint == "the caller needs ec2:RunInstances"


def test_the_subnets_that_lead_nowhere_are_named_with_what_is_missing():
    (found,) = check(having(subnets=(subnet(), subnet("subnet-2", egress=""))))
    assert "subnet-2" in found.message
    assert "subnet-1" not in found.message
    assert ENDPOINT in found.hint


def test_the_page_has_every_code_and_no_other():
    page = (Path(__file__).parents[3] / "docs/how-to/doctor.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {code for cell in cells for code in re.findall(r"`([a-z-]+)`", cell)}
    assert named == {code for code, _ in REFUSED + WARNED}


def test_a_deploy_is_refused_with_all_that_stands_against_it():
    facts = having(group__version="$Latest", alarms={}, group__health_check="EC2")
    with pytest.raises(UsageError) as caught:
        refuse(check(facts), "web")
    assert str(caught.value).startswith("web: the group launches from $Latest")
    assert "no alarm errors" in caught.value.message
    assert "health check" not in caught.value.message
    assert "calve adopt" in caught.value.hint


def test_permissions_alone_are_an_error_of_their_own():
    denied = Gap("launching instances", "denied", "ec2:RunInstances", needed=True)
    with pytest.raises(AccessError, match="launching instances"):
        refuse(check(having(gaps=(denied,))))
    with pytest.raises(UsageError):
        refuse(check(having(gaps=(denied,), alarms={})))


def test_warnings_refuse_nothing():
    refuse(check(having(group__health_check="EC2")))
