"""The power is cut while a machine pulls: whatever its disk kept, what a list vouches for is whole.

Two boots are recorded, of an empty disk and of the update that follows; every cut is made from the records. A few
disks are booted again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from unittest import mock

import pytest

from calve.boot.policy import Policy
from calve.boot.record import Record
from calve.boot.store import BootStore
from calve.demo.imports import Importer, temporary
from calve.demo.packages import Packages
from calve.demo.system import Boot, System, add_toplevel, render, text
from calve.demo.tiny import add_packages, one
from calve.demo.www import add_www
from calve.disk import ext4, initrd, payload
from calve.errors import CalveError
from calve.nix import nar, narwriter, registration
from calve.nix.storepath import StorePath
from calve.process import which

_spec = importlib.util.spec_from_file_location("powercut", Path(__file__).with_name("powercut.py"))
powercut = importlib.util.module_from_spec(_spec)
sys.modules["powercut"] = powercut
_spec.loader.exec_module(powercut)

SEED = int(os.environ.get("CALVE_TEST_SEED", "20"))
CUTS = 80
DISK_BYTES = 128 << 20
PARTS = 40
PHASES = ["pull", "published", "recorded", "registered", "flipped"]
# The pull flushes every 128 MB: here it does so more often, so that a small system has cuts between its flushes.
FLUSHES_OFTEN = {"calve.cache.pull": ("_FLUSH_BYTES = 128 << 20", "_FLUSH_BYTES = 2 << 20")}
# The agent without the flush that goes ahead of the names.
FORGETS = {
    "calve.boot.store": (
        "        self._staging.sync()\n        for info in batch:",
        "        for info in batch:",
    )
}


# What is recorded


def build(store, packages: Packages, kernel, release):
    """Build a release of the tiny system with many small paths, a quarter of which each release changes."""
    importer = Importer(store)
    busybox = one(add_packages(importer, packages, ["busybox-static"]), "busybox-static")
    links = {"sw": busybox, "www": add_www(importer, release)}
    with temporary(store) as work:
        etc = work / "etc"
        etc.mkdir()
        (etc / "inittab").write_text(render("tiny/inittab", busybox=busybox))
        (etc / "httpd.conf").write_text(text("tiny/httpd.conf"))
        links["etc"] = importer.add(etc, "etc-tiny", [busybox])
        for number in range(PARTS):
            changes = number % 4 == 0
            tree = work / f"part-{number}"
            part(tree, random.Random(number + 100 * release if changes else number))
            before = [links[f"part-{number - 1}"]] if number % 4 > 1 else []
            links[f"part-{number}"] = importer.add(tree, f"part-{number}", before)
    system = System(name="parts", release=release, links=links)
    script = render("tiny/init.sh", busybox=busybox, system=system.toplevel, label=system.label)
    top = add_toplevel(importer, system, script, Boot(kernel, None))
    importer.flush()
    return top


def part(tree, rng):
    tree.mkdir()
    for number in range(rng.randint(1, 12)):
        size = rng.choice([0, 100, 5_000, 60_000, 200_000])
        (tree / f"f{number}").write_bytes(rng.randbytes(size))
    (tree / "link").symlink_to("f0")
    (tree / "bin").mkdir()
    (tree / "bin" / "run").write_text("#!/bin/sh\n")
    (tree / "bin" / "run").chmod(0o755)


def make_initrd(workshop, path, changes):
    """Write an initrd whose agent has changed sources."""
    agent = payload.build()
    modules = []
    for module in agent.modules:
        if module.name in changes:
            old, new = changes[module.name]
            source = module.origin.read_text()
            assert source.count(old) == 1, module.name
            changed = path.with_name(f"{path.name}.{module.name}.py")
            changed.write_text(source.replace(old, new))
            modules.append(dataclasses.replace(module, origin=changed))
        else:
            modules.append(module)
    spec = initrd.Initrd(
        busybox=Path(which("busybox", package="busybox-static")),
        kernel_modules=workshop.kernel().modules,
        agent=dataclasses.replace(agent, modules=tuple(modules)),
        policy=Policy(keys=(workshop.key().public.dump(),), hold_s=1).dump(),
    )
    initrd.write(spec, path, level=3)
    return path


@dataclasses.dataclass
class Recording:
    """A boot whose writes were logged."""

    base: Path
    log: powercut.WriteLog
    before: StorePath | None
    system: StorePath
    end: Path


class Bench:
    """Systems, a disk, an initrd; boots are recorded on it."""

    def __init__(self, rig, folder):
        self.rig = rig
        self.folder = folder
        self.tops = []
        self.infos = {}
        self.nars = {}
        self.closures = {}
        with rig.workshop.store() as store:
            for release in (1, 2):
                top = build(store, rig.workshop.packages, rig.workshop.kernel(), release)
                self.tops.append(top)
                self.closures[top] = store.closure([top])
                for info in self.closures[top]:
                    data = io.BytesIO()
                    nar.dump(store.real(info.path), data.write)
                    self.infos[info.path] = info
                    self.nars[info.path] = data.getvalue()
                rig.push(store, top)
        self.empty = folder / "empty.raw"
        ext4.make(self.empty, DISK_BYTES)
        self.initrd = make_initrd(rig.workshop, folder / "agent.img", FLUSHES_OFTEN)

    @contextlib.contextmanager
    def boot(self, system, disk, image=None, *, log=False):
        made = dataclasses.replace(
            self.rig.image(disk=disk), initrd=image or self.initrd, log_writes=log
        )
        with (
            mock.patch.object(self.rig, "image", return_value=made),
            self.rig.boot(self.rig.user_data(system)) as boot,
        ):
            boot.folder = self.rig.folder / boot.name
            yield boot

    def record(self, before, system, disk, image=None):
        with self.boot(system, disk, image, log=True) as boot:
            release = self.tops.index(system) + 1
            assert boot.get() == (200, f"calve demo release {release}\n")
        log = powercut.WriteLog(boot.folder / "writes.log")
        return Recording(disk, log, before, system, boot.folder / "disk.raw")

    # What a cut left

    def examine(self, root, recording):
        """Check a disk; return (problems, phase)."""
        problems = []
        whole = {}

        def is_whole(path):
            if path not in whole:
                whole[path] = path in self.infos and hashed(root, self.infos[path])
            return whole[path]

        named = self.named(root, problems)
        problems += [f"{path} is vouched for" for path in sorted(named) if not is_whole(path)]
        profile = root / "nix/var/nix/profiles/system"
        current = None
        if profile.is_symlink():
            current = StorePath.parse(os.readlink(profile.parent / os.readlink(profile)))
            if current not in {recording.before, recording.system}:
                problems.append(f"the profile names {current}")
            for info in self.closures.get(current, []):
                if info.path not in named or not is_whole(info.path):
                    problems.append(f"{info.path} of the profile")
        elif recording.before is not None:
            problems.append("no profile")
        return problems, phase(root, recording.system, named, current)

    @staticmethod
    def named(root, problems):
        """Return what the lists on a disk name; each is there as a whole, or not at all."""
        named = set()
        try:
            record = (root / "nix/var/calve/committed.json").read_bytes()
            if record and json.loads(record):
                both = Record.parse(record)
                named |= {*both.committed, *both.fetched}
        except FileNotFoundError:
            pass
        except ValueError as error:
            problems.append(f"the record: {error}")
        try:
            listed = registration.parse((root / "nix-path-registration").read_bytes())
            named |= {info.path for info in listed}
        except FileNotFoundError:
            pass
        except CalveError as error:
            problems.append(f"the registration: {error}")
        return named

    def recover(self, root, system):
        """Do as the next boot does, with its code; return what it had to fetch."""
        infos = {info.path: info for info in self.closures[system]}
        with (
            mock.patch("calve.nix.staging.sync"),
            mock.patch("os.fsync"),
            BootStore(root) as store,
        ):
            missing = store.missing(infos)
            adopted = store.adopt([infos[path] for path in missing])
            fetched = {path for path in missing if path not in adopted}
            for path in fetched:
                events = nar.read(io.BytesIO(self.nars[path]).read, limit=len(self.nars[path]))
                store.stage(infos[path], events)
            if missing:
                store.commit([infos[path] for path in missing])
            store.finish(system)
        for info in infos.values():
            assert hashed(root, info), info.path
        assert os.readlink(root / "nix/var/nix/profiles/system").startswith("system-")
        return fetched

    def damaged(self, root):
        """Count the trees that bear a good name and are not whole."""
        places = []
        store = root / "nix/store"
        for run in store.glob(".calve-*"):
            places += run.glob("verified.*")
        by_digest = {path.digest: path for path in self.infos}
        pairs = [(place, by_digest[place.name.split(".")[1]]) for place in places]
        pairs += [(store / p.basename, p) for p in self.infos if (store / p.basename).is_dir()]
        return sum(not same(place, self.infos[path]) for place, path in pairs)

    def cut(self, recording, cuts, epochs=None, *, recover=True):
        """Make cuts; return the found problems, and what is to be known of each."""
        epochs = recording.log.epochs if epochs is None else epochs
        found = []
        least: dict[int, set] = {}
        for cut, disk in powercut.cut_disks(recording.base, recording.log, epochs, cuts):
            wrong = disk.replay()
            with powercut.scratch(self.folder / "cut") as scratch:
                disk.extract(["/nix", "/nix-path-registration"], scratch)
                for place in scratch.rglob("*"):
                    if place.is_symlink():  # debugfs keeps all times but theirs
                        os.utime(place, (1, 1), follow_symlinks=False)
                problems, where = self.examine(scratch, recording)
                if wrong is not None:
                    problems.append(f"e2fsck: {wrong}")
                each = Found(cut, where, problems)
                if recover and not problems:
                    each.damaged = self.damaged(scratch)
                    each.fetched = self.recover(scratch, recording.system)
                    least.setdefault(cut.epoch, each.fetched)
                    each.lost = each.fetched - least[cut.epoch]
                found.append(each)
        return found

    def disk_of(self, recording, cut):
        """Write the disk of a cut, its journal not replayed."""
        path = self.folder / f"cut-{cut.epoch}-{cut.seed}.raw"
        for _, disk in powercut.cut_disks(
            recording.base, recording.log, recording.log.epochs, [cut]
        ):
            disk.save(path)
        return path


@dataclasses.dataclass
class Found:
    """What a cut left: `lost` is what a flush had covered, and was fetched again all the same."""

    cut: powercut.Cut
    phase: str
    problems: list
    damaged: int = 0
    fetched: set = dataclasses.field(default_factory=set)
    lost: set = dataclasses.field(default_factory=set)


def phase(root, system, named, current):
    """Say how far a boot came, by what its disk says."""
    if current == system:
        return "flipped"
    registered = root / "nix-path-registration"
    if registered.exists() and str(system) in registered.read_text():
        return "registered"
    if system in named:
        return "recorded"
    return "published" if (root / str(system).lstrip("/")).exists() else "pull"


def same(place, info):
    digest = hashlib.sha256()
    try:
        narwriter.dump(place, digest.update)
    except CalveError:
        return False
    return digest.digest() == info.nar_hash.digest


def hashed(root, info):
    return same(root / str(info.path).lstrip("/"), info)


@pytest.fixture(scope="module")
def bench(rig, tmp_path_factory):
    from calve.cache.push import push

    def pushed(store, top):
        rig.manifests[top] = push(store, [top], rig.cache, rig.workshop.key()).manifests[top]

    rig.push = pushed
    rig.folder = rig.world.machines._directory
    return Bench(rig, tmp_path_factory.mktemp("power"))


@pytest.fixture(scope="module")
def first(bench):
    """The boot of an empty disk, recorded."""
    return bench.record(None, bench.tops[0], bench.empty)


@pytest.fixture(scope="module")
def update(bench, first):
    """The boot of the same machine with another system, recorded."""
    return bench.record(bench.tops[0], bench.tops[1], first.end)


def chosen(recording, count, rng):
    """Choose cuts; before them, of each epoch the one that lost all since the flush."""
    cuts = powercut.choose(recording.log.epochs, count, rng)
    return [*(powercut.Cut(epoch, None) for epoch in sorted({c.epoch for c in cuts})), *cuts]


def say(line):
    """Print a line past pytest's capture where -s is given; it stands in the report of a failure."""
    sys.stdout.write(f"{line}\n")


