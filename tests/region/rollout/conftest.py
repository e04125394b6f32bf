"""A fleet on a virtual clock: the simulated region with scripted machines, boto3 over HTTP, records in a directory."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools

import pytest

from calve.aws.autoscaling import AutoScaling, Hook
from calve.aws.ec2 import Ec2
from calve.aws.elb import Elb
from calve.aws.refreshes import Refreshes
from calve.aws.session import Session
from calve.cache.directory import DirectoryObjects
from calve.contract.userdata import Hook as UserHook
from calve.contract.userdata import UserData
from calve.fleet import release as releases
from calve.fleet.config import Delivery, Fleet, Health
from calve.fleet.config import Rollout as Bounds
from calve.region.cloud import Cloud
from calve.region.group import Rules as RegionRules
from calve.region.scripted import ScriptedMachines
from calve.region.scripted_balancer import ScriptedBalancer
from calve.region.scripts import good
from calve.region.server import Server
from calve.region.virtual import VirtualClock
from calve.rollout import start
from calve.rollout.observe import Gateways
from calve.rollout.run import Host, Rollout, Settings, description
from calve.tasks import Cancel
from calve.transport.credentials import Credentials

REGION = "eu-central-1"
IMAGE = "ami-0123456789abcdef0"
SYSTEM = "/nix/store/{}-nixos-system-web-{}"
REPORTS = "boot-reports/AROA1"
CACHE = "s3://acme?region=eu-central-1"


class Endpoint:
    """One server and one set of boto3 clients for all regions that a test makes, one after the other."""

    def __init__(self, owner):
        self.cloud = None
        self.server = owner.enter_context(Server(self._handle))
        self.session = Session(REGION, self.server.url, credentials=Credentials("AK", "SK"))
        kinds = (AutoScaling, Refreshes, Ec2, Elb)
        self.gateways = [kind(self.session) for kind in kinds]
        for one in self.gateways:
            owner.callback(one._client.close)

    def _handle(self, request):
        return self.cloud.handle(request)


class Place:
    """One group, its operator, and what its machines will do: `scripts[release](launch)`."""

    def __init__(self, directory, endpoint, owner, *, size, cloud_options, hook):
        self.clock = VirtualClock(dt.datetime(2026, 1, 1, 12, tzinfo=dt.UTC))
        self.scripts = {1: lambda _launch: good(20.0)}
        self.machines = ScriptedMachines(self.clock, self._script, report=self._report)
        owner.callback(self.machines.close)
        balancer = ScriptedBalancer(self.clock, self.machines)
        self.cloud = owner.enter_context(
            Cloud(
                self.machines,
                balancer,
                clock=self.clock,
                rules=RegionRules(launch_parallelism=None),
                **cloud_options,
            ).still(self.clock.drive)
        )
        self.machines.connect(self.cloud.act)
        self.cloud.add_image(IMAGE, "base")
        endpoint.cloud = self.cloud
        self.objects = DirectoryObjects(directory)
        self.session = endpoint.session
        self.gateways = Gateways(*endpoint.gateways, self.objects)
        self.fleet = Fleet(
            "web",
            "./result",
            Delivery.INITRD,
            "web",
            Health("/healthz", None, 60),
            Bounds(100, 200, 0),
        )
        self.facts = []
        self._create(size, hook=hook)

    def _script(self, launch):
        number = UserData.parse(launch.user_data).release
        return self.scripts[number](launch)

    def _report(self, instance_id, user_data, text):
        key = UserData.parse(user_data).report_key(instance_id)
        self.objects.put(key, text.encode())

    def _create(self, size, *, hook):
        first = self.release(1)
        arn = self.gateways.elb.create_target_group("web", path="/healthz", delay_s=5).arn
        data = first.user_data(
            (CACHE,),
            health=start.checks(self.fleet.health),
            hook=UserHook("web", start.HOOK) if hook else None,
            reports=REPORTS,
        )
        template = self.gateways.ec2.create_template(
            "web",
            image_id=IMAGE,
            instance_type="t3.nano",
            user_data=data.dump(),
            description=description(first),
        )
        self.template = template.id
        self.gateways.scaling.create_group(
            "web",
            template_id=template.id,
            version=1,
            size=size,
            target_groups=[arn],
            grace_s=60,
            hooks=[Hook(start.HOOK)] if hook else [],
        )
        self.until(lambda: self.healthy() == size[1])

    def healthy(self):
        (arn,) = self.gateways.scaling.group("web").target_groups
        return sum(one.state == "healthy" for one in self.gateways.elb.health(arn))

    def serving(self):
        """Count the machines that the balancer gives requests, without a call."""
        (group,) = self.cloud.elb.groups.values()
        return sum(one.state == "healthy" for one in group.targets.values())

    def until(self, done, *, within_s=3600):
        end = self.clock.monotonic() + within_s
        cancel = Cancel()
        while not done():
            assert self.clock.monotonic() < end, "it never came to that"
            cancel.wait(1.0, self.clock)

    def release(self, number):
        return releases.create(
            self.objects,
            "web",
            system=SYSTEM.format("a" * 31 + str(number % 10), number),
            manifest=f"{number:064x}",
            keys=("acme-1",),
            now=self.clock.now(),
        )

    def rollout(self, release, *, by="cli", may_start=True, poll_s=5.0, rules=None, **changes):
        group = self.gateways.scaling.group("web")
        hooks = self.gateways.scaling.hooks("web")
        settings = Settings(
            start.preferences(self.fleet.rollout, group),
            rules or start.rules(self.fleet),
            start.change(release, self.fleet, group, hooks, CACHE) if may_start else None,
        )
        host = Host(by=by, progress=self.facts.append, clock=self.clock, poll_s=poll_s, **changes)
        return Rollout(release, "web", self.gateways, settings, host)

    def versions(self):
        members = self.gateways.scaling.group("web").instances
        return sorted(one.version for one in members)

    def said(self, kind):
        return [one for one in self.facts if getattr(one, "kind", "") == kind]


@pytest.fixture
def fleets(tmp_path):
    """Return what makes a new fleet, as a context manager, as often as one likes."""
    count = itertools.count()
    with contextlib.ExitStack() as whole:
        endpoint = Endpoint(whole)

        @contextlib.contextmanager
        def make(**options):
            size, hook = options.pop("size", (2, 2, 4)), options.pop("hook", True)
            with contextlib.ExitStack() as owner:
                directory = tmp_path / f"bucket-{next(count)}"
                yield Place(directory, endpoint, owner, size=size, cloud_options=options, hook=hook)

        yield make


@pytest.fixture
def place(request, fleets):
    with fleets(**getattr(request, "param", {})) as made:
        yield made
