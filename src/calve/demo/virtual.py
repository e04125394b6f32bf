"""A fleet that exists nowhere, on a virtual clock: hours of releases in seconds, against the region over real HTTP.

    with endpoint() as one, VirtualFleet(directory, one) as fleet:
        fleet.scripts[2] = lambda launch: fails("signature", "no signature", 15.0)
        verdict = fleet.rollout(fleet.release(2)).run()

For tests, benchmarks and rehearsals: the region and the operator are the real ones, only machines are scripts.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from calve.aws.autoscaling import AutoScaling
from calve.aws.ec2 import Ec2
from calve.aws.elb import Check, Elb
from calve.aws.refreshes import Refreshes
from calve.aws.session import Session
from calve.cache.directory import DirectoryObjects
from calve.contract.userdata import UserData
from calve.demo.group import CHECK, Place, create
from calve.errors import DeadlineError
from calve.fleet import release as releases
from calve.fleet.config import Delivery, Fleet, Health
from calve.fleet.config import Rollout as Bounds
from calve.fleet.release import Content, Release
from calve.progress import Event, Fact
from calve.region.api_throttles import ApiThrottles
from calve.region.cloud import Cloud
from calve.region.group import Rules as RegionRules
from calve.region.machine import Launch
from calve.region.message import Request, Response
from calve.region.scripted import ScriptedMachines
from calve.region.scripted_balancer import ScriptedBalancer
from calve.region.scripts import Script, good
from calve.region.server import Server
from calve.region.virtual import VirtualClock
from calve.rollout import start
from calve.rollout.judge import Rules
from calve.rollout.observe import Gateways
from calve.rollout.run import Host, Rollout, Settings
from calve.tasks import Cancel
from calve.transport.credentials import Credentials

__all__ = ["CACHE", "IMAGE", "NAME", "Endpoint", "VirtualFleet", "Wanted", "endpoint"]

NAME: Final = "web"
IMAGE: Final = "ami-0123456789abcdef0"
CACHE: Final = "s3://acme?region=eu-central-1"
_REGION: Final = "eu-central-1"
_SYSTEM: Final = "/nix/store/{}-nixos-system-web-{}"
_REPORTS: Final = "boot-reports/AROA1"
_LIFE_S: Final = 3600.0


class Endpoint:
    """One server and one set of boto3 clients for all regions that are made, one after the other."""

    def __init__(self, owner: contextlib.ExitStack) -> None:
        self.cloud: Cloud | None = None
        self.server = owner.enter_context(Server(self._handle))
        self.session = Session(_REGION, self.server.url, credentials=Credentials("AK", "SK"))
        self.scaling = AutoScaling(self.session)
        self.refreshes = Refreshes(self.session)
        self.ec2 = Ec2(self.session)
        self.elb = Elb(self.session)
        for one in (self.scaling, self.refreshes, self.ec2, self.elb):
            owner.callback(one._client.close)  # noqa: SLF001

    def _handle(self, request: Request) -> Response:
        if self.cloud is None:
            return Response(503)
        return self.cloud.handle(request)


@contextlib.contextmanager
def endpoint() -> Iterator[Endpoint]:
    """Serve while the block lasts."""
    with contextlib.ExitStack() as owner:
        yield Endpoint(owner)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the fleet is.

    Attributes:
        size: least, desired and most machines.
        hook: a launch hook waits for a machine's own word.
        console_lag_s: how long ago what EC2 shows of a console was said.
        report_lag_s: how long it takes until a report can be read.
        throttled: the API takes as many requests as AWS does.
        grace_s: so long a new machine's failing checks do not count.
        check: the balancer's.
    """

    size: tuple[int, int, int] = (2, 2, 4)
    hook: bool = True
    console_lag_s: float = 0.0
    report_lag_s: float = 0.0
    throttled: bool = False
    grace_s: int = 60
    check: Check = CHECK


