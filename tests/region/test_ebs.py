"""EBS direct with boto3 as its client: every rule has a case, with AWS's code."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import http.client
import itertools
import threading

import boto3
import botocore.config
import pytest
from botocore.exceptions import ClientError, ReadTimeoutError

from calve.region.blocks import Snapshots
from calve.region.ebs import EbsService
from calve.region.ebs_faults import Fail, Fewer, Forget, Late, Rot, Throttle, Twice
from calve.region.faults import Answer, Lost, Silent
from calve.region.message import Response
from calve.region.server import Server
from calve.region.signature import Allow
from calve.region.snapshot import BLOCK_BYTES
from calve.region.throttles import Limits
from calve.transport import sigv4
from calve.transport.credentials import Credentials

REGION = "test-region"
NONE = "snap-0123456789abcdef0"


def block(seed):
    return hashlib.shake_128(str(seed).encode()).digest(BLOCK_BYTES)


def checksum(data):
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


class Region:
    """EBS direct and what one does with it."""

    def __init__(self, snapshots, service, server, client, clock):
        self.snapshots, self.service, self.server = snapshots, service, server
        self.client, self.clock = client, clock

    def start(self, gib=1, **options):
        return self.client.start_snapshot(VolumeSize=gib, **options)["SnapshotId"]

    def put(self, snapshot, index, data, **changes):
        options = {
            "BlockData": data,
            "DataLength": BLOCK_BYTES,
            "Checksum": checksum(data),
            "ChecksumAlgorithm": "SHA256",
        }
        return self.client.put_snapshot_block(
            SnapshotId=snapshot, BlockIndex=index, **(options | changes)
        )

    def complete(self, snapshot, count, **options):
        return self.client.complete_snapshot(
            SnapshotId=snapshot, ChangedBlocksCount=count, **options
        )

    def make(self, blocks, gib=1, **options):
        snapshot = self.start(gib, **options)
        for index, data in blocks.items():
            self.put(snapshot, index, data)
        self.complete(snapshot, len(blocks))
        self.pass_s(1)
        assert self.state(snapshot) == "completed"
        return snapshot

    def state(self, snapshot):
        return self.snapshots.find(snapshot).state

    def pass_s(self, seconds):
        self.clock.shift += dt.timedelta(seconds=seconds)

    def tokens(self, snapshot, **options):
        pages = self.client.list_snapshot_blocks(SnapshotId=snapshot, **options)
        return {one["BlockIndex"]: one["BlockToken"] for one in pages["Blocks"]}

    def read(self, snapshot, index, token):
        answer = self.client.get_snapshot_block(
            SnapshotId=snapshot, BlockIndex=index, BlockToken=token
        )
        data = answer["BlockData"].read()
        assert (answer["DataLength"], answer["ChecksumAlgorithm"]) == (BLOCK_BYTES, "SHA256")
        return data, answer["Checksum"]

    def content(self, snapshot):
        return {
            index: self.read(snapshot, index, token)[0]
            for index, token in self.tokens(snapshot).items()
        }

    def changed(self, first, second, **options):
        answer = self.client.list_changed_blocks(
            FirstSnapshotId=first, SecondSnapshotId=second, **options
        )
        return [one["BlockIndex"] for one in answer["ChangedBlocks"]]

    def refusal(self, call, *args, **options):
        """Return status, code and reason of a refused call."""
        with pytest.raises(ClientError) as caught:
            call(*args, **options)
        answer = caught.value.response
        assert answer["Error"]["Message"]
        return (
            answer["ResponseMetadata"]["HTTPStatusCode"],
            answer["Error"]["Code"],
            answer.get("Reason"),
        )


@pytest.fixture
def make_client(admin):
    made = []

    def make(url, key=admin, read_timeout_s=5):
        client = boto3.client(
            "ebs",
            endpoint_url=url,
            region_name=REGION,
            aws_access_key_id=key.access_key,
            aws_secret_access_key=key.secret_key,
            config=botocore.config.Config(
                retries={"total_max_attempts": 1},
                read_timeout=read_timeout_s,
                parameter_validation=False,
            ),
        )
        made.append(client)
        return client

    yield make
    for client in made:
        client.close()


@pytest.fixture
def region(tmp_path, principals, clock, faults, make_client):
    # Time stands still but for what a test lets pass.
    frozen = clock.monotonic()
    clock.monotonic = lambda: frozen + clock.shift.total_seconds()
    snapshots = Snapshots(tmp_path / "ebs", region=REGION, clock=clock)
    service = EbsService(snapshots, principals)  # signatures are of the real time
    with Server(service.handle, faults=faults) as server:
        yield Region(snapshots, service, server, make_client(server.url), clock)


# The way of a snapshot


def test_a_snapshot_is_started_written_completed_listed_and_read(region):
    answer = region.client.start_snapshot(
        VolumeSize=2, Description="d", Tags=[{"Key": "k", "Value": "v"}], Timeout=10
    )
    snapshot = answer["SnapshotId"]
    assert (answer["Status"], answer["BlockSize"], answer["VolumeSize"]) == (
        "pending",
        BLOCK_BYTES,
        2,
    )
    assert (answer["Description"], answer["Tags"]) == ("d", [{"Key": "k", "Value": "v"}])
    assert answer["OwnerId"] == "123456789012"
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 201
    blocks = {0: block(0), 7: block(7), 4095: bytes(BLOCK_BYTES)}
    for index, data in reversed(blocks.items()):
        put = region.put(snapshot, index, data, Progress=50)
        assert (put["Checksum"], put["ChecksumAlgorithm"]) == (checksum(data), "SHA256")
        assert put["ResponseMetadata"]["HTTPStatusCode"] == 201
    linear = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in blocks.values()))
    done = region.complete(
        snapshot,
        3,
        Checksum=base64.b64encode(linear.digest()).decode(),
        ChecksumAlgorithm="SHA256",
        ChecksumAggregationMethod="LINEAR",
    )
    assert (done["Status"], done["ResponseMetadata"]["HTTPStatusCode"]) == ("pending", 202)
    assert region.state(snapshot) == "pending"
    region.pass_s(1)
    assert region.state(snapshot) == "completed"
    listed = region.client.list_snapshot_blocks(SnapshotId=snapshot)
    assert [one["BlockIndex"] for one in listed["Blocks"]] == [0, 7, 4095]
    assert (listed["VolumeSize"], listed["BlockSize"]) == (2, BLOCK_BYTES)
    left = listed["ExpiryTime"].timestamp() - region.snapshots.now()
    assert left == pytest.approx(7 * 24 * 3600, abs=2)
    assert "NextToken" not in listed
    for index, token in region.tokens(snapshot).items():
        assert region.read(snapshot, index, token) == (blocks[index], checksum(blocks[index]))


def test_the_same_block_twice_counts_once_and_the_last_one_stays(region):
    snapshot = region.start()
    region.put(snapshot, 3, block("old"))
    region.put(snapshot, 3, block("new"))
    region.complete(snapshot, 1)
    region.pass_s(1)
    assert region.content(snapshot) == {3: block("new")}
    assert len(region.snapshots.blobs) == 1


@pytest.mark.parametrize(
    ("count", "linear"), [(2, None), (0, None), (1, b"\0" * 32)], ids=["more", "fewer", "sum"]
)
def test_a_wrong_count_or_sum_ends_in_an_error(region, count, linear):
    snapshot = region.start()
    region.put(snapshot, 3, block(3))
    options = {}
    if linear is not None:
        options = {
            "Checksum": base64.b64encode(linear).decode(),
            "ChecksumAlgorithm": "SHA256",
            "ChecksumAggregationMethod": "LINEAR",
        }
    assert region.complete(snapshot, count, **options)["Status"] == "pending"
    region.pass_s(1)
    assert region.state(snapshot) == "error"
    assert region.snapshots.find(snapshot).message
    assert region.refusal(region.tokens, snapshot) == (
        400,
        "ValidationException",
        "INVALID_SNAPSHOT_ID",
    )


def test_what_is_sealed_is_not_written_nor_sealed_again(region):
    snapshot = region.start()
    region.complete(snapshot, 0)
    sealed = (400, "ValidationException", "INVALID_SNAPSHOT_ID")
    for _ in ("pending", "completed"):
        assert region.refusal(region.put, snapshot, 0, block(0)) == sealed
        assert region.refusal(region.complete, snapshot, 0) == sealed
        region.pass_s(1)


def test_reads_only_when_completed(region):
    snapshot = region.start()
    region.put(snapshot, 0, block(0))
    sealed = (400, "ValidationException", "INVALID_SNAPSHOT_ID")
    assert region.refusal(region.tokens, snapshot) == sealed
    assert region.refusal(region.read, snapshot, 0, "AAAA") == sealed
    assert region.refusal(region.changed, snapshot, snapshot) == sealed


def test_a_snapshot_times_out_after_its_start_or_its_last_block(region):
    untouched, touched = region.start(Timeout=10), region.start(Timeout=10)
    region.pass_s(599)
    region.put(touched, 0, block(0))
    region.pass_s(2)
    assert region.state(untouched) == "error"
    assert region.state(touched) == "pending"
    region.pass_s(600)
    assert region.state(touched) == "error"
    assert region.refusal(region.put, touched, 0, block(0))[1] == "ValidationException"


# What is refused


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"VolumeSize": 0}, "INVALID_VOLUME_SIZE"),
        ({"VolumeSize": 65537}, "INVALID_VOLUME_SIZE"),
        ({"VolumeSize": 1, "Timeout": 9}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 1, "Timeout": 4321}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 1, "Tags": [{"Key": "aws:x", "Value": ""}]}, "INVALID_TAG"),
        ({"VolumeSize": 1, "Tags": [{"Key": "", "Value": ""}]}, "INVALID_TAG"),
        ({"VolumeSize": 1, "Tags": [{"Key": "a", "Value": ""}] * 2}, "INVALID_TAG"),
        ({"VolumeSize": 1, "Description": "d" * 256}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 1, "ClientToken": "a b"}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 1, "ClientToken": "a" * 256}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 1, "KmsKeyArn": "arn:aws:kms:r:1:key/k"}, "INVALID_PARAMETER_VALUE"),
        ({"VolumeSize": 1, "ParentSnapshotId": "snap-x"}, "INVALID_SNAPSHOT_ID"),
    ],
)
def test_bad_starts(region, options, reason):
    assert region.refusal(region.client.start_snapshot, **options) == (
        400,
        "ValidationException",
        reason,
    )
    assert region.snapshots.all() == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Checksum": checksum(b"other")}, "INVALID_BLOCK"),
        ({"Checksum": "AAAA"}, "INVALID_PARAMETER_VALUE"),
        ({"Checksum": "!"}, "INVALID_PARAMETER_VALUE"),
        ({"ChecksumAlgorithm": "SHA1"}, "INVALID_PARAMETER_VALUE"),
        ({"DataLength": 512}, "INVALID_PARAMETER_VALUE"),
        ({"BlockData": b"short"}, "INVALID_PARAMETER_VALUE"),
        ({"BlockData": bytes(BLOCK_BYTES + 1)}, "INVALID_PARAMETER_VALUE"),
        ({"Progress": 101}, "INVALID_PARAMETER_VALUE"),
        ({"BlockIndex": 2048}, "INVALID_BLOCK"),
        ({"BlockIndex": -1}, "INVALID_PARAMETER_VALUE"),
    ],
)
def test_bad_blocks(region, changes, reason):
    snapshot = region.start(gib=1)
    index = changes.pop("BlockIndex", 0)
    refusal = region.refusal(region.put, snapshot, index, block(0), **changes)
    assert refusal == (400, "ValidationException", reason)
    assert len(region.snapshots.blobs) == 0


def test_bad_completions(region):
    snapshot = region.start()
    bad = (400, "ValidationException", "INVALID_PARAMETER_VALUE")
    good = {"Checksum": checksum(b""), "ChecksumAlgorithm": "SHA256"}
    assert region.refusal(region.complete, snapshot, -1) == bad
    assert region.refusal(region.complete, snapshot, 0, Checksum=checksum(b"")) == bad
    assert region.refusal(region.complete, snapshot, 0, **good) == bad
    region.complete(snapshot, 0, **good, ChecksumAggregationMethod="LINEAR")


def test_what_is_not_there(region):
    missing = (404, "ResourceNotFoundException", "SNAPSHOT_NOT_FOUND")
    assert region.refusal(region.put, NONE, 0, block(0)) == missing
    assert region.refusal(region.complete, NONE, 0) == missing
    assert region.refusal(region.tokens, NONE) == missing
    assert region.refusal(region.read, NONE, 0, "AAAA") == missing
    assert region.refusal(region.changed, NONE, NONE) == missing
    assert region.refusal(region.start, ParentSnapshotId=NONE) == missing
    malformed = (400, "ValidationException", "INVALID_SNAPSHOT_ID")
    assert region.refusal(region.tokens, "snap-1") == malformed


def test_two_different_updates_of_one_index_at_a_time_conflict(region):
    snapshot = region.start()
    with region.snapshots.flight(snapshot, 5, checksum(block("first"))):
        refusal = region.refusal(region.put, snapshot, 5, block("second"))
        assert refusal == (400, "ValidationException", "CONFLICTING_BLOCK_UPDATE")
        region.put(snapshot, 5, block("first"))
        region.put(snapshot, 6, block("second"))
    region.put(snapshot, 5, block("second"))


def test_a_block_that_arrives_after_the_seal_is_refused_and_freed(region):
    snapshot = region.start()
    with region.snapshots.flight(snapshot, 0, "x"):
        region.complete(snapshot, 0)
        assert region.refusal(region.put, snapshot, 1, block(1))[1] == "ValidationException"
    assert len(region.snapshots.blobs) == 0


# Client tokens


def test_a_token_gives_the_same_snapshot_and_other_parameters_conflict(region):
    one = region.start(ClientToken="t", Description="d")
    assert region.start(ClientToken="t", Description="d") == one
    conflict = region.refusal(region.start, ClientToken="t", Description="e")
    assert conflict[:2] == (409, "ConflictException")
    assert region.refusal(region.start, gib=2, ClientToken="t", Description="d")[0] == 409
    region.snapshots.delete(one)
    assert region.start(ClientToken="t", Description="d") == one
    assert region.refusal(region.put, one, 0, block(0))[0] == 404
    assert region.start(ClientToken="u", Description="d") != one


# Chains


def test_a_child_is_its_parent_s_blocks_under_its_own(region):
    parent = region.make({0: block(0), 1: block(1)})
    child = region.make({1: bytes(BLOCK_BYTES), 2: block(2)}, gib=2, ParentSnapshotId=parent)
    grown = {0: block(0), 1: bytes(BLOCK_BYTES), 2: block(2)}
    assert region.content(child) == grown
    assert region.content(parent) == {0: block(0), 1: block(1)}
    assert region.changed(parent, child) == [1, 2]
    assert region.changed(child, parent) == [1, 2]
    region.snapshots.delete(parent)
    assert region.content(child) == grown
    grandchild = region.make({}, gib=2, ParentSnapshotId=child)
    assert region.content(grandchild) == grown
    assert region.changed(child, grandchild) == []


def test_changed_blocks_have_the_tokens_of_those_who_have_them(region):
    parent = region.make({0: block(0), 1: block(1)})
    left = region.make({1: block("left"), 3: block(3)}, ParentSnapshotId=parent)
    right = region.make({4: block(4)}, ParentSnapshotId=parent)
    answer = region.client.list_changed_blocks(FirstSnapshotId=left, SecondSnapshotId=right)
    rows = {one.pop("BlockIndex"): one for one in answer["ChangedBlocks"]}
    assert {index: set(row) for index, row in rows.items()} == {
        1: {"FirstBlockToken", "SecondBlockToken"},
        3: {"FirstBlockToken"},
        4: {"SecondBlockToken"},
    }
    assert region.read(left, 1, rows[1]["FirstBlockToken"])[0] == block("left")
    assert region.read(right, 1, rows[1]["SecondBlockToken"])[0] == block(1)
    assert region.changed(left, right, StartingBlockIndex=2) == [3, 4]


def test_a_block_written_again_with_the_same_content_counts_as_changed(region):
    parent = region.make({0: block(0), 1: block(1)})
    child = region.make({0: block(0)}, ParentSnapshotId=parent)
    assert region.changed(parent, child) == [0]


def test_only_snapshots_of_one_lineage_are_compared(region):
    one, two = region.make({0: block(0)}), region.make({0: block(0)})
    unrelated = (400, "ValidationException", "UNRELATED_SNAPSHOTS")
    assert region.refusal(region.changed, one, two) == unrelated
    with pytest.raises(ClientError, match="FirstSnapshotId"):
        region.client.list_changed_blocks(SecondSnapshotId=two)


def test_a_parent_must_be_completed_and_not_larger(region):
    pending = region.start(gib=2)
    bad = (400, "ValidationException")
    refusal = region.refusal(region.start, gib=2, ParentSnapshotId=pending)
    assert refusal == (*bad, "INVALID_SNAPSHOT_ID")
    with pytest.raises(ClientError, match=f"The parent '{pending}' is not"):
        region.start(gib=2, ParentSnapshotId=pending)
    large = region.make({}, gib=2)
    refusal = region.refusal(region.start, gib=1, ParentSnapshotId=large)
    assert refusal == (*bad, "INVALID_VOLUME_SIZE")


# Encryption


def test_encryption_is_told_inherited_and_not_mixed_with_a_parent(region):
    plain = region.make({})
    bad = (400, "ValidationException", "INVALID_PARAMETER_VALUE")
    for encrypted in (True, False):
        refusal = region.refusal(region.start, ParentSnapshotId=plain, Encrypted=encrypted)
        assert refusal == bad
    key = "arn:aws:kms:test-region:123456789012:key/k"
    assert region.refusal(region.start, ParentSnapshotId=plain, KmsKeyArn=key) == bad
    own = region.make({}, Encrypted=True, KmsKeyArn=key)
    child = region.start(ParentSnapshotId=own)
    assert region.snapshots.find(child).key_arn == key
    answer = region.client.start_snapshot(VolumeSize=1, Encrypted=True)
    assert answer["KmsKeyArn"].startswith("arn:aws:kms:test-region:123456789012:key/")


def test_encryption_by_default_takes_no_plain_parent(region):
    plain = region.make({})
    region.snapshots.encrypted_by_default = True
    assert region.refusal(region.start, ParentSnapshotId=plain)[1] == "ValidationException"
    made = region.make({}, Encrypted=False)
    assert region.snapshots.find(made).encrypted
    assert region.snapshots.find(region.start(ParentSnapshotId=made)).encrypted


# Pages and tokens


@pytest.fixture
def long(region):
    """A snapshot of 250 blocks with the same content."""
    return region.make(dict.fromkeys(range(1000, 1250), bytes(BLOCK_BYTES)))


def pages(region, snapshot, **options):
    found = []
    while True:
        answer = region.client.list_snapshot_blocks(SnapshotId=snapshot, **options)
        found.append([one["BlockIndex"] for one in answer["Blocks"]])
        if "NextToken" not in answer:
            return found
        options["NextToken"] = answer["NextToken"]


def test_pages(region, long):
    everything = list(range(1000, 1250))
    assert pages(region, long) == [everything]
    found = pages(region, long, MaxResults=100)
    assert [len(one) for one in found] == [100, 100, 50]
    assert list(itertools.chain(*found)) == everything
    assert pages(region, long, MaxResults=100, StartingBlockIndex=1200) == [everything[200:]]
    for results in (99, 10001):
        refusal = region.refusal(
            region.client.list_snapshot_blocks, SnapshotId=long, MaxResults=results
        )
        assert refusal == (400, "ValidationException", "INVALID_PARAMETER_VALUE")


def test_pages_that_are_empty_or_short_have_a_token_for_the_next(region, long):
    region.service.faults.add(Fewer(), path="*/blocks", times=2)
    region.service.faults.add(Fewer(3), path="*/blocks")
    found = pages(region, long)
    assert [len(one) for one in found] == [0, 0, 3, 247]
    assert list(itertools.chain(*found)) == list(range(1000, 1250))


def test_a_page_token_is_for_its_list_and_lasts_an_hour(region, long):
    answer = region.client.list_snapshot_blocks(SnapshotId=long, MaxResults=100)
    bad = (400, "ValidationException", "INVALID_PAGE_TOKEN")
    other = region.make({0: block(0)}, ParentSnapshotId=long)
    for snapshot, token in ((other, answer["NextToken"]), (long, "AAAA"), (long, "!")):
        refusal = region.refusal(
            region.client.list_snapshot_blocks, SnapshotId=snapshot, NextToken=token
        )
        assert refusal == bad
    region.pass_s(3590)
    assert len(region.tokens(long, NextToken=answer["NextToken"])) == 150
    region.pass_s(20)
    assert region.refusal(region.tokens, long, NextToken=answer["NextToken"]) == bad


def test_a_block_token_is_for_its_block_and_lasts_a_week(region):
    snapshot = region.make({0: block(0), 1: block(1)})
    other = region.make({0: block(0)})
    tokens = region.tokens(snapshot)
    bad = (400, "ValidationException", "INVALID_BLOCK_TOKEN")
    assert region.refusal(region.read, snapshot, 1, tokens[0]) == bad
    assert region.refusal(region.read, snapshot, 2, tokens[0]) == bad
    assert region.refusal(region.read, other, 0, tokens[0]) == bad
    assert region.refusal(region.read, snapshot, 0, "AAAA") == bad
    region.pass_s(7 * 24 * 3600 - 10)
    assert region.read(snapshot, 0, tokens[0])[0] == block(0)
    region.pass_s(20)
    assert region.refusal(region.read, snapshot, 0, tokens[0]) == bad


# Quotas


def limit(region, **limits):
    region.snapshots.throttles.limits = Limits(**limits)


def test_blocks_are_throttled_by_snapshot_and_by_account(region):
    limit(region, put_snapshot_per_s=2, put_per_s=3)
    one, two = region.start(), region.start()
    for index in range(2):
        region.put(one, index, block(0))
    refusal = region.refusal(region.put, one, 2, block(0))
    assert refusal == (400, "RequestThrottledException", "RESOURCE_LEVEL_THROTTLE")
    region.put(two, 0, block(0))
    refusal = region.refusal(region.put, two, 1, block(0))
    assert refusal == (400, "RequestThrottledException", "ACCOUNT_THROTTLED")
    region.pass_s(1)
    region.put(one, 2, block(0))


def test_reads_lists_starts_and_completions_are_throttled(region):
    limit(region, get_snapshot_per_s=1, list_per_s=2, start_per_s=2, complete_per_s=1)
    snapshot = region.make({0: block(0)})
    tokens = region.tokens(snapshot)
    region.read(snapshot, 0, tokens[0])
    refusal = region.refusal(region.read, snapshot, 0, tokens[0])
    assert refusal == (400, "RequestThrottledException", "RESOURCE_LEVEL_THROTTLE")
    throttled = (400, "ThrottlingException", None)
    region.tokens(snapshot)
    assert region.refusal(region.tokens, snapshot) == throttled
    region.start()
    other = region.start()
    assert region.refusal(region.start) == throttled
    region.complete(other, 0)
    assert region.refusal(region.complete, other, 0) == throttled


def test_so_many_snapshots_may_be_pending(region):
    limit(region, pending=2)
    one = region.start()
    region.start()
    refusal = region.refusal(region.start)
    assert refusal[:2] == (400, "ConcurrentLimitExceededException")
    region.complete(one, 0)
    region.pass_s(1)
    region.start()


# Who asks


def test_signatures_and_permissions(region, principals, make_client):
    reader = principals.add_user("reader", [Allow("ebs:Get*"), Allow("ebs:List*")])
    denied = make_client(region.server.url, reader)
    refusal = region.refusal(denied.start_snapshot, VolumeSize=1)
    assert refusal[:2] == (403, "AccessDeniedException")
    snapshot = region.make({0: block(0)})
    assert denied.list_snapshot_blocks(SnapshotId=snapshot)["Blocks"]
    principals.remove_key(reader.access_key)
    refusal = region.refusal(denied.list_snapshot_blocks, SnapshotId=snapshot)
    assert refusal[:2] == (403, "UnrecognizedClientException")


def test_an_altered_checksum_header_breaks_the_signature(region):
    snapshot = region.start()

    def alter(request, **_):
        request.headers["x-amz-Checksum"] = checksum(block("other"))
        request.body = block("other")

    region.client.meta.events.register("before-send.ebs.PutSnapshotBlock", alter)
    refusal = region.refusal(region.put, snapshot, 0, block(0))
    assert refusal[:2] == (403, "InvalidSignatureException")


def test_which_bodies_may_be_unsigned(region, admin):
    """Only a block's; and what stands in its place is signed."""
    snapshot, data = region.start(), block(0)
    put = {
        "x-amz-Data-Length": str(BLOCK_BYTES),
        "x-amz-Checksum": checksum(data),
        "x-amz-Checksum-Algorithm": "SHA256",
    }
    digest = hashlib.sha256(data).hexdigest()

    def send(method, path, body, headers, payload, late=()):
        held = {name: text for name, text in headers.items() if name not in late}
        signed = sigv4.sign(
            method,
            region.server.url + path,
            held,
            credentials=Credentials(admin.access_key, admin.secret_key),
            region=REGION,
            service="ebs",
            now=dt.datetime.now(dt.UTC),
            payload_hash=payload,
        )
        connection = http.client.HTTPConnection("127.0.0.1", region.server.port, timeout=5)
        sent = {name.lower(): text for name, text in headers.items()} | signed
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status, answer.headers["x-amzn-errortype"]

    path, refused = f"/snapshots/{snapshot}/blocks/0", (403, "InvalidSignatureException")
    assert send("PUT", path, data, put, "UNSIGNED-PAYLOAD") == (201, None)
    assert send("PUT", path, data, put, digest) == (201, None)
    assert send("PUT", path, data, put, "0" * 64) == refused
    late = ["x-amz-Checksum"]
    assert send("PUT", path, data, put, "UNSIGNED-PAYLOAD", late) == refused
    start = b'{"VolumeSize": 1}'
    payload = hashlib.sha256(start).hexdigest()
    assert send("POST", "/snapshots", start, {}, payload) == (201, None)
    assert send("POST", "/snapshots", start, {}, "UNSIGNED-PAYLOAD") == refused
    for body in (b"", b"[]", b'{"VolumeSize": "1"}'):
        payload = hashlib.sha256(body).hexdigest()
        assert send("POST", "/snapshots", body, {}, payload) == (400, "SerializationException")
    body = b'{"VolumeSize": 1, "Colour": "red"}'
    payload = hashlib.sha256(body).hexdigest()
    assert send("POST", "/snapshots", body, {}, payload) == (400, "ValidationException")


