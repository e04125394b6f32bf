"""Boots that succeed: what is said, what is on the disk, and what is not fetched again."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import re

import pytest

from calve.boot.store import BootStore
from calve.nix import nar, narwriter
from calve.region.faults import Answer, Reset, Stall, Truncate
from calve.region.message import Response

PHASES = ["imds", "manifest", "pull", "commit", "switch-root"]
AGAIN = ["imds", "commit", "switch-root"]


def objects_of(cloud, infos):
    """Return the bytes in S3 of some paths' NARs."""
    total = 0
    with cloud.objects() as objects:
        for info in infos:
            text = objects.get(f"{info.path.digest}.narinfo", 1 << 16).decode()
            total += int(re.search(r"FileSize: (\d+)", text)[1])
    return total


def seed(machine, cloud, release):
    """Put a release onto a machine's disk as an image does: its files and their registration."""
    with BootStore(machine.root) as store:
        for info in release.paths.values():
            with open(machine.directory / "nar", "wb") as file:
                narwriter.dump(cloud.store.real(info.path), file.write)
            with open(machine.directory / "nar", "rb") as file:
                store.stage(info, nar.read(file.read, limit=info.nar_size))
        store.commit(list(release.paths.values()))
        store.register()
    (machine.root / "nix/var/calve/committed.json").unlink()


def test_first_boot(cloud, one, machine):
    machine.wants(one)
    boot = machine.boot()
    ready = boot.ready
    assert boot.phases == PHASES
    first = boot.events[0]
    assert first.kind == "start"
    assert first.fields["contract"] == [1, 1]
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", first.fields["agent"])
    assert [event.at_s for event in boot.events] == sorted(event.at_s for event in boot.events)
    assert all(len(line) < 512 for line in boot.stdout.splitlines())
    assert ready["system"] == str(one.system)
    assert (ready["release"], ready["generation"], ready["paths"]) == (1, 1, 6)
    assert ready["nar_bytes"] == sum(info.nar_size for info in one.paths.values())
    assert ready["fetched_bytes"] == objects_of(cloud, one.paths.values())
    assert 5 < ready["agent_peak_mb"] < 200
    assert ready["lowest_available_mb"] > 10
    # One request for the keyring, one for all facts, one for each NAR, and nothing else.
    assert (boot.requests, len(boot.gets)) == (9, 8)  # a HEAD of the manifest: may we read?
    assert boot.gets[:2] == ["keyring.json", f"manifests/{one.manifest}.json.zst"]
    assert boot.nars == 6
    machine.check_booted(one, generation=1)
    assert set(machine.registered()) == {str(info.path) for info in one.paths.values()}
    assert machine.last_good() is None
    assert sorted(machine.record()["committed"]) == sorted(
        info.path.basename for info in one.paths.values()
    )


def test_second_boot_asks_imds_alone(cloud, one, machine):
    machine.wants(one)
    assert machine.boot().code == 0
    before = snapshot(machine.root)
    machine.imds.calls.clear()
    boot = machine.boot()
    assert boot.phases == AGAIN
    assert (boot.ready["paths"], boot.ready["fetched_bytes"], boot.ready["nar_bytes"]) == (0, 0, 0)
    assert boot.ready["generation"] == 1
    assert boot.requests == 0
    assert [call[1] for call in machine.imds.calls] == ["/latest/api/token", "/latest/user-data"]
    assert snapshot(machine.root) == before


def test_s3_being_down_does_not_stop_a_reboot(cloud, one, machine):
    machine.wants(one)
    assert machine.boot().code == 0
    cloud.faults.add(Answer(Response(503)), times=None)
    machine.wants(one, caches=("s3://nix?region=x&endpoint=http%3A%2F%2F127.0.0.1%3A1",))
    assert machine.boot().ready["fetched_bytes"] == 0
    assert cloud.faults.injected == 0


