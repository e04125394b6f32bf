"""A closure with another kernel than the image's: started without firmware, after one download; one boot, recorded."""

from __future__ import annotations

import itertools

import pytest

from calve.cache.push import push


@pytest.fixture(scope="module")
def release(rig):
    """A system with another kernel, and an initrd of that kernel with the agent."""
    with rig.workshop.store() as store:
        path = rig.workshop.system(store, "tiny", 7, other_kernel=True)
        rig.manifests[path] = push(store, [path], rig.cache, rig.workshop.key()).manifests[path]
        return path, len(store.closure([path]))


@pytest.fixture(scope="module")
def booted(rig, release):
    with rig.boot(rig.user_data(release[0])) as boot:
        answer = boot.get()
        # -no-reboot: a machine that had gone through its firmware again would have ended.
        assert rig.world.machines.running(boot.name)
        yield boot, answer, [*boot.events]


def of(events, kind):
    return [event.fields for event in events if event.kind == kind]


def test_the_closure_s_kernel_runs(rig, booted):
    boot, answer, events = booted
    assert answer == (200, "calve demo release 7\n")
    first, second = rig.workshop.kernel(), rig.workshop.kernel(other=True)
    assert first.version != second.version
    assert [start["kernel"] for start in of(events, "start")] == [first.version, second.version]
    stage_2 = [one for one in of(events, "phase") if one["n"] == "answer"]
    assert [one["kernel"] for one in stage_2] == [second.version]
    assert of(events, "fail") == []
    assert "Kernel panic" not in boot.console


def test_it_was_started_once_by_the_agent(booted):
    phases = [one["n"] for one in of(booted[2], "phase")]
    first = ["network", "agent", "imds", "manifest", "pull", "commit", "kexec"]
    assert phases == [*first, "network", "agent", "imds", "commit", "switch-root", "answer"]


def test_the_kernel_s_clock_begins_again(booted):
    times = [event.at_s for event in booted[2]]
    falls = [index for index, (now, then) in enumerate(itertools.pairwise(times)) if then < now]
    assert len(falls) == 1
    assert booted[2][falls[0]].fields["n"] == "kexec"


def test_everything_was_downloaded_once(rig, release, booted):
    mine = [call for call in rig.world.objects.calls if call.principal.endswith(booted[0].name)]
    keys = [call.key for call in mine if call.method == "GET" and call.status in {200, 206}]
    assert sum("manifests/" in key for key in keys) == 1
    nars = [key for key in keys if "nar/" in key]
    assert len(set(nars)) == len(nars) == release[1]
    first, second = of(booted[2], "ready")
    assert first["paths"] == release[1]
    assert (second["paths"], second["fetched_bytes"], second["nar_bytes"]) == (0, 0, 0)
    assert first["generation"] == second["generation"] == 1
    assert "note" not in first


def test_memory_stays_within_a_t3_nano(booted):
    for ready in of(booted[2], "ready"):
        assert ready["agent_peak_mb"] <= 48
        assert ready["lowest_available_mb"] >= 200


def test_a_locked_down_machine_refuses(rig, release):
    """Under Secure Boot, say: it trusts no key that signed this kernel."""
    with rig.boot(rig.user_data(release[0]), command_line="lockdown=integrity") as machine:
        last = machine.ended()
    assert last.kind == "fail"
    assert last.fields["code"] == "kexec-denied"
    assert last.fields["phase"] == "commit"