def test_what_is_no_request(region):
    connection = http.client.HTTPConnection("127.0.0.1", region.server.port, timeout=5)
    seen = []
    for method, path in (("GET", "/"), ("POST", "/snapshots"), ("DELETE", f"/snapshots/{NONE}")):
        connection.request(method, path)
        answer = connection.getresponse()
        seen.append((answer.status, answer.headers["x-amzn-errortype"]))
        answer.read()
    connection.close()
    assert seen == [
        (404, "UnknownOperationException"),
        (403, "MissingAuthenticationTokenException"),
        (404, "UnknownOperationException"),
    ]


# Faults


def test_a_put_that_never_answers_or_whose_answer_is_lost_is_stored(region, faults, make_client):
    snapshot = region.start()
    region.client = make_client(region.server.url, read_timeout_s=0.3)
    faults.add(Silent(), method="PUT", path="*/0")
    faults.add(Lost(), method="PUT", path="*/1")
    faults.add(Lost(performed=False), method="PUT", path="*/2")
    with pytest.raises(ReadTimeoutError):
        region.put(snapshot, 0, block(0))
    for index in (1, 2):
        with pytest.raises(Exception, match=r"Connection|closed|reset"):
            region.put(snapshot, index, block(index))
    region.complete(snapshot, 2)
    region.pass_s(1)
    assert region.content(snapshot) == {0: block(0), 1: block(1)}


