"""A cache is set up: what changes, what is so already, and stores that cannot hold one."""

from __future__ import annotations

import pytest

from calve.cache import keyring
from calve.cache.init import init, probe
from calve.errors import AccessError, CalveError, SignatureError, UsageError
from calve.nix.signing import Keyring, SecretKey

ROOT = SecretKey.generate("root-1")
ROOTS = Keyring((ROOT.public,))
SETTINGS = ("owner", "public", "encrypted", "uploads")


class FakeBucket:
    """Settings that are in force, are not, or (None) are unknown; `cache` is what is in it."""

    def __init__(self, cache, *, there=True, state=False):
        self.cache = cache
        self.there = there
        self.state = dict.fromkeys(SETTINGS, state)
        self.heeds = True

    def exists(self):
        return self.there

    def create(self):
        assert not self.there
        self.there = True

    def _set(self, name):
        assert self.there
        assert self.state[name] is False
        self.state[name] = True

    def is_owner_enforced(self):
        return self.state["owner"]

    def enforce_owner(self):
        self._set("owner")

    def is_public_access_blocked(self):
        return self.state["public"]

    def block_public_access(self):
        self._set("public")

    def is_encrypted(self):
        return self.state["encrypted"]

    def encrypt(self):
        self._set("encrypted")

    def aborts_uploads(self):
        return self.state["uploads"]

    def abort_uploads(self):
        self._set("uploads")

    def create_in_parts(self, key, data):
        return self.cache.put(key, data, only_new=self.heeds)


@pytest.fixture
def cache(memory):
    return memory()


def states(steps):
    return {one.name: one.state.value for one in steps}


ALL = (
    "bucket",
    "conditions",
    "ownership",
    "public-access-block",
    "encryption",
    "incomplete-uploads",
    "nix-cache-info",
)


def test_a_new_bucket_and_a_second_run(cache):
    bucket = FakeBucket(cache, there=False)
    first = states(init(cache, bucket))
    assert first == {**dict.fromkeys(ALL, "changed"), "conditions": "already"}
    assert list(cache.data) == ["nix-cache-info"]  # the probe is gone
    before = dict(cache.data)
    assert states(init(cache, bucket)) == dict.fromkeys(ALL, "already")
    assert cache.data == before


@pytest.mark.parametrize("there", [True, False])
def test_a_dry_run_writes_nothing(cache, there):
    bucket = FakeBucket(cache, there=there)
    told = states(init(cache, bucket, roots=ROOTS, signers=[ROOT], dry_run=True))
    assert told == {
        **dict.fromkeys((*ALL, "keyring.json"), "would change"),
        "bucket": "already" if there else "would change",
        "conditions": "not tried",
    }
    assert (cache.data, bucket.there, cache.count("put")) == ({}, there, 0)
    assert not any(bucket.state.values())


def test_a_dry_run_of_what_is_set_up(cache):
    bucket = FakeBucket(cache)
    list(init(cache, bucket))
    told = states(init(cache, bucket, dry_run=True))
    assert told == {**dict.fromkeys(ALL, "already"), "conditions": "not tried"}


def test_settings_that_another_s_store_does_not_know(cache):
    told = states(init(cache, FakeBucket(cache, state=None)))
    assert set(told.values()) == {"already", "unsupported", "changed"}
    assert told["encryption"] == "unsupported"


def test_a_directory_gets_its_info_alone(cache):
    assert states(init(cache, None)) == {"nix-cache-info": "changed"}
    assert states(init(cache, None)) == {"nix-cache-info": "already"}


def test_a_keyring_where_a_root_key_is_given(cache):
    assert states(init(cache, None, roots=ROOTS, signers=[ROOT]))["keyring.json"] == "changed"
    assert keyring.read(cache, ROOTS).sequence == 1
    assert states(init(cache, None, roots=ROOTS, signers=[ROOT]))["keyring.json"] == "already"
    assert keyring.read(cache, ROOTS).sequence == 1
    stranger = SecretKey.generate("x")
    with pytest.raises(SignatureError):
        list(init(cache, None, roots=Keyring((stranger.public,)), signers=[stranger]))


def test_another_store_directory(cache):
    cache.data["nix-cache-info"] = b"StoreDir: /gnu/store\n"
    with pytest.raises(UsageError, match="/gnu/store"):
        list(init(cache, None))


# Stores that ignore conditions


def ignoring(cache, *what):
    """Let a cache in memory ignore conditions."""
    put, delete, delete_many = cache.put, cache.delete, cache.delete_many

    def lax_put(key, data, *, only_new=False, match=None, content_type=None):
        new = only_new and "put-new" not in what
        return put(key, data, only_new=new, match=None if "put-match" in what else match)

    def lax_delete(key, *, match=None):
        return delete(key, match=None if "delete" in what else match)

    def lax_many(listed):
        if "many" not in what:
            return delete_many(listed)
        return [one for one in listed if not delete(one.key)]

    cache.put, cache.delete, cache.delete_many = lax_put, lax_delete, lax_many
    bucket = FakeBucket(cache)
    if "complete" in what:
        bucket.create_in_parts = put
    else:
        bucket.create_in_parts = lambda key, data: put(key, data, only_new=True)
    return bucket


NAMES = {
    "put-new": "If-None-Match of PutObject",
    "complete": "If-None-Match of CompleteMultipartUpload",
    "put-match": "If-Match of PutObject",
    "delete": "If-Match of DeleteObject",
    "many": "ETag of DeleteObjects",
}


@pytest.mark.parametrize("what", NAMES)
def test_a_store_that_ignores_one_is_refused_by_its_name(cache, what):
    bucket = ignoring(cache, what)
    with pytest.raises(UsageError) as caught:
        list(init(cache, bucket))
    assert caught.value.exit_code == 2
    assert caught.value.message == f"the store ignores or does not know {NAMES[what]}"
    assert cache.data == {}  # before anything was changed, and the probe is gone
    assert not any(bucket.state.values())


def test_one_that_ignores_all(cache):
    assert probe(cache, ignoring(cache, *NAMES)) == list(NAMES.values())


def test_one_that_refuses_the_header(cache):
    put = cache.put

    def strict(key, data, **options):
        if options:
            error = CalveError("501")
            error.service_code = "NotImplemented"
            raise error
        return put(key, data)

    cache.put = strict
    bucket = FakeBucket(cache)
    bucket.create_in_parts = lambda _key, _data: (_ for _ in ()).throw(UsageError("no"))
    assert probe(cache, bucket) == [NAMES[name] for name in ("put-new", "complete", "put-match")]


def test_one_that_lets_a_condition_never_hold(cache):
    put = cache.put

    def never(key, data, *, only_new=False, match=None, content_type=None):
        return False if match is not None else put(key, data, only_new=only_new)

    cache.put = never
    assert probe(cache, FakeBucket(cache)) == [NAMES["put-match"]]


def test_an_answer_that_was_lost_is_no_fault_of_the_store(cache):
    put = cache.put

    def lost(key, data, **options):
        return put(key, data, **options) and options.get("match") is None

    cache.put = lost
    assert probe(cache, FakeBucket(cache)) == []


def test_a_store_that_denies_is_not_blamed(cache):
    def deny(*_args, **_options):
        raise AccessError("denied")

    cache.put = deny
    with pytest.raises(AccessError):
        probe(cache, FakeBucket(cache))
