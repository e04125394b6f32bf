"""Faults that push and pull must survive, through all of their layers, against the region's S3.

What may pass (a reset, a stall, a 503) must not be noticed by who called; what may not (damage, a full disk) must end
in an error of ours that leaves nothing wrong behind, and the next run must do the rest. Faults by `kill -9` are in
test_cache_kill.py.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import calve
from calve.cache import manifest as manifests
from calve.cache.compression import compressor
from calve.cache.objects import open_objects
from calve.cache.pull import plan, pull
from calve.cache.push import push
from calve.cache.repair import repair
from calve.cache.s3 import PART_BYTES
from calve.cache.sources import StoreSource
from calve.cache.verify import verify
from calve.clock import SystemClock
from calve.errors import (
    AccessError,
    CalveError,
    DamagedError,
    RefusedError,
    VerificationError,
)
from calve.nix import nar, narwriter
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.region.faults import Answer, Delay, Lost, Reset, Stall, Truncate
from calve.region.message import BUFFER_BYTES, Body, FileRange, Response
from calve.region.server import Server
from calve.region.signature import Allow
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client

KEY = SecretKey.generate("ops-1")
RING = Keyring((KEY.public,))
READ_S = 0.4
PATHS = 8


class Impatient(SystemClock):
    """Does not wait between tries."""

    def wait(self, event, seconds):
        return event.is_set()


def error_of(status, code, body=b"", **headers):
    """Return an answer of S3's with an error."""
    text = body or f"<Error><Code>{code}</Code><Message>{code}.</Message></Error>".encode()
    return Answer(Response(status, {"Content-Type": "application/xml", **headers}, text))


SLOW_DOWN = error_of(503, "SlowDown")
INTERNAL = error_of(500, "InternalError")


# A store and a cache


def add(store, name, data, references=(), *, lie=0):
    """Add a path of one file to a store, which is told of its NAR's size and `lie` bytes more."""
    path = StorePath(encode32(hashlib.sha256(name.encode()).digest()[:20]), name)
    events = [nar.File(b"", len(data), executable=False)]
    events += [data[at : at + 65536] for at in range(0, len(data), 65536)]
    digest = hashlib.sha256()
    size = nar.emit(iter(events), digest.update)
    info = PathInfo(path, Hash("sha256", digest.digest()), size + lie, tuple(sorted(references)))
    store.stage(info, iter(events))
    store.commit([info])
    return path


@dataclass
class Shop:
    """A store with a closure of 8 paths, one of which goes out in parts, and the key of who may do everything."""

    root: Path
    top: StorePath
    big: StorePath
    libs: list[StorePath]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "from"
    with LocalStore(root, create=True) as store:
        libs = [add(store, f"lib{n}", os.urandom(3000 * n) + b"t" * 500) for n in range(5)]
        libs.append(add(store, "large", os.urandom(700_000), libs[:2]))
        big = add(store, "big", os.urandom(PART_BYTES + 300_000), libs[:2])
        top = add(store, "system-1", b"top", [*libs, big])
    return Shop(root, top, big, libs)


@pytest.fixture
def store(shop):
    with LocalStore(shop.root) as made:
        yield made


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr("calve.cache.s3._COMPLETE_READ_S", READ_S)
    with Client(read_s=READ_S, clock=Impatient()) as made:
        yield made


@pytest.fixture
def provider(admin):
    return Static(Credentials(admin.access_key, admin.secret_key, admin.token))


@pytest.fixture
def cache(server, client, provider):
    return open_objects(f"s3://nix?region=test-region&endpoint={server.url}", client, provider)


@pytest.fixture
def pushed(cache, store, shop):
    return push(store, [shop.top], cache, KEY).manifests[shop.top]


def pulled(to, cache, shop, manifest=None):
    """Pull into a store; return what was done, having compared the closure there."""
    with LocalStore(to, create=True) as sink, LocalStore(shop.root) as source:
        done = pull(plan([cache], [shop.top], sink, RING, manifest=manifest), sink)
        got = [replace(info, signatures=()) for info in sink.closure([shop.top])]
        assert got == source.closure([shop.top])
        for info in got:
            digest = hashlib.sha256()
            assert narwriter.dump(sink.real(info.path), digest.update) == info.nar_size
            assert digest.digest() == info.nar_hash.digest
    assert {name for name in os.listdir(to / "nix/store") if name.startswith(".")} == {".links"}
    return done


