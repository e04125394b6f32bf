"""The show: a fleet of two takes release 1, then rolls to release 2 under load, new machines before old ones."""

from __future__ import annotations

import contextlib
import importlib.resources
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calve.aws.autoscaling import AutoScaling, Hook, Preferences
from calve.aws.ebs import EbsDirect
from calve.aws.ec2 import Ec2
from calve.aws.elb import Elb
from calve.aws.images import Images
from calve.cache.objects import Objects, open_objects
from calve.cache.push import push
from calve.clock import SYSTEM, Clock
from calve.contract import health as contract
from calve.contract.userdata import Hook as UserHook
from calve.demo import trouble
from calve.demo.load import Load, Tally
from calve.demo.report import Report
from calve.demo.watch import Told, Watcher
from calve.demo.workshop import Workshop
from calve.demo.world import BUCKET, REGION, World
from calve.disk.arch import X86_64
from calve.errors import CalveError, DeadlineError, UsageError
from calve.fleet import release as releases
from calve.fleet.config import Config, Fleet, Health, parse
from calve.fleet.release import Release
from calve.image.base import Base
from calve.image.publish import Publisher
from calve.image.source import StoreSource
from calve.image.start import start_of
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.progress import Note, Progress
from calve.tasks import Cancel, Group
from calve.transport.http import Client
from calve.ui.text import mb

__all__ = ["Play", "fleet_file", "show"]

HOOK: Final = Hook("calve-launch")
"""Holds a machine out of service until its stage 2 finds it healthy; left alone it times out, and the group replaces it."""

_SIZE: Final = 2
_BOOT_S: Final = 300.0
_ROLL_S: Final = 600.0
_POLL_S: Final = 0.5
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
        play.say(f"building two releases of the {play.system} system out of Debian packages")
        systems = [workshop.system(store, play.system, number) for number in (1, 2)]
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
            tally = fleet.play(systems[0], systems[1])
        machines = watcher.machines()
    return Report(tally, machines, play.clock.monotonic() - started, play.system)


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
        self._ec2 = Ec2(world.session)
        self._scaling = AutoScaling(world.session)
        self._elb = Elb(world.session)
        self._health = play.fleet.health or Health(http="/", tcp=None, within_s=int(_BOOT_S))

    def play(self, first: StorePath, second: StorePath) -> Tally:
        """Bring up release 1, roll to release 2 under load; return what clients saw."""
        base = self._images.publish("base", self._store, first)
        seeded = self._images.publish("base-seeded", self._store, first, seeds=(first,))
        one = self._release(first)
        group, template = self._launch(one, base)
        self._until("the first machines answer", _BOOT_S, lambda: self._healthy(group, _SIZE))
        with Load(self._world.balancer.address, parent=self._play.cancel) as load:
            two = self._release(second)
            self._roll(template, two, seeded)
            return load.tally()

    def _release(self, system: StorePath) -> Release:
        """Push a system's closure and write its record."""
        play = self._play
        key = self._workshop.key()
        pushed = push(
            self._store,
            [system],
            self._cache,
            key,
            progress=play.progress,
            cancel=play.cancel,
        )
        release = releases.create(
            self._cache,
            play.fleet.name,
            system=str(system),
            manifest=pushed.manifests[system],
            keys=(key.name,),
            now=play.clock.now(),
        )
        play.say(
            f"release {release.number}: pushed {pushed.new_paths} of {pushed.paths} paths, "
            f"{mb(pushed.compressed_bytes)} for {mb(pushed.nar_bytes)} of NAR"
        )
        return release

    def _user_data(self, release: Release) -> bytes:
        fleet, world = self._play.fleet, self._world
        data = release.user_data(
            (world.machine_cache,),
            health=_checks(self._health),
            hook=UserHook(fleet.group, HOOK.name, world.machine_api) if self._is_held else None,
            reports=world.machine_reports,
        )
        return data.dump()

    @property
    def _is_held(self) -> bool:
        """Say whether a launch hook waits for a machine's own word: the tiny system has nothing that would give it."""
        return self._play.system != "tiny"

    def _launch(self, release: Release, image: str) -> tuple[str, str]:
        """Create the group; return the target group's ARN and the launch template's id."""
        fleet = self._play.fleet
        self._play.say(f"starting {_SIZE} machines on release {release.number}")
        target = self._elb.create_target_group(
            fleet.group, path=self._health.http or "/", delay_s=_DRAIN_S
        )
        template = self._ec2.create_template(
            fleet.name,
            image_id=image,
            instance_type="t3.nano",
            user_data=self._user_data(release),
            description=f"release {release.number}",
        )
        self._scaling.create_group(
            fleet.group,
            template_id=template.id,
            version=1,
            size=(_SIZE, _SIZE, 2 * _SIZE),
            target_groups=[target.arn],
            grace_s=self._health.within_s,
            zones=[f"{REGION}a"],
            hooks=[HOOK] if self._is_held else [],
        )
        return target.arn, template.id

    def _roll(self, template: str, release: Release, image: str) -> None:
        """Replace all machines by such of a release; return when the last old one is gone."""
        self._play.say(f"rolling to release {release.number}: new machines before old ones")
        version = self._ec2.create_version(
            template,
            source=1,
            description=f"release {release.number}",
            user_data=self._user_data(release),
            image_id=image,
        )
        rules = self._play.fleet.rollout
        refresh = self._scaling.start_refresh(
            self._play.fleet.group,
            template_id=template,
            version=version.number,
            preferences=Preferences(rules.min_healthy_percent, rules.max_healthy_percent),
        )
        self._until("the refresh ends", _ROLL_S, lambda: self._rolled(refresh, version.number))

    def _healthy(self, group: str, wanted: int) -> bool:
        healthy = sum(target.state == "healthy" for target in self._elb.health(group))
        if healthy < wanted:
            self._check_machines()
        return healthy >= wanted

    def _rolled(self, refresh_id: str, version: int) -> bool:
        refresh = self._scaling.refresh(self._play.fleet.group, refresh_id)
        if refresh is None or not (refresh.active or refresh.status == "Successful"):
            reason = "" if refresh is None else f"{refresh.status}: {refresh.reason}"
            raise CalveError(f"the instance refresh did not succeed: {reason}")
        self._check_machines()
        members = self._scaling.group(self._play.fleet.group).instances
        return refresh.status == "Successful" and all(
            member.version == str(version) for member in members
        )

    def _check_machines(self) -> None:
        trouble.check_machines(self._world.machines)
        trouble.check_group(self._scaling, self._play.fleet.group)

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
        ebs = EbsDirect(client, REGION, world.operator_credentials, endpoint=world.operator_api)
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


def _checks(health: Health) -> contract.Health:
    """Return what user data says of a fleet file's `health`."""
    return contract.Health(
        http=() if health.http is None else (contract.Http(health.http),),
        tcp=() if health.tcp is None else (health.tcp,),
        within_s=health.within_s,
    )
