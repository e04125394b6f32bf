"""What a machine must refuse: each with its code, one clear line, and nothing half-written valid."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from calve.boot import agent
from calve.boot.agent import Agent
from calve.boot.console import Console
from calve.boot.policy import Policy
from calve.cache import manifest as manifests
from calve.contract import evidence
from calve.contract.codes import Code
from calve.nix.signing import SecretKey
from calve.region.faults import Answer, Flip, Lost, Reset, Stall, Trickle, Truncate
from calve.region.message import Response
from calve.region.signature import Allow
from calve.transport import imds
from calve.transport.retry import Policy as Retry

OTHER = SecretKey.generate("other-1")


@pytest.fixture
def served(cloud, one, machine):
    """A machine that has served release 1: a refusal leaves it as it was."""
    machine.wants(one)
    assert machine.boot().code == 0
    return machine


def refused(machine, code, phase, *words, staged=0, hasty=""):
    """Boot; the reason is told once and last, and the disk is as before or further, never wrong."""
    profile, valid = machine.profile(), machine.named()
    boot = machine.boot(hasty=hasty)
    assert (boot.fail["code"], boot.fail["phase"]) == (code, phase), boot.stdout
    assert boot.fail["code"] in {each.value for each in Code}
    message = boot.fail["message"]
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message, message
    assert machine.profile() == profile
    if machine.store.exists():
        # What may pass leaves what it had verified to the next boot, and nothing else.
        left = [name for run in machine.leftovers() for name in os.listdir(machine.store / run)]
        assert all(name.startswith(("verified.", "lock", "boot")) for name in left)
        assert Code(code).transient or machine.leftovers() == []
    assert valid <= machine.named()
    assert len(machine.named()) - len(valid) <= staged
    return boot


# User data


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (None, "userdata-absent"),
        (b"", "userdata-absent"),
        (b"#!/bin/sh\necho hello\n", "userdata-foreign"),
        (b'{"systemd.credentials": []}', "userdata-foreign"),
        (b"\xff\xfe", "userdata-foreign"),
        (b"[" * 10_000, "userdata-foreign"),
        (b'{"calve": {}}', "userdata-malformed"),
        (b'{"calve": 7}', "userdata-malformed"),
        (b'{"calve": {"version": 2, "anything": 1}}', "userdata-version"),
    ],
)
def test_user_data(machine, data, code):
    machine.user_data = data
    boot = refused(machine, code, "imds")
    assert boot.phases == ["imds"]
    assert not machine.root.joinpath("nix").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"system": "/nix/store/short"},
        {"system": "/nix/store/" + "a" * 32 + "-.hidden"},
        {"caches": ()},
        {"caches": ("ftp://host/x",)},
        {"caches": ("s3://BAD_NAME",)},
        {"caches": ("https://host:x/",)},
        {"manifest": "0"},
        {"keys": ()},
        {"deadline_s": 0},
    ],
)
def test_user_data_with_a_wrong_member(machine, one, changes):
    machine.wants(one, **changes)
    refused(machine, "userdata-malformed", "imds", next(iter(changes)))


def test_a_key_that_the_image_does_not_trust(served, one, cloud):
    served.wants(cloud.release(2), keys=("test-1", "later-1"))
    boot = refused(served, "key-unknown", "manifest", "test-1", "later-1")
    assert boot.gets == ["keyring.json"]


# Signatures


def test_signed_by_a_key_of_the_same_name(cloud, served):
    impostor = SecretKey.generate("test-1")
    fresh = cloud.add("www", {"index.html": b"evil"}, of="evil")
    system = cloud.add("system-9", {"init": b"#!", "www": Path(str(fresh.path))}, [fresh])
    digest = cloud.push(system.path, impostor)
    release = type("Release", (), {"system": system.path, "manifest": digest, "number": 9})
    served.wants(release)
    boot = refused(served, "signature", "manifest", "-system-9", "test-1")
    assert boot.nars == 0


def test_signed_by_another_key_alone(cloud, served):
    fresh = cloud.add("www", {"index.html": b"other"}, of="other")
    system = cloud.add("system-8", {"init": b"#!", "www": Path(str(fresh.path))}, [fresh])
    digest = cloud.push(system.path, OTHER)
    served.keys = (*served.keys, OTHER.public.dump())
    release = type("Release", (), {"system": system.path, "manifest": digest, "number": 8})
    # The image trusts it, the user data does not name it.
    served.wants(release)
    boot = refused(served, "signature", "manifest")
    assert boot.nars == 0
    served.wants(release, keys=("test-1", "other-1"))
    assert served.boot().code == 0


def rewritten(cloud, release, change):
    """Store the release's manifest changed, under its true digest; return that."""
    with cloud.objects() as objects:
        body = manifests.read(objects, release.manifest).dump()
        document = json.loads(body)
        change({row["path"].partition("-")[2]: row for row in document["paths"]}, document)
        changed = json.dumps(document).encode()
        digest = manifests.digest_of(changed)
        objects.put(manifests.key(digest), manifests.pack(changed))
    return digest


