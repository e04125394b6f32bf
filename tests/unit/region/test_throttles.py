"""Quotas and tokens: seconds that a test lets pass."""

from __future__ import annotations

import datetime as dt

import pytest

from calve.region.signature import Refusal
from calve.region.throttles import Limits, Throttles
from calve.region.tokens import Tokens


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds

    def now(self):
        return dt.datetime.fromtimestamp(self.seconds, dt.UTC)


def allowed(throttles, action, snapshot_id="", tries=100):
    count = 0
    for _ in range(tries):
        try:
            throttles.check(action, snapshot_id)
        except Refusal:
            continue
        count += 1
    return count


@pytest.mark.parametrize(
    ("action", "per_s"),
    [("StartSnapshot", 10), ("CompleteSnapshot", 10), ("ListSnapshotBlocks", 50)],
)
def test_a_second_s_worth_at_a_time(action, per_s):
    clock = Clock()
    throttles = Throttles(Limits(), clock)
    assert allowed(throttles, action) == per_s
    clock.seconds += 0.5
    assert allowed(throttles, action) == per_s / 2
    clock.seconds += 60
    assert allowed(throttles, action) == per_s


@pytest.mark.parametrize("action", ["PutSnapshotBlock", "GetSnapshotBlock"])
def test_blocks_by_snapshot_within_the_account(action):
    throttles = Throttles(Limits(5, 8, 5, 8), Clock())
    assert allowed(throttles, action, "a") == 5
    with pytest.raises(Refusal) as caught:
        throttles.check(action, "a")
    assert caught.value.details == (("Reason", "RESOURCE_LEVEL_THROTTLE"),)
    assert allowed(throttles, action, "b") == 3
    with pytest.raises(Refusal) as caught:
        throttles.check(action, "c")
    assert caught.value.details == (("Reason", "ACCOUNT_THROTTLED"),)
    throttles.forget("a")


def test_lists_have_a_bucket_each():
    throttles = Throttles(Limits(list_per_s=1), Clock())
    assert allowed(throttles, "ListSnapshotBlocks") == 1
    assert allowed(throttles, "ListChangedBlocks") == 1


def test_tokens_are_bound_and_expire():
    tokens = Tokens(b"key")
    token = tokens.issue("block a 1", 100.0, 7)
    assert len(token) <= 256
    assert tokens.read("block a 1", token, 99.9) == 7
    assert tokens.read("block a 1", token, 100.0) is None
    assert tokens.read("block a 2", token, 0.0) is None
    assert Tokens(b"other").read("block a 1", token, 0.0) is None
    for bad in ("", "!", "AAAA", token[:-4], f"{token}AAAA", f"B{token[1:]}"):
        assert tokens.read("block a 1", bad, 0.0) is None
