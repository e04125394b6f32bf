"""A user's Auto Scaling group becomes a fleet: what has to change, in an order that never leaves it worse.

Pure. Each change stands alone and touches no running machine; once all are made, none is left.
Source: Amazon EC2 Auto Scaling API reference, UpdateAutoScalingGroup; User Guide, "Health checks for instances" and
"How lifecycle hooks work"; Amazon EC2 API reference, CreateLaunchTemplateVersion.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from calve.contract.userdata import UserData, UserDataError
from calve.errors import UsageError
from calve.fleet.tags import ALARMS_TAG, FLEET_TAG, HOOK_TAG, REPORTS_TAG
from calve.image.ami import CONTRACT
from calve.infra.terraform import keep_release

if TYPE_CHECKING:
    from calve.aws.autoscaling import Group, Hook
    from calve.aws.ec2 import LaunchTemplate, TemplateVersion
    from calve.aws.profiles import Role
    from calve.aws.types import Bootable

__all__ = ["Change", "Facts", "Wanted", "Warned", "advice", "changes", "refuse", "warnings"]

_REQUIRED: Final = "required"
_STACK: Final = "aws:cloudformation:stack-name"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the group is to be.

    Attributes:
        fleet: the fleet's name.
        within_s: so long a machine may take until it is healthy; None where nothing asks it.
        hook: the launch hook that it is to have; None for none.
        forced: the hook is wanted even where it ends machines that do not know it.
        pulls: machines pull their system in the initrd, so that their image has to have the agent.
    """

    fleet: str
    within_s: int | None = None
    hook: Hook | None = None
    forced: bool = False
    pulls: bool = True

    @property
    def alarm(self) -> str:
        """Return the name of the alarm upon what the machines answer."""
        return f"calve-{self.fleet}-errors"


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is looked at.

    Attributes:
        wanted: what it is to be.
        group: as it is.
        template: its launch template.
        live: the version that the group launches from now, by its number.
        hooks: the group's.
        image: what machines boot; None where it cannot be told.
        role: of the machines; None where it cannot be told.
        sick: machines in service that fail the balancer's check.
        warm_pool: it has one.
        balanced: ARNs of a target group and of the Application Load Balancer before it; None where there is none.
    """

    wanted: Wanted
    group: Group
    template: LaunchTemplate
    live: TemplateVersion
    hooks: tuple[Hook, ...] = ()
    image: Bootable | None = None
    role: Role | None = None
    sick: tuple[str, ...] = ()
    warm_pool: bool = False
    balanced: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One change.

    Attributes:
        code: names it.
        text: what it is, as a sentence.
        before: what is there; empty for nothing.
        after: what will be.
        terraform: the argument that says the same, where Terraform would put it back.
    """

    code: str
    text: str
    before: str
    after: str
    terraform: str = ""


@dataclass(frozen=True, slots=True)
class Warned:
    """What a person should know; `hint` is what to do about it."""

    code: str
    message: str
    hint: str = ""


def refuse(facts: Facts) -> None:
    """Raise where the group cannot become this fleet.

    Raises:
        UsageError: it is another fleet's, or its launch template is.
    """
    fleet = facts.wanted.fleet
    for what, place, tags in (
        ("the group", facts.group.name, facts.group.tags),
        ("its launch template", facts.template.id, facts.template.tags),
    ):
        owner = tags.get(FLEET_TAG, fleet)
        if owner != fleet:
            raise UsageError(
                f"{what} belongs to the fleet {owner}, as its tag {FLEET_TAG} says",
                place=place,
                hint="take another, or remove the tag",
            )


# Changes


def changes(facts: Facts) -> tuple[Change, ...]:
    """Return what is to be changed, in order; nothing where the group is a fleet already."""
    found = (rule(facts) for rule in _CHANGES)
    return tuple(change for change in found if change is not None)


def _fleet_tag(facts: Facts) -> Change | None:
    fleet = facts.wanted.fleet
    if facts.group.tags.get(FLEET_TAG) == fleet:
        return None
    text = f"the group gets the tag {FLEET_TAG}, which says whose it is"
    return Change("group-tag", text, "", fleet)


def _template_tag(facts: Facts) -> Change | None:
    fleet = facts.wanted.fleet
    if facts.template.tags.get(FLEET_TAG) == fleet:
        return None
    text = f"the launch template gets the tag {FLEET_TAG}, which policies go by"
    return Change(
        "template-tag",
        text,
        "",
        fleet,
        f'aws_launch_template: tags = {{ "{FLEET_TAG}" = "{fleet}" }}',
    )