def test_a_path_without_a_signature(cloud, one, machine):
    def change(rows, _document):
        rows["lib"]["signatures"] = []

    machine.wants(one, manifest=rewritten(cloud, one, change))
    boot = refused(machine, "signature", "manifest", "-lib")
    assert boot.nars == 0


@pytest.mark.parametrize("field", ["narHash", "narSize", "signatures", "references"])
def test_an_entry_with_the_facts_of_another_path(cloud, one, machine, field):
    def change(rows, _document):
        rows["lib"][field] = rows["app"][field]

    machine.wants(one, manifest=rewritten(cloud, one, change))
    assert refused(machine, "signature", "manifest", "-lib").nars == 0


def test_an_entry_with_the_nar_of_another_path(cloud, one, machine):
    def change(rows, _document):
        rows["lib"]["url"] = rows["www"]["url"]

    # The path's own narinfo, read again, helps.
    machine.wants(one, manifest=rewritten(cloud, one, change))
    assert machine.boot().ready["paths"] == 6
    machine.check_booted(one, generation=1)


@pytest.mark.parametrize("url", ["../../etc/passwd", "http://elsewhere/x", "/nar/x", "nar/.."])
def test_an_entry_whose_nar_lies_elsewhere(cloud, one, machine, url):
    def change(rows, _document):
        rows["lib"]["url"] = url

    machine.wants(one, manifest=rewritten(cloud, one, change))
    assert refused(machine, "manifest-damaged", "manifest").nars == 0


# The manifest


def test_a_manifest_that_was_altered(cloud, one, machine):
    with cloud.objects() as objects:
        name = manifests.key(one.manifest)
        body = manifests.read(objects, one.manifest).dump().replace(b'"version":1', b'"version": 1')
        objects.put(name, manifests.pack(body))
    machine.wants(one)
    refused(machine, "manifest-damaged", "manifest", "digest")


@pytest.mark.parametrize("data", [b"", b"junk", b"\x28\xb5\x2f\xfd\x00"])
def test_a_manifest_that_is_none(cloud, one, machine, data):
    with cloud.objects() as objects:
        objects.put(manifests.key(one.manifest), data)
    machine.wants(one)
    refused(machine, "manifest-damaged", "manifest")


def test_a_manifest_that_is_cut_off(cloud, one, machine):
    with cloud.objects() as objects:
        name = manifests.key(one.manifest)
        objects.put(name, objects.get(name, 1 << 20)[:-20])
    machine.wants(one)
    refused(machine, "manifest-damaged", "manifest")


def test_a_manifest_that_is_flipped_on_its_way(cloud, one, machine):
    cloud.faults.add(Flip(offset=40), path="*/manifests/*", times=None)
    machine.wants(one)
    refused(machine, "manifest-damaged", "manifest")


def test_a_manifest_that_lacks_a_reference(cloud, one, machine):
    def change(rows, document):
        document["paths"].remove(rows["lib"])

    machine.wants(one, manifest=rewritten(cloud, one, change))
    refused(machine, "manifest-damaged", "manifest", "-lib")


def test_a_manifest_of_another_system(cloud, one, machine):
    two = cloud.release(2)
    machine.wants(two, manifest=one.manifest)
    refused(machine, "manifest-damaged", "manifest", "system-2")


def test_a_manifest_of_a_later_version(cloud, one, machine):
    def change(_rows, document):
        document["version"] = 2

    machine.wants(one, manifest=rewritten(cloud, one, change))
    refused(machine, "cache-unusable", "manifest", "version 2")


# NARs


def nar_key(cloud, info):
    with cloud.objects() as objects:
        text = objects.get(f"{info.path.digest}.narinfo", 1 << 16).decode()
    return next(line.split()[1] for line in text.splitlines() if line.startswith("URL:"))


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "junk", "longer", "another", "bare"])
def test_a_nar_that_is_not_what_was_signed(cloud, one, served, how):
    two = cloud.release(2)
    www, text = two.paths["www"], two.paths["text"]
    with cloud.objects() as objects:
        name = nar_key(cloud, www)
        data = objects.get(name, 1 << 20)
        middle = len(data) // 2
        made = {
            "cut": data[:middle],
            "empty": b"",
            "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "junk": b"junk" * 1000,
            "longer": data + data,
            "another": objects.get(nar_key(cloud, text), 1 << 20),
            "bare": b"\0" * www.nar_size,
        }[how]
        objects.put(name, made)
    served.wants(two)
    # The toplevel waits for www: it is not committed.
    refused(served, "nar-damaged", "pull", "-www")
    assert two.system.basename not in served.named()
    assert not served.real(www.path).exists()
    served.check(one, two)


