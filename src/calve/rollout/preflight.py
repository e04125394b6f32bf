"""What would make a release fail on AWS an hour later, said before anything is changed.

Pure: `check` holds `Facts` against one rule after the other. docs/how-to/doctor.md has the rules as a table.
Source: Amazon EC2 Auto Scaling User Guide, "Start an instance refresh", "Undo changes with a rollback", "Use a
checkpoint", "Mixed instances groups"; EC2 User Guide, "Boot modes" and "Instance types".
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from calve.contract.abi import PLAIN, Refuse, Running, decide
from calve.contract.health import WITHIN_S
from calve.errors import AccessError, UsageError
from calve.fleet.config import MOST_ALARMS, Delivery
from calve.fleet.plan import surge
from calve.fleet.tags import HOOK
from calve.nix.storepath import STORE_DIR, StorePath
from calve.rollout.facts import ALIAS, Facts
from calve.rollout.start import alarms, own_hook

if TYPE_CHECKING:
    from calve.contract.abi import Wanted

__all__ = ["PERMISSION", "Problem", "check", "refuse"]

PERMISSION: Final = "permission"
"""The code of what only somebody who gives permissions can change."""

_NEEDED: Final = (
    "Launch",
    "Terminate",
    "HealthCheck",
    "ReplaceUnhealthy",
    "InstanceRefresh",
    "AddToLoadBalancer",
)
_NAMED: Final = 3
_ARCHITECTURES: Final = {"x86_64-linux": "x86_64", "aarch64-linux": "arm64", "i686-linux": "i386"}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong.

    Attributes:
        code: names the rule.
        refuses: a deploy must not begin; else it is a warning.
        message: what is wrong.
        hint: what to do about it.
    """

    code: str
    refuses: bool
    message: str
    hint: str


def check(facts: Facts) -> tuple[Problem, ...]:
    """Return what is wrong, in the order of the rules; nothing where all is well."""
    return tuple(problem for rule in _RULES for problem in rule(facts))


def refuse(problems: tuple[Problem, ...], place: object = None) -> None:
    """Raise where one of them refuses.

    Args:
        problems: of `check`.
        place: for the message: the fleet's name.

    Raises:
        AccessError: it is for want of permissions alone.
        UsageError: it is not.
    """
    found = [one for one in problems if one.refuses]
    if not found:
        return
    kind = AccessError if all(one.code == PERMISSION for one in found) else UsageError
    hint = "; ".join(dict.fromkeys(one.hint for one in found if one.hint))
    raise kind("; ".join(one.message for one in found), place=place, hint=hint or None)


def _refused(code: str, message: str, hint: str) -> Problem:
    return Problem(code, refuses=True, message=message, hint=hint)


def _warned(code: str, message: str, hint: str) -> Problem:
    return Problem(code, refuses=False, message=message, hint=hint)


# Permissions


def _gaps(facts: Facts) -> Iterator[Problem]:
    for one in facts.gaps:
        hint = f"the caller needs {one.permission}" if one.permission else ""
        if one.permission and one.needed:
            yield _refused(PERMISSION, f"{one.what}: {one.why}", hint)
        else:
            yield _warned("unchecked", f"{one.what}: not checked: {one.why}", hint)


# What machines get


def _closure(facts: Facts) -> Iterator[Problem]:
    closure = facts.closure
    if closure is None or not closure.missing:
        return
    names = ", ".join(path.basename for path in closure.missing[:_NAMED])
    more = ", …" if len(closure.missing) > _NAMED else ""
    yield _refused(
        "closure-incomplete",
        f"the cache lacks {len(closure.missing)} of the closure's {closure.paths} paths: {names}{more}",
        f"calve push {closure.toplevel}",
    )


def _image(facts: Facts) -> Iterator[Problem]:
    template, image = facts.template, facts.image
    if template is not None and (template.image_id or "").startswith(ALIAS):
        yield _refused(
            "image-alias",
            f"the launch template's image is {template.image_id}: Auto Scaling rolls back to no alias",
            "name an image by its id, ami-…, in a new version of the launch template",
        )
    if image is not None and image.state != "available":
        yield _refused(
            "image-unusable",
            f"the image {image.id} is {image.state}: nothing can be launched from it",
            "calve image list shows those that there are",
        )