def _reports(facts: Facts) -> Change | None:
    key, role = REPORTS_TAG, facts.role
    before = facts.group.tags.get(key, "")
    after = "" if role is None else f"boot-reports/{role.id}"
    if not after or before == after:
        return None
    text = f"the group gets the tag {key}, which says where its machines may write boot reports"
    return Change("reports-tag", text, before, after)


def _version(facts: Facts) -> Change | None:
    group, live = facts.group, facts.live
    if group.mixed or (group.version or "").isdecimal():
        return None
    text = f"the group launches from version {live.number}, which {group.version} is now: from a number can be rolled back"
    return Change("version", text, group.version or "", str(live.number))


def _tokens(facts: Facts) -> Change | None:
    live = facts.live
    if facts.group.mixed or live.metadata_tokens == _REQUIRED:
        return None
    text = (
        "the group launches from a new version of its launch template, which gives metadata to IMDSv2 alone;"
        f" all else is as in version {live.number}"
    )
    return Change(
        "imdsv2",
        text,
        live.metadata_tokens or "",
        _REQUIRED,
        f'aws_launch_template: metadata_options {{ http_tokens = "{_REQUIRED}" }}',
    )


def _grace(facts: Facts) -> Change | None:
    group, within_s = facts.group, facts.wanted.within_s
    if within_s is None or not group.target_groups or group.grace_s >= within_s:
        return None
    text = f"the balancer's checks of a new machine count after {within_s} s, as health.within says"
    return Change(
        "grace",
        text,
        f"{group.grace_s} s",
        f"{within_s} s",
        f"health_check_grace_period = {within_s}",
    )


def _checks(facts: Facts) -> Change | None:
    if not _wants_balancer(facts) or facts.sick:
        return None
    before = facts.group.health_check
    after = ",".join([*(one for one in before.split(",") if one not in {"", "EC2"}), "ELB"])
    text = "a machine that fails the load balancer's check is replaced"
    return Change("health-check", text, before, after, f'health_check_type = "{after}"')


def _wants_balancer(facts: Facts) -> bool:
    group = facts.group
    return bool(group.target_groups) and "ELB" not in group.health_check.split(",")


def _hook(facts: Facts) -> Change | None:
    wanted = facts.wanted.hook
    if wanted is None or not _misses_hook(facts):
        return None
    if _ends_machines(facts) and not facts.wanted.forced:
        return None
    text = f"the launch hook {wanted.name} holds a machine out of service until it says that it is healthy"
    known = next((one for one in facts.hooks if one.name == wanted.name), None)
    return Change("hook", text, _told(known), _told(wanted))


def _hook_tag(facts: Facts) -> Change | None:
    """Have the next release's machines know of a hook that cannot be put yet."""
    wanted, key = facts.wanted.hook, HOOK_TAG
    if wanted is None or facts.group.tags.get(key) == wanted.name or wanted in facts.hooks:
        return None
    if _hook(facts) is not None:
        return None
    text = f"the group gets the tag {key}: machines of the next release let go of the launch hook that is put later"
    return Change("hook-tag", text, "", wanted.name)


def _alarm(facts: Facts) -> Change | None:
    wanted, there = facts.wanted, facts.group.tags.get(ALARMS_TAG, "")
    if facts.balanced is None or wanted.alarm in there.split():
        return None
    text = f"the alarm {wanted.alarm} is made, upon the share of 5xx among the machines' answers; every refresh has it"
    return Change("alarm", text, there, f"{there} {wanted.alarm}".strip())


def _misses_hook(facts: Facts) -> bool:
    wanted = facts.wanted.hook
    return wanted is not None and wanted not in facts.hooks


def _ends_machines(facts: Facts) -> bool:
    """Say whether the hook would end machines of the live version, which never let go of it."""
    data, hook = _data(facts), facts.wanted.hook
    if facts.group.desired == 0 or hook is None:
        return False
    if data is None:
        # An image of Calve's serves nothing before its first release.
        return facts.image is None or CONTRACT not in facts.image.tags
    known = data.hook
    return known is None or (known.group, known.name) != (facts.group.name, hook.name)


def _told(hook: Hook | None) -> str:
    if hook is None:
        return ""
    return f"{hook.heartbeat_s} s, {'ABANDON' if hook.abandons else 'CONTINUE'}"


def _data(facts: Facts) -> UserData | None:
    try:
        return UserData.parse(facts.live.user_data)
    except UserDataError:
        return None


_CHANGES: Final[tuple[Callable[[Facts], Change | None], ...]] = (
    _fleet_tag,
    _template_tag,
    _reports,
    _version,
    _tokens,
    _grace,
    _checks,
    _alarm,
    _hook,
    _hook_tag,
)


# Warnings


def warnings(facts: Facts) -> tuple[Warned, ...]:
    """Return what a person should know before the first release."""
    return tuple(found for rule in _WARNINGS for found in rule(facts))