def test_errors_of_the_service(region, faults):
    snapshot = region.start()
    for status in (500, 503):
        body = Response(status, {"x-amzn-errortype": "InternalServerException"}, b'{"Message":"m"}')
        faults.add(Answer(body), method="PUT")
        refusal = region.refusal(region.put, snapshot, 0, block(0))
        assert refusal == (status, "InternalServerException", None)
    for reason in ("ACCOUNT_THROTTLED", "RESOURCE_LEVEL_THROTTLE", "DEPENDENCY_REQUEST_THROTTLED"):
        region.service.faults.add(Throttle(reason=reason), method="PUT")
        refusal = region.refusal(region.put, snapshot, 0, block(0))
        assert refusal == (400, "RequestThrottledException", reason)
    region.service.faults.add(Throttle("ThrottlingException", ""), method="PUT")
    assert region.refusal(region.put, snapshot, 0, block(0))[1] == "ThrottlingException"
    region.put(snapshot, 0, block(0))


def test_a_snapshot_that_is_known_late(region):
    region.service.faults.add(Late(56), method="POST", path="/snapshots")
    snapshot = region.start(ClientToken="t")
    assert region.refusal(region.put, snapshot, 0, block(0))[0] == 404
    region.pass_s(57)
    region.put(snapshot, 0, block(0))
    assert region.start(ClientToken="t") == snapshot


