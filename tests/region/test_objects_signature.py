"""SigV4 as the region verifies it: boto3's signer is accepted, everything else refused by its code."""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import replace

import botocore.exceptions
import pytest
from botocore.auth import S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from calve.region.message import Body, Request
from calve.region.signature import ANONYMOUS, Allow, Identity, Principals, Refusal, verify


def code_of(call, *args, **kwargs):
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        call(*args, **kwargs)
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def _listing(client):
    return client.list_objects_v2(Bucket="nix")


@pytest.fixture
def session(principals, clock):
    principals.set_policy("machine", [Allow("*")])
    return principals.add_session("machine", "i-1", clock.now() + dt.timedelta(hours=1))


def test_users_and_sessions_are_accepted(client_of, admin, session, service):
    assert _listing(client_of(admin))["KeyCount"] == 0
    assert _listing(client_of(session))["KeyCount"] == 0
    assert [call.principal for call in service.calls] == ["admin", "machine/i-1"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"secret_key": "wrong"}, (403, "SignatureDoesNotMatch")),
        ({"access_key": "AKIANOBODY"}, (403, "InvalidAccessKeyId")),
        ({"token": None}, (403, "InvalidAccessKeyId")),
        ({"token": "other"}, (400, "InvalidToken")),
    ],
)
def test_wrong_credentials(client_of, session, change, expected):
    assert code_of(_listing, client_of(replace(session, **change))) == expected


def test_a_token_with_a_user_s_key_is_invalid(client_of, admin):
    assert code_of(_listing, client_of(replace(admin, token="t"))) == (400, "InvalidToken")


def test_expiry(client_of, session, clock, principals):
    soon = principals.add_session("machine", "i-2", clock.now() + dt.timedelta(minutes=5))
    clock.shift = dt.timedelta(minutes=10)
    assert code_of(_listing, client_of(soon)) == (400, "ExpiredToken")
    assert _listing(client_of(session))


@pytest.mark.parametrize(("minutes", "fine"), [(14, True), (-14, True), (16, False), (-16, False)])
def test_clock_skew(client_of, admin, clock, minutes, fine):
    clock.shift = dt.timedelta(minutes=minutes)
    client = client_of(admin)
    if fine:
        assert _listing(client)
    else:
        assert code_of(_listing, client) == (403, "RequestTimeTooSkewed")


def test_the_wrong_region_is_named(principals, admin, clock):
    refusal = _refusal(principals, _signed(admin, "s3", region="elsewhere"), clock)
    assert (refusal.status, refusal.code) == (400, "AuthorizationHeaderMalformed")
    assert refusal.details == (("Region", "test-region"),)


def test_removed_keys_are_unknown(client_of, admin, principals):
    client = client_of(admin)
    assert _listing(client)
    principals.remove_key(admin.access_key)
    assert code_of(_listing, client) == (403, "InvalidAccessKeyId")


# Requests made by hand


def _signed(
    key, service, *, method="GET", target="/nix/k", region="test-region", headers=(), body=b"", **kw
):
    """Sign with botocore; return what arrives."""
    auth = (S3SigV4Auth if service == "s3" else SigV4Auth)(
        Credentials(key.access_key, key.secret_key, key.token), service, region
    )
    request = AWSRequest(
        method, f"http://host.test{target}", headers=dict(headers), data=body, **kw
    )
    auth.add_auth(request)
    prepared = request.prepare()
    sent = {name.lower(): str(value) for name, value in request.headers.items()}
    path, _, query = prepared.url.removeprefix("http://host.test").partition("?")
    return Request(method, path, query, sent | {"host": "host.test"}, Body(None, 0))


def _verify(principals, request, clock, service="s3", **options):
    return verify(
        request, principals, service=service, region="test-region", now=clock.now(), **options
    )


def _refusal(principals, request, clock, **options):
    with pytest.raises(Refusal) as caught:
        _verify(principals, request, clock, **options)
    return caught.value


@pytest.mark.parametrize(
    "target",
    [
        "/nix/a%20b%2Bc%3D",
        "/nix//double/./../dots",
        "/nix/%C3%BC~%21%2A",
        "/nix?list-type=2&prefix=a%2Fb&empty=&b=2&a=%20&a=1",
        "/nix/k?uploads",
        "/",
    ],
)
def test_botocore_s_signatures_are_accepted(principals, admin, clock, target):
    assert _verify(principals, _signed(admin, "s3", target=target), clock) == admin.identity


@pytest.mark.parametrize("target", ["/", "/snapshots/snap-1/blocks/0", "/a%20b/c?x=1&y=%2F"])
def test_other_services_encode_twice(principals, admin, clock, target):
    request = _signed(admin, "ebs", target=target, method="POST", body=b"data")
    given = hashlib.sha256(b"data").hexdigest()
    identity = _verify(principals, request, clock, service="ebs", payload_sha256=given)
    assert identity == admin.identity
    other = hashlib.sha256(b"other").hexdigest()
    refusal = _refusal(principals, request, clock, service="ebs", payload_sha256=other)
    assert refusal.code == "SignatureDoesNotMatch"


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PUT"},
        {"path": "/nix/other"},
        {"query": "prefix=x"},
        {"headers": {"host": "other.test"}},
        {"headers": {"range": "bytes=0-1"}},
        {"headers": {"x-amz-content-sha256": "0" * 64}},
    ],
)
def test_what_was_signed_may_not_change(principals, admin, clock, change):
    request = _signed(admin, "s3", headers=[("Range", "bytes=5-9")])
    assert _verify(principals, request, clock) == admin.identity
    if "headers" in change:
        change = {"headers": dict(request.headers) | change["headers"]}
    refusal = _refusal(principals, replace(request, **change), clock)
    assert (refusal.status, refusal.code) == (403, "SignatureDoesNotMatch")


