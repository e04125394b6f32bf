"""The show: a fleet of two takes release 1, and rolls to release 2 under load, new machines before old ones.

Then come a release that cannot boot and one that answers 500: both are taken back by themselves. Then release 1 again.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from calve.aws.ebs import EbsDirect
from calve.aws.images import Images
from calve.cache.objects import Objects, open_objects
from calve.cache.push import push
from calve.clock import SYSTEM, Clock
from calve.demo import trouble
from calve.demo.group import Place, create
from calve.demo.load import Load, Tally
from calve.demo.report import Act, Report
from calve.demo.system import Flaw
from calve.demo.watch import Told, Watcher
from calve.demo.workshop import Workshop
from calve.demo.world import BUCKET, REGION, World
from calve.disk.arch import X86_64
from calve.errors import CalveError, DeadlineError, UsageError
from calve.fleet import ends
from calve.fleet.config import Config, Fleet, Health, parse
from calve.fleet.release import Content
from calve.fleet.verdict import Outcome, Verdict
from calve.image.base import Base
from calve.image.publish import Publisher
from calve.image.source import StoreSource
from calve.image.start import start_of
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.progress import Note, Progress
from calve.rollout.deploy import begun
from calve.rollout.observe import Gateways
from calve.rollout.run import Host
from calve.tasks import Cancel, Group
from calve.transport.http import Client
from calve.ui.text import mb

__all__ = ["Play", "fleet_file", "show"]

_SIZE: Final = 2
_BOOT_S: Final = 300.0
_GRACE_S: Final = 300
_WITHIN_S: Final = 90
_BAKE_S: Final = 5
_POLL_S: Final = 1.0
_DRAIN_S: Final = 10


@dataclass(frozen=True, slots=True)
class Play:
    """What is played.

    Attributes:
        directory: where everything is kept.
        config: the fleet file; its first fleet is played.
        system: "webserver" or "tiny".
        progress: told of steps.
        told: told of machines.
        cancel: ends it.
    """

    directory: Path
    config: Config
    progress: Progress
    told: Told
    cancel: Cancel
    system: str = "webserver"
    clock: Clock = SYSTEM

    @property
    def fleet(self) -> Fleet:
        """Return the fleet that is played."""
        return next(iter(self.config.fleets.values()))

    def say(self, text: str) -> None:
        """Tell of the next step."""
        self.progress(Note(text))


def fleet_file() -> Config:
    """Return the demo's fleet file, `examples/webserver/calve.toml`.

    Raises:
        UsageError: it is not of the simulated region's bucket.
    """
    path = Path(str(importlib.resources.files("calve.demo") / "data" / "calve.toml"))
    config = parse(path.read_text(encoding="utf-8"), path)
    expected = f"s3://{BUCKET}?region={REGION}"
    if config.cache is None or config.cache.url != expected or not config.fleets:
        raise UsageError(
            f"the demo's fleet file must have a fleet, and the cache {expected}", place=path
        )
    return config


def show(play: Play) -> Report:
    """Play it; whatever was started has ended on return, whichever way."""
    started = play.clock.monotonic()
    trouble.check_programs()
    workshop = Workshop(play.directory, progress=play.progress, cancel=play.cancel)
    with trouble.throwaway(play.directory), contextlib.ExitStack() as owner:
        work = owner.enter_context(workshop.run())
        store = owner.enter_context(workshop.store())
        store.clean()
        play.say(f"building releases of the {play.system} system out of Debian packages")
        systems = _systems(workshop, store, play.system)
        initrd = workshop.initrd()
        play.say("starting the simulated region: S3, EC2, Auto Scaling, load balancer")
        world = owner.enter_context(World(work, group=play.fleet.group))
        client = Client(context=None, cancel=play.cancel)
        owner.callback(client.close)
        cache = open_objects(world.operator_cache, client, world.operator_credentials)
        fleet = _Fleet(
            play, workshop, world, store, cache, _Images(play, world, client, work, initrd)
        )
        watcher = Watcher(world.machines, play.told, play.clock)
        with _watching(watcher, play.cancel):
            tally = fleet.play(systems)
        machines = watcher.machines()
    return Report(tally, machines, play.clock.monotonic() - started, play.system, tuple(fleet.acts))


@dataclass(frozen=True, slots=True)
class Systems:
    """What is released: two good ones, bad ones with their flaws; `back` where the first one comes again."""

    first: StorePath
    second: StorePath
    bad: tuple[tuple[Flaw, StorePath], ...]
    back: bool


def _systems(workshop: Workshop, store: LocalStore, name: str) -> Systems:
    """Build them; the tiny system cannot answer 500, and is for a short show."""
    flaws = (Flaw.NO_INIT,) if name == "tiny" else tuple(Flaw)
    bad = [
        (flaw, workshop.system(store, name, number, flaw=flaw))
        for number, flaw in enumerate(flaws, 3)
    ]
    first, second = (workshop.system(store, name, number) for number in (1, 2))
    return Systems(first, second, tuple(bad), back=name != "tiny")


def _scaled(fleet: Fleet) -> Fleet:
    """Return the fleet with a show's patience: minutes of a cloud are seconds here."""
    health = fleet.health or Health(http="/", tcp=None, within_s=_WITHIN_S)
    return replace(
        fleet,
        health=replace(health, within_s=_WITHIN_S),
        rollout=replace(fleet.rollout, bake_s=_BAKE_S),
    )


