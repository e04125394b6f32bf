"""What adoption changes, what it warns of, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calve.aws.autoscaling import Group, Hook
from calve.aws.ec2 import LaunchTemplate, TemplateVersion
from calve.aws.profiles import Role
from calve.aws.types import Bootable
from calve.contract.userdata import Hook as DataHook
from calve.contract.userdata import UserData
from calve.errors import UsageError
from calve.fleet.tags import ALARMS_TAG, FLEET_TAG, HOOK, HOOK_TAG, REPORTS_TAG
from calve.image.ami import CONTRACT
from calve.infra.adopt import Facts, Wanted, advice, changes, refuse, warnings

OURS = Hook(HOOK)
WANTED = Wanted("web", 180, OURS)
IMAGE = Bootable("ami-0123456789abcdef0", "available", "x86_64", "uefi", {CONTRACT: "1"})
STOCK = replace(IMAGE, tags={})
ROLE = Role("AROAEXAMPLE", "acme-machine", "arn:aws:iam::123456789012:role/acme-machine")
GROUP = Group("shop", "lt-0", "$Latest", 2, 4, 2, "EC2", ("arn:tg",), (), (), grace_s=60)
LIVE = TemplateVersion("lt-0", 3, "", IMAGE.id, "t3.nano", b"#!/bin/sh\n", "acme", "optional")
FOUND = Facts(WANTED, GROUP, LaunchTemplate("lt-0", "shop", 1, 3), LIVE, (), STOCK, ROLE)

DONE = replace(
    FOUND,
    group=replace(
        GROUP,
        version="4",
        health_check="ELB",
        grace_s=180,
        tags={FLEET_TAG: "web", REPORTS_TAG: "boot-reports/AROAEXAMPLE", "team": "shop"},
    ),
    template=LaunchTemplate("lt-0", "shop", 1, 4, {FLEET_TAG: "web"}),
    live=replace(LIVE, number=4, metadata_tokens="required"),
    hooks=(OURS,),
    image=IMAGE,
)


def data(hook):
    return UserData(
        f"/nix/store/{'c' * 32}-w", ("x",), "0" * 64, ("acme-1",), "web", 1, hook=hook
    ).dump()


def codes(facts):
    return [one.code for one in changes(facts)]


def warned(facts):
    return [one.code for one in warnings(facts)]


def test_a_group_of_somebody_who_never_heard_of_calve():
    found = {one.code: one for one in changes(FOUND)}
    assert list(found) == [
        "group-tag",
        "template-tag",
        "reports-tag",
        "version",
        "imdsv2",
        "grace",
        "health-check",
        "hook-tag",
    ]
    assert (found["version"].before, found["version"].after) == ("$Latest", "3")
    assert (found["imdsv2"].before, found["imdsv2"].after) == ("optional", "required")
    assert (found["grace"].before, found["grace"].after) == ("60 s", "180 s")
    assert found["reports-tag"].after == "boot-reports/AROAEXAMPLE"
    assert warned(FOUND) == ["image", "user-data", "hook"]


def test_a_group_that_is_a_fleet_has_nothing_left():
    assert changes(DONE) == ()
    assert [one for one in warnings(DONE) if one.code != "user-data"] == []


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (replace(DONE, group=replace(DONE.group, tags={})), "group-tag"),
        (replace(DONE, template=FOUND.template), "template-tag"),
        (replace(DONE, role=replace(ROLE, id="AROAOTHER")), "reports-tag"),
        (replace(DONE, group=replace(DONE.group, version="$Default")), "version"),
        (replace(DONE, live=replace(DONE.live, metadata_tokens=None)), "imdsv2"),
        (replace(DONE, group=replace(DONE.group, grace_s=179)), "grace"),
        (replace(DONE, group=replace(DONE.group, health_check="EC2")), "health-check"),
        (replace(DONE, hooks=(), live=replace(DONE.live, user_data=b"")), "hook"),
    ],
)
def test_each_thing_that_lacks_is_a_change(facts, code):
    assert code in codes(facts)
    assert len(codes(facts)) <= 2


# What is left alone


def test_the_last_changes_are_those_by_which_machines_are_ended():
    facts = replace(FOUND, image=IMAGE)
    assert codes(facts)[-2:] == ["health-check", "hook"]
    assert codes(facts).index("grace") < codes(facts).index("health-check")
    assert codes(facts).index("version") < codes(facts).index("imdsv2")


def test_where_a_machine_fails_the_balancer_s_check_it_is_not_made_to_count():
    facts = replace(FOUND, sick=("i-1",))
    assert "health-check" not in codes(facts)
    (told,) = [one for one in warnings(facts) if one.code == "health-check"]
    assert "i-1" in told.message


def test_other_health_checks_stay():
    facts = replace(FOUND, group=replace(GROUP, health_check="EC2,EBS"))
    (found,) = [one for one in changes(facts) if one.code == "health-check"]
    assert found.after == "EBS,ELB"
    both = replace(FOUND, group=replace(GROUP, health_check="EBS,ELB"))
    assert "health-check" not in codes(both)


def test_without_target_groups_health_stays_as_it_is():
    facts = replace(FOUND, group=replace(GROUP, target_groups=()))
    assert {"grace", "health-check"} & set(codes(facts)) == set()


def test_a_mixed_instances_policy_is_never_replaced():
    facts = replace(FOUND, group=replace(GROUP, mixed=True))
    assert {"version", "imdsv2"} & set(codes(facts)) == set()
    assert "mixed-instances" in warned(facts)


def test_a_group_of_another_fleet_is_refused():
    for facts in (
        replace(FOUND, group=replace(GROUP, tags={FLEET_TAG: "api"})),
        replace(FOUND, template=replace(FOUND.template, tags={FLEET_TAG: "api"})),
    ):
        with pytest.raises(UsageError, match="belongs to the fleet api"):
            refuse(facts)
    refuse(FOUND)
    refuse(DONE)


# The hook


@pytest.mark.parametrize(
    ("facts", "put"),
    [
        (FOUND, False),
        (replace(FOUND, wanted=replace(WANTED, forced=True)), True),
        (replace(FOUND, image=IMAGE), True),  # a base image serves nothing before its first release
        (replace(FOUND, image=None), False),
        (replace(FOUND, group=replace(GROUP, desired=0)), True),
        (replace(FOUND, live=replace(LIVE, user_data=data(DataHook("shop", HOOK)))), True),
        (replace(FOUND, live=replace(LIVE, user_data=data(DataHook("other", HOOK)))), False),
        (replace(FOUND, image=IMAGE, live=replace(LIVE, user_data=data(None))), False),
        (replace(FOUND, wanted=replace(WANTED, hook=None)), False),
    ],
)
def test_the_hook_is_put_where_no_machine_is_lost_by_it(facts, put):
    assert ("hook" in codes(facts)) == put


def test_a_hook_that_is_left_out_is_told_of_and_one_that_is_forced_too():
    (told,) = [one for one in warnings(FOUND) if one.code == "hook"]
    assert "left out" in told.message
    assert "--hook" in told.hint
    forced = replace(FOUND, wanted=replace(WANTED, forced=True))
    (told,) = [one for one in warnings(forced) if one.code == "hook"]
    assert "left out" not in told.message
    assert "hook" not in warned(DONE)


def test_a_hook_of_other_settings_is_set_right():
    facts = replace(FOUND, image=IMAGE, hooks=(Hook(HOOK, abandons=False),))
    (found,) = [one for one in changes(facts) if one.code == "hook"]
    assert (found.before, found.after) == ("180 s, CONTINUE", "180 s, ABANDON")
    assert "other-hook" not in warned(facts)


def test_somebody_else_s_launch_hook_is_told_of():
    facts = replace(FOUND, hooks=(Hook("theirs"), Hook("theirs-too", launching=False)))
    (told,) = [one for one in warnings(facts) if one.code == "other-hook"]
    assert "theirs is not Calve's" in told.message


# Other warnings


def test_what_cannot_be_told_of_the_machines_is_a_warning():
    assert "role" in warned(replace(FOUND, role=None))
    assert "role" in warned(replace(FOUND, role=None, live=replace(LIVE, profile=None)))
    assert "image" in warned(replace(FOUND, image=None))
    assert "image" not in warned(replace(FOUND, wanted=replace(WANTED, pulls=False)))
    assert "user-data" not in warned(replace(FOUND, live=replace(LIVE, user_data=b"")))
    assert "warm-pool" in warned(replace(FOUND, warm_pool=True))


def test_commands_to_paste_quote_what_may_be_in_a_group_s_name():
    odd = replace(GROUP, name="web; $(reboot)", tags={"aws:cloudformation:stack-name": "infra"})
    found = replace(FOUND, group=odd, warm_pool=True)
    hints = [one.hint for one in warnings(found)]
    assert any(hint.endswith("--auto-scaling-group-name 'web; $(reboot)'") for hint in hints)
    assert "--auto-scaling-group-names 'web; $(reboot)'" in advice(found, ())


# What is said after it


def test_terraform_is_told_the_group_s_release_our_tags_and_what_changed():
    text = advice(DONE, changes(FOUND))
    assert 'version = "4"' in text
    assert "ignore_changes = [launch_template[0].version, desired_capacity]" in text
    assert '"boot-reports/AROAEXAMPLE"' in text
    assert '"team"' not in text
    assert '#   health_check_type = "ELB"' in text
    assert '#   aws_launch_template: metadata_options { http_tokens = "required" }' in text
    assert "# and what was changed" not in advice(DONE, ())


def test_a_stack_s_group_gets_the_advice_for_stacks():
    tags = {**DONE.group.tags, "aws:cloudformation:stack-name": "acme"}
    text = advice(replace(DONE, group=replace(DONE.group, tags=tags)), ())
    assert "the CloudFormation stack acme" in text
    assert "LiveReleaseVersion" in text
    assert "IgnoreUnmodifiedGroupSizeProperties: true" in text
    assert "lifecycle" not in text


BALANCED = ("arn:tg", "arn:aws:elasticloadbalancing:eu-central-1:1:loadbalancer/app/shop/1")


def test_an_alarm_is_made_once_and_stands_beside_others():
    found = {one.code: one for one in changes(replace(FOUND, balanced=BALANCED))}
    assert (found["alarm"].before, found["alarm"].after) == ("", "calve-web-errors")
    group = replace(GROUP, tags={ALARMS_TAG: "mine"})
    found = {one.code: one for one in changes(replace(FOUND, balanced=BALANCED, group=group))}
    assert found["alarm"].after == "mine calve-web-errors"
    group = replace(GROUP, tags={ALARMS_TAG: "mine calve-web-errors"})
    assert "alarm" not in codes(replace(FOUND, balanced=BALANCED, group=group))


def test_a_hook_that_must_wait_is_told_to_the_next_release_and_put_after_it():
    assert "hook-tag" in codes(FOUND)
    tagged = replace(FOUND, group=replace(GROUP, tags={HOOK_TAG: OURS.name}))
    assert not {"hook", "hook-tag"} & set(codes(tagged))