def valid_paths(to):
    """Return what is valid in a store."""
    with contextlib.closing(sqlite3.connect(to / "nix/var/nix/db/db.sqlite")) as connection:
        return {row[0] for row in connection.execute("select path from ValidPaths")}


def sound(cache):
    """Assert that nothing in a cache is damaged, missing or dangling."""
    found = verify(cache, RING, deep=True).errors
    assert not found, found


class First:
    """Has each request fail the first time that it is made."""

    def __init__(self, fault, method="*", only=""):
        self.fault = fault
        self.method = method
        self.only = only
        self.seen = Counter()
        self.lock = threading.Lock()

    def __call__(self, request):
        query = re.sub(r"uploadId=[^&]*", "", request.query)
        with self.lock:
            self.seen[request.method, request.path, query] += 1
            first = self.seen[request.method, request.path, query] == 1
        right = self.method in {"*", request.method} and self.only in request.path
        return self.fault if first and right else None

    @property
    def injected(self):
        return len(
            [one for one in self.seen if self.method in {"*", one[0]} and self.only in one[1]]
        )


# What may pass, in every phase

PASSING = {
    "reset before it is performed": Lost(performed=False),
    "reset instead of an answer": Lost(performed=True),
    "reset behind the head": Reset(),
    "reset in the body": Reset(after_bytes=100),
    "cut behind the head": Truncate(),
    "cut in the body": Truncate(after_bytes=100),
    "stall": Delay(READ_S + 0.7),
    "stall in the body": Stall(after_bytes=100),
    "503": SLOW_DOWN,
    "500": INTERNAL,
    "503 without a body": Answer(Response(503)),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_push_where_every_request_fails_once(name, server, service, cache, store, shop, tmp_path):
    server.faults = hook = First(PASSING[name])
    done = push(store, [shop.top], cache, KEY)
    server.faults = None
    assert hook.injected > 2 * PATHS
    assert done.new_paths == PATHS
    sound(cache)
    assert not list(cache.list("pending/"))
    pulled(tmp_path / "to", cache, shop, done.manifests[shop.top])


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("by_manifest", [True, False])
def test_a_pull_where_every_request_fails_once(
    name, by_manifest, server, cache, pushed, shop, tmp_path
):
    server.faults = hook = First(PASSING[name])
    done = pulled(tmp_path / "to", cache, shop, pushed if by_manifest else None)
    server.faults = None
    assert hook.injected >= PATHS + (1 if by_manifest else PATHS)
    assert (
        done.retries == 0
    )  # requests were made again, and connections resumed: no path was begun anew


@pytest.mark.parametrize("fault", [Lost(performed=False), SLOW_DOWN, INTERNAL, Delay(READ_S + 0.5)])
def test_what_does_not_pass_is_an_error_and_the_next_run_does_the_rest(
    fault, server, faults, cache, store, shop, tmp_path
):
    nar_key = f"*/nar/{encode32(store.path_info(shop.libs[-1]).nar_hash.digest)}*"
    faults.add(fault, path=nar_key, times=None)
    with pytest.raises(CalveError) as caught:
        push(store, [shop.top], cache, KEY)
    assert caught.value.exit_code in {1, 8}
    sound(cache)
    faults.clear()
    digest = push(store, [shop.top], cache, KEY).manifests[shop.top]
    sound(cache)

    faults.add(fault, path=nar_key, times=None)
    with pytest.raises(CalveError) as caught:
        pulled(tmp_path / "to", cache, shop, digest)
    assert caught.value.exit_code in {1, 8}
    faults.clear()
    assert pulled(tmp_path / "to", cache, shop, digest).paths <= PATHS


# Answers that are wrong, and look right


class Bent:
    """Serves with the first answer to each GET bent."""

    def __init__(self, handle, bend, only=""):
        self.handle = handle
        self.bend = bend
        self.only = only
        self.skip = ()
        self.whole = False  # `only` is the whole of a path
        self.seen = set()
        self.bent = 0

    def __call__(self, request):
        response = self.handle(request)
        name = (request.path, request.query, request.headers.get("range"))
        right = request.path == self.only if self.whole else self.only in request.path
        if request.method != "GET" or name in self.seen or request.path in self.skip or not right:
            return response
        self.seen.add(name)
        self.bent += 1
        return self.bend(response)


def halved(response):
    """Give half of a body, and the length of that."""
    body = response.body
    if isinstance(body, FileRange):
        return replace(response, body=replace(body, size=body.size // 2))
    return replace(response, body=body[: len(body) // 2])


def longer(response):
    """Give more than there is, and the length of that."""
    body = response.body
    if isinstance(body, FileRange):
        body = os.pread(body.file.fileno(), body.size, body.offset)
        response.close()
    return replace(response, body=body + b"more")


def flipped(response):
    body = response.body
    if isinstance(body, FileRange):
        body = os.pread(body.file.fileno(), body.size, body.offset)
        response.close()
    at = len(body) // 2
    return replace(
        response, body=body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :] if body else b""
    )


BENT = {"half, with that length": halved, "more, with that length": longer, "wrong": flipped}


@pytest.mark.parametrize("name", BENT)
def test_a_pull_where_each_nar_is_wrong_once(name, server, service, cache, pushed, shop, tmp_path):
    server.handle = bent = Bent(service.handle, BENT[name], only="/nar/")
    done = pulled(tmp_path / "to", cache, shop, pushed)
    assert bent.bent >= PATHS
    # All were begun anew, but for the large one where its end, which was missing, came by ranges.
    assert PATHS - 1 <= done.retries <= PATHS


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("what", ["manifest", "narinfo"])
def test_a_pull_where_what_describes_it_is_wrong(
    name, what, server, service, cache, pushed, shop, tmp_path
):
    only = {"manifest": "/manifests/", "narinfo": f"{shop.big.digest}.narinfo"}[what]
    server.handle = bent = Bent(service.handle, BENT[name], only=only)
    manifest = pushed if what == "manifest" else None
    try:
        pulled(tmp_path / "to", cache, shop, manifest)
    except CalveError as error:
        assert error.exit_code == 7
        assert valid_paths(tmp_path / "to") == set()
    assert bent.bent == 1
    pulled(tmp_path / "to", cache, shop, manifest)


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("check", [True, False])
def test_a_push_where_each_object_that_it_reads_is_wrong_once(
    name, check, server, service, cache, pushed, store, shop, tmp_path
):
    """Damage is taken for nothing, and looked at again or replaced; but for the root, which is not bent here."""

    def bend(response):
        return BENT[name](response) if response.status == 200 else response

    bent = Bent(service.handle, bend)
    bent.skip = ("/nix/roots/push/system.json", "/nix/")
    server.handle = bent
    assert push(store, [shop.top], cache, KEY, check=check).manifests[shop.top] == pushed
    assert bent.bent > PATHS  # the manifest and the narinfos
    server.handle = service.handle
    sound(cache)
    pulled(tmp_path / "to", cache, shop, pushed)


@pytest.mark.parametrize("name", BENT)
@pytest.mark.parametrize("only", ["/nix/roots/push/system.json", "/nix/"])
def test_a_push_that_cannot_know_what_there_is(
    name, only, server, service, cache, pushed, store, shop, tmp_path
):
    """What cannot be replaced, because others wrote it, ends it: a root, the listing of pushes under way."""
    server.handle = bent = Bent(service.handle, BENT[name], only=only)
    bent.whole = True
    with contextlib.suppress(VerificationError):
        push(store, [shop.top], cache, KEY, check=True)
    assert bent.bent == 1
    server.handle = service.handle
    sound(cache)
    assert push(store, [shop.top], cache, KEY, check=True).manifests[shop.top] == pushed
    sound(cache)
    pulled(tmp_path / "to", cache, shop, pushed)


class Garbled(Body):
    """A request's body, with its first byte wrong."""

    def __init__(self, body):
        self.body = body
        self.length = body.length
        self.first = True

    left = property(lambda self: self.body.left)
    awaited = property(lambda self: self.body.awaited)

    def read(self, size=BUFFER_BYTES):
        data = self.body.read(size)
        first, self.first = self.first, False
        return bytes([data[0] ^ 0xFF]) + data[1:] if first and data else data


@pytest.mark.parametrize("only", ["/nar/", ".narinfo", "/manifests/", "/roots/", "/pending/"])
def test_a_push_whose_bytes_arrive_wrong(only, server, service, cache, store, shop, tmp_path):
    """Each request bears the hash of its body: what arrives otherwise is refused, and is not there."""
    garbled = []

    def handle(request):
        if request.method == "PUT" and only in request.path and not garbled:
            garbled.append(request.path)
            request = replace(request, body=Garbled(request.body))
        return service.handle(request)

    server.handle = handle
    with contextlib.suppress(RefusedError):
        push(store, [shop.top], cache, KEY, check=True)
    assert len(garbled) == 1
    assert [call.code for call in service.calls if call.status == 400] in (
        ["XAmzContentSHA256Mismatch"],
        ["BadDigest"],
    )
    server.handle = service.handle
    sound(cache)
    digest = push(store, [shop.top], cache, KEY).manifests[shop.top]
    sound(cache)
    pulled(tmp_path / "to", cache, shop, digest)


# What is wrong for good


def rewrite(cache, path, change):
    """Change a narinfo in the cache, its signature with it; return what was there."""
    key = f"{path.digest}.narinfo"
    old = NarInfo.parse(cache.get(key, 65536))
    new = change(old)
    cache.put(key, replace(new, info=replace(new.info, signatures=()).signed(KEY)).dump())
    return old


def remanifest(cache, digest, path, change):
    """Write a manifest that says otherwise of a path, signed; return its digest."""
    whole = manifests.read(cache, digest)
    entries = []
    for entry in whole.paths:
        made = change(entry) if entry.info.path == path else entry
        entries.append(replace(made, info=replace(made.info, signatures=()).signed(KEY)))
    body = replace(whole, paths=tuple(entries)).dump()
    made = manifests.digest_of(body)
    cache.put(manifests.key(made), manifests.pack(body, [KEY.sign(manifests.signed_bytes(made))]))
    return made


@pytest.mark.parametrize("lie", [-8, 8, 1 << 40, -2_000_000])
@pytest.mark.parametrize("by_manifest", [True, False])
def test_a_pull_of_a_nar_whose_size_is_a_lie(lie, by_manifest, cache, pushed, shop, tmp_path):
    """Even one that a trusted key signed."""

    def change(entry):
        return replace(entry, info=replace(entry.info, nar_size=entry.info.nar_size + lie))

    digest = remanifest(cache, pushed, shop.big, change) if by_manifest else None
    rewrite(cache, shop.big, change)
    with pytest.raises(DamagedError, match=r"big"):
        pulled(tmp_path / "to", cache, shop, digest)
    assert valid_paths(tmp_path / "to") == set()


@pytest.mark.parametrize("lie", [-8, 8, 1 << 40])
def test_a_push_of_a_path_whose_size_is_a_lie(lie, cache, service, tmp_path):
    with LocalStore(tmp_path / "here", create=True) as store:
        lib = add(store, "lib", os.urandom(400_000), lie=lie)
        good = add(store, "good", b"good")
        top = add(store, "top", b"top", [lib, good])
        with pytest.raises(DamagedError, match="lib"):
            push(store, [top], cache, KEY)
        keys = service.bucket("nix").keys()
        assert not [key for key in keys if key.startswith(("manifests/", "roots/"))]
        assert f"{lib.digest}.narinfo" not in keys
        assert f"{top.digest}.narinfo" not in keys
        assert f"nar/{encode32(store.path_info(lib).nar_hash.digest)}.nar.zst" not in keys
        assert service.uploads.pending() == []
    sound(cache)


def test_a_push_puts_right_a_narinfo_whose_size_is_a_lie(cache, pushed, store, shop, tmp_path):
    rewrite(
        cache,
        shop.big,
        lambda old: replace(old, info=replace(old.info, nar_size=old.info.nar_size + 8)),
    )
    assert verify(cache, RING).errors
    push(store, [shop.top], cache, KEY, check=True)
    sound(cache)
    pulled(tmp_path / "to", cache, shop)


@pytest.mark.parametrize("how", ["whole", "file", "signature"])
def test_narinfos_that_are_swapped(how, cache, pushed, store, shop, tmp_path):
    """Wholly; or only what they say of the NAR's file; or the signature and what it signed, for another path."""
    one, two = shop.libs[3], shop.libs[4]
    keys = [f"{path.digest}.narinfo" for path in (one, two)]
    old = [NarInfo.parse(cache.get(key, 65536)) for key in keys]
    for key, mine, other in zip(keys, old, reversed(old), strict=True):
        made = other
        if how == "file":
            made = replace(other, info=mine.info)
        elif how == "signature":
            made = replace(other, info=replace(other.info, path=mine.info.path))
        cache.put(key, made.dump())
    with pytest.raises(VerificationError):
        pulled(tmp_path / "to", cache, shop)
    assert valid_paths(tmp_path / "to") == set()
    if how == "file":  # both NARs are there, of these sizes: only who reads them knows
        assert not repair(cache, RING, [StoreSource(store, "here")], deep=True).left
    else:
        push(store, [shop.top], cache, KEY, check=True)
    sound(cache)
    pulled(tmp_path / "to", cache, shop)


def bomb(head=b"", size=256 << 20):
    """Return little that is much: zeros behind a head, by zstd."""
    made = compressor(3)
    parts = [bytes(made.compress(head))]
    zeros = bytes(1 << 20)
    parts += [bytes(made.compress(zeros)) for _ in range(size >> 20)]
    return b"".join([*parts, bytes(made.flush())])


def test_a_pull_of_a_bomb(cache, pushed, store, shop, tmp_path, service):
    whole = bytearray()
    narwriter.dump(store.real(shop.libs[3]), whole.extend)
    data = bomb(bytes(whole))
    assert len(data) < 100_000
    for path in (shop.libs[3], shop.top):
        cache.put("nar/bomb.nar.zst", data)
        old = rewrite(
            cache,
            path,
            lambda old: replace(old, url="nar/bomb.nar.zst", file_hash=None, file_size=len(data)),
        )
        with pytest.raises(DamagedError):
            pulled(tmp_path / "to", cache, shop)
        assert valid_paths(tmp_path / "to") == set()
        cache.put(f"{path.digest}.narinfo", old.dump())


@pytest.mark.parametrize("how", ["bomb", "wrong", "half", "text"])
@pytest.mark.parametrize("check", [True, False])
def test_a_push_to_a_cache_whose_manifest_is_damaged(
    how, check, cache, pushed, store, shop, tmp_path
):
    key = manifests.key(pushed)
    data = cache.get(key, 1 << 20)
    at = len(data) - 30
    bad = {
        "bomb": bomb(),
        "wrong": data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :],
        "half": data[: len(data) // 2],
        "text": b"<html>",
    }[how]
    cache.put(key, bad)
    with pytest.raises(DamagedError):
        pulled(tmp_path / "to", cache, shop, pushed)
    assert push(store, [shop.top], cache, KEY, check=check).manifests[shop.top] == pushed
    assert cache.get(key, 1 << 20) != bad
    sound(cache)
    pulled(tmp_path / "to", cache, shop, pushed)


def test_a_push_to_a_cache_with_a_narinfo_without_end(cache, pushed, store, shop, tmp_path):
    cache.put(f"{shop.big.digest}.narinfo", b"References: " + b"x" * (5 << 20))
    with pytest.raises(DamagedError):
        pulled(tmp_path / "to", cache, shop)
    push(store, [shop.top], cache, KEY, check=True)
    sound(cache)
    pulled(tmp_path / "to", cache, shop)


# Who asks, and when


class Role:
    """Credentials that end as somebody wants, and are renewed when they are asked for again."""

    def __init__(self, principals):
        self.principals = principals
        principals.set_policy("role", (Allow("*"),))
        self.issued = 0
        self.lock = threading.Lock()
        self.key = self._issue()

    def _issue(self):
        self.issued += 1
        later = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
        return self.principals.add_session("role", f"session-{self.issued}", later)

    def expire(self):
        ended = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=1)
        self.principals.add_key(replace(self.key, expires=ended))

    def credentials(self, *, refresh=False):
        with self.lock:
            if refresh:
                self.key = self._issue()
            return Credentials(self.key.access_key, self.key.secret_key, self.key.token)


@pytest.mark.parametrize("after", [0, 3, 9, 17])
def test_credentials_that_expire_in_the_middle(
    after, server, client, principals, service, store, shop, tmp_path
):
    role = Role(principals)
    cache = open_objects(f"s3://nix?region=test-region&endpoint={server.url}", client, role)
    left = Counter()

    def expire(request):
        left["requests"] += 1
        if left["requests"] == after + 1:
            role.expire()

    server.faults = expire
    digest = push(store, [shop.top], cache, KEY).manifests[shop.top]
    assert role.issued == 2
    left.clear()
    done = pulled(tmp_path / "to", cache, shop, digest)
    server.faults = None
    assert role.issued == 2 + (left["requests"] > after)
    assert done.retries == 0
    sound(cache)


def test_credentials_that_expire_and_are_not_renewed(
    server, cache, client, principals, store, shop, tmp_path, pushed
):
    key = principals.add_session("role", "one", dt.datetime.now(dt.UTC) - dt.timedelta(hours=1))
    principals.set_policy("role", (Allow("*"),))
    old = Static(Credentials(key.access_key, key.secret_key, key.token))
    theirs = open_objects(f"s3://nix?region=test-region&endpoint={server.url}", client, old)
    with pytest.raises(AccessError, match="Expired"):
        push(store, [shop.top], theirs, KEY, check=True)
    with pytest.raises(AccessError, match="Expired"):
        pulled(tmp_path / "to", theirs, shop, pushed)
    sound(cache)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_an_hour_wrong(
    hours, service, clock, client, provider, store, shop, tmp_path
):
    clock.shift = dt.timedelta(hours=hours)
    with Server(service.handle, clock=clock) as server:
        url = f"s3://nix?region=test-region&endpoint={server.url}"
        done = push(store, [shop.top], open_objects(url, client, provider), KEY)
        assert done.new_paths == PATHS
        refused = [call.code for call in service.calls if call.status == 403]
        assert refused == ["RequestTimeTooSkewed"]  # the first one; then it is known
        cache = open_objects(url, client, provider)
        pulled(tmp_path / "to", cache, shop, done.manifests[shop.top])
        assert [call.code for call in service.calls if call.status == 403] == 2 * refused
        sound(cache)
        client.close()


def test_a_nar_that_is_gone_and_called_denied(
    server, client, principals, cache, pushed, store, shop, tmp_path
):
    """Who may not list is told 403 of what is missing: the narinfo is read again, and may name another NAR."""
    policy = [Allow("s3:GetObject", "arn:aws:s3:::nix/*")]
    key = principals.add_user("reader", policy)
    mine = Static(Credentials(key.access_key, key.secret_key, key.token))
    theirs = open_objects(f"s3://nix?region=test-region&endpoint={server.url}", client, mine)
    old = NarInfo.parse(cache.get(f"{shop.big.digest}.narinfo", 65536))
    data = cache.get(old.url, 1 << 26)
    cache.delete(old.url)
    with pytest.raises(AccessError, match="denied or missing"):
        pulled(tmp_path / "to", theirs, shop, pushed)
    cache.put("nar/moved.nar.zst", data)
    rewrite(cache, shop.big, lambda old: replace(old, url="nar/moved.nar.zst"))
    assert pulled(tmp_path / "to", theirs, shop, pushed).retries == 1
    with pytest.raises(AccessError, match="denied or missing"):
        pulled(tmp_path / "none", theirs, replace(shop, top=StorePath("0" * 32, "none")))


# A full disk

SIZE, INODES = 32 << 20, 500
NAMESPACE = """
set -eu
dir=$1 bytes=$2 inodes=$3
shift 3
mount -t tmpfs -o "size=$SIZE,nr_inodes=$INODES" tmpfs "$dir"
mkdir "$dir/filler"
(cd "$dir/filler" && head -c "$bytes" /dev/zero >zeros && seq "$inodes" | xargs -r touch)
set +e
"$@" >"$dir.out"
echo "code $?"
echo "kept $(find "$dir" -name 'verified.*' | wc -l)"
rm -r "$dir/filler"
"$@" >"$dir.out"
echo "code $?"
find "$dir" -name '.calve-*' | sed 's/^/left /'
"""


@pytest.fixture(scope="session")
def namespace():
    """Return a function that runs a command twice on a file system of its own: a small one, and then a larger one."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    tried = subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        pytest.skip(f"no namespace with a file system of its own: {tried.stderr.strip()}")

    def run(directory, command, env, *, free_bytes=SIZE, free_inodes=INODES):
        directory.mkdir(exist_ok=True)
        # Beside what fills it there are the root, the filler's directory and the zeros.
        filler = [directory, SIZE - free_bytes, max(0, INODES - free_inodes - 3)]
        argv = ["unshare", "-rm", "sh", "-c", NAMESPACE, "sh", *filler, *command]
        env = env | {"SIZE": str(SIZE), "INODES": str(INODES)}
        return subprocess.run(
            [str(one) for one in argv], capture_output=True, text=True, env=env, timeout=120
        )

    return run


@pytest.fixture
def env(admin, tmp_path):
    return {
        **os.environ,
        "PYTHONPATH": str(Path(calve.__file__).parents[1]),
        "AWS_ACCESS_KEY_ID": admin.access_key,
        "AWS_SECRET_ACCESS_KEY": admin.secret_key,
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }


@pytest.mark.parametrize(
    "free",
    [
        {"free_bytes": 40 << 10},
        {"free_bytes": 6 << 20},
        {"free_bytes": 17450 << 10},
        {"free_inodes": 10},
        {"free_inodes": 22},
        {"free_inodes": 28},
    ],
    ids=repr,
)
def test_a_pull_to_a_disk_that_is_full(free, namespace, server, env, pushed, shop, tmp_path):
    """While the database is made, in the middle of a NAR, in the last of them."""
    url = f"s3://nix?region=test-region&endpoint={server.url}"
    command = [sys.executable, "-m", "calve", "pull", shop.top, "--from", url]
    command += ["--store", tmp_path / "disk/to", "--trusted", KEY.public.dump()]
    done = namespace(tmp_path / "disk", [*command, "--manifest", pushed], env, **free)
    failed, kept, again, *left = done.stdout.splitlines()
    assert (failed, again, left) == ("code 1", "code 0", []), done.stderr
    assert kept == "kept 0"  # room is what is wanted
    assert "Traceback" not in done.stderr
    assert re.search("No space left|full", done.stderr)


@pytest.mark.parametrize(
    "free",
    [
        {"free_bytes": 16 << 10},
        {"free_bytes": 6 << 20},
        {"free_bytes": 17420 << 10},
        {"free_inodes": 4},
        {"free_inodes": 20},
    ],
    ids=repr,
)
def test_a_push_to_a_directory_on_a_disk_that_is_full(free, namespace, env, shop, tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY.dump())
    key.chmod(0o600)
    command = [sys.executable, "-m", "calve", "push", shop.top, "--store", shop.root, "--key", key]
    command += ["--to", f"file://{tmp_path}/disk/cache"]
    # What was pushed is verified where it is.
    checked = [
        "sh",
        "-c",
        '"$@" && exec "$0" -m calve cache verify --deep --cache "$CACHE" --trusted "$KEY"',
    ]
    env |= {"CACHE": f"file://{tmp_path}/disk/cache", "KEY": KEY.public.dump()}
    done = namespace(tmp_path / "disk", [*checked, sys.executable, *command], env, **free)
    failed, _, again, *left = done.stdout.splitlines()
    assert (failed, again, left) == ("code 1", "code 0", []), done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr


def test_a_push_needs_no_temporary_disk(namespace, server, env, service, shop, tmp_path):
    """The home and the directory for temporary files are on a disk that takes nothing at all."""
    key = tmp_path / "key"
    key.write_text(KEY.dump())
    key.chmod(0o600)
    url = f"s3://nix?region=test-region&endpoint={server.url}"
    command = [sys.executable, "-m", "calve", "push", shop.top, "--store", shop.root, "--key", key]
    env |= {name: str(tmp_path / "disk") for name in ("TMPDIR", "HOME", "XDG_STATE_HOME")}
    done = namespace(tmp_path / "disk", [*command, "--to", url], env, free_bytes=0, free_inodes=0)
    assert done.stdout.splitlines()[0] == "code 0", done.stderr
    assert service.counts["UploadPart"] == 2