@contextlib.contextmanager
def _watching(watcher: Watcher, cancel: Cancel) -> Iterator[None]:
    stop = threading.Event()
    with Group("watch", limit=1, parent=cancel) as group:
        group.spawn(watcher.run, group.cancel, stop)
        try:
            yield
        finally:
            stop.set()


class _Fleet:
    """The operator's part: push, release, group, refresh; through boto3, as on AWS."""

    def __init__(
        self,
        play: Play,
        workshop: Workshop,
        world: World,
        store: LocalStore,
        cache: Objects,
        images: _Images,
    ) -> None:
        self._play = play
        self._workshop = workshop
        self._world = world
        self._store = store
        self._cache = cache
        self._images = images
        self._gateways = Gateways.of(world.session, cache)
        self._fleet = _scaled(play.fleet)
        self.acts: list[Act] = []

    def play(self, systems: Systems) -> Tally:
        """Bring up release 1, then release under load: a good one, bad ones, and the first one again."""
        play = self._play
        base = self._images.publish("base", self._store, systems.first)
        seeded = self._images.publish(
            "base-seeded", self._store, systems.first, seeds=(systems.first,)
        )
        target = self._begin(self._push(systems.first), base)
        self._until("the first machines answer", _BOOT_S, lambda: self._healthy(target, _SIZE))
        self._went_well(1)
        with Load(self._world.balancer.address, parent=play.cancel) as load:
            second = self._push(systems.second)
            self._release(replace(second, image=seeded), "a good release", Outcome.RELEASED)
            for flaw, system in systems.bad:
                play.say(f"and now a bad one: {flaw.value}")
                self._release(
                    replace(self._push(system), image=seeded), flaw.value, Outcome.ROLLED_BACK
                )
            if systems.back:
                again = replace(self._push(systems.first), repeats=1, image=seeded)
                self._release(again, "release 1 again: calve rollback", Outcome.RELEASED)
            return load.tally()

    def _push(self, system: StorePath) -> Content:
        """Push a system's closure."""
        play = self._play
        key = self._workshop.key()
        pushed = push(
            self._store, [system], self._cache, key, progress=play.progress, cancel=play.cancel
        )
        play.say(
            f"pushed {pushed.new_paths} of {pushed.paths} paths, "
            f"{mb(pushed.compressed_bytes)} for {mb(pushed.nar_bytes)} of NAR"
        )
        return Content(str(system), pushed.manifests[system], (key.name,))

    def _release(self, content: Content, what: str, expected: Outcome) -> None:
        """Put a closure on the fleet as `calve deploy` does, and see that it ends as it should."""
        play, started = self._play, self._play.clock.monotonic()
        host = Host(progress=play.progress, cancel=play.cancel, clock=play.clock, poll_s=_POLL_S)
        with begun(content, self._fleet, self._gateways, host, cache="") as rollout:
            play.say(f"release {rollout.release.number}: {what}")
            verdict = rollout.run()
        if verdict is None:
            raise CalveError("the rollout was left")
        reason = "" if verdict.reason is None else verdict.reason.text
        took_s = play.clock.monotonic() - started
        self.acts.append(Act(verdict.release, what, verdict.outcome.value, reason, took_s))
        if verdict.outcome is not expected:
            raise CalveError(
                f"release {verdict.release} should be {expected.value}, and is {verdict.outcome.value}:"
                f" {reason or 'nobody says why'}"
            )

    def _went_well(self, number: int) -> None:
        """Say of the release that the group began with that it is live."""
        now = self._play.clock.now()
        name = self._fleet.name
        ends.write(self._cache, Verdict(name, number, Outcome.RELEASED, "", "operator", now))

    @property
    def _is_held(self) -> bool:
        """Say whether a launch hook waits for a machine's own word: the tiny system has nothing that would give it."""
        return self._play.system != "tiny"

    def _begin(self, content: Content, image: str) -> str:
        """Create the group on release 1; return the target group's ARN."""
        world = self._world
        self._play.say(f"starting {_SIZE} machines on release 1")
        place = Place(
            world.machine_cache,
            world.machine_reports,
            image,
            f"{REGION}a",
            (_SIZE, _SIZE, 2 * _SIZE),
            self._is_held,
            world.machine_api,
            _GRACE_S,
            _DRAIN_S,
        )
        made = create(self._gateways, self._fleet, content, place, now=self._play.clock.now())
        return made.target_group

    def _healthy(self, group: str, wanted: int) -> bool:
        healthy = sum(target.state == "healthy" for target in self._gateways.elb.health(group))
        if healthy < wanted:
            self._check_machines()
        return healthy >= wanted

    def _check_machines(self) -> None:
        trouble.check_machines(self._world.machines)
        trouble.check_group(self._gateways.scaling, self._fleet.group)

    def _until(self, what: str, within_s: float, done: Callable[[], bool]) -> None:
        clock = self._play.clock
        end = clock.monotonic() + within_s
        while not done():
            if clock.monotonic() > end:
                last = trouble.consoles(self._world.machines)
                raise DeadlineError(
                    f"waited {within_s:.0f} s until {what}; last on the consoles: {last}"
                )
            self._play.cancel.wait(_POLL_S)


class _Images:
    """Builds images and makes AMIs of them: what machines boot, by UEFI, from their snapshots."""

    def __init__(self, play: Play, world: World, client: Client, work: Path, initrd: Path) -> None:
        self._play = play
        self._work = work
        self._initrd = initrd
        ebs = EbsDirect(client, REGION, world.operator_credentials, endpoint=world.api.url)
        self._publisher = Publisher(
            REGION, ebs, Images(world.session), play.progress, play.cancel, play.clock
        )

    def publish(
        self, line: str, store: LocalStore, system: StorePath, seeds: tuple[StorePath, ...] = ()
    ) -> str:
        """Build a base image with a system's kernel, write and verify its snapshot, register it; return its id."""
        play = self._play
        source = StoreSource(store, cancel=play.cancel)
        out = self._work / line
        out.mkdir()
        start = start_of(source, system, out, initrd=self._initrd)
        built = Base(line, X86_64, start, source, seeds).build(out, cancel=play.cancel)
        published = self._publisher.publish(built, deep=True)
        count = published.snapshot.requests
        play.say(
            f"image {line}: {published.image}, {count} blocks in {published.snapshot.id}, all read back"
        )
        return published.image