def _architecture(facts: Facts) -> Iterator[Problem]:
    image, kind, closure = facts.image, facts.instance_type, facts.closure
    has = "" if image is None else image.architecture
    if has and kind is not None and kind.architectures and has not in kind.architectures:
        yield _refused(
            "architecture",
            f"the image {image.id if image else ''} is for {has}, {kind.name} is"
            f" {' or '.join(kind.architectures)}",
            "another instance type, or an image for this one: calve image build --arch",
        )
    wanted = "" if closure is None else _ARCHITECTURES.get(closure.system, closure.system)
    runs = (has,) if has else () if kind is None else kind.architectures
    if closure is not None and wanted and runs and wanted not in runs:
        yield _refused(
            "architecture",
            f"the closure is for {closure.system}, its machines are {' or '.join(runs)}",
            "build the system for the machines, or take machines for the system",
        )


def _boot_mode(facts: Facts) -> Iterator[Problem]:
    image, kind = facts.image, facts.instance_type
    if image is None or kind is None or not kind.boot_modes:
        return
    wanted = image.boot_mode
    if wanted and wanted != "uefi-preferred" and wanted not in kind.boot_modes:
        yield _refused(
            "boot-mode",
            f"the image {image.id} boots by {wanted}, {kind.name} by {' or '.join(kind.boot_modes)}",
            "take an instance type of the Nitro system, such as t3.nano",
        )


def _kernel(facts: Facts) -> Iterator[Problem]:
    closure = facts.closure
    if facts.fleet.delivery is not Delivery.INITRD or closure is None or closure.boot is None:
        return
    booted = facts.image_boot
    if booted is not None and booted.bootspec is not None:
        made = decide(_running(booted), closure.boot)
        if isinstance(made, Refuse):
            yield _refused("kernel", made.message, "import Calve's NixOS module into the system")
    elif closure.boot.abi is None:
        yield _warned(
            "kernel-unknown",
            "the closure's initrd lacks the agent, so it starts only under its own kernel, and what"
            " kernel the image has is not known",
            "import Calve's NixOS module into the system",
        )


def _running(image: Wanted) -> Running:
    """Return what a machine runs whose image was made of this system."""
    name = "" if image.bootspec is None else image.bootspec.kernel
    kernel = name.removeprefix(f"{STORE_DIR}/").partition("/")[0]
    path = StorePath.from_basename(kernel) if kernel else None
    return Running(image.release, image.abi or PLAIN, path)


def _user_data(facts: Facts) -> Iterator[Problem]:
    if facts.user_data:
        yield _refused(
            "user-data",
            facts.user_data,
            "it is made of the launch template's and of the fleet file's health: 16 KiB at most",
        )


# The group


def _template(facts: Facts) -> Iterator[Problem]:
    group = facts.group
    if group.attributes:
        yield _refused(
            "attribute-based",
            "the group chooses instance types by attributes: a refresh of it takes no desired configuration",
            "name the instance type in the launch template",
        )
    elif group.mixed:
        yield _refused(
            "mixed-instances",
            "the group has a mixed instances policy, and a release's launch template would stand outside it",
            "give the group the launch template itself",
        )
    if group.template_id is None:
        yield _refused(
            "no-launch-template",
            "the group has no launch template",
            "calve adopt needs one: make it from the launch configuration",
        )
    elif not (group.version or "").isdecimal():
        yield _refused(
            "unpinned-version",
            f"the group launches from {group.version}: from it nothing can be rolled back",
            f"calve adopt {facts.fleet.name} puts it on the number that this is now",
        )


def _suspended(facts: Facts) -> Iterator[Problem]:
    found = [name for name in _NEEDED if name in facts.group.suspended]
    if found:
        yield _refused(
            "suspended",
            f"the group's processes {', '.join(found)} are suspended",
            f"aws autoscaling resume-processes --auto-scaling-group-name {shlex.quote(facts.group.name)}",
        )


def _busy(facts: Facts) -> Iterator[Problem]:
    refresh = facts.refresh
    if refresh is not None:
        yield _refused(
            "refresh-active",
            f"another instance refresh of the group is {refresh.status} ({refresh.percent} %)",
            "wait for it (calve watch), or end it: calve cancel, calve rollback",
        )
    if facts.stack is not None and facts.stack[1].endswith("_IN_PROGRESS"):
        name, status = facts.stack
        yield _refused(
            "stack-active",
            f"the CloudFormation stack {name}, which has the group, is {status}",
            "wait until the stack's operation has ended",
        )


def _alarms(facts: Facts) -> Iterator[Problem]:
    states = facts.alarms
    if states is None:
        return
    names = alarms(facts.fleet.rollout, facts.group)
    if len(names) > MOST_ALARMS:
        yield _refused(
            "alarms",
            f"{len(names)} alarms take part in the refresh, and Auto Scaling takes {MOST_ALARMS}",
            "fewer in the fleet file's rollout.alarms, or in the group's tag calve:alarms",
        )
    for name in names:
        state = states.get(name)
        if state is None:
            yield _refused(
                "alarm-missing",
                f"there is no alarm {name} in {facts.region or 'the region'}",
                "the fleet file's rollout.alarms, or the group's tag calve:alarms, names it",
            )
        elif state != "OK":
            yield _refused(
                "alarm-on",
                f"the alarm {name} is in {state}: the refresh would fail at once",
                "put right what it watches, or wait until it has data; or take it out of rollout.alarms",
            )


