"""`calve adopt`: a group that is there becomes a fleet. Shows first what it changes; what changes is `infra.adopt`'s.

Each change is one that AWS makes or does not; killed in between and run again, it goes on with those that are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, Final

from calve.cli import common, fleet_options, rolling
from calve.cli.session import Session
from calve.errors import AccessError, CalveError, ConflictError, NotFoundError, UsageError

if TYPE_CHECKING:
    from calve.aws.alarms import Alarms
    from calve.aws.autoscaling import Group
    from calve.aws.ec2 import TemplateVersion
    from calve.aws.profiles import Profiles, Role
    from calve.aws.session import Session as AwsSession
    from calve.aws.types import Bootable, Types
    from calve.cli.fleet_options import Opened
    from calve.infra.adopt import Change, Facts, Wanted, Warned
    from calve.progress import Progress
    from calve.rollout.observe import Gateways

__all__ = ["Sources", "act", "arguments", "gather", "run", "wanted"]

_ALIAS: Final = "resolve:"
_APPLICATION: Final = ":loadbalancer/app/"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    fleet_options.add_fleet(parser)
    parser.add_argument(
        "--group", metavar="NAME", help="the Auto Scaling group (default: the fleet file's)"
    )
    hook = parser.add_mutually_exclusive_group()
    hook.add_argument(
        "--hook",
        action="store_const",
        const=True,
        default=None,
        help="put the launch hook even where it ends machines that are launched before the first deploy",
    )
    hook.add_argument(
        "--no-hook",
        dest="hook",
        action="store_const",
        const=False,
        help="leave the launch hook out: the load balancer alone judges",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    common.add_dry_run(parser)
    common.add_json(parser)


def run(options: argparse.Namespace, session: Session) -> int:
    """Adopt."""
    from calve.infra.adopt import changes, warnings

    with (
        fleet_options.open_fleet(session, options, group=options.group) as there,
        common.listen(session, options) as progress,
    ):
        sources = Sources.of(there.gateways, there.aws)
        name, wants = there.fleet.group, wanted(there, hook=options.hook)
        facts = gather(sources, name, wants)
        found, told = changes(facts), (*warnings(facts), *_of_file(there, name))
        asks = bool(found) and not options.dry_run and not options.yes
        if not options.json:
            _show(session, session.out, found, told, dry_run=options.dry_run)
        elif asks:
            _show(session, session.err, found, told)
        if found and not options.dry_run:
            if asks:
                rolling.confirm(session, f"make {common.plural(len(found), 'change')} to {name}?")
            _make(session, sources, facts, found, progress)
            facts = gather(sources, name, wants)
        _after(options, session, facts, found, told)
    return 0


def wanted(there: Opened, *, hook: bool | None) -> Wanted:
    """Return what the group is to be.

    Args:
        there: the fleet.
        hook: whether it gets the launch hook; None where it has a health check and no machine is lost by it.
    """
    from calve.aws.autoscaling import Hook
    from calve.fleet.config import Delivery
    from calve.fleet.tags import HOOK
    from calve.infra.adopt import Wanted

    fleet = there.fleet
    hooked = fleet.health is not None if hook is None else hook
    return Wanted(
        fleet.name,
        None if fleet.health is None else fleet.health.within_s,
        Hook(HOOK) if hooked else None,
        forced=hook is True,
        pulls=fleet.delivery is Delivery.INITRD,
    )


# Looking


@dataclass(frozen=True, slots=True)
class Sources:
    """The gateways that are asked, and by which the group is changed."""

    gateways: Gateways
    types: Types
    profiles: Profiles
    alarms: Alarms

    @classmethod
    def of(cls, gateways: Gateways, aws: AwsSession) -> Sources:
        """Open those that adoption asks beside a rollout's gateways."""
        from calve.aws.alarms import Alarms
        from calve.aws.profiles import Profiles
        from calve.aws.types import Types

        return cls(gateways, Types(aws), Profiles(aws), Alarms(aws))


def gather(sources: Sources, name: str, wanted: Wanted) -> Facts:
    """Gather the facts about a group.

    Raises:
        NotFoundError: there is no such group.
        ConflictError: an instance refresh of it is under way.
        UsageError: it has no launch template, or is another fleet's.
        AccessError: the caller may not look.
    """
    from calve.infra.adopt import Facts, refuse

    gateways = sources.gateways
    group = gateways.scaling.group(name)
    if group.template_id is None or group.version is None:
        raise UsageError(
            "the group has no launch template",
            place=name,
            hint="make one of its launch configuration, and give the group that",
        )
    newest = gateways.refreshes.newest(name)
    if newest and newest[0].active:
        raise ConflictError(
            f"an instance refresh of the group is {newest[0].status}",
            place=name,
            hint="wait until it has ended: calve watch, or AWS's console",
        )
    live = gateways.ec2.version(group.template_id, group.version)
    facts = Facts(
        wanted,
        group,
        gateways.ec2.template_of(group.template_id),
        live,
        gateways.scaling.hooks(name),
        _image(sources, live),
        _role(sources, live),
        _sick(sources, group),
        group.warm_pool,
        _balanced(sources, group),
    )
    refuse(facts)
    return facts


def _balanced(sources: Sources, group: Group) -> tuple[str, str] | None:
    """Return the first target group that has an Application Load Balancer, and that one."""
    for target_group in sources.gateways.elb.target_groups(group.target_groups):
        for balancer in target_group.balancers:
            if _APPLICATION in balancer:
                return target_group.arn, balancer
    return None


