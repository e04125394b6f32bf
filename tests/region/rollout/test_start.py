"""How a rollout begins: which group, which number, what machines are told."""

from dataclasses import replace

import pytest

from calve.contract.userdata import UserData
from calve.errors import NotFoundError, UsageError
from calve.fleet.config import Strategy
from calve.fleet.tags import ALARMS_TAG, HOOK, REPORTS_TAG
from calve.rollout import start


def test_a_group_is_found_by_its_tag(place):
    scaling = place.gateways.scaling
    by_tag = replace(place.fleet, group="tag:calve:fleet=web")
    with pytest.raises(NotFoundError, match="no Auto Scaling group"):
        start.resolved(by_tag, scaling)
    scaling.tag("web", {"calve:fleet": "web"})
    assert start.resolved(by_tag, scaling).group == "web"
    assert start.resolved(place.fleet, scaling) == place.fleet
    with pytest.raises(UsageError, match="tag:KEY=VALUE"):
        start.resolved(replace(place.fleet, group="tag:web"), scaling)


def test_machines_are_told_what_the_group_says(place):
    scaling, release = place.gateways.scaling, place.release(2)
    scaling.tag("web", {REPORTS_TAG: "boot-reports/AROA2"})
    group, live = scaling.group("web"), place.gateways.ec2.version(place.template, 1)
    before = UserData.parse(live.user_data)
    make = start.change(release, place.fleet, group, scaling.hooks("web"), "s3://other")
    after = UserData.parse(make(live))
    assert (after.release, after.system, after.manifest) == (2, release.system, release.manifest)
    assert (after.caches, after.hook) == (before.caches, before.hook)
    assert after.reports == "boot-reports/AROA2"
    foreign = replace(live, user_data=b"#!/bin/sh")
    made = UserData.parse(make(foreign))
    assert (made.caches, made.hook.name) == (("s3://other",), HOOK)
    assert (
        UserData.parse(start.change(release, place.fleet, group, (), "s3://o")(live)).hook is None
    )


@pytest.mark.parametrize(
    ("desired", "checkpoints"),
    [(1, ()), (2, (50, 100)), (3, (33, 100)), (9, (11, 100)), (1000, (1, 100))],
)
def test_a_canary_is_one_machine_at_least(place, desired, checkpoints):
    rollout = replace(place.fleet.rollout, strategy=Strategy.CANARY, canary_s=60)
    group = replace(place.gateways.scaling.group("web"), desired=desired)
    found = start.preferences(rollout, group)
    assert found.checkpoints == checkpoints
    assert found.checkpoint_delay_s == (60 if checkpoints else 0)


def test_alarms_are_the_fleet_files_and_those_of_the_adoption(place):
    place.gateways.scaling.tag("web", {ALARMS_TAG: "calve-web-errors web-5xx"})
    rollout = replace(place.fleet.rollout, alarms=("web-5xx", "web-slow"))
    found = start.alarms(rollout, place.gateways.scaling.group("web"))
    assert found == ("web-5xx", "web-slow", "calve-web-errors")
