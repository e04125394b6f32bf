"""The keyring of a cache at boot: keys that the image does not have, keys that count no longer, and what hides either."""

from __future__ import annotations

import dataclasses
import json

import pytest

from calve.cache.keyring import KEY, Document
from calve.nix.signing import SecretKey
from calve.region.faults import Answer
from calve.region.message import Response

ROOT, NEW = SecretKey.generate("root-1"), SecretKey.generate("new-1")


@pytest.fixture
def machine(machine, cloud):
    """A machine whose image has a root key beside the key that signs."""
    machine.keys = (cloud.key.public.dump(), ROOT.public.dump())
    return machine


def publish(cloud, sequence, *, add=(), revoke=(), signers=(ROOT,)):
    made = Document(sequence, tuple(add), tuple(revoke)).signed(*signers)
    write(cloud, made.dump())


def write(cloud, data):
    with cloud.objects() as objects:
        objects.put(KEY, data)


def seen(machine):
    place = machine.root / "nix/var/calve/keyrings.json"
    return json.loads(place.read_text())["sequences"] if place.exists() else {}


def failed(machine, code, *words):
    boot = machine.boot()
    assert (boot.fail["code"], boot.fail["phase"]) == (code, "manifest")
    assert all(word in boot.fail["message"] for word in words), boot.fail
    assert boot.nars == 0
    return boot


def test_a_key_that_was_added_since_the_image_was_built(cloud, machine):
    release = cloud.release(1, key=NEW)
    machine.wants(release, keys=("new-1",))
    failed(machine, "key-unknown", "new-1", "root-1")
    publish(cloud, 1, add=[NEW.public])
    boot = machine.boot()
    assert boot.ready["paths"] == 6
    assert boot.gets.count(KEY) == 1
    assert seen(machine) == {"s3://nix": 1}


def test_one_that_user_data_does_not_name_does_not_count(cloud, machine):
    release = cloud.release(1, key=NEW)
    publish(cloud, 1, add=[NEW.public])
    machine.wants(release)
    failed(machine, "signature", "signed by new-1")


def test_a_key_that_was_revoked(cloud, one, machine):
    machine.wants(one)
    publish(cloud, 1, revoke=[cloud.key.public])
    failed(machine, "key-unknown", "test-1")
    # Beside one that counts, its name is no error: but what it signed is not trusted.
    machine.wants(one, keys=("test-1", "root-1"))
    failed(machine, "signature", "test-1")


def test_an_added_key_that_was_revoked_and_is_still_named(cloud, one, machine):
    publish(cloud, 2, revoke=[NEW.public])
    machine.wants(one, keys=("test-1", "new-1"))
    assert machine.boot().code == 0


def test_an_older_keyring_or_none_after_a_newer_one(cloud, one, machine):
    publish(cloud, 3)
    machine.wants(one)
    assert machine.boot().code == 0
    machine.wants(cloud.release(2))
    publish(cloud, 2)
    failed(machine, "cache-untrusted", "number 2: number 3 was seen before")
    with cloud.objects() as objects:
        objects.delete(KEY)
    failed(machine, "cache-untrusted", "is gone: number 3")
    # What is committed needs no keyring: nothing is asked for.
    machine.wants(one)
    assert machine.boot().requests == 0
    machine.wants(cloud.release(2))
    publish(cloud, 4)
    assert machine.boot().code == 0
    assert seen(machine) == {"s3://nix": 4}


@pytest.mark.parametrize("data", [b"", b"junk", b"{}", b"x" * 70_000])
def test_a_damaged_keyring(cloud, one, machine, data):
    write(cloud, data)
    machine.wants(one)
    failed(machine, "cache-untrusted", KEY)
    assert seen(machine) == {}


def test_one_that_no_root_key_signed_or_of_a_later_version(cloud, one, machine):
    machine.wants(one)
    publish(cloud, 1, add=[NEW.public], signers=(NEW,))
    failed(machine, "cache-untrusted", "no trusted key signed this; signed by new-1")
    publish(cloud, 1, revoke=[ROOT.public])
    failed(machine, "cache-untrusted", "signed by root-1")
    write(cloud, b'{"version": 2}')
    failed(machine, "cache-unusable", "version 2")


def test_an_image_without_a_key(cloud, one, machine):
    machine.keys = ()
    machine.wants(one)
    failed(machine, "key-unknown", "no key")


def test_a_cache_that_cannot_say_is_left_out(cloud, one, machine):
    cloud.service.add_bucket("other")
    machine.wants(one, caches=(cloud.cache_in("other"), cloud.cache))
    body = b"<Error><Code>AccessDenied</Code></Error>"
    denied = Response(403, {"Content-Type": "application/xml"}, body)
    expired = dataclasses.replace(denied, body=body.replace(b"AccessDenied", b"InvalidAccessKeyId"))
    cloud.faults.add(Answer(expired), path="/other/keyring.json", times=None)
    boot = machine.boot()
    assert boot.ready["paths"] == 6
    others = [c for c in cloud.service.calls if c.bucket == "other" and c.method != "HEAD"]
    assert not others  # and nothing else was asked of it


def test_a_revocation_counts_though_access_is_denied_at_first(cloud, one, machine):
    """To a role that is new AWS denies everything for some seconds: that says nothing of a keyring."""
    body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    publish(cloud, 1, revoke=[cloud.key.public])
    cloud.faults.add(Answer(Response(403, {}, body)), times=1)
    machine.wants(one)
    failed(machine, "key-unknown", "test-1")
    assert cloud.faults.injected == 1