def survived(bench, recordings, count):
    rng = random.Random(SEED)
    started = time.monotonic()
    found = {}
    for number, recording in enumerate(recordings):
        found[number] = bench.cut(recording, chosen(recording, count // len(recordings), rng))
    every = list(chain.from_iterable(found.values()))
    phases = Counter(each.phase for each in every)
    say(
        f"CALVE_TEST_SEED={SEED}: {len(every)} cuts in {time.monotonic() - started:.0f} s: {dict(phases)}, "
        f"{sum(each.damaged for each in every)} damaged trees, none valid"
    )
    assert [(each.cut, each.problems) for each in every if each.problems] == []
    assert [(each.cut, each.lost) for each in every if each.lost] == []
    return found, every, phases


@pytest.fixture(scope="module")
def cuts(bench, first, update):
    return survived(bench, [first, update], CUTS)


def test_a_log_has_all_that_the_machine_wrote(bench, first):
    """All of the log on the first disk is the disk in the end: nothing is written past it."""
    last = powercut.Cut(len(first.log.epochs) - 1, None)
    [found] = bench.cut(first, [last])
    assert (found.problems, found.phase, found.fetched) == ([], "flipped", set())


def test_what_a_list_vouches_for_survives_every_cut(cuts):
    _, every, phases = cuts
    assert len(every) >= 100
    assert set(phases) >= set(PHASES) - {"published", "recorded"}
    assert phases["pull"] >= 20
    assert phases["flipped"] >= 5
    # There was something to survive: trees with good names and lost contents.
    assert any(each.damaged for each in every)


def test_what_was_flushed_is_not_fetched_again(bench, cuts):
    found, _, _ = cuts
    whole = len(bench.closures[bench.tops[0]])
    lossy = [each for each in found[0] if each.cut.seed is None]
    counts = [len(each.fetched) for each in sorted(lossy, key=lambda each: each.cut.epoch)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (whole, 0)
    assert len(set(counts)) >= 4  # the flushes of the pull count


def nastiest(found, count):
    """Choose cuts in different epochs: between the names and the profile first, those with most damage before others."""
    chosen = {}
    between = {"published": 0, "recorded": 0, "registered": 1}
    for each in sorted(found, key=lambda each: (-each.damaged, between.get(each.phase, 2))):
        chosen.setdefault(each.cut.epoch, each)
    return list(chosen.values())[:count]


def boot_again(bench, recording, each):
    disk = bench.disk_of(recording, each.cut)
    release = bench.tops.index(recording.system) + 1
    with bench.boot(recording.system, disk) as boot:
        assert boot.get() == (200, f"calve demo release {release}\n")
        ready = boot.event("ready")
    disk.unlink()
    assert ready["system"] == str(recording.system)
    # The real machine, whose kernel replays the journal, finds what the harness found.
    assert ready["paths"] == len(each.fetched)
    asked = {
        call.key
        for call in bench.rig.world.objects.calls
        if call.principal.endswith(boot.name) and "/nar/" in f"/{call.key}"
    }
    assert len(asked) == len(each.fetched)


def test_the_nastiest_are_booted(bench, first, update, cuts):
    found, _, _ = cuts
    for number, recording in enumerate((first, update)):
        for each in nastiest(found[number], 1):
            boot_again(bench, recording, each)


def test_a_killed_machine_s_disk_converges(bench):
    """Three real `kill -9` on one disk, then the boot that gets through."""
    disk = bench.empty
    rng = random.Random(SEED)
    for number, seen in enumerate(('"n":"manifest"', '"n":"pull"', '"e":"progress"')):
        with bench.boot(bench.tops[0], disk) as boot:
            end = time.monotonic() + 100
            while seen not in boot.console and '"n":"commit"' not in boot.console:
                assert time.monotonic() < end, boot.console[-2000:]
                time.sleep(0.02)
            time.sleep(rng.random())
            bench.rig.world.machines.kill(boot.name)
        disk = bench.folder / f"killed-{number}.raw"
        shutil.copy(boot.folder / "disk.raw", disk)
    with bench.boot(bench.tops[0], disk) as boot:
        assert boot.get()[0] == 200
        assert boot.event("ready")["paths"] < len(bench.closures[bench.tops[0]])


# The harness can fail


def test_without_the_flush_ahead_of_the_names_cuts_are_fatal(bench):
    image = make_initrd(bench.rig.workshop, bench.folder / "forgets.img", FORGETS)
    recording = bench.record(None, bench.tops[0], bench.empty, image)
    cuts = powercut.choose(recording.log.epochs, 40, random.Random(SEED))
    problems = [p for each in bench.cut(recording, cuts, recover=False) for p in each.problems]
    assert [problem for problem in problems if "vouched for" in problem]


def test_a_disk_that_does_not_flush_is_noticed(bench, first):
    epochs = first.log.without_flushes()
    cuts = powercut.choose(epochs, 40, random.Random(SEED))
    found = bench.cut(first, cuts, epochs, recover=False)
    assert sum(bool(each.problems) for each in found) >= 5


# make test-full


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_five_thousand_cuts(bench, first, update):
    found, _, _ = survived(bench, [first, update], 5000)
    for number, recording in enumerate((first, update)):
        for each in nastiest(found[number], 10):
            boot_again(bench, recording, each)
