"""Instance metadata, version 2, with botocore and http.client as its clients."""

from __future__ import annotations

import datetime as dt
import http.client
import json

import botocore.utils
import pytest

from calve.region.faults import Answer, FaultPlan
from calve.region.imds import Imds, Instance
from calve.region.message import Response
from calve.region.server import Server


class State:
    """What changes while a machine runs."""

    def __init__(self):
        self.user_data = b'{"calve": 1}'
        self.key = None
        self.lifecycle = "InService"
        self.tags = {"Name": "web"}


@pytest.fixture
def state(principals, clock):
    state = State()
    state.key = principals.add_session("web", "i-1", clock.now() + dt.timedelta(hours=6))
    return state


@pytest.fixture
def imds(state, clock):
    instance = Instance(
        "i-1",
        "test-region",
        "test-region-a",
        "10.0.2.15",
        role="web",
        user_data=lambda: state.user_data,
        credentials=lambda: state.key,
        lifecycle_state=lambda: state.lifecycle,
        tags=lambda: state.tags,
    )
    return Imds(instance, clock=clock)


@pytest.fixture
def plan():
    return FaultPlan()


@pytest.fixture
def ask(imds, plan):
    """Return a function: path (and token, method, headers) in, status and body out."""
    with Server(imds.handle, faults=plan) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)

        def ask(path, token=None, method="GET", headers=()):
            sent = dict(headers)
            if token is not None:
                sent["X-aws-ec2-metadata-token"] = token
            connection.request(method, path, headers=sent)
            response = connection.getresponse()
            return response.status, response.read().decode()

        ask.port = server.port
        yield ask
        connection.close()


TTL = "X-aws-ec2-metadata-token-ttl-seconds"


def token_of(ask, seconds=60):
    status, token = ask("/latest/api/token", method="PUT", headers={TTL: str(seconds)})
    assert status == 200
    return token


def test_nothing_without_a_token(ask):
    for token in (None, "", "wrong"):
        assert ask("/latest/meta-data/instance-id", token)[0] == 401
        assert ask("/latest/user-data", token)[0] == 401


@pytest.mark.parametrize("seconds", [None, "0", "21601", "-1", "x", "", "99999999"])
def test_a_token_needs_a_lifetime(ask, seconds):
    headers = {} if seconds is None else {TTL: seconds}
    assert ask("/latest/api/token", method="PUT", headers=headers)[0] == 400


def test_how_a_token_is_not_had(ask):
    assert ask("/latest/api/token", headers={TTL: "60"})[0] == 405
    headers = {TTL: "60", "X-Forwarded-For": "10.0.0.1"}
    assert ask("/latest/api/token", method="PUT", headers=headers)[0] == 403
    assert ask("/latest/user-data", token_of(ask), "PUT")[0] == 405


def test_tokens_expire(ask, clock, imds):
    token = token_of(ask, 60)
    clock.shift = dt.timedelta(seconds=59)
    assert ask("/latest/meta-data/instance-id", token) == (200, "i-1")
    clock.shift = dt.timedelta(seconds=61)
    assert ask("/latest/meta-data/instance-id", token)[0] == 401
    token = token_of(ask)
    imds.expire_tokens()
    assert ask("/latest/meta-data/instance-id", token)[0] == 401


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("instance-id", "i-1"),
        ("local-ipv4", "10.0.2.15"),
        ("instance-type", "t3.nano"),
        ("placement/region", "test-region"),
        ("placement/availability-zone", "test-region-a"),
        ("placement/", "availability-zone\nregion"),
        ("iam/security-credentials/", "web"),
        ("iam/security-credentials", "web"),
        ("autoscaling/target-lifecycle-state", "InService"),
        ("tags/instance", "Name"),
        ("tags/instance/Name", "web"),
    ],
)
def test_metadata(ask, path, expected):
    assert ask(f"/latest/meta-data/{path}", token_of(ask)) == (200, expected)
    assert ask(f"/2021-07-15/meta-data/{path}", token_of(ask)) == (200, expected)


def test_the_root_lists_what_there_is(ask):
    token = token_of(ask)
    names = ask("/latest/meta-data/", token)[1].split("\n")
    assert {"instance-id", "placement/", "iam/", "tags/"} <= set(names)
    for path in (
        "/",
        "/latest/meta-data/none",
        "/latest/none",
        "/latest/meta-data/iam/x",
        "/x/user-data",
    ):
        assert ask(path, token)[0] == 404


def test_user_data_changes_and_may_be_none(ask, state):
    token = token_of(ask)
    assert ask("/latest/user-data", token) == (200, '{"calve": 1}')
    state.user_data = b"other"
    assert ask("/latest/user-data", token) == (200, "other")
    state.user_data = None
    assert ask("/latest/user-data", token)[0] == 404


def test_outside_of_a_group_without_role_and_tags(ask, state):
    state.lifecycle = state.tags = state.key = None
    token = token_of(ask)
    for path in (
        "autoscaling/target-lifecycle-state",
        "tags/instance",
        "iam/security-credentials/web",
    ):
        assert ask(f"/latest/meta-data/{path}", token)[0] == 404


def test_documents(ask, state):
    token = token_of(ask)
    secrets = json.loads(ask("/latest/meta-data/iam/security-credentials/web", token)[1])
    assert secrets.pop("LastUpdated")
    assert secrets == {
        "Code": "Success",
        "Type": "AWS-HMAC",
        "AccessKeyId": state.key.access_key,
        "SecretAccessKey": state.key.secret_key,
        "Token": state.key.token,
        "Expiration": state.key.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    info = json.loads(ask("/latest/meta-data/iam/info", token)[1])
    assert info["InstanceProfileArn"].endswith(":instance-profile/web")
    identity = json.loads(ask("/latest/dynamic/instance-identity/document", token)[1])
    assert identity["instanceId"] == "i-1"
    assert identity["region"] == "test-region"


def test_botocore_finds_its_credentials_and_they_work(
    ask, state, client_of, principals, monkeypatch
):
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    fetcher = botocore.utils.InstanceMetadataFetcher(
        base_url=f"http://127.0.0.1:{ask.port}/", timeout=5
    )
    found = fetcher.retrieve_iam_role_credentials()
    fetcher._session.close()
    assert found["access_key"] == state.key.access_key
    assert found["token"] == state.key.token


def test_the_service_fails_at_first(ask, plan, imds):
    plan.add(Answer(Response(503)), times=2)
    assert [ask("/latest/api/token", method="PUT", headers={TTL: "9"})[0] for _ in range(3)] == [
        503,
        503,
        200,
    ]


def test_credentials_are_late(ask, plan, imds):
    plan.add(Answer(Response(404)), path="*/iam/security-credentials/*", times=1)
    token = token_of(ask)
    path = "/latest/meta-data/iam/security-credentials/web"
    assert [ask(path, token)[0] for _ in range(2)] == [404, 200]
    assert ask("/latest/user-data", token)[0] == 200
    assert list(imds.calls) == [
        ("PUT", "/latest/api/token", 200),
        ("GET", path, 200),
        ("GET", "/latest/user-data", 200),
    ]