def _of_machines(facts: Facts) -> Iterator[Warned]:
    live, image = facts.live, facts.image
    if facts.wanted.pulls and (image is None or CONTRACT not in image.tags):
        yield Warned(
            "image",
            f"the image {live.image_id or '?'} has no tag {CONTRACT}: Calve's agent is not in it, as far as can be told,"
            " and its machines would pull nothing",
            "calve image build --base SYSTEM --out base; calve image publish base; then calve deploy --image AMI",
        )
    if live.user_data and _data(facts) is None:
        yield Warned(
            "user-data",
            f"the user data of version {live.number} is not Calve's: the first deploy replaces it;"
            " what it does has to be in the system by then",
        )
    if facts.role is None:
        yield Warned(
            "role",
            "which role the machines have is not known, so the group does not say where they may write boot reports"
            if live.profile
            else f"version {live.number} has no instance profile: machines could not read the cache",
            "calve iam show machine prints the policy of their role; name its instance profile in a new version of the"
            " launch template, and adopt again",
        )


def _of_group(facts: Facts) -> Iterator[Warned]:
    group = facts.group
    if group.mixed:
        yield Warned(
            "mixed-instances",
            "the group has a mixed instances policy: its version stays as it is, and calve deploy refuses it",
            "give the group the launch template itself",
        )
    if facts.warm_pool:
        yield Warned(
            "warm-pool",
            "the group has a warm pool: its machines keep the release that they were launched with until a refresh"
            " comes to them, and launch hooks run twice",
            f"aws autoscaling delete-warm-pool --auto-scaling-group-name {shlex.quote(group.name)}",
        )
    if facts.sick and _wants_balancer(facts):
        yield Warned(
            "health-check",
            f"the balancer finds {', '.join(facts.sick[:3])}{', …' if len(facts.sick) > 3 else ''} unhealthy, which"
            " would be replaced at once: the health check stays as it is",
            "put them right, and adopt again",
        )


def _of_hooks(facts: Facts) -> Iterator[Warned]:
    wanted = facts.wanted.hook
    for one in facts.hooks:
        if one.launching and (wanted is None or one.name != wanted.name):
            yield Warned(
                "other-hook",
                f"the launch hook {one.name} is not Calve's: a machine waits for whoever lets go of it, {_told(one)}",
                "remove it where nobody does so for the new machines",
            )
    if wanted is None or not _misses_hook(facts) or not _ends_machines(facts):
        return
    text = (
        f"machines of version {facts.live.number} do not let go of a launch hook: with one, each that is launched before"
        f" the first deploy, or by a rollback to this version, is ended after {wanted.heartbeat_s} s"
    )
    if facts.wanted.forced:
        yield Warned("hook", text, "deploy now")
    else:
        hint = "the balancer alone judges until then: deploy, and adopt again; --hook puts it all the same"
        yield Warned("hook", f"{text}; it is left out", hint)


_WARNINGS: Final[tuple[Callable[[Facts], Iterator[Warned]], ...]] = (
    _of_machines,
    _of_group,
    _of_hooks,
)


# After it


def advice(facts: Facts, made: tuple[Change, ...]) -> str:
    """Return what the group's Terraform or CloudFormation has to be told, so that it undoes nothing.

    Args:
        facts: the group as it is after the changes.
        made: what was changed.
    """
    group = facts.group
    if _STACK in group.tags:
        return _CLOUDFORMATION.format(stack=group.tags[_STACK], group=shlex.quote(group.name))
    names = (FLEET_TAG, REPORTS_TAG, HOOK_TAG, ALARMS_TAG)
    tags = {name: group.tags[name] for name in names if name in group.tags}
    text = keep_release(group.name, facts.template.id, facts.live.number, tags=tags)
    lines = [f"#   {one.terraform}" for one in made if one.terraform]
    return text + "\n".join(["# and what was changed besides:", *lines, ""] if lines else [])


_CLOUDFORMATION: Final = """\
The group belongs to the CloudFormation stack {stack}, whose next update would put back what a release changed.
In its template:
- LaunchTemplate.Version of the group is a parameter, LiveReleaseVersion. Give it what the group has, each time:
  aws autoscaling describe-auto-scaling-groups --auto-scaling-group-names {group} \\
    --query 'AutoScalingGroups[0].LaunchTemplate.Version'
- DesiredCapacity is left out, and the update policy has
  AutoScalingScheduledAction: {{IgnoreUnmodifiedGroupSizeProperties: true}}
- no AutoScalingRollingUpdate, AutoScalingReplacingUpdate or AutoScalingInstanceRefresh: releases are Calve's.
- tags, health check, grace period and hook are as the group has them now.
Update the stack only while no release is being rolled out.
"""
