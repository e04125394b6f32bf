"""Gathers what preflight looks at: the group and all that hangs on it, the closure in the cache, what the caller may do.

What the caller may not read, or AWS does not say, becomes a `Gap` and no failure; without the group and the cache
nothing can be said, and their errors are the caller's. Types: `Facts`, `Gap`, `Sources`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from calve.aws.account import Account
from calve.aws.alarms import Alarms
from calve.aws.network import Network
from calve.aws.types import Bootable, Types
from calve.contract.userdata import UserData, UserDataError
from calve.errors import (
    AccessError,
    CalveError,
    CancelledError,
    DamagedError,
    NotFoundError,
    UsageError,
)
from calve.fleet.config import Delivery
from calve.image.ami import CLOSURE
from calve.nix.storepath import StorePath
from calve.rollout import closure as closures
from calve.rollout import start

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calve.aws.autoscaling import Group, Hook
    from calve.aws.ec2 import TemplateVersion
    from calve.aws.network import Subnet
    from calve.aws.refreshes import Refresh
    from calve.aws.session import Session
    from calve.aws.types import InstanceType
    from calve.cache.manifest import Manifest
    from calve.contract.abi import Wanted
    from calve.fleet.config import Fleet
    from calve.fleet.release import Release
    from calve.rollout.closure import Closure
    from calve.rollout.observe import Gateways
    from calve.tasks import Cancel

__all__ = ["ALIAS", "Facts", "Gap", "Sources", "Target", "gather"]

T = TypeVar("T")

ALIAS: Final = "resolve:ssm:"
"""What an image begins with that Systems Manager's parameter store names."""
_STACK: Final = "aws:cloudformation:stack-name"
_PULLED: Final = (Delivery.INITRD, Delivery.USER_DATA_PULL)
_NEWEST: Final = 6