def test_what_came_whole_beside_a_damaged_one_is_kept(cloud, one, machine):
    with cloud.objects() as objects:
        objects.put(nar_key(cloud, one.paths["www"]), b"junk")
    machine.wants(one)
    boot = refused(machine, "nar-damaged", "pull", "-www", staged=5)
    machine.check(one)
    assert one.paths["www"].path.basename not in machine.named()
    with cloud.objects() as objects:
        objects.delete(nar_key(cloud, one.paths["www"]))
    assert boot.nars >= 1


def test_a_nar_that_is_gone(cloud, one, served):
    two = cloud.release(2)
    with cloud.objects() as objects:
        objects.delete(nar_key(cloud, two.paths["www"]))
    served.wants(two)
    refused(served, "closure-incomplete", "pull", "nar/")
    served.check(one, two)


def test_a_path_that_is_gone_altogether(cloud, one, machine):
    www = one.paths["www"]
    with cloud.objects() as objects:
        objects.delete(nar_key(cloud, www))
        objects.delete(f"{www.path.digest}.narinfo")
    machine.wants(one)
    refused(machine, "closure-incomplete", "pull", "nar/", staged=5)


def test_walking_narinfos_meets_a_missing_one(cloud, one, machine):
    with cloud.objects() as objects:
        objects.delete(f"{one.paths['lib'].path.digest}.narinfo")
        objects.delete(manifests.key(one.manifest))
    machine.wants(one)
    refused(machine, "closure-incomplete", "manifest", "-lib")


def test_walking_narinfos_meets_one_of_another_path(cloud, one, machine):
    with cloud.objects() as objects:
        other = objects.get(f"{one.paths['www'].path.digest}.narinfo", 1 << 16)
        objects.put(f"{one.paths['lib'].path.digest}.narinfo", other)
        objects.delete(manifests.key(one.manifest))
    machine.wants(one)
    assert refused(machine, "manifest-damaged", "manifest", "another path").nars == 0


# The cache


def test_a_bucket_that_does_not_exist(cloud, one, machine):
    machine.wants(one, caches=(cloud.cache_in("nowhere"),))
    refused(machine, "cache-missing", "manifest", "nowhere")


def test_access_denied(cloud, one, machine):
    cloud.principals.set_policy("machine", [])
    machine.wants(one, deadline_s=3)
    boot = refused(machine, "cache-denied", "manifest", "denied or missing")
    assert boot.nars == 0


def test_access_denied_to_a_role_that_is_new(cloud, one, machine):
    """AWS lets it read some seconds after it was made: the boot waits for that, and fetches nothing twice."""
    denied = Response(
        403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    )
    cloud.faults.add(Answer(denied), times=4)  # 12 s of waiting at most, of 20
    machine.wants(one)
    boot = machine.boot()
    assert (boot.code, boot.nars) == (0, 6)
    machine.check_booted(one, generation=1)


def test_access_to_nars_denied(cloud, one, machine):
    arn = "arn:aws:s3:::nix/"
    cloud.principals.set_policy(
        "machine",
        [Allow("s3:GetObject", f"{arn}manifests/*"), Allow("s3:GetObject", f"{arn}*.narinfo")],
    )
    machine.wants(one)
    refused(machine, "cache-denied", "pull", "nar/")


def test_a_machine_without_a_role_s_rights_to_list(cloud, one, machine):
    """Then S3 says 403 of what is missing: the message says both."""
    cloud.principals.set_policy("machine", [Allow("s3:GetObject", "arn:aws:s3:::nix/*")])
    machine.wants(one)
    with cloud.objects() as objects:
        objects.delete(nar_key(cloud, one.paths["lib"]))
    refused(machine, "cache-denied", "pull", "denied or missing", staged=6)


def test_a_bucket_of_another_region(cloud, one, machine):
    machine.wants(one, caches=(cloud.cache.replace("test-region", "other-region"),))
    refused(machine, "cache-unusable", "manifest", "region")


def test_s3_that_does_not_answer(cloud, one, machine):
    machine.wants(
        one, deadline_s=2, caches=("s3://nix?region=x&endpoint=http%3A%2F%2F127.0.0.1%3A1",)
    )
    refused(machine, "deadline", "manifest", "2 s")


@pytest.mark.parametrize(
    "fault",
    [Answer(Response(503)), Reset(1000), Truncate(1000), Stall(1000), Trickle(1000), Lost()],
)
def test_s3_that_fails_for_good(cloud, one, machine, fault):
    cloud.faults.add(fault, path="*/nar/*", times=None)
    machine.wants(one, deadline_s=2)
    refused(machine, "deadline", "pull", "2 s")
    cloud.faults.clear()
    machine.wants(one)
    assert machine.boot().code == 0
    machine.check_booted(one, generation=1)