# How machines are replaced


def _surge(facts: Facts) -> Iterator[Problem]:
    rules, desired = facts.fleet.rollout, facts.group.desired
    if desired == 0:
        yield _warned("no-machines", "the group has no machines: none will prove the release", "")
    elif rules.max_healthy_percent == 100 and desired == 1:
        yield _refused(
            "no-surge",
            "the group's only machine would be ended before another one is there",
            "max-healthy = 200 in the fleet file's rollout",
        )
    elif (rules.min_healthy_percent, rules.max_healthy_percent) == (100, 100):
        yield _warned(
            "no-surge",
            "at most 100 % of the machines may be there, so one at a time is ended before its successor is there",
            "max-healthy above 100 in the fleet file's rollout",
        )


def _addresses(facts: Facts) -> Iterator[Problem]:
    if not facts.subnets or facts.group.desired == 0:
        return
    wanted = surge(facts.group.desired, facts.fleet.rollout)
    more = wanted.most - wanted.machines
    free = sum(one.free_addresses for one in facts.subnets)
    if free < more:
        yield Problem(
            "addresses",
            free == 0,
            f"{more} machines more than now want as many addresses, the subnets have {free}",
            "larger subnets, or a lower max-healthy",
        )


def _health(facts: Facts) -> Iterator[Problem]:
    group, rules = facts.group, facts.fleet.rollout
    if group.target_groups and group.health_check != "ELB":
        yield _warned(
            "health-check",
            f"the group's health check is {group.health_check}: a machine whose application is dead counts as healthy",
            f"aws autoscaling update-auto-scaling-group --auto-scaling-group-name {shlex.quote(group.name)}"
            " --health-check-type ELB",
        )
    # A machine whose launch hook waits until it is healthy needs none.
    held = own_hook(facts.hooks or ()) is not None
    if rules.warmup_s == 0 and group.warmup_s is None and group.desired and not held:
        how = surge(group.desired, rules)
        each_s = WITHIN_S if facts.fleet.health is None else facts.fleet.health.within_s
        yield _warned(
            "warm-up",
            "no warm-up is set, so a machine counts as soon as it is in service; the release takes at most"
            f" {how.batches * each_s + rules.bake_s} s: {how.batches} times {each_s} s, and {rules.bake_s} s of baking",
            "warm-up in the fleet file's rollout",
        )


# The launch hook


def _hooks(facts: Facts) -> Iterator[Problem]:
    for one in facts.hooks or ():
        if one.launching and not one.abandons:
            ours = one.name == HOOK
            yield Problem(
                "hook-continues",
                ours,
                f"the launch hook {one.name} lets machines into service that say nothing"
                " (default result CONTINUE)",
                "its default result has to be ABANDON: calve adopt sets it"
                if ours
                else "ABANDON as its default result, where a machine must not serve without it",
            )


def _reach(facts: Facts) -> Iterator[Problem]:
    held = own_hook(facts.hooks or ()) is not None
    service = f"com.amazonaws.{facts.region}.autoscaling"
    if not held or facts.hook_endpoint or service in (facts.endpoints or ()):
        return
    shut = [one.id for one in facts.subnets or () if one.leads_out is False]
    unsure = [one.id for one in facts.subnets or () if one.leads_out is None]
    hint = f"a route to a NAT gateway, or an interface endpoint {service} in the VPC"
    if shut and facts.endpoints is not None:
        yield _refused(
            "hook-unreachable",
            f"machines in {', '.join(shut)} cannot let go of the launch hook: no route leads out",
            hint,
        )
    elif not facts.subnets or shut or unsure:
        why = (
            f"what {', '.join(shut or unsure)} reaches" if facts.subnets else "the group's subnets"
        )
        yield _warned(
            "hook-unchecked",
            f"whether machines can let go of the launch hook was not checked: {why} is not known",
            hint,
        )


_RULES: Final[tuple[Callable[[Facts], Iterator[Problem]], ...]] = (
    _gaps,
    _template,
    _suspended,
    _busy,
    _image,
    _architecture,
    _boot_mode,
    _closure,
    _kernel,
    _user_data,
    _alarms,
    _surge,
    _addresses,
    _hooks,
    _reach,
    _health,
)
