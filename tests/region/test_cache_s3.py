"""calve.cache over S3: the object service is written from AWS's documents and shares no code with the client."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from dataclasses import replace

import pytest

from calve.cache import manifest as manifests
from calve.cache.compression import Codec
from calve.cache.objects import Listed, MissingCacheError, open_objects
from calve.cache.pull import plan, pull
from calve.cache.push import push
from calve.cache.s3 import PART_BYTES
from calve.clock import SystemClock
from calve.errors import (
    AccessError,
    CalveError,
    CancelledError,
    DamagedError,
    NotFoundError,
    TransientError,
    UsageError,
)
from calve.nix import nar
from calve.nix.closure import closure
from calve.nix.hashes import Hash, encode32
from calve.nix.narinfo import NarInfo, PathInfo
from calve.nix.signing import Keyring, SecretKey
from calve.nix.store import LocalStore
from calve.nix.storepath import StorePath
from calve.region.faults import Answer, Flip, Lost, Reset, Truncate
from calve.region.message import Response
from calve.region.signature import Allow
from calve.tasks import Cancel
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client

REGION = "test-region"


@pytest.fixture
def client():
    with Client(read_s=5.0) as made:
        yield made


@pytest.fixture
def objects_of(server, client):
    """Return a function: a key of the service in, the cache as that user sees it out."""

    def make(key, *, bucket="nix", prefix="", region=REGION, more=""):
        provider = None
        if key is not None:
            provider = Static(Credentials(key.access_key, key.secret_key, key.token))
        url = f"s3://{bucket}{prefix}?region={region}&endpoint={server.url}{more}"
        return open_objects(url, client, provider)

    return make


@pytest.fixture
def cache(objects_of, admin):
    return objects_of(admin)


SLOW = Response(
    503,
    {"Content-Type": "application/xml"},
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
)


def keys(cache, prefix=""):
    return [one.key for one in cache.list(prefix)]


# Objects


def test_objects_are_put_got_listed_and_deleted(cache, service):
    assert cache.put("nar/a+b=.nar", b"data")
    assert cache.put("b.narinfo", b"")
    assert cache.get("nar/a+b=.nar", 4) == b"data"
    assert cache.head("nar/a+b=.nar") == 4
    assert cache.head("nar/none") is None
    assert keys(cache) == ["b.narinfo", "nar/a+b=.nar"]
    assert keys(cache, "nar/") == ["nar/a+b=.nar"]
    with cache.open("nar/a+b=.nar") as source:
        assert source.read(10) == b"data"
        assert source.read(10) == b""
    entry = service.bucket("nix").get("b.narinfo")
    assert entry.headers["content-type"] == "text/x-nix-narinfo"
    assert list(entry.checksums) == ["sha256"]
    cache.delete("b.narinfo")
    cache.delete("b.narinfo")
    assert keys(cache) == ["nar/a+b=.nar"]


def test_a_prefix_stands_before_every_key(objects_of, admin, service):
    cache = objects_of(admin, prefix="/team/nix")
    cache.put("x", b"1")
    assert service.bucket("nix").keys() == ["team/nix/x"]
    assert keys(cache) == ["x"]
    assert cache.get("x", 1) == b"1"
    assert cache.url == "s3://nix/team/nix"


def test_only_new_and_match(cache):
    assert cache.put("x", b"one", only_new=True)
    assert not cache.put("x", b"two", only_new=True)
    data, tag = cache.get_tagged("x", 10)
    assert cache.put("x", data + b"!", match=tag)
    assert not cache.put("x", b"late", match=tag)
    assert not cache.put("gone", b"late", match=tag)
    assert cache.get("x", 10) == b"one!"


@pytest.mark.parametrize(
    "size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 5]
)
def test_streams_go_out_whole_or_in_parts(cache, service, size):
    data = os.urandom(size)
    chunks = [data[at : at + 100_000] for at in range(0, size, 100_000)]
    assert cache.put_stream("nar/x", iter(chunks), only_new=True)
    digest = hashlib.sha256()
    with cache.open("nar/x") as source:
        while part := source.read(65536):
            digest.update(part)
    assert digest.digest() == hashlib.sha256(data).digest()
    parts = -(-size // PART_BYTES) if size >= PART_BYTES else 0
    assert service.counts["UploadPart"] == parts
    assert service.counts["PutObject"] == (0 if parts else 1)
    assert not cache.put_stream("nar/x", iter(chunks), only_new=True)
    assert service.uploads.pending() == []


def test_a_stream_that_fails_leaves_neither_object_nor_parts(cache, service):
    def chunks(size):
        yield os.urandom(size)
        raise DamagedError("changed on disk")

    for size in (10, PART_BYTES + 10):
        with pytest.raises(DamagedError, match="changed"):
            cache.put_stream("nar/x", chunks(size), only_new=True)
    assert service.bucket("nix").keys() == []
    assert service.uploads.pending() == []


def test_another_upload_that_ends_first_wins(cache, service):
    def chunks():
        yield os.urandom(PART_BYTES)
        cache.put("nar/x", b"theirs")
        yield b"rest"

    assert not cache.put_stream("nar/x", chunks(), only_new=True)
    assert cache.get("nar/x", 10) == b"theirs"
    assert service.uploads.pending() == []


def test_an_error_inside_a_200_of_complete_is_an_error(cache, service, faults):
    body = b"<Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>"
    faults.add(
        Answer(Response(200, {"Content-Type": "application/xml"}, body)), method="POST", skip=1
    )
    with pytest.raises(TransientError, match="InternalError"):
        cache.put_stream("nar/x", iter([os.urandom(PART_BYTES)]), only_new=True)
    assert service.uploads.pending() == []


def test_a_completion_whose_answer_is_lost_is_not_an_error(cache, service, faults):
    faults.add(Lost(performed=True), method="POST", skip=1)
    cache.put_stream("nar/x", iter([os.urandom(PART_BYTES)]), only_new=True)
    assert cache.head("nar/x") == PART_BYTES


@pytest.mark.parametrize("only_new", [True, False])
def test_an_upload_that_is_gone_because_it_was_completed(cache, faults, only_new):
    body = b"<Error><Code>NoSuchUpload</Code><Message>It may have been completed.</Message></Error>"
    gone = Response(404, {"Content-Type": "application/xml"}, body)
    faults.add(Lost(performed=True), method="POST", skip=1)
    faults.add(Answer(gone), method="POST", skip=1)
    written = cache.put_stream("nar/x", iter([os.urandom(PART_BYTES)]), only_new=only_new)
    assert written is not only_new  # it may have been another's
    assert cache.head("nar/x") == PART_BYTES
    faults.add(Answer(gone), method="POST", skip=1)
    with pytest.raises(NotFoundError):
        cache.put_stream("nar/y", iter([os.urandom(PART_BYTES)]), only_new=only_new)


# Listing, removing, ranges


class Impatient(SystemClock):
    """Does not wait."""

    def wait(self, event, seconds):
        return event.is_set()


def removal(*errors):
    """Answer a DeleteObjects with (key, code) pairs of what stays."""
    text = "".join(f"<Error><Key>{k}</Key><Code>{c}</Code></Error>" for k, c in errors)
    return Response(200, {}, f"<DeleteResult>{text}</DeleteResult>".encode())


def test_a_listing_says_size_time_and_tag(cache, clock):
    before = clock.now().timestamp()
    cache.put("nar/x", b"12345")
    (one,) = cache.list("nar/")
    _, tag = cache.get_tagged("nar/x", 10)
    assert one == Listed("nar/x", 5, tag, one.modified_s)
    assert before - 1 <= one.modified_s <= clock.now().timestamp()


def test_the_tag_of_an_upload_in_parts_is_the_listing_s(cache):
    cache.put_stream("x", iter([os.urandom(PART_BYTES + 1)]))
    (one,) = cache.list("")
    assert one.tag.endswith('-2"')
    assert cache.delete("x", match=one.tag)


@pytest.mark.parametrize(
    "entry",
    [
        "<Size>1</Size><ETag>e</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified>",
        "<Key>x</Key><ETag>e</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified>",
        "<Key>x</Key><Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>",
        "<Key>x</Key><Size>1</Size><ETag>e</ETag>",
        "<Key>x</Key><Size>1</Size><ETag>e</ETag><LastModified>2026-01-01</LastModified>",
        "<Key>x</Key><Size>-1</Size><ETag>e</ETag><LastModified>2026-01-01T00:00Z</LastModified>",
        "<Key>x</Key><Size>9999999999999999999</Size><ETag>e</ETag><LastModified>2026-01-01T00:00Z</LastModified>",
    ],
)
def test_a_malformed_entry_of_a_listing(cache, faults, entry):
    body = f"<ListBucketResult><Contents>{entry}</Contents></ListBucketResult>".encode()
    faults.add(Answer(Response(200, {}, body)), method="GET")
    with pytest.raises(DamagedError, match="an entry of the listing"):
        list(cache.list(""))


def test_a_version_is_removed_and_another_stays(cache, service):
    cache.put("x", b"one")
    _, old = cache.get_tagged("x", 10)
    cache.put("x", b"two")
    assert not cache.delete("x", match=old)
    assert cache.get("x", 10) == b"two"
    (one,) = cache.list("")
    assert cache.delete("x", match=one.tag)
    assert cache.delete("x", match=one.tag)  # there is nothing
    assert cache.delete("x")
    assert service.bucket("nix").keys() == []


def test_a_removal_whose_answer_is_lost(cache, faults):
    cache.put("x", b"one")
    (one,) = cache.list("")
    faults.add(Lost(performed=True), method="DELETE")
    assert cache.delete("x", match=one.tag)
    assert faults.injected == 1


def test_of_many_those_that_changed_stay(objects_of, admin, service):
    cache = objects_of(admin, prefix="/team/nix")
    for key in ("a", "b&<>'c", "d", "e"):
        cache.put(key, b"old")
    listed = list(cache.list(""))
    cache.put("d", b"new")
    cache.delete("e")
    assert [one.key for one in cache.delete_many(iter(listed))] == ["d"]
    assert service.bucket("nix").keys() == ["team/nix/d"]
    assert service.counts["DeleteObjects"] == 1


def test_nothing_is_removed_without_a_request(cache, service):
    assert cache.delete_many([]) == []
    assert not service.calls


def test_many_are_removed_a_thousand_a_request(cache, service, s3):
    for number in range(1003):
        s3.put_object(Bucket="nix", Key=f"k/{number:04}", Body=b"")
    listed = list(cache.list("k/"))
    assert [one.key for one in listed] == [f"k/{number:04}" for number in range(1003)]
    cache.put("k/0007", b"new")
    cache.put("k/1001", b"new")
    assert [one.key for one in cache.delete_many(listed)] == ["k/0007", "k/1001"]
    assert service.bucket("nix").keys() == ["k/0007", "k/1001"]
    assert service.counts["DeleteObjects"] == 2
    assert service.counts["ListObjectsV2"] == 2


@pytest.mark.parametrize(
    "fault",
    [
        Lost(performed=True),
        Lost(performed=False),
        Answer(SLOW),
        Reset(),
        Truncate(after_bytes=20),
        Answer(Response(200, {}, b"<Error><Code>InternalError</Code></Error>")),
    ],
)
def test_many_are_removed_through_faults(cache, service, faults, fault):
    for key in ("a", "b", "c"):
        cache.put(key, b"old")
    listed = list(cache.list(""))
    cache.put("b", b"new")
    faults.add(fault, method="POST", times=2)
    assert [one.key for one in cache.delete_many(listed)] == ["b"]
    assert faults.injected == 2
    assert service.bucket("nix").keys() == ["b"]


def test_keys_that_s3_could_not_remove_are_asked_for_again(cache, service, faults):
    for key in ("a", "b", "c", "d"):
        cache.put(key, b"")
    listed = list(cache.list(""))
    faults.add(Answer(removal(("b", "InternalError"), ("d", "SlowDown"))), method="POST")
    assert cache.delete_many(listed) == []
    assert service.bucket("nix").keys() == ["a", "c"]  # of which it was said that they are gone


def test_keys_that_s3_never_removes_are_an_error(cache, faults, client):
    client.clock = Impatient()
    cache.put("a", b"")
    cache.put("b", b"")
    listed = list(cache.list(""))
    faults.add(Answer(removal(("b", "SlowDown"))), method="POST", times=None)
    with pytest.raises(TransientError, match="SlowDown") as caught:
        cache.delete_many(listed)
    assert caught.value.place == "s3://nix/b"
    assert faults.injected == 8


def test_who_may_not_remove_all(objects_of, principals, cache, service):
    for key in ("mine/a", "yours/a", "mine/b"):
        cache.put(key, b"")
    policy = [Allow("s3:*", "arn:aws:s3:::nix/mine/*"), Allow("s3:ListBucket", "arn:aws:s3:::nix")]
    theirs = objects_of(principals.add_user("user", policy))
    with pytest.raises(AccessError, match="AccessDenied") as caught:
        theirs.delete_many(list(cache.list("")))
    assert caught.value.place == "s3://nix/yours/a"
    assert service.bucket("nix").keys() == ["yours/a"]
    assert service.counts["DeleteObjects"] == 1


def test_answers_to_a_removal_that_make_no_sense(cache, faults):
    cache.put("a", b"")
    listed = list(cache.list(""))
    for answer, error, match in (
        (removal(("other", "SlowDown")), DamagedError, "another object"),
        (removal(("a", "")), CalveError, "answered 200"),
        (Response(200, {}, b"<Dele"), DamagedError, "not XML"),
        (Response(200, {}, b"<Error><Code>AccessDenied</Code></Error>"), AccessError, "Denied"),
        (Response(403, {}, b"<Error><Code>AccessDenied</Code></Error>"), AccessError, "Denied"),
        (Response(404, {}, b"<Error><Code>NoSuchBucket</Code></Error>"), MissingCacheError, "nix"),
    ):
        faults.add(Answer(answer), method="POST")
        with pytest.raises(error, match=match):
            cache.delete_many(listed)
    assert keys(cache) == ["a"]


def test_a_range_is_read_through_faults(cache, service, faults):
    data = os.urandom(300_000)
    cache.put("nar/x", data)
    faults.add(Reset(after_bytes=100_000), method="GET", times=1)
    with cache.open("nar/x", start=1000, end=250_000) as source:
        assert b"".join(iter(lambda: source.read(65536), b"")) == data[1000:250_000]
    ranges = [call.range for call in service.calls if call.method == "GET"]
    assert len(ranges) == 2
    assert ranges[0] == "bytes=1000-249999"
    assert ranges[1].endswith("-249999")
    assert service.sent_bytes["admin"] < 400_000
    with cache.open("nar/x", start=299_999) as source:
        assert source.read(10) == data[-1:]
    for start, end in ((0, 300_001), (300_000, 300_001)):
        with cache.open("nar/x", start=start, end=end) as source, pytest.raises(DamagedError):
            source.read(10)


# What can be wrong with a bucket


def test_an_unknown_bucket_is_named(objects_of, admin):
    cache = objects_of(admin, bucket="nixx")
    for call in (
        lambda: cache.get("x", 1),
        lambda: cache.put("x", b""),
        lambda: cache.open("x").read(1),
        lambda: list(cache.list("")),
    ):
        with pytest.raises(MissingCacheError, match="there is no bucket nixx") as caught:
            call()
        assert caught.value.place == "s3://nixx"


def test_a_missing_object_is_not_a_missing_bucket(cache):
    with pytest.raises(NotFoundError, match="no such object") as caught:
        cache.get("x", 1)
    assert not isinstance(caught.value, MissingCacheError)
    assert caught.value.place == "s3://nix/x"


def test_whoever_may_not_list_is_told_denied_or_missing(objects_of, principals):
    reader = principals.add_user("reader", [Allow("s3:GetObject", "arn:aws:s3:::nix/*")])
    cache = objects_of(reader)
    with pytest.raises(AccessError, match="denied or missing") as caught:
        cache.get("x", 1)
    assert "s3:ListBucket" in str(caught.value.hint)
    with pytest.raises(AccessError):
        cache.put("x", b"")


def test_a_wrong_secret_key_is_an_access_error(objects_of, admin):
    cache = objects_of(replace(admin, secret_key="x" * 40))
    with pytest.raises(AccessError, match="SignatureDoesNotMatch") as caught:
        cache.get("x", 1)
    assert "denied or missing" not in caught.value.message


def test_a_wrong_region_is_named(objects_of, admin, service):
    service.add_bucket("far", "other-region")
    with pytest.raises(UsageError) as caught:
        objects_of(admin, bucket="far").get("x", 1)
    assert "other-region" in str(caught.value.hint)


def test_a_public_bucket_needs_no_credentials(objects_of, service, admin):
    service.add_bucket("open", public=True)
    objects_of(admin, bucket="open").put("x", b"1")
    assert objects_of(None, bucket="open").get("x", 1) == b"1"


def test_virtual_hosts(objects_of, admin, server, client, monkeypatch):
    real = socket.getaddrinfo

    def resolve(host, port, **options):
        assert host == "nix.s3.localhost"
        return real("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"s3://nix?region={REGION}&endpoint=s3.localhost:{server.port}&scheme=http&addressing-style=virtual"
    provider = Static(Credentials(admin.access_key, admin.secret_key, admin.token))
    cache = open_objects(url, client, provider)
    cache.put("x", b"1")
    monkeypatch.undo()
    assert objects_of(admin).get("x", 1) == b"1"


# Push and pull


@pytest.fixture
def store(tmp_path):
    with LocalStore(tmp_path / "here", create=True) as made:
        yield made


def add(store, name, data, references=()):
    """Add a path of one file (input-addressed, for what it matters here) to a store."""
    path = StorePath(encode32(hashlib.sha256(name.encode()).digest()[:20]), name)
    parts: list[bytes] = []
    events = [nar.File(b"", len(data), executable=False), *([data] if data else [])]
    pieces = [events[0], *(data[at : at + 65536] for at in range(0, len(data), 65536))]
    nar.emit(iter(pieces), parts.append)
    whole = b"".join(parts)
    info = PathInfo(path, Hash.sha256(whole), len(whole), tuple(sorted(references)))
    store.stage(info, iter(pieces))
    store.commit([info])
    return path


@pytest.fixture
def key():
    return SecretKey.generate("ops-1")


@pytest.fixture
def ring(key):
    return Keyring((key.public,))


@pytest.fixture
def top(store):
    """Make a closure of 12 paths, one of them of 9 MB that does not compress."""
    paths = [add(store, f"lib{n}", os.urandom(1000 * n) + b"text" * n * 500) for n in range(10)]
    big = add(store, "big", os.urandom(PART_BYTES + 1_000_000), paths[:2])
    return add(store, "top", b"top", [*paths, big])


def pulled(tmp_path, name, cache, top, ring, manifest=None):
    """Pull into a new store; return what was done and the infos of the closure there."""
    with LocalStore(tmp_path / name, create=True) as sink:
        made = plan([cache], [top], sink, ring, manifest=manifest)
        done = pull(made, sink)
        return done, sink.closure([top])


def without_signatures(infos):
    return sorted((replace(info, signatures=()) for info in infos), key=lambda info: info.path)


def test_push_and_pull_and_their_requests(cache, service, store, top, key, ring, tmp_path):
    done = push(store, [top], cache, key)
    assert done.new_paths == 12
    counts = service.counts
    assert counts["ListObjectsV2"] == 1  # of pending records
    assert counts["UploadPart"] == 2
    # Per path: NAR (in parts: of the big one), narinfo. Beside: root asked and made, cache-info asked and made,
    # pending made, listed and removed, gc, manifest.
    assert len(service.calls) == 12 * 2 + 3 + 9
    digest = done.manifests[top]

    before = len(service.calls)
    got, infos = pulled(tmp_path, "there", cache, top, ring, digest)
    assert len(service.calls) - before == 1 + 12
    assert without_signatures(infos) == without_signatures(store.closure([top]))
    assert (got.paths, got.retries) == (12, 0)
    assert got.fetched_bytes == done.compressed_bytes

    before = len(service.calls)
    assert push(store, [top], cache, key).new_paths == 0
    assert len(service.calls) - before == 2
    before = len(service.calls)
    with LocalStore(tmp_path / "there") as sink:
        assert pull(plan([cache], [top], sink, ring, manifest=digest), sink).fetched_bytes == 0
    assert len(service.calls) - before == 1


def test_push_through_faults(cache, service, faults, store, top, key, ring, tmp_path):
    faults.add(Answer(SLOW), method="PUT", path="*/nar/*", times=3)
    faults.add(Lost(performed=False), method="PUT", path="*.narinfo", times=2)
    faults.add(Lost(performed=True), method="PUT", path="*.narinfo", skip=3, times=2)
    faults.add(Lost(performed=True), method="PUT", path="*/nar/*", skip=4, times=2)
    faults.add(Answer(SLOW), method="GET", times=2)
    faults.add(Answer(SLOW), method="POST", times=1)
    done = push(store, [top], cache, key)
    assert faults.injected == 12
    assert service.uploads.pending() == []
    faults.clear()
    _, infos = pulled(tmp_path, "there", cache, top, ring, done.manifests[top])
    assert without_signatures(infos) == without_signatures(store.closure([top]))
    assert not list(cache.list("pending/"))


def test_pull_through_faults(cache, service, faults, store, top, key, ring, tmp_path):
    digest = push(store, [top], cache, key).manifests[top]
    faults.add(Answer(SLOW), method="GET", path="*/manifests/*", times=2)
    faults.add(Reset(after_bytes=3_000_000), path="*/nar/*", times=1, skip=2)
    faults.add(Truncate(after_bytes=500), path="*/nar/*", times=3)
    faults.add(Reset(), path="*/nar/*", times=2)
    faults.add(Lost(performed=False), path="*/nar/*", times=2)
    done, infos = pulled(tmp_path, "there", cache, top, ring, digest)
    assert faults.injected == 10
    assert done.retries == 0  # connections were resumed, no path was begun anew
    assert without_signatures(infos) == without_signatures(store.closure([top]))
    assert any(call.range for call in service.calls)


def test_wrong_bytes_once_are_fetched_again(cache, faults, store, top, key, ring, tmp_path):
    digest = push(store, [top], cache, key).manifests[top]
    entry = next(e for e in manifests.read(cache, digest).paths if e.info.path.name == "lib9")
    faults.add(Flip(2000), method="GET", path=f"*{entry.url}")
    done, infos = pulled(tmp_path, "there", cache, top, ring, digest)
    assert done.retries == 1
    assert len(infos) == 12


def test_wrong_bytes_always_are_an_error_and_nothing_is_valid(
    cache, faults, store, top, key, ring, tmp_path
):
    digest = push(store, [top], cache, key).manifests[top]
    entry = next(e for e in manifests.read(cache, digest).paths if e.info.path.name == "lib9")
    faults.add(Flip(2000), method="GET", path=f"*{entry.url}", times=None)
    with LocalStore(tmp_path / "there", create=True) as sink:
        made = plan([cache], [top], sink, ring, manifest=digest)
        with pytest.raises(DamagedError) as caught:
            pull(made, sink)
        assert caught.value.place == f"s3://nix/{entry.url}"
        assert sink.missing([entry.info.path, top]) == [entry.info.path, top]
    left = [path.name for path in (tmp_path / "there/nix/store").iterdir()]
    assert not [name for name in left if name.startswith(".calve")]
    assert top.basename not in left
    faults.clear()
    _, infos = pulled(tmp_path, "there", cache, top, ring, digest)
    assert len(infos) == 12


def test_an_unknown_bucket_ends_push_and_pull(objects_of, admin, store, top, key, ring, tmp_path):
    cache = objects_of(admin, bucket="nixx")
    for call in (
        lambda: push(store, [top], cache, key),
        lambda: push(store, [top], cache, key, dry_run=True),
        lambda: pulled(tmp_path, "there", cache, top, ring),
        lambda: pulled(tmp_path, "there", cache, top, ring, "a" * 64),
    ):
        with pytest.raises(MissingCacheError, match="no bucket nixx"):
            call()


def test_two_pushers_at_once_lose_nothing(objects_of, admin, service, store, top, tmp_path):
    keys = [SecretKey.generate(f"ops-{n}") for n in range(2)]
    errors: list[Exception] = []
    digests: dict[str, str] = {}

    def run(key, level):
        try:
            done = push(store, [top], objects_of(admin), key, codec=Codec(level=level))
            digests[key.name] = done.manifests[top]
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(key, 1 + 2 * n)) for n, key in enumerate(keys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    cache = objects_of(admin)
    for info in store.closure([top]):
        entry = NarInfo.parse(cache.get(f"{info.path.digest}.narinfo", 65536))
        assert [one.name for one in entry.info.signatures] == ["ops-0", "ops-1"]
    for key in keys:
        ring = Keyring((key.public,))
        _, infos = pulled(tmp_path, key.name, cache, top, ring, digests[key.name])
        assert len(infos) == 12
    assert service.uploads.pending() == []
    assert not list(cache.list("pending/"))


def test_credentials_that_expire_in_the_middle_are_renewed(
    objects_of, principals, server, client, store, top, key, admin, clock, ring, tmp_path
):
    class Renewing:
        def __init__(self):
            self.renewed = 0
            self.value = Credentials(admin.access_key, "x" * 40)

        def credentials(self, *, refresh=False):
            if refresh:
                self.renewed += 1
            return Credentials(admin.access_key, admin.secret_key, admin.token)

    provider = Renewing()
    cache = open_objects(f"s3://nix?region={REGION}&endpoint={server.url}", client, provider)
    body = b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"
    digest = push(store, [top], cache, key).manifests[top]
    assert provider.renewed == 0
    server.faults.add(
        Answer(Response(400, {"Content-Type": "application/xml"}, body)),
        method="GET",
        path="*/nar/*",
        skip=3,
        times=1,
    )
    _, infos = pulled(tmp_path, "there", cache, top, ring, digest)
    assert (provider.renewed, len(infos)) == (1, 12)
    assert closure([top], {info.path: info for info in infos}.__getitem__)


def test_push_and_pull_of_who_may_not_list(
    objects_of, principals, service, store, top, key, ring, tmp_path
):
    """To them S3 calls a missing object denied, with a reason for a GET and with none for a HEAD."""
    actions = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")
    policy = [Allow(action, "arn:aws:s3:::nix/*") for action in actions]
    cache = objects_of(principals.add_user("pusher", policy))
    done = push(store, [top], cache, key)
    assert done.new_paths == 12
    assert pulled(tmp_path, "there", cache, top, ring, done.manifests[top])[0].paths == 12
    assert push(store, [top], cache, key).new_paths == 0


def test_wrong_credentials_end_a_push_before_it_writes_more(
    objects_of, admin, server, service, store, top, key
):
    class Late:
        """Right for the cache's and the pending record, wrong from then on."""

        def credentials(self, *, refresh=False):
            secret = "x" * 40 if service.counts["PutObject"] > 1 else admin.secret_key
            return Credentials(admin.access_key, secret, admin.token)

    cache = objects_of(admin)
    cache._signer._provider = Late()
    seen = []
    server.faults = lambda request: seen.append((request.method, request.path))
    with pytest.raises(AccessError, match="SignatureDoesNotMatch"):
        push(store, [top], cache, key)
    server.faults = None
    written = [path for method, path in seen if method in {"PUT", "POST"}]
    assert [path.split("/")[2] for path in written] == ["nix-cache-info", "pending"]