def _changed(request, name, value):
    headers = {key: text for key, text in request.headers.items() if key != name}
    return replace(request, headers=headers if value is None else headers | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("x-amz-content-sha256", None, "InvalidRequest"),
        ("x-amz-content-sha256", "nonsense", "InvalidArgument"),
        ("x-amz-content-sha256", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "NotImplemented"),
        ("x-amz-date", None, "AccessDenied"),
        ("x-amz-date", "yesterday", "AccessDenied"),
        ("x-amz-date", "20269999T999999Z", "AccessDenied"),
        ("x-amz-meta-more", "unsigned", "AccessDenied"),
        ("authorization", "Basic abc", "InvalidRequest"),
        ("authorization", "AWS4-HMAC-SHA256 ", "AuthorizationHeaderMalformed"),
        ("authorization", "AWS4-HMAC-SHA256 Credential=a/b", "AuthorizationHeaderMalformed"),
    ],
)
def test_malformed_headers(principals, admin, clock, name, value, code):
    request = _changed(_signed(admin, "s3"), name, value)
    assert _refusal(principals, request, clock).code == code


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/s3/", "/ec2/"),
        ("aws4_request", "aws5"),
        ("SignedHeaders=host;", "SignedHeaders="),
        ("SignedHeaders=host;x-amz-content-sha256", "SignedHeaders=x-amz-content-sha256;host"),
        ("Signature=", "Signature=g"),
    ],
)
def test_malformed_authorizations(principals, admin, clock, old, new):
    request = _signed(admin, "s3")
    header = request.headers["authorization"]
    assert old in header
    request = _changed(request, "authorization", header.replace(old, new))
    assert _refusal(principals, request, clock).code == "AuthorizationHeaderMalformed"


def test_the_scope_s_date_is_the_request_s(principals, admin, clock):
    request = _signed(admin, "s3")
    day = request.headers["x-amz-date"][:8]
    header = request.headers["authorization"].replace(f"/{day}/", "/20200101/")
    refusal = _refusal(principals, _changed(request, "authorization", header), clock)
    assert refusal.code == "AuthorizationHeaderMalformed"


def test_no_signature_is_nobody(principals, clock):
    request = Request("GET", "/nix/k", "", {"host": "x"}, Body(None, 0))
    assert _verify(principals, request, clock) == ANONYMOUS
    assert not principals.allows(ANONYMOUS, "s3:GetObject", "arn:aws:s3:::nix/k")


def test_payload_that_is_not_what_was_signed(client_of, admin, raw, server):
    key = admin
    request = _signed(key, "s3", method="PUT", body=b"signed!", target="/nix/k")
    lines = [f"PUT {request.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    head = "\r\n".join([*lines, "Content-Length: 7", "", ""]).encode()
    assert raw(head + b"signed!").startswith(b"HTTP/1.1 200 ")
    answer = raw(head + b"altered")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"<Code>XAmzContentSHA256Mismatch</Code>" in answer


# Policies


@pytest.mark.parametrize(
    ("allow", "action", "resource", "expected"),
    [
        (Allow("s3:Get*", "arn:aws:s3:::nix/*"), "s3:GetObject", "arn:aws:s3:::nix/a/b", True),
        (Allow("s3:getobject", "*"), "s3:GetObject", "x", True),
        (Allow("s3:Get*", "arn:aws:s3:::nix/*"), "s3:PutObject", "arn:aws:s3:::nix/a", False),
        (Allow("*", "arn:aws:s3:::nix/*"), "s3:ListBucket", "arn:aws:s3:::nix", False),
        (Allow("*", "a?c"), "x", "abc", True),
        (Allow("*", "[ab]"), "x", "a", False),
        (Allow("*", "r/${aws:userid}/*"), "x", "r/AROA:i-1/report", True),
        (Allow("*", "r/${aws:userid}/*"), "x", "r/AROA:i-2/report", False),
    ],
)
def test_statements(allow, action, resource, expected):
    principals = Principals()
    principals.set_policy("role", [Allow("none", "none"), allow])
    assert principals.allows(Identity("role", "i-1", "AROA:i-1"), action, resource) is expected


def test_a_machine_writes_its_own_report_alone(client_of, principals, clock):
    principals.set_policy(
        "web", [Allow("s3:PutObject", "arn:aws:s3:::nix/boot-reports/${aws:userid}/*")]
    )
    end = clock.now() + dt.timedelta(hours=1)
    one, two = (principals.add_session("web", name, end) for name in ("i-1", "i-2"))
    key = f"boot-reports/{one.identity.user_id}/1.json"
    client_of(one).put_object(Bucket="nix", Key=key, Body=b"{}")
    denied = code_of(client_of(two).put_object, Bucket="nix", Key=key, Body=b"{}")
    assert denied == (403, "AccessDenied")


def test_secrets_are_not_shown(session):
    assert session.secret_key not in repr(session)
    assert session.token not in repr(session)
