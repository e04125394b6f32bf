"""Real machines whose initrd has systemd: the agent as a unit, in the order in which NixOS's units stand."""

from __future__ import annotations

import re
import struct

import pytest

from calve.cache import manifest
from calve.cache.push import push
from calve.contract import evidence
from calve.disk import elf, initrd, payload
from calve.disk.initrd_systemd import SystemdInitrd

TELL = "systemd.show_status=1 systemd.status_unit_format=name"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
TOLD = re.compile(
    r"^(?:\[ *(?:OK|FAILED|DEPEND) *\] | {9})([A-Z][a-z ]+) (\S+\.(?:service|mount|target))"
)
RECOVER = 0x4


@pytest.fixture(scope="module")
def booted(rig):
    with rig.boot(rig.user_data(rig.release("tiny", 1)), systemd=True, command_line=TELL) as boot:
        answer = boot.get()
        yield boot, answer


@pytest.fixture(scope="module")
def told(booted):
    """What systemd said of its units, in order: `("Starting", "calve-agent.service")`."""
    lines = ESCAPE.sub("", booted[0].console).splitlines()
    return [match.groups() for match in map(TOLD.match, lines) if match]


def of(boot, kind):
    return [event.fields for event in boot.events if event.kind == kind]


def test_the_page_is_served_over_the_lease_of_the_initrd(booted):
    boot, answer = booted
    assert answer == (200, "calve demo release 1\n")
    assert of(boot, "fail") == []
    assert boot.event("ready")["paths"] == 5


def test_every_phase_is_in_evidence_in_order(booted):
    boot, _ = booted
    phases = [fields["n"] for fields in of(boot, "phase")]
    first = ["network", "agent", "imds", "manifest", "pull", "commit", "switch-root"]
    assert phases == [*first, "answer"]
    times = [event.at_s for event in boot.events]
    assert times == sorted(times)


def test_units_come_in_nixos_s_order(told):
    order = [
        ("Mounted", "sysroot.mount"),
        ("Starting", "calve-agent.service"),
        ("Finished", "calve-agent.service"),
        ("Starting", "initrd-find-nixos-closure.service"),
        ("Finished", "initrd-find-nixos-closure.service"),
        ("Reached target", "initrd.target"),
        ("Starting", "initrd-cleanup.service"),
        ("Stopped", "systemd-networkd.service"),
        ("Reached target", "initrd-switch-root.target"),
        ("Starting", "initrd-switch-root.service"),
    ]
    assert [one for one in told if one in order] == order
    agent = told.index(("Starting", "calve-agent.service"))
    for one in (
        ("Finished", "systemd-modules-load.service"),
        ("Started", "systemd-networkd.service"),
    ):
        assert told.index(one) < agent
    assert told.index(("Reached target", "initrd-fs.target")) > told.index(order[2])


def test_no_unit_failed(told, booted):
    assert not [one for one in told if "ailed" in one[0] or "emergency" in one[1]]
    assert "emergency" not in booted[0].console.lower()


def test_memory_stays_within_a_t3_nano(booted):
    ready = booted[0].event("ready")
    assert ready["agent_peak_mb"] <= 48
    assert ready["lowest_available_mb"] >= 300


def test_a_bad_digest_ends_in_power_off_with_the_root_disk_clean(rig):
    """Under the digest lies the manifest of something else: the agent has written to the disk by then."""
    path = rig.release("tiny", 1)
    wrong = "0" * 64
    rig.cache.put(manifest.key(wrong), rig.cache.get(manifest.key(rig.manifests[path]), 1 << 20))
    with rig.boot(rig.user_data(path, manifest=wrong), systemd=True) as boot:
        last = boot.ended()
        assert rig.world.machines.ended()[boot.name] == 0
    assert (last.kind, last.fields["code"]) == ("fail", "manifest-damaged")
    assert (
        len(of(boot, "fail")) == 1
    )  # the emergency, which would tell of itself, did not get there first
    (seen,) = (event for event in evidence.read(boot.console[-4096:]) if event.kind == "fail")
    assert seen == last
    with (rig.world.machines._directory / boot.name / "disk.raw").open("rb") as disk:
        disk.seek(1024)
        superblock = disk.read(1024)
    magic, state = struct.unpack_from("<HH", superblock, 0x38)  # kernel: filesystems/ext4/super
    assert (magic, state) == (0xEF53, 1)
    assert not struct.unpack_from("<I", superblock, 0x60)[0] & RECOVER
    assert struct.unpack_from("<H", superblock, 0x34)[0] == 1  # mounted once, to be written to


def test_a_real_root_s_programs_find_their_libraries(rig, tmp_path):
    """Nothing in it needs what is not in it."""
    workshop = rig.workshop
    spec = SystemdInitrd(
        workshop.root(), workshop.kernel().modules, payload.build(), b"{}", ca_file=None
    )
    found = {entry.path: entry for entry in spec.entries(tmp_path)}
    programs = [
        entry for entry in found.values() if entry.path.startswith("usr/") and entry.mode & 0o111
    ]
    names = {path.rpartition("/")[2] for path in found}
    needed = set()
    for entry in programs:
        if not isinstance(entry.content, bytes):
            dynamic = elf.read(entry.content)
            needed |= set(dynamic.needed) if dynamic else set()
    assert len(needed) >= 20
    assert needed <= names
    assert {f"{name}.ko" for name in initrd.REQUIRED} <= names


@pytest.mark.full
def test_a_closure_s_own_kernel_is_started(rig):
    """By the agent, from below systemd; the closure's initrd goes on."""
    with rig.workshop.store() as store:
        path = rig.workshop.system(store, "tiny", 7, other_kernel=True)
        rig.manifests[path] = push(store, [path], rig.cache, rig.workshop.key()).manifests[path]
    with rig.boot(rig.user_data(path), systemd=True) as boot:
        answer = boot.get()
        assert rig.world.machines.running(boot.name)
    assert answer == (200, "calve demo release 7\n")
    first, second = rig.workshop.kernel(), rig.workshop.kernel(other=True)
    assert [start["kernel"] for start in of(boot, "start")] == [first.version, second.version]
    phases = [fields["n"] for fields in of(boot, "phase")]
    assert phases.count("kexec") == 1
    assert phases[phases.index("kexec") :] == [
        "kexec",
        "network",
        "agent",
        "imds",
        "commit",
        "switch-root",
        "answer",
    ]
    assert of(boot, "fail") == []
