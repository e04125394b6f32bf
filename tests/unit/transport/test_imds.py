from __future__ import annotations

import datetime as dt
import json

import pytest

from calve.errors import AccessError, DamagedError, DeadlineError, NotFoundError
from calve.transport.imds import USER_DATA_BYTES, Imds, Role

ROLES = "/latest/meta-data/iam/security-credentials/"


class Service:
    """The metadata service: tokens, paths, and faults by number of request."""

    def __init__(self, clock):
        self.clock = clock
        self.tokens = []
        self.valid = set()
        self.paths = {"/latest/meta-data/instance-id": b"i-0123456789abcdef0"}
        self.faults = {}
        self.keys = 0

    def role(self, name="web", minutes=360, **fields):
        self.keys += 1
        end = self.clock.now() + dt.timedelta(minutes=minutes)
        document = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": f"ASIA{self.keys}",
            "SecretAccessKey": "secret",
            "Token": "token",
            "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
        } | fields
        self.paths[ROLES] = name.encode()
        self.paths[ROLES + name] = json.dumps(document).encode()

    def __call__(self, wire, request):
        fault = self.faults.get(request.number) or self.faults.get(request.method)
        if fault == "hang":
            wire.hang_up()
        if fault:
            wire.answer(b"fault", status=fault)
        elif request.method == "PUT":
            assert request.path == "/latest/api/token"
            assert request.headers["x-aws-ec2-metadata-token-ttl-seconds"] == "300"
            token = f"token{len(self.tokens)}=="
            self.tokens.append(token)
            self.valid = {token}
            wire.answer(token.encode())
        elif request.headers["x-aws-ec2-metadata-token"] not in self.valid:
            wire.answer(status="401 Unauthorized")
        elif request.path in self.paths:
            wire.answer(self.paths[request.path])
        else:
            wire.answer(status="404 Not Found")


@pytest.fixture
def service(clock):
    return Service(clock)


@pytest.fixture
def server(serve, service):
    return serve(service)


@pytest.fixture
def imds(server, client, clock):
    return Imds(client, server.url, clock=clock, rng=lambda: 1.0)


def methods(server):
    return " ".join(request.method for request in server.requests)


def test_one_token_serves_many_requests(server, imds):
    for _ in range(3):
        assert imds.instance_id() == "i-0123456789abcdef0"
    assert methods(server) == "PUT GET GET GET"
    assert server.connections == 1


def test_a_token_is_renewed_before_it_ends(server, imds, clock):
    imds.instance_id()
    clock.seconds += 269
    imds.instance_id()
    clock.seconds += 1
    imds.instance_id()
    assert methods(server) == "PUT GET GET PUT GET"


def test_a_refused_token_is_renewed(server, imds, service):
    imds.instance_id()
    service.valid.clear()
    imds.instance_id()
    assert methods(server) == "PUT GET GET PUT GET"


def test_a_token_that_is_always_refused(server, imds, service):
    service.faults["GET"] = "401 Unauthorized"
    with pytest.raises(AccessError):
        imds.instance_id()
    assert methods(server) == "PUT GET PUT GET"


@pytest.mark.parametrize("status", ["403 Forbidden", "404 Not Found", "405 No", "400 Bad"])
def test_without_a_token_nothing_is_asked(server, imds, service, status):
    service.faults["PUT"] = status
    with pytest.raises(AccessError, match="version 2") as error:
        imds.instance_id()
    assert "HttpEndpoint" in error.value.hint
    assert methods(server) == "PUT"


def test_switched_off_later(server, imds, service):
    imds.instance_id()
    service.faults["GET"] = "403 Forbidden"
    with pytest.raises(AccessError, match="version 2"):
        imds.instance_id()


@pytest.mark.parametrize("token", [b"", b"a b", b"a\r\nX: y", b"\xff", b"x" * 2000])
def test_a_malformed_token(serve, client, clock, token):
    server = serve(lambda wire, _: wire.answer(token))
    with pytest.raises(DamagedError):
        Imds(client, server.url, clock=clock).instance_id()
    assert methods(server) == "PUT"


def test_faults_pass(server, imds, service, clock):
    service.faults = {1: "hang", 2: "503 Busy", 4: "500 Oops", 5: "hang"}
    assert imds.instance_id() == "i-0123456789abcdef0"
    assert clock.waits == pytest.approx([0.02, 0.04, 0.08])
    assert methods(server) == "PUT PUT PUT GET GET GET"  # the last but one was on a kept connection


def test_unreachable(server, imds, service, clock):
    service.faults["PUT"] = "hang"
    with pytest.raises(DeadlineError):
        imds.instance_id()
    assert max(clock.waits) == 3
    assert 50 < clock.seconds <= 60


