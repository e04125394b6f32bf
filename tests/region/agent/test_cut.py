"""The agent killed at many instants: nothing half-written becomes valid, and what was committed is not fetched again."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter

import pytest

EVENTS = 24
UPDATE_EVENTS = 12
REQUESTS = 8
MOMENTS = 12


def lose_unsynced(machine):
    """Empty the files of every second path that nobody vouches for, as a power cut would; staged ones too."""
    if not machine.store.exists():
        return 0
    named = machine.named()
    places = [place for place in machine.store.iterdir() if not place.name.startswith(".")]
    for run in machine.leftovers():
        places += [place for place in (machine.store / run).iterdir() if place.is_dir()]
    lost = 0
    for place in sorted(place for place in places if place.name not in named)[::2]:
        for inner in [place, *place.rglob("*")]:
            if inner.is_file() and not inner.is_symlink():
                mode = inner.stat().st_mode
                inner.chmod(0o644)
                os.truncate(inner, 0)
                inner.chmod(mode)
                os.utime(inner, (1, 1))
                lost += 1
    return lost


def check_next_boot(machine, release, *before, generation, tally):
    """After a cut: check the disk, then boot to the end and check that too."""
    machine.others = before
    machine.check(release, *before)
    valid = machine.named()
    tally["valid"] += len(valid)
    tally["lost"] += lose_unsynced(machine)
    tally["staged"] += len(machine.leftovers()) if machine.store.exists() else 0
    names = {info.path.basename for info in release.paths.values()}
    boot = machine.boot()
    assert boot.ready["paths"] == boot.nars <= len(names - valid)
    tally["adopted"] += len(names - valid) - boot.nars
    machine.check_booted(release, generation=generation)
    return boot


def next_generation(machine):
    """Return what the next boot makes: a number whose profile never came is not used again."""
    links = machine.generations()
    numbers = [int(name.split("-")[1]) for name in links if name != "system"]
    if "system" in links and links[links["system"]] == machine.wanted:
        return int(links["system"].split("-")[1])
    return max(numbers, default=0) + 1


def killed(machine, **options):
    with machine.start(driver=True, **options) as process:
        process.communicate(timeout=60)
    return process.returncode == -signal.SIGKILL


def events_of(boot):
    return int(boot.stdout.rpartition("events ")[2])


@pytest.fixture
def tally():
    return Counter()


def test_killed_at_any_change_of_the_disk(cloud, one, machine_in, tmp_path, tally):
    whole = machine_in(tmp_path / "whole")
    whole.wants(one)
    last = events_of(whole.boot(driver=True, batch=1))
    rng = random.Random(20)
    # All of the last instants (record, registration, profile), and some of the many before.
    instants = {*range(last - 12, last + 1), *rng.sample(range(1, last - 12), EVENTS - 12)}
    for instant in sorted(instants):
        machine = machine_in(tmp_path / f"at-{instant}")
        machine.wants(one)
        # Threads make a commit of one or of two paths: the last instants may not come.
        tally["cuts"] += killed(machine, batch=1, events=instant)
        check_next_boot(machine, one, generation=next_generation(machine), tally=tally)
    assert tally["cuts"] >= EVENTS - 6
    assert tally["valid"] > 10
    assert tally["staged"] > 5
    assert tally["adopted"] > 5


def test_an_update_killed_at_any_change_of_the_disk(cloud, one, machine_in, tmp_path, tally):
    two = cloud.release(2)
    machine = machine_in(tmp_path / "whole")
    machine.wants(one)
    assert machine.boot().code == 0
    before = tmp_path / "before"
    shutil.copytree(machine.root, before, symlinks=True)
    machine.wants(two)
    last = events_of(machine.boot(driver=True, batch=1))
    profiles = Counter()
    for instant in range(last, max(0, last - UPDATE_EVENTS), -1):
        machine = machine_in(tmp_path / f"at-{instant}")
        machine.root.rmdir()
        shutil.copytree(before, machine.root, symlinks=True)
        machine.wants(two)
        # Threads make a commit of one or of two paths: the last instants may not come.
        tally["cuts"] += killed(machine, batch=1, events=instant)
        profiles[machine.profile()] += 1
        # The old system is whole throughout.
        assert {info.path.basename for info in one.paths.values()} <= machine.named()
        check_next_boot(machine, two, one, generation=next_generation(machine), tally=tally)
    assert tally["cuts"] >= UPDATE_EVENTS - 6
    assert profiles[str(one.system)] > 3
    assert profiles[str(two.system)] > 0


def test_killed_at_any_request(cloud, one, machine_in, tmp_path, tally):
    for count in range(1, REQUESTS):
        machine = machine_in(tmp_path / f"at-{count}")
        machine.wants(one)
        seen = []
        with machine.start(driver=True, batch=1) as process:

            def hook(_request, count=count, process=process, seen=seen):
                seen.append(1)
                if len(seen) == count:
                    process.kill()

            cloud.hook = hook
            process.communicate(timeout=60)
        cloud.hook = lambda _request: None
        assert process.returncode == -signal.SIGKILL
        check_next_boot(machine, one, generation=1, tally=tally)


def test_killed_at_random_moments_again_and_again(cloud, one, machine, tally):
    """One disk, many cuts: progress is kept from cut to cut."""
    rng = random.Random(3)
    machine.wants(one)
    named = set()
    cuts = 0
    for _ in range(MOMENTS):
        cuts += killed(machine, batch=1, events=rng.randint(20, 60))
        assert named <= machine.named()
        named = machine.named()
        machine.check(one)
        tally["lost"] += lose_unsynced(machine)
    assert cuts > 3
    check_next_boot(machine, one, generation=1, tally=tally)


def test_two_agents_do_not_remove_each_other_s_files(cloud, one, machine):
    """What a live process stages is not a leftover."""
    machine.wants(one)
    processes = [machine.start(driver=True, batch=1) for _ in range(2)]
    for process in processes:
        with process:
            out, _ = process.communicate(timeout=60)
            assert b"fail" not in out or process.returncode == 1
    assert machine.boot().code == 0
    machine.check(one)