class VirtualFleet:
    """One group with its operator; in service, on release 1, once the block begins.

    Args:
        directory: where the records of releases lie.
        endpoint: serves it.
        wanted: what it is.

    Attributes:
        scripts: what a machine of a release does, by its number.
        facts: what rollouts told.
    """

    def __init__(self, directory: Path, endpoint: Endpoint, wanted: Wanted | None = None) -> None:
        self.wanted = wanted or Wanted()
        self.clock = VirtualClock(dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC))
        self.scripts: dict[int, Callable[[Launch], Script]] = {1: lambda _launch: good(20.0)}
        self.facts: list[Event] = []
        self.fleet = Fleet(
            NAME,
            "./result",
            Delivery.INITRD,
            NAME,
            Health("/healthz", None, 60),
            Bounds(100, 200, 0),
        )
        self.objects = DirectoryObjects(directory)
        self.session = endpoint.session
        self.gateways = Gateways(
            endpoint.scaling, endpoint.refreshes, endpoint.ec2, endpoint.elb, self.objects
        )
        self.machines = ScriptedMachines(self.clock, self._script, report=self._report)
        self.cloud = Cloud(
            self.machines,
            ScriptedBalancer(self.clock, self.machines),
            clock=self.clock,
            rules=RegionRules(launch_parallelism=None),
            console_lag_s=self.wanted.console_lag_s,
            throttles=ApiThrottles(self.clock) if self.wanted.throttled else None,
        )
        self._endpoint = endpoint
        self._late: list[tuple[float, str, bytes]] = []
        self._owner = contextlib.ExitStack()
        self.template = ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as owner:
            owner.callback(self.machines.close)
            owner.enter_context(self.cloud.still(self.clock.drive))
            owner.callback(self.clock.drive(self._deliver))
            self.machines.connect(self.cloud.act)
            self.cloud.add_image(IMAGE, "base")
            self._endpoint.cloud = self.cloud
            self._create()
            self._owner = owner.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner.close()

    # Machines

    def _script(self, launch: Launch) -> Script:
        return self.scripts[UserData.parse(launch.user_data).release](launch)

    def _report(self, instance_id: str, user_data: bytes, text: str) -> None:
        key = UserData.parse(user_data).report_key(instance_id)
        at = self.clock.monotonic() + self.wanted.report_lag_s
        self._late.append((at, key, text.encode()))

    def _deliver(self) -> float | None:
        now = self.clock.monotonic()
        due = [one for one in self._late if one[0] <= now]
        self._late = [one for one in self._late if one[0] > now]
        for _, key, text in due:
            self.objects.put(key, text)
        return min((one[0] for one in self._late), default=None)

    # The group

    def _create(self) -> None:
        wanted = self.wanted
        place = Place(
            CACHE,
            _REPORTS,
            IMAGE,
            f"{_REGION}a",
            wanted.size,
            held=wanted.hook,
            grace_s=wanted.grace_s,
            check=wanted.check,
        )
        made = create(self.gateways, self.fleet, _content(1), place, now=self.clock.now())
        self.template = made.template
        self.until(lambda: self.serving() == wanted.size[1])

    def healthy(self) -> int:
        """Return how many machines the balancer finds healthy, as AWS says."""
        (arn,) = self.gateways.scaling.group(NAME).target_groups
        return sum(one.state == "healthy" for one in self.gateways.elb.health(arn))

    def serving(self) -> int:
        """Return the same without a request."""
        (group,) = self.cloud.elb.groups.values()
        return sum(one.state == "healthy" for one in group.targets.values())

    def versions(self) -> list[str]:
        """Return the launch template versions of the group's machines, sorted."""
        members = self.gateways.scaling.group(NAME).instances
        return sorted(one.version or "" for one in members)

    def until(self, done: Callable[[], bool], *, within_s: float = _LIFE_S) -> None:
        """Let time pass until something is so; DeadlineError where it does not come to that."""
        end, cancel = self.clock.monotonic() + within_s, Cancel()
        while not done():
            if self.clock.monotonic() >= end:
                raise DeadlineError(f"it did not come to that within {within_s:.0f} s")
            cancel.wait(1.0, self.clock)

    # Releases

    def release(self, number: int) -> Release:
        """Write the next release's record."""
        return releases.create(self.objects, NAME, _content(number), now=self.clock.now())

    def rollout(
        self,
        release: Release,
        *,
        by: str = "cli",
        may_start: bool = True,
        rules: Rules | None = None,
    ) -> Rollout:
        """Return the rollout of a release, as `calve deploy` would run it; as a guard would without `may_start`."""
        group = self.gateways.scaling.group(NAME)
        hooks = self.gateways.scaling.hooks(NAME)
        settings = Settings(
            start.preferences(self.fleet.rollout, group),
            rules or start.rules(self.fleet),
            start.change(release, self.fleet, group, hooks, CACHE) if may_start else None,
        )
        return Rollout(release, NAME, self.gateways, settings, replace(self.host, by=by))

    @property
    def host(self) -> Host:
        """Return who runs rollouts here."""
        return Host(progress=self.facts.append, clock=self.clock)

    def said(self, kind: str) -> list[Fact]:
        """Return the facts of a kind that rollouts told."""
        return [one for one in self.facts if isinstance(one, Fact) and one.kind == kind]


def _content(number: int) -> Content:
    system = _SYSTEM.format("a" * 31 + str(number % 10), number)
    return Content(system, f"{number:064x}", ("acme-1",))
