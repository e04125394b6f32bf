"""`aws.ebs` on its own: answers that are none, what it sends, where it goes."""

from __future__ import annotations

import hashlib
import json

import pytest

from calve.aws.ebs import EbsDirect, Listed, Started
from calve.aws.session import actions_of
from calve.errors import (
    AccessError,
    ConflictError,
    DamagedError,
    NotFoundError,
    RefusedError,
    TransientError,
)
from calve.region.ebs_faults import Throttle
from calve.region.faults import Answer
from calve.region.message import Response
from calve.transport.credentials import Credentials, Static
from calve.transport.http import Client

NONE = "snap-0123456789abcdef0"
DATA = bytes(512 << 10)


def says(place, body, *, status=200):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    place.faults.add(Answer(Response(status, {"Content-Type": "application/json"}, data)))


@pytest.mark.parametrize(
    "body",
    [b"", b"not json", b"[" * 100_000, b"[]", b'"snap"', {}, {"SnapshotId": 5}, {"SnapshotId": ""}],
    ids=lambda body: repr(body)[:20],
)
def test_a_start_that_is_no_answer(place, body):
    says(place, body, status=201)
    with pytest.raises(DamagedError) as caught:
        place.ebs.start(1, token="t")
    assert caught.value.place == f"{place.server.url}/snapshots"


@pytest.mark.parametrize("began", [None, "yesterday", []])
def test_a_start_that_does_not_say_when(place, began):
    says(place, {"SnapshotId": NONE, "StartTime": began}, status=201)
    assert place.ebs.start(1, token="t") == Started(NONE, "", None)


@pytest.mark.parametrize(
    "body",
    [
        {"Blocks": 5},
        {"Blocks": {"BlockIndex": 1}},
        {"Blocks": ["x"]},
        {"Blocks": [{}]},
        {"Blocks": [{"BlockIndex": "1"}]},
        {"Blocks": [{"BlockIndex": True}]},
    ],
    ids=repr,
)
def test_a_list_that_is_none(place, body):
    says(place, body)
    with pytest.raises(DamagedError) as caught:
        list(place.ebs.blocks(NONE))
    assert caught.value.place.startswith(f"{place.server.url}/snapshots/{NONE}/blocks")


@pytest.mark.parametrize("body", [{}, {"Blocks": None}, {"Blocks": [], "NextToken": None}])
def test_a_list_of_nothing(place, body):
    says(place, body)
    assert list(place.ebs.blocks(NONE)) == []


@pytest.mark.parametrize("size", [0, 512, (512 << 10) - 1, (512 << 10) + 1])
def test_a_block_of_another_size(place, size):
    says(place, bytes(size))
    with pytest.raises(DamagedError):
        place.ebs.get(NONE, Listed(3, "token"))


def test_a_block_that_is_gone_has_no_token(place):
    says(place, {"ChangedBlocks": [{"BlockIndex": 7, "FirstBlockToken": "a"}]})
    assert list(place.ebs.changed(NONE, NONE)) == [Listed(7, "")]


def test_the_checksum_that_is_given_is_what_counts(place):
    made = place.ebs.start(1, token="t")
    assert (made.status, made.started_s) == ("pending", place.snapshots.find(made.id).started_at)
    with pytest.raises(RefusedError, match="INVALID_BLOCK"):
        place.ebs.put(made.id, 0, DATA, hashlib.sha256(b"other").digest())
    place.ebs.put(made.id, 0, DATA, hashlib.sha256(DATA).digest())


def test_a_token_means_one_snapshot(place):
    first = place.ebs.start(1, token="t", tags={"a": "b"}, description="d", timeout_minutes=10)
    assert (
        place.ebs.start(1, token="t", tags={"a": "b"}, description="d", timeout_minutes=10) == first
    )
    with pytest.raises(ConflictError):
        place.ebs.start(2, token="t")
    assert place.snapshots.find(first.id).timeout_s == 600


def test_what_is_refused(place):
    digest = hashlib.sha256(DATA).digest()
    with pytest.raises(NotFoundError):
        place.ebs.put(NONE, 0, DATA, digest)
    place.service.faults.add(Throttle(), method="PUT")
    with pytest.raises(TransientError) as caught:
        place.ebs.put(NONE, 0, DATA, digest)
    assert caught.value.service_code == "RequestThrottledException"
    assert place.puts() == {0: 2}  # one request a call
    wrong = Static(Credentials(place.key.access_key, "wrong"))
    ebs = EbsDirect(place.client, "test-region", wrong, endpoint=place.server.url)
    with pytest.raises(AccessError):
        ebs.start(1, token="t")


@pytest.mark.parametrize(
    ("region", "url"),
    [
        ("eu-central-1", "https://ebs.eu-central-1.amazonaws.com"),
        ("cn-north-1", "https://ebs.cn-north-1.amazonaws.com.cn"),
    ],
)
def test_where_it_goes(region, url):
    with Client() as client:
        assert EbsDirect(client, region, Static(Credentials("a", "b")))._base == url


def test_every_action_has_its_permission():
    assert actions_of(EbsDirect) == {
        "ebs:StartSnapshot",
        "ec2:CreateTags",
        "ebs:PutSnapshotBlock",
        "ebs:CompleteSnapshot",
        "ebs:ListSnapshotBlocks",
        "ebs:ListChangedBlocks",
        "ebs:GetSnapshotBlock",
    }