def _image(sources: Sources, live: TemplateVersion) -> Bootable | None:
    if not live.image_id or live.image_id.startswith(_ALIAS):
        return None
    try:
        return sources.types.image(live.image_id)
    except NotFoundError:
        return None


def _role(sources: Sources, live: TemplateVersion) -> Role | None:
    if live.profile is None:
        return None
    try:
        return sources.profiles.role(live.profile)
    except (AccessError, NotFoundError):
        return None


def _sick(sources: Sources, group: Group) -> tuple[str, ...]:
    """Return the machines in service that a balancer's check fails."""
    from calve.rollout.observe import health_of

    serving = {one.id for one in group.instances if one.lifecycle == "InService"}
    health = health_of(sources.gateways.elb, group.target_groups)
    return tuple(sorted(one for one in serving & health.keys() if health[one].state == "unhealthy"))


# Acting


def act(sources: Sources, facts: Facts, change: Change) -> None:
    """Carry one change out; done twice, it is as done once.

    Raises:
        AccessError: the caller may not.
        CalveError: AWS will not have it.
    """
    from calve.fleet.tags import ALARMS_TAG, FLEET_TAG, HOOK_TAG, REPORTS_TAG

    scaling, ec2 = sources.gateways.scaling, sources.gateways.ec2
    name, template, wanted = facts.group.name, facts.template.id, facts.wanted
    match change.code:
        case "group-tag":
            scaling.tag(name, {FLEET_TAG: change.after})
        case "template-tag":
            ec2.tag_template(template, {FLEET_TAG: change.after})
        case "reports-tag":
            scaling.tag(name, {REPORTS_TAG: change.after})
        case "version":
            scaling.set_version(name, template, facts.live.number)
        case "imdsv2":
            number = facts.live.number
            made = ec2.require_tokens(template, number, f"calve adopt: IMDSv2 for {number}")
            scaling.set_version(name, template, made.number)
        case "grace" if wanted.within_s is not None:
            scaling.set_grace(name, wanted.within_s)
        case "health-check":
            scaling.set_checks(name, change.after)
        case "alarm" if facts.balanced is not None:
            sources.alarms.watch_errors(wanted.alarm, *facts.balanced)
            scaling.tag(name, {ALARMS_TAG: change.after})
        case "hook-tag":
            scaling.tag(name, {HOOK_TAG: change.after})
        case "hook" if wanted.hook is not None:
            scaling.put_hook(name, wanted.hook)
        case other:
            raise CalveError("nobody knows how to make this change", place=other)


def _make(
    session: Session,
    sources: Sources,
    facts: Facts,
    found: tuple[Change, ...],
    progress: Progress,
) -> None:
    from calve.progress import Fact

    for change in found:
        session.cancel.check()
        act(sources, facts, change)
        progress(Fact("change", f"done: {change.code}", asdict(change)))


# Saying


def _of_file(there: Opened, name: str) -> Iterable[Warned]:
    from calve.infra.adopt import Warned

    said = there.config.fleets[there.fleet.name].group
    if name != said and not said.startswith("tag:"):
        text = f"the fleet file says that the group is {said}"
        yield Warned("fleet-file", text, f'group = "{name}" in [fleet.{there.fleet.name}]')


def _show(
    session: Session,
    out: IO[str],
    found: tuple[Change, ...],
    told: tuple[Warned, ...],
    *,
    dry_run: bool = False,
) -> None:
    from calve.ui.text import one_line

    for one in found:
        text = f"{one.code}: {one.text} ({one.before or 'nothing'} -> {one.after})"
        print(one_line(text), file=out, flush=True)
    if not found:
        print("nothing is to be done", file=out, flush=True)
    elif dry_run:
        session.prose("this is what would be changed; nothing was")
    for each in told:
        session.prose(one_line(f"warning: {each.message}"))
        if each.hint:
            session.prose(one_line(f"  {each.hint}"))


def _after(
    options: argparse.Namespace,
    session: Session,
    facts: Facts,
    found: tuple[Change, ...],
    told: tuple[Warned, ...],
) -> None:
    """Say what the group's template has to say, and what its machines' role needs."""
    from calve.infra.adopt import advice
    from calve.ui.text import sanitize

    policy = "calve iam show machine"
    if facts.role is not None:
        policy += f" --account {facts.role.arn.split(':')[4]}"
    if options.json:
        session.document(_document(options, facts, found, told, policy))
        return
    session.prose("for what the group was made with, so that it undoes nothing:")
    session.result(sanitize(advice(facts, found)).rstrip("\n"))
    role = "the machines' role" if facts.role is None else f"the role {facts.role.name}"
    session.prose(f"{role} needs the policy that `{policy}` prints")


def _document(
    options: argparse.Namespace,
    facts: Facts,
    found: tuple[Change, ...],
    told: tuple[Warned, ...],
    policy: str,
) -> dict[str, Any]:
    from calve.infra.adopt import advice

    role = facts.role
    return {
        "fleet": facts.wanted.fleet,
        "group": facts.group.name,
        "dry_run": options.dry_run,
        "version": facts.live.number,
        "changes": [asdict(one) for one in found],
        "warnings": [asdict(one) for one in told],
        "advice": advice(facts, found),
        "machine_role": None if role is None else role.arn,
        "machine_policy": policy,
    }