def test_the_next_release_fetches_the_difference(cloud, one, machine):
    machine.wants(one)
    assert machine.boot().code == 0
    two = cloud.release(2)
    machine.others = (one,)
    machine.wants(two)
    boot = machine.boot()
    fresh = two.names("www", "system")
    assert boot.ready["paths"] == boot.nars == 2
    assert boot.requests == 5
    assert boot.ready["fetched_bytes"] == objects_of(cloud, fresh)
    assert boot.received < 100_000
    assert boot.ready["generation"] == 2
    machine.check_booted(two, generation=2)
    assert machine.generations() == {
        "system": "system-2-link",
        "system-1-link": str(one.system),
        "system-2-link": str(two.system),
    }
    assert len(machine.registered()) == 8


def test_back_to_an_old_release_is_a_new_generation_and_nothing_fetched(cloud, one, machine):
    two = cloud.release(2)
    machine.others = (one, two)
    for release in (one, two):
        machine.wants(release)
        assert machine.boot().code == 0
    machine.wants(one)
    boot = machine.boot()
    assert (boot.ready["fetched_bytes"], boot.requests) == (0, 0)
    machine.check_booted(one, generation=3)


def test_what_the_image_was_seeded_with_is_not_fetched(cloud, one, machine):
    seed(machine, cloud, one)
    assert machine.record()["committed"] == []
    two = cloud.release(2)
    machine.wants(two)
    boot = machine.boot()
    assert boot.ready["paths"] == boot.nars == 2
    machine.others = (one,)
    machine.check_booted(two, generation=1)
    # The seed stays registered: stage 2 loads one complete list.
    assert len(machine.registered()) == 8


def test_a_seeded_system_is_committed_without_a_request(cloud, one, machine):
    seed(machine, cloud, one)
    machine.wants(one)
    boot = machine.boot()
    assert boot.phases == AGAIN
    assert (boot.ready["paths"], boot.requests) == (0, 0)
    machine.check_booted(one, generation=1)
    assert len(machine.record()["committed"]) == 6


def test_after_stage_2_took_the_registration(cloud, one, machine):
    """The profile's closure stays valid by our record; what nothing roots counts if its hash is right."""
    machine.wants(one)
    assert machine.boot().code == 0
    (machine.root / "nix-path-registration").unlink()
    boot = machine.boot()
    assert (boot.ready["paths"], boot.requests) == (0, 0)
    two = cloud.release(2)
    machine.others = (one,)
    machine.wants(two)
    assert machine.boot().ready["paths"] == 2
    (machine.root / "nix-path-registration").unlink()
    # Garbage collection of everything but generation 1: release 2's own paths lie about, half of them gone.
    profiles = machine.root / "nix/var/nix/profiles"
    os.unlink(profiles / "system")
    os.symlink("system-1-link", profiles / "system")
    os.unlink(profiles / "system-2-link")
    page = machine.real(two.paths["www"].path)
    page.chmod(0o755)
    (page / "pad").unlink()
    boot = machine.boot()
    assert boot.ready["paths"] == 1
    machine.check_booted(two, generation=2)


def test_without_the_manifest_narinfos_are_walked(cloud, one, machine):
    with cloud.objects() as objects:
        objects.delete(f"manifests/{one.manifest}.json.zst")
    machine.wants(one)
    boot = machine.boot()
    assert boot.ready["paths"] == 6
    assert sum(key.endswith(".narinfo") for key in boot.gets) == 6
    machine.check_booted(one, generation=1)


def test_faults_that_pass_are_survived(cloud, one, machine):
    slow = Response(503, {}, b"<Error><Code>SlowDown</Code><Message>slow</Message></Error>")
    cloud.faults.add(Answer(slow), path="*/manifests/*", times=2)
    cloud.faults.add(Answer(slow), path="*/nar/*", times=3)
    cloud.faults.add(Reset(after_bytes=100_000), path="*/nar/*", times=2)
    cloud.faults.add(Truncate(after_bytes=70_000), path="*/nar/*", times=1)
    machine.faults.add(Answer(Response(503)), times=2)
    machine.wants(one)
    boot = machine.boot()
    assert boot.ready["paths"] == 6
    assert cloud.faults.injected == 8
    assert machine.faults.injected == 2
    machine.check_booted(one, generation=1)