def test_no_answer(serve, hasty, clock):
    server = serve(lambda wire, _: wire.stall())
    policy = Imds(hasty).policy
    assert policy.deadline_s == 60
    short = type(policy)(attempts=None, base_s=1, cap_s=1, deadline_s=2)
    with pytest.raises(DeadlineError):
        Imds(hasty, server.url, clock=clock, policy=short, rng=lambda: 1.0).instance_id()
    assert len(server.requests) == 3


def test_user_data(imds, service):
    assert imds.user_data() is None
    service.paths["/latest/user-data"] = b"\x00" * USER_DATA_BYTES
    assert imds.user_data() == b"\x00" * USER_DATA_BYTES
    service.paths["/latest/user-data"] += b"x"
    with pytest.raises(DamagedError):
        imds.user_data()


def test_a_missing_path(imds):
    with pytest.raises(NotFoundError):
        imds.get("/latest/meta-data/nothing")


@pytest.mark.parametrize("text", [b"", b"i-", b"<html>", b"i-12\n34", b"\xff"])
def test_a_malformed_instance_id(imds, service, text):
    service.paths["/latest/meta-data/instance-id"] = text
    with pytest.raises(DamagedError):
        imds.instance_id()


def test_role(server, imds, service, clock):
    service.role()
    role = Role(imds, clock=clock)
    value = role.credentials()
    assert (value.access_key, value.secret_key, value.token) == ("ASIA1", "secret", "token")
    assert value.expires == clock.now() + dt.timedelta(hours=6)
    assert "secret" not in repr(value)
    assert "token" not in repr(value)
    assert role.credentials() is value
    assert methods(server) == "PUT GET GET"


def test_renewed_five_minutes_before_the_end(imds, service, clock):
    service.role(minutes=10)
    role = Role(imds, clock=clock)
    role.credentials()
    service.role(minutes=370)
    clock.seconds += 299
    assert role.credentials().access_key == "ASIA1"
    clock.seconds += 2
    assert role.credentials().access_key == "ASIA2"


def test_renewed_when_they_are_refused(imds, service, clock):
    service.role()
    role = Role(imds, clock=clock)
    role.credentials()
    service.role()
    assert role.credentials().access_key == "ASIA1"
    assert role.credentials(refresh=True).access_key == "ASIA2"


def test_the_old_ones_serve_while_the_service_is_away(server, imds, service, clock):
    service.role(minutes=10)
    role = Role(imds, clock=clock)
    role.credentials()
    clock.seconds += 301
    service.faults = {"PUT": "hang", "GET": "hang"}
    assert role.credentials().access_key == "ASIA1"
    asked = len(server.requests)
    assert role.credentials().access_key == "ASIA1"
    assert len(server.requests) == asked
    clock.seconds += 300
    with pytest.raises(DeadlineError):
        role.credentials()


def test_a_new_role_may_be_missing_at_first(imds, service, clock):
    role = Role(imds, clock=clock)
    wait = clock.wait

    def later(event, seconds):
        if clock.seconds > 5 and not service.keys:
            service.role()
        return wait(event, seconds)

    clock.wait = later
    assert role.credentials().access_key == "ASIA1"


def test_no_role(imds, clock):
    with pytest.raises(AccessError, match="no role") as error:
        Role(imds, clock=clock).credentials()
    assert "instance profile" in error.value.hint
    assert 30 <= clock.seconds < 40


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"null",
        b'"Code"',
        b"{}",
        b'{"Code": "Success"}',
        b'{"Code":"Success","AccessKeyId":"A","SecretAccessKey":"S","Token":"T","Expiration":5}',
        b'{"Code":"Success","AccessKeyId":"A","SecretAccessKey":"S","Token":"T","Expiration":"x"}',
        b'{"Code":"Success","AccessKeyId":1,"SecretAccessKey":"S","Token":"T","Expiration":"2026-01-01"}',
        b'{"Code":"Success","AccessKeyId":"A","SecretAccessKey":"","Token":"T","Expiration":"2026-01-01"}',
    ],
)
def test_malformed_role_documents(imds, service, clock, document):
    service.role()
    service.paths[ROLES + "web"] = document
    with pytest.raises(DamagedError, match="malformed"):
        Role(imds, clock=clock).credentials()


@pytest.mark.parametrize("name", ["", "../user-data", "a b", "x" * 65])
def test_a_malformed_role_name(imds, service, clock, name):
    service.role(name)
    with pytest.raises(DamagedError, match="no role"):
        Role(imds, clock=clock).credentials()


def test_a_role_that_may_not_be_assumed(imds, service, clock):
    service.role(Code="AssumeRoleUnauthorizedAccess")
    with pytest.raises(AccessError):
        Role(imds, clock=clock).credentials()
