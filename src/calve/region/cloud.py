"""EC2, Auto Scaling and Elastic Load Balancing at one endpoint, and the one thread that makes them come true.

    with Cloud(machines, balancer) as cloud, Server(cloud.handle) as server:
        cloud.add_image("ami-0123456789abcdef0", "base")
        boto3.client("ec2", endpoint_url=server.url, ...)

Deciding is in `groups`, `refresh` and `targets`. The driver's round is: look (machines, balancer), advance all state
under the lock, perform the effects outside it, wait until something is due. Only the driver changes machines and the
balancer, so what it sees in one round is always what it did in the round before.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from calve.clock import SYSTEM, Clock
from calve.errors import CalveError
from calve.region import awsjson, front, groups, targets
from calve.region import group as parts
from calve.region.access import Call
from calve.region.alarms import Alarms
from calve.region.autoscaling import AutoScaling, Lookups
from calve.region.balancer import tell
from calve.region.consoles import Consoles
from calve.region.ec2 import Ec2, State
from calve.region.ec2_types import InstanceTypes
from calve.region.elb import Elb
from calve.region.group import Group, Rules, World
from calve.region.message import Request, Response
from calve.region.names import activity_uuid
from calve.region.profiles import Profiles
from calve.region.query import Action, Dialect, Params, Service
from calve.region.signature import Refusal
from calve.region.storage import Storage
from calve.region.tags import Tags
from calve.tasks import Group as Threads

if TYPE_CHECKING:
    from types import TracebackType

    from calve.region.api_throttles import ApiThrottles
    from calve.region.balancer import Balancer
    from calve.region.machine import Launch, Machines
    from calve.region.virtual import Step

__all__ = ["Authenticate", "Cloud"]

Authenticate = Callable[[Request, Call], object]
"""Verifies who asks, and that they may: a request and what it asks for; Refusal where not. `Access.check` is one."""


@dataclass(frozen=True, slots=True)
class _Merged:
    """All that speaks one dialect."""

    dialect: Dialect
    actions: dict[str, Action]


class Cloud:
    """The services but S3 and EBS direct. A context manager: leaving it stops the driver and terminates what it launched.

    Args:
        machines: Makes instances; closed by whoever made it, after this.
        balancer: The region's load balancer; likewise.
        clock: Real time; or a virtual one, and `still` instead of entering the cloud itself.
        region: The region's name; requests signed for another are refused.
        rules: What governs groups, `launch_parallelism` among them.
        draining: False cuts deregistered targets off at once, which clients will notice.
        authenticate: Verifies signatures and policies; None looks at the credential's scope only.
        poll_s: How often machines and balancer are looked at while nothing is due.
        seed: Names this region's story; see `names`.
        console_lag_s: GetConsoleOutput shows what a console had said so long ago.
        throttles: How many requests are taken; None for any number.
        storage: Its snapshots and images, closed by whoever made it; None where images are only added.
    """

    def __init__(
        self,
        machines: Machines,
        balancer: Balancer,
        *,
        clock: Clock = SYSTEM,
        region: str = "eu-central-1",
        rules: Rules | None = None,
        draining: bool = True,
        authenticate: Authenticate | None = None,
        poll_s: float = 0.2,
        seed: str = "region",
        console_lag_s: float = 0.0,
        throttles: ApiThrottles | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.region = region
        self._machines = machines
        self._balancer = balancer
        self._clock = clock
        self._rules = rules or Rules()
        self._draining = draining
        self._authenticate = authenticate
        self._throttles = throttles
        self._poll_s = poll_s
        self._seed = seed
        self._origin = clock.now().timestamp() - clock.monotonic()
        self._lock = threading.Lock()
        self._poke = threading.Event()
        self._stopping = False
        self._failure = ""
        self._threads = Threads("region-cloud", limit=1)
        self._requests = 0
        self._refused: dict[str, str] = {}
        zone = f"{region}a"
        self.storage = storage or Storage(region, seed=seed)
        self._consoles = Consoles(machines.console, console_lag_s)
        self.ec2 = Ec2(zone, self._consoles.show, self.storage.images.launch, seed)
        self.elb = Elb(region, self._is_running, balancer.start)
        self.alarms = Alarms(region, self._now)
        self.profiles = Profiles(self._now)
        states = self.alarms.states
        lookups = Lookups(self.ec2.template, self._type_of, self.elb.group, states)
        self.autoscaling = AutoScaling(region, zone, lookups)
        self._services: dict[str, _Merged] = {}
        services: list[Service] = [self.ec2, self.autoscaling, self.elb, self.alarms]
        services += [InstanceTypes(), self.profiles, *self.storage.services]
        services.append(Tags({**self.storage.shelves, "lt": self.ec2.shelf}))
        for one in services:
            known = self._services.setdefault(one.dialect.version, _Merged(one.dialect, {}))
            known.actions.update(one.actions)

    def add_image(self, image_id: str, name: str) -> None:
        """Register an image, so that instances can be launched from it."""
        with self._lock:
            self.storage.images.add(image_id, name, self._now())

    def refuse(self, count: int, message: str = "", zone: str | None = None) -> None:
        """Refuse the next launches for want of capacity, as EC2 words it or as given; 0 takes that back.

        Each is a Failed scaling activity of its group, which tries again.
        """
        with self._lock:
            self.ec2.capacity.refuse(count, message, zone)

    def target_lifecycle(self, instance_id: str) -> str | None:
        """Return where an instance's group wants it, as its metadata says; None where it is in no group.

        `InService` from its launch on, `Terminated` once it is to go, `Standby` (EC2 Auto Scaling User Guide, "Retrieve the
        target lifecycle state through instance metadata").
        """
        with self._lock:
            one = self.autoscaling.instance(instance_id)
        if one is None:
            return None
        if one.lifecycle.leaving:
            return "Terminated"
        return "Standby" if one.lifecycle.aside else "InService"

    def __enter__(self) -> Self:
        self._threads.__enter__()
        self._threads.cancel.on_cancel(self._poke.set)
        self._threads.spawn(self._drive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        self._poke.set()
        try:
            self._threads.__exit__(kind, error, trace)
        finally:
            for instance_id in self.ec2.live():
                self._machines.terminate(instance_id)

    @contextlib.contextmanager
    def still(self, drive: Callable[[Step], Callable[[], None]]) -> Iterator[Self]:
        """Use it without a thread of its own, driven by a virtual clock's waits; terminates what it launched.

        Args:
            drive: The `drive` of the clock that it was made with.
        """
        undo = drive(self.round)
        try:
            yield self
        finally:
            undo()
            for instance_id in self.ec2.live():
                self._machines.terminate(instance_id)

    def _now(self) -> float:
        """Return the time of day in seconds, which never goes back."""
        return self._origin + self._clock.monotonic()

    def _is_running(self, instance_id: str) -> bool:
        one = self.ec2.instances.get(instance_id)
        return one is not None and one.state is State.RUNNING

    def _type_of(self, instance_id: str) -> str:
        one = self.ec2.instances.get(instance_id)
        return one.instance_type if one is not None else "t3.nano"

    # Requests

    def act(self, action: str, form: Mapping[str, Any]) -> None:
        """Perform an action of Auto Scaling for a simulated machine, which sends no request; Refusal as it would be."""
        with self._lock:
            self.autoscaling.actions[action](Params(form), self._now())
        self._poke.set()

    def handle(self, request: Request) -> Response:
        """Answer one request of any of the three services; thread-safe."""
        with self._lock:
            self._requests += 1
            request_id = activity_uuid(self._seed, "request", self._requests)
        dialect = awsjson.CLOUDWATCH if awsjson.speaks(request) else self.ec2.dialect
        try:
            asked = front.read(request)
            service = self._services.get(asked.version)
            if service is None:
                raise front.unknown(asked.action, asked.version)
            dialect = service.dialect
            front.check_scope(request, self.region, dialect.service)
            if self._throttles is not None:
                self._throttles.check(dialect.service, asked.action, asked.form)
            if self._authenticate is not None:
                self._authenticate(request, self._call(service, asked))
            return self._perform(service, asked, request_id)
        except Refusal as refusal:
            return dialect.error(refusal, request_id)
        except CalveError as error:
            return dialect.error(Refusal(500, "InternalFailure", error.message), request_id)

    def _perform(self, service: _Merged, asked: front.Asked, request_id: str) -> Response:
        perform = service.actions.get(asked.action)
        if perform is None:
            raise front.unknown(asked.action, asked.version)
        params = Params(asked.form, service.dialect.validation)
        front.check_dry_run(asked=params.boolean("DryRun"))
        if self._threads.cancel.cancelled:
            raise Refusal(
                500, "InternalFailure", f"The simulated region's driver has failed: {self._failure}"
            )
        with self._lock:
            result = perform(params, self._now())
        self._poke.set()
        return service.dialect.answer(asked.action, result, request_id)

    def _call(self, service: _Merged, asked: front.Asked) -> Call:
        resource = "*"
        if service.dialect is self.autoscaling.dialect:
            with self._lock:
                resource = self.autoscaling.resource(asked.action, asked.form)
        digest = hashlib.sha256(asked.body).hexdigest()
        return Call(service.dialect.service, asked.action, resource, digest)

    # The driver

    def _drive(self) -> None:
        try:
            self._rounds()
        except Exception as error:
            self._failure = str(error)
            raise

    def _rounds(self) -> None:
        while not self._stopping and not self._threads.cancel.cancelled:
            self._poke.clear()
            wake_at = self.round()
            if not self._stopping:
                wait_s = (
                    self._poll_s if wake_at is None else min(self._poll_s, wake_at - self._now())
                )
                self._clock.wait(self._poke, max(0.0, wait_s))

    def round(self) -> float | None:
        """Look, advance, perform; return when to do so again at the latest, None for at the next look."""
        with self._lock:
            live = self.ec2.live()
            registered = {one for group in self.elb.groups.values() for one in group.targets}
        running = {one: self._machines.running(one) for one in live}
        addresses = {one: self._machines.address(one) for one in registered}
        checks = self._balancer.checks() if registered else {}
        with self._lock:
            now = self._now()
            self.ec2.observe(running, now)
            self._consoles.look(running, self.ec2.instances, now)
            wake, doing = self._advance_targets(addresses, checks, now)
            group_wake, launches = self._advance_groups(now)
            endings = [one for one in self.ec2.ending() if running.get(one, True)]
        for effect in doing:
            tell(self._balancer, effect)
        for launch in launches:
            self._launch(launch)
        for instance_id in endings:
            self._machines.terminate(instance_id)
        if endings:
            return now
        return min((time for time in (wake, group_wake) if time is not None), default=None)

    def _advance_targets(
        self,
        addresses: Mapping[str, tuple[str, int] | None],
        checks: Mapping[str, targets.Check],
        now: float,
    ) -> tuple[float | None, list[targets.Effect]]:
        wakes: list[float | None] = []
        doing: list[targets.Effect] = []
        for name, group in self.elb.groups.items():
            seen = {one: targets.Seen(addresses.get(one), checks.get(one)) for one in group.targets}
            step = targets.advance(group, seen, now, draining=self._draining)
            self.elb.groups[name] = step.group
            doing += step.effects
            wakes.append(step.wake_at)
        return min((time for time in wakes if time is not None), default=None), doing

    def _advance_groups(self, now: float) -> tuple[float | None, list[Launch]]:
        wakes: list[float] = []
        launches: list[Launch] = []
        versions = {one.id: (one.default, one.latest) for one in self.ec2.templates.values()}
        for name, group in list(self.autoscaling.groups.items()):
            seen = {one: self._seen(one, group) for one in group.instances}
            step = groups.advance(
                group, World(seen, versions, self.alarms.states), now, self._rules
            )
            self.autoscaling.groups[name] = step.group
            for instance_id in group.instances.keys() - step.group.instances.keys():
                self._refused.pop(instance_id, None)
            launches += self._take(step.group, step.effects, now)
            if step.group.gone:
                del self.autoscaling.groups[name]
            if step.wake_at is not None:
                wakes.append(step.wake_at)
        return min(wakes, default=None), launches

    def _seen(self, instance_id: str, group: Group) -> parts.Seen:
        one = self.ec2.instances.get(instance_id)
        return parts.Seen(
            one.state if one is not None else State.TERMINATED,
            self.elb.state(group.target_groups, instance_id),
            self._refused.get(instance_id),
        )

    def _take(self, group: Group, effects: tuple[parts.Effect, ...], now: float) -> list[Launch]:
        """Take a group's effects into the state of its neighbours; return what is to be started."""
        launches = []
        for effect in effects:
            match effect:
                case parts.Launch(instance_id, spec, zone):
                    tags = {
                        **group.tags,
                        "aws:autoscaling:groupName": group.name,
                        "aws:ec2launchtemplate:id": spec.id,
                        "aws:ec2launchtemplate:version": spec.version,
                    }
                    try:
                        launches.append(self.ec2.launch(instance_id, spec, tags, now, zone or None))
                    except Refusal as refusal:
                        self._refused[instance_id] = refusal.message
                case parts.Register(instance_id, target_group):
                    self.elb.register(target_group, instance_id, now)
                case parts.Deregister(instance_id, target_group):
                    self.elb.deregister(target_group, instance_id, now)
                case parts.Terminate(instance_id):
                    reason = "Server.ScheduledStop: Terminated by Auto Scaling"
                    self.ec2.terminate(instance_id, ("Server.ScheduledStop", reason))
        return launches

    def _launch(self, launch: Launch) -> None:
        try:
            self._machines.launch(launch)
        except CalveError as error:
            with self._lock:
                self.ec2.forget(launch.instance_id)
                self._refused[launch.instance_id] = error.message