@pytest.mark.parametrize("hidden", [True, False])
def test_a_bit_flips(region, hidden):
    region.service.faults.add(Rot(bit=9, hidden=hidden), method="PUT", path="*/1")
    snapshot = region.make({0: block(0), 1: block(0)})
    tokens = region.tokens(snapshot)
    assert region.read(snapshot, 0, tokens[0])[0] == block(0)
    data, told = region.read(snapshot, 1, tokens[1])
    expected = bytearray(block(0))
    expected[1] ^= 2
    assert data == expected
    assert (told == checksum(data)) is hidden


def test_a_block_that_is_silently_not_stored_is_counted(region):
    parent = region.make({0: block("old")})
    region.service.faults.add(Forget(), method="PUT", times=2)
    child = region.make({0: block("new"), 1: block(1), 2: block(2)}, ParentSnapshotId=parent)
    assert region.content(child) == {0: block("old"), 2: block(2)}


def test_requests_that_are_delivered_twice(region):
    region.service.faults.add(Twice(), times=2)
    snapshot = region.start()
    assert len(region.snapshots.all()) == 1  # boto3 sends a token of its own
    region.put(snapshot, 0, block(0))
    region.service.faults.add(Twice(), path="*/completion/*")
    assert region.refusal(region.complete, snapshot, 1)[1] == "ValidationException"
    region.pass_s(1)
    assert region.state(snapshot) == "completed"
    assert region.content(snapshot) == {0: block(0)}


def test_a_completion_that_ends_in_an_error(region):
    region.service.faults.add(Fail("why"), path="*/completion/*")
    snapshot = region.start()
    region.complete(snapshot, 0)
    region.pass_s(1)
    assert region.state(snapshot) == "error"
    assert region.snapshots.find(snapshot).message == "why"


# Many at a time


def test_many_threads_write_one_snapshot(region):
    snapshot = region.start()
    blocks = {index: block(index % 8) for index in range(64)}

    def write(indices):
        for index in indices:
            region.put(snapshot, index, blocks[index])

    threads = [threading.Thread(target=write, args=(range(n, 64, 8),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    region.complete(snapshot, 64)
    region.pass_s(1)
    assert region.content(snapshot) == blocks
    assert len(region.snapshots.blobs) == 8
    assert region.service.counts["PutSnapshotBlock"] == 64