def test_credentials_that_are_expired_when_they_come(cloud, one, machine):
    machine.wants(one)
    ended = dataclasses.replace(machine.session, expires=cloud.clock.now().replace(year=2020))
    cloud.principals.add_key(ended)
    boot = refused(machine, "cache-denied", "manifest", "expired")
    assert boot.nars == 0
    assert {call.code for call in cloud.service.calls if call.principal == ""} == {"ExpiredToken"}


def test_a_machine_without_a_role(machine, one):
    """What AWS says of a role in its first seconds, said for good: the 30 s are cut to one."""
    machine.wants(one, deadline_s=3)
    machine.faults.add(Answer(Response(404)), path="*/iam/security-credentials/*", times=None)
    hasty = "from calve.transport import imds\nimds._NEW_ROLE_S = 1.0"
    refused(machine, "cache-denied", "manifest", "has no role", hasty=hasty)


# The metadata service


@pytest.mark.parametrize("status", [403, 404])
def test_a_metadata_service_that_gives_no_token(machine, one, status):
    machine.wants(one)
    machine.faults.add(Answer(Response(status)), path="*/api/token", times=None)
    refused(machine, "imds-denied", "imds")


@pytest.mark.parametrize("status", [401, 403])
def test_a_metadata_service_that_refuses_its_own_tokens(machine, one, status):
    machine.wants(one)
    machine.faults.add(Answer(Response(status)), path="*/user-data", times=None)
    refused(machine, "imds-denied", "imds")
    assert machine.faults.injected == {401: 2, 403: 1}[status]


@pytest.mark.parametrize("fault", [None, Answer(Response(500))])
def test_a_metadata_service_that_does_not_answer(machine, monkeypatch, fault):
    """In this process: 60 s of patience are cut to one."""

    class Hasty(imds.Imds):
        def __init__(self, *arguments):
            super().__init__(*arguments, policy=Retry(None, 0.02, 0.1, 0.5))

    monkeypatch.setattr(agent.imds, "Imds", Hasty)
    address = "http://127.0.0.1:1" if fault is None else machine.server.url
    if fault is not None:
        machine.faults.add(fault, times=None)
    out = io.StringIO()
    policy = Policy(keys=machine.keys, root=machine.root, imds=address, hold_s=0)
    assert Agent(policy, Console(out)).run() == 1
    last = list(evidence.read(out.getvalue()))[-1]
    assert (last.kind, last.fields["code"]) == ("fail", "imds-unreachable")


# The machine


def test_a_closure_that_is_no_system(cloud, one, served):
    two = cloud.release(2, init=False)
    served.wants(two)
    refused(served, "system-invalid", "commit", "no init", staged=2)
    served.check(one, two)


def test_too_little_memory(cloud, one, machine):
    machine.memory_mb = 1 << 30
    machine.wants(one)
    boot = refused(machine, "memory-small", "manifest", "memory")
    assert boot.nars == 0


def test_a_root_that_cannot_be_written(cloud, one, machine):
    machine.root.rmdir()
    machine.root.write_text("a file")
    machine.wants(one)
    boot = machine.boot()
    assert boot.fail["code"] == "disk-fault"


@pytest.fixture
def small_disk(machine):
    """Return a function that mounts a tmpfs with options at the machine's root."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mounted = []

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", machine.root], capture_output=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
        mounted.append(machine.root)

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small(cloud, one, machine, small_disk):
    small_disk("size=1m")
    machine.wants(one)
    boot = refused(machine, "disk-small", "manifest", "MB of disk", "MB are free")
    assert boot.nars == 0


def test_a_disk_that_fills_up(cloud, one, machine, small_disk):
    small_disk("size=64m,nr_inodes=60")
    machine.wants(one)
    refused(machine, "disk-small", "pull", staged=6)


def test_a_policy_that_is_none(machine):
    machine.policy()
    with machine.start() as process:
        process.communicate(timeout=60)
    place = machine.directory / "policy.json"

    def spoil(text):
        place.write_text(text)
        return place

    for text in ("", "{", '{"version": 2}', '{"version": 1, "keys": 7}'):
        machine.policy = lambda text=text: spoil(text)
        boot = machine.boot()
        assert boot.fail["code"] == "internal"
        assert "policy.json" in boot.fail["message"]


def test_a_policy_with_a_damaged_key(machine, one):
    machine.keys = ("test-1:notbase64",)
    machine.wants(one)
    boot = machine.boot()
    assert boot.fail["code"] == "internal"
    assert "public key" in boot.fail["message"]