def test_a_cancelled_upload_leaves_no_parts(server, admin, service):
    cancel = Cancel()
    with Client(read_s=5.0, cancel=cancel) as client:
        provider = Static(Credentials(admin.access_key, admin.secret_key, admin.token))
        url = f"s3://nix?region={REGION}&endpoint={server.url}"
        cache = open_objects(url, client, provider)

        def chunks():
            yield os.urandom(PART_BYTES)
            assert service.uploads.pending()
            cancel.cancel()
            cancel.check()

        with pytest.raises(CancelledError):
            cache.put_stream("nar/x", chunks(), only_new=True)
    assert service.uploads.pending() == []
    assert service.counts["AbortMultipartUpload"] == 1


def test_an_abort_after_a_cancel_is_not_waited_for(server, admin, service, faults):
    cancel = Cancel()
    faults.add(Answer(SLOW), method="DELETE", times=None)
    with Client(read_s=5.0, cancel=cancel) as client:
        provider = Static(Credentials(admin.access_key, admin.secret_key, admin.token))
        url = f"s3://nix?region={REGION}&endpoint={server.url}"
        cache = open_objects(url, client, provider)

        def chunks():
            yield os.urandom(PART_BYTES)
            cancel.cancel()
            cancel.check()

        with pytest.raises(CancelledError):
            cache.put_stream("nar/x", chunks(), only_new=True)
    assert len(service.uploads.pending()) == 1  # the bucket's lifecycle takes it


@pytest.mark.parametrize("encoding", ["foo", "utf-7", "hex"])
def test_a_listing_in_an_unknown_encoding(cache, faults, encoding):
    body = f'<?xml version="1.0" encoding="{encoding}"?><ListBucketResult/>'.encode()
    faults.add(Answer(Response(200, {}, body)), method="GET")
    with pytest.raises(DamagedError, match="not XML"):
        list(cache.list(""))


def test_a_size_of_five_thousand_digits(cache, monkeypatch):
    answer = Response(200, {"content-length": "9" * 5000}, b"")
    monkeypatch.setattr(cache, "send", lambda *_: (answer, b""))
    with pytest.raises(DamagedError, match="no size"):
        cache.head("x")


def test_a_part_with_a_strange_tag(cache, service, faults):
    faults.add(Answer(Response(200, {"ETag": '"\xe9\xe9"'}, b"")), method="PUT")
    with pytest.raises(DamagedError, match="without an ETag"):
        cache.put_stream("nar/x", iter([os.urandom(PART_BYTES)]), only_new=True)
    assert service.uploads.pending() == []