@dataclass(frozen=True, slots=True)
class Gap:
    """What could not be found out.

    Attributes:
        what: for people: "the alarms".
        why: likewise.
        permission: IAM actions that the caller lacks; empty where it is not that.
        needed: a deploy needs them too.
    """

    what: str
    why: str
    permission: str = ""
    needed: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the rules look at; None is not known, and no rule speaks of it.

    Attributes:
        fleet: the fleet file's.
        group: its Auto Scaling group.
        region: where it is.
        template: the version that the group is configured with.
        hooks: the group's.
        refresh: one that is active, and not to this release.
        image: what the release's machines boot.
        instance_type: what they are.
        closure: what they fetch; None too where they fetch none.
        image_boot: how a system wants to be booted whose kernel is the image's.
        user_data: why machines cannot be told what they need; "" where they can.
        hook_endpoint: machines let go of the hook at an address of its own.
        alarms: states of the fleet's alarms by their names; one that does not exist is left out.
        stack: name and status of the CloudFormation stack that the group belongs to.
        subnets: that the group launches into; empty where it names none.
        endpoints: services that the group's VPC reaches by itself.
        gaps: what could not be found out.
    """

    fleet: Fleet
    group: Group
    region: str = ""
    template: TemplateVersion | None = None
    hooks: tuple[Hook, ...] | None = None
    refresh: Refresh | None = None
    image: Bootable | None = None
    instance_type: InstanceType | None = None
    closure: Closure | None = None
    image_boot: Wanted | None = None
    user_data: str = ""
    hook_endpoint: bool = False
    alarms: Mapping[str, str] | None = None
    stack: tuple[str, str] | None = None
    subnets: tuple[Subnet, ...] | None = None
    endpoints: frozenset[str] | None = None
    gaps: tuple[Gap, ...] = ()


@dataclass(frozen=True, slots=True)
class Sources:
    """Where facts come from: a rollout's gateways, and those that only preflight asks."""

    gateways: Gateways
    account: Account
    alarms: Alarms
    network: Network
    types: Types

    @classmethod
    def of(cls, gateways: Gateways, session: Session) -> Sources:
        """Open those that preflight asks beside a rollout's gateways."""
        return cls(gateways, Account(session), Alarms(session), Network(session), Types(session))


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be released, as far as it is known.

    Attributes:
        manifest: of its closure; None looks at the group alone.
        version: of the launch template that it has already.
        image: what its machines boot from now on; None for what they boot already.
        release: as it will be, or nearly so; its user data is tried.
        cache: URL of the binary cache, for machines that know none yet.
        live: the system that machines run now.
    """

    manifest: Manifest | None = None
    version: TemplateVersion | None = None
    image: str | None = None
    release: Release | None = None
    cache: str = ""
    live: StorePath | None = None


def gather(
    sources: Sources, fleet: Fleet, target: Target, *, cancel: Cancel | None = None
) -> Facts:
    """Gather the facts about a fleet and what is to be released on it.

    Args:
        sources: where from.
        fleet: the fleet file's.
        target: what is to be released.
        cancel: stops the look at the closure.

    Raises:
        NotFoundError: there is no such group.
        AccessError: the caller may not describe the group, or read the cache.
        TransientError: AWS or the cache did not answer.
    """
    return _Look(sources, fleet, target, cancel).all()


class _Look:
    """One look; `gaps` has what could not be found out."""

    def __init__(
        self, sources: Sources, fleet: Fleet, target: Target, cancel: Cancel | None
    ) -> None:
        self._sources = sources
        self._fleet = fleet
        self._target = target
        self._cancel = cancel
        self._gaps: list[Gap] = []

    def all(self) -> Facts:
        gateways, fleet = self._sources.gateways, self._fleet
        group = gateways.scaling.group(fleet.group)
        closure = self._closure()
        template = self._template(group)
        image = self._image(template)
        self._permissions(group, template)
        hooks = self._ask("the hooks", lambda: gateways.scaling.hooks(group.name), needed=True)
        subnets = self._subnets(group)
        return Facts(
            fleet=fleet,
            group=group,
            region=self._sources.network.region,
            template=template,
            hooks=hooks,
            refresh=self._refresh(group),
            image=image,
            instance_type=self._instance_type(template),
            closure=closure,
            image_boot=self._image_boot(image),
            user_data=self._user_data(template, group, hooks or ()),
            hook_endpoint=_has_endpoint(template),
            alarms=self._alarms(group),
            stack=self._stack(group),
            subnets=subnets,
            endpoints=self._endpoints(subnets),
            gaps=tuple(self._gaps),
        )

    def _ask(self, what: str, call: Callable[[], T], *, needed: bool = False) -> T | None:
        """Ask; None, and a gap, where there is no answer."""
        try:
            return call()
        except CancelledError:
            raise
        except AccessError as error:
            self._gaps.append(Gap(what, error.message, error.permission, needed))
        except CalveError as error:
            self._gaps.append(Gap(what, str(error)))
        return None

    # What machines get

    def _closure(self) -> Closure | None:
        target = self._target
        if target.manifest is None or self._fleet.delivery not in _PULLED:
            return None
        return closures.look(
            self._sources.gateways.objects,
            target.manifest,
            cancel=self._cancel,
        )

    def _image(self, template: TemplateVersion | None) -> Bootable | None:
        wanted = self._target.image or (None if template is None else template.image_id)
        if not wanted or wanted.startswith(ALIAS):
            return None

        def find() -> Bootable:
            try:
                return self._sources.types.image(wanted)
            except NotFoundError:
                return Bootable(wanted, "missing", "", "")

        return self._ask("the image", find)

    def _image_boot(self, image: Bootable | None) -> Wanted | None:
        """Return how a system boots whose kernel is the image's.

        That is the one that the image was made of; else the live one, where its own initrd lacks the agent.
        """
        if self._fleet.delivery is not Delivery.INITRD:
            return None
        objects = self._sources.gateways.objects
        made_of = _store_path("" if image is None else image.tags.get(CLOSURE, ""))
        if made_of is not None:
            return self._ask("the image's system", partial(closures.boots, objects, made_of))
        live = self._target.live
        if live is None or self._target.image is not None:
            return None
        found = self._ask("the live system", partial(closures.boots, objects, live))
        return found if found is not None and found.abi is None else None

    def _instance_type(self, template: TemplateVersion | None) -> InstanceType | None:
        name = None if template is None else template.instance_type
        if not name:
            return None
        return self._ask("the instance type", lambda: self._sources.types.instance_type(name))

    def _user_data(
        self, template: TemplateVersion | None, group: Group, hooks: tuple[Hook, ...]
    ) -> str:
        """Say why machines cannot be told what they need; "" where they can."""
        target = self._target
        if template is None or target.release is None:
            return ""
        try:
            start.change(target.release, self._fleet, group, hooks, target.cache)(template)
        except UsageError as error:
            return error.message
        return ""

    # The group

    def _template(self, group: Group) -> TemplateVersion | None:
        name, version = group.template_id, group.version
        if name is None or version is None:
            return None
        ec2 = self._sources.gateways.ec2
        return self._ask("the launch template", lambda: ec2.version(name, version), needed=True)

    def _refresh(self, group: Group) -> Refresh | None:
        refreshes, version = self._sources.gateways.refreshes, self._target.version
        found = self._ask(
            "instance refreshes", lambda: refreshes.newest(group.name, _NEWEST), needed=True
        )
        others = (
            one
            for one in found or ()
            if version is None or not one.goes_to(version.template_id, version.number)
        )
        return next((one for one in others if one.active), None)

    def _alarms(self, group: Group) -> Mapping[str, str] | None:
        names = start.alarms(self._fleet.rollout, group)
        if not names:
            return {}
        return self._ask("the alarms", lambda: self._sources.alarms.states(names))

    def _stack(self, group: Group) -> tuple[str, str] | None:
        name = group.tags.get(_STACK)
        if not name:
            return None
        status = self._ask(
            f"the CloudFormation stack {name}", lambda: self._sources.account.stack_status(name)
        )
        return None if status is None else (name, status)

    def _subnets(self, group: Group) -> tuple[Subnet, ...] | None:
        return self._ask("the subnets", lambda: self._sources.network.subnets(group.subnets))

    def _endpoints(self, subnets: tuple[Subnet, ...] | None) -> frozenset[str] | None:
        if not subnets:
            return None
        vpc_id = subnets[0].vpc_id
        return self._ask("the VPC's endpoints", lambda: self._sources.network.endpoints(vpc_id))

    # Permissions

    def _permissions(self, group: Group, template: TemplateVersion | None) -> None:
        """Try what a rollout will do, and ask what it will ask."""
        gateways, account = self._sources.gateways, self._sources.account
        for arn in group.target_groups:
            self._ask("target health", partial(gateways.elb.health, arn), needed=True)
        self._ask(
            "scaling activities",
            lambda: gateways.scaling.activities(group.name, most=1),
            needed=True,
        )
        if template is None:
            return
        name, number = template.template_id, template.number
        self._ask("launching instances", lambda: account.may_launch(name, number), needed=True)
        self._ask(
            "creating launch template versions",
            lambda: account.may_create_version(name, number),
            needed=True,
        )


def _has_endpoint(template: TemplateVersion | None) -> bool:
    """Say whether the live user data names an address for the launch hook."""
    try:
        data = UserData.parse(None if template is None else template.user_data)
    except UserDataError:
        return False
    return data.hook is not None and bool(data.hook.endpoint)


def _store_path(text: str) -> StorePath | None:
    try:
        return StorePath.parse(text) if text else None
    except DamagedError:
        return None
