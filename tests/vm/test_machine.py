"""Real machines of 512 MB: what they pull, what they need for it, and how they end on bad input."""

from __future__ import annotations

import pytest

from calve.cache.objects import open_objects
from calve.cache.push import push
from calve.demo.world import BUCKET
from calve.nix.signing import SecretKey
from calve.transport.http import Client


@pytest.fixture(scope="module")
def webserver(rig):
    """One boot of the webserver closure, recorded."""
    path = rig.release("webserver", 1)
    with rig.boot(rig.user_data(path)) as boot:
        answer = boot.get()
        health = boot.get("/healthz")
        boot.told("healthy")
        yield path, boot, answer, health


def test_the_webserver_answers_with_its_release(webserver):
    _, _, answer, health = webserver
    assert answer[0] == 200
    assert "calve demo release 1" in answer[1]
    assert health[0] == 200


def test_its_closure_is_a_real_one(webserver):
    _, boot, _, _ = webserver
    ready = boot.event("ready")
    assert ready["paths"] >= 100
    assert ready["nar_bytes"] >= 100_000_000


def test_memory_stays_within_a_t3_nano(webserver):
    _, boot, _, _ = webserver
    ready = boot.event("ready")
    assert ready["agent_peak_mb"] <= 48
    assert ready["lowest_available_mb"] >= 300


def test_every_phase_is_in_evidence_in_order(webserver):
    _, boot, _, _ = webserver
    names = [event.fields["n"] for event in boot.events if event.kind == "phase"]
    assert names[:7] == ["network", "agent", "imds", "manifest", "pull", "commit", "switch-root"]
    times = [event.at_s for event in boot.events]
    assert times == sorted(times)


def test_stage_2_finds_it_healthy(webserver):
    path, boot, _, _ = webserver
    assert boot.event("healthy") == {"system": str(path), "as_wanted": True}


def test_systemd_is_content(webserver):
    _, boot, _, _ = webserver
    assert "[FAILED]" not in boot.console
    assert "emergency" not in boot.console.lower()


def test_only_what_it_may_reach_was_asked(webserver, rig):
    principals = {call.principal for call in rig.world.objects.calls if call.status == 200}
    assert all(p == "operator" or p.startswith("calve-machine/i-") for p in principals)


def test_foreign_user_data_ends_in_power_off_with_the_reason(rig):
    with rig.boot(b"#!/bin/sh\necho hello\n") as boot:
        last = boot.ended()
    assert last.kind == "fail"
    assert last.fields["code"] == "userdata-foreign"


def test_a_key_that_the_image_does_not_know_is_refused(rig):
    path = rig.release("tiny", 1)
    with rig.boot(rig.user_data(path, keys=("other-1",))) as boot:
        last = boot.ended()
    assert last.fields["code"] == "key-unknown"
    assert "other-1" in last.fields["message"]


def test_a_wrong_signature_ends_in_power_off_before_a_nar_is_fetched(rig):
    path = rig.release("tiny", 1)
    prefixed = rig.world.operator_cache.replace(BUCKET, f"{BUCKET}/other")
    client = Client(context=None, cancel=None)
    other = open_objects(prefixed, client, rig.world.operator_credentials)
    with rig.workshop.store() as store:
        pushed = push(store, [path], other, SecretKey.generate("other-1"))
    client.close()
    cache = rig.world.machine_cache.replace(BUCKET, f"{BUCKET}/other")
    data = rig.user_data(path, caches=(cache,), manifest=pushed.manifests[path])
    with rig.boot(data) as boot:
        last = boot.ended()
    assert last.fields["code"] == "signature"
    mine = [call for call in rig.world.objects.calls if call.principal.endswith(boot.name)]
    assert mine
    assert not any("/nar/" in call.key for call in mine)


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(rig):
    path = rig.release("webserver", 1)
    with rig.boot(rig.user_data(path), disk=rig.workshop.disk(96 << 20)) as boot:
        last = boot.ended()
    assert last.fields["code"] == "disk-small"
    assert not any(event.fields.get("n") == "pull" for event in boot.events)