def test_credentials_that_end_in_mid_pull_are_renewed(cloud, one, machine):
    machine.wants(one)
    old = machine.session
    seen = []

    def hook(request):
        if "/nar/" in request.path:
            seen.append(request.path)
            if len(seen) == 3:
                ended = dataclasses.replace(old, expires=cloud.clock.now().replace(year=2020))
                cloud.principals.add_key(ended)
                machine.session = machine.new_session()

    cloud.hook = hook
    boot = machine.boot()
    assert boot.ready["paths"] == 6
    assert "ExpiredToken" in {call.code for call in cloud.service.calls}
    asked = [path for _, path, _ in machine.imds.calls if path.endswith("/machine")]
    assert len(asked) == 2
    machine.check_booted(one, generation=1)


def test_a_stall_is_gone_on_from(cloud, one, machine):
    """The client's 10 s without a byte are cut to one."""
    cloud.faults.add(Stall(after_bytes=100_000), path="*/nar/*", times=2)
    machine.wants(one)
    hasty = "import functools\nfrom calve.boot import agent\nagent.Client = functools.partial(agent.Client, read_s=1.0)"
    assert machine.boot(hasty=hasty).ready["paths"] == 6
    assert cloud.faults.injected == 2
    machine.check_booted(one, generation=1)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_wrong_is_corrected_once(cloud, one, machine, hours):
    machine.wants(one)
    cloud.clock.shift = dt.timedelta(hours=hours)
    assert machine.boot().ready["paths"] == 6
    codes = [call.code for call in cloud.service.calls]
    assert codes.count("RequestTimeTooSkewed") == 1
    machine.check_booted(one, generation=1)


def test_credentials_that_come_late_are_waited_for(one, machine):
    machine.wants(one)
    machine.faults.add(Answer(Response(404)), path="*/iam/security-credentials/*", times=4)
    assert machine.boot().ready["paths"] == 6
    assert machine.faults.injected == 4
    machine.check_booted(one, generation=1)


def test_a_token_that_imds_forgot_is_asked_for_again(cloud, one, machine):
    machine.wants(one)
    cloud.hook = lambda _request: machine.imds.expire_tokens()
    machine.imds.expire_tokens()
    assert machine.boot().ready["paths"] == 6


def test_a_second_cache_has_what_the_first_lacks(cloud, one, machine):
    cloud.service.add_bucket("empty")
    arn = "arn:aws:s3:::"
    cloud.principals.set_policy("machine", [*_allow(arn)])
    machine.wants(one, caches=(cloud.cache_in("empty"), cloud.cache))
    assert machine.boot().ready["paths"] == 6


def _allow(arn):
    from calve.region.signature import Allow

    for name in ("nix", "empty"):
        yield Allow("s3:GetObject", f"{arn}{name}/*")
        yield Allow("s3:ListBucket", f"{arn}{name}")


def test_user_data_may_carry_what_others_read(cloud, one, machine):
    machine.wants(one)
    document = json.loads(machine.user_data)
    document["systemd.credentials"] = [{"name": "x", "text": "y"}]
    document["calve"]["later"] = {"a": 1}
    machine.user_data = json.dumps(document).encode()
    assert machine.boot().ready["release"] == 1


def snapshot(root):
    """Return every name below a directory with what tells a change of it."""
    found = {}
    for directory, folders, files in os.walk(root):
        for name in [*folders, *files]:
            place = os.path.join(directory, name)
            status = os.lstat(place)
            with contextlib.suppress(OSError):
                target = os.readlink(place)
                found[place] = target
                continue
            found[place] = status.st_ino, status.st_mode, status.st_size
    return found
