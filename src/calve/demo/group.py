"""The group that a simulated fleet begins with: release 1, its launch template, a target group, machines."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Final

from calve.aws.autoscaling import Hook
from calve.aws.elb import Check
from calve.contract.userdata import Hook as UserHook
from calve.fleet import release as releases
from calve.fleet.config import Fleet
from calve.fleet.release import Content
from calve.fleet.tags import HOOK
from calve.rollout import start
from calve.rollout.observe import Gateways
from calve.rollout.run import description

__all__ = ["CHECK", "Created", "Place", "create"]

LAUNCH: Final = Hook(HOOK)
"""Holds a machine out of service until its stage 2 finds it healthy; left alone it times out, and the group replaces it."""

CHECK: Final = Check(interval_s=5, healthy=2, unhealthy=2)


@dataclass(frozen=True, slots=True)
class Place:
    """What a region's machines are told, and what they are.

    Attributes:
        cache: URL of the cache, as machines reach it.
        reports: where their role may write.
        image: what they boot.
        zone: where they are.
        size: least, desired and most machines.
        held: a launch hook waits for a machine's own word.
        api: URL of Auto Scaling, as machines reach it; "" for AWS's own.
        grace_s: so long a new machine's failing checks do not count.
        drain_s: so long one that leaves may finish what is under way.
        check: the balancer's.
    """

    cache: str
    reports: str
    image: str
    zone: str
    size: tuple[int, int, int]
    held: bool = True
    api: str = ""
    grace_s: int = 60
    drain_s: int = 5
    check: Check = CHECK


@dataclass(frozen=True, slots=True)
class Created:
    """What was made: the launch template's id, the target group's ARN."""

    template: str
    target_group: str


def create(
    gateways: Gateways, fleet: Fleet, content: Content, place: Place, *, now: dt.datetime
) -> Created:
    """Make a fleet's group, on its first release."""
    first = releases.create(gateways.objects, fleet.name, content, now=now)
    path = "/" if fleet.health is None or fleet.health.http is None else fleet.health.http
    target = gateways.elb.create_target_group(
        fleet.group, path=path, check=place.check, delay_s=place.drain_s
    )
    data = first.user_data(
        (place.cache,),
        health=start.checks(fleet.health),
        hook=UserHook(fleet.group, HOOK, place.api) if place.held else None,
        reports=place.reports,
    )
    template = gateways.ec2.create_template(
        fleet.name,
        image_id=place.image,
        instance_type="t3.nano",
        user_data=data.dump(),
        description=description(first),
    )
    gateways.scaling.create_group(
        fleet.group,
        template_id=template.id,
        version=1,
        size=place.size,
        target_groups=[target.arn],
        grace_s=place.grace_s,
        zones=[place.zone],
        hooks=[LAUNCH] if place.held else [],
    )
    return Created(template.id, target.arn)
